"""GGUF to safetensors and back: the same bits, or one line that says what has no equal."""

import json
from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from quantised_models import VOCABULARY, save_gguf, save_quantised
from safetensors.torch import load_file, save_file
from tiny_models import save_bpe_tokenizer, save_tiny_llama, save_tiny_mixtral
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from octavo.engine import LLM, SamplingParams, cli
from octavo.engine.checkpoint import Int4Weight, Int8Weight, open_checkpoint
from octavo.engine.convert import convert
from octavo.engine.gguf_tokenizer import tokenizer_metadata
from octavo.engine.gguf_writer import encode
from octavo.engine.hub import resolve
from octavo.engine.tokenizer import Tokenizer

TEXT = "The sea is wide; it's 1234 miles.\n  Über uns 海 only sky 😀."


@pytest.fixture
def folder(request, tmp_path):
    dtype, more = getattr(request, "param", (torch.bfloat16, {}))
    bos, eos = save_bpe_tokenizer(tmp_path / "model", VOCABULARY)
    save_tiny = save_tiny_mixtral if "num_local_experts" in more else save_tiny_llama
    save_tiny(tmp_path / "model", dtype, vocab_size=VOCABULARY, bos_token_id=bos, eos_token_id=eos, **more)
    save_bpe_tokenizer(tmp_path / "model", VOCABULARY)
    return tmp_path / "model"


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
LLAMA3["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize(
    "folder",
    [
        (torch.bfloat16, {}),
        (torch.float16, dict(tie_word_embeddings=True)),
        (torch.float32, dict(attention_bias=True)),
        (torch.bfloat16, dict(rope_parameters=LLAMA3, head_dim=64)),
        (torch.bfloat16, dict(num_local_experts=12, sliding_window=64)),
    ],
    ids=["bf16", "fp16 tied", "fp32 with biases", "llama3 scaling", "experts"],
    indirect=True,
)
def test_safetensors_to_gguf_and_back(folder, tmp_path):
    convert(folder, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    made = [LLM(str(path), device="cpu") for path in (folder, tmp_path / "m.gguf", tmp_path / "back")]
    params = SamplingParams(max_tokens=8, temperature=0)
    first, *others = (
        [
            (c.prompt_token_ids, c.token_ids, c.text)
            for c in (llm.generate(TEXT, params)[0], llm.chat([{"role": "user", "content": TEXT}], params))
        ]
        for llm in made
    )
    assert all(other == first for other in others), "tokens in, tokens out, text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "m.gguf", "model"], "nothing is left over"


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q8_0], ids=lambda kind: kind.name)
def test_gguf_to_safetensors_and_back(kind, tmp_path):
    model = save_gguf(tmp_path / "m.gguf", kind)
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    for name, weight in open_checkpoint(tmp_path / "folder").tensors():
        wanted = {Type.Q4_0: Int4Weight, Type.Q8_0: Int8Weight}.get(kind, torch.Tensor)
        assert type(weight) is (torch.Tensor if "norm" in name else wanted)
    if kind not in (Type.Q4_0, Type.Q8_0):
        peer = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).state_dict()
        assert all(torch.equal(peer[name], tensor) for name, tensor in model.state_dict().items())
    convert(tmp_path / "folder", tmp_path / "back.gguf")
    before, after = ({t.name: t for t in gguf.GGUFReader(tmp_path / file).tensors} for file in ("m.gguf", "back.gguf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        other = after[name]
        assert (other.tensor_type, other.shape.tolist()) == (tensor.tensor_type, tensor.shape.tolist())
        assert other.data.tobytes() == tensor.data.tobytes(), name


def test_packed_safetensors_become_blocks(tmp_path):
    """Of compressed-tensors, and as the library itself reads what comes back."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    save_gguf(tmp_path / "m.gguf", Type.Q4_0)
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    module = "model.layers.1.mlp.up_proj"
    parts = {name.removeprefix(f"{module}."): t for name, t in stored.items() if name.startswith(module)}
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    weight = dict(open_checkpoint(tmp_path / "m.gguf").tensors())[f"{module}.weight"]
    expected = (weight.q.float() - 8) * weight.scale.float().repeat_interleave(32, 1)
    torch.testing.assert_close(read.float(), expected, rtol=1e-3, atol=0)  # its product is rounded to fp16


def test_smollm2_has_no_equal(tmp_path):
    with pytest.raises(
        ValueError, match=r"\.gguf: .*type Q4_1 has no equal in safetensors; convertible without loss: F32"
    ):
        convert(resolve("smollm2"), tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gptq act-order", r"k_proj\.weight: act-order \(g_idx\) has no equal in a GGUF"),
        ("gptq asymmetric", r"proj\.weight: its zero point times scale \(torch\.float32\) is not exact in fp16"),
        ("fp8", r"proj\.weight: fp8 has no equal in a GGUF"),
    ],
)
def test_layers_without_an_equal_are_named(name, message, tmp_path):
    (tmp_path / "model").mkdir()
    save_quantised(tmp_path / "model", name)
    save_bpe_tokenizer(tmp_path / "model", VOCABULARY)
    with pytest.raises(ValueError, match=rf"model-\d\.safetensors: model\.layers\.\d\..*{message}"):
        convert(tmp_path / "model", tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("folder", [(torch.float32, dict(num_local_experts=3))], ids=["experts"], indirect=True)
def test_experts_without_an_equal_are_named(folder, tmp_path):
    at, tensors = "model.layers.1.block_sparse_moe.experts", load_file(folder / "model.safetensors")
    tensors[f"{at}.2.w3.weight"] = tensors[f"{at}.2.w3.weight"].half()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{at}\.0\.w3\.weight becomes F32, {at}\.2\.w3\.weight F16: convertible"):
        convert(folder, tmp_path / "m.gguf")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, save_original_format=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.\w+_proj: a tensor that has no name in a GGUF"):
        convert(folder, tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "nothing is left over"


def test_a_folder_that_does_not_fit_its_configuration(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(intermediate_size=95)))
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.0\.mlp.*shape .*says"):
        convert(folder, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_become_blocks(group):
    """q · scale + minimum, block by block as the gguf package reads them."""
    scale = torch.rand(6, 256 // group).half()
    q = torch.randint(0, 16, (6, 256), dtype=torch.uint8)
    wide = scale.float().repeat_interleave(group, 1)
    minimum = -2 * scale.float()  # a power of two times fp16: exact
    cases = [
        ("Q4_0", Int4Weight(q, scale, None, group), (q.float() - 8) * wide),
        ("Q4_0", Int4Weight(q, scale, -8 * scale, group), (q.float() - 8) * wide),
        ("Q4_1", Int4Weight(q, scale, minimum, group), (q.float() - 2) * wide),
        ("Q8_0", Int8Weight((q.int() - 100).to(torch.int8), scale, group), (q.float() - 100) * wide),
    ]
    for kind, weight, expected in cases:
        name, rows = encode("model.layers.0.mlp.up_proj.weight", weight, None)
        assert name == kind
        assert torch.equal(torch.from_numpy(gguf.quants.dequantize(rows, Type[name])), expected)


def test_what_is_not_exact_is_refused(folder):
    config = open_checkpoint(folder).config
    q, name = torch.zeros(4, 64, dtype=torch.uint8), "model.layers.0.mlp.up_proj.weight"
    scale = torch.full((4, 2), 0.1)
    with pytest.raises(ValueError, match=r"its scale \(torch.float32\) is not exact in fp16"):
        encode(name, Int4Weight(q, scale, None, 32), config)
    with pytest.raises(ValueError, match="a scale that Q4_0 has no room for"):
        encode(name, Int4Weight(q, torch.full((4, 2), 9000.0).half(), None, 32), config)
    with pytest.raises(ValueError, match="groups of 16"):
        encode(name, Int8Weight(q.to(torch.int8), scale.half().repeat(1, 2), 16), config)
    with pytest.raises(ValueError, match="float64 has no equal"):
        encode(name, torch.ones(4, 4).double(), config)


def test_configurations_without_an_equal_are_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e4)), "rope_scaling: 'yarn'; convertible"),
        (dict(eos_token_id=[1, 2, 3, 4]), "eos_token_id 4 has no place in the other format"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / "m.gguf")
        assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_tokenizers_without_an_equal_are_named(tmp_path):
    save_tiny_llama(tmp_path / "words")
    with pytest.raises(ValueError, match="words: tokenizer: of type WordLevel; convertible to a GGUF: BPE"):
        convert(tmp_path / "words", tmp_path / "m.gguf")


def test_a_real_tokenizer_gets_the_keys_that_llama_cpp_gave_it():
    checkpoint = open_checkpoint(resolve("smollm2"))
    made, real = tokenizer_metadata(checkpoint.tokenizer(), checkpoint.config), checkpoint.metadata
    for name in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert made[f"tokenizer.ggml.{name}"] == real.get(f"tokenizer.ggml.{name}", False), name
    assert made["tokenizer.chat_template"] == real["tokenizer.chat_template"]


def test_a_sentencepiece_tokenizer():
    """Tokens, bytes and scores as Llama 2's have them: the merges come back in the same order."""
    words = ["▁the", "▁sea", "▁and", "he", "▁t", "▁s", "ea", "an", "nd", "▁a", "▁", *"theseadn.,0123456789"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *dict.fromkeys(words)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    config = replace(open_checkpoint(resolve("smollm2")).config, vocab_size=len(tokens), bos_token_id=1)
    made = tokenizer_metadata(tokenizer, replace(config, eos_token_ids=(2,)))
    for name in ("tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert made[f"tokenizer.ggml.{name}"] == metadata[f"tokenizer.ggml.{name}"], name
    text = "the sea and the sand, then 1234 ünïcödé 海 </s> ease"
    ids = Tokenizer.from_gguf(made).encode(text)
    assert ids == tokenizer.encode(text) and ids[0] == 1 and len(ids) < len(text)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("absent.gguf", "folder", "absent.gguf: no such file"),
        ("model", "folder", "expected a .gguf file and a folder"),
        ("model", "m.gguf", "m.gguf: exists"),
    ],
)
def test_mistakes(folder, tmp_path, source, target, message):
    (tmp_path / "m.gguf").write_text("mine")
    done = CliRunner().invoke(cli.app, ["convert", str(tmp_path / source), str(tmp_path / target)])
    assert message in str(done.exception)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_the_command(folder, tmp_path):
    done = CliRunner().invoke(cli.app, ["convert", str(folder), str(tmp_path / "m.gguf")])
    assert done.exit_code == 0 and (tmp_path / "m.gguf").is_file()
    assert open_checkpoint(tmp_path / "m.gguf").config.vocab_size == VOCABULARY


def test_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("octavo.engine.convert.SHARD_BYTES", 20_000)
    convert(folder, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    expected = load_file(folder / "model.safetensors")
    read = dict(open_checkpoint(tmp_path / "back").tensors())
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)
