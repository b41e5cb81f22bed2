"""A mixture of experts: what stands in Mixtral's layers where a dense model has one MLP, and how it is loaded.

    p = softmax(the k largest of router(x)),    y = sum over those k experts of p_e · down_e(silu(gate_e(x)) · up_e(x))

Qwen's may take p from the softmax over all experts, as it is (`renormalize=False`), and Qwen2's layers have an expert
that all tokens share, times sigmoid(shared_gate(x)).

The weights of a layer's experts lie in two tensors where `octavo.fused_moe` takes them: dense, int4 and int8 alone, in
int8 or fp8 with inputs quantised by token, in fp8 by blocks. Every tensor of the checkpoint is copied to its place
there as it is read, and let go. Experts in other formats (act-order, given scales of inputs, several formats in a
layer) stay as the checkpoint has them, each with linear layers of its own, which are called one expert after another
(`ExpertLoop`).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

import octavo
from octavo.engine.checkpoint import Activations, Fp8Weight, Int4Weight, Int8Weight, Weight
from octavo.engine.config import ModelConfig
from octavo.engine.layers import (
    BLOCK,
    DenseLinear,
    GatedLinear,
    Int4Linear,
    Int8Linear,
    Linear,
    Mlp,
    SplitLinear,
    W8A8Linear,
    make_linear,
    output_scales,
    supported,
)

Shape = tuple[int, ...]
TILE = 64  # rows of packed int4 weights that lie together


@dataclass(frozen=True)
class StackedExperts:
    """Experts that are computed by one call.

    w1 `[E, 2 I, H]`: of each expert gate's rows, then up's; w2 `[E, H, I]`: down; of int4 each expert's are packed.
    Scales and minima are as `octavo.fused_moe` takes them, `weights_only` what it says of int8.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    w1_minimum: torch.Tensor | None = None
    w2_minimum: torch.Tensor | None = None
    weights_only: bool = False

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return octavo.fused_moe(
            *(x, self.w1, self.w2, topk_weights, topk_ids),
            w1_scale=self.w1_scale,
            w2_scale=self.w2_scale,
            w1_minimum=self.w1_minimum,
            w2_minimum=self.w2_minimum,
            weights_only=self.weights_only,
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
class SharedExpert:
    """What every token takes, as far as the gate says: sigmoid(gate(x)) · mlp(x)."""

    mlp: Mlp
    gate: Linear  # [T, H] -> [T, 1]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).sigmoid() * self.mlp(x)


@dataclass(frozen=True)
class MixtureOfExperts:
    router: Linear  # [T, H] -> [T, E]
    experts: StackedExperts | ExpertLoop
    top_k: int
    renormalize: bool = True
    shared: SharedExpert | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        topk_weights, topk_ids = octavo.moe_route(self.router(x), self.top_k, renormalize=self.renormalize)
        y = self.experts(x, topk_weights, topk_ids)
        return y if self.shared is None else y + self.shared(x)


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

    def shared(self, layer: int) -> str:
        """The module of the expert that all tokens of a layer share, where there is one."""
        return f"model.layers.{layer}.{self.block}.shared_expert"

    def shapes(self, config: ModelConfig, layer: int) -> dict[str, Shape]:
        """The tensors of a layer's router and experts."""
        count, hidden, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        at = f"model.layers.{layer}.{self.block}.experts"
        shapes: dict[str, Shape] = {f"{self.router(layer)}.weight": (count, hidden)}
        if shared := config.shared_expert_intermediate_size:
            of_shared = {"gate_proj": (shared, hidden), "up_proj": (shared, hidden), "down_proj": (hidden, shared)}
            shapes |= {f"{self.shared(layer)}.{name}.weight": shape for name, shape in of_shared.items()}
            shapes[f"{self.shared(layer)}_gate.weight"] = (1, hidden)
        if self.stacked:
            return shapes | {
                f"{at}.gate_up_proj": (count, 2 * inner, hidden),
                f"{at}.down_proj": (count, hidden, inner),
            }
        of_one = dict(zip(self.matrices, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
        return shapes | {f"{at}.{e}.{name}.weight": shape for e in range(count) for name, shape in of_one.items()}


@dataclass(frozen=True)
class Kind:
    """What weights must have in common to lie in one tensor."""

    dtype: torch.dtype  # of it
    scale_dtype: torch.dtype | None = None
    group_size: int = 0  # of int4 and int8 alone: inputs that share a scale
    minimum_dtype: torch.dtype | None = None
    blocks: bool = False  # of fp8: a scale for BLOCK by BLOCK weights

    @property
    def is_int4(self) -> bool:
        return self.dtype == torch.int16

    @property
    def weights_only(self) -> bool:
        """Whether they are int8 beside inputs as they are."""
        return self.dtype == torch.int8 and self.group_size > 0


@dataclass(frozen=True)
class _Stack:
    """One matrix of all experts of a layer, w2, or w1 with w3 below it, as `fused_moe` takes it."""

    kind: Kind
    weight: torch.Tensor  # [E, N, K], dense, int8 or fp8; or int4, packed: [E, N / 64, K / 128, 64, 32]
    scale: torch.Tensor | None  # [E, N] fp32 of int8 and fp8, or by blocks; [E, K / group size, N] of groups
    minimum: torch.Tensor | None  # as scale

    @classmethod
    def empty(cls, kind: Kind, count: int, n: int, k: int, device: torch.device) -> "_Stack":
        shape: Shape = (count, n)
        if kind.group_size:
            shape = (count, k // kind.group_size, n)
        elif kind.blocks:
            shape = (count, n // BLOCK, k // BLOCK)

        def of_groups(dtype: torch.dtype | None) -> torch.Tensor | None:
            return None if dtype is None else torch.empty(shape, dtype=dtype, device=device)

        size = (n // TILE, -(-k // 128), TILE, 32) if kind.is_int4 else (n, k)
        weight = torch.empty(count, *size, dtype=kind.dtype, device=device)
        return cls(kind, weight, of_groups(kind.scale_dtype), of_groups(kind.minimum_dtype))

    def put(self, expert: int, rows: slice, weight: Weight) -> None:
        """Copies a matrix, or half of one, to its place."""
        place, scale, minimum = self._at(expert, rows)
        if isinstance(weight, torch.Tensor):
            place.copy_(weight)
            return
        assert scale is not None
        place.copy_(octavo.int4_pack(weight.q.to(place.device)) if isinstance(weight, Int4Weight) else weight.q)
        scale.copy_(weight.scale.t() if self.kind.group_size else output_scales(weight))  # type: ignore[arg-type]
        if minimum is not None:
            assert isinstance(weight, Int4Weight) and weight.minimum is not None
            minimum.copy_(weight.minimum.t())

    def linear(self, expert: int, rows: slice = slice(None)) -> Linear:
        """The layer of one expert, over the same memory."""
        (weight, scale, minimum), kind = self._at(expert, rows), self.kind
        if scale is None:
            return DenseLinear(weight, None)
        if kind.is_int4:
            return Int4Linear(weight, scale, minimum, None, kind.group_size)
        if kind.weights_only:
            return Int8Linear(weight, scale, None, kind.group_size)
        return W8A8Linear(weight, scale, None, Activations("group" if kind.blocks else "token"))

    def _at(self, expert: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        def part(rows: slice, of: int) -> slice:
            return slice(*(None if end is None else end // of for end in (rows.start, rows.stop)))

        scale = self.scale
        if scale is not None:
            scale = scale[expert, part(rows, BLOCK)] if self.kind.blocks else scale[expert, ..., rows]
        minimum = None if self.minimum is None else self.minimum[expert, ..., rows]
        return self.weight[expert, part(rows, TILE) if self.kind.is_int4 else rows], scale, minimum


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
        self.seen: set[tuple[int, str]] = set()
        self.loose: dict[tuple[int, str], Weight] = {}  # those seen that fit into no stack
        self.linears: dict[tuple[int, str], Linear] = {}

    def add(self, name: str, weight: Weight) -> None:
        """Puts a weight that `fused_moe` takes into its place; makes a layer of another, with gate once up is there."""
        stacked = _STACKED.fullmatch(name)
        if stacked is not None:
            assert isinstance(weight, torch.Tensor)
            matrix = "w2" if stacked[2] == "down_proj" else "w1"
            self.stacks[matrix] = _Stack(Kind(self.dtype), weight.to(self.device, self.dtype), None, None)
            return
        match = _BY_EXPERT.fullmatch(name)
        assert match is not None, name
        expert, matrix = int(match[2]), MATRICES.get(match[3], match[3])
        self._put(expert, matrix, supported(weight, self.device, self.dtype))
        self.seen.add((expert, matrix))
        group = _group(matrix)
        if all((expert, of) in self.seen for of in group) and any((expert, of) in self.loose for of in group):
            self.linears[expert, group[0]] = self._linear(expert, group)

    def finish(self) -> StackedExperts | ExpertLoop:
        """The experts, once all of their weights have come."""
        w1, w2 = (self.stacks.get(matrix) for matrix in ("w1", "w2"))
        if not self.linears and w1 is not None and w2 is not None and _fuse(w1.kind, w2.kind):
            scales = w1.scale, w2.scale, w1.minimum, w2.minimum
            return StackedExperts(w1.weight, w2.weight, *scales, w1.kind.weights_only)
        experts = []
        for e in range(self.count):
            gate_up = self.linears.get((e, "w1")) or GatedLinear(self.stacks["w1"].linear(e))
            experts.append(Mlp(gate_up, self.linears.get((e, "w2")) or self.stacks["w2"].linear(e)))
        return ExpertLoop(tuple(experts), self.count)

    def _put(self, expert: int, matrix: str, weight: Weight) -> None:
        """Into its stack, whose kind the first weight decides, or by itself."""
        weight, stack = _symmetric(weight), _group(matrix)[0]
        kind = self._kind(weight)
        if kind is not None and stack not in self.stacks:
            n, k = (self.hidden, self.inner) if stack == "w2" else (2 * self.inner, self.hidden)
            self.stacks[stack] = _Stack.empty(kind, self.count, n, k, self.device)
        if kind is not None and self.stacks[stack].kind == kind:
            self.stacks[stack].put(expert, self._rows(matrix), weight)
        else:
            self.loose[expert, matrix] = weight

    def _kind(self, weight: Weight) -> Kind | None:
        """Of the weights that `fused_moe` takes."""
        if isinstance(weight, torch.Tensor):
            return Kind(self.dtype)
        alone = not isinstance(weight, Fp8Weight) and (isinstance(weight, Int4Weight) or weight.activations is None)
        if alone:
            group_size = weight.q.shape[1] // weight.scale.shape[1]
            if group_size % 32 or not _fuses_dequantised(self.device):
                return None
            if isinstance(weight, Int8Weight):
                return Kind(torch.int8, weight.scale.dtype, group_size)
            if self.inner % TILE or self.hidden % TILE or weight.order is not None:  # type: ignore[union-attr]
                return None
            minimum = weight.minimum  # type: ignore[union-attr]
            return Kind(torch.int16, weight.scale.dtype, group_size, None if minimum is None else minimum.dtype)
        granularity = weight.activations and weight.activations.granularity  # type: ignore[union-attr]
        if granularity == "token":
            return Kind(weight.q.dtype, torch.float32)
        whole = self.inner % BLOCK == 0 and self.hidden % BLOCK == 0 and _fuses_dequantised(self.device)
        if granularity == "group" and whole and isinstance(weight, Fp8Weight) and weight.block == (BLOCK, BLOCK):
            return Kind(weight.q.dtype, torch.float32, blocks=True)
        return None

    def _rows(self, matrix: str) -> slice:
        """Where it lies in its stack."""
        return {"w1": slice(None, self.inner), "w3": slice(self.inner, None)}.get(matrix, slice(None))

    def _linear(self, expert: int, group: tuple[str, ...]) -> Linear:
        """The layer of matrices of which some are loose."""
        loose = [self.loose.pop((expert, matrix), None) for matrix in group]
        weights = [weight for weight in loose if weight is not None]
        if len(weights) == len(group):
            return make_linear(weights, [None] * len(group), self.device, self.dtype, gated=len(group) == 2)
        gate, up = (
            self.stacks["w1"].linear(expert, self._rows(matrix))
            if weight is None
            else make_linear([weight], [None], self.device, self.dtype)
            for matrix, weight in zip(group, loose, strict=True)
        )
        return GatedLinear(SplitLinear((gate, up)))


def _fuses_dequantised(device: torch.device) -> bool:
    """Whether weights that a CPU dequantises are fused: there it is faster one by one, for those that are taken."""
    return device.type != "cpu"


def _fuse(first: Kind, second: Kind) -> bool:
    """Whether `fused_moe` takes both; those of int4 may have minima or not, and groups of several sizes."""
    same = first.dtype == second.dtype and first.weights_only == second.weights_only
    return same and first.blocks == second.blocks


def _group(matrix: str) -> tuple[str, ...]:
    """The matrices that are one layer with it."""
    return ("w2",) if matrix == "w2" else ("w1", "w3")


def _symmetric(weight: Weight) -> Weight:
    """Without a minimum where that says no more than that codes are 8 too large, as in a GGUF's Q4_0."""
    if not isinstance(weight, Int4Weight) or weight.minimum is None:
        return weight
    same = weight.minimum.dtype == weight.scale.dtype and torch.equal(weight.minimum, -8 * weight.scale)
    return replace(weight, minimum=None) if same else weight
