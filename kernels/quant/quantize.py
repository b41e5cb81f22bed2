"""Quantising activations to int8 and fp8, symmetrically: by token, by groups within a token, by tensor.

    scale = max(|x|) / limit,    q = round(x / scale)    with limit = 127 (int8), 448 (e4m3), 57344 (e5m2)

One scale a token: Dettmers et al., LLM.int8() (2022), https://arxiv.org/abs/2208.07339, section 2; one a 1×128 group:
DeepSeek-V3 (2024), https://arxiv.org/abs/2412.19437, section 3.3. `octavo.kernels.quant.rounding` says how values are
rounded, and what becomes of zeros, infinities and NaN.
"""

from dataclasses import dataclass
from typing import Literal, overload

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_rows
from octavo.kernels.launch import empty, launch
from octavo.kernels.quant.by_tensor import by_tensor_cuda
from octavo.kernels.quant.rounding import (
    FP8,
    check_group_size,
    check_static_scale,
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

Granularity = Literal["token", "tensor", "group"]


@dataclass(frozen=True)
class _Tiles:
    rows: int
    block: int
    num_warps: int


def choose_tiles(width: int) -> _Tiles:
    """How many elements of a row a program holds at once, and of how many rows; narrow rows share a program.

    Of a row that is no power of two a thread holds 64 numbers, some of them nothing: with as many warps as a full row
    has, 8192 rows of 4544 take 47.8 µs on an H100, with half of them 40.3; as 4096 and 512 numbers, 55.8.
    """
    block = min(next_power_of_2(width), 16384)
    if width > block:
        return _Tiles(1, 8192, 16)
    rows = max(2048 // block, 1)
    return _Tiles(rows, block, min(max(rows * block // (512 if width == block else 2048), 2), 16))


@triton.jit
def _load(x_ptrs, present, cols, N):
    return tl.load(x_ptrs[:, None] + cols[None, :], mask=present[:, None] & (cols < N)[None, :], other=0.0).to(
        tl.float32
    )  # [ROWS, columns]


@triton.jit
def _store(q_ptrs, x, inverse, present, cols, N, LIMIT: tl.constexpr, NATIVE: tl.constexpr):
    q = rounded(x * inverse[:, None], q_ptrs.dtype.element_ty, LIMIT, NATIVE)
    tl.store(q_ptrs[:, None] + cols[None, :], q, mask=present[:, None] & (cols < N)[None, :])


@triton.jit(do_not_specialize=["total", "x_inner"])
def _quantize_rows_kernel(
    # Bound by memory: x read once, a byte an element written. A row is what shares a scale: `groups` of them make up a
    # row of x. A program keeps ROWS of them in registers, or walks a wider one twice.
    q_ptr,
    scale_ptr,
    x_ptr,
    total,
    N,
    groups,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    LIMIT: tl.constexpr,
    NATIVE: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    present = row < total
    x_ptrs = x_ptr + row_offset(row // groups, x_inner, stride_x_outer, stride_x_inner) + row % groups * N
    q_ptrs = q_ptr + row.to(tl.int64) * N
    cols = tl.arange(0, BLOCK)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    if IN_REGISTERS:
        x = _load(x_ptrs, present, cols, N)
        largest = largest_of(x) if ROWS == 1 else tl.max(magnitude(x), 1)  # [ROWS]
        scale = scale_of(largest, LIMIT)
        inverse = tl.div_rn(1.0, scale)
        _store(q_ptrs, x, inverse, present, cols, N, LIMIT, NATIVE)
    else:
        held = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, N, BLOCK):
            held = tl.maximum(held, magnitude(_load(x_ptrs, present, start + cols, N)))
        scale = scale_of(tl.max(held, 1), LIMIT)
        inverse = tl.div_rn(1.0, scale)
        for start in range(0, N, BLOCK):
            x = _load(x_ptrs, present, start + cols, N)
            _store(q_ptrs, x, inverse, present, start + cols, N, LIMIT, NATIVE)
    tl.store(scale_ptr + row, scale, mask=present)


def _quantize_cuda(
    x: torch.Tensor, scale: torch.Tensor | None, granularity: str, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    one_row = 0 < x.numel() == x.shape[-1]  # its scale is the tensor's, and found in one launch
    if scale is not None or (granularity == "tensor" and not one_row):
        return by_tensor_cuda(x, scale, dtype)
    width = group_size if granularity == "group" else x.shape[-1]
    q = empty(x.shape, dtype, x.device)
    shape = (1,) if granularity == "tensor" else scale_shape(x.shape, None, width)
    scale = empty(shape, torch.float32, x.device)
    tiles = choose_tiles(width)
    total = x.numel() // width
    launch(
        _quantize_rows_kernel,
        (cdiv(total, tiles.rows),),
        q,
        scale,
        x,
        total,
        width,
        x.shape[-1] // width,
        *row_strides("x", x),
        device=x.device,
        num_warps=tiles.num_warps,
        **rounding(dtype, x.device),
        IN_REGISTERS=tiles.block >= width,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        CHAINED=chains(x.device),
    )
    return q, scale


def _quantize_int8_cuda(
    x: torch.Tensor, scale: torch.Tensor | None, granularity: str, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantize_cuda(x, scale, granularity, group_size, torch.int8)


def _quantize_fake(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    granularity: str,
    group_size: int,
    dtype: torch.dtype = torch.int8,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = scale_shape(x.shape, scale, group_size if granularity == "group" else None)
    if scale is None and granularity == "tensor":
        shape = (1,)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(shape, dtype=torch.float32)


_quantize_int8 = register(
    "quantize_int8(Tensor x, Tensor? scale, str granularity, int group_size) -> (Tensor, Tensor)",
    reference=reference.quantize_int8,
    launcher=_quantize_int8_cuda,
    fake=_quantize_fake,
)
_quantize_fp8 = register(
    "quantize_fp8(Tensor x, Tensor? scale, str granularity, int group_size, ScalarType dtype) -> (Tensor, Tensor)",
    reference=reference.quantize,
    launcher=_quantize_cuda,
    fake=_quantize_fake,
)


def _check(x: torch.Tensor, scale: torch.Tensor | None, granularity: str, group_size: int) -> None:
    check_rows(x)
    if granularity not in ("token", "tensor", "group"):
        raise ValueError(f'granularity: {granularity!r}; expected "token", "tensor" or "group"')
    if scale is not None:
        check_static_scale(scale, x)
        if granularity == "group":
            raise ValueError("granularity: 'group' beside a scale, which is one for the whole tensor: leave one out")
    if granularity == "group":
        check_group_size(group_size, x.shape[-1])


@overload
def quantize_int8(
    x: torch.Tensor, scale: None = None, *, granularity: Granularity = "token", group_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def quantize_int8(
    x: torch.Tensor, scale: torch.Tensor, *, granularity: Granularity = "token", group_size: int = 128
) -> torch.Tensor: ...
@replayed
def quantize_int8(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    granularity: Granularity = "token",
    group_size: int = 128,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Quantises activations to int8, with scales computed from them or with one that is given.

    `scale = max(|x|) / 127`, `q = round(x / scale)`, half to even, so that `q · scale ≈ x` by broadcasting (by groups:
    `q.unflatten(-1, (-1, group_size)) · scale[..., None]`).

    Args:
        x: `[..., K]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.
        scale: None to compute scales; or one fp32 element for the whole tensor, found beforehand (static quantisation):
            values beyond 127 scales saturate.
        granularity: what shares a computed scale: "token" (a row), "group" (group_size neighbours in it) or "tensor".
        group_size: a divisor of K; only "group" looks at it.

    Returns:
        q, `[..., K]` int8, contiguous, from -127 to 127; and where no scale is given also the scales, fp32: `[..., 1]`
        by token, `[..., K / group_size]` by group, `[1]` by tensor.

        Infinities and NaN are left out of the maximum, so that they spoil no other value of their row or tensor:
        infinities become ±127, NaN becomes 0. Where no other value than 0 is left, the scale is 2⁻¹²⁶.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a scale of more than one element or on another device, a group size that does not divide K, strides
            that are not supported, or another granularity.

    Safe in a CUDA graph. Deterministic; unless by tensor, a row's bits do not depend on the other rows. By tensor there
    are two launches. https://arxiv.org/abs/2208.07339
    """
    _check(x, scale, granularity, group_size)
    q, computed = _quantize_int8(x, scale, granularity, group_size)
    return (q, computed) if scale is None else q


@overload
def quantize_fp8(
    x: torch.Tensor,
    scale: None = None,
    *,
    granularity: Granularity = "token",
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def quantize_fp8(
    x: torch.Tensor,
    scale: torch.Tensor,
    *,
    granularity: Granularity = "token",
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> torch.Tensor: ...
@replayed
def quantize_fp8(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    granularity: Granularity = "token",
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Quantises activations to fp8, with scales computed from them or with one that is given.

    `scale = max(|x|) / limit`, `q = round(x / scale)`, half to even, with limit 448 for e4m3 and 57344 for e5m2.

    Args:
        x, scale, granularity, group_size: as in `quantize_int8`; with a given scale, values beyond the limit saturate.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        As `quantize_int8`, with q in `dtype`. Infinities and NaN are left out of the maximum; infinities become ±limit,
        so that no q is infinite, and NaN stays NaN, of that element alone.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: as `quantize_int8`; and e4m3 on a GPU before sm_89, which Triton can't store it on.

    Safe in a CUDA graph. Deterministic; unless by tensor, a row's bits do not depend on the other rows. By tensor there
    are two launches. https://arxiv.org/abs/2209.05433
    """
    _check(x, scale, granularity, group_size)
    if dtype not in FP8:
        raise TypeError(f"dtype: {dtype}; expected torch.float8_e4m3fn or torch.float8_e5m2")
    q, computed = _quantize_fp8(x, scale, granularity, group_size, dtype)
    return (q, computed) if scale is None else q
