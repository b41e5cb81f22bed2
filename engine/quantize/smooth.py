"""SmoothQuant: what makes activations hard to quantise, a few large inputs, moved over to the weights.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),    x_j / s_j,    w_j · s_j

x comes from a norm, whose weight is divided by s, so nothing is left to do at run time.
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
