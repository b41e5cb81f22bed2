"""Two attentions of the same queries, over different keys, made the attention over all of the keys.

    lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) · out_a + exp(lse_b - lse) · out_b

which is exact: a prefix that many sequences share, or the keys of another device, can be attended to by themselves.
Section 2.2 of Ye et al., "FlashInfer" (2025), https://arxiv.org/abs/2501.01005.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_shape,
)
from octavo.kernels.launch import empty, launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous
from octavo.reference import attention as reference


@dataclass(frozen=True)
class _Tiles:
    block_rows: int
    block_d: int
    num_warps: int


def choose_tiles(head_size: int) -> _Tiles:
    """Rows (one head of one token each) of a program: about 2048 elements of either part."""
    block_d = next_power_of_2(head_size)
    return _Tiles(max(2048 // block_d, 1), block_d, 4)


@triton.jit
def _load_part(out_ptr, offsets, weight, mask):
    """A part's rows as fp32, zeros where it weighs nothing: what lies there may be NaN."""
    return tl.where(weight == 0.0, 0.0, tl.load(out_ptr + offsets, mask=mask, other=0.0).to(tl.float32))


# Heads may stand before tokens in lse, and then a stride is the number of tokens.
_LSE_STRIDES = [f"stride_lse_{part}_{dim}" for part in "ab" for dim in ("token", "head")]


@triton.jit(do_not_specialize=["num_rows", *_LSE_STRIDES])
def _merge_attention_states_kernel(
    # Bound by memory: both parts read once and the result written once. A row is one head of one token.
    out_ptr,
    lse_ptr,
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    num_rows,
    stride_out_a_token,
    stride_out_a_head,
    stride_lse_a_token,
    stride_lse_a_head,
    stride_out_b_token,
    stride_out_b_head,
    stride_lse_b_token,
    stride_lse_b_head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [ROWS]
    inside = row < num_rows
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (d < D)

    lse_a = tl.load(lse_a_ptr + token * stride_lse_a_token + head * stride_lse_a_head, mask=inside, other=0.0)
    lse_b = tl.load(lse_b_ptr + token * stride_lse_b_token + head * stride_lse_b_head, mask=inside, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    shift = tl.where(top == -float("inf"), 0.0, top)  # no keys at all: subtract 0, not -inf
    LOG2_E: tl.constexpr = 1.4426950408889634
    weight_a, weight_b = tl.exp2((lse_a - shift) * LOG2_E), tl.exp2((lse_b - shift) * LOG2_E)
    total = weight_a + weight_b
    a_at = (token * stride_out_a_token + head * stride_out_a_head)[:, None] + d
    b_at = (token * stride_out_b_token + head * stride_out_b_head)[:, None] + d
    part_a = _load_part(out_a_ptr, a_at, weight_a[:, None], mask)  # [ROWS, D]
    part_b = _load_part(out_b_ptr, b_at, weight_b[:, None], mask)  # [ROWS, D]
    total = tl.where(total == 0.0, 1.0, total)  # zeros, and -inf, which `top` is
    out = (part_a * weight_a[:, None] + part_b * weight_b[:, None]) / total[:, None]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + d, out.to(out_ptr.dtype.element_ty), mask=mask)
    ln2 = 0.6931471805599453
    tl.store(lse_ptr + row, top + tl.log2(total) * ln2, mask=inside)


def _merge_attention_states_cuda(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, head_size = out_a.shape
    out = empty(out_a.shape, out_a.dtype, out_a.device)
    lse = empty(lse_a.shape, torch.float32, out_a.device)
    tiles = choose_tiles(head_size)
    launch(
        _merge_attention_states_kernel,
        (cdiv(tokens * heads, tiles.block_rows),),
        out,
        lse,
        out_a,
        lse_a,
        out_b,
        lse_b,
        tokens * heads,
        *out_a.stride()[:2],
        *lse_a.stride(),
        *out_b.stride()[:2],
        *lse_b.stride(),
        device=out_a.device,
        num_warps=tiles.num_warps,
        HEADS=heads,
        D=head_size,
        BLOCK_ROWS=tiles.block_rows,
        BLOCK_D=tiles.block_d,
        CHAINED=chains(out_a.device),
    )
    return out, lse


def _merge_attention_states_fake(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


_merge_attention_states = register(
    "merge_attention_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    reference=reference.merge_attention_states,
    launcher=_merge_attention_states_cuda,
    fake=_merge_attention_states_fake,
)


@replayed
def merge_attention_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of two attentions of the same queries.

    `lse = log(exp(lse_a) + exp(lse_b));  out = exp(lse_a - lse) · out_a + exp(lse_b - lse) · out_b`

    Args:
        out_a: `[tokens, heads, head_size]`, fp16, bf16 or fp32, what `paged_attention` returns over some of the keys;
            last dimension contiguous, the others of any stride.
        lse_a: `[tokens, heads]` fp32 of any strides, natural logarithm: what it returns with `return_lse=True`. A row
            of -inf has no keys, and what out_a holds there does not matter.
        out_b: as out_a, in its dtype and shape, over other keys; its strides may differ.
        lse_b: as lse_a. Sinks count as keys: give them to one of the two attentions only.

    Returns:
        `[tokens, heads, head_size]`, contiguous, in out_a's dtype, and `[tokens, heads]` fp32, contiguous: as
        `paged_attention` over all of the keys. Rows that have no keys in either part are 0, with -inf.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit.

    Computed in fp32 and rounded once. Safe in a CUDA graph. A row's bits do not depend on the other rows.
    https://arxiv.org/abs/2501.01005
    """
    check_dtype("out_a", out_a, FLOATS)
    if out_a.dim() != 3 or 0 in out_a.shape[1:]:
        raise ValueError(f"out_a: shape {tuple(out_a.shape)}; expected [tokens, heads, head_size], heads not empty")
    check_dtype("out_b", out_b, (out_a.dtype,))
    check_shape("out_b", out_b, out_a.shape, "the shape of out_a")
    for name, out in (("out_a", out_a), ("out_b", out_b)):
        check_last_dim_contiguous(name, out)
        check_device(name, out, "out_a", out_a)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(name, lse, (torch.float32,))
        check_shape(name, lse, out_a.shape[:2], "[tokens, heads], as out_a")
        check_device(name, lse, "out_a", out_a)
    return _merge_attention_states(out_a, lse_a, out_b, lse_b)
