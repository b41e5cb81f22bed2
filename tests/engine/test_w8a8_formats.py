"""Checkpoints whose activations are quantised too: the engine calls the W8A8 ops, on the checkpoint's numbers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

import octavo
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.graphs import Sizes
from octavo.engine.kv_cache import KVCache
from octavo.engine.layers import DenseLinear, GatedLinear, Int8Linear, SplitLinear, W8A8Linear, make_linear
from octavo.engine.loader import load_model
from octavo.engine.packed_formats import packed_format
from octavo.engine.warmup import step_calls
from octavo.testing import assert_accurate

CONFIG = transformers.LlamaConfig(
    vocab_size=67,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
    eos_token_id=None,
)
TOKEN = dict(num_bits=8, strategy="token", dynamic=True, symmetric=True)
TENSOR = dict(num_bits=8, strategy="tensor", symmetric=True)
INT8 = dict(num_bits=8, type="int", strategy="channel")
FP8 = dict(num_bits=8, type="float", strategy="channel")
BLOCKS = dict(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
GROUP = dict(num_bits=8, type="float", strategy="group", group_size=128, dynamic=True)
# name → (format, weights, activations)
SCHEMES = {
    "int8": ("int-quantized", INT8, TOKEN | dict(type="int")),
    "int8 static": ("int-quantized", INT8, TENSOR | dict(type="int", dynamic=False)),
    "int8 tensor": ("int-quantized", INT8, TENSOR | dict(type="int", dynamic=True)),
    "fp8": ("float-quantized", FP8, TOKEN | dict(type="float")),
    "fp8 tensors": ("float-quantized", FP8 | dict(strategy="tensor"), TENSOR | dict(type="float", dynamic=True)),
    "fp8 static": ("float-quantized", FP8 | dict(strategy="tensor"), TENSOR | dict(type="float", dynamic=False)),
    "fp8 blocks": ("float-quantized", BLOCKS, GROUP),
}
HF_BLOCKS = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])


def config_of(name):
    if name == "fp8 hugging face":
        return HF_BLOCKS
    form, weights, inputs = SCHEMES[name]
    group = dict(targets=["Linear"], weights=weights | dict(symmetric=True), input_activations=inputs, format=form)
    return dict(quant_method="compressed-tensors", format=form, config_groups={"group_0": group}, ignore=["lm_head"])


def written(name, weight):
    """A weight's tensors by suffix, and what they stand for."""
    n, k = weight.shape
    blocks = name in ("fp8 blocks", "fp8 hugging face")
    if blocks:
        rows, columns = 128, 128
    else:
        rows, columns = (n if name in ("fp8 tensors", "fp8 static") else 1), k
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [rows of tiles, rows, tiles, columns]
    limit = 127 if name.startswith("int8") else 448
    scale = tiles.abs().amax((1, 3)) / limit
    wide = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    q = weight / wide
    q = q.round().to(torch.int8) if limit == 127 else q.to(torch.float8_e4m3fn)
    suffix = "weight_scale_inv" if name == "fp8 hugging face" else "weight_scale"
    parts = {"weight": q, suffix: scale.flatten() if scale.numel() == 1 and not blocks else scale}
    if "static" in name:
        parts["input_scale"] = torch.tensor([4.0 / limit])
    return parts, q.float() * wide


def rounded(name, x):
    """Activations (fp32) as the scheme rounds them, in plain torch.

    On the CPU: on a GPU torch divides by a number as a product with its reciprocal, and with a scale that is a unit off
    bf16 values halfway between two codes, which are not rare, become the other one.
    """
    device, x = x.device, x.cpu()
    int8 = name.startswith("int8")
    limit = 127 if int8 else 448
    groups = x.unflatten(-1, (-1, 128 if name in ("fp8 blocks", "fp8 hugging face") else x.shape[-1]))
    if "static" in name:
        scale = torch.tensor(4.0 / limit)
    elif "tensor" in name:
        scale = x.abs().amax() / limit
    else:
        scale = groups.abs().amax(-1, keepdim=True) / limit
    q = (groups * (1 / scale)).clamp(-limit, limit)
    q = q.round() if int8 else q.to(torch.float8_e4m3fn)
    return (q.float() * scale).flatten(-2).to(device)


