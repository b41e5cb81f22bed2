"""Quantised safetensors are read as their formats define them: exactly, and as one layer each.

What a format's own library would write is written here by loops over its published layout, or by the library itself
(compressed-tensors, which transformers loads as well).
"""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from octavo.engine import LLM, SamplingParams
from octavo.engine.checkpoint import Fp8Weight, Int4Weight, Int8Weight, open_checkpoint
from octavo.engine.packed_formats import packed_format
from octavo.testing import assert_accurate

VOCABULARY = 211
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
    "integers": (compressed("int-quantized", num_bits=8, strategy="channel", group_size=None), None),
    "float8": (compressed("float-quantized", **FP8, strategy="tensor"), None),
    "float8 channels": (compressed("float-quantized", **FP8, strategy="channel"), None),
    "float8 blocks": (compressed("float-quantized", **FP8, strategy="block", block_structure=[64, 32]), None),
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
    group = FORMATS[name][1] or k
    scale = (torch.rand(n, k // group, generator=generator) * 0.02 + 0.01).half()
    if name == "integers":
        q = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale = scale / 16
        return dict(weight=q, weight_scale=scale), q.float() * scale.float().repeat_interleave(group, 1)
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
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        parts = dict(
            weight_packed=pack_to_int32((q - 8).to(torch.int8), 4),
            weight_scale=scale,
            weight_shape=torch.tensor([n, k]),
        )
        if "act-order" in name:
            parts["weight_g_idx"] = g_idx.int()
        if "asymmetric" in name:
            parts["weight_zero_point"] = pack_to_int32((zero - 8).to(torch.int8), 4, packed_dim=0)
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


@pytest.fixture(scope="module", params=FORMATS)
def quantised(request, tmp_path_factory):
    """A folder with a tiny model of that format, and the same model in fp32."""
    folder = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        parts, weight = written(request.param, *module.weight.shape, generator)
        module.weight.data.copy_(weight)
        tensors |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
        if request.param == "float8":
            tensors[f"{name.rpartition('.')[0]}.k_scale"] = torch.ones(1)  # of a KV cache
        if request.param == "gptq":
            tensors[f"{name}.bias"] = torch.zeros(module.out_features)
    kept = {
        k: v for k, v in model.state_dict().items() if not any(k == f"{t.rpartition('.')[0]}.weight" for t in tensors)
    }
    tensors |= {name: tensor.contiguous() for name, tensor in kept.items()}
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}  # layers lie across files
    for file, of in shards.items():
        save_file({name: tensors[name] for name in of}, folder / file, metadata={"format": "pt"})
    index = dict(metadata={}, weight_map={name: file for file, of in shards.items() for name in of})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    content = CONFIG.to_dict() | dict(
        architectures=["LlamaForCausalLM"], dtype="float32", quantization_config=FORMATS[request.param][0]
    )
    (folder / "config.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return request.param, folder, model


def dense(weight):
    """What a quantised weight stands for, in float64."""
    q = weight.q.double()
    if isinstance(weight, Fp8Weight):
        scale = weight.scale.double().repeat_interleave(weight.block[0], 0)[: q.shape[0]]
        return q * scale.repeat_interleave(weight.block[1], 1)[:, : q.shape[1]]
    wide = weight.scale.double().repeat_interleave(weight.group_size, 1)
    if isinstance(weight, Int8Weight):
        return q * wide
    out = torch.empty_like(wide)
    out[:, slice(None) if weight.order is None else weight.order] = (
        (q - 8) * wide
        if weight.minimum is None
        else q * wide + weight.minimum.double().repeat_interleave(weight.group_size, 1)
    )
    return out


def test_every_weight_exactly(quantised):
    name, folder, model = quantised
    expected = model.state_dict()
    read = dict(open_checkpoint(folder).tensors())
    extra = {tensor for tensor in read if tensor.endswith(".k_scale")}
    assert read.keys() - extra == expected.keys() and bool(extra) == (name == "float8")
    for tensor in expected:
        weight = read[tensor]
        if isinstance(weight, torch.Tensor):
            assert torch.equal(weight, expected[tensor])
        else:
            kind = Int8Weight if name == "integers" else Fp8Weight if "8" in name else Int4Weight
            assert isinstance(weight, kind)
            assert torch.equal(dense(weight), expected[tensor].double()), tensor
    kinds = {type(weight) for weight in read.values()}
    assert len(kinds) == 2, "dense embeddings and norms, quantised layers"


def test_logits_and_text(quantised):
    _, folder, model = quantised
    ids = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        plain = model(ids).logits[0]
        exact = model.double()(ids).logits[0]
        model.float()
    llm = LLM(str(folder), device="cpu", dtype=torch.float32, page_size=5)
    logits = torch.cat(list(llm.runner.prompt_logits(ids[0].tolist(), 7)))
    assert_accurate(logits, exact, plain)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 24:].tolist()
    (completion,) = llm.generate([ids[0].tolist()], SamplingParams(max_tokens=8, temperature=0.0))
    assert list(completion.token_ids) == expected


COMPRESSED_TENSORS = [name for name in FORMATS if name.startswith(("packed", "integers", "float8"))]
COMPRESSED_TENSORS.remove("packed act-order")  # which the library no longer reads, though checkpoints have it


@pytest.mark.parametrize("name", COMPRESSED_TENSORS)
def test_the_library_reads_the_same(name):
    """The layouts of this file, held against compressed-tensors' own decompression."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    parts, weight = written(name, 48, 96, torch.Generator().manual_seed(5))
    config = FORMATS[name][0]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    read = BaseCompressor.get_value_from_registry(config["format"]).decompress(parts, scheme)["weight"]
    torch.testing.assert_close(read.float(), weight, rtol=1e-3, atol=0)  # its product is rounded to fp16


@pytest.mark.parametrize("quantised", ["packed"], indirect=True)
def test_transformers_reads_the_same(quantised):
    _, folder, model = quantised
    ids = torch.arange(10).unsqueeze(0)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(peer(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def read_layer(name, change=None, drop=(), n=48, k=64):
    parts, _ = written(name, n, k, torch.Generator().manual_seed(6))
    parts = {suffix: part for suffix, part in (parts | (change or {})).items() if suffix not in drop}
    return packed_format(FORMATS[name][0])[0].weight("a.b", parts)


@pytest.mark.parametrize(
    ("name", "change", "drop", "message"),
    [
        ("gptq", {}, ["scales"], "a.b.scales: missing from the checkpoint, which has a.b.g_idx"),
        ("gptq", {"g_idx": torch.arange(64) % 4}, [], r"a.b.g_idx: not the groups of 64 inputs, 32 in each of 2"),
        ("gptq", {"g_idx": torch.arange(63) % 2}, [], r"a.b.g_idx: not the groups of 64 inputs"),
        ("gptq", {"scales": torch.ones(2, 47).half()}, [], r"a.b.scales: .*\(47, 2\).* 48 outputs and 64 inputs"),
        ("gptq", {"scales": torch.ones(3, 48).half()}, [], r"a.b.scales: .*\(48, 3\)"),
        ("gptq", {"qzeros": torch.zeros(1, 6, dtype=torch.int32)}, [], r"a.b.qzeros: \(48, 1\).* \(48, 2\)"),
        (
            "gptq",
            {"scales": torch.ones(4, 48).half()},
            [],
            "a.b.scales: groups of 16 inputs; supported: multiples of 32",
        ),
        ("awq", {"qweight": torch.zeros(64, 6)}, [], r"a.b.qweight: torch.float32, shape \(64, 6\); expected int32"),
        ("packed", {"weight_shape": torch.tensor([48, 60])}, [], r"a.b.weight_packed: holds \[48, 64\].* \[48, 60\]"),
        ("packed", {"weight_g_idx": torch.zeros(64)}, [], r"a.b.weight_g_idx: not the groups"),
        ("fp8", {"weight_scale_inv": torch.ones(1, 3)}, [], r"a.b.weight_scale_inv: shape \(1, 3\); expected \(1, 2\)"),
        ("float8", {"weight": torch.zeros(48, 64)}, [], r"a.b.weight: torch.float32.*expected float8_e4m3fn"),
        ("integers", {"weight": torch.zeros(48, 64)}, [], r"a.b.weight: torch.float32.*expected int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, change, drop, message):
    with pytest.raises(ValueError, match=message):
        read_layer(name, change, drop)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(quant_method="bitsandbytes"), "quant_method: 'bitsandbytes'; supported: gptq, awq, compressed-tensors"),
        (dict(quant_method="gptq", bits=3), "bits: 3; supported: 4"),
        (dict(quant_method="gptq", bits=4, checkpoint_format="marlin"), "checkpoint_format: 'marlin'"),
        (dict(quant_method="awq", bits=4, version="gemv"), "version: 'gemv'; supported: gemm"),
        (dict(quant_method="compressed-tensors", format="pack-quantized"), "config_groups: '0 of them'"),
        (compressed(num_bits=8), "num_bits: 8; supported: 4"),
        (compressed(type="float"), "type: 'float'; supported: int"),
        (compressed(strategy="tensor"), "strategy: 'tensor'; supported: group, channel"),
        (compressed("int-quantized", num_bits=8, symmetric=False), "symmetric: False"),
        (compressed("nvfp4-pack-quantized"), "format: 'nvfp4-pack-quantized'"),
        (
            compressed("float-quantized", **FP8, strategy="group"),
            "strategy: 'group'; supported: tensor, channel, block",
        ),
        (dict(quant_method="fp8", weight_block_size=[128]), r"weight_block_size: \[128\]; supported: two positive"),
    ],
)
def test_formats_that_are_not_supported(config, message):
    with pytest.raises(ValueError, match="quantization_config: " + message):
        packed_format(config)


def test_what_the_user_is_told():
    assert packed_format(compressed())[1] == []
    asymmetric = dict(num_bits=8, dynamic=True, symmetric=False)
    (note,) = packed_format(compressed("int-quantized", num_bits=8, activations=asymmetric))[1]
    assert "activations are not quantised" in note
    (note, _) = packed_format(
        compressed("float-quantized", **FP8, strategy="tensor") | dict(kv_cache_scheme={"num_bits": 8})
    )[1]
    assert "KV cache is not quantised" in note


def test_a_bias_that_is_none(tmp_path):
    """Zeros where the configuration has no bias are left out; anything else has no place."""
    parts, _ = written("gptq", 48, 64, torch.Generator().manual_seed(6))
    content = CONFIG.to_dict() | dict(architectures=["LlamaForCausalLM"], quantization_config=FORMATS["gptq"][0])
    (tmp_path / "config.json").write_text(json.dumps(content))
    for bias, names in ((torch.zeros(48), []), (torch.ones(48), ["a.mlp.b.bias"])):
        tensors = {f"a.mlp.b.{suffix}": part for suffix, part in parts.items()} | {"a.mlp.b.bias": bias}
        save_file(tensors, tmp_path / "model.safetensors")
        assert sorted(dict(open_checkpoint(tmp_path).tensors())) == [*names, "a.mlp.b.weight"]
