"""Tiny models in every format that the engine reads, and the same models in fp32.

What a format's own library would write is written here by loops over its published layout, which need no library, or by
gguf itself (which writes no K-quants: those are random blocks, and `gguf.quants.dequantize` says what they stand for).
"""

import json

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tiny_models import from_config, released, save_tokenizer

VOCABULARY = 272
CONFIG = transformers.LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
    eos_token_id=None,
)
MIXTRAL = transformers.MixtralConfig(
    **{k: v for k, v in CONFIG.to_diff_dict().items() if k not in ("model_type", "transformers_version")}
    | dict(num_local_experts=4, num_experts_per_tok=2)
)
COMPRESSED = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)


def compressed(format="pack-quantized", activations=None, **weights):
    group = dict(targets=["Linear"], weights=COMPRESSED | weights, input_activations=activations, format=format)
    return dict(
        quant_method="compressed-tensors",
        quantization_status="compressed",
        format=format,
        config_groups={"group_0": group},
        ignore=["lm_head"],
    )


FP8 = dict(num_bits=8, type="float", group_size=None)
# name → (quantization_config, group size or None for a whole row)
FORMATS = {
    "gptq": (dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True), 32),
    "gptq asymmetric": (dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=False), 32),
    "gptq whole rows": (dict(quant_method="gptq", bits=4, group_size=-1, desc_act=False, sym=True), None),
    "gptq v2": (dict(quant_method="gptq", bits=4, group_size=32, sym=False, checkpoint_format="gptq_v2"), 32),
    "gptq act-order": (dict(quant_method="gptq", bits=4, group_size=32, desc_act=True, sym=False), 32),
    "awq": (dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm"), 32),
    "packed": (compressed(), 32),
    "packed asymmetric": (compressed(symmetric=False), 32),
    "packed act-order": (compressed(actorder="group"), 32),
    "packed channels": (compressed(strategy="channel", group_size=None), None),
    "packed bytes": (compressed(num_bits=8), 32),
    "packed bytes, channels": (compressed(num_bits=8, strategy="channel", group_size=None), None),
    "integers": (compressed("int-quantized", num_bits=8, strategy="channel", group_size=None), None),
    "float8": (compressed("float-quantized", **FP8, strategy="tensor"), None),
    "float8 channels": (compressed("float-quantized", **FP8, strategy="channel"), None),
    "float8 blocks": (compressed("float-quantized", **FP8, strategy="block", block_structure=[64, 32]), None),
    "nf4": (dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), None),
    "nf4 nested": (dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), None),
    "fp8": (dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[64, 32]), None),
}


def words(codes, places):
    """int32 words of eight codes each along the last dimension, number `places[i]` of them in the bits from 4 · i."""
    codes = codes.numpy().astype(np.uint32)
    out = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for j in range(out.shape[1]):
        for i in range(8):
            out[:, j] |= codes[:, 8 * j + places[i]] << np.uint32(4 * i)
    return torch.from_numpy(out.view(np.int32))


