"""Every format that the engine reads: it loads, its weights are those of its reference, and it generates.

The table of formats at the end of a run is made of these tests' results (conftest.py).
"""

from functools import lru_cache

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from quantised_models import (
    FORMATS,
    GGUF_KINDS,
    GGUF_MIXTRAL,
    MIXTRAL,
    VOCABULARY,
    save_gguf,
    save_quantised,
)
from tiny_models import released, save_tiny_llama, save_tiny_mixtral

from octavo.engine import LLM, SamplingParams
from octavo.engine.checkpoint import Fp8Weight, Int4Weight, Int8Weight, open_checkpoint
from octavo.testing import assert_accurate

DENSE = {"safetensors bf16": torch.bfloat16, "safetensors fp16": torch.float16, "safetensors fp32": torch.float32}
HEADS = {f"{name}, and the head": name for name in ("gptq", "gptq act-order", "awq", "packed", "integers", "fp8")}
GGUFS = [f"GGUF {kind.name}" for kind in GGUF_KINDS]
EXPERTS = "Mixtral, "
NAMES = [*DENSE, *FORMATS, *HEADS, *GGUFS, *(f"{EXPERTS}{name}" for name in (*DENSE, *FORMATS, *GGUFS))]
KEPT = {"Q4_0": Int4Weight, "Q4_1": Int4Weight, "Q8_0": Int8Weight, "nf4": torch.Tensor, "integers": Int8Weight}


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    """Its name, where a tiny model of that format is, and the same model in fp32."""
    name, path = request.param.removeprefix(EXPERTS), tmp_path_factory.mktemp("made")
    mixtral = name != request.param
    if name in DENSE:
        save = save_tiny_mixtral if mixtral else save_tiny_llama
        model = save(path, DENSE[name], vocab_size=VOCABULARY)
    elif name.startswith("GGUF"):
        path = path / "m.gguf"
        model = save_gguf(path, Type[name.split()[1]], *[GGUF_MIXTRAL] * mixtral)
    else:
        model = save_quantised(path, HEADS.get(name, name), name in HEADS, *[MIXTRAL] * mixtral)
    return request.param, path, model


def dense(weight):
    """What a weight stands for, in float64."""
    if isinstance(weight, torch.Tensor):
        return weight.double()
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


def kind_of(name):
    """The class that weights of that format are kept in."""
    name = name.removeprefix(EXPERTS)
    if name in DENSE:
        return torch.Tensor
    if name.startswith("GGUF"):
        return KEPT.get(name.split()[1], torch.Tensor)
    if "bytes" in name:
        return Int8Weight
    first = name.replace(",", "").split()[0]
    return KEPT.get(first, Fp8Weight if first.startswith("f") else Int4Weight)


@lru_cache(1)
def load(path):
    return LLM(str(path), device="cpu", dtype=torch.float32, page_size=5)


def test_loads(made, record_property):
    name, path, model = made
    record_property("format", (name, "loads"))
    llm = load(path)
    assert llm.load_report.num_bytes > 0
    assert llm.config.vocab_size == model.config.vocab_size


def test_every_weight_is_its_references(made, record_property):
    name, path, model = made
    record_property("format", (name, "equal to reference"))
    expected = released(model)
    read = dict(open_checkpoint(path).tensors(dtype=torch.float32))
    extra = {tensor for tensor in read if tensor.endswith(".k_scale")}
    assert read.keys() - extra == expected.keys() and bool(extra) == (name.removeprefix(EXPERTS) == "float8")
    for tensor in expected:
        assert torch.equal(dense(read[tensor]), expected[tensor].double()), tensor
        quantised = tensor.endswith(("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")) or (
            tensor in ("lm_head.weight", "model.embed_tokens.weight") and "GGUF" in name
        )
        quantised = quantised or (tensor == "lm_head.weight" and name in HEADS)
        assert type(read[tensor]) is (kind_of(name) if quantised else torch.Tensor), tensor


def test_generates_as_transformers_does(made, record_property):
    name, path, model = made
    record_property("format", (name, "generates"))
    ids = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        plain = model(ids).logits[0]
        exact = model.double()(ids).logits[0]
        model.float()
    llm = load(path)
    logits = torch.cat(list(llm.prompt_logits(ids[0].tolist(), 7)))
    assert_accurate(logits, exact, plain)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 24:].tolist()
    (completion,) = llm.generate([ids[0].tolist()], SamplingParams(max_tokens=8, temperature=0.0))
    assert list(completion.token_ids) == expected
