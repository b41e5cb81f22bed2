"""Weights that are read to a GPU, and taken apart there, are those that a CPU reads; bit for bit."""

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from quantised_models import FORMATS, GGUF_KINDS, GGUF_MIXTRAL, MIXTRAL, save_gguf, save_quantised

from octavo.engine import LLM, SamplingParams, tensor_files
from octavo.engine.checkpoint import open_checkpoint

pytestmark = pytest.mark.gpu
NAMES = [*FORMATS, *(f"GGUF {kind.name}" for kind in GGUF_KINDS)]
MIXTRALS = ["gptq", "awq", "packed", "integers", "float8", "GGUF Q4_K", "GGUF Q4_0", "GGUF Q8_0"]


def fields(weight):
    return {"weight": weight} if isinstance(weight, torch.Tensor) else vars(weight)


@pytest.fixture(scope="module", params=[*NAMES, *(f"Mixtral, {name}" for name in MIXTRALS)])
def path(request, tmp_path_factory):
    folder, name = tmp_path_factory.mktemp("made"), request.param.removeprefix("Mixtral, ")
    mixtral = name != request.param
    if name.startswith("GGUF"):
        save_gguf(folder / "m.gguf", Type[name.split()[1]], *[GGUF_MIXTRAL] * mixtral)
        return folder / "m.gguf"
    save_quantised(folder, name, False, *[MIXTRAL] * mixtral)
    return folder


@pytest.mark.parametrize("piece", [1000, 64 << 20])
def test_the_same_bits(path, piece, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", piece)
    checkpoint = open_checkpoint(path)
    here = dict(checkpoint.tensors(dtype=torch.float16))
    there = dict(checkpoint.tensors(torch.device("cuda"), torch.float16))
    assert here.keys() == there.keys()
    for name in here:
        for field, value in fields(here[name]).items():
            other = fields(there[name])[field]
            if not isinstance(value, torch.Tensor):
                assert other == value
                continue
            assert other.is_cuda and other.dtype == value.dtype, (name, field)
            # Bits, not values; of strides nothing is promised.
            here_bits, there_bits = (t.cpu().flatten().view(torch.uint8) for t in (value, other))
            assert torch.equal(there_bits, here_bits), (name, field)


def test_it_generates(path):
    llm = LLM(str(path), device="cuda", dtype=torch.float16, warmup=False)
    assert llm.load_report.device_peak > 0
    (completion,) = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=4, temperature=0))
    assert len(completion.token_ids) == 4
