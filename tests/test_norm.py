import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels import norm
from octavo.testing import assert_accurate, check_op


def exact(x, weight, eps, offset=0.0):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


def plain(x, weight, eps, offset=0.0):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (33, 63), (2, 5, 111), (7, 576), (2, 4096), (1, 9000), (2, 17000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(device, dtype, shape, offset):
    x = torch.randn(shape, device=device, dtype=dtype)
    w = torch.randn(shape[-1], device=device, dtype=dtype)
    out = octavo.rms_norm(x, w, 1e-5, weight_offset=offset)
    assert out.is_contiguous() and out.dtype == dtype
    assert_accurate(out, exact(x, w, 1e-5, offset), plain(x, w, 1e-5, offset))


@pytest.mark.parametrize("shape", [(1, 64), (5, 111), (2, 9000), (1, 17000)])
def test_add_rms_norm_writes_the_sum_back(device, dtype, shape):
    x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    w = torch.randn(shape[-1], device=device, dtype=dtype)
    total = x + residual
    out = octavo.add_rms_norm(x, residual, w, 1e-5)
    assert torch.equal(residual, total)
    assert_accurate(out, exact(total, w, 1e-5), plain(total, w, 1e-5))


@given(
    rows=st.integers(0, 5),
    inner=st.integers(1, 4),
    width=st.integers(1, 130),
    gap=st.integers(0, 9),
    scale=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_rms_norm_of_heads_cut_out_of_a_projection(rows, inner, width, gap, scale):
    fused = torch.randn(rows, inner * width + gap) * scale
    x = fused[:, : inner * width].view(rows, inner, width)
    w = torch.randn(width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = octavo.rms_norm(x.to(device), w.to(device)).cpu()
    assert_accurate(out, exact(x, w, 1e-6), plain(x, w, 1e-6))


def test_weight_may_be_fp32_beside_half(device):
    x = torch.randn(3, 80, device=device, dtype=torch.float16)
    w = torch.randn(80, device=device)
    assert_accurate(octavo.rms_norm(x, w), exact(x, w, 1e-6), plain(x, w.half(), 1e-6))


def test_large_values_do_not_overflow_in_half(device):
    x = torch.full((2, 128), 6e4, device=device, dtype=torch.float16)
    out = octavo.rms_norm(x, torch.ones(128, device=device, dtype=torch.float16))
    assert torch.equal(out, torch.ones_like(out))


def test_reference_against_the_formula():
    x, w = torch.randn(4, 96), torch.randn(96)
    assert_accurate(reference.norm.rms_norm(x, w, 1e-6, 1.0), exact(x, w, 1e-6, 1.0), plain(x, w, 1e-6, 1.0))
    r = torch.randn(4, 96)
    total = x + r
    out = reference.norm.add_rms_norm(x, r, w, 1e-6, 0.0)
    assert torch.equal(r, total)
    assert_accurate(out, exact(total, w, 1e-6), plain(total, w, 1e-6))


def test_opcheck_and_compile(device):
    x, r, w = (torch.randn(s, device=device) for s in ((4, 3, 64), (4, 3, 64), (64,)))
    check_op("rms_norm", octavo.rms_norm, (x, w, 1e-6, 0.0), x, w)
    check_op("add_rms_norm", octavo.add_rms_norm, (x, r, w, 1e-6, 0.0), x, r, w)


@pytest.mark.gpu
def test_graph_capture_and_replay():
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    octavo.rms_norm(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.rms_norm(x, w)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, octavo.rms_norm(x, w))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=torch.float16)[:, :64]
    x.normal_()
    w = torch.ones(64, device="cuda", dtype=torch.float16)
    assert torch.equal(octavo.rms_norm(x, w), octavo.rms_norm(x.contiguous(), w))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=[1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (dict(x=torch.zeros(8, 2).t()), ValueError, "x: the last dimension has stride 2"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x: shape \(2, 0\)"),
        (dict(weight=torch.zeros(7)), ValueError, r"weight: shape \(7,\); expected \(8,\)"),
        (dict(weight=torch.zeros(8, device="meta")), ValueError, "weight: on meta, but x is on cpu"),
        (dict(eps=-1.0), ValueError, "eps: -1.0"),
        (dict(residual=torch.zeros(2, 8).half()), TypeError, "residual: dtype float16"),
        (dict(residual=torch.zeros(3, 8)), ValueError, r"residual: shape \(3, 8\); expected \(2, 8\)"),
    ],
)
def test_errors(change, error, message):
    args = dict(x=torch.zeros(2, 8), residual=torch.zeros(2, 8), weight=torch.zeros(8), eps=1e-6) | change
    with pytest.raises(error, match=message):
        octavo.add_rms_norm(**args)


def test_three_leading_strides_are_refused():
    x = torch.zeros(4, 4, 4, 8)[::2, ::2, ::2]
    with pytest.raises(ValueError, match="x: shape .* needs 3 strides"):
        octavo.rms_norm(x, torch.ones(8))


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for width in (64, 4096, 12288, 65536):
        x, w = torch.empty(8, width, device="meta", dtype=dtype), torch.empty(width, device="meta", dtype=dtype)
        norm._rms_norm_cuda(x, w, 1e-6, 0.0)
        norm._norm_cuda(x, torch.empty_like(x), w, 1e-6, 0.0)
