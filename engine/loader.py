"""From a checkpoint's stream of tensors to a Decoder on the device.

What the files hold is compared with what the configuration wants before any of it is read. Tensors are read straight to
the device; those that are stacked into one layer wait there for their siblings, experts excepted, which go to their
places as they come. So a GPU's model takes two buffers of 64 MiB of the host's memory, and on the device, while it
loads, once more its largest layer.
"""

import re
from collections.abc import Callable, Collection

import torch

import octavo
from octavo.engine.checkpoint import Checkpoint
from octavo.engine.config import ModelConfig
from octavo.engine.experts import ExpertLoader, Layout, MixtureOfExperts, SharedExpert, layer_of
from octavo.engine.layers import Linear, Mlp, Weight, make_linear, weight_shape
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
        progress: called with the number of bytes of each piece read; `checkpoint.num_bytes` in all.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape than the configuration says; names it and its
            file. These are found before anything is read.
    """
    config = checkpoint.config
    check_index(checkpoint)
    collector = _Collector(config, checkpoint.index, device, dtype)
    for name, weight in checkpoint.tensors(device, dtype, progress):
        if (place := _CACHE_SCALE.fullmatch(name)) is not None:
            collector.add_cache_scale(f"{checkpoint.index[name].path}: {name}", place, weight)
        elif not _is_ignored(name, config):
            _check_shape(checkpoint, name, weight_shape(weight), collector.expected[name])
            collector.add(name, weight)
    layers = tuple(collector.layer(i) for i in range(config.num_hidden_layers))
    embedding = collector.linears["model.embed_tokens"]
    head = embedding if config.tie_word_embeddings else collector.linears["lm_head"]
    cos_sin_cache = octavo.rotary_cos_sin_cache(
        config.head_dim,
        max_model_len,
        base=config.rope_theta,
        scaling=config.rope_scaling,
        original_max_position=config.max_position_embeddings,
        device=device,
    )
    return Decoder(config, embedding, layers, collector.vectors["model.norm.weight"], head, cos_sin_cache)


_CACHE_SCALE = re.compile(
    r"model\.layers\.(\d+)\.self_attn\.(?:(?:attn\.|[kv]_proj\.)?(k|v|kv)_scale|(k|v)_proj\.output_scale)"
)
"""Scales of keys and values in a float8 cache, by the names of compressed-tensors, of vLLM, and of exporters before."""


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether the engine has no use for it.

    Old exports store the rotary table, some store a tied head twice, and some have scales for queries in float8.
    """
    stored_twice = name == "lm_head.weight" and config.tie_word_embeddings
    return stored_twice or name.endswith(("rotary_emb.inv_freq", ".q_scale", ".output_scale", ".prob_scale"))


def check_index(checkpoint: Checkpoint) -> None:
    """Compares what a checkpoint's headers tell with what its configuration wants.

    Raises:
        ValueError: a tensor that is missing, unexpected or of another shape; names it and its file.
    """
    expected = expected_shapes(checkpoint.config, checkpoint.index)
    beside = [n for n in checkpoint.index if _CACHE_SCALE.fullmatch(n) or _is_ignored(n, checkpoint.config)]
    index = {name: at for name, at in checkpoint.index.items() if name not in beside}
    for name, at in index.items():
        if name not in expected:
            raise ValueError(f"{at.path}: {name}: unexpected tensor; this configuration has no place for it")
        if at.shape is not None:
            _check_shape(checkpoint, name, at.shape, expected[name])
    missing = [name for name in expected if name not in index]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{checkpoint.path}: {missing[0]}: missing from the checkpoint{more}")


