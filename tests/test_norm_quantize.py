import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels import norm_quantize
from octavo.kernels.tiles import device_properties
from octavo.testing import assert_quantized, check_op

LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}


@pytest.fixture(params=LIMITS, ids=lambda d: str(d).removeprefix("torch."))
def out_dtype(request):
    return request.param


def exact(x, weight, eps, offset=0.0):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)


def check(out, x, weight, eps, scale=None, offset=0.0):
    """fp32's sums, square root and products are off by a few of its units; rounding does the rest."""
    q, scale = out if scale is None else (out, scale)
    y = exact(x, weight, eps, offset)
    assert_quantized(q, scale, y, 1e-6 * y.abs())


@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((1, 1), 1),
        ((3, 63), 21),
        ((2, 5, 111), 37),
        ((7, 576), 96),
        ((2, 4096), 128),
        ((1, 16384), 16384),
        ((1, 20000), 10000),
        ((0, 8), 4),
    ],
)
@pytest.mark.parametrize("mode", ["row", "group", "given"])
def test_rms_norm_quantize(device, dtype, out_dtype, shape, group_size, mode):
    x = torch.randn(shape, device=device, dtype=dtype)
    w = torch.randn(shape[-1], device=device, dtype=dtype)
    scale = torch.tensor([2.5 / LIMITS[out_dtype]], device=device) if mode == "given" else None
    group_size = group_size if mode == "group" else None
    out = octavo.rms_norm_quantize(x, w, out_dtype, 1e-5, scale=scale, group_size=group_size, weight_offset=1.0)
    check(out, x, w, 1e-5, scale, 1.0)
    if mode != "given":
        assert out[1].shape == (*shape[:-1], shape[-1] // group_size if group_size else 1)


@pytest.mark.parametrize(
    ("shape", "group_size"), [((1, 64), None), ((5, 111), 37), ((2, 20000), None), ((2, 20000), 80)]
)
def test_add_rms_norm_quantize_writes_the_sum_back(device, dtype, out_dtype, shape, group_size):
    x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    w = torch.randn(shape[-1], device=device, dtype=dtype)
    total = x + residual
    out = octavo.add_rms_norm_quantize(x, residual, w, out_dtype, 1e-5, group_size=group_size)
    assert torch.equal(residual, total)
    check(out, total, w, 1e-5)
    scale = torch.tensor([0.02], device=device)
    residual = total - x
    total = x + residual
    out = octavo.add_rms_norm_quantize(x, residual, w, out_dtype, 1e-5, scale=scale)
    assert torch.equal(residual, total)
    check(out, total, w, 1e-5, scale)


@given(
    rows=st.integers(0, 5),
    inner=st.integers(1, 4),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 40),
    gap=st.integers(0, 9),
    dtype=st.sampled_from(list(LIMITS)),
    grouped=st.booleans(),
    size=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_views_of_any_two_strides(rows, inner, groups, group_size, gap, dtype, grouped, size):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = groups * group_size
    fused = torch.randn(rows, inner * width + gap, device=device) * size
    x, w = fused[:, : inner * width].view(rows, inner, width), torch.randn(width, device=device)
    check(octavo.rms_norm_quantize(x, w, dtype, group_size=group_size if grouped else None), x, w, 1e-6)


def test_what_is_quantised_is_not_rounded_before(device):
    """An fp16 number in between would be on the other side of a tie now and then."""
    x = torch.randn(64, 512, device=device, dtype=torch.float16)
    w = torch.rand(512, device=device, dtype=torch.float16) + 0.5
    fused, scale = octavo.rms_norm_quantize(x, w, torch.int8)
    y = exact(x, w, 1e-6)
    separate = (octavo.rms_norm(x, w).double() / scale).round()
    best = (y / scale).round()
    assert (fused != best).sum() <= 2 < 20 < (separate != best).sum()


@pytest.mark.parametrize("width", [80, 20000])
@pytest.mark.parametrize("group_size", [None, 20])
def test_zeros_and_nan_stay_in_their_row(device, dtype, out_dtype, width, group_size):
    x = torch.randn(4, width, device=device, dtype=dtype)
    w = torch.randn(width, device=device, dtype=dtype)
    clean = octavo.rms_norm_quantize(x, w, out_dtype, group_size=group_size)
    x[1], x[2, 5] = 0, float("nan")
    q, scale = octavo.rms_norm_quantize(x, w, out_dtype, group_size=group_size)
    assert torch.equal(scale[::3], clean[1][::3]) and torch.equal(q.float()[::3], clean[0].float()[::3])
    assert (scale[1:3] == 2.0**-126).all()
    assert (q[1].float() == 0).all()
    assert (q[2] == 0).all() if out_dtype == torch.int8 else q[2].float().isnan().all()


def test_reference_against_the_formula(out_dtype):
    x, r, w = torch.randn(4, 96), torch.randn(4, 96), torch.randn(96)
    check(reference.quantize.rms_norm_quantize(x, w, out_dtype, 1e-6, None, 32, 1.0), x, w, 1e-6, offset=1.0)
    total = x + r
    out = reference.quantize.add_rms_norm_quantize(x, r, w, out_dtype, 1e-6, None, None, 0.0)
    assert torch.equal(r, total)
    check(out, total, w, 1e-6)


@pytest.mark.parametrize("group_size", [None, 32])
def test_opcheck_and_compile(device, group_size):
    x, r, w = (torch.randn(s, device=device) for s in ((4, 3, 64), (4, 3, 64), (64,)))
    e5m2 = torch.float8_e5m2
    args = (torch.int8, 1e-6, None, group_size, 0.0)
    check_op("rms_norm_quantize", octavo.rms_norm_quantize, (x, w, *args), x, w, torch.int8, group_size=group_size)
    args = (e5m2, 1e-6, None, group_size, 1.0)
    options = dict(group_size=group_size, weight_offset=1.0)
    check_op("add_rms_norm_quantize", octavo.add_rms_norm_quantize, (x, r, w, *args), x, r, w, e5m2, **options)


def test_opcheck_and_compile_with_a_given_scale(device):
    x, r, w = (torch.randn(s, device=device) for s in ((4, 3, 64), (4, 3, 64), (64,)))
    scale = torch.tensor([0.02], device=device)
    args = (torch.int8, 1e-6, scale, None, 0.0)
    check_op("rms_norm_quantize", octavo.rms_norm_quantize, (x, w, *args), x, w, torch.int8, scale=scale)
    check_op("add_rms_norm_quantize", octavo.add_rms_norm_quantize, (x, r, w, *args), x, r, w, torch.int8, scale=scale)


@pytest.mark.gpu
def test_graph_capture_and_replay(out_dtype):
    x, r, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((4, 512), (4, 512), (512,)))
    octavo.add_rms_norm_quantize(x, r, w, out_dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, scale = octavo.add_rms_norm_quantize(x, r, w, out_dtype)
    x.copy_(torch.randn_like(x))
    again = r.clone()
    graph.replay()
    expected, expected_scale = octavo.add_rms_norm_quantize(x, again, w, out_dtype)
    assert torch.equal(r, again) and torch.equal(scale, expected_scale) and torch.equal(q.float(), expected.float())


@pytest.mark.gpu
def test_offsets_beyond_int32(out_dtype):
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=torch.float16)[:, :64]
    x.normal_()
    w = torch.ones(64, device="cuda", dtype=torch.float16)
    for a, b in zip(*(octavo.rms_norm_quantize(t, w, out_dtype) for t in (x, x.contiguous())), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=torch.zeros(8, 2).t()), ValueError, "x: the last dimension has stride 2"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x: shape \(2, 0\)"),
        (dict(weight=torch.zeros(7)), ValueError, r"weight: shape \(7,\); expected \(8,\)"),
        (dict(weight=torch.zeros(8, device="meta")), ValueError, "weight: on meta, but x is on cpu"),
        (dict(dtype=torch.float16), TypeError, "dtype: torch.float16; expected torch.int8, torch.float8_e4m3fn or"),
        (dict(eps=-1.0), ValueError, "eps: -1.0"),
        (dict(scale=torch.ones(2)), ValueError, r"scale: shape \(2,\); expected one element"),
        (dict(scale=torch.ones(1).half()), TypeError, "scale: dtype float16"),
        (dict(scale=torch.ones(1, device="meta")), ValueError, "scale: on meta, but x is on cpu"),
        (dict(scale=torch.ones(1), group_size=4), ValueError, "group_size: 4 beside a scale"),
        (dict(group_size=3), ValueError, "group_size: 3; expected a divisor of the 8 elements"),
        (dict(residual=torch.zeros(2, 8).half()), TypeError, "residual: dtype float16"),
        (dict(residual=torch.zeros(3, 8)), ValueError, r"residual: shape \(3, 8\); expected \(2, 8\)"),
        (dict(residual=torch.zeros(2, 8, device="meta")), ValueError, "residual: on meta"),
    ],
)
def test_errors(change, error, message):
    args = dict(x=torch.zeros(2, 8), residual=torch.zeros(2, 8), weight=torch.zeros(8), dtype=torch.int8) | change
    with pytest.raises(error, match=message):
        octavo.add_rms_norm_quantize(**args)
    if "residual" not in change:
        del args["residual"]
        with pytest.raises(error, match=message):
            octavo.rms_norm_quantize(**args)


def test_groups_that_fit_no_registers_are_refused():
    with pytest.raises(ValueError, match="group_size: 20000; expected at most 16384, or all 40000 of a row"):
        octavo.rms_norm_quantize(torch.zeros(1, 40000), torch.ones(40000), torch.int8, group_size=20000)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    scale = torch.empty(1, device="meta")
    for out_dtype in (torch.int8, torch.float8_e4m3fn):
        if out_dtype == torch.float8_e4m3fn and device_properties(scale.device).capability < (8, 9):
            continue
        for width in (4096, 14336, 28672):
            x, w = torch.empty(8, width, device="meta", dtype=dtype), torch.empty(width, device="meta", dtype=dtype)
            for fixed, group_size in ((None, None), (None, 128), (scale, None)):
                norm_quantize._norm_quantize_cuda(x, x.clone(), w, out_dtype, 1e-6, fixed, group_size, 0.0)
            norm_quantize._norm_quantize_cuda(x, None, w, out_dtype, 1e-6, None, None, 0.0)
