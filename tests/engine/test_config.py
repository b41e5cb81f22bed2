import json
import math

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.engine.config import ModelConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HF = {  # Llama 3.2 1B, as transformers 4 wrote it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
GGUF = {  # the same model's
    "general.architecture": "llama",
    "llama.block_count": 16,
    "llama.context_length": 131072,
    "llama.embedding_length": 2048,
    "llama.feed_forward_length": 8192,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.rope.freq_base": 500000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-05,
    "llama.attention.key_length": 64,
    "llama.attention.value_length": 64,
    "llama.vocab_size": 128256,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.tokens": ["a", "<|eot_id|>", "b"],
    "tokenizer.ggml.bos_token_id": 128000,
    "tokenizer.ggml.eos_token_id": 128009,
}
BF16 = {"token_embd.weight": "BF16", "output_norm.weight": "F32"}
MISTRAL = HF | {"architectures": ["MistralForCausalLM"], "rope_scaling": None}
MIXTRAL = HF | {
    "architectures": ["MixtralForCausalLM"],
    "rope_scaling": None,
    "num_local_experts": 16,
    "num_experts_per_tok": 3,
}
QWEN = HF | {  # Qwen3-30B-A3B's, in part
    "architectures": ["Qwen3MoeForCausalLM"],
    "rope_scaling": None,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GONE = object()


def changed(config, **changes):
    return {k: v for k, v in (config | changes).items() if v is not GONE}


def factors(**changes):
    """The divisors of the frequencies, as llama.cpp stores them, after transformers' llama3 scaling."""
    config = LlamaConfig(**changed(HF, rope_scaling=None, rope_parameters=LLAMA3 | {"rope_theta": 5e5} | changes))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return 1 / (500000.0 ** (torch.arange(0, 64, 2) / 64)) / scaled


def test_transformers_4_style():
    config = ModelConfig.from_hf(HF)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=LLAMA3,
        sliding_window=None,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
        dtype=torch.bfloat16,
    )


def test_transformers_5_style_reads_the_same():
    new = changed(HF, rope_scaling=GONE, rope_theta=GONE, torch_dtype=GONE, dtype="bfloat16")
    assert ModelConfig.from_hf(new | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}}) == ModelConfig.from_hf(HF)
    plain = ModelConfig.from_hf(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}})
    assert (plain.rope_theta, plain.rope_scaling) == (9.0, None)


def test_the_old_name_of_the_rope_type():
    config = ModelConfig.from_hf(HF | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig])
def test_what_transformers_writes_today(kind, tmp_path):
    theirs = kind(vocab_size=99, hidden_size=96, num_attention_heads=6, num_key_value_heads=3, dtype="float16")
    theirs.architectures = [kind.__name__.replace("Config", "ForCausalLM")]
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    same = ["vocab_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"]
    same += ["max_position_embeddings", "tie_word_embeddings", "bos_token_id"]
    same += ["num_local_experts", "num_experts_per_tok"] if kind in (MixtralConfig, Qwen3MoeConfig) else []
    inner = theirs.moe_intermediate_size if "Qwen" in kind.__name__ else theirs.intermediate_size
    assert ours.intermediate_size == inner and ours.qk_norm == (kind is Qwen3MoeConfig)
    assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
    assert ours.head_dim == 16 and ours.dtype == torch.float16
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == (1e6 if kind is MixtralConfig else 1e4)
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None) or None)


def test_defaults_are_those_of_transformers():
    needed = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = ModelConfig.from_hf({name: HF[name] for name in (*needed, "num_attention_heads")})
    theirs = LlamaConfig()
    assert config.head_dim == 64 and config.num_key_value_heads == 32
    assert config.rope_theta == theirs.rope_parameters["rope_theta"] and config.rope_scaling is None
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert (config.tie_word_embeddings, config.bos_token_id, config.eos_token_ids) == (False, None, ())
    assert config.dtype == torch.float32
    mistral = ModelConfig.from_hf(changed(MISTRAL, max_position_embeddings=GONE, num_key_value_heads=GONE))
    assert mistral.max_position_embeddings == MistralConfig().max_position_embeddings
    assert mistral.num_key_value_heads == MistralConfig().num_key_value_heads


