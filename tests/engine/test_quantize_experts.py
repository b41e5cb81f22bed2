"""`octavo quantize` of a mixture of experts: what it writes, and that each expert is calibrated on its own tokens."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tiny_models import TINY, from_config, save_tokenizer, tiny_mixtral
from typer.testing import CliRunner

from octavo.engine import LLM, cli
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.experts import ExpertLoop, StackedExperts
from octavo.engine.layers import dequantize
from octavo.engine.quantize import Settings, quantize
from octavo.engine.quantize import layer as quantize_layer
from octavo.engine.quantize.forward import Forward, Stream
from octavo.engine.quantize.mixture import Routed
from octavo.engine.quantize.rounding import round_to_nearest
from octavo.engine.quantize.writer import Folder
from octavo.testing import without_interpreter

SIZES = TINY | dict(hidden_size=128, intermediate_size=128, num_key_value_heads=4, initializer_range=0.06)
SHORT = dict(calibration_tokens=300, sequence_length=60)
SETTINGS = {
    "int4 rtn": Settings("int4", method="rtn", group_size=64),
    "int4": Settings("int4", group_size=32, **SHORT),
    "int8": Settings("int8", **SHORT),
    "int8 alone": Settings("int8", weights_only=("experts",), **SHORT),
    "fp8": Settings("fp8", method="rtn"),
    "fp8-block": Settings("fp8-block", **SHORT),
}
CPU = torch.device("cpu")
MODULES = [f"block_sparse_moe.experts.{e}.{w}" for e in range(4) for w in ("w1", "w3", "w2")]


def text(seed, words=400):
    """Some words are much more frequent, so that some experts see few tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY["vocab_size"], (words,), generator=generator) ** 3 // TINY["vocab_size"] ** 2
    return " ".join(f"w{i}" for i in ids.tolist())


@pytest.fixture(scope="module")
def model():
    return tiny_mixtral(**SIZES)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    model.save_pretrained(folder)
    save_tokenizer(folder, TINY["vocab_size"])
    return folder


def quantised_to(source, target, settings, **options):
    with without_interpreter():
        return quantize(str(source), target, settings, calibration=text(1), device="cpu", **options)


