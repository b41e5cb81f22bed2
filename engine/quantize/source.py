"""A checkpoint read in pieces: a layer, or what belongs to none."""

import torch

from octavo.engine.checkpoint import Checkpoint, Weight
from octavo.engine.config import ModelConfig
from octavo.engine.layers import Linear, dequantize, make_linear
from octavo.engine.quantize.forward import ATTENTION, MLP, Half, HalfWeights, MixtureWeights
from octavo.engine.quantize.mixture import by_expert, halves_of, mixture_weights, routers


def layer_names(checkpoint: Checkpoint) -> list[str]:
    return [f"model.layers.{i}" for i in range(checkpoint.config.num_hidden_layers)]


def layer_weights(checkpoint: Checkpoint, name: str) -> dict[str, Weight]:
    """A layer's weights by full names.

    Raises:
        ValueError: one is missing; it names it.
    """
    config = checkpoint.config
    weights = dict(checkpoint.tensors(prefix=f"{name}."))
    wanted = [f"{name}.{m}.weight" for h in halves_of(config) for m in (h.norm, *h.modules)]
    if config.num_local_experts:
        weights = by_expert(config, weights)
        wanted += [f"{router}.weight" for router in routers(config) if router.startswith(f"{name}.")]
    return _with_all(weights, wanted)


def outer_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    """Embedding, last norm, and the head where it is not the embedding."""
    modules = ["model.embed_tokens", "model.norm", *([] if checkpoint.config.tie_word_embeddings else ["lm_head"])]
    return _whole(checkpoint, [f"{module}." for module in modules], [f"{module}.weight" for module in modules])


def _whole(checkpoint: Checkpoint, prefixes: list[str], wanted: list[str]) -> dict[str, Weight]:
    weights = {name: weight for prefix in prefixes for name, weight in checkpoint.tensors(prefix=prefix)}
    return _with_all(weights, wanted)


def _with_all(weights: dict[str, Weight], wanted: list[str]) -> dict[str, Weight]:
    for name in wanted:
        if name not in weights:
            raise ValueError(f"{name}: missing from the checkpoint")
    return weights


def half_weights(
    config: ModelConfig, name: str, weights: dict[str, Weight], device: torch.device, dtype: torch.dtype
) -> tuple[HalfWeights | MixtureWeights, ...]:
    """A layer on the device, on the ops that serve the formats of its weights."""

    def linear(*modules: str) -> Linear:
        biases = [weights.get(f"{name}.{m}.bias") for m in modules]
        return make_linear([weights[f"{name}.{m}.weight"] for m in modules], biases, device, dtype)  # type: ignore[arg-type]

    def norm(module: str) -> torch.Tensor:
        return dequantize(weights[f"{name}.{module}.weight"], device).to(dtype)

    def half(h: Half) -> HalfWeights:
        return HalfWeights(norm(h.norm), linear(*h.first), linear(h.last))

    if not config.num_local_experts:
        return half(ATTENTION), half(MLP)
    router = next(f"{of}.weight" for of in routers(config) if of.startswith(f"{name}."))
    experts = ((full, weight) for full, weight in weights.items() if ".experts." in full)
    dense = dequantize(weights[router], device)
    return half(ATTENTION), mixture_weights(config, norm(MLP.norm), dense, experts, device)
