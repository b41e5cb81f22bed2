"""Loading holds no second copy of a model: the most memory that it takes, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny_llama, save_tiny_mixtral

from octavo.engine.config import ModelConfig
from octavo.engine.loader import expected_shapes
from octavo.engine.tensor_files import PIECE

SLACK = 16 << 20  # what allocators keep
SIZES = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, vocab_size=8000)
LAYER = 2 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
LARGEST = 2 * 2 * 1024 * 2816  # gate and up, stacked
EXPERTS = 8  # whose gates and ups make one tensor of 92 MB: they must go there one by one


def run(folder, where, small):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tests/engine/load_worker.py"), str(folder), where, str(small)]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((300, "Llama"), id="300 MB"),
        pytest.param((300, "Mixtral"), id="300 MB of experts"),
        pytest.param((1000, "Llama"), id="1 GB", marks=pytest.mark.slow),
    ],
)
def made_up(request, tmp_path_factory):
    """Folders with a model of so many MB in bf16, in files of a fifth of it each, and with a tiny one."""
    size, kind = request.param
    folder, small = tmp_path_factory.mktemp("large"), tmp_path_factory.mktemp("small")
    (save_tiny_llama if kind == "Llama" else save_tiny_mixtral)(small, torch.bfloat16)
    layers = round(size * 1e6 / (LAYER if kind == "Llama" else LAYER + (EXPERTS - 1) * 3 * LARGEST / 2))
    config = SIZES | dict(num_hidden_layers=layers, max_position_embeddings=128, rms_norm_eps=1e-5, dtype="bfloat16")
    config["architectures"] = [f"{kind}ForCausalLM"]
    config["num_local_experts"] = EXPERTS
    (folder / "config.json").write_text(json.dumps(config))
    shapes = sorted(expected_shapes(ModelConfig.from_hf(config)).items())  # as models are written
    weight_map = {}
    for i in range(5):
        part = shapes[len(shapes) * i // 5 : len(shapes) * (i + 1) // 5]
        tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in part}
        save_file(tensors, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder, small


def test_a_model_on_a_cpu_is_in_memory_once(made_up):
    measured = run(made_up[0], "cpu", made_up[1])
    assert measured["num_bytes"] > 2.8e8
    assert measured["host"] > measured["num_bytes"], "the measure sees the model"
    assert measured["host"] < measured["num_bytes"] + LARGEST + SLACK


def test_on_its_way_to_a_device_a_model_passes_through_two_buffers(made_up):
    measured = run(made_up[0], "meta", made_up[1])
    assert measured["loaded"] == measured["num_bytes"] > 2.8e8
    assert measured["host"] < 2 * PIECE + SLACK


@pytest.mark.gpu
def test_a_gpu_holds_the_model_and_once_more_its_largest_layer(made_up):
    measured = run(made_up[0], "cuda", made_up[1])
    assert measured["device"] < measured["num_bytes"] + LARGEST + SLACK
    assert measured["host"] < 2 * PIECE + SLACK
