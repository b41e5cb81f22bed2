"""The decoder that serves Llama 2 and 3, CodeLlama, TinyLlama, SmolLM2, Mistral, Mixtral, Qwen2's and Qwen3's mixtures.

    h = embed(tokens)
    for each layer:  h += attention(rms_norm(h));  h += mlp(rms_norm(h)),  mlp(x) = down(silu(gate(x)) * up(x))
    logits = head(rms_norm(h))

Mixtral and Qwen3 have many MLPs in a layer, of which each token takes some (experts.py); Qwen3 normalises the heads of
queries and keys. The residual stream `h` is updated by `add_rms_norm` in place, one norm behind. Nothing is global:
where tokens go and what they attend to comes in as `AttentionMetadata`. Shape letters: T tokens, Hq and Hkv heads, D
head size.
"""

from dataclasses import dataclass

import torch

import octavo
from octavo.engine.config import ModelConfig
from octavo.engine.experts import MixtureOfExperts
from octavo.engine.layers import Linear, Mlp, embed


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each token of a step stands: B sequences, T tokens in all."""

    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64, page * page_size + offset
    block_table: torch.Tensor  # [B, pages] int32
    seq_lens: torch.Tensor  # [B] int32, keys including this step's
    cu_seqlens_q: torch.Tensor  # [B + 1] int32
    max_seqlen_q: int


@dataclass(frozen=True)
class Layer:
    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    post_attention_norm: torch.Tensor
    mlp: Mlp | MixtureOfExperts
    q_norm: torch.Tensor | None = None  # [D], of each head
    k_norm: torch.Tensor | None = None


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

    def hidden(self, token_ids: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """The normalised last hidden states, `[T] -> [T, hidden]`; writes keys and values into `kv_cache`.

        kv_cache: `[layers, 2, pages, page_size, Hkv, D]`.
        """
        eps = self.config.rms_norm_eps
        residual = embed(self.embedding, token_ids, self.dtype)
        x = octavo.rms_norm(residual, self.layers[0].input_norm, eps)
        plan = self._plan(x, kv_cache, metadata)
        for index, layer in enumerate(self.layers):
            x = self._attention(layer, x, kv_cache[index], metadata, plan)
            x = octavo.add_rms_norm(x, residual, layer.post_attention_norm, eps)
            x = layer.mlp(x)
            following = self.layers[index + 1].input_norm if index + 1 < len(self.layers) else self.norm
            x = octavo.add_rms_norm(x, residual, following, eps)
        return x

    def _plan(self, x: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """How all layers of this step share out their keys."""
        c = self.config
        return octavo.plan_attention(
            x.new_empty(x.shape[0], c.num_attention_heads, c.head_dim),  # what its queries will be like
            kv_cache[0, 0],
            metadata.block_table,
            metadata.seq_lens,
            metadata.cu_seqlens_q,
            max_seqlen_q=metadata.max_seqlen_q,
            window_size=c.sliding_window,
        )

    def _attention(
        self, layer: Layer, x: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata, plan: torch.Tensor
    ) -> torch.Tensor:
        c = self.config
        key_cache, value_cache = kv_cache.unbind(0)
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        qkv = layer.qkv(x).view(-1, heads, c.head_dim)  # [T, Hq + 2 Hkv, D]
        q, k, v = qkv.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
        octavo.rotary_embedding_write_kv(
            *(q, k, v, metadata.positions, self.cos_sin_cache, key_cache, value_cache, metadata.slot_mapping),
            q_norm_weight=layer.q_norm,
            k_norm_weight=layer.k_norm,
            eps=c.rms_norm_eps,
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
            plan=plan,
        )
        return layer.o(out.flatten(1))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, hidden] -> [R, vocab]` in fp32."""
        return self.head(hidden).float()
