"""A checkpoint read in pieces: a layer, or what belongs to none."""

import torch

from octavo.engine.checkpoint import Checkpoint, Weight
from octavo.engine.layers import Linear, dequantize, make_linear
from octavo.engine.quantize.forward import HALVES, HalfWeights


def layer_names(checkpoint: Checkpoint) -> list[str]:
    return [f"model.layers.{i}" for i in range(checkpoint.config.num_hidden_layers)]


def layer_weights(checkpoint: Checkpoint, name: str) -> dict[str, Weight]:
    """A layer's weights by full names.

    Raises:
        ValueError: one is missing; it names it.
    """
    return _whole(checkpoint, [f"{name}."], [f"{name}.{m}.weight" for h in HALVES for m in (h.norm, *h.modules)])


def outer_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Embedding, last norm, and the head where it is not the embedding."""
    modules = ["model.embed_tokens", "model.norm", *([] if checkpoint.config.tie_word_embeddings else ["lm_head"])]
    return _whole(checkpoint, [f"{module}." for module in modules], [f"{module}.weight" for module in modules])


def _whole(checkpoint: Checkpoint, prefixes: list[str], wanted: list[str]) -> dict[str, Weight]:
    weights = {name: weight for prefix in prefixes for name, weight in checkpoint.tensors(prefix=prefix)}
    for name in wanted:
        if name not in weights:
            raise ValueError(f"{name}: missing from the checkpoint")
    return weights


def half_weights(
    name: str, weights: dict[str, Weight], device: torch.device, dtype: torch.dtype
) -> tuple[HalfWeights, ...]:
    """A layer on the device, on the ops that serve the formats of its weights."""

    def linear(*modules: str) -> Linear:
        biases = [weights.get(f"{name}.{m}.bias") for m in modules]
        return make_linear([weights[f"{name}.{m}.weight"] for m in modules], biases, device, dtype)  # type: ignore[arg-type]

    def norm(module: str) -> torch.Tensor:
        return dequantize(weights[f"{name}.{module}.weight"], device).to(dtype)

    return tuple(HalfWeights(norm(h.norm), linear(*h.first), linear(h.last)) for h in HALVES)
