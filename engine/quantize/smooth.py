"""SmoothQuant: what makes activations hard to quantise, a few large inputs, moved over to the weights.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),    x_j / s_j,    w_j · s_j

What makes x is divided by s, so nothing is left to do at run time: the weight of a norm, or the rows of the layer in
front of it (up before down; v before o, where query heads that share a value head share s).
Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022),
https://arxiv.org/abs/2211.10438.
"""

import torch


class Largest:
    """The largest magnitude of each of a layer's inputs."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.value = torch.zeros(inputs, device=device)

    def add(self, x: torch.Tensor) -> None:
        """x: `[T, K]`."""
        torch.maximum(self.value, x.abs().amax(0).float(), out=self.value)


def balance(
    norm: torch.Tensor, weights: list[torch.Tensor], largest: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Moves a norm's scale over to the layers behind it.

    Args:
        norm: `[K]`, the norm's weight, in the dtype that it is stored in.
        weights: `[N, K]` each, fp32: the layers that take the norm's output.
        largest: `[K]`, fp32: the largest magnitudes of that output.
        alpha: how much of the difficulty the weights take over, from 0 to 1.

    Returns:
        The norm and the weights, so that their products are what they were: the weights are multiplied by what the
        norm, as rounded to its dtype, was divided by. Inputs that are always 0 stay as they are.
    """
    of_weights = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = largest.pow(alpha) / of_weights.pow(1 - alpha)
    divided = (norm.float() / s).to(norm.dtype)
    kept = (largest > 0) & (of_weights > 0) & divided.isfinite() & (divided != 0)
    divided = torch.where(kept, divided, norm)
    factor = torch.where(kept, norm.float() / divided.float(), 1.0)
    return divided, [w * factor for w in weights]


def balance_rows(
    front: torch.Tensor, weight: torch.Tensor, largest: torch.Tensor, alpha: float, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves the scale of a layer's inputs over to it from the layer that makes them.

    Args:
        front: `[rows, J]`, fp32: the layer that makes them, one row an input or one for several heads' inputs.
        weight: `[N, K]`, fp32, K a multiple of `rows`: the layer that takes them.
        largest: `[K]`, fp32: the largest magnitudes of the inputs.
        alpha: as in `balance`.
        heads: of front; an input's row is that of its head's group.

    Returns:
        front and weight, and what front's rows were divided by, `[rows]`.
    """
    size = front.shape[0] // heads

    def shared(of_inputs: torch.Tensor) -> torch.Tensor:
        return of_inputs.view(heads, -1, size).amax(1).flatten()

    of_inputs, of_weight = shared(largest), shared(weight.abs().amax(0))
    s = of_inputs.pow(alpha) / of_weight.pow(1 - alpha)
    s = torch.where((of_inputs > 0) & (of_weight > 0) & s.isfinite(), s, 1.0)
    wide = s.view(heads, 1, size).expand(-1, weight.shape[1] // front.shape[0], -1).flatten()
    return front / s[:, None], weight * wide, s
