"""Symmetric quantisation of activations in plain torch; `octavo.kernels.quant.rounding` says what the rules are."""

import torch

from octavo.reference import activation, norm

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""What the largest magnitude becomes in each dtype."""


def largest(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The largest finite magnitude over some dimensions, which are kept; 0 where there is none."""
    size = x.float().abs()
    size = torch.where(size.isfinite(), size, 0.0)
    return size.amax(dims, keepdim=True) if size.numel() else size.sum(dims, keepdim=True)


def scale_of(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scale = largest / LIMITS[dtype]
    return torch.where(scale > 2.0**-126, scale, 2.0**-126)


def rounded(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = (x.float() * (1.0 / scale)).clamp(-LIMITS[dtype], LIMITS[dtype])
    return y.nan_to_num(nan=0.0).round().to(dtype) if dtype == torch.int8 else y.to(dtype)


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """By rows or by groups within them; by one scale where it is given, with no scale to return."""
    if scale is not None:
        return rounded(x, scale.view(()), dtype), x.new_empty(0, dtype=torch.float32)
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    scale = scale_of(largest(groups, (-1,)), dtype)
    return rounded(groups, scale, dtype).flatten(-2), scale.squeeze(-1)


def quantize(
    x: torch.Tensor, scale: torch.Tensor | None, granularity: str, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    if scale is None and granularity == "tensor":
        one = scale_of(largest(x, tuple(range(x.dim()))), dtype).view(1)
        return rounded(x, one, dtype), one
    return quantize_rows(x, dtype, scale, group_size if granularity == "group" else None)


def quantize_int8(
    x: torch.Tensor, scale: torch.Tensor | None, granularity: str, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(x, scale, granularity, group_size, torch.int8)


def rms_norm_quantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
    scale: torch.Tensor | None,
    group_size: int | None,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(norm.rms_norm(x.float(), weight, eps, weight_offset), dtype, scale, group_size)


def add_rms_norm_quantize(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    eps: float,
    scale: torch.Tensor | None,
    group_size: int | None,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual.add_(x)
    return rms_norm_quantize(residual, weight, dtype, eps, scale, group_size, weight_offset)


def silu_and_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(activation.silu_and_mul(x.float()), dtype, scale, group_size)


def gelu_and_mul_quantize(
    x: torch.Tensor, dtype: torch.dtype, approximate: str, scale: torch.Tensor | None, group_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_rows(activation.gelu_and_mul(x.float(), approximate), dtype, scale, group_size)