def written(name, n, k, generator):
    """The tensors of a layer by suffix, and the weight that they stand for in fp32, which holds it exactly."""
    if name.startswith(("float8", "fp8")):
        return written_float8(name, n, k, generator)
    if name.startswith("nf4"):
        return written_nf4(name, n, k, generator)
    group = FORMATS[name][1] or k
    scale = (torch.rand(n, k // group, generator=generator) * 0.02 + 0.01).half()
    if name == "integers" or "bytes" in name:
        q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale = scale / 16
        parts = dict(weight=q, weight_scale=scale)
        if name != "integers":
            packed = torch.from_numpy((q.numpy().astype(np.int16) + 128).astype(np.uint8).view("<i4").copy())
            parts = dict(weight_packed=packed, weight_scale=scale, weight_shape=torch.tensor([n, k]))
        return parts, q.float() * scale.float().repeat_interleave(group, 1)
    q = torch.randint(0, 16, (n, k), generator=generator)
    zero = torch.full(scale.shape, 8)
    g_idx = torch.arange(k) // group
    if "act-order" in name:
        # As GPTQ leaves it, q, k and v have one order, that of their input; in the other format k and v have another.
        seed = k + n * (n == 32 and name.startswith("packed"))
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    if "asymmetric" in name or name in ("gptq v2", "gptq act-order", "awq"):
        zero = torch.randint(0 if name in ("gptq v2", "awq") else 1, 16, scale.shape, generator=generator)
    weight = (q - zero[:, g_idx]).float() * scale.float()[:, g_idx]
    if name.startswith("gptq"):
        stored = zero if name == "gptq v2" else zero - 1
        parts = dict(
            qweight=words(q, range(8)).t(),
            qzeros=words(stored.t(), range(8)),
            scales=scale.t(),
            g_idx=g_idx.int(),
        )
    elif name == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = dict(qweight=words(q.t(), order), qzeros=words(zero.t(), order), scales=scale.t())
    else:
        parts = dict(
            weight_packed=words(q, range(8)),
            weight_scale=scale,
            weight_shape=torch.tensor([n, k]),
        )
        if "act-order" in name:
            parts["weight_g_idx"] = g_idx.int()
        if "asymmetric" in name:
            parts["weight_zero_point"] = words(zero.t(), range(8)).t()
    return {suffix: part.contiguous() for suffix, part in parts.items()}, weight


def written_float8(name, n, k, generator):
    rows, columns = {"float8": (n, k), "float8 channels": (1, k)}.get(name, (64, 32))
    q = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    size = (-(-n // rows), -(-k // columns))
    scale = torch.randint(1, 9, size, generator=generator) / 64.0  # so that fp32 holds the products
    weight = q.float() * scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    if name == "fp8":
        return dict(weight=q, weight_scale_inv=scale), weight
    parts = dict(weight=q, weight_scale=scale.flatten() if name == "float8" else scale)
    return parts | ({"input_scale": torch.ones(1)} if name == "float8" else {}), weight


# The published table of NF4, whose steps are the quantiles of a normal distribution.
NF4_STEPS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4_STEPS += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4_STEPS += [
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def written_nf4(name, n, k, generator):
    """Blocks of 64 weights, and of 16 of their scales, in a loop over bitsandbytes' layout."""
    steps = np.array(NF4_STEPS, np.float32)
    codes = torch.randint(0, 16, (n * k,), generator=generator).numpy().astype(np.uint8)
    state = dict(quant_type="nf4", blocksize=64, dtype="float16", shape=[n, k])
    blocks = n * k // 64
    parts = {}
    if name == "nf4":
        absmax = (torch.rand(blocks, generator=generator) + 0.5).numpy()
        parts["weight.absmax"] = torch.from_numpy(absmax)
    else:
        nested = torch.randint(0, 256, (blocks,), generator=generator).numpy().astype(np.uint8)
        nested_map = np.linspace(-1, 1, 256, dtype=np.float32)
        nested_absmax = (torch.rand(-(-blocks // 16), generator=generator) * 0.4).numpy()
        state |= dict(nested_blocksize=16, nested_dtype="float32", nested_offset=0.75)
        absmax = np.array(
            [nested_map[nested[i]] * nested_absmax[i // 16] + np.float32(0.75) for i in range(blocks)], np.float32
        )
        parts |= {
            "weight.absmax": torch.from_numpy(nested),
            "weight.nested_absmax": torch.from_numpy(nested_absmax),
            "weight.nested_quant_map": torch.from_numpy(nested_map),
        }
    packed, weight = np.zeros((n * k // 2, 1), np.uint8), np.zeros(n * k, np.float32)
    for i in range(n * k):
        packed[i // 2, 0] |= codes[i] << (0 if i % 2 else 4)
        weight[i] = steps[codes[i]] * absmax[i // 64]
    state_bytes = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts |= {"weight": torch.from_numpy(packed), "weight.quant_map": torch.from_numpy(steps)}
    parts["weight.quant_state.bitsandbytes__nf4"] = state_bytes
    return parts, torch.from_numpy(weight).view(n, k)


def save_quantised(folder, name, head=False, config=CONFIG):
    """Saves a model of that format in two files, layers across them; returns the same model in fp32.

    With `head` the head is quantised as the layers are.
    """
    torch.manual_seed(3)
    model = from_config(config)
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for key, value in released(model).items():
        module_name, _, kind = key.rpartition(".")
        linear = module_name.endswith(("_proj", ".w1", ".w2", ".w3")) or (module_name == "lm_head" and head)
        if kind != "weight" or not linear:
            tensors[key] = value.contiguous()
            continue
        parts, weight = written(name, *value.shape, generator)
        value.copy_(weight)
        tensors |= {f"{module_name}.{suffix}": part for suffix, part in parts.items()}
        if name == "float8" and module_name.endswith(".k_proj"):
            tensors[f"{module_name.rpartition('.')[0]}.k_scale"] = torch.ones(1)  # of a KV cache
        if name == "gptq":
            tensors[f"{module_name}.bias"] = torch.zeros(len(value))
    save_shards(folder, tensors)
    content = config.to_dict() | dict(
        architectures=[type(model).__name__], dtype="float32", quantization_config=FORMATS[name][0]
    )
    (folder / "config.json").write_text(json.dumps(content))
    save_tokenizer(folder, VOCABULARY)
    return model


def save_shards(folder, tensors):
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, of in shards.items():
        save_file({name: tensors[name] for name in of}, folder / file, metadata={"format": "pt"})
    index = dict(metadata={}, weight_map={name: file for file, of in shards.items() for name in of})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SUPER = 256
GGUF_CONFIG = transformers.LlamaConfig(
    **CONFIG.to_diff_dict() | dict(hidden_size=SUPER, intermediate_size=SUPER, head_dim=32, rms_norm_eps=1e-5)
)
GGUF_MIXTRAL = transformers.MixtralConfig(
    **MIXTRAL.to_diff_dict() | dict(hidden_size=SUPER, intermediate_size=SUPER, head_dim=32, rms_norm_eps=1e-5)
)
GGUF_KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q5_0, Type.Q5_1]
GGUF_KINDS += [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS]
# Where in a block the fp16 scales are, of formats that the gguf package can't write; all else in it may be anything.
GGUF_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
GGUF_SCALES |= {"IQ4_NL": (0,), "IQ4_XS": (0,)}
GGUF_MODULES = dict(attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj")
GGUF_MODULES |= dict(attn_output="self_attn.o_proj", attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
GGUF_MLP = dict(ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
GGUF_EXPERTS = dict(ffn_gate="w1", ffn_up="w3", ffn_down="w2")


def gguf_data(shape, kind, rng):
    """Raw data of a random tensor whose elements are of the order of 0.1."""
    if kind.name not in GGUF_SCALES:
        return quantize((rng.standard_normal(shape) * 0.1).astype(np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    for at in GGUF_SCALES[kind.name]:
        blocks[:, at : at + 2] = rng.random((len(blocks), 1)).astype(np.float16).view(np.uint8)
    values = dequantize(blocks, kind)
    for at in GGUF_SCALES[kind.name]:
        scale = blocks[:, at : at + 2].copy().view(np.float16) * np.float16(0.1 / values.std())
        blocks[:, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def permuted(rows, heads):
    """As convert_hf_to_gguf.py reorders the rows of queries and keys."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def save_gguf(path, kind, config=GGUF_CONFIG, stacked=True):
    """Writes a model of that type, embedding and head too; returns the same model in fp32.

    Of a Mixtral the matrices of a layer's experts are one tensor, or several where not `stacked`.
    """
    c, rng = config, np.random.default_rng(0)
    model = from_config(c)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{i}" for i in range(c.vocab_size)])
    writer.add_token_scores([0.0] * c.vocab_size)
    writer.add_token_types([1] * c.vocab_size)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    experts = getattr(c, "num_local_experts", 0)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
    for i in range(c.num_hidden_layers):
        names |= {f"blk.{i}.{short}": f"model.layers.{i}.{long}" for short, long in GGUF_MODULES.items()}
        at = f"model.layers.{i}.block_sparse_moe"
        if not experts:
            names |= {f"blk.{i}.{short}": f"model.layers.{i}.{long}" for short, long in GGUF_MLP.items()}
            continue
        names[f"blk.{i}.ffn_gate_inp"] = f"{at}.gate"
        for short, matrix in GGUF_EXPERTS.items():
            names |= {f"blk.{i}.{short}.{e}": f"{at}.experts.{e}.{matrix}" for e in range(experts)}
    weights, of_experts = released(model), {}
    for short, long in names.items():
        weight = weights[f"{long}.weight"]
        as_it_is = weight.dim() == 1 or long.endswith("block_sparse_moe.gate")
        its_kind = Type.F32 if as_it_is else kind
        raw = weight.numpy() if as_it_is else gguf_data(tuple(weight.shape), its_kind, rng)
        if not as_it_is:
            weight.copy_(torch.from_numpy(np.array(dequantize(raw, its_kind))))
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(short.rpartition(".")[2])
        stored = raw if heads is None else permuted(raw, heads)
        if ".experts." in long and stacked:
            of_experts.setdefault(short.rpartition(".")[0], []).append(stored)
            continue
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(stored), raw_dtype=its_kind)
    for short, matrices in of_experts.items():
        writer.add_tensor(f"{short}_exps.weight", np.stack(matrices), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
