"""SmoothQuant: what makes activations hard to quantise, a few large inputs, moved over to the weights.

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),    x_j / s_j,    w_j · s_j

What makes x is divided by s, so nothing is left to do at run time: the weight of a norm, or the rows of the layer in
front of it (up before down; v before o, where query heads that share a value head share s).
Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022),
https://arxiv.org/abs/2211.10438.

Behind a norm, where each input has an s of its own, that is where a search begins for the s with which rounding to int8
changes the layer's outputs least. A token's step is set by its largest input, an output's by its largest weight; with
both rounding errors uniform and independent, and tokens' errors counted as parts of their outputs' size, that is

    sum_t max_j u_tj² · sum_nj v_nj² + sum_n max_j v_nj² · sum_tj u_tj²,   u_tj = x_tj / (s_j |y_t|),   v_nj = w_nj s_j
"""

import math
from collections.abc import Sequence

import torch

TOKENS = 512
"""Of the calibration text, at most, that the search looks at."""
STEPS = 80
RATE = 0.1  # of log s a step, to begin with


class Largest:
    """The largest magnitude of each of a layer's inputs."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.value = torch.zeros(inputs, device=device)

    def add(self, x: torch.Tensor) -> None:
        """x: `[T, K]`."""
        torch.maximum(self.value, x.abs().amax(0).float(), out=self.value)


def search(x: torch.Tensor, weights: Sequence[torch.Tensor], s: torch.Tensor) -> torch.Tensor:
    """The s, `[K]`, fp32, with which rounding x / s and the weights · s changes the outputs least, by the sum above.

    Args:
        x: `[T, K]`: some tokens' inputs.
        weights: `[N, K]` each, fp32: the layers that take them.
        s: `[K]`, fp32: where to begin; what is not finite and positive stays as it is, and has no say.
    """
    usable = s.isfinite() & (s > 0)
    inputs, outputs = x[:, usable].float(), torch.cat([w[:, usable] for w in weights])
    sizes = (inputs @ outputs.t()).norm(dim=1)
    inputs, outputs = inputs[sizes > 0].abs() / sizes[sizes > 0, None], outputs.abs()
    if not inputs.numel():
        return s
    of_inputs, of_outputs = inputs.square().sum(0), outputs.square().sum(0)
    log_s = s[usable].log()
    best, least = log_s, torch.full((), math.inf, device=s.device)
    mean, variance = torch.zeros_like(log_s), torch.zeros_like(log_s)
    for step in range(STEPS):
        by = log_s.exp()
        x_steps, w_steps = _steps(inputs / by), _steps(outputs * by)
        # What a step of each comes to in outputs.
        x_passed, w_passed = of_outputs * by.square(), of_inputs / by.square()
        x_error, w_error = x_steps.sum() * x_passed.sum(), w_steps.sum() * w_passed.sum()
        error = x_error + w_error
        best, least = torch.where(error < least, log_s, best), torch.minimum(error, least)
        slope = x_error * (x_passed / x_passed.sum() - x_steps / x_steps.sum())
        slope += w_error * (w_steps / w_steps.sum() - w_passed / w_passed.sum())
        # Adam (Kingma and Ba 2014), of the error's logarithm, ever slower.
        slope /= error
        mean.lerp_(slope, 0.1)
        variance.lerp_(slope.square(), 0.01)
        unbiased = mean / (1 - 0.9 ** (step + 1)), variance / (1 - 0.99 ** (step + 1))
        log_s = log_s - RATE * (1 - step / STEPS) * unbiased[0] / (unbiased[1].sqrt() + 1e-12)
    found = s.clone()
    found[usable] = best.exp()
    return found


def _steps(values: torch.Tensor) -> torch.Tensor:
    """The sum of the squares of each row's largest value, at the column where it lies: `[rows, K] -> [K]`."""
    largest, column = values.max(1)
    return torch.zeros_like(values[0]).index_add_(0, column, largest.square())


def balance(
    norm: torch.Tensor,
    weights: list[torch.Tensor],
    largest: torch.Tensor,
    alpha: float,
    sample: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Moves a norm's scale over to the layers behind it.

    Args:
        norm: `[K]`, the norm's weight, in the dtype that it is stored in.
        weights: `[N, K]` each, fp32: the layers that take the norm's output.
        largest: `[K]`, fp32: the largest magnitudes of that output.
        alpha: how much of the difficulty the weights take over, from 0 to 1.
        sample: `[T, K]`: that output for some tokens, with which a better balance is searched for; None for alpha's.

    Returns:
        The norm and the weights, so that their products are what they were: the weights are multiplied by what the
        norm, as rounded to its dtype, was divided by. Inputs that are always 0 stay as they are.
    """
    of_weights = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    s = largest.pow(alpha) / of_weights.pow(1 - alpha)
    if sample is not None:
        s = search(sample, weights, s)
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
