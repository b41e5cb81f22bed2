"""The product of a matrix and a vector: a linear layer for the one token that a single request decodes.

    y[n] = weight[n] · x + bias[n],    or with an activation    y[n] = silu(gate[n]) · up[n]

The time is that of reading the weights. Programs have some outputs each and keep as many of the weights on their way as
shared memory has room for; no tensor core is needed. On Hopper the first weights of each come into the cache (L2) while
the kernel ahead still runs: those of a decode step are short, and a product that begins cold loses as much time as they
take.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import FLOATS, check_contiguous, check_device, check_dtype, check_rows, check_shape
from octavo.kernels.launch import empty, launch
from octavo.kernels.quant.epilogue import silu_times
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, let_next_start, row_offset, row_strides, wait_for_previous
from octavo.reference import gemv as reference


@dataclass(frozen=True)
class _Tiles:
    rows: int
    """Of weights: with SiLU and gate, of gate and of up together."""
    block_k: int
    num_warps: int
    num_stages: int


def choose_tiles(itemsize: int) -> _Tiles:
    """8 rows of 2048 bytes at a time and four of those under way: three programs a multiprocessor on Hopper.

    16 rows of 1024 bytes took up to 12 % longer on an H100, with 8 warps of 2048 bytes up to 5 %.
    """
    return _Tiles(8, 2048 // itemsize, 4, 4)


@triton.jit
def _prefetch(ptrs):
    """Has the cache (L2) fetch the lines of 128 bytes that these pointers lie in; a hint, which nothing waits for."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["T", "x_inner"])
def _gemv_kernel(
    # Bound by reading the weights once. One program some outputs of a token.
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    T,
    N,
    K,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINE: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
):
    OUTPUTS: tl.constexpr = ROWS // 2 if GATED else ROWS
    token = tl.program_id(0) % T
    first = tl.program_id(0) // T * OUTPUTS
    r = tl.arange(0, ROWS)
    row = tl.minimum(first + r % OUTPUTS, N - 1) + r // OUTPUTS * N  # of gate, then of up; past the last, it again
    weight_ptr += row.to(tl.int64)[:, None] * K
    if CHAINED:
        lines = tl.arange(0, STAGES * BLOCK_K // LINE)[None, :] * LINE
        _prefetch(weight_ptr + tl.minimum(lines, K - 1))
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    x_ptr += row_offset(token, x_inner, stride_x_outer, stride_x_inner)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask = k < K - start
        x = tl.load(x_ptr + start + k, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + (start + k)[None, :], mask=mask[None, :], other=0.0)  # [ROWS, BLOCK_K]
        sums += w.to(tl.float32) * x[None, :]
    y = tl.sum(sums, 1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    n = first + tl.arange(0, OUTPUTS)
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(y, [2, OUTPUTS])))
        y = silu_times(gate, up)
    tl.store(out_ptr + token.to(tl.int64) * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


def _gemv_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    (n, k), gated = weight.shape, activation is not None
    n = n // 2 if gated else n
    out = empty((*x.shape[:-1], n), x.dtype, x.device)
    tokens, tiles = x.numel() // k, choose_tiles(x.element_size())
    launch(
        _gemv_kernel,
        (tokens * cdiv(n, tiles.rows // 2 if gated else tiles.rows),),
        out,
        x,
        weight,
        bias,
        tokens,
        n,
        k,
        *row_strides("x", x),
        device=x.device,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        GATED=gated,
        ROWS=tiles.rows,
        BLOCK_K=tiles.block_k,
        LINE=128 // x.element_size(),
        STAGES=tiles.num_stages,
        CHAINED=chains(x.device),
    )
    return out


def _gemv_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    n = weight.shape[0] if activation is None else weight.shape[0] // 2
    return x.new_empty((*x.shape[:-1], n))


_gemv = register(
    "gemv(Tensor x, Tensor weight, Tensor? bias, str? activation) -> Tensor",
    reference=reference.gemv,
    launcher=_gemv_cuda,
    fake=_gemv_fake,
)


@replayed
def gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str | None = None
) -> torch.Tensor:
    """Linear layer, one token at a time: for decoding a single request, whose time is that of reading the weights.

    `y[n] = Σₖ weight[n, k] · x[k] + bias[n]`; with an activation `silu(y[:N / 2]) · y[N / 2:]`

    Args:
        x: `[..., K]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides. Each row is a
            token, for which weights are read again: from two tokens on, `torch.nn.functional.linear` is faster.
        weight: `[N, K]`, x's dtype, contiguous.
        bias: None, or `[N]`, fp16, bf16 or fp32, contiguous.
        activation: None, or "silu_and_mul": the first half of the outputs are gate, the others up, as `silu_and_mul`
            takes them. N: even.

    Returns:
        `[..., N]`, or `[..., N / 2]` with an activation, contiguous, in x's dtype. Sums and what follows them are fp32
        and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit, or another activation.

    Safe in a CUDA graph. Deterministic; a row's bits do not depend on the other rows.
    """
    check_rows(x)
    check_dtype("weight", weight, (x.dtype,))
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}; expected [outputs, {x.shape[-1]}], as many inputs as x has, and at "
            "least one output"
        )
    check_contiguous("weight", weight)
    check_device("weight", weight, "x", x)
    if activation not in (None, "silu_and_mul"):
        raise ValueError(f'activation: {activation!r}; expected None or "silu_and_mul"')
    if activation is not None and weight.shape[0] % 2:
        raise ValueError(f"weight: {weight.shape[0]} outputs; expected an even number, gate's and up's")
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, weight.shape[:1], "[outputs], as weight")
        check_contiguous("bias", bias)
        check_device("bias", bias, "x", x)
    return _gemv(x, weight, bias, activation)
