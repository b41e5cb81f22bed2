import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.engine.checkpoint import open_checkpoint


def tiny(tied=False):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(params=["one file", "shards"])
def folder(request, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="8KB" if request.param == "shards" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (request.param == "shards")
    return tmp_path, model.state_dict()


def test_every_tensor(folder):
    path, expected = folder
    checkpoint = open_checkpoint(path)
    read = dict(checkpoint.tensors())
    assert read.keys() == expected.keys()
    for name, weight in read.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]), name
    assert checkpoint.num_bytes == sum(t.numel() * 2 for t in expected.values())
    assert {name: at.shape for name, at in checkpoint.index.items()} == {n: t.shape for n, t in expected.items()}
    assert checkpoint.config.dtype == torch.bfloat16 and checkpoint.notes == []


def test_tensors_are_read_one_at_a_time(folder):
    path, _ = folder
    stream = open_checkpoint(str(path)).tensors()
    first, second = next(stream), next(stream)
    assert first[0] != second[0]


def test_a_tied_head_is_not_stored(tmp_path):
    tiny(tied=True).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings and "lm_head.weight" not in dict(checkpoint.tensors())


def test_the_generation_config_counts(folder):
    path, _ = folder
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 33]}')
    assert open_checkpoint(path).config.eos_token_ids == (2, 33)


def test_cut_off_files_are_refused_before_any_reading(folder):
    path, _ = folder
    last = sorted(path.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    for size in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        last.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut off or broken") as error:
            open_checkpoint(path)
        assert str(last) in str(error.value)


@pytest.fixture
def shards(tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size="8KB")
    return tmp_path, json.loads((tmp_path / "model.safetensors.index.json").read_text())


def test_a_missing_shard_is_named(shards):
    path, index = shards
    missing = index["weight_map"]["model.norm.weight"]
    (path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing}: missing, but model.safetensors.index.json says"):
        open_checkpoint(path)


def test_a_tensor_that_is_not_in_its_shard_is_named(shards):
    path, index = shards
    index["weight_map"]["model.layers.7.extra.weight"] = index["weight_map"]["model.norm.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.7\.extra\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(shards, content):
    path, _ = shards
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (not valid JSON|expected|weight_map)"):
        open_checkpoint(path)


@pytest.fixture(params=["one pickle", "pickled shards"])
def pickled(request, folder):
    """A folder with the same weights, pickled; only the library's older versions write them."""
    path, expected = folder
    for file in path.glob("model*safetensors*"):
        file.unlink()
    if request.param == "one pickle":
        torch.save(expected, path / "pytorch_model.bin")
    else:
        names = sorted(expected)
        parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, of in parts.items():
            torch.save({name: expected[name].clone() for name in of}, path / file)
        index = {"weight_map": {name: file for file, of in parts.items() for name in of}}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path, expected


def test_pickles_are_read_where_they_are_asked_for(pickled):
    path, expected = pickled
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model.*save_pretrained.*--allow-pickle"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, allow_pickle=True)
    read = dict(checkpoint.tensors())
    assert read.keys() == expected.keys() == checkpoint.index.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)


def test_safetensors_go_before_pickles(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert dict(open_checkpoint(tmp_path, allow_pickle=True).tensors())


def test_a_dtype_that_no_format_explains_is_refused(tmp_path):
    """Codes without a quantization_config are no weights."""
    model = tiny()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        weights = {n: t.clone() for n, t in model.state_dict().items()}
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 32).to(dtype)
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(
            ValueError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight: dtype"
        ) as error:
            open_checkpoint(tmp_path)
        assert "supported: bfloat16" in str(error.value)


def test_a_folder_without_weights(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"give its file, .*some\.gguf"):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"weights\.bin: expected a folder"):
        open_checkpoint(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "expected a JSON object"), ("{}", "architectures: None; supported")],
)
def test_a_broken_configuration_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        open_checkpoint(tmp_path)
