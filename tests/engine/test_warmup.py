"""Warming up a model: what its steps launch is what was compiled ahead."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from quantised_models import MIXTRAL, save_quantised
from tiny_models import save_tiny_mixtral, save_tokenizer

import octavo
from octavo.engine import LLM, SamplingParams
from octavo.kernels import launch as launching

STEPS = """
import torch
from octavo.engine import LLM
from octavo.engine.graphs import Sizes
from octavo.engine.inputs import Shape
from octavo.engine.warmup import _meta, _step, step_calls
from octavo.kernels.tiles import KNOWN_DEVICES
from octavo.kernels.launch import launch_key
from octavo.kernels.warmup import _launches

def keys(calls):
    return {
        launch_key(k.kernel, 0, k.args, k.constexprs, k.num_warps, k.num_stages)
        for k in _launches(calls, KNOWN_DEVICES[90])
    }

llm = LLM("smollm2", device="cpu", dtype=torch.bfloat16)
width, cache = llm.runner.inputs.width, llm.runner.cache
sizes = Sizes(64, 2048)
warm = keys(step_calls(llm.model, cache, sizes.every(), width))
whole, meta = _meta(llm.model), _meta(cache)
for tokens, sequences in ((1, 1), (7, 7), (64, 64), (50, 1), (300, 1), (2000, 1), (40, 4), (900, 40)):
    shape = sizes.shape(tokens, sequences, tokens == sequences)
    missing = keys([lambda: _step(whole, meta, shape, width, False)]) - warm
    assert not missing, (tokens, sequences, missing)
assert len(warm) > 10
fewer = keys(step_calls(llm.model, cache, Sizes(8, 8).every(), width))
assert keys([lambda: _step(whole, meta, Shape(2048, 64, False), width, False)]) - fewer, "sizes make no difference"
print("covered")
"""


def test_every_step_is_covered():
    # In a process of its own, because this one has the interpreter in place of the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "covered" in run.stdout, run.stderr[-3000:]


W8A8 = """
import torch, octavo
from octavo.engine.checkpoint import Activations
from octavo.engine.layers import W8A8Linear
from octavo.kernels.tiles import KNOWN_DEVICES
from octavo.kernels.launch import launch_key
from octavo.kernels.warmup import _launches

def keys(calls):
    return {
        launch_key(k.kernel, 0, k.args, k.constexprs, k.num_warps, k.num_stages)
        for k in _launches(calls, KNOWN_DEVICES[90])
    }

config = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2)
dense = keys(octavo.model_calls(config, max_num_batched_tokens=256))
for weights, dtype, granularity, scale, activation in (  # gate and up
    ("int8_int8", torch.int8, "token", (2048,), "silu_and_mul"),
    ("fp8", torch.float8_e4m3fn, "token", (2048,), "silu_and_mul"),
    ("fp8_blocks", torch.float8_e4m3fn, "group", (16, 4), None),
):
    warm = keys(octavo.model_calls(config, weights=weights, max_num_batched_tokens=256))
    weight, scale = torch.empty(2048, 512, dtype=dtype, device="meta"), torch.empty(scale, device="meta")
    layer = W8A8Linear(weight, scale, None, Activations(granularity), activation)
    for tokens in (1, 7, 50, 100, 255):
        called = keys([lambda: layer(torch.empty(tokens, 512, dtype=torch.bfloat16, device="meta"))])
        assert len(called) == 2 and called <= warm and not called & dense, (weights, tokens, called - warm)
print("covered")
"""


def test_w8a8_layers_are_covered_by_model_calls():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", W8A8], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "covered" in run.stdout, run.stderr[-3000:]


EXPERTS = """
import sys, torch, octavo
from octavo.engine import LLM, experts
from octavo.engine.experts import ExpertLoop
from octavo.engine.graphs import Sizes
from octavo.engine.warmup import _meta, _step, step_calls
from octavo.kernels.tiles import KNOWN_DEVICES
from octavo.kernels.launch import launch_key
from octavo.kernels.warmup import _launches

def keys(calls):
    return {
        launch_key(k.kernel, 0, k.args, k.constexprs, k.num_warps, k.num_stages)
        for k in _launches(calls, KNOWN_DEVICES[90])
    }

