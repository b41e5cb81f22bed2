"""What may follow a linear layer before its results are rounded: bias, SiLU × gate, residual. In plain torch."""

import torch

from octavo.reference.activation import silu_and_mul

PAIRED = 8
"""Outputs of gate beside as many of up, where one product computes both."""


def finished(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """What follows the scaled sums `y`, `[..., N]` in fp32."""
    if bias is not None:
        y = y + bias.float()
    if activation is not None:
        y = silu_and_mul(y.unflatten(-1, (-1, 2, PAIRED)).transpose(-3, -2).flatten(-3))
    return (y if residual is None else y + residual.float()).to(out_dtype)


def interleave_gate_up(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    dim %= weight.dim()
    return weight.unflatten(dim, (2, -1, PAIRED)).transpose(dim, dim + 1).flatten(dim, dim + 2).contiguous()
