"""RMSNorm and layer norm in plain torch."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    # torch.nn.functional.rms_norm takes twice the time on a CPU, where it is composed of more steps.
    x32, w = x.float(), weight.float()
    y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (y * (w + weight_offset if weight_offset else w)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
) -> torch.Tensor:
    residual.add_(x)
    return rms_norm(residual, weight, eps, weight_offset)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, weight_offset: float
) -> torch.Tensor:
    w = weight.float() + weight_offset
    b = None if bias is None else bias.float()
    return torch.nn.functional.layer_norm(x.float(), w.shape, w, b, eps).to(x.dtype)