folder, weights = sys.argv[1:]
alone = weights == "int4 one by one"
weights = weights.split()[0]
dtype = torch.float16 if weights in ("int4", "int8") else torch.bfloat16  # that of the scales
experts._fuses_dequantised = lambda device: True  # as on a GPU
llm = LLM(folder, device="cpu", dtype=dtype, cache_tokens=4096)
width, sizes = llm.runner.inputs.width, Sizes(64, 256)
warm = keys(step_calls(llm.model, llm.runner.cache, sizes.every(), width))
whole, cache = _meta(llm.model), _meta(llm.runner.cache)
for tokens, sequences in ((1, 1), (7, 7), (64, 64), (250, 1), (40, 4)):
    shape = sizes.shape(tokens, sequences, tokens == sequences)
    missing = keys([lambda: _step(whole, cache, shape, width, False)]) - warm
    assert not missing, (tokens, sequences, missing)
options = dict(weights=weights, group_size=32, max_num_batched_tokens=256)
listed = keys(octavo.model_calls(llm.config, dtype=dtype, **options))
mixture, hidden = whole.layers[0].mlp, llm.config.hidden_size
assert alone == isinstance(mixture.experts, ExpertLoop)
for tokens in (1, 8, 64, 256):
    x = torch.empty(tokens, hidden, dtype=dtype, device="meta")
    called = keys([lambda: mixture(x)])
    assert called <= warm, tokens
    assert alone or (len(called) > 2 and called <= listed), (tokens, called - listed)
if alone:
    for rows in (1, 3, 6, 37, 100):  # as many tokens as an expert may get
        x = torch.empty(rows, hidden, dtype=dtype, device="meta")
        called = keys([lambda: mixture.experts.experts[1](x)])
        assert called and called <= warm, (rows, called - warm)
print("covered")
"""


QUANTISED = {"int4 one by one": "gptq act-order", "int4 with zeros": "gptq asymmetric", "int4": "gptq"}
QUANTISED |= {"int8": "packed bytes", "int8_int8": "integers", "fp8": "float8 channels"}


@pytest.mark.parametrize("weights", ["dense", *QUANTISED])
def test_experts_are_covered(tmp_path, weights):
    if weights == "dense":
        save_tiny_mixtral(tmp_path, torch.bfloat16)
    else:
        save_quantised(tmp_path, QUANTISED[weights], config=MIXTRAL)
        inputs = dict(num_bits=8, type="float" if weights == "fp8" else "int", dynamic=True, strategy="token")
        config = json.loads((tmp_path / "config.json").read_text())
        if weights in ("int8_int8", "fp8"):
            config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs
        (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", EXPERTS, str(tmp_path), weights]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "covered" in run.stdout, run.stderr[-3000:]


def test_a_cpu_has_nothing_to_compile():
    llm = LLM("smollm2", device="cpu")
    with pytest.raises(ValueError, match="device: cpu; only a GPU's kernels are compiled"):
        llm.warmup()


SIZES = dict(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=None,
)
SERVED = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=5),
    "mixtral gptq": transformers.MixtralConfig(**SIZES, num_local_experts=5),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SERVED)
def test_serving_mixed_batches_compiles_nothing(tmp_path, name):
    if name.endswith("gptq"):
        save_quantised(tmp_path, "gptq", config=SERVED[name])
    else:
        transformers.AutoModelForCausalLM.from_config(SERVED[name], dtype=torch.bfloat16).save_pretrained(tmp_path)
        save_tokenizer(tmp_path, 300)
    llm = LLM(str(tmp_path), device="cuda", max_num_batched_tokens=96, max_num_seqs=5)
    compiled, ready = octavo.compile_count(), len(launching._ready)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    done = llm.generate([list(range(5, 5 + n)) for n in (1, 200, 17, 64, 3, 90)], params)
    done += llm.generate([[7, 8]], replace(params, max_tokens=40))
    assert [len(c.token_ids) for c in done] == [12] * 6 + [40]
    llm.prompt_logprobs(list(range(5, 250)))
    assert octavo.compile_count() == compiled and len(launching._ready) == ready
