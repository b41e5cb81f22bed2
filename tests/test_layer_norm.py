import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels import layer_norm as module
from octavo.testing import assert_accurate, check_op


def formula(x, weight, bias, eps, offset=0.0):
    d = x - x.mean(-1, keepdim=True)
    y = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + eps) * (weight + offset)
    return y if bias is None else y + bias


def check(out, x, weight, bias, eps, offset=0.0):
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    narrow = [None if t is None else t.to(x.dtype) for t in (x, weight, bias)]
    assert_accurate(out, formula(*wide, eps, offset), formula(*narrow, eps, offset))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 64), (3, 63), (2, 5, 111), (7, 768), (2, 4544), (0, 8), (1, 16400), (1, 65536)]
)
@pytest.mark.parametrize(("offset", "with_bias"), [(0.0, True), (1.0, False)])
def test_layer_norm(device, dtype, shape, offset, with_bias):
    x = torch.randn(shape, device=device, dtype=dtype) + 0.5
    w, b = (torch.randn(shape[-1], device=device, dtype=dtype) for _ in range(2))
    b = b if with_bias else None
    out = octavo.layer_norm(x, w, b, weight_offset=offset)
    assert out.is_contiguous() and out.dtype == dtype
    check(out, x, w, b, 1e-5, offset)


@given(
    rows=st.integers(0, 5),
    inner=st.integers(1, 4),
    width=st.integers(1, 130),
    gap=st.integers(0, 9),
    scale=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_views_of_any_two_strides(rows, inner, width, gap, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fused = torch.randn(rows, inner * width + gap, device=device) * scale
    x = fused[:, : inner * width].view(rows, inner, width)
    w, b = (torch.randn(width, device=device) for _ in range(2))
    check(octavo.layer_norm(x, w, b), x, w, b, 1e-5)


@pytest.mark.parametrize("width", [4096, 40000])
def test_a_mean_far_from_zero_costs_no_digits(device, width):
    """mean(x²) - mean(x)² has no digit left here: both are 10⁶ in fp32, and their difference is 1."""
    x = torch.randn(2, width, device=device) + 1000.0
    w, b = torch.ones(width, device=device), torch.zeros(width, device=device)
    check(octavo.layer_norm(x, w, b), x, w, b, 1e-5)
    error = (octavo.layer_norm(x, w, b).double() - formula(x.double(), w.double(), b.double(), 1e-5)).abs().max()
    assert error < 1e-3


@pytest.mark.parametrize("width", [96, 20000])
def test_constant_rows_are_the_bias(device, width):
    x = torch.full((2, width), 6e4, device=device, dtype=torch.float16)
    w, b = (torch.randn(width, device=device, dtype=torch.float16) for _ in range(2))
    assert torch.equal(octavo.layer_norm(x, w, b), b.expand(2, width))


def test_weight_and_bias_may_be_fp32_beside_half(device):
    x = torch.randn(3, 80, device=device, dtype=torch.float16)
    w, b = (torch.randn(80, device=device) for _ in range(2))
    check(octavo.layer_norm(x, w, b), x, w, b, 1e-5)


def test_a_nan_stays_in_its_row(device):
    x = torch.randn(3, 80, device=device)
    w, b = (torch.randn(80, device=device) for _ in range(2))
    clean = octavo.layer_norm(x, w, b)
    x[1, 7] = float("nan")
    out = octavo.layer_norm(x, w, b)
    assert torch.equal(out[::2], clean[::2]) and out[1].isnan().all()


def test_reference_against_the_formula():
    x, w, b = torch.randn(4, 96) + 3, torch.randn(96), torch.randn(96)
    check(reference.norm.layer_norm(x, w, b, 1e-5, 1.0), x, w, b, 1e-5, 1.0)
    check(reference.norm.layer_norm(x.half(), w, None, 1e-5, 0.0), x.half(), w, None, 1e-5)


def test_opcheck_and_compile(device):
    x, w, b = (torch.randn(s, device=device) for s in ((4, 3, 64), (64,), (64,)))
    check_op("layer_norm", octavo.layer_norm, (x, w, b, 1e-5, 0.0), x, w, b)
    check_op("layer_norm", octavo.layer_norm, (x, w, None, 1e-5, 1.0), x, w, weight_offset=1.0)


@pytest.mark.gpu
def test_graph_capture_and_replay():
    x, w, b = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((4, 512), (512,), (512,)))
    octavo.layer_norm(x, w, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.layer_norm(x, w, b)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, octavo.layer_norm(x, w, b))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=torch.float16)[:, :64]
    x.normal_()
    w = torch.ones(64, device="cuda", dtype=torch.float16)
    assert torch.equal(octavo.layer_norm(x, w), octavo.layer_norm(x.contiguous(), w))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=torch.zeros(8, 2).t()), ValueError, "x: the last dimension has stride 2"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x: shape \(2, 0\)"),
        (dict(x=torch.zeros(4, 4, 4, 8)[::2, ::2, ::2]), ValueError, "x: shape .* needs 3 strides"),
        (dict(weight=None), TypeError, "weight: expected a torch.Tensor, got NoneType"),
        (dict(weight=torch.zeros(7)), ValueError, r"weight: shape \(7,\); expected \(8,\)"),
        (dict(bias=torch.zeros(16)[::2]), ValueError, "bias: the last dimension has stride 2"),
        (dict(bias=torch.zeros(8, dtype=torch.int8)), TypeError, "bias: dtype int8"),
        (dict(bias=torch.zeros(8, device="meta")), ValueError, "bias: on meta, but x is on cpu"),
        (dict(eps=-1.0), ValueError, "eps: -1.0"),
    ],
)
def test_errors(change, error, message):
    args = dict(x=torch.zeros(2, 8), weight=torch.zeros(8), bias=torch.zeros(8)) | change
    with pytest.raises(error, match=message):
        octavo.layer_norm(**args)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for width in (64, 4096, 8192, 12288, 65536):
        x, w = torch.empty(8, width, device="meta", dtype=dtype), torch.empty(width, device="meta", dtype=dtype)
        module._layer_norm_cuda(x, w, torch.empty_like(w), 1e-5, 0.0)
        module._layer_norm_cuda(x, w, None, 1e-5, 0.0)
