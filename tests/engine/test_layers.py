"""What comes before a layer with 8-bit activations quantises for it."""

import pytest
import torch

import octavo
from octavo.engine.checkpoint import Activations
from octavo.engine.layers import DenseLinear, GatedLinear, Mlp, Quantized, SplitLinear, W8A8Linear, normed

INT8, FP8 = torch.int8, torch.float8_e4m3fn


def layer(n, k, dtype=INT8, granularity="token", scale=None):
    weight = torch.randn(n, k) * 30
    q = weight.round().clamp(-127, 127).to(dtype)
    scales = torch.rand(-(-n // 128), k // 128) / 30 if granularity == "group" else torch.rand(n) / 30
    given = None if scale is None else torch.tensor([scale])
    return W8A8Linear(q, scales, None, Activations(granularity, given))


KINDS = [
    (INT8, "token", None),
    (FP8, "token", None),
    (FP8, "group", None),
    (INT8, "tensor", 0.03),
    (FP8, "tensor", 0.01),
]


def near(x, y):
    return torch.allclose(x, y, rtol=0, atol=0.02 * y.abs().max().item())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_norm_quantises_for_the_layer_that_follows(kind):
    into = layer(256, 128, *kind)
    x, residual, weight = torch.randn(5, 128), torch.randn(5, 128), torch.rand(128)
    for follows in (into, GatedLinear(into), Mlp(into, None), Mlp(GatedLinear(into), None)):
        quantised = normed(follows, x, weight, 1e-5)
        assert isinstance(quantised, Quantized) and quantised.q.dtype == kind[0]
        assert near(into(quantised), into(octavo.rms_norm(x, weight, 1e-5)))
    before = residual.clone()
    quantised = normed(into, x, weight, 1e-5, residual)
    assert isinstance(quantised, Quantized) and torch.equal(residual, before + x)
    assert near(into(quantised), into(octavo.rms_norm(before + x, weight, 1e-5)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_silu_quantises_for_down(kind, monkeypatch):
    down, gate_up = layer(64, 128, *kind), DenseLinear(torch.randn(256, 32), None)
    x = torch.randn(5, 32)
    expected = down(octavo.silu_and_mul(gate_up(x)))
    monkeypatch.setattr(octavo, "quantize_int8", None)
    monkeypatch.setattr(octavo, "quantize_fp8", None)
    assert near(Mlp(GatedLinear(gate_up), down)(x), expected)


def test_others_take_what_they_took():
    """Dense layers, layers of several formats, and such as have one scale for all tokens, which no row knows."""
    dense, whole = DenseLinear(torch.randn(8, 128), None), layer(8, 128, INT8, "tensor")
    x, weight = torch.randn(5, 128), torch.rand(128)
    for follows in (dense, whole, SplitLinear((dense, layer(8, 128))), Mlp(dense, layer(8, 8)), None):
        for residual in (None, torch.zeros(5, 128)):
            assert torch.equal(normed(follows, x, weight, 1e-5, residual), octavo.rms_norm(x, weight, 1e-5))
    gated = GatedLinear(DenseLinear(torch.randn(256, 128), None))
    assert torch.equal(Mlp(gated, whole)(x), whole(gated(x)))
