"""RMSNorm whose output is quantised at once, alone and with the residual addition in front of it.

    y = x · (weight + weight_offset) / sqrt(mean(x²) + eps),    scale = max(|y|) / limit,    q = round(y / scale)

The formulas are those of `octavo.kernels.norm` and `octavo.kernels.quant.rounding`, and y is never rounded to half
precision in between. The weight is multiplied first: the largest |y| of a row is then the largest |x · w| times the
same factor, exactly, so that a row too wide for registers is walked twice, not three times.
"""

from dataclasses import dataclass
from typing import overload

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import (
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_norm,
    check_shape,
)
from octavo.kernels.launch import empty, launch
from octavo.kernels.norm import _load_row
from octavo.kernels.quant.rounding import check_quantization, fake, magnitude, rounded, rounding, scale_of, scale_shape
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import (
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


def choose_tiles(width: int, group_size: int | None) -> _Tiles:
    """Groups of a row held at once, and room for the elements of each; rows wider than all that are walked twice.

    A row without groups is one, or pieces of a size that fits.
    """
    group = next_power_of_2(group_size or width)
    groups = next_power_of_2(width // group_size) if group_size else 1
    if groups * group <= 16384:
        return _Tiles(groups, group, min(max(groups * group // 512, 1), 16))
    group = group if group_size else 4096
    return _Tiles(max(4096 // group, 1), group, 16)


@triton.jit(do_not_specialize=["x_inner", "residual_inner"])
def _rms_norm_quantize_kernel(
    # Bound by memory: x (and residual) read once, a byte an element (and the residual) written; one program a row. The
    # row, or a part of it, is a tile of GROUPS pieces, `piece` elements apart: groups where those have scales.
    q_ptr,
    scale_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    N,
    piece,
    scales,
    eps,
    weight_offset,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    residual_inner,
    stride_residual_outer,
    stride_residual_inner,
    ADD: tl.constexpr,
    SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
    NATIVE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += row_offset(row, x_inner, stride_x_outer, stride_x_inner)
    if ADD:
        residual_ptr += row_offset(row, residual_inner, stride_residual_outer, stride_residual_inner)
    q_ptr += row.to(tl.int64) * N
    group = tl.arange(0, GROUPS)
    within = tl.arange(0, GROUP)[None, :]
    tile = group[:, None] * piece + within  # [GROUPS, GROUP]
    inside = within < piece
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    if SCALE == "given":
        inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    else:
        scale_ptr += row.to(tl.int64) * scales
    q_ptrs = q_ptr + tile
    if ADD:
        # A thread stores 16 bytes of the sum at a time, and as many numbers of q: with more of those, the row would go
        # through shared memory in between.
        q_ptrs = tl.max_contiguous(q_ptrs, [1, VECTOR])
    if ONE_BLOCK:
        mask = inside & (tile < N)
        x = _load_row(x_ptr, residual_ptr, tile, mask, ADD)
        w = tl.load(weight_ptr + tile, mask=mask, other=0.0).to(tl.float32) + weight_offset
        y = x * w * tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / N + eps)
        if SCALE == "given":
            y *= inverse
        else:
            scale = scale_of(tl.max(magnitude(y), 1), LIMIT)  # [GROUPS]
            tl.store(scale_ptr + group, scale, mask=group < scales)
            y *= tl.div_rn(1.0, scale)[:, None]
        tl.store(q_ptrs, rounded(y, q_ptr.dtype.element_ty, LIMIT, NATIVE), mask=mask)
    else:
        total = tl.zeros([GROUPS, GROUP], tl.float32)
        largest = tl.zeros([GROUPS, GROUP], tl.float32)
        for start in range(0, N, GROUPS * piece):
            at = start + tile
            mask = inside & (at < N)
            x = _load_row(x_ptr, residual_ptr, at, mask, ADD)
            total += x * x
            if SCALE == "row":
                w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32) + weight_offset
                largest = tl.maximum(largest, magnitude(x * w))
        inv = tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / N + eps)
        if SCALE == "row":
            scale = scale_of(tl.max(tl.max(largest, 1), 0) * inv, LIMIT)
            tl.store(scale_ptr, scale)
            inverse = tl.div_rn(1.0, scale)
        # The second walk reads the sum where there is one: each thread reads back what it wrote itself.
        source_ptr = residual_ptr if ADD else x_ptr
        for start in range(0, N, GROUPS * piece):
            at = start + tile
            mask = inside & (at < N)
            x = tl.load(source_ptr + at, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32) + weight_offset
            y = x * w * inv
            if SCALE == "group":
                scales_here = scale_of(tl.max(magnitude(y), 1), LIMIT)  # [GROUPS]
                number = start // piece + group
                tl.store(scale_ptr + number, scales_here, mask=number < scales)
                y *= tl.div_rn(1.0, scales_here)[:, None]
            else:
                y *= inverse
            tl.store(q_ptrs + start, rounded(y, q_ptr.dtype.element_ty, LIMIT, NATIVE), mask=mask)


def _norm_quantize_cuda(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
    scale: torch.Tensor | None,
    group_size: int | None,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q = empty(x.shape, dtype, x.device)
    computed = empty(scale_shape(x.shape, scale, group_size), torch.float32, x.device)
    width = x.shape[-1]
    groups = group_size if group_size != width else None
    tiles = choose_tiles(width, groups)
    piece = groups or min(width, tiles.group)
    launch(
        _rms_norm_quantize_kernel,
        (x.numel() // width,),
        q,
        computed if scale is None else scale,
        x,
        residual,
        weight,
        width,
        piece,
        width // groups if groups else 1,
        eps,
        weight_offset,
        *row_strides("x", x),
        *(row_strides("residual", residual) if residual is not None else (1, 0, 0)),
        device=x.device,
        num_warps=tiles.num_warps,
        ADD=residual is not None,
        SCALE="given" if scale is not None else "group" if groups else "row",
        **rounding(dtype, x.device),
        ONE_BLOCK=tiles.groups * piece >= width,
        VECTOR=min(16 // x.element_size(), tiles.group),
        GROUPS=tiles.groups,
        GROUP=tiles.group,
        CHAINED=chains(x.device),
    )
    return q, computed


def _rms_norm_quantize_cuda(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
    scale: torch.Tensor | None,
    group_size: int | None,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _norm_quantize_cuda(x, None, weight, dtype, eps, scale, group_size, weight_offset)


_rms_norm_quantize = register(
    "rms_norm_quantize(Tensor x, Tensor weight, ScalarType dtype, float eps, Tensor? scale, int? group_size, "
    "float weight_offset) -> (Tensor, Tensor)",
    reference=reference.rms_norm_quantize,
    launcher=_rms_norm_quantize_cuda,
    fake=lambda x, weight, dtype, eps, scale, group_size, weight_offset: fake(x, x.shape, dtype, scale, group_size),
)
_add_rms_norm_quantize = register(
    "add_rms_norm_quantize(Tensor x, Tensor(a!) residual, Tensor weight, ScalarType dtype, float eps, Tensor? scale, "
    "int? group_size, float weight_offset) -> (Tensor, Tensor)",
    reference=reference.add_rms_norm_quantize,
    launcher=_norm_quantize_cuda,
    fake=lambda x, residual, weight, dtype, eps, scale, group_size, weight_offset: fake(
        x, x.shape, dtype, scale, group_size
    ),
)


@overload
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    scale: None = None,
    group_size: int | None = None,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    scale: torch.Tensor,
    group_size: None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor: ...
@replayed
def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    scale: torch.Tensor | None = None,
    group_size: int | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm, quantised to int8 or fp8 in the same pass.

    `y = x · (weight + weight_offset) / sqrt(mean(x²) + eps)`, `scale = max(|y|) / limit`, `q = round(y / scale)`

    Args:
        x, weight, eps, weight_offset: as in `rms_norm`.
        dtype: torch.int8 (limit 127), torch.float8_e4m3fn (448) or torch.float8_e5m2 (57344).
        scale: None to compute scales; or one fp32 element for the whole tensor (static quantisation).
        group_size: None for a scale a row; or a divisor of hidden, at most 16384, for a scale a group of neighbours.

    Returns:
        q, `[..., hidden]` in dtype, contiguous; and where no scale is given also the scales, fp32, `[..., 1]` or
        `[..., hidden / group_size]`. q is what comes of the fp32 y, which is not rounded to x's dtype before. Zeros,
        infinities and NaN: as in `quantize_int8` and `quantize_fp8`.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: as `rms_norm`, `quantize_int8` and `quantize_fp8`; a group_size beside a scale.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/1910.07467
    """
    check_norm(x, weight, eps)
    check_quantization(x, x.shape[-1], dtype, scale, group_size)
    q, computed = _rms_norm_quantize(x, weight, dtype, eps, scale, group_size, weight_offset)
    return (q, computed) if scale is None else q


@overload
def add_rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    scale: None = None,
    group_size: int | None = None,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def add_rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    scale: torch.Tensor,
    group_size: None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor: ...
@replayed
def add_rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    scale: torch.Tensor | None = None,
    group_size: int | None = None,
    weight_offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Adds x to the residual stream in place, and returns the normalised sum quantised to int8 or fp8.

    `residual += x;  y = residual · (weight + weight_offset) / sqrt(mean(residual²) + eps)`, quantised as in
    `rms_norm_quantize`.

    Args:
        residual: x's shape and dtype, **overwritten** with the sum; must not overlap x.
        x, weight, dtype, eps, scale, group_size, weight_offset: as in `rms_norm_quantize`.

    Returns:
        As `rms_norm_quantize`.

    Raises:
        TypeError, ValueError: as in `rms_norm_quantize`, and for a residual that differs from x in shape, dtype or
            device.

    Safe in a CUDA graph. A row's bits do not depend on the other rows.
    """
    check_norm(x, weight, eps)
    check_quantization(x, x.shape[-1], dtype, scale, group_size)
    check_dtype("residual", residual, (x.dtype,))
    check_shape("residual", residual, x.shape, "the shape of x")
    check_last_dim_contiguous("residual", residual)
    check_device("residual", residual, "x", x)
    q, computed = _add_rms_norm_quantize(x, residual, weight, dtype, eps, scale, group_size, weight_offset)
    return (q, computed) if scale is None else q
