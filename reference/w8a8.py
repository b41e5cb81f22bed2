"""Linear layers with quantised activations and weights in plain torch."""

import torch

from octavo.reference.epilogue import finished
from octavo.reference.quant import dequantize_int4

BLOCK = 128


def scaled(sums: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Sums `[..., N]` times one scale, or one a token, and one scale, or one an output."""
    x_scale = x_scale.view(()) if x_scale.numel() == 1 else x_scale.view(*sums.shape[:-1], 1)
    return sums.float() * x_scale * weight_scale.view(-1)


def in_blocks(weight: torch.Tensor, weight_scale: torch.Tensor) -> bool:
    """Whether there is a scale for each 128 × 128 weights, not for each output or for all."""
    n, k = weight.shape
    blocks = -(-n // BLOCK), -(-k // BLOCK)
    return weight_scale.shape == blocks and weight_scale.shape != (n, 1) and weight_scale.numel() != 1


def int8_int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    sums = x.double() @ weight.double().t()  # exact
    if x_zero is not None and weight_sum is not None:
        sums -= (x_zero.view(()) if x_zero.numel() == 1 else x_zero.view(*x.shape[:-1], 1)) * weight_sum
    return finished(scaled(sums, x_scale, weight_scale), bias, residual, activation, out_dtype)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    if in_blocks(weight, weight_scale):
        scale = weight_scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]].repeat_interleave(BLOCK, 1)
        y = (x.float() * x_scale.repeat_interleave(BLOCK, -1)) @ (weight.float() * scale).t()
    else:
        y = scaled(x.float() @ weight.float().t(), x_scale, weight_scale)
    return finished(y, bias, residual, activation, out_dtype)


def int4_int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    y = x.float() @ dequantize_int4(packed, scale, minimum, group_size).t()
    y = y * (x_scale.view(()) if x_scale.numel() == 1 else x_scale.view(*x.shape[:-1], 1))
    return (y if bias is None else y + bias.float()).to(out_dtype)
