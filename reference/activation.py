"""Activations of feed-forward layers in plain torch."""

import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def gelu_and_mul(x: torch.Tensor, approximate: str) -> torch.Tensor:
    gate, up = x.float().chunk(2, -1)
    return (torch.nn.functional.gelu(gate, approximate=approximate) * up).to(x.dtype)


def relu2(x: torch.Tensor) -> torch.Tensor:
    return x.float().relu().square().to(x.dtype)
