"""Symmetric quantisation to int8 and fp8, as every op that quantises activations does it.

    scale = max(|x|) / limit,    q = round(x / scale)    limit = 127 (int8), 448 (e4m3), 57344 (e5m2)

- The maximum is that of the finite values: infinities and NaN are left out, so that a row of them (the padding of a
  captured graph) changes nobody's scale but its own. Where nothing is left, or zeros alone, the scale is 2⁻¹²⁶, the
  smallest normal fp32 number, whose reciprocal is finite.
- x is multiplied by the scale's reciprocal in fp32, clamped to ±limit, so that infinities saturate, and rounded half to
  even. The int8 value -128 is never made. A NaN stays one in fp8 and becomes 0 in int8.

Micikevicius et al., "FP8 Formats for Deep Learning" (2022), https://arxiv.org/abs/2209.05433.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_device, check_dtype
from octavo.kernels.launch import INTERPRET
from octavo.kernels.tiles import device_properties
from octavo.reference.quantize import LIMITS

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_GROUP = 16384
"""The largest group that an op which computes what it quantises keeps in registers."""


def rounding(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The constexprs of `rounded` for an output dtype: LIMIT, and NATIVE, whether the GPU rounds fp32 to fp8 itself.

    sm_90 and later do. sm_89 only converts from fp16, and rounding twice is off by a unit now and then; sm_80, and
    Triton's interpreter, which truncates, have no conversion at all.

    Raises:
        ValueError: e4m3 on a GPU before sm_89, for which Triton has no such type.
    """
    check_supported("dtype", dtype, device, "quantise to int8, or to float8_e5m2")
    return {"LIMIT": LIMITS[dtype], "NATIVE": device_properties(device).capability >= (9, 0) and not INTERPRET}


def check_supported(name: str, dtype: torch.dtype, device: torch.device, advice: str) -> None:
    """Raises ValueError for e4m3 on a GPU before sm_89, for which Triton has no such type."""
    properties = device_properties(device)
    if dtype == torch.float8_e4m3fn and properties.capability < (8, 9) and device.type != "cpu":
        major, minor = properties.capability
        raise ValueError(
            f"{name}: float8_e4m3fn on {properties.name} (compute capability {major}.{minor}); expected a GPU of 8.9 "
            f"or later: {advice}"
        )


def scale_shape(shape: tuple[int, ...], scale: torch.Tensor | None, group_size: int | None) -> tuple[int, ...]:
    """The shape of the scales that go with quantised rows of a shape; none (0) where a static scale is given."""
    if scale is not None:
        return (0,)
    return (*shape[:-1], 1 if group_size is None else shape[-1] // group_size)


def fake(
    x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an op that quantises rows of a shape returns, of x's kind of tensor."""
    scales = scale_shape(shape, scale, group_size)
    return x.new_empty(shape, dtype=dtype), x.new_empty(scales, dtype=torch.float32)


def check_static_scale(scale: torch.Tensor, x: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless `scale` is one fp32 number beside `x`."""
    check_dtype("scale", scale, (torch.float32,))
    if scale.numel() != 1:
        raise ValueError(f"scale: shape {tuple(scale.shape)}; expected one element, the scale of the whole tensor")
    check_device("scale", scale, "x", x)


def check_group_size(group_size: int, width: int) -> None:
    """Raises ValueError unless rows of `width` are made of whole groups."""
    if group_size < 1 or width % group_size:
        raise ValueError(f"group_size: {group_size}; expected a divisor of the {width} elements of a row")


def check_quantization(
    x: torch.Tensor, width: int, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> None:
    """Raises TypeError or ValueError unless an op can quantise its output, `width` elements a row, behind `x`."""
    if dtype not in LIMITS:
        raise TypeError(f"dtype: {dtype}; expected torch.int8, torch.float8_e4m3fn or torch.float8_e5m2")
    if scale is not None:
        check_static_scale(scale, x)
        if group_size is not None:
            raise ValueError(f"group_size: {group_size} beside a scale, which is one for all groups: leave one out")
    if group_size is not None:
        check_group_size(group_size, width)
        if group_size > MAX_GROUP and group_size != width:
            raise ValueError(f"group_size: {group_size}; expected at most {MAX_GROUP}, or all {width} of a row")


@triton.jit
def magnitude(x):
    """|x|, and 0 for infinities and NaN, which count for no scale."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def largest_of(x):
    """The largest magnitude of each row of x, `[ROWS, columns]` → `[ROWS]`.

    Rows without an infinity are spared `magnitude`: a GPU's maximum leaves NaN out by itself.
    """
    largest = tl.max(tl.abs(x), 1)
    if not tl.max(largest, 0) < float("inf"):
        largest = tl.max(magnitude(x), 1)
    return largest


@triton.jit
def scale_of(largest, LIMIT: tl.constexpr):
    """The scale with which `largest` becomes LIMIT; at least 2⁻¹²⁶, also where `largest` is NaN."""
    scale = tl.div_rn(largest, LIMIT)
    return tl.where(scale > 1.1754943508222875e-38, scale, 1.1754943508222875e-38)


@triton.jit
def _fp8_bits(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The fp8 number next to an fp32 one that is within its range, ties to even, as a byte."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    # Normal numbers: half a unit, less the least bit where the kept part is even, carries into the kept part. The sum
    # below has the unit of fp8's subnormal numbers as its own, so that the addition rounds to it.
    SHIFT: tl.constexpr = 23 - MANTISSA
    normal = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT
    normal -= (127 - BIAS) << MANTISSA
    LEAST: tl.constexpr = 2.0 ** (1 - BIAS)
    UNIT_OF_SUM: tl.constexpr = LEAST * 2.0 ** (23 - MANTISSA)
    subnormal = (size + UNIT_OF_SUM).to(tl.int32, bitcast=True) & 15
    byte = tl.where(size < LEAST, subnormal, normal)
    byte = tl.where(x == x, byte, 0x7F)
    return (byte | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def rounded(x, Q: tl.constexpr, LIMIT: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 values, divided by the scale already, as the type Q."""
    x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if tl.int8 == Q:
        # 1.5·2²³ leaves no bits for a fraction, so the addition rounds; the lowest byte of the sum is the integer.
        return (tl.where(x == x, x, 0.0) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif NATIVE:
        return x.to(Q)
    elif tl.float8e5 == Q:
        return _fp8_bits(x, 2, 15).to(Q, bitcast=True)
    else:
        return _fp8_bits(x, 3, 7).to(Q, bitcast=True)
