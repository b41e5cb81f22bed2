import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels import activation_quantize
from octavo.kernels.tiles import device_properties
from octavo.testing import assert_quantized, check_op

# The interpreter's NumPy reports the overflow in exp that the kernels count on.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

F = torch.nn.functional
LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}
# name -> (the public function, its op, arguments after the dtype, the activation)
CASES = {
    "silu": (octavo.silu_and_mul_quantize, "silu_and_mul_quantize", (), F.silu),
    "gelu": (octavo.gelu_and_mul_quantize, "gelu_and_mul_quantize", ("none",), F.gelu),
    "gelu_tanh": (
        octavo.gelu_and_mul_quantize,
        "gelu_and_mul_quantize",
        ("tanh",),
        lambda gate: F.gelu(gate, approximate="tanh"),
    ),
}


@pytest.fixture(params=CASES)
def kind(request):
    return request.param


@pytest.fixture(params=LIMITS, ids=lambda d: str(d).removeprefix("torch."))
def out_dtype(request):
    return request.param


def check(kind, out, x, scale=None):
    """fp32's errors are those of its units at gate · up, where the activation is a difference of larger numbers."""
    q, scale = out if scale is None else (out, scale)
    gate, up = x.double().chunk(2, -1)
    assert_quantized(q, scale, CASES[kind][3](gate) * up, 2e-6 * (gate * up).abs())


