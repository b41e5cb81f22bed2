"""A decoder one layer at a time: only one layer's weights lie on the device, and the hidden states between layers.

A layer is two halves of one form, `h += last(middle(first(norm(h))))`: attention between q, k, v and o, the gated
activation between gate, up and down. A mixture of experts has `h += mixture(norm(h))` for the second (`mixture.py`).
Shape letters: T tokens of a sequence, Hq and Hkv heads, D head size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import octavo
from octavo.engine.config import ModelConfig
from octavo.engine.layers import Linear


@dataclass(frozen=True)
class Half:
    """The names of a half's modules within a layer."""

    norm: str
    first: tuple[str, ...]
    last: str

    @property
    def modules(self) -> tuple[str, ...]:
        return (*self.first, self.last)


ATTENTION = Half("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj")
MLP = Half("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
HALVES = (ATTENTION, MLP)


@dataclass(frozen=True)
class HalfWeights:
    norm: torch.Tensor
    first: Linear
    last: Linear


@dataclass(frozen=True)
class MixtureWeights:
    """What stands where a dense layer has the half of its MLP."""

    norm: torch.Tensor
    mixture: Linear


class Forward:
    """What of a model's computation has no weights.

    Args:
        config: the model's.
        device: where it is computed.
        max_length: the longest sequence.
    """

    def __init__(self, config: ModelConfig, device: torch.device, max_length: int) -> None:
        self.config = config
        self.device = device
        self.cos_sin_cache = octavo.rotary_cos_sin_cache(
            config.head_dim,
            max_length,
            base=config.rope_theta,
            scaling=config.rope_scaling,
            original_max_position=config.max_position_embeddings,
            device=device,
        )

    def first_inputs(self, hidden: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """What `first` takes: `[T, hidden] -> [T, hidden]`."""
        return octavo.rms_norm(hidden, norm, self.config.rms_norm_eps)

    def last_inputs(self, half: Half, first_outputs: torch.Tensor) -> torch.Tensor:
        """What `last` takes."""
        return self._attention(first_outputs) if half is ATTENTION else octavo.silu_and_mul(first_outputs)

    def layer(self, halves: tuple[HalfWeights | MixtureWeights, ...], hidden: torch.Tensor) -> torch.Tensor:
        """One layer: `[T, hidden] -> [T, hidden]`."""
        for half, weights in zip(HALVES, halves, strict=True):
            hidden = self.half(half, weights, hidden)
        return hidden

    def half(self, half: Half, weights: HalfWeights | MixtureWeights, hidden: torch.Tensor) -> torch.Tensor:
        """Half a layer: `[T, hidden] -> [T, hidden]`."""
        x = self.first_inputs(hidden, weights.norm)
        if isinstance(weights, MixtureWeights):
            return hidden + weights.mixture(x)
        return hidden + weights.last(self.last_inputs(half, weights.first(x)))

    def probabilities(self, qkv: torch.Tensor) -> Iterator[torch.Tensor]:
        """What each token attends to, in fp32, one KV head after another: `[T, (Hq + 2 Hkv) D] -> [Hq / Hkv, T, T]`."""
        q, k, _ = (x.float() for x in self._heads(qkv))
        seen = self._seen(qkv.shape[0])
        for queries, keys in zip(q.unflatten(0, (len(k), -1)), k, strict=True):
            logits = queries @ keys.t() / math.sqrt(self.config.head_dim)
            yield logits.masked_fill_(~seen, -math.inf).softmax(-1)

    def _attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """torch's attention, dense: on a CPU ten times as fast as paging. `[T, (Hq + 2 Hkv) D] -> [T, Hq D]`."""
        window, tokens = self.config.sliding_window, qkv.shape[0]
        mask = self._seen(tokens) if window is not None and window < tokens else None
        q, k, v = (x.unsqueeze(0) for x in self._heads(qkv))  # [1, heads, T, D]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1).flatten(1)

    def _seen(self, tokens: int) -> torch.Tensor:
        """Which tokens (columns) each one (row) may attend to."""
        positions = torch.arange(tokens, device=self.device)
        distance = positions[:, None] - positions
        return (distance >= 0) & (distance < (self.config.sliding_window or tokens))

    def _heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, rotated, and v, `[heads, T, D]` each. Changes q and k in `qkv`."""
        c, tokens = self.config, qkv.shape[0]
        heads = qkv.view(tokens, -1, c.head_dim)
        q, k, v = heads.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
        octavo.rotary_embedding(q, k, torch.arange(tokens, device=self.device), self.cos_sin_cache)
        return tuple(x.transpose(0, 1) for x in (q, k, v))


class Stream:
    """The hidden states of some sequences, as far as they have come; on the CPU where the device has no room for them.

    Args:
        sequences: token ids.
        embedding: `[vocab, hidden]`, on the CPU, in the dtype of the computation.
        device: where layers are computed.
    """

    def __init__(self, sequences: list[list[int]], embedding: torch.Tensor, device: torch.device) -> None:
        self.sequences, self.device = sequences, device
        num_bytes = sum(map(len, sequences)) * embedding.shape[1] * embedding.element_size()
        fits = device.type != "cuda" or num_bytes < torch.cuda.mem_get_info(device)[0] // 8
        self._place = device if fits else torch.device("cpu")
        self._hidden = [embedding[torch.tensor(ids)].to(self._place) for ids in sequences]

    def __iter__(self) -> Iterator[torch.Tensor]:
        """`[T, hidden]` of each sequence, on the device."""
        return (hidden.to(self.device) for hidden in self._hidden)

    def advance(self, layer: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for i, hidden in enumerate(self):
            self._hidden[i] = layer(hidden).to(self._place)

    def perplexity(self, norm: torch.Tensor, head: torch.Tensor, eps: float) -> float:
        """exp of the mean of -log p over every token but each sequence's first, once all layers are done."""
        total, count = 0.0, 0
        for hidden, ids in zip(self, self.sequences, strict=True):
            x = octavo.rms_norm(hidden[:-1].contiguous(), norm, eps)
            for rows, targets in zip(x.split(512), torch.tensor(ids[1:], device=self.device).split(512), strict=True):
                total += F.cross_entropy(F.linear(rows, head).float(), targets, reduction="sum").item()
                count += len(targets)
        return math.exp(total / count)


def cut(token_ids: list[int], length: int, most: int) -> list[list[int]]:
    """Sequences of at most `length` tokens, `most` in all; a rest of one token, which predicts nothing, is left out."""
    token_ids = token_ids[:most]
    sequences = [token_ids[i : i + length] for i in range(0, len(token_ids), length)]
    return [ids for ids in sequences if len(ids) > 1]