@pytest.fixture(scope="module", params=SETTINGS)
def quantised(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "model"
    return request.param, folder, quantised_to(source, folder, SETTINGS[request.param], evaluation=text(2))


def test_what_is_written_is_read(quantised, source):
    """Routers, and norms of which no scale was taken, are as they were; compressed-tensors reads the same weights."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    name, folder, report = quantised
    read, before = (dict(open_checkpoint(path).tensors()) for path in (folder, source))
    assert read.keys() == before.keys()
    for key in before:
        if key.endswith((".gate.weight", "post_attention_layernorm.weight", "embed_tokens.weight")):
            assert torch.equal(read[key], before[key]), key
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [f"model.layers.{i}.block_sparse_moe.gate" for i in range(2)] == content["ignore"][1:]
    config = QuantizationConfig.model_validate(content)
    tensors = load_file(folder / "model.safetensors")
    form = "pack-quantized" if "alone" in name or "int4" in name else config.format
    compressor = BaseCompressor.get_value_from_registry(form)
    group = config.config_groups["group_1" if "alone" in name else "group_0"]
    for module in MODULES:
        at = f"model.layers.1.{module}"
        parts = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.rpartition(".")[0] == at}
        peer = compressor.decompress(parts, group)["weight"]
        assert torch.equal(peer.float(), dequantize(read[f"{at}.weight"], CPU)), at
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.25 if "int4" in name else 0.05)


def test_it_is_served(quantised):
    name, folder, report = quantised
    with without_interpreter():
        llm = LLM(str(folder), device="cpu", dtype=torch.float32)
        ids = llm.tokenizer.encode(text(2))[:60]
        logits = torch.cat(list(llm.prompt_logits(ids, 30)))
        loss = F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp().item()
    assert isinstance(llm.model.layers[0].mlp.experts, StackedExperts if name in ("int8", "fp8") else ExpertLoop)
    assert loss == pytest.approx(report.perplexity_after, rel=0.2)  # of the first of many tokens


def test_each_weight_is_reported(quantised, source):
    """With the error that it has, and with the tokens that its expert saw, two experts for each token."""
    name, folder, report = quantised
    rows = {row["name"]: row for row in report.layers if ".experts." in row["name"]}
    assert list(rows) == [f"model.layers.{i}.{module}.weight" for i in range(2) for module in MODULES]
    read, before = (dict(open_checkpoint(path).tensors()) for path in (folder, source))
    for key, row in rows.items():
        assert 0 < row["error"] < (0.2 if "int4" in name else 0.05), key
        if not SETTINGS[name].smooths:
            error = dequantize(read[key], CPU) - before[key]
            assert row["error"] == pytest.approx((error.norm() / before[key].norm()).item(), rel=1e-4), key
        assert ("tokens" in row) == SETTINGS[name].calibrates
        if SETTINGS[name].uses_gptq:
            assert ("rounded" in row) == (row["tokens"] < 128) == ("output_error" not in row), key
    if SETTINGS[name].calibrates:
        for i in range(2):
            assert sum(rows[f"model.layers.{i}.{module}.weight"]["tokens"] for module in MODULES[::3]) == 2 * 300
        assert any("rounded" in row for row in rows.values()) and not all("rounded" in row for row in rows.values())


def test_experts_of_few_tokens_are_rounded_to_nearest(source, tmp_path, monkeypatch):
    settings = SETTINGS["int4"]
    monkeypatch.setattr(quantize_layer, "FEW", 10**6)
    report = quantised_to(source, tmp_path / "model", settings)
    read, before = (dict(open_checkpoint(path).tensors()) for path in (tmp_path / "model", source))
    assert sum("rounded" in row for row in report.layers) == 2 * len(MODULES)
    for i in range(2):
        for module in MODULES:
            key = f"model.layers.{i}.{module}.weight"
            q, scale = round_to_nearest(before[key], settings, torch.float32)
            assert torch.equal(read[key].q.int() - 8, q.int()) and torch.equal(read[key].scale, scale)


def test_calibration_makes_the_outputs_better(model, source, tmp_path):
    """Of the text that it was calibrated on: each expert's first product, of the tokens that transformers sends it."""
    errors = {}
    for method in ("gptq", "rtn"):
        quantised_to(source, tmp_path / method, Settings("int4", method, group_size=32, **SHORT))
    inputs = {}
    block = model.model.layers[0].mlp
    hook = block.gate.register_forward_hook(lambda _, args, out: inputs.update(x=args[0].view(-1, 128), ids=out[2]))
    with torch.inference_mode():
        ids = torch.tensor([int(word[1:]) for word in text(1).split()][:300]).view(5, 60)
        model(ids)
    hook.remove()
    for method in ("gptq", "rtn"):
        read = dict(open_checkpoint(tmp_path / method).tensors())
        for e in range(4):
            x = inputs["x"][(inputs["ids"] == e).any(1)]
            if len(x) >= 128:
                key = f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight"
                weight = block.experts.gate_up_proj[e][:128]
                errors[method, e] = (x @ (dequantize(read[key], CPU) - weight).t()).norm() / (x @ weight.t()).norm()
    assert len(errors) >= 4
    assert all(errors["gptq", e] < 0.95 * errors["rtn", e] for method, e in errors if method == "gptq"), errors


def test_the_tokens_of_an_expert_are_those_that_transformers_sends_it(model, source):
    config = open_checkpoint(source).config
    embedding, layer = model.model.embed_tokens.weight.data, model.model.layers[0]
    sequences = [list(range(20)), list(range(30, 60))]
    with without_interpreter():
        stream = Stream(sequences, embedding, CPU)
        norm, router = layer.post_attention_layernorm.weight.data, layer.mlp.gate.weight.data
        routed = Routed(Forward(config, CPU, 30), stream, norm, router)
        seen = {e: list(routed.inputs(e)) for e in range(4)}
    x = [layer.post_attention_layernorm(embedding[ids]) for ids in sequences]
    chosen = [layer.mlp.gate(of)[2] for of in x]
    for e in range(4):
        expected = [of[(ids == e).any(1)] for of, ids in zip(x, chosen, strict=True)]
        torch.testing.assert_close(torch.cat(seen[e]), torch.cat(expected))
        assert routed.count(e) == sum(map(len, expected))


def test_the_other_layout_of_transformers_gives_the_same(source, tmp_path):
    tiny_mixtral(**SIZES).save_pretrained(tmp_path / "stacked", save_original_format=False)
    save_tokenizer(tmp_path / "stacked", TINY["vocab_size"])
    for folder in (source, tmp_path / "stacked"):
        quantised_to(folder, tmp_path / f"{folder.name}-made", SETTINGS["int4 rtn"])
    made = [load_file(tmp_path / f"{name}-made" / "model.safetensors") for name in (source.name, "stacked")]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_an_interrupted_run_goes_on_to_the_same_bits(source, tmp_path, monkeypatch):
    write = Folder.write

    def until_the_last(self, name, tensors, report):
        if name == "model.layers.1":
            raise KeyboardInterrupt
        write(self, name, tensors, report)

    whole, target = tmp_path / "whole", tmp_path / "made"
    quantised_to(source, whole, SETTINGS["int8"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "write", until_the_last)
        quantised_to(source, target, SETTINGS["int8"])
    quantised_to(source, target, SETTINGS["int8"])
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_experts_that_are_kept(source, tmp_path):
    """Gate and up of one together, as of dense models."""
    report = quantised_to(source, tmp_path / "model", Settings("int4", "rtn", group_size=32, keep=("experts.1.w3",)))
    kept = [f"model.layers.{i}.block_sparse_moe.experts.1.{w}" for i in range(2) for w in ("w1", "w3")]
    assert [row["name"] for row in report.layers if "kept" in row] == [f"{name}.weight" for name in kept]
    ignored = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]["ignore"]
    assert ignored[-4:] == kept
    tensors, before = load_file(tmp_path / "model/model.safetensors"), load_file(source / "model.safetensors")
    assert all(torch.equal(tensors[f"{name}.weight"], before[f"{name}.weight"]) for name in kept)


def test_the_command_tells_of_experts_that_saw_few_tokens(source, tmp_path):
    (tmp_path / "calibration.txt").write_text(text(1))
    target, options = tmp_path / "model", ["--scheme", "int4", "--group-size", "32", "--evaluation", "none"]
    calibration = ["--calibration", str(tmp_path / "calibration.txt"), "--device", "cpu"]
    with without_interpreter():
        done = CliRunner().invoke(cli.app, ["quantize", str(source), str(target), *options, *calibration])
    assert done.exit_code == 0, done.output
    rows = json.loads((target / "quantize_report.json").read_text())["layers"]
    few = sum("rounded" in row for row in rows)
    assert few and f"{few} weights of experts that saw fewer than 128 tokens rounded to nearest" in done.output
    assert "experts.*.w2" in done.output and "experts.0" not in done.output


def test_what_does_not_fit_is_named(tmp_path):
    for config, settings, message in (
        (
            tiny_mixtral(intermediate_size=96),
            Settings("int4", "rtn", group_size=64),
            r"experts\.0\.w2\.weight: choose 32",
        ),
        (tiny_mixtral(), Settings("fp8-block", "rtn"), r"model\.layers\.0\.self_attn\.q_proj\.weight has 64 outputs"),
        (
            from_config(transformers.Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2)),
            Settings("int8", "rtn"),
            "architecture: Qwen3MoeForCausalLM; octavo quantize takes dense models and Mixtral",
        ),
    ):
        folder = tmp_path / settings.scheme
        config.save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            quantize(str(folder), tmp_path / "made", settings)
        assert not (tmp_path / "made").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_on_a_gpu(name, source, tmp_path):
    options = dict(calibration=text(1), evaluation=text(2), device="cuda")
    report = quantize(str(source), tmp_path / "model", SETTINGS[name], **options)
    assert report.perplexity_after == pytest.approx(report.perplexity_before, rel=0.25 if "int4" in name else 0.05)
    llm = LLM(str(tmp_path / "model"), device="cuda", dtype=torch.bfloat16)
    assert isinstance(llm.model.layers[0].mlp.experts, StackedExperts)
    ids = llm.tokenizer.encode(text(2))[:60]
    logits = torch.cat(list(llm.prompt_logits(ids, 30))).cpu()
    loss = F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp().item()
    assert loss == pytest.approx(report.perplexity_after, rel=0.2)  # of the first of many tokens
