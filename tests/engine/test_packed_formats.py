"""Quantised safetensors are read as their formats define them: exactly, and as one layer each.

What a format's own library would write is written here by loops over its published layout, or by the library itself
(compressed-tensors, which transformers loads as well).
"""

import json

import pytest
import torch
import transformers
from quantised_models import CONFIG, FORMATS, FP8, compressed, save_quantised, written
from safetensors.torch import load_file, save_file

from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.layers import dequantize
from octavo.engine.packed_formats import packed_format

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


def test_transformers_reads_the_same(tmp_path):
    model = save_quantised(tmp_path, "packed")
    ids = torch.arange(10).unsqueeze(0)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(peer(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def read_layer(name, change=None, drop=(), n=48, k=64):
    parts, _ = written(name, n, k, torch.Generator().manual_seed(6))
    parts = {suffix: part for suffix, part in (parts | (change or {})).items() if suffix not in drop}
    return packed_format(FORMATS[name][0])[0].weight("a.b", parts, torch.float32)


@pytest.mark.parametrize(
    ("name", "change", "drop", "message"),
    [
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
        (
            "packed bytes",
            {"weight_packed": torch.zeros(48, 16)},
            [],
            r"a.b.weight_packed: torch.float32.*expected int32",
        ),
        ("packed bytes", {"weight_shape": torch.tensor([48, 60])}, [], r"a.b.weight_packed: holds \[48, 64\].*60\]"),
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
        (dict(quant_method="hqq"), "quant_method: 'hqq'; supported: gptq, awq, compressed-tensors"),
        (dict(quant_method="gptq", bits=3), "bits: 3; supported: 4"),
        (dict(quant_method="gptq", bits=4, checkpoint_format="marlin"), "checkpoint_format: 'marlin'"),
        (dict(quant_method="awq", bits=4, version="gemv"), "version: 'gemv'; supported: gemm"),
        (dict(quant_method="compressed-tensors", format="pack-quantized"), "config_groups: '0 of them'"),
        (compressed(num_bits=3), "num_bits: 3; supported: 4, 8"),
        (compressed(num_bits=8, symmetric=False), "symmetric: False"),
        (compressed(num_bits=8, actorder="group"), "actorder: 'group'"),
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


def test_layers_of_several_formats():
    """Each has that of the group that names it, by its name before "Linear", wherever the group stands."""
    kinds = {"packed": ["Linear"], "integers": ["re:.*mlp"], "packed bytes": ["model.layers.1.mlp.down_proj"]}
    groups = [FORMATS[name][0]["config_groups"]["group_0"] | dict(targets=targets) for name, targets in kinds.items()]
    for group, name in zip(groups, kinds, strict=True):
        group["format"] = FORMATS[name][0]["format"]
    groups[1:] = groups[:0:-1]
    config = dict(quant_method="compressed-tensors", format="mixed-precision")
    config["config_groups"] = {f"group_{i}": group for i, group in enumerate(groups)}
    form, notes = packed_format(config)
    assert not notes and form.suffixes >= {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_g_idx"}
    for module, name in {
        "model.layers.1.self_attn.q_proj": "packed",
        "model.layers.0.mlp.down_proj": "integers",
        "model.layers.1.mlp.down_proj": "packed bytes",
    }.items():
        parts, weight = written(name, 48, 64, torch.Generator().manual_seed(5))
        assert torch.equal(dequantize(form.of(module).weight(module, parts), torch.device("cpu")), weight), module
    config["config_groups"].pop("group_0")
    with pytest.raises(ValueError, match="a.b: quantised, but no group of config_groups names it"):
        packed_format(config)[0].of("a.b")


def test_what_the_user_is_told():
    assert packed_format(compressed())[1] == []
    asymmetric = dict(num_bits=8, dynamic=True, symmetric=False)
    (note,) = packed_format(compressed("int-quantized", num_bits=8, activations=asymmetric))[1]
    assert "activations are not quantised" in note
    (note, _) = packed_format(
        compressed("float-quantized", **FP8, strategy="tensor") | dict(kv_cache_scheme={"num_bits": 8})
    )[1]
    assert "scales of a float8 KV cache: kv_cache_dtype='fp8'" in note


def test_a_layer_without_all_of_its_tensors_is_refused_before_any_reading(tmp_path):
    save_quantised(tmp_path, "gptq")
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop("model.layers.1.mlp.up_proj.scales", None)
        save_file(tensors, file)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.scales"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"model-\d\.safetensors: model\.layers\.1\.mlp\.up_proj\.scales: missing from the"
    ):
        open_checkpoint(tmp_path)


def test_a_bias_that_is_none(tmp_path):
    """Zeros where the configuration has no bias are left out; anything else has no place."""
    parts, _ = written("gptq", 48, 64, torch.Generator().manual_seed(6))
    content = CONFIG.to_dict() | dict(architectures=["LlamaForCausalLM"], quantization_config=FORMATS["gptq"][0])
    (tmp_path / "config.json").write_text(json.dumps(content))
    for bias in (torch.zeros(48), torch.ones(48)):
        tensors = {f"a.mlp.b.{suffix}": part for suffix, part in parts.items()} | {"a.mlp.b.bias": bias}
        save_file(tensors, tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.index.keys() == {"a.mlp.b.weight"}
        if not bias.any():
            assert dict(checkpoint.tensors()).keys() == {"a.mlp.b.weight"}
        else:
            with pytest.raises(ValueError, match=r"model\.safetensors: a\.mlp\.b\.bias: not zero"):
                list(checkpoint.tensors())