@pytest.fixture(scope="module", params=[*SCHEMES, "fp8 hugging face"])
def checkpoint(request, tmp_path_factory):
    """A folder, and what the weights of its linear layers stand for, by module."""
    name, folder = request.param, tmp_path_factory.mktemp("w8a8")
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG)
    tensors, weights = dict(model.state_dict()), {}
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module_name != "lm_head":
            parts, weights[module_name] = written(name, module.weight.data)
            del tensors[f"{module_name}.weight"]
            tensors |= {f"{module_name}.{suffix}": part for suffix, part in parts.items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    content = CONFIG.to_dict() | dict(
        architectures=["LlamaForCausalLM"], dtype="float32", quantization_config=config_of(name)
    )
    (folder / "config.json").write_text(json.dumps(content))
    return name, folder, weights


def test_layers_are_the_w8a8_ops(checkpoint):
    name, folder, _ = checkpoint
    opened = open_checkpoint(folder)
    assert opened.notes == []
    model = load_model(opened, torch.device("cpu"), torch.float32, 64)
    for layer in model.layers:
        # Outputs that share their scales by blocks can't be interleaved.
        by_blocks = isinstance(layer.mlp.gate_up, GatedLinear)
        assert by_blocks == (name in ("fp8 blocks", "fp8 hugging face"))
        gate_up = layer.mlp.gate_up.gate_up if by_blocks else layer.mlp.gate_up
        assert by_blocks or gate_up.activation == "silu_and_mul"
        for linear in (layer.qkv, layer.o, gate_up, layer.mlp.down):
            parts = linear.parts if isinstance(linear, SplitLinear) else (linear,)
            assert all(isinstance(part, W8A8Linear) for part in parts)
            assert all(part.weight.dtype == (torch.int8 if "int8" in name else torch.float8_e4m3fn) for part in parts)
    # k and v have 64 outputs, half a block: q, k and v can't be one layer there.
    assert isinstance(model.layers[0].qkv, SplitLinear) == (name in ("fp8 blocks", "fp8 hugging face"))


def gated(y):
    gate, up = y.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


WHERE = [("cpu", torch.float32), pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_every_layer_computes_the_checkpoints_numbers(checkpoint, where):
    """By layers: of whole models the roundings part ways as soon as one input lies between two numbers."""
    name, folder, weights = checkpoint
    device, dtype = where
    model = load_model(open_checkpoint(folder), torch.device(device), dtype, 64)
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}"
        for linear, modules in (
            (layer.qkv, [f"{at}.self_attn.{p}_proj" for p in "qkv"]),
            (layer.o, [f"{at}.self_attn.o_proj"]),
            (layer.mlp.gate_up, [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"]),
            (layer.mlp.down, [f"{at}.mlp.down_proj"]),
        ):
            weight = torch.cat([weights[m] for m in modules]).to(device)
            x = torch.randn(24, weight.shape[1]).to(device, dtype)
            x_rounded = rounded(name, x.float())
            plain = torch.nn.functional.linear(x_rounded.to(dtype), weight.to(dtype))
            exact = x_rounded.double() @ weight.double().t()
            if linear is layer.mlp.gate_up:
                plain, exact = (
                    torch.nn.functional.silu(gate) * up for gate, up in (y.chunk(2, -1) for y in (plain, exact))
                )
            assert_accurate(linear(x), exact, plain)


def test_warmup_knows_the_calls(checkpoint):
    """The meta twin makes the calls that the model makes, those of a static scale included."""
    _, folder, _ = checkpoint
    model = load_model(open_checkpoint(folder), torch.device("cpu"), torch.float32, 64)
    cache = KVCache(torch.empty(2, 2, 4, 16, 2, 32))
    calls = step_calls(model, cache, Sizes(2, 16).every(), 4)
    assert len(calls) == 3
    for call in calls:
        call()


def layer_of(name, n=32, k=128, device="cpu", **change):
    parts, _ = written(name, torch.randn(n, k))
    read = packed_format(config_of(name))[0].weight("a.b", parts | change)
    return make_linear([read], [None], torch.device(device), torch.float32)


def test_a_layer_is_exact_on_its_own_codes():
    x = torch.randn(5, 128)
    layer = layer_of("int8")
    q, scale = octavo.quantize_int8(x)
    exact = (q.double() * scale) @ (layer.weight.double() * layer.scale.double()[:, None]).t()
    assert_accurate(layer(x), exact, exact.float())


def test_scales_of_activations_that_differ_are_layers_of_their_own():
    weights = []
    for scale in (0.5, 0.5, 0.25):
        parts, _ = written("int8 static", torch.randn(32, 128))
        parts["input_scale"] = torch.tensor(scale)
        weights.append(packed_format(config_of("int8 static"))[0].weight("a.b", parts))
    same, other = (make_linear(w, [None, None], torch.device("cpu"), torch.float32) for w in (weights[:2], weights[1:]))
    assert isinstance(same, W8A8Linear) and isinstance(other, SplitLinear)


def test_shapes_that_the_op_does_not_take_are_dense():
    assert isinstance(layer_of("fp8 blocks", k=192), DenseLinear)
    assert isinstance(layer_of("fp8", k=120), DenseLinear)
    assert isinstance(layer_of("fp8", k=192), W8A8Linear)


def test_activations_that_no_op_quantises():
    config = config_of("int8")
    config["config_groups"]["group_0"]["input_activations"] |= dict(symmetric=False)
    parts, _ = written("int8", torch.randn(32, 128))
    form, (note,) = packed_format(config)
    assert "activations are not quantised" in note
    weight = form.weight("a.b", parts)
    assert isinstance(make_linear([weight], [None], torch.device("cpu"), torch.float32), Int8Linear)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.ones(1, dtype=torch.int32)])
def test_a_static_scale_is_one_number(scale):
    with pytest.raises(ValueError, match=r"a.b.input_scale: .*expected one number"):
        layer_of("int8 static", input_scale=scale)


def test_a_static_scale_has_to_be_there():
    parts, _ = written("int8", torch.randn(32, 128))
    with pytest.raises(ValueError, match="a.b.input_scale: missing from the checkpoint"):
        packed_format(config_of("int8 static"))[0].weight("a.b", parts)
