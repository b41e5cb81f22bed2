"""What quantising a mixture of experts has that a dense model has not: its names, and the tokens of each expert.

Each expert's MLP is calibrated on the tokens that the router, which stays as it is, sends to it. An expert that few
choose is rounded to nearest: from less than `FEW` tokens GPTQ would learn those tokens.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import octavo
from octavo.engine.checkpoint import Weight
from octavo.engine.config import ModelConfig
from octavo.engine.experts import ExpertLoader, Layout, MixtureOfExperts
from octavo.engine.layers import DenseLinear
from octavo.engine.quantize.forward import ATTENTION, MLP, Forward, Half, MixtureWeights, Stream

FEW = 128
"""Tokens of the calibration text: an expert that sees less of them is rounded to nearest."""


def layout_of(config: ModelConfig) -> Layout:
    """The names that a quantised mixture has: those of released models, three matrices an expert."""
    return Layout.of(config, ())


def halves_of(config: ModelConfig) -> tuple[Half, ...]:
    """Attention, and the MLP or those of all experts: modules with the same inputs, by their names in a layer."""
    if not config.num_local_experts:
        return ATTENTION, MLP
    layout = layout_of(config)
    gate, up, down = layout.matrices
    experts = [f"{layout.block}.experts.{e}" for e in range(config.num_local_experts)]
    return ATTENTION, *(Half(MLP.norm, (f"{at}.{gate}", f"{at}.{up}"), f"{at}.{down}") for at in experts)


def routers(config: ModelConfig) -> list[str]:
    """The modules that choose experts; they stay as they are."""
    count = config.num_hidden_layers if config.num_local_experts else 0
    return [layout_of(config).router(i) for i in range(count)]


def by_expert(config: ModelConfig, weights: dict[str, Weight]) -> dict[str, Weight]:
    """A layer's weights by the names of released models, where transformers' two tensors for all experts are views."""
    layout, renamed = layout_of(config), dict[str, Weight]()
    gate, up, down = layout.matrices
    for name, weight in weights.items():
        at, is_expert, which = name.partition(".mlp.experts.")
        if which not in ("gate_up_proj", "down_proj"):
            of_router = name.endswith(".mlp.gate.weight")
            renamed[name.replace(".mlp.", f".{layout.block}.") if is_expert or of_router else name] = weight
            continue
        assert isinstance(weight, torch.Tensor)
        for e, of in enumerate(weight):
            matrices = {down: of} if which == "down_proj" else dict(zip((gate, up), of.chunk(2), strict=True))
            renamed |= {f"{at}.{layout.block}.experts.{e}.{name}.weight": part for name, part in matrices.items()}
    return renamed


def mixture_weights(
    config: ModelConfig,
    norm: torch.Tensor,
    router: torch.Tensor,
    experts: Iterator[tuple[str, Weight]],
    device: torch.device,
) -> MixtureWeights:
    """A layer's mixture on the device, in the norm's dtype, on the ops that serve the formats of its weights."""
    loader = ExpertLoader(config, device, norm.dtype)
    for weight_name, weight in experts:
        loader.add(weight_name, weight)
    layer = DenseLinear(router.to(device, norm.dtype), None)
    mixture = MixtureOfExperts(layer, loader.finish(), config.num_experts_per_tok, config.norm_topk_prob)
    return MixtureWeights(norm, mixture)


class Routed:
    """Which tokens of the calibration go to which experts of a layer.

    Args:
        calibration: the hidden states before the experts' norm.
        norm, router: as they are computed with.
    """

    def __init__(self, forward: Forward, calibration: Stream, norm: torch.Tensor, router: torch.Tensor) -> None:
        self.forward, self.calibration, self.norm = forward, calibration, norm
        c = forward.config
        logits = (F.linear(x, router) for x in self._inputs())
        self._ids = [octavo.moe_route(of, c.num_experts_per_tok, renormalize=c.norm_topk_prob)[1] for of in logits]

    def count(self, expert: int) -> int:
        return sum(int((ids == expert).sum()) for ids in self._ids)

    def inputs(self, expert: int) -> Iterator[torch.Tensor]:
        """`[T, hidden]`: what an expert sees of each sequence from which it sees something."""
        for x, ids in zip(self._inputs(), self._ids, strict=True):
            chosen = (ids == expert).any(1)
            if chosen.any():
                yield x[chosen]

    def _inputs(self) -> Iterator[torch.Tensor]:
        return (self.forward.first_inputs(hidden, self.norm) for hidden in self.calibration)
