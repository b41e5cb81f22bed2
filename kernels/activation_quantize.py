"""Gated activations whose output is quantised at once.

    y = silu(gate) · up  or  gelu(gate) · up,    scale = max(|y|) / limit,    q = round(y / scale)

The formulas are those of `octavo.kernels.activation` and `octavo.kernels.quant.rounding`; y is fp32 and never rounded
to half precision in between. A scale a row needs all of the row's y before the first q: one program keeps them in
registers. With a scale a group, or one that is given, a program has a block of a row, as without quantisation.
"""

from dataclasses import dataclass
from typing import overload

import torch
import triton
import triton.language as tl

from octavo.kernels.activation import _activate
from octavo.kernels.checks import check_gated
from octavo.kernels.launch import empty, launch
from octavo.kernels.quant.rounding import (
    check_quantization,
    fake,
    largest_of,
    magnitude,
    rounded,
    rounding,
    scale_of,
    scale_shape,
)
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
from octavo.reference import quantize as reference


@dataclass(frozen=True)
class _Tiles:
    groups: int
    group: int
    num_warps: int


def choose_tiles(width: int, scale: str, group_size: int | None, simple: bool) -> _Tiles:
    """Pieces of a row that a program has, and room for the elements of each, by what has a scale.

    A whole row is one piece, of 16 to 32 numbers a thread; 64 fit into registers too where the arithmetic is `simple`:
    without erf, and without fp8 made by integers. Wider rows are walked twice.
    """
    if scale == "row":
        group = next_power_of_2(width)
        if group > (32768 if simple else 16384):
            group = 8192
        return _Tiles(1, group, min(max(group // 512, 4), 16))
    group = next_power_of_2(group_size) if group_size else min(next_power_of_2(width), 1024)
    groups = max(1024 // group, 1) if group_size else 1
    return _Tiles(groups, group, min(max(groups * group // 256, 1), 16))


@triton.jit
def _gated(x_ptr, N, cols, mask, ACTIVATION: tl.constexpr):
    gate = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return _activate(gate, ACTIVATION) * tl.load(x_ptr + N + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["x_inner"])
def _activation_quantize_kernel(
    # Bound by memory: x read once, a byte an output written. One program GROUPS pieces of a row, `piece` outputs each.
    q_ptr,
    scale_ptr,
    x_ptr,
    N,
    piece,
    blocks,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    ACTIVATION: tl.constexpr,
    SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
    NATIVE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // blocks
    x_ptr += row_offset(row, x_inner, stride_x_outer, stride_x_inner)
    q_ptr += row.to(tl.int64) * N
    number = program % blocks * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    within = tl.arange(0, GROUP)[None, :]
    cols = number[:, None] * piece + within  # [GROUPS, GROUP]
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    if ONE_BLOCK:
        mask = (within < piece) & (cols < N)
        y = _gated(x_ptr, N, cols, mask, ACTIVATION)
        if SCALE == "given":
            y *= tl.div_rn(1.0, tl.load(scale_ptr))
        else:
            if SCALE == "row":
                largest = largest_of(y)
            else:
                largest = tl.max(magnitude(y), 1)
            scale = scale_of(largest, LIMIT)  # [GROUPS]
            scales = N // piece
            tl.store(scale_ptr + row.to(tl.int64) * scales + number, scale, mask=number < scales)
            y *= tl.div_rn(1.0, scale)[:, None]
        tl.store(q_ptr + cols, rounded(y, q_ptr.dtype.element_ty, LIMIT, NATIVE), mask=mask)
    else:
        largest = tl.zeros([GROUPS, GROUP], tl.float32)
        for start in range(0, N, GROUP):
            y = _gated(x_ptr, N, start + within, start + within < N, ACTIVATION)
            largest = tl.maximum(largest, magnitude(y))
        scale = scale_of(tl.max(tl.max(largest, 1), 0), LIMIT)
        tl.store(scale_ptr + row, scale)
        inverse = tl.div_rn(1.0, scale)
        for start in range(0, N, GROUP):
            at = start + within
            y = _gated(x_ptr, N, at, at < N, ACTIVATION) * inverse
            tl.store(q_ptr + at, rounded(y, q_ptr.dtype.element_ty, LIMIT, NATIVE), mask=at < N)


def _activation_quantize_cuda(
    x: torch.Tensor, activation: str, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1] // 2
    shape = (*x.shape[:-1], width)
    q = empty(shape, dtype, x.device)
    computed = empty(scale_shape(shape, scale, group_size), torch.float32, x.device)
    groups = group_size if group_size != width else None
    kind = "given" if scale is not None else "group" if groups else "row"
    constants = rounding(dtype, x.device)
    simple = activation != "gelu" and (dtype == torch.int8 or constants["NATIVE"])
    tiles = choose_tiles(width, kind, groups, simple)
    piece = groups or (width if kind == "row" else tiles.group)
    blocks = 1 if kind == "row" else cdiv(width, tiles.groups * piece)
    launch(
        _activation_quantize_kernel,
        (q.numel() // width * blocks,),
        q,
        computed if scale is None else scale,
        x,
        width,
        piece,
        blocks,
        *row_strides("x", x),
        device=x.device,
        num_warps=tiles.num_warps,
        ACTIVATION=activation,
        SCALE=kind,
        **constants,
        ONE_BLOCK=kind != "row" or tiles.group >= width,
        GROUPS=tiles.groups,
        GROUP=tiles.group,
        CHAINED=chains(x.device),
    )
    return q, computed


def _silu_and_mul_quantize_cuda(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _activation_quantize_cuda(x, "silu", dtype, scale, group_size)


def _gelu_and_mul_quantize_cuda(
    x: torch.Tensor, dtype: torch.dtype, approximate: str, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    activation = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _activation_quantize_cuda(x, activation, dtype, scale, group_size)


def _fake(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return fake(x, (*x.shape[:-1], x.shape[-1] // 2), dtype, scale, group_size)


_silu_and_mul_quantize = register(
    "silu_and_mul_quantize(Tensor x, ScalarType dtype, Tensor? scale, int? group_size) -> (Tensor, Tensor)",
    reference=reference.silu_and_mul_quantize,
    launcher=_silu_and_mul_quantize_cuda,
    fake=_fake,
)
_gelu_and_mul_quantize = register(
    "gelu_and_mul_quantize(Tensor x, ScalarType dtype, str approximate, Tensor? scale, int? group_size) "
    "-> (Tensor, Tensor)",
    reference=reference.gelu_and_mul_quantize,
    launcher=_gelu_and_mul_quantize_cuda,
    fake=lambda x, dtype, approximate, scale, group_size: _fake(x, dtype, scale, group_size),
)


def _check(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None) -> None:
    check_gated(x)
    check_quantization(x, x.shape[-1] // 2, dtype, scale, group_size)


@overload
def silu_and_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype, *, scale: None = None, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def silu_and_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype, *, scale: torch.Tensor, group_size: None = None
) -> torch.Tensor: ...
@replayed
def silu_and_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype, *, scale: torch.Tensor | None = None, group_size: int | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU's activation, quantised to int8 or fp8 in the same pass.

    `y = gate / (1 + exp(-gate)) · up` with `gate, up = x[..., :d], x[..., d:]`; `scale = max(|y|) / limit`,
    `q = round(y / scale)`

    Args:
        x: `[..., 2d]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.
        dtype: torch.int8 (limit 127), torch.float8_e4m3fn (448) or torch.float8_e5m2 (57344).
        scale: None to compute scales; or one fp32 element for the whole tensor (static quantisation).
        group_size: None for a scale a row; or a divisor of d, at most 16384, for a scale a group of neighbours.

    Returns:
        q, `[..., d]` in dtype, contiguous; and where no scale is given also the scales, fp32, `[..., 1]` or
        `[..., d / group_size]`. q is what comes of the fp32 y, which is not rounded to x's dtype before. Zeros,
        infinities and NaN: as in `quantize_int8` and `quantize_fp8`.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: as `silu_and_mul`, `quantize_int8` and `quantize_fp8`; a group_size beside a scale.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/2002.05202
    """
    _check(x, dtype, scale, group_size)
    q, computed = _silu_and_mul_quantize(x, dtype, scale, group_size)
    return (q, computed) if scale is None else q


@overload
def gelu_and_mul_quantize(
    x: torch.Tensor,
    dtype: torch.dtype,
    approximate: str = "none",
    *,
    scale: None = None,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def gelu_and_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype, approximate: str = "none", *, scale: torch.Tensor, group_size: None = None
) -> torch.Tensor: ...
@replayed
def gelu_and_mul_quantize(
    x: torch.Tensor,
    dtype: torch.dtype,
    approximate: str = "none",
    *,
    scale: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """GeGLU's activation, quantised to int8 or fp8 in the same pass.

    `y = gate · Φ(gate) · up` with `gate, up = x[..., :d], x[..., d:]`, Φ the normal distribution function;
    `scale = max(|y|) / limit`, `q = round(y / scale)`

    Args:
        approximate: as in `gelu_and_mul`.
        x, dtype, scale, group_size: as in `silu_and_mul_quantize`.

    Returns:
        As `silu_and_mul_quantize`.

    Raises:
        TypeError, ValueError: as `silu_and_mul_quantize`, and for another `approximate`.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/2002.05202
    """
    _check(x, dtype, scale, group_size)
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate: {approximate!r}; expected "none" (exact) or "tanh"')
    q, computed = _gelu_and_mul_quantize(x, dtype, approximate, scale, group_size)
    return (q, computed) if scale is None else q
