"""What serving a model costs at least, in operations and bytes, and how much of the machine's peaks a run has used.

Operations: two for each weight that a token is multiplied with, the head's for tokens that are sampled alone; attention
4 · Hq · D for each token, layer and key that it sees. Bytes: a step reads every weight once, of experts those that its
tokens choose; each token's keys and values are written once, a prompt's are read once, and all those before it by each
token that is decoded.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from octavo.bench.floors import Ceilings
from octavo.engine.experts import ExpertLoop, MixtureOfExperts, StackedExperts
from octavo.engine.layers import W8A8Linear
from octavo.engine.model import Decoder


@dataclass(frozen=True)
class Load:
    """What a request made the model compute: prompt tokens, of them those found in the cache, and tokens sampled."""

    prompt: int
    output: int
    cached: int = 0


@dataclass(frozen=True)
class Costs:
    """A model's sizes.

    Attributes:
        token_flops: the products of all layers for one token.
        head_flops: those of the head for one.
        key_flops: attention's for one token and one key, all layers.
        weight_bytes: what each step reads; without experts.
        expert_bytes: all experts'.
        experts, experts_per_token: 0 for a dense MLP.
        kv_bytes: keys and values of one token, all layers.
        window: of sliding-window attention.
        dtype: that the layers' products are computed in.
    """

    token_flops: int
    head_flops: int
    key_flops: int
    weight_bytes: int
    expert_bytes: int
    experts: int
    experts_per_token: int
    kv_bytes: int
    window: int | None
    dtype: str

    def flops(self, loads: Iterable[Load]) -> int:
        """Operations of some requests; the last token of each is sampled and not computed with."""
        total = 0
        for load in loads:
            last = load.prompt + load.output - 1
            total += self.token_flops * (last - load.cached) + self.head_flops * load.output
            total += self.key_flops * _keys(load.cached + 1, last, self.window)
        return total

    def bytes_moved(self, loads: Iterable[Load], step_tokens: Sequence[int]) -> float:
        """Bytes of some requests that were computed in steps of so many tokens."""
        total = sum(self.step_bytes(tokens) for tokens in step_tokens)
        for load in loads:
            last = load.prompt + load.output - 1
            read = min(load.prompt, self.window or load.prompt) + _keys(load.prompt + 1, last, self.window)
            total += self.kv_bytes * (last - load.cached + read)
        return total

    def step_bytes(self, tokens: int) -> float:
        """The weights that a step reads."""
        missed = (1 - self.experts_per_token / self.experts) ** tokens if self.experts else 1.0
        return self.weight_bytes + self.expert_bytes * (1 - missed)

    def critical_batch(self, ceilings: Ceilings) -> float | None:
        """B*: so many tokens a step take as long to compute as all weights to read; None where a peak is unknown.

        For a dense model whose weights have two bytes that is peak / bandwidth.
        """
        bandwidth, peak = ceilings.values.get("read_bytes_per_s"), ceilings.peak(self.dtype)
        if not bandwidth or not peak:
            return None
        return (self.weight_bytes + self.expert_bytes) / bandwidth * peak / (self.token_flops + self.head_flops)

    def decode_seconds(self, batch: int, context: float, ceilings: Ceilings) -> float | None:
        """The least time of a step that decodes `batch` tokens, each with so many keys before it."""
        bandwidth, peak = ceilings.values.get("read_bytes_per_s"), ceilings.peak(self.dtype)
        if not bandwidth or not peak:
            return None
        keys = min(context, self.window or context)
        reads = self.step_bytes(batch) + batch * keys * self.kv_bytes
        return max(reads / bandwidth, batch * (self.token_flops + self.head_flops + keys * self.key_flops) / peak)


def _keys(first: int, last: int, window: int | None) -> int:
    """How many keys the tokens from number `first` to number `last` of a text see, all together; each sees itself."""
    free = last if window is None else max(min(last, window), first - 1)  # those before the window is full
    seen = (first + free) * (free - first + 1) // 2
    return seen + (last - free) * (window or 0)


def costs_of(model: Decoder, kv_bytes: int) -> Costs:
    """The costs of a model as it lies on the device, with a cache of that many bytes a token, all layers."""
    c = model.config
    mixtures = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts)]
    expert_bytes = sum(_bytes(mixture.experts) for mixture in mixtures)
    weight_bytes = sum(_bytes(part) for part in (model.layers, model.norm, model.head)) - expert_bytes
    attention = c.num_attention_heads * c.head_dim
    products = c.hidden_size * (2 * attention + 2 * c.num_key_value_heads * c.head_dim + c.num_local_experts)
    products += 3 * c.hidden_size * c.intermediate_size * max(c.num_experts_per_tok, 1)
    return Costs(
        token_flops=2 * products * c.num_hidden_layers,
        head_flops=2 * c.hidden_size * c.vocab_size,
        key_flops=4 * attention * c.num_hidden_layers,
        weight_bytes=weight_bytes,
        expert_bytes=expert_bytes,
        experts=c.num_local_experts,
        experts_per_token=c.num_experts_per_tok,
        kv_bytes=kv_bytes,
        window=c.sliding_window,
        dtype=_product_dtype(model),
    )


def _bytes(part: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(part))


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _tensors(item)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _tensors(getattr(part, field.name))


def _product_dtype(model: Decoder) -> str:
    """int8 or fp8 where both sides of a layer's down projection have a byte, else the activations' own."""
    mlp = model.layers[0].mlp
    layer: Any = mlp.experts if isinstance(mlp, MixtureOfExperts) else mlp.down
    if isinstance(layer, ExpertLoop):
        layer = layer.experts[0].down
    dtype = model.dtype
    if isinstance(layer, W8A8Linear):
        dtype = layer.weight.dtype
    elif isinstance(layer, StackedExperts) and not layer.weights_only:
        dtype = layer.w2.dtype if layer.w2.dtype in (torch.int8, torch.float8_e4m3fn) else dtype
    return str(dtype).removeprefix("torch.")
