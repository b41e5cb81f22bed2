"""NF4 against bitsandbytes where that is installed, and what is refused."""

import json

import pytest
import torch
from quantised_models import FORMATS, written

from octavo.engine.packed_formats import packed_format

STATE = "weight.quant_state.bitsandbytes__nf4"
FORMAT, NOTES = packed_format(FORMATS["nf4"][0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(48, 64), (96, 320), (65, 33)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_library_dequantises_the_same(nested, shape, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape).to(dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, blocksize=64)
    parts = {f"weight.{suffix}": part for suffix, part in state.as_dict(packed=True).items()} | {"weight": codes}
    assert FORMAT.required <= parts.keys() <= FORMAT.required | FORMAT.optional
    assert torch.equal(FORMAT.weight("a", parts, dtype), bitsandbytes.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(dtype):
    parts, weight = written("nf4 nested", 48, 64, torch.Generator().manual_seed(1))
    assert torch.equal(FORMAT.weight("a", parts, dtype), weight.to(dtype))
    assert "dequantised" in NOTES[0]


def state(**change):
    content = dict(quant_type="nf4", blocksize=64, shape=[48, 64], nested_blocksize=16, nested_offset=0.75) | change
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(1535, 1, dtype=torch.uint8)}, r"a\.weight: torch.uint8, 1535 elements; expected 1536"),
        ({"weight": torch.zeros(1536, 1, dtype=torch.int8)}, r"a\.weight: torch.int8, 1536 elements"),
        ({"weight.absmax": torch.zeros(47, dtype=torch.uint8)}, r"a\.weight\.absmax: .* 47 elements; expected 48"),
        ({"weight.quant_map": torch.zeros(15)}, r"a\.weight\.quant_map: .* 15 elements; expected 16"),
        ({"weight.nested_absmax": torch.zeros(4)}, r"a\.weight\.nested_absmax: .* 4 elements; expected 3"),
        ({"weight.nested_absmax": None}, r"a\.weight\.nested_absmax: missing"),
        ({STATE: state(shape=[48])}, "a.weight.quant_state.bitsandbytes__nf4: expected JSON with quant_type nf4"),
        ({STATE: state(blocksize="64")}, "expected JSON with quant_type nf4"),
        ({STATE: state(quant_type="fp4")}, "expected JSON with quant_type nf4"),
        ({STATE: state(nested_offset=None)}, "nested_offset None; expected a size and a number"),
        ({STATE: torch.tensor([123], dtype=torch.uint8)}, "expected JSON"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    parts, _ = written("nf4 nested", 48, 64, torch.Generator().manual_seed(1))
    parts = {suffix: part for suffix, part in (parts | change).items() if part is not None}
    with pytest.raises(ValueError, match=message):
        FORMAT.weight("a", parts, torch.float32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(load_in_8bit=True), "load_in_4bit: None; supported: True"),
        (dict(load_in_4bit=True), "bnb_4bit_quant_type: 'fp4'; supported: nf4"),
    ],
)
def test_what_else_bitsandbytes_writes_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        packed_format(dict(quant_method="bitsandbytes") | config)
