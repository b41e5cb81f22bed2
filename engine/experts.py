"""A mixture of experts: what stands in Mixtral's layers where a dense model has one MLP, and how it is loaded.

    p = softmax(the k largest of router(x)),    y = sum over those k experts of p_e · down_e(silu(gate_e(x)) · up_e(x))

Qwen3's may take p from the softmax over all experts, as it is (`renormalize=False`).

The weights of a layer's experts lie in two tensors where `octavo.fused_moe` takes them, dense, or in int8 or fp8 with
inputs quantised by token: every tensor of the checkpoint is copied to its place there as it is read, and let go.
Experts in other quantised formats stay as the checkpoint has them, each with linear layers of its own, which are called
one expert after another (`ExpertLoop`).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

import octavo
from octavo.engine.checkpoint import Fp8Weight, Int8Weight, Weight
from octavo.engine.config import ModelConfig
from octavo.engine.layers import DenseLinear, GatedLinear, Linear, Mlp, make_linear, output_scales, supported

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StackedExperts:
    """Experts that are computed by one call: dense ones, and int8 and fp8 whose inputs are quantised by token.

    w1 `[E, 2 I, H]`: of each expert gate's rows, then up's; w2 `[E, H, I]`: down. Of int8 and fp8 w1_scale `[E, 2 I]`
    and w2_scale `[E, H]`, fp32.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return octavo.fused_moe(
            *(x, self.w1, self.w2, topk_weights, topk_ids), w1_scale=self.w1_scale, w2_scale=self.w2_scale
        )


@dataclass(frozen=True)
class ExpertLoop:
    """Experts in any format, computed one after another, each with the tokens that chose it.

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


@dataclass(frozen=True)
class _Stack:
    """One matrix of all experts of a layer, w2, or w1 with w3 below it."""

    weight: torch.Tensor  # [E, N, K], dense, int8 or fp8
    scale: torch.Tensor | None  # [E, N], fp32, where it is not dense

    @classmethod
    def empty(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> "_Stack":
        dense = dtype.is_floating_point and dtype.itemsize > 1
        scale = None if dense else torch.empty(shape[:2], dtype=torch.float32, device=device)
        return cls(torch.empty(shape, dtype=dtype, device=device), scale)

    def put(self, expert: int, rows: slice, weight: Weight) -> Weight:
        """Copies a matrix to its place; returns it as it lies there."""
        place = self.weight[expert, rows]
        if isinstance(weight, torch.Tensor):
            return place.copy_(weight)
        assert self.scale is not None and isinstance(weight, Int8Weight | Fp8Weight)
        q, scale = place.copy_(weight.q), self.scale[expert, rows].copy_(output_scales(weight)).unsqueeze(1)
        if isinstance(weight, Fp8Weight):
            return replace(weight, q=q, scale=scale, block=(1, q.shape[1]))
        return replace(weight, q=q, scale=scale)


class ExpertLoader:
    """Takes the weights of one layer's experts in any order.

    Args:
        config: the model's.
        device, dtype: of dense weights.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.count, self.hidden, self.inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.stacks: dict[str, _Stack] = {}
        self.matrices: dict[tuple[int, str], Weight] = {}
        self.loose: set[tuple[int, str]] = set()  # those of `matrices` that lie in no stack
        self.linears: dict[tuple[int, str], Linear] = {}

    def add(self, name: str, weight: Weight) -> None:
        """Puts a weight that `fused_moe` takes into its place; makes a layer of another, with gate once up is there."""
        stacked = _STACKED.fullmatch(name)
        if stacked is not None:
            assert isinstance(weight, torch.Tensor)
            matrix = "w2" if stacked[2] == "down_proj" else "w1"
            self.stacks[matrix] = _Stack(weight.to(self.device, self.dtype), None)
            return
        match = _BY_EXPERT.fullmatch(name)
        assert match is not None, name
        expert, matrix = int(match[2]), MATRICES.get(match[3], match[3])
        self._put(expert, matrix, supported(weight, self.device, self.dtype))
        group = _group(matrix)
        if all((expert, of) in self.matrices for of in group) and any((expert, of) in self.loose for of in group):
            weights = [self.matrices.pop((expert, of)) for of in group]
            self.linears[expert, group[0]] = self._linear(weights)

    def finish(self) -> StackedExperts | ExpertLoop:
        """The experts, once all of their weights have come."""
        w1, w2 = (self.stacks.get(matrix) for matrix in ("w1", "w2"))
        if not self.linears and w1 is not None and w2 is not None and w1.weight.dtype == w2.weight.dtype:
            return StackedExperts(w1.weight, w2.weight, w1.scale, w2.scale)
        experts = (Mlp(self._of_expert(e, "w1"), self._of_expert(e, "w2")) for e in range(self.count))
        return ExpertLoop(tuple(experts), self.count)

    def _put(self, expert: int, matrix: str, weight: Weight) -> None:
        """Into its stack, whose dtype the first weight decides, or by itself."""
        stack, dtype = _group(matrix)[0], self.dtype if isinstance(weight, torch.Tensor) else weight.q.dtype
        stackable = isinstance(weight, torch.Tensor) or _by_token(weight)
        if stackable and stack not in self.stacks:
            n, k = (self.hidden, self.inner) if stack == "w2" else (2 * self.inner, self.hidden)
            self.stacks[stack] = _Stack.empty((self.count, n, k), dtype, self.device)
        if stackable and self.stacks[stack].weight.dtype == dtype:
            rows = {"w1": slice(None, self.inner), "w3": slice(self.inner, None)}.get(matrix, slice(None))
            weight = self.stacks[stack].put(expert, rows, weight)
        else:
            self.loose.add((expert, matrix))
        self.matrices[expert, matrix] = weight

    def _of_expert(self, expert: int, matrix: str) -> Linear:
        """The layer of an expert; where all of it lies in a stack, made of that."""
        if (expert, matrix) in self.linears:
            return self.linears[expert, matrix]
        stack = self.stacks[matrix]
        if stack.scale is not None:
            return self._linear([self.matrices.pop((expert, of)) for of in _group(matrix)])
        linear = DenseLinear(stack.weight[expert], None)
        return GatedLinear(linear) if matrix == "w1" else linear

    def _linear(self, weights: list[Weight]) -> Linear:
        return make_linear(weights, [None] * len(weights), self.device, self.dtype, gated=len(weights) == 2)


def _group(matrix: str) -> tuple[str, ...]:
    """The matrices that are one layer with it."""
    return ("w2",) if matrix == "w2" else ("w1", "w3")


def _by_token(weight: Weight) -> bool:
    """Whether it is one of those 8-bit formats that `fused_moe` takes: inputs quantised by token, scales by output."""
    if not isinstance(weight, Int8Weight | Fp8Weight) or weight.activations is None:
        return False
    return weight.activations.granularity == "token"
