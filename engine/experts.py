"""A mixture of experts: what stands in Mixtral's layers where a dense model has one MLP, and how it is loaded.

    p = softmax(the k largest of router(x)),    y = sum over those k experts of p_e · down_e(silu(gate_e(x)) · up_e(x))

Qwen3's may take p from the softmax over all experts, as it is (`renormalize=False`).

Dense weights of a layer's experts lie in two tensors, as `octavo.fused_moe` takes them: every tensor of the checkpoint
is copied to its place there as it is read, and let go. Experts in quantised formats stay as the checkpoint has them,
each with linear layers of its own, which are called one expert after another (`ExpertLoop`).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import torch

import octavo
from octavo.engine.config import ModelConfig
from octavo.engine.layers import DenseLinear, GatedLinear, Linear, Mlp, Weight, make_linear, supported

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StackedExperts:
    """Dense experts, computed by one call.

    w1 `[E, 2 I, H]`: of each expert gate's rows, then up's; w2 `[E, H, I]`: down.
    """

    w1: torch.Tensor
    w2: torch.Tensor

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return octavo.fused_moe(x, self.w1, self.w2, topk_weights, topk_ids)


@dataclass(frozen=True)
class ExpertLoop:
    """Experts in any format, one after another, each with the tokens that chose it.

    The host must know how many those are, so it waits for the device once a call: no CUDA graph can hold this.
    """

    experts: tuple[Mlp, ...]
    num_experts: int

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        rows, offsets, positions = octavo.moe_permute(x, topk_ids, self.num_experts)
        out = torch.empty_like(rows)
        if x.is_meta:  # a warm-up: an expert may get all tokens; fewer are other steps
            bounds = [(0, len(x))] * len(self.experts)
        else:
            bounds = list(pairwise(offsets.tolist()))
        for expert, (start, end) in zip(self.experts, bounds, strict=True):
            if start < end:
                out[start:end] = expert(rows[start:end])
        return octavo.moe_unpermute(out, positions, topk_weights)


@dataclass(frozen=True)
class MixtureOfExperts:
    router: Linear  # [T, H] -> [T, E]
    experts: StackedExperts | ExpertLoop
    top_k: int
    renormalize: bool = True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        topk_weights, topk_ids = octavo.moe_route(self.router(x), self.top_k, renormalize=self.renormalize)
        return self.experts(x, topk_weights, topk_ids)


MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_BY_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w[123]|(?:gate|up|down)_proj)\.weight"
)
_STACKED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")


def layer_of(name: str) -> int | None:
    """The layer whose experts a tensor belongs to; None where it is no expert's."""
    match = _BY_EXPERT.fullmatch(name) or _STACKED.fullmatch(name)
    return None if match is None else int(match[1])


@dataclass(frozen=True)
class Layout:
    """How a checkpoint names a layer's router and experts.

    Released models have three matrices an expert, gate, up and down: w1, w3 and w2 in Mixtral, and transformers'
    `save_pretrained` keeps to that. `stacked` is how transformers has them in memory: all experts' in two tensors.
    """

    block: str
    matrices: tuple[str, str, str]
    stacked: bool

    @classmethod
    def of(cls, config: ModelConfig, names: Collection[str]) -> "Layout":
        """The layout of a checkpoint that has tensors of these names."""
        stacked = any(_STACKED.fullmatch(name) for name in names)
        if config.architecture == "MixtralForCausalLM" and not stacked:
            return cls("block_sparse_moe", ("w1", "w3", "w2"), stacked)
        return cls("mlp", ("gate_proj", "up_proj", "down_proj"), stacked)

    def router(self, layer: int) -> str:
        """The module of a layer's router."""
        return f"model.layers.{layer}.{self.block}.gate"

    def shapes(self, config: ModelConfig, layer: int) -> dict[str, Shape]:
        """The tensors of a layer's router and experts."""
        count, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        at = f"model.layers.{layer}.{self.block}.experts"
        shapes: dict[str, Shape] = {f"{self.router(layer)}.weight": (count, hidden)}
        if self.stacked:
            return shapes | {
                f"{at}.gate_up_proj": (count, 2 * inner, hidden),
                f"{at}.down_proj": (count, hidden, inner),
            }
        of_one = dict(zip(self.matrices, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
        return shapes | {f"{at}.{e}.{name}.weight": shape for e in range(count) for name, shape in of_one.items()}


class ExpertLoader:
    """Takes the weights of one layer's experts in any order.

    Args:
        config: the model's.
        device, dtype: of dense weights.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.count, self.hidden, self.inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.w1: torch.Tensor | None = None
        self.w2: torch.Tensor | None = None
        self.pending: dict[tuple[int, str], Weight] = {}
        self.linears: dict[tuple[int, str], Linear] = {}

    def add(self, name: str, weight: Weight) -> None:
        """Puts a dense weight into its place; makes a layer of a quantised one, once gate has its up."""
        stacked = _STACKED.fullmatch(name)
        if stacked is not None:
            assert isinstance(weight, torch.Tensor)
            setattr(self, "w2" if stacked[2] == "down_proj" else "w1", weight.to(self.device, self.dtype))
            return
        match = _BY_EXPERT.fullmatch(name)
        assert match is not None, name
        expert, matrix = int(match[2]), MATRICES.get(match[3], match[3])
        weight = supported(weight, self.device, self.dtype)
        if isinstance(weight, torch.Tensor):
            weight = self._place(expert, matrix).copy_(weight)
        self.pending[expert, matrix] = weight
        group = [(expert, "w2")] if matrix == "w2" else [(expert, "w1"), (expert, "w3")]
        if all(part in self.pending for part in group):
            weights = [self.pending.pop(part) for part in group]
            if not all(isinstance(w, torch.Tensor) for w in weights):
                no_biases: list[torch.Tensor | None] = [None] * len(group)
                gated = matrix != "w2"
                self.linears[group[0]] = make_linear(weights, no_biases, self.device, self.dtype, gated)

    def finish(self) -> StackedExperts | ExpertLoop:
        """The experts, once all of their weights have come."""
        if not self.linears:
            assert self.w1 is not None and self.w2 is not None
            return StackedExperts(self.w1, self.w2)
        return ExpertLoop(tuple(Mlp(self._gate_up(e), self._down(e)) for e in range(self.count)), self.count)

    def _place(self, expert: int, matrix: str) -> torch.Tensor:
        if matrix == "w2":
            if self.w2 is None:
                self.w2 = self._empty(self.hidden, self.inner)
            return self.w2[expert]
        if self.w1 is None:
            self.w1 = self._empty(2 * self.inner, self.hidden)
        return self.w1[expert].chunk(2)[matrix == "w3"]

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(self.count, *shape, dtype=self.dtype, device=self.device)

    def _gate_up(self, expert: int) -> Linear:
        if (expert, "w1") in self.linears:
            return self.linears[expert, "w1"]
        assert self.w1 is not None
        return GatedLinear(DenseLinear(self.w1[expert], None))

    def _down(self, expert: int) -> Linear:
        if (expert, "w2") in self.linears:
            return self.linears[expert, "w2"]
        assert self.w2 is not None
        return DenseLinear(self.w2[expert], None)
