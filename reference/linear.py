"""A dense linear layer with the activation that may follow it, in plain torch."""

import torch


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    prefetch_weight: bool = False,
) -> torch.Tensor:
    y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    return y.to(x.dtype)
