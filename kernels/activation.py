"""The activations between the two projections of a feed-forward layer: gated (SwiGLU, GeGLU) and squared ReLU.

    silu_and_mul(x)  = silu(gate) · up      with gate, up = the two halves of x's last dimension
    gelu_and_mul(x)  = gelu(gate) · up
    relu2(x)         = max(x, 0)²

Shazeer, "GLU Variants Improve Transformer" (2020), https://arxiv.org/abs/2002.05202; squared ReLU: So et al., "Primer"
(2021), https://arxiv.org/abs/2109.08668. The mathematics is fp32 and rounded once, at the store.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from octavo.kernels.checks import check_gated, check_rows
from octavo.kernels.launch import INTERPRET, empty, launch
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
from octavo.reference import activation as reference

INTERPRETED = tl.constexpr(INTERPRET)


@dataclass(frozen=True)
class _Tiles:
    block: int
    num_warps: int


def choose_tiles(width: int) -> _Tiles:
    """Output elements of one program; small blocks, so that the few rows of a decode step still fill the GPU."""
    block = min(next_power_of_2(width), 1024)
    return _Tiles(block, max(block // 256, 1))


@triton.jit
def _over_one_plus_exp2(x, t):
    """x / (1 + 2^t); 0 of a finite x where 2^t overflows.

    By the GPU's own reciprocal, which takes five instructions less than Triton's quotient and is off by as little, two
    units, but gives 0 where the denominator is above 2^126.
    """
    if INTERPRETED:
        return x / (1.0 + tl.exp2(t))
    return libdevice.fast_dividef(x, 1.0 + tl.exp2(t))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = _over_one_plus_exp2(x, -1.4426950408889634 * x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2u)). 2u·log2(e) holds 2·sqrt(2/π)·log2(e).
        y = _over_one_plus_exp2(x, -2.302208198144325 * (x + 0.044715 * x * x * x))
    else:
        relu = tl.where(x < 0.0, 0.0, x)  # unlike tl.maximum, keeps a NaN
        y = relu * relu
    return y


@triton.jit(do_not_specialize=["x_inner"])
def _activation_kernel(
    # Bound by memory: x read once, the output written once; one program a block of a row.
    out_ptr,
    x_ptr,
    N,
    blocks,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    cols = program % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < N
    x_ptr += row_offset(row, x_inner, stride_x_outer, stride_x_inner)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    y = _activate(tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32), ACTIVATION)  # [BLOCK]
    if GATED:
        y *= tl.load(x_ptr + N + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * N + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def _activation_cuda(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    out = empty((*x.shape[:-1], width), x.dtype, x.device)
    tiles = choose_tiles(width)
    blocks = cdiv(width, tiles.block)
    launch(
        _activation_kernel,
        (out.numel() // width * blocks,),
        out,
        x,
        width,
        blocks,
        *row_strides("x", x),
        device=x.device,
        num_warps=tiles.num_warps,
        ACTIVATION=activation,
        GATED=gated,
        BLOCK=tiles.block,
        CHAINED=chains(x.device),
    )
    return out


def _silu_and_mul_cuda(x: torch.Tensor) -> torch.Tensor:
    return _activation_cuda(x, "silu", True)


def _gelu_and_mul_cuda(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return _activation_cuda(x, "gelu_tanh" if approximate == "tanh" else "gelu", True)


def _relu2_cuda(x: torch.Tensor) -> torch.Tensor:
    return _activation_cuda(x, "relu2", False)


def _gated_fake(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _relu2_fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


_silu_and_mul = register(
    "silu_and_mul(Tensor x) -> Tensor",
    reference=reference.silu_and_mul,
    launcher=_silu_and_mul_cuda,
    fake=_gated_fake,
)
_gelu_and_mul = register(
    "gelu_and_mul(Tensor x, str approximate) -> Tensor",
    reference=reference.gelu_and_mul,
    launcher=_gelu_and_mul_cuda,
    fake=_gated_fake,
)
_relu2 = register(
    "relu2(Tensor x) -> Tensor",
    reference=reference.relu2,
    launcher=_relu2_cuda,
    fake=_relu2_fake,
)


@replayed
def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU's activation: SiLU of the first half of the last dimension times the second half.

    `y = gate / (1 + exp(-gate)) · up` with `gate, up = x[..., :d], x[..., d:]`

    Args:
        x: `[..., 2d]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.

    Returns:
        `[..., d]`, contiguous, in x's dtype. Computed in fp32 and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: an odd or empty last dimension, or strides that are not supported.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/2002.05202
    """
    check_gated(x)
    return _silu_and_mul(x)


@replayed
def gelu_and_mul(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """GeGLU's activation: GELU of the first half of the last dimension times the second half.

    `y = gate · Φ(gate) · up` with `gate, up = x[..., :d], x[..., d:]`, Φ the normal distribution function

    Args:
        x: `[..., 2d]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.
        approximate: "none" for the exact Φ through erf, "tanh" for Gemma's
            `Φ(g) ≈ (1 + tanh(sqrt(2/π) · (g + 0.044715 g³))) / 2`.

    Returns:
        `[..., d]`, contiguous, in x's dtype. Computed in fp32 and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: an odd or empty last dimension, strides that are not supported, or another `approximate`.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/2002.05202
    """
    check_gated(x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate: {approximate!r}; expected "none" (exact) or "tanh"')
    return _gelu_and_mul(x, approximate)


@replayed
def relu2(x: torch.Tensor) -> torch.Tensor:
    """The squared rectifier.

    `y = max(x, 0)²`

    Args:
        x: `[..., d]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.

    Returns:
        `[..., d]`, contiguous, in x's dtype. Computed in fp32 and rounded once.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: an empty last dimension, or strides that are not supported.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/2109.08668
    """
    check_rows(x)
    return _relu2(x)