def _check_shape(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        path = checkpoint.index[name].path
        raise ValueError(f"{path}: {name}: shape {tuple(shape)}; the configuration says {expected}")


class _Collector:
    """Takes tensors in any order, of these names; stacks groups as soon as they are complete."""

    def __init__(self, config: ModelConfig, names: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.expected = expected_shapes(config, names)
        self.groups = _groups(config, names)
        self.group_of = {member: group for group, members in self.groups.items() for member in members}
        self.pending: dict[str, Weight] = {}
        self.vectors: dict[str, torch.Tensor] = {}
        self.linears: dict[str, Linear] = {}
        self.experts: dict[int, ExpertLoader] = {}
        self.cache_scales: dict[tuple[int, str], torch.Tensor] = {}

    def add(self, name: str, weight: Weight) -> None:
        layer, module = layer_of(name), name.rpartition(".")[0]
        if layer is not None:
            if layer not in self.experts:
                self.experts[layer] = ExpertLoader(self.config, self.device, self.dtype)
            self.experts[layer].add(name, weight)
            return
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

    def add_cache_scale(self, where: str, place: re.Match[str], scale: Weight) -> None:
        """Takes a scale of keys, of values, or of both (kv_scale, which is for both where they have none each)."""
        assert isinstance(scale, torch.Tensor)
        values, heads = scale.float().flatten(), self.config.num_key_value_heads
        if len(values) not in (1, heads) or not bool(((values > 0) & values.isfinite()).all()):
            raise ValueError(f"{where}: {values.tolist()}; expected one positive number, or {heads}, one a head")
        for part in place[2] or place[3]:
            key = int(place[1]), part
            if place[2] != "kv" or key not in self.cache_scales:
                self.cache_scales[key] = values.to(self.device)

    def _stack(self, group: str) -> None:
        weights = [self.pending.pop(f"{m}.weight") for m in self.groups[group]]
        biases = [self.pending.pop(f"{m}.bias", None) for m in self.groups[group]]
        gated = group.endswith(".gate_up")
        self.linears[group] = make_linear(weights, biases, self.device, self.dtype, gated)  # type: ignore[arg-type]

    def layer(self, index: int) -> Layer:
        at = f"model.layers.{index}"
        return Layer(
            input_norm=self.vectors[f"{at}.input_layernorm.weight"],
            qkv=self.linears[f"{at}.qkv"],
            o=self.linears[f"{at}.self_attn.o_proj"],
            post_attention_norm=self.vectors[f"{at}.post_attention_layernorm.weight"],
            mlp=self._mlp(index),
            q_norm=self.vectors.get(f"{at}.self_attn.q_norm.weight"),
            k_norm=self.vectors.get(f"{at}.self_attn.k_norm.weight"),
            k_scale=self.cache_scales.get((index, "k")),
            v_scale=self.cache_scales.get((index, "v")),
        )

    def _mlp(self, index: int) -> Mlp | MixtureOfExperts:
        at = f"model.layers.{index}"
        if self.config.num_local_experts:
            experts = self.experts.pop(index).finish()
            c, router, shared = self.config, self.linears[f"{at}.router"], None
            if c.shared_expert_intermediate_size:
                mlp = Mlp(self.linears[f"{at}.shared.gate_up"], self.linears[f"{at}.shared.down"])
                shared = SharedExpert(mlp, self.linears[f"{at}.shared.gate"])
            return MixtureOfExperts(router, experts, c.num_experts_per_tok, c.norm_topk_prob, shared)
        return Mlp(self.linears[f"{at}.gate_up"], self.linears[f"{at}.mlp.down_proj"])


def _groups(config: ModelConfig, names: Collection[str]) -> dict[str, list[str]]:
    """Which modules are stacked into which layer, of a checkpoint that has tensors of these names; without experts."""
    groups, layout = {"model.embed_tokens": ["model.embed_tokens"]}, Layout.of(config, names)
    if not config.tie_word_embeddings:
        groups["lm_head"] = ["lm_head"]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        groups[f"{at}.qkv"] = [f"{at}.self_attn.{p}_proj" for p in "qkv"]
        groups[f"{at}.self_attn.o_proj"] = [f"{at}.self_attn.o_proj"]
        if config.num_local_experts:
            groups[f"{at}.router"] = [layout.router(i)]
            if config.shared_expert_intermediate_size:
                shared = layout.shared(i)
                groups[f"{at}.shared.gate_up"] = [f"{shared}.{p}_proj" for p in ("gate", "up")]
                groups[f"{at}.shared.down"] = [f"{shared}.down_proj"]
                groups[f"{at}.shared.gate"] = [f"{shared}_gate"]
        else:
            groups[f"{at}.gate_up"] = [f"{at}.mlp.{p}_proj" for p in ("gate", "up")]
            groups[f"{at}.mlp.down_proj"] = [f"{at}.mlp.down_proj"]
    return groups


def expected_shapes(config: ModelConfig, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape, by Hugging Face's names: of several for experts those among `names`."""
    c = config
    hidden, inner, layout = c.hidden_size, c.intermediate_size, Layout.of(c, names)
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
    qkv_bias = c.attention_bias or c.qkv_bias
    matrices = {
        "self_attn.q_proj": (q, hidden, qkv_bias),
        "self_attn.k_proj": (kv, hidden, qkv_bias),
        "self_attn.v_proj": (kv, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, q, c.attention_bias),
    }
    if not c.num_local_experts:
        matrices |= {f"mlp.{p}_proj": (inner, hidden, c.mlp_bias) for p in ("gate", "up")}
        matrices["mlp.down_proj"] = (hidden, inner, c.mlp_bias)
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (hidden,)
        for name, (out_features, in_features, bias) in matrices.items():
            shapes[f"{at}.{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{at}.{name}.bias"] = (out_features,)
        if c.num_local_experts:
            shapes |= layout.shapes(c, i)
        if c.qk_norm:
            shapes |= {f"{at}.self_attn.{p}_norm.weight": (c.head_dim,) for p in "qk"}
    return shapes
