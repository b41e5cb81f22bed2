"""A mixture of experts in the engine: layouts of checkpoints, formats of experts, and what is refused by name.

Whole Mixtrals are compared with transformers' in test_parity.py and, in every format, in test_formats.py.
"""

import json
from dataclasses import replace

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from quantised_models import GGUF_MIXTRAL, MIXTRAL, save_gguf, save_quantised
from safetensors.torch import load_file, save_file
from tiny_models import released, save_tiny_mixtral, save_tokenizer, tiny_mixtral

from octavo.engine import LLM, SamplingParams
from octavo.engine import experts as experts_of_models
from octavo.engine.checkpoint import Activations, Fp8Weight, Int4Weight, Int8Weight, open_checkpoint
from octavo.engine.config import ModelConfig
from octavo.engine.convert import convert
from octavo.engine.experts import ExpertLoader, ExpertLoop, MixtureOfExperts, StackedExperts
from octavo.engine.gguf_file import GgufTensor, _by_expert, _hugging_face_name
from octavo.engine.gguf_writer import gguf_name
from octavo.engine.layers import dequantize
from octavo.engine.loader import load_model
from octavo.testing import assert_accurate

CPU, F32 = torch.device("cpu"), torch.float32
LAYER = "model.layers.1.block_sparse_moe"


