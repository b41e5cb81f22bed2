import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels import gemv
from octavo.testing import assert_accurate, check_op


def exact(x, weight, bias=None, activation=None):
    return formula(x.double(), weight.double(), None if bias is None else bias.double(), activation)


def formula(x, weight, bias=None, activation=None):
    y = x @ weight.t()
    if bias is not None:
        y = y + bias.to(y.dtype)
    if activation is None:
        return y
    gate, up = y.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def check_layer(layer, shape, activation, dtype, device):
    """Holds a layer of `shape` (rows, outputs, inputs) to the exact product, with a bias and without."""
    *rows, n, k = shape
    x = torch.randn(*rows, k, device=device, dtype=dtype)
    weight = torch.randn(n, k, device=device, dtype=dtype) * k**-0.5
    for bias in (None, torch.randn(n, device=device)):
        out = layer(x, weight, bias, activation=activation)
        assert out.is_contiguous() and out.dtype == dtype
        plain = formula(x, weight, None if bias is None else bias.to(dtype), activation)
        assert_accurate(out, exact(x, weight, bias, activation), plain)


def check_rows_cut_out(layer, rows, n, k, gap, gated):
    """The same where rows of x lie `gap` elements apart."""
    x = torch.randn(*rows, k + gap)[..., :k]
    weight = torch.randn(2 * n if gated else n, k) * k**-0.5
    activation = "silu_and_mul" if gated else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = layer(x.to(device), weight.to(device), activation=activation).cpu()
    assert_accurate(out, exact(x, weight, None, activation), formula(x, weight, None, activation))


@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
@pytest.mark.parametrize(
    "shape", [(1, 2, 1), (1, 16, 512), (1, 30, 513), (1, 128, 1040), (3, 66, 96), (2, 2, 18, 1500)]
)
def test_gemv(device, dtype, shape, activation):
    check_layer(octavo.gemv, shape, activation, dtype, device)


@given(
    rows=st.integers(0, 3),
    inner=st.integers(1, 2),
    n=st.integers(1, 40),
    k=st.integers(1, 600),
    gap=st.integers(0, 9),
    gated=st.booleans(),
)
def test_rows_cut_out_of_others(rows, inner, n, k, gap, gated):
    check_rows_cut_out(octavo.gemv, (rows, inner), n, k, gap, gated)


def test_a_row_has_the_same_bits_beside_others(device):
    x, weight = torch.randn(5, 700, device=device), torch.randn(24, 700, device=device)
    alone = octavo.gemv(x[2:3].contiguous(), weight)
    assert torch.equal(octavo.gemv(x, weight)[2:3], alone)


def test_nan_spoils_only_what_it_is_in(device):
    x, weight = torch.randn(2, 600, device=device), torch.randn(40, 600, device=device)
    weight[7, 599], x[1, 3] = torch.nan, torch.nan
    out = octavo.gemv(x, weight)
    assert out[1].isnan().all() and out[0].isnan().nonzero().tolist() == [[7]]


def test_reference_against_the_formula():
    x, weight, bias = torch.randn(2, 96), torch.randn(8, 96), torch.randn(8)
    for activation in (None, "silu_and_mul"):
        out = reference.linear.linear(x, weight, bias, activation)
        assert_accurate(out, exact(x, weight, bias, activation), formula(x, weight, bias, activation))


def test_opcheck_and_compile(device):
    x, weight, bias = (torch.randn(s, device=device) for s in ((1, 64), (32, 64), (32,)))
    check_op("gemv", octavo.gemv, (x, weight, bias, None), x, weight, bias)
    check_op("gemv", octavo.gemv, (x, weight, None, "silu_and_mul"), x, weight, activation="silu_and_mul")


@pytest.mark.gpu
def test_graph_capture_and_replay():
    x, weight = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((1, 4096), (512, 4096)))
    octavo.gemv(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.gemv(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, octavo.gemv(x, weight))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    weight = torch.zeros(2**17 + 8, 2**14 + 64, device="cuda", dtype=torch.float16)
    weight[-1] = 1
    x = torch.ones(1, weight.shape[1], device="cuda", dtype=torch.float16)
    out = octavo.gemv(x, weight)
    assert out[0, -1] == weight.shape[1] and not out[0, :-1].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(1, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=torch.zeros(8, 2).t()), ValueError, "x: the last dimension has stride 2"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x: shape \(2, 0\)"),
        (dict(weight=torch.zeros(4, 8).half()), TypeError, "weight: dtype float16"),
        (dict(weight=torch.zeros(4, 7)), ValueError, r"weight: shape \(4, 7\); expected \[outputs, 8\]"),
        (dict(weight=torch.zeros(0, 8)), ValueError, r"weight: shape \(0, 8\)"),
        (dict(weight=torch.zeros(8, 4).t()), ValueError, "weight: strides"),
        (dict(weight=torch.zeros(4, 8, device="meta")), ValueError, "weight: on meta, but x is on cpu"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias: shape \(5,\); expected \(4,\)"),
        (dict(bias=torch.zeros(4, dtype=torch.int64)), TypeError, "bias: dtype int64"),
        (dict(activation="gelu"), ValueError, "activation: 'gelu'; expected None or"),
        (dict(activation="silu_and_mul", weight=torch.zeros(3, 8), bias=None), ValueError, "weight: 3 outputs"),
    ],
)
def test_errors(change, error, message):
    args = dict(x=torch.zeros(1, 8), weight=torch.zeros(4, 8), bias=torch.zeros(4)) | change
    with pytest.raises(error, match=message):
        octavo.gemv(args.pop("x"), args.pop("weight"), args.pop("bias"), **args)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for k in (4096, 4100):
        x, weight = torch.empty(1, k, device="meta", dtype=dtype), torch.empty(64, k, device="meta", dtype=dtype)
        for bias in (None, torch.empty(64, device="meta", dtype=dtype)):
            for activation in (None, "silu_and_mul"):
                gemv._gemv_cuda(x, weight, bias, activation)
