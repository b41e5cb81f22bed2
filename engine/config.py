"""What a model is: one frozen dataclass, read from Hugging Face's config.json or from a GGUF's metadata.

Every check happens here, so that what follows may trust the numbers; each error names the key, its value and what is
supported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import octavo
from octavo.engine.config_keys import REQUIRED, divide, flag, integer, number, token_ids, unique

# Of each architecture, what transformers takes where config.json says nothing; a sliding window is Mistral's.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": dict(max_position_embeddings=2048),
    "MistralForCausalLM": dict(max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    "MixtralForCausalLM": dict(
        max_position_embeddings=131072,
        num_key_value_heads=8,
        sliding_window=None,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "Qwen2MoeForCausalLM": dict(
        max_position_embeddings=32768,
        num_key_value_heads=16,
        moe_intermediate_size=1408,
        num_local_experts=60,
        num_experts_per_tok=4,
    ),
    "Qwen3MoeForCausalLM": dict(
        max_position_embeddings=32768,
        num_key_value_heads=4,
        sliding_window=4096,
        moe_intermediate_size=768,
        num_local_experts=128,
        num_experts_per_tok=8,
    ),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# A GGUF names one end-of-sequence token, but a chat model's turn may end with any of these.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama, Mistral, Mixtral, Qwen2-MoE or Qwen3-MoE decoder.

    `rope_scaling` is None or a dictionary as `octavo.rotary_cos_sin_cache` takes it, with `rope_type`; `sliding_window`
    is None where every token sees all before it; `eos_token_ids` are the tokens that end a completion; `dtype` is the
    one that unquantised weights are stored in. A mixture's layers have `num_local_experts` MLPs of
    `intermediate_size`, and each token takes `num_experts_per_tok` of them, whose weights add up to 1 with
    `norm_topk_prob`; both numbers are 0 where a layer has one MLP. In Qwen2's all tokens share one more expert, of
    `shared_expert_intermediate_size`. `attention_bias`: the four layers of attention have biases; `qkv_bias`: but not
    its last. `qk_norm`: heads of queries and keys are normalised.

    Raises:
        ValueError: numbers that contradict each other.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    sliding_window: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    hidden_act: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    shared_expert_intermediate_size: int = 0

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok}; expected at most the number of experts "
                f"({self.num_local_experts})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim}; expected an even number, since rotary pairs elements")
        try:
            octavo.rotary_cos_sin_cache(
                self.head_dim,
                1,
                base=self.rope_theta,
                scaling=self.rope_scaling,
                original_max_position=self.max_position_embeddings,
            )
        except ValueError as error:
            raise ValueError(f"rope_theta {self.rope_theta}, rope_scaling {self.rope_scaling}: {error}") from None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Reads a config.json.

        Args:
            config: as transformers 4 writes it (`rope_theta`, `rope_scaling`, `torch_dtype`) or as transformers 5 does
                (`rope_parameters`, `dtype`). What is absent has the default that transformers gives it.
            generation_config: generation_config.json, whose `eos_token_id` is merged in.

        Raises:
            ValueError: naming the key, its value and what is supported.
        """
        architectures = config.get("architectures") or [None]
        if architectures[0] not in ARCHITECTURES:
            raise ValueError(f"architectures: {config.get('architectures')!r}; supported: {', '.join(ARCHITECTURES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act: {config['hidden_act']!r}; supported: silu")
        heads = integer(config, "num_attention_heads")
        hidden = integer(config, "hidden_size")
        vocab_size = integer(config, "vocab_size")
        default = ARCHITECTURES[architectures[0]]
        rope_theta, rope_scaling = _hf_rope(config, default.get("rope_theta", 10000.0))
        window = config.get("sliding_window", default["sliding_window"]) if "sliding_window" in default else None
        if architectures[0] == "Qwen3MoeForCausalLM" and not flag(config, "use_sliding_window"):
            window = None
        return cls(
            architecture=architectures[0],
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=integer(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=integer(config, "num_key_value_heads", default.get("num_key_value_heads", heads)),
            head_dim=integer(config, "head_dim", 0) or divide(hidden, heads, "hidden_size", "num_attention_heads"),
            rms_norm_eps=number(config, "rms_norm_eps", default.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=integer(config, "max_position_embeddings", default["max_position_embeddings"]),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_window=None if window is None else integer({"sliding_window": window}, "sliding_window"),
            tie_word_embeddings=flag(config, "tie_word_embeddings"),
            attention_bias=flag(config, "attention_bias"),
            mlp_bias=flag(config, "mlp_bias"),
            hidden_act="silu",
            bos_token_id=next(iter(token_ids(config, "bos_token_id")), None),
            eos_token_ids=unique(token_ids(config, "eos_token_id"), token_ids(generation_config or {}, "eos_token_id")),
            dtype=_hf_dtype(config),
            **_hf_mixture(config, architectures[0]),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensor_types: Mapping[str, str],
        rope_factors: torch.Tensor | None = None,
    ) -> "ModelConfig":
        """Reads the metadata of a GGUF of architecture "llama": Llama, Mistral, Mixtral, SmolLM2, TinyLlama, CodeLlama.

        Args:
            metadata: keys and values as they stand in the file.
            tensor_types: name → ggml type ("F16", "Q4_0") of every tensor. They say what no key does: whether the head
                is tied to the embedding, whether layers have biases, and the dtype.
            rope_factors: the tensor `rope_freqs.weight`, `[head_dim / 2]`, by which frequencies are divided, if there
                is one: that is how llama.cpp writes scaling of type llama3. It becomes a `rope_scaling` of that type.

        Raises:
            ValueError: naming the key, its value and what is supported.
        """
        if metadata.get("general.architecture") != "llama":
            raise ValueError(
                f"general.architecture: {metadata.get('general.architecture')!r}; supported: 'llama', which Llama, "
                "Mistral, Mixtral, SmolLM2, TinyLlama and CodeLlama are stored as"
            )
        experts = integer(metadata, "llama.expert_count", 0, minimum=0)
        heads = integer(metadata, "llama.attention.head_count")
        hidden = integer(metadata, "llama.embedding_length")
        head_dim = integer(metadata, "llama.attention.key_length", 0) or divide(
            hidden, heads, "llama.embedding_length", "llama.attention.head_count"
        )
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if integer(metadata, key, head_dim) != head_dim:
                raise ValueError(f"{key}: {metadata[key]}; supported: the head size ({head_dim})")
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, list):
            raise ValueError(f"tokenizer.ggml.tokens: {tokens!r}; expected a list")
        context = integer(metadata, "llama.context_length")
        rope_theta = number(metadata, "llama.rope.freq_base", 10000.0)
        if rope_factors is None:
            rope_scaling = _gguf_rope_scaling(metadata)
        else:
            rope_scaling = _llama3_scaling(rope_factors, head_dim, rope_theta)
        types = set(tensor_types.values())
        return cls(
            architecture="MixtralForCausalLM" if experts else "LlamaForCausalLM",
            vocab_size=integer(metadata, "llama.vocab_size", len(tokens) or REQUIRED),
            hidden_size=hidden,
            intermediate_size=integer(metadata, "llama.feed_forward_length"),
            num_hidden_layers=integer(metadata, "llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=integer(metadata, "llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=number(metadata, "llama.attention.layer_norm_rms_epsilon"),
            max_position_embeddings=context,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_window=integer(metadata, "llama.attention.sliding_window", 0, minimum=0) or None,
            tie_word_embeddings="output.weight" not in tensor_types,
            attention_bias="blk.0.attn_q.bias" in tensor_types,
            mlp_bias="blk.0.ffn_gate.bias" in tensor_types,
            hidden_act="silu",
            bos_token_id=next(iter(token_ids(metadata, "tokenizer.ggml.bos_token_id")), None),
            eos_token_ids=unique(
                *(token_ids(metadata, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")),
                tuple(i for i, token in enumerate(tokens) if token in END_OF_TURN),
            ),
            dtype=torch.bfloat16 if "BF16" in types else torch.float32 if types == {"F32"} else torch.float16,
            num_local_experts=experts,
            num_experts_per_tok=integer(metadata, "llama.expert_used_count") if experts else 0,
        )

    def to_hf(self) -> dict[str, Any]:
        """A config.json that says the same of a model from a GGUF to transformers and vLLM, of either generation."""
        mixtral = self.num_local_experts > 0
        mistral = not mixtral and (self.architecture == "MistralForCausalLM" or self.sliding_window is not None)
        kind = "mixtral" if mixtral else "mistral" if mistral else "llama"
        config: dict[str, Any] = dict(
            architectures=[f"{kind.title()}ForCausalLM"],
            model_type=kind,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            hidden_act=self.hidden_act,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            tie_word_embeddings=self.tie_word_embeddings,
            bos_token_id=self.bos_token_id,
            eos_token_id=list(self.eos_token_ids) or None,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            torch_dtype=str(self.dtype).removeprefix("torch."),
        )
        if mixtral:
            config |= dict(num_local_experts=self.num_local_experts, num_experts_per_tok=self.num_experts_per_tok)
        return config | (dict(sliding_window=self.sliding_window) if mistral or mixtral else {})


def _hf_mixture(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The fields of a ModelConfig that mixtures of experts have; `intermediate_size` of any model."""
    default = ARCHITECTURES[architecture]
    if "num_local_experts" not in default:
        return dict(intermediate_size=integer(config, "intermediate_size"))
    fields: dict[str, Any] = dict(
        num_local_experts=integer(
            config, "num_experts" if "num_experts" in config else "num_local_experts", default["num_local_experts"]
        ),
        num_experts_per_tok=integer(config, "num_experts_per_tok", default["num_experts_per_tok"]),
    )
    if architecture == "MixtralForCausalLM":
        return fields | dict(intermediate_size=integer(config, "intermediate_size"))
    if architecture == "Qwen2MoeForCausalLM":
        if flag(config, "use_sliding_window"):
            raise ValueError("use_sliding_window: True; supported: False, since it is for some of the layers alone")
        shared = integer(config, "shared_expert_intermediate_size", 5632)
        fields |= dict(qkv_bias=flag(config, "qkv_bias", True), shared_expert_intermediate_size=shared)
    for name, supported in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (config.get(name) or supported) != supported:
            raise ValueError(f"{name}: {config[name]!r}; supported: {supported}, experts in every layer")
    return fields | dict(
        intermediate_size=integer(config, "moe_intermediate_size", default["moe_intermediate_size"]),
        norm_topk_prob=flag(config, "norm_topk_prob"),
        qk_norm=architecture == "Qwen3MoeForCausalLM",
    )


def _hf_dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype: {name!r}; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def _hf_rope(config: Mapping[str, Any], base: float) -> tuple[float, dict[str, Any] | None]:
    """The base, `base` by default, and the scaling, None where there is none, of either generation of config.json."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    parameters = config.get(name) or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{name}: {parameters!r}; expected a dictionary")
    scaling = dict(parameters)
    theta = number(scaling if "rope_theta" in scaling else config, "rope_theta", base)
    scaling.pop("rope_theta", None)
    kind = scaling.pop("type", "default")
    scaling.setdefault("rope_type", kind)
    for partial in (scaling, config):
        if partial.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"partial_rotary_factor: {partial['partial_rotary_factor']!r}; supported: 1")
    return theta, None if scaling["rope_type"] == "default" else scaling


def _gguf_rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    at = "llama.rope.scaling."
    factor = metadata.get(f"{at}factor", metadata.get("llama.rope.scale_linear"))
    kind = metadata.get(f"{at}type", "linear" if factor else "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(f"{at}type: {kind!r}; supported: none, linear, yarn")
    keys = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    scaling = {"rope_type": "yarn"} | {name: metadata[at + key] for key, name in keys.items() if at + key in metadata}
    if (attention := number(metadata, f"{at}attn_factor", 1.0)) != 1:
        # llama.cpp multiplies this with YaRN's own factor, Hugging Face replaces that one.
        scaling["attention_factor"] = attention * (1 + 0.1 * math.log(number(scaling, "factor")))
    return scaling


def _llama3_scaling(rope_factors: torch.Tensor, head_dim: int, rope_theta: float) -> dict[str, Any]:
    """Finds the parameters of llama3 scaling that give these divisors of the frequencies."""
    if rope_factors.shape != (head_dim // 2,) or not (rope_factors > 0).all():
        raise ValueError(
            f"rope_freqs.weight: shape {tuple(rope_factors.shape)}; expected {head_dim // 2} positive numbers"
        )
    scaling = {
        "rope_type": "llama3",
        "factor": round(rope_factors.max().item(), 4),
        "low_freq_factor": 1.0,  # these three are the same in Llama 3.1, 3.2 and 3.3
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain, scaled = (
        # The sines of position 1 determine the frequencies, which are at most 1.
        octavo.rotary_cos_sin_cache(head_dim, 2, base=rope_theta, scaling=s)[1, head_dim // 2 :].asin()
        for s in (None, scaling)
    )
    if not torch.allclose(plain / scaled, rope_factors.float(), rtol=1e-3):
        raise ValueError(
            "rope_freqs.weight: not the factors of Llama 3's scaling; supported: low_freq_factor 1, high_freq_factor 4 "
            "and an original context of 8192 tokens"
        )
    return scaling