@pytest.mark.parametrize(("ours", "theirs"), [(MIXTRAL, MixtralConfig()), (QWEN, Qwen3MoeConfig())])
def test_defaults_of_mixtures_are_those_of_transformers(ours, theirs):
    needed = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = ModelConfig.from_hf({name: ours[name] for name in (*needed, "num_attention_heads")})
    same = ["num_local_experts", "num_experts_per_tok", "num_key_value_heads", "sliding_window", "rms_norm_eps"]
    same += ["max_position_embeddings"]
    assert {name: getattr(config, name) for name in same} == {name: getattr(theirs, name) for name in same}
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(("window", "expected"), [(GONE, 4096), (None, None), (1024, 1024)])
def test_sliding_window_of_mistral(window, expected):
    assert ModelConfig.from_hf(changed(MISTRAL, sliding_window=window)).sliding_window == expected
    assert ModelConfig.from_hf(changed(HF, sliding_window=window)).sliding_window is None
    of_mixtral = ModelConfig.from_hf(changed(MIXTRAL, sliding_window=window)).sliding_window
    assert of_mixtral == (None if window is GONE else expected)


@pytest.mark.parametrize("window", [None, 512])
def test_mixtral_as_it_is_written_is_read_again(window):
    config = ModelConfig.from_hf(MIXTRAL | {"sliding_window": window})
    assert (config.num_local_experts, config.num_experts_per_tok) == (16, 3)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert MixtralConfig(**config.to_hf()).num_local_experts == 16


def test_qwen():
    config = ModelConfig.from_hf(QWEN)
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (128, 8, 768)
    assert config.norm_topk_prob and config.qk_norm
    assert ModelConfig.from_hf(changed(QWEN, num_experts=GONE, num_local_experts=128)) == config
    assert ModelConfig.from_hf(QWEN | {"sliding_window": 512}).sliding_window is None
    assert ModelConfig.from_hf(QWEN | {"sliding_window": 512, "use_sliding_window": True}).sliding_window == 512


def test_qwen2():
    released = {  # Qwen1.5-MoE-A2.7B's, in part
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "use_sliding_window": False,
    }
    theirs, config = Qwen2MoeConfig(), ModelConfig.from_hf(HF | {"rope_scaling": None} | released)
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (60, 4, 1408)
    assert config.shared_expert_intermediate_size == 5632 and not config.norm_topk_prob and not config.qk_norm
    assert config.qkv_bias and not config.attention_bias and config.sliding_window is None
    fewer = {name: value for name, value in released.items() if name == "architectures"}
    default = ModelConfig.from_hf(HF | {"rope_scaling": None} | fewer)
    assert (default.num_local_experts, default.num_experts_per_tok) == (theirs.num_experts, theirs.num_experts_per_tok)
    assert default.intermediate_size == theirs.moe_intermediate_size and default.qkv_bias == theirs.qkv_bias
    assert default.shared_expert_intermediate_size == theirs.shared_expert_intermediate_size
    with pytest.raises(ValueError, match="use_sliding_window: True; supported: False"):
        ModelConfig.from_hf(HF | released | {"use_sliding_window": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step: 2; supported: 1, experts in every layer"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers: \[0\]; supported: \[\], experts in every layer"),
        ({"num_experts": 4}, r"num_experts_per_tok: 8; expected at most the number of experts \(4\)"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: 1; expected true or false"),
    ],
)
def test_what_is_not_supported_of_qwen_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(changed(QWEN, **changes))


def test_dense_models_have_no_experts():
    config = ModelConfig.from_hf(HF | {"num_local_experts": 8, "num_experts_per_tok": 2})  # Llama has no such keys
    assert (config.num_local_experts, config.num_experts_per_tok) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 17}, r"num_experts_per_tok: 17; expected at most the number of experts \(16\)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: 0; expected an integer of at least 1"),
        ({"num_local_experts": "8"}, "num_local_experts: '8'; expected an integer of at least 1"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; supported: silu"),
        ({"architectures": ["PhimoeForCausalLM"]}, "architectures: .*Phimoe.*supported: .*MixtralForCausalLM"),
    ],
)
def test_what_is_not_supported_of_mixtral_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(changed(MIXTRAL, **changes))