def load(path):
    return load_model(open_checkpoint(path), CPU, F32, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    save_tiny_mixtral(path)
    return path


def changed(folder, target, change):
    """The checkpoint with other tensors: `change` takes their dictionary and alters it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_tokenizer(target, 64)
    return target


def test_both_layouts_of_transformers_give_the_same_model(folder, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in open_checkpoint(tmp_path).index
    assert f"{LAYER}.experts.3.w2.weight" in open_checkpoint(folder).index
    weights = released(tiny_mixtral())
    for ours, theirs in zip(load(folder).layers, load(tmp_path).layers, strict=True):
        assert isinstance(ours.mlp, MixtureOfExperts) and isinstance(ours.mlp.experts, StackedExperts)
        for name in ("w1", "w2"):
            assert torch.equal(getattr(ours.mlp.experts, name), getattr(theirs.mlp.experts, name))
        assert torch.equal(ours.mlp.router.weight, theirs.mlp.router.weight)
    gate, up = ours.mlp.experts.w1[2].chunk(2)
    assert torch.equal(gate, weights[f"{LAYER}.experts.2.w1.weight"])
    assert torch.equal(up, weights[f"{LAYER}.experts.2.w3.weight"])
    assert torch.equal(ours.mlp.experts.w2[2], weights[f"{LAYER}.experts.2.w2.weight"])


def test_one_tensor_an_expert_as_in_early_ggufs(tmp_path):
    for name in ("new", "old"):
        torch.manual_seed(0)
        save_gguf(tmp_path / f"{name}.gguf", Type.Q8_0, GGUF_MIXTRAL, stacked=name == "new")
    new, old = (open_checkpoint(tmp_path / f"{name}.gguf") for name in ("new", "old"))
    assert f"{LAYER}.experts.3.w1.weight" in new.index and new.index.keys() == old.index.keys()
    assert new.num_bytes == old.num_bytes
    theirs = dict(old.tensors())
    for name, weight in new.tensors():
        assert torch.equal(dequantize(weight, CPU), dequantize(theirs[name], CPU)), name


def test_a_quantised_gguf_becomes_a_folder_and_a_gguf_again(tmp_path):
    save_gguf(tmp_path / "m.gguf", Type.Q4_0, GGUF_MIXTRAL)
    convert(tmp_path / "m.gguf", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.gguf")
    config = open_checkpoint(tmp_path / "folder").config
    assert config.architecture == "MixtralForCausalLM"
    assert (config.num_local_experts, config.num_experts_per_tok) == (4, 2)
    back = open_checkpoint(tmp_path / "back.gguf")
    assert back.config == open_checkpoint(tmp_path / "m.gguf").config
    for made in (dict(open_checkpoint(tmp_path / "folder").tensors()), dict(back.tensors())):
        for name, weight in open_checkpoint(tmp_path / "m.gguf").tensors():
            assert torch.equal(dequantize(weight, CPU), dequantize(made[name], CPU)), name
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "back.gguf").tensors}
    assert "blk.1.ffn_gate_exps.weight" in names and "blk.1.ffn_gate_inp.weight" in names


def test_the_names_in_a_gguf_are_those_that_llama_cpp_gives():
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for module in ("gate", "experts.w1", "experts.w2", "experts.w3"):
        name = theirs.get_name(f"{LAYER}.{module}")
        if module == "gate":
            assert gguf_name(f"{LAYER}.gate.weight") == f"{name}.weight"
            continue
        stacked = GgufTensor(f"{name}.weight", (2, 32, 64), Type.F16, 0, 2 * 32 * 64 * 2)
        read = [_hugging_face_name(part.name) for part in _by_expert(stacked)]
        assert read == [f"{LAYER}.{module.replace('.', f'.{e}.')}.weight" for e in range(2)]


CONFIG_OF_ALL = {k: v for k, v in MIXTRAL.to_diff_dict().items() if k not in ("model_type", "transformers_version")}
QWEN = transformers.Qwen3MoeConfig(
    **CONFIG_OF_ALL | dict(num_local_experts=5, num_experts_per_tok=3, moe_intermediate_size=64, norm_topk_prob=True)
)


QWEN2 = transformers.Qwen2MoeConfig(
    **{k: v for k, v in CONFIG_OF_ALL.items() if k != "num_local_experts"}
    | dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=64, shared_expert_intermediate_size=96)
)


@pytest.mark.parametrize(
    ("name", "config"),
    [("gptq", QWEN), ("awq", QWEN), ("packed", QWEN), ("float8", QWEN), ("gptq", QWEN2), ("float8", QWEN2)],
)
def test_quantised_experts_of_qwen(tmp_path, name, config):
    model, ids = save_quantised(tmp_path, name, config=config), torch.arange(3, 27)[None]
    with torch.inference_mode():
        plain = model(ids).logits[0]
        exact = model.double()(ids).logits[0]
    llm = LLM(str(tmp_path), device="cpu", dtype=F32)
    assert isinstance(llm.model.layers[0].mlp.experts, StackedExperts if name == "float8" else ExpertLoop)
    assert_accurate(torch.cat(list(llm.prompt_logits(ids[0].tolist(), 7))), exact, plain)


def test_generates_what_transformers_does(folder):
    """With prompts of several lengths in a batch, so that experts see rows of all of them."""
    model, llm = tiny_mixtral(), LLM(str(folder), device="cpu", max_num_batched_tokens=16)
    prompts = [list(range(3, 3 + n)) for n in (1, 30, 7)]
    done = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0.0))
    for prompt, completion in zip(prompts, done, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert list(completion.token_ids) == expected.tolist()


@pytest.mark.parametrize("name", ["experts.2.w3.weight", "experts.3.w2.weight", "gate.weight"])
def test_a_missing_tensor_is_named(folder, tmp_path, name):
    made = changed(folder, tmp_path, lambda tensors: tensors.pop(f"{LAYER}.{name}"))
    with pytest.raises(ValueError, match=rf"{tmp_path}: {LAYER}\.{name}: missing from the checkpoint$"):
        load(made)


def test_a_missing_shard_is_named_with_what_it_holds(tmp_path):
    save_tiny_mixtral(tmp_path)
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "model.safetensors"), "a.safetensors")}
    index["weight_map"][f"{LAYER}.experts.2.w3.weight"] = "b.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=rf"b\.safetensors: missing, .* {LAYER}\.experts\.2\.w3\.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("experts.4.w1.weight", (96, 64), "unexpected tensor"),
        ("experts.1.w2.weight", (64, 95), r"shape \(64, 95\); the configuration says \(64, 96\)"),
        ("gate.weight", (5, 64), r"shape \(5, 64\); the configuration says \(4, 64\)"),
        ("experts.1.w2.bias", (64,), "unexpected tensor"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, name, shape, message):
    made = changed(folder, tmp_path, lambda tensors: tensors.update({f"{LAYER}.{name}": torch.zeros(shape)}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {LAYER}\.{name}: {message}"):
        load(made)


def test_missing_parts_of_a_quantised_expert_are_named(tmp_path):
    save_quantised(tmp_path, "gptq", config=MIXTRAL)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop(f"{LAYER}.experts.0.w1.scales", None)
        save_file(tensors, file)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"].pop(f"{LAYER}.experts.0.w1.scales")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"safetensors: {LAYER}\.experts\.0\.w1\.scales: missing"):
        load(tmp_path)


def test_experts_of_a_gguf_are_three_dimensional(tmp_path):
    save_gguf(tmp_path / "m.gguf", Type.F16, GGUF_MIXTRAL)
    content = (tmp_path / "m.gguf").read_bytes()
    experts, other = b"blk.0.ffn_up_exps.weight", b"blk.0.attn_output.weight"  # of the same length
    content = content.replace(experts, other.upper()).replace(other, experts).replace(other.upper(), other)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf: blk\.0\.ffn_up_exps\.weight: shape \(256, 256\); expected three"):
        open_checkpoint(tmp_path / "m.gguf")


CONFIG = ModelConfig.from_hf(
    dict(
        architectures=["MixtralForCausalLM"],
        vocab_size=8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
)


def int4(n, k):
    q, scale = torch.randint(0, 16, (n, k), dtype=torch.uint8), torch.rand(n, k // 32) * 0.02
    return Int4Weight(q, scale, None)


def q4_0(n, k):
    weight = int4(n, k)
    return replace(weight, minimum=-8 * weight.scale)


def int4_with_zeros(n, k):
    weight = int4(n, k)
    return replace(weight, minimum=-torch.randint(0, 16, weight.scale.shape) * weight.scale)


def int4_act_order(n, k):
    return replace(int4(n, k), order=torch.randperm(k, generator=torch.Generator().manual_seed(k)))


def int8(n, k):
    return Int8Weight(torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n, k // 32) * 1e-3)


def int8_channels(n, k):
    return Int8Weight(torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n, 1) * 1e-3, k)


def w8a8(n, k):
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return Int8Weight(q, torch.rand(n, 1) * 1e-3, k, Activations("token"))


def w8a8_fp8(n, k):
    scale = torch.rand(n, 1) * 0.1 if k == 64 else torch.full((1, 1), 0.1)  # an output, or one for all
    q = torch.randn(n, k).to(torch.float8_e4m3fn)
    return Fp8Weight(q, scale, (1 if k == 64 else n, k), Activations("token"))


def w8a8_static(n, k):
    return replace(w8a8(n, k), activations=Activations("tensor", torch.tensor([0.05 if k == 64 else 0.01])))


def fp8(n, k):
    return Fp8Weight(torch.randn(n, k).to(torch.float8_e4m3fn), torch.full((1, 1), 0.1), (n, k))


def dense(n, k):
    return torch.randn(n, k) * 0.1


WHERE = [("cpu", F32), *(pytest.param(("cuda", d), marks=pytest.mark.gpu) for d in (torch.float16, torch.bfloat16))]


@pytest.mark.parametrize(
    ("makers", "kind"),
    [
        (dict(w1=dense, w2=dense, w3=dense), StackedExperts),
        (dict(w1=fp8, w2=fp8, w3=fp8), StackedExperts),
        (dict(w1=int4, w2=int4, w3=int4), StackedExperts),
        (dict(w1=q4_0, w2=q4_0, w3=q4_0), StackedExperts),
        (dict(w1=int4_with_zeros, w2=int4_with_zeros, w3=int4_with_zeros), StackedExperts),
        (dict(w1=int4_act_order, w2=int4_act_order, w3=int4_act_order), ExpertLoop),
        (dict(w1=int4, w2=int4, w3=int4_with_zeros), ExpertLoop),
        (dict(w1=int4_with_zeros, w2=int4, w3=int4_with_zeros), StackedExperts),
        (dict(w1=int8, w2=int8, w3=int8), StackedExperts),
        (dict(w1=int8_channels, w2=int8, w3=int8_channels), StackedExperts),
        (dict(w1=int8, w2=w8a8, w3=int8), ExpertLoop),
        (dict(w1=int8, w2=int8, w3=int8_channels), ExpertLoop),
        (dict(w1=w8a8, w2=w8a8, w3=w8a8), StackedExperts),
        (dict(w1=w8a8_fp8, w2=w8a8_fp8, w3=w8a8_fp8), StackedExperts),
        (dict(w1=w8a8_static, w2=w8a8_static, w3=w8a8_static), ExpertLoop),
        (dict(w1=w8a8, w2=int4, w3=w8a8), ExpertLoop),
        (dict(w1=w8a8, w2=w8a8_fp8, w3=w8a8), ExpertLoop),
        (dict(w1=w8a8, w2=w8a8, w3=int4), ExpertLoop),
        (dict(w1=int4, w2=dense, w3=int4), ExpertLoop),
        (dict(w1=int4, w2=int8, w3=dense), ExpertLoop),
        (dict(w1=dense, w2=int8, w3=dense), ExpertLoop),
    ],
    ids=lambda value: " ".join(make.__name__ for make in value.values()) if isinstance(value, dict) else value.__name__,
)
@pytest.mark.parametrize("where", WHERE, ids=str)
def test_experts_of_any_format_compute_what_each_would(makers, kind, where, monkeypatch):
    """Whatever order their weights come in, and also where an expert gets no token."""
    device, dtype = torch.device(where[0]), where[1]
    monkeypatch.setattr(experts_of_models, "_fuses_dequantised", lambda device: True)
    torch.manual_seed(0)
    weights = {(e, w): make(*((64, 128) if w == "w2" else (128, 64))) for e in range(3) for w, make in makers.items()}
    loader = ExpertLoader(CONFIG, device, dtype)
    for i in torch.randperm(len(weights)).tolist():
        e, w = list(weights)[i]
        loader.add(f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight", weights[e, w])
    experts = loader.finish()
    assert isinstance(experts, kind)
    x = torch.randn(7, 64).to(dtype)
    topk_ids = torch.tensor([[0, 2]] * 4 + [[2, 0]] * 3, dtype=torch.int32)
    topk_weights = torch.rand(7, 2)

    def computed(dtype):
        out = torch.zeros(7, 64, dtype=dtype)
        for j in range(2):
            for t in range(7):
                gate, up, down = (
                    dequantize(weights[topk_ids[t, j].item(), w], CPU).to(dtype) for w in ("w1", "w3", "w2")
                )
                row = torch.nn.functional.silu(gate @ x[t].to(dtype)) * (up @ x[t].to(dtype))
                out[t] += topk_weights[t, j].to(dtype) * (down @ row)
        return out

    got = experts(*(of.to(device) for of in (x, topk_weights, topk_ids))).cpu()
    names = {make.__name__ for make in makers.values()}
    if any(name.startswith("w8a8") for name in names):  # inputs are rounded to 8 bits, of which e4m3 has 4 of a number
        bound = {"w8a8": 0.02, "w8a8_fp8": 0.06, "w8a8_static": 0.1}[max(n for n in names if n.startswith("w8a8"))]
        assert (got.float() - computed(F32)).norm() < bound * computed(F32).norm()
    else:
        assert_accurate(got, computed(torch.float64), computed(dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_experts_of_fp8_in_blocks(device, monkeypatch):
    """One call computes what their layers do one by one."""
    config, device = replace(CONFIG, hidden_size=128, intermediate_size=256), torch.device(device)
    torch.manual_seed(0)

    def fp8_blocks(n, k):
        q, scale = torch.randn(n, k).to(torch.float8_e4m3fn), torch.rand(n // 128, k // 128) * 0.05 + 0.01
        return Fp8Weight(q, scale, (128, 128), Activations("group"))

    sizes = dict(w1=(256, 128), w2=(128, 256), w3=(256, 128))
    weights = {(e, w): fp8_blocks(*size) for e in range(3) for w, size in sizes.items()}
    x, topk_weights = torch.randn(7, 128).to(device, torch.float16), torch.rand(7, 2, device=device)
    topk_ids = torch.tensor([[0, 2]] * 4 + [[2, 0]] * 3, dtype=torch.int32, device=device)
    made = []
    for fused in (True, False):
        monkeypatch.setattr(experts_of_models, "_fuses_dequantised", lambda device, fused=fused: fused)
        loader = ExpertLoader(config, device, torch.float16)
        for (e, w), weight in weights.items():
            loader.add(f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight", weight)
        experts = loader.finish()
        assert isinstance(experts, StackedExperts if fused else ExpertLoop)
        made.append(experts(x, topk_weights, topk_ids).float())
    assert (made[0] - made[1]).norm() < 1e-2 * made[1].norm()
    mixed = ExpertLoader(config, device, torch.float16)  # in one stack, another format: each is a layer
    monkeypatch.setattr(experts_of_models, "_fuses_dequantised", lambda device: True)
    for (e, w), weight in weights.items():
        other = dequantize(weight, CPU) if (e, w) == (1, "w3") else weight
        mixed.add(f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight", other)
    assert (mixed.finish()(x, topk_weights, topk_ids).float() - made[1]).norm() < 1e-2 * made[1].norm()


def test_the_router_chooses_as_softmax_over_the_largest():
    torch.manual_seed(0)
    router, seen = torch.randn(3, 64), []

    def experts(x, topk_weights, topk_ids):
        seen.append((topk_weights, topk_ids))
        return x

    x = torch.randn(5, 64)
    MixtureOfExperts(lambda x: x @ router.t(), experts, 2)(x)
    largest, ids = (x @ router.t()).topk(2)
    torch.testing.assert_close(seen[0][0], largest.softmax(-1))
    assert torch.equal(seen[0][1], ids.int())
