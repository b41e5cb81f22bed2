"""Weight-only quantised linear layers in plain torch: unpack, dequantise to fp32, multiply, round once."""

import torch

from octavo.reference.epilogue import finished


def int4_unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    planes = torch.stack([packed >> shift & 15 for shift in (0, 4, 8, 12)], -2).to(torch.uint8)
    rows, tiles = packed.shape[0] * 64, packed.shape[1]
    return planes.permute(0, 2, 1, 3, 4).reshape(rows, tiles * 128)[:n, :k].contiguous()


def dequantize_int4(
    packed: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """The fp32 weights `[N, K]` of `int4_linear`."""
    groups, n = scale.shape
    w = int4_unpack(packed, n, groups * group_size).float().view(n, groups, group_size)
    if minimum is None:
        return w.sub_(8).mul_(scale.t().float()[..., None]).view(n, -1)
    return w.mul_(scale.t().float()[..., None]).add_(minimum.t().float()[..., None]).view(n, -1)


def dequantize_int8(weight: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """The fp32 weights `[N, K]` of `int8_linear`."""
    w = weight.float().view(weight.shape[0], -1, group_size)
    return w.mul_(scale.t().float()[..., None]).view(weight.shape)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    y = linear(x.float(), dequantize_int4(packed, scale, minimum, group_size), bias)
    return finished(y, None, residual, activation, x.dtype)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    return linear(x, dequantize_int8(weight, scale, group_size), bias)