@pytest.mark.parametrize(
    ("shape", "group_size"),
    [
        ((1, 1), 1),
        ((3, 63), 21),
        ((2, 1, 111), 37),
        ((2, 2, 1536), 96),
        ((0, 8), 4),
    ],
)
@pytest.mark.parametrize("mode", ["row", "group", "given"])
def test_against_the_formula(device, dtype, kind, out_dtype, shape, group_size, mode):
    function, _, more, _ = CASES[kind]
    x = 3 * torch.randn((*shape[:-1], 2 * shape[-1]), device=device, dtype=dtype)
    scale = torch.tensor([8 / LIMITS[out_dtype]], device=device) if mode == "given" else None
    group_size = group_size if mode == "group" else None
    out = function(x, out_dtype, *more, scale=scale, group_size=group_size)
    check(kind, out, x, scale)
    if mode != "given":
        assert out[0].shape == shape and out[1].shape == (*shape[:-1], shape[-1] // group_size if group_size else 1)


@pytest.mark.parametrize("width", [14336, 28672, 40000])
def test_wide_rows(device, dtype, out_dtype, width):
    x = 3 * torch.randn(1, 2 * width, device=device, dtype=dtype)
    whole, scale = octavo.silu_and_mul_quantize(x, out_dtype)
    check("silu", (whole, scale), x)
    check("silu", octavo.silu_and_mul_quantize(x, out_dtype, group_size=width // 4), x)
    one_group = octavo.silu_and_mul_quantize(x, out_dtype, group_size=width)
    assert torch.equal(one_group[0].float(), whole.float()) and torch.equal(one_group[1], scale)


@given(
    kind=st.sampled_from(list(CASES)),
    rows=st.integers(0, 4),
    inner=st.integers(1, 3),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 40),
    gap=st.integers(0, 9),
    dtype=st.sampled_from(list(LIMITS)),
    grouped=st.booleans(),
    size=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_views_of_any_two_strides(kind, rows, inner, groups, group_size, gap, dtype, grouped, size):
    function, _, more, _ = CASES[kind]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = groups * group_size
    x = (torch.randn(inner, rows, 2 * half + gap, device=device) * size)[..., : 2 * half].transpose(0, 1)
    check(kind, function(x, dtype, *more, group_size=group_size if grouped else None), x)


@pytest.mark.parametrize(("width", "group_size"), [(80, None), (80, 20), (40000, None)])
def test_zeros_nan_and_infinities_spoil_no_other_value(device, dtype, out_dtype, width, group_size):
    x = torch.randn(4, 2 * width, device=device, dtype=dtype)
    x[1], x[3, 5], x[3, 7], x[3, width + 7] = 0, float("nan"), float("inf"), -1.0
    clean = x.clone()
    clean[3, 5], clean[3, 7] = 0, 0
    q, scale = octavo.silu_and_mul_quantize(x, out_dtype, group_size=group_size)
    expected, expected_scale = octavo.silu_and_mul_quantize(clean, out_dtype, group_size=group_size)
    assert torch.equal(scale, expected_scale) and (scale[1] == 2.0**-126).all()
    wanted = expected.float()
    wanted[3, 5], wanted[3, 7] = 0.0 if out_dtype == torch.int8 else float("nan"), -LIMITS[out_dtype]
    torch.testing.assert_close(q.float(), wanted, rtol=0, atol=0, equal_nan=True)


def test_what_is_quantised_is_not_rounded_before(device):
    x = torch.randn(64, 1024, device=device, dtype=torch.float16)
    fused, scale = octavo.silu_and_mul_quantize(x, torch.int8)
    gate, up = x.double().chunk(2, -1)
    best = (F.silu(gate) * up / scale).round()
    separate = (octavo.silu_and_mul(x).double() / scale).round()
    assert (fused != best).sum() <= 2 < 10 < (separate != best).sum()


def test_reference_against_the_formula(kind, out_dtype):
    _, name, more, _ = CASES[kind]
    x = 3 * torch.randn(3, 2, 96)
    for group_size in (None, 16):
        check(kind, getattr(reference.quantize, name)(x, out_dtype, *more, None, group_size), x)


@pytest.mark.parametrize("group_size", [None, 16])
def test_opcheck_and_compile(device, kind, group_size):
    function, name, more, _ = CASES[kind]
    x = torch.randn(4, 3, 64, device=device)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        check_op(name, function, (x, dtype, *more, None, group_size), x, dtype, *more, group_size=group_size)
    scale = torch.tensor([0.02], device=device)
    check_op(name, function, (x, torch.int8, *more, scale, None), x, torch.int8, *more, scale=scale)


@pytest.mark.gpu
def test_graph_capture_and_replay(kind, out_dtype):
    function, _, more, _ = CASES[kind]
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    function(x, out_dtype, *more)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(x, out_dtype, *more)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(out, function(x, out_dtype, *more), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.gpu
def test_offsets_beyond_int32(kind, out_dtype):
    function, _, more, _ = CASES[kind]
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=torch.float16)[:, :64]
    x.normal_()
    for a, b in zip(*(function(t, out_dtype, *more) for t in (x, x.contiguous())), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=[1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (dict(x=torch.zeros(8, 2).t()), ValueError, "x: the last dimension has stride 2"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x: shape \(2, 0\)"),
        (dict(x=torch.zeros(2, 7)), ValueError, "x: last dimension 7 is odd"),
        (dict(x=torch.zeros(4, 4, 4, 8)[::2, ::2, ::2]), ValueError, "x: shape .* needs 3 strides"),
        (dict(dtype=torch.bfloat16), TypeError, "dtype: torch.bfloat16; expected torch.int8, torch.float8_e4m3fn or"),
        (dict(scale=torch.ones(2)), ValueError, r"scale: shape \(2,\); expected one element"),
        (dict(scale=torch.ones(1).half()), TypeError, "scale: dtype float16"),
        (dict(scale=torch.ones(1, device="meta")), ValueError, "scale: on meta, but x is on cpu"),
        (dict(scale=torch.ones(1), group_size=4), ValueError, "group_size: 4 beside a scale"),
        (dict(group_size=8), ValueError, "group_size: 8; expected a divisor of the 4 elements"),
    ],
)
def test_errors(kind, change, error, message):
    function, _, more, _ = CASES[kind]
    args = dict(x=torch.zeros(2, 8), dtype=torch.int8, scale=None, group_size=None) | change
    with pytest.raises(error, match=message):
        function(args.pop("x"), args.pop("dtype"), *more, **args)


def test_another_approximation_is_refused():
    with pytest.raises(ValueError, match="approximate: 'erf'; expected"):
        octavo.gelu_and_mul_quantize(torch.zeros(2, 8), torch.int8, "erf")


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    scale = torch.empty(1, device="meta")
    for out_dtype in (torch.int8, torch.float8_e4m3fn):
        if out_dtype == torch.float8_e4m3fn and device_properties(scale.device).capability < (8, 9):
            continue
        for kind in ("silu", "gelu"):  # the tanh approximation is computed as SiLU is
            for width in (64, 14336, 28672, 65536):
                x = torch.empty(8, 2 * width, device="meta", dtype=dtype)
                activation_quantize._activation_quantize_cuda(x, kind, out_dtype, None, None)
            for fixed, group_size in ((None, 128), (scale, None)):
                activation_quantize._activation_quantize_cuda(x, kind, out_dtype, fixed, group_size)
