"""The decoder that serves Llama 2 and 3, CodeLlama, TinyLlama, SmolLM2, Mistral, Mixtral, Qwen2's and Qwen3's mixtures.

    h = embed(tokens)
    for each layer:  h += attention(rms_norm(h));  h += mlp(rms_norm(h)),  mlp(x) = down(silu(gate(x)) * up(x))
    logits = head(rms_norm(h))

Mixtral and Qwen3 have many MLPs in a layer, of which each token takes some (experts.py); Qwen3 normalises the heads of
queries and keys. The residual stream `h` is updated by `add_rms_norm` in place, one norm behind; where the layer that
follows has 8-bit activations, the norm quantises them, too (`normed`). Nothing is global: where tokens go and what they
attend to comes in as `AttentionMetadata`. Nothing waits for the device, and no size depends on what is there, so that a
CUDA graph can hold it all. Shape letters: T tokens, B sequences, Hq and Hkv heads, D head size.
"""

from dataclasses import dataclass, is_dataclass
from functools import cached_property
from typing import Any

import torch

import octavo
from octavo.engine.config import ModelConfig
from octavo.engine.experts import MixtureOfExperts
from octavo.engine.kv_cache import KVCache
from octavo.engine.layers import Linear, Mlp, Quantized, W8A8Linear, embed, normed


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each token of a step stands: B sequences, T tokens in all, the last of which may be padding."""

    positions: torch.Tensor  # [T] int32 or int64
    slot_mapping: torch.Tensor  # [T] int64, page * page_size + offset; -1 for padding
    block_table: torch.Tensor  # [B, pages] int32
    seq_lens: torch.Tensor  # [B] int32, keys including this step's; 0 for padding
    cu_seqlens_q: torch.Tensor  # [B + 1] int32
    max_seqlen_q: int
    rolling: bool = False  # whether rows of block_table are rings


@dataclass(frozen=True)
class Layer:
    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    post_attention_norm: torch.Tensor
    mlp: Mlp | MixtureOfExperts
    q_norm: torch.Tensor | None = None  # [D], of each head
    k_norm: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None  # of keys and values in a float8 cache, one element
    v_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class Decoder:
    config: ModelConfig
    embedding: Linear
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear
    cos_sin_cache: torch.Tensor  # [max_position, D]

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    def hidden(self, token_ids: torch.Tensor, cache: KVCache, metadata: AttentionMetadata) -> torch.Tensor:
        """The normalised last hidden states, `[T] -> [T, hidden]`; writes keys and values into the cache."""
        eps = self.config.rms_norm_eps
        residual = embed(self.embedding, token_ids, self.dtype)
        if self._shares_scales:
            residual.masked_fill_((metadata.slot_mapping < 0).unsqueeze(1), 0)  # padding has no say in a maximum
        x: Any = normed(self.layers[0].qkv, residual, self.layers[0].input_norm, eps)
        plan = self._plan(residual, cache, metadata)
        for index, layer in enumerate(self.layers):
            x = self._attention(layer, x, cache.layer(index, layer.k_scale, layer.v_scale), metadata, plan)
            x = normed(layer.mlp, x, layer.post_attention_norm, eps, residual)
            x = layer.mlp(x)
            if index + 1 < len(self.layers):
                following = self.layers[index + 1]
                x = normed(following.qkv, x, following.input_norm, eps, residual)
        return octavo.add_rms_norm(x, residual, self.norm, eps)

    @cached_property
    def _shares_scales(self) -> bool:
        """Whether some layer quantises all tokens by one scale that it finds in them."""

        def shares(part: Any) -> bool:
            if isinstance(part, W8A8Linear):
                return part.activations.granularity == "tensor" and part.activations.scale is None
            parts = part if isinstance(part, tuple) else tuple(vars(part).values()) if is_dataclass(part) else ()
            return any(map(shares, parts))

        return shares(self.layers)

    def _plan(self, residual: torch.Tensor, cache: KVCache, metadata: AttentionMetadata) -> torch.Tensor:
        """How all layers of this step share out their keys."""
        c = self.config
        return octavo.plan_attention(
            residual.new_empty(residual.shape[0], c.num_attention_heads, c.head_dim),  # what its queries will be like
            cache.layer(0)[0],
            metadata.block_table,
            metadata.seq_lens,
            metadata.cu_seqlens_q,
            max_seqlen_q=metadata.max_seqlen_q,
            window_size=c.sliding_window,
            rolling=metadata.rolling,
        )

    def _attention(
        self,
        layer: Layer,
        x: torch.Tensor | Quantized,
        cache: tuple[torch.Tensor, torch.Tensor, dict[str, Any]],
        metadata: AttentionMetadata,
        plan: torch.Tensor,
    ) -> torch.Tensor:
        c = self.config
        key_cache, value_cache, scales = cache
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        qkv = layer.qkv(x).view(-1, heads, c.head_dim)  # [T, Hq + 2 Hkv, D]
        q, k, v = qkv.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
        octavo.rotary_embedding_write_kv(
            *(q, k, v, metadata.positions, self.cos_sin_cache, key_cache, value_cache, metadata.slot_mapping),
            q_norm_weight=layer.q_norm,
            k_norm_weight=layer.k_norm,
            eps=c.rms_norm_eps,
            **scales,
        )
        out = octavo.paged_attention(
            q,
            key_cache,
            value_cache,
            metadata.block_table,
            metadata.seq_lens,
            metadata.cu_seqlens_q,
            max_seqlen_q=metadata.max_seqlen_q,
            window_size=c.sliding_window,
            rolling=metadata.rolling,
            plan=plan,
            **scales,
        )
        return layer.o(out.flatten(1))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, hidden] -> [R, vocab]` in fp32."""
        return self.head(hidden).float()
