"""RMSNorm, alone and with the residual addition in front of it.

    y = x / sqrt(mean(x²) + eps) · (weight + weight_offset)

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), https://arxiv.org/abs/1910.07467. Gemma stores
weight − 1: give `weight_offset=1.0`. Sums and products are fp32 and rounded once, at the store.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_device, check_dtype, check_last_dim_contiguous, check_norm, check_shape
from octavo.kernels.launch import empty, launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import (
    cdiv,
    chains,
    let_next_start,
    next_power_of_2,
    row_offset,
    row_strides,
    wait_for_previous,
)
from octavo.reference import norm as reference


@dataclass(frozen=True)
class _Tiles:
    rows: int
    block: int
    num_warps: int


def choose_tiles(width: int, itemsize: int) -> _Tiles:
    """Rows of one program, elements of a row held at once, and the warps that hold them; wider rows are walked twice.

    A thread holds 64 to 128 bytes of x: some 16-byte loads on their way at a time. Narrow rows (heads) share a program.
    Of rows that are walked twice as few as possible are under way, so that the second walk finds them in L2.
    """
    block = next_power_of_2(width)
    if block * itemsize > 65536:
        return _Tiles(1, 16384, 32)
    held = next_power_of_2(width * itemsize + 1) // 2  # the largest power of two up to a row's bytes
    return _Tiles(max(2048 // block, 1), block, max(held // 2048, 4))


EARLY_PROGRAMS = tl.constexpr(32)
"""Up to so many let the next kernel start ahead of their own wait: a linear layer, whose weights wait for nothing.

On an H100 that takes 2 to 6 µs off a layer of Llama-3-8B with up to 32 tokens, and a tenth off norms alone. With 64
programs a chain of norms alone would take longer, for the waiting ones are in each other's way.
"""


@triton.jit
def _load_row(x_ptr, residual_ptr, cols, mask, ADD: tl.constexpr):
    x = tl.load(x_ptr + cols, mask=mask, other=0.0)
    if ADD:
        # Rounded to the residual's dtype before the norm, because that is what the next layer will read.
        x = (x.to(tl.float32) + tl.load(residual_ptr + cols, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual_ptr + cols, x, mask=mask)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "x_inner", "residual_inner"])
def _rms_norm_kernel(
    # Bound by memory: x (and residual) read once and written once; one program a row, or some narrow ones.
    out_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    num_rows,
    N,
    eps,
    weight_offset,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    ADD: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    inside = row < num_rows
    x_ptr += row_offset(row, x_inner, stride_x_outer, stride_x_inner)
    if ADD:
        residual_ptr += row_offset(row, residual_inner, stride_residual_outer, stride_residual_inner)
    out_ptr += row.to(tl.int64) * N
    cols = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    if tl.num_programs(0) <= EARLY_PROGRAMS:
        let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    if ONE_BLOCK:
        mask = inside & (cols < N)
        w = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + weight_offset
        x = _load_row(x_ptr, residual_ptr, cols, mask, ADD)  # [ROWS, BLOCK]
        inv = tl.rsqrt(tl.sum(x * x, 1) / N + eps)[:, None]
        tl.store(out_ptr + cols, (x * inv * w).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, N, BLOCK):
            at = start + cols
            x = _load_row(x_ptr, residual_ptr, at, inside & (at < N), ADD)
            total += x * x
        inv = tl.rsqrt(tl.sum(total, 1) / N + eps)[:, None]
        # The second walk reads the sum where there is one: each thread reads back what it wrote itself.
        source_ptr = residual_ptr if ADD else x_ptr
        for start in range(0, N, BLOCK):
            at = start + cols
            mask = inside & (at < N)
            x = tl.load(source_ptr + at, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + at, mask=at < N, other=0.0).to(tl.float32) + weight_offset
            tl.store(out_ptr + at, (x * inv * w).to(out_ptr.dtype.element_ty), mask=mask)


def _norm_cuda(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_offset: float
) -> torch.Tensor:
    out = empty(x.shape, x.dtype, x.device)
    width = x.shape[-1]
    num_rows = x.numel() // width
    tiles = choose_tiles(width, x.element_size())
    launch(
        _rms_norm_kernel,
        (cdiv(num_rows, tiles.rows),),
        out,
        x,
        residual,
        weight,
        num_rows,
        width,
        eps,
        weight_offset,
        *row_strides("x", x),
        *(row_strides("residual", residual) if residual is not None else (1, 0, 0)),
        device=x.device,
        num_warps=tiles.num_warps,
        ADD=residual is not None,
        ONE_BLOCK=tiles.block >= width,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        CHAINED=chains(x.device),
    )
    return out


def _rms_norm_cuda(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    return _norm_cuda(x, None, weight, eps, weight_offset)


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
) -> torch.Tensor:
    return x.new_empty(x.shape)


_rms_norm = register(
    "rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor",
    reference=reference.rms_norm,
    launcher=_rms_norm_cuda,
    fake=_rms_norm_fake,
)
_add_rms_norm = register(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, float weight_offset) -> Tensor",
    reference=reference.add_rms_norm,
    launcher=_norm_cuda,
    fake=_add_rms_norm_fake,
)


@replayed
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, weight_offset: float = 0.0) -> torch.Tensor:
    """Root-mean-square layer normalisation over the last dimension.

    `y = x / sqrt(mean(x²) + eps) · (weight + weight_offset)`

    Args:
        x: `[..., hidden]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.
        weight: `[hidden]`, fp16, bf16 or fp32, its dtype free of x's.
        eps: added to the mean of squares.
        weight_offset: 0, or 1 for Gemma's weights, which are stored minus one.

    Returns:
        `[..., hidden]`, contiguous, in x's dtype. Computed in fp32 and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: weight's shape or device does not fit x, or a stride that is not supported.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/1910.07467
    """
    check_norm(x, weight, eps)
    return _rms_norm(x, weight, eps, weight_offset)


@replayed
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> torch.Tensor:
    """Adds x to the residual stream in place, and returns the normalised sum.

    `residual += x;  y = residual / sqrt(mean(residual²) + eps) · (weight + weight_offset)`

    Args:
        x: `[..., hidden]`, as in `rms_norm`.
        residual: x's shape and dtype, **overwritten** with the sum; must not overlap x.
        weight, eps, weight_offset: as in `rms_norm`.

    Returns:
        `[..., hidden]`, contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: as in `rms_norm`, and for a residual that differs from x in shape, dtype or device.

    Safe in a CUDA graph. A row's bits do not depend on the other rows.
    """
    check_norm(x, weight, eps)
    check_dtype("residual", residual, (x.dtype,))
    check_shape("residual", residual, x.shape, "the shape of x")
    check_last_dim_contiguous("residual", residual)
    check_device("residual", residual, "x", x)
    return _add_rms_norm(x, residual, weight, eps, weight_offset)
