"""From a checkpoint's stream of tensors to a Decoder on the device.

Tensors are moved to the device as they arrive; those that are stacked into one layer wait for their siblings.
"""

from collections.abc import Callable

import torch

import octavo
from octavo.engine.checkpoint import Checkpoint, Int4Weight
from octavo.engine.config import ModelConfig
from octavo.engine.layers import Linear, Weight, make_linear, weight_shape
from octavo.engine.model import Decoder, Layer


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    progress: Callable[[int], None] | None = None,
) -> Decoder:
    """Builds the model.

    Args:
        checkpoint: an open checkpoint.
        device, dtype: where and in which dtype dense weights and activations live; quantised weights keep theirs.
        max_model_len: rows of the rotary table.
        progress: called with the number of bytes of each tensor read.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape than the configuration says.
    """
    config = checkpoint.config
    collector = _Collector(config, device, dtype)
    for name, weight in checkpoint.tensors():
        collector.add(name, weight)
        if progress is not None:
            progress(_num_bytes(weight))
    layers = tuple(collector.layer(i) for i in range(config.num_hidden_layers))
    embedding = collector.linear("model.embed_tokens")
    head = embedding if config.tie_word_embeddings else collector.linear("lm_head")
    cos_sin_cache = octavo.rotary_cos_sin_cache(
        config.head_dim,
        max_model_len,
        base=config.rope_theta,
        scaling=config.rope_scaling,
        original_max_position=config.max_position_embeddings,
        device=device,
    )
    return Decoder(config, embedding, layers, collector.vector("model.norm.weight"), head, cos_sin_cache)


_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".output_scale")
"""What is there for a quantised KV cache, which the engine's is not."""


class _Collector:
    """Takes tensors in any order; stacks groups as soon as they are complete."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.expected = _expected_shapes(config)
        self.groups = _groups(config)
        self.group_of = {member: group for group, members in self.groups.items() for member in members}
        self.pending: dict[str, Weight] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        self.linears: dict[str, Linear] = {}

    def add(self, name: str, weight: Weight) -> None:
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in self.expected):
            return  # old exports store the table, and some store the tied head twice
        if name.endswith(_CACHE_SCALES):
            return
        if name not in self.expected:
            raise ValueError(f"{name}: unexpected tensor; this configuration has no place for it")
        if weight_shape(weight) != self.expected[name]:
            raise ValueError(f"{name}: shape {weight_shape(weight)}; the configuration says {self.expected[name]}")
        module = name.rpartition(".")[0]
        if module not in self.group_of:
            assert isinstance(weight, torch.Tensor)
            self.vectors[name] = weight.to(self.device, self.dtype)
            return
        self.pending[name] = weight
        group = self.group_of[module]
        names = [f"{m}.{kind}" for m in self.groups[group] for kind in ("weight", "bias")]
        names = [n for n in names if n in self.expected]
        if all(n in self.pending for n in names):
            self._stack(group)

    def _stack(self, group: str) -> None:
        weights = [self.pending.pop(f"{m}.weight") for m in self.groups[group]]
        biases = [self.pending.pop(f"{m}.bias", None) for m in self.groups[group]]
        self.linears[group] = make_linear(weights, biases, self.device, self.dtype)  # type: ignore[arg-type]

    def linear(self, group: str) -> Linear:
        if group not in self.linears:
            missing = [n for n in self.expected if self.group_of.get(n.rpartition(".")[0]) == group]
            missing = [n for n in missing if n not in self.pending]
            raise ValueError(f"{missing[0]}: missing from the checkpoint")
        return self.linears[group]

    def vector(self, name: str) -> torch.Tensor:
        if name not in self.vectors:
            raise ValueError(f"{name}: missing from the checkpoint")
        return self.vectors[name]

    def layer(self, index: int) -> Layer:
        at = f"model.layers.{index}"
        return Layer(
            input_norm=self.vector(f"{at}.input_layernorm.weight"),
            qkv=self.linear(f"{at}.qkv"),
            o=self.linear(f"{at}.self_attn.o_proj"),
            post_attention_norm=self.vector(f"{at}.post_attention_layernorm.weight"),
            gate_up=self.linear(f"{at}.gate_up"),
            down=self.linear(f"{at}.mlp.down_proj"),
        )


def _groups(config: ModelConfig) -> dict[str, list[str]]:
    """Which modules are stacked into which layer."""
    groups = {"model.embed_tokens": ["model.embed_tokens"]}
    if not config.tie_word_embeddings:
        groups["lm_head"] = ["lm_head"]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        groups[f"{at}.qkv"] = [f"{at}.self_attn.{p}_proj" for p in "qkv"]
        groups[f"{at}.gate_up"] = [f"{at}.mlp.{p}_proj" for p in ("gate", "up")]
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            groups[f"{at}.{module}"] = [f"{at}.{module}"]
    return groups


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape, by Hugging Face's names."""
    c = config
    hidden, inner = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
    matrices = {
        "self_attn.q_proj": (q, hidden, c.attention_bias),
        "self_attn.k_proj": (kv, hidden, c.attention_bias),
        "self_attn.v_proj": (kv, hidden, c.attention_bias),
        "self_attn.o_proj": (hidden, q, c.attention_bias),
        "mlp.gate_proj": (inner, hidden, c.mlp_bias),
        "mlp.up_proj": (inner, hidden, c.mlp_bias),
        "mlp.down_proj": (hidden, inner, c.mlp_bias),
    }
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (hidden,)
        for name, (out_features, in_features, bias) in matrices.items():
            shapes[f"{at}.{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{at}.{name}.bias"] = (out_features,)
    return shapes


def _num_bytes(weight: Weight) -> int:
    """Bytes that a weight takes in its file."""
    if isinstance(weight, torch.Tensor):
        return weight.numel() * weight.element_size()
    scales = weight.scale.numel() * weight.scale.element_size()
    if not isinstance(weight, Int4Weight):
        return weight.q.numel() + scales
    if weight.minimum is None:
        return weight.q.numel() // 2 + scales
    zero_points = weight.minimum.dtype == torch.float32  # made of four bits each
    return weight.q.numel() // 2 + scales + (weight.minimum.numel() // 2 if zero_points else scales)