def test_end_tokens_of_the_generation_config_are_merged():
    one = HF | {"eos_token_id": 7}
    assert ModelConfig.from_hf(one, {"eos_token_id": [9, 7]}).eos_token_ids == (7, 9)
    assert ModelConfig.from_hf(one, {"eos_token_id": 8}).eos_token_ids == (7, 8)
    assert ModelConfig.from_hf(one, {}).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures: .*Qwen2.*supported: LlamaForCausalLM, Mistral"),
        ({"architectures": GONE}, "architectures: None; supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; supported: silu"),
        ({"hidden_size": GONE}, "hidden_size: missing"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small'; expected a positive number"),
        ({"vocab_size": 0}, "vocab_size: 0; expected an integer of at least 1"),
        ({"vocab_size": True}, "vocab_size: True; expected an integer"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: 2.5; expected an integer"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads: 5 does not divide num_attention_heads \(32\)"),
        ({"num_attention_heads": 30, "head_dim": GONE}, r"hidden_size: 2048 is not divisible by num_attention_heads"),
        ({"head_dim": 63}, "head_dim: 63; expected an even number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'; expected true or false"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn'; supported: float16"),
        ({"eos_token_id": "<eos>"}, "eos_token_id: '<eos>'; expected an integer"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear'; expected a dictionary"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling .*longrope.*expected one of"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling .*needs the key 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5; supported: 1"),
    ],
)
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(changed(HF, **changes))


def test_gguf_reads_the_same_as_hugging_face():
    config = ModelConfig.from_gguf(GGUF, BF16, factors())
    assert config.eos_token_ids == (128009, 1)  # 1 is <|eot_id|> of this made-up vocabulary
    expected = ModelConfig.from_hf(HF | {"eos_token_id": [128009, 1]})
    assert config == expected


def test_gguf_of_experts_is_mixtral():
    experts = {"llama.expert_count": 16, "llama.expert_used_count": 3}
    config = ModelConfig.from_gguf(changed(GGUF, **experts), BF16)
    assert config.architecture == "MixtralForCausalLM"
    expected = ModelConfig.from_hf(MIXTRAL | {"eos_token_id": [128009, 1]})
    assert config == expected


def test_gguf_defaults():
    keys = ("key_length", "value_length", "head_count_kv")
    config = changed(GGUF, **{f"llama.attention.{key}": GONE for key in keys})
    config = changed(config, **{"llama.rope.freq_base": GONE, "llama.vocab_size": GONE})
    config = ModelConfig.from_gguf(config | {"tokenizer.ggml.bos_token_id": 1}, {"output.weight": "Q4_0"})
    assert (config.head_dim, config.num_key_value_heads, config.vocab_size) == (64, 32, 3)
    assert (config.rope_theta, config.rope_scaling, config.sliding_window) == (10000.0, None, None)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)


@pytest.mark.parametrize(
    ("types", "dtype"), [(("F32", "F32"), "float32"), (("F32", "BF16"), "bfloat16"), (("F32", "Q4_0"), "float16")]
)
def test_gguf_dtype_and_biases_follow_from_its_tensors(types, dtype):
    tensors = dict(zip(("blk.0.attn_q.bias", "blk.0.ffn_gate.bias"), types, strict=True))
    config = ModelConfig.from_gguf(GGUF, tensors)
    assert config.dtype == getattr(torch, dtype) and config.attention_bias and config.mlp_bias


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 4096,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.attn_factor": 0.5,
            },
            {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 16.0,
                "attention_factor": 0.5 * (1 + 0.1 * math.log(8)),
            },
        ),
    ],
)
def test_gguf_rope_scaling(keys, expected):
    config = ModelConfig.from_gguf(GGUF | {f"llama.{k}": v for k, v in keys.items()}, BF16)
    assert config.rope_scaling == expected


def test_gguf_sliding_window():
    assert ModelConfig.from_gguf(GGUF | {"llama.attention.sliding_window": 512}, BF16).sliding_window == 512
    assert ModelConfig.from_gguf(GGUF | {"llama.attention.sliding_window": 0}, BF16).sliding_window is None


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_recognised(factor):
    stored = factors(factor=factor).float()
    assert ModelConfig.from_gguf(GGUF, BF16, stored).rope_scaling == LLAMA3 | {"factor": factor}


@pytest.mark.parametrize(
    "wrong",
    [factors(high_freq_factor=8.0), factors(original_max_position_embeddings=4096), torch.ones(16), -torch.ones(32)],
    ids=["high", "original", "size", "sign"],
)
def test_other_rope_factors_are_refused(wrong):
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        ModelConfig.from_gguf(GGUF, BF16, wrong)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "qwen2", "general.architecture: 'qwen2'; supported: 'llama'"),
        ("llama.expert_count", 8, "llama.expert_used_count: missing"),
        ("llama.expert_count", -1, "llama.expert_count: -1; expected an integer of at least 0"),
        ("llama.block_count", GONE, "llama.block_count: missing"),
        ("llama.attention.head_count_kv", [8, 4], r"head_count_kv: \[8, 4\]; expected an integer"),
        ("llama.attention.value_length", 32, r"value_length: 32; supported: the head size \(64\)"),
        ("llama.rope.dimension_count", 32, r"dimension_count: 32; supported: the head size"),
        ("llama.rope.scaling.type", "longrope", "rope.scaling.type: 'longrope'; supported: none, linear, yarn"),
        ("llama.rope.freq_base", math.nan, "rope.freq_base: nan; expected a positive number"),
        ("tokenizer.ggml.tokens", 7, "tokenizer.ggml.tokens: 7; expected a list"),
    ],
)
def test_what_is_not_supported_in_a_gguf_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_gguf(changed(GGUF, **{key: value}), BF16)
