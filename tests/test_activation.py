import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels import activation
from octavo.testing import assert_accurate, check_op

# The interpreter's NumPy reports the overflow in exp that the kernels count on.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

# name -> (the public function, its op, arguments after x, the formula with torch's rounding after every step)
CASES = {
    "silu": (octavo.silu_and_mul, "silu_and_mul", (), lambda g: g * g.sigmoid()),
    "gelu": (octavo.gelu_and_mul, "gelu_and_mul", ("none",), lambda g: g * (1 + (g / math.sqrt(2)).erf()) / 2),
    "gelu_tanh": (
        octavo.gelu_and_mul,
        "gelu_and_mul",
        ("tanh",),
        lambda g: g * (1 + (math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)).tanh()) / 2,
    ),
    "relu2": (octavo.relu2, "relu2", (), lambda x: x.clamp(min=0) ** 2),
}


def formula(kind, x):
    if kind == "relu2":
        return CASES[kind][3](x)
    half = x.shape[-1] // 2
    return CASES[kind][3](x[..., :half]) * x[..., half:]


def check(kind, out, x):
    assert_accurate(out, formula(kind, x.double()), formula(kind, x))


@pytest.fixture(params=CASES)
def kind(request):
    return request.param


@pytest.mark.parametrize("shape", [(1, 2), (1, 63 * 2), (3, 1, 111 * 2), (2, 2, 1536 * 2), (1, 5504), (0, 8), (40, 16)])
def test_against_the_formula(device, dtype, kind, shape):
    function, _, more, _ = CASES[kind]
    x = 3 * torch.randn(shape, device=device, dtype=dtype)
    out = function(x, *more)
    assert out.is_contiguous() and out.dtype == dtype
    check(kind, out, x)


@given(
    kind=st.sampled_from(list(CASES)),
    rows=st.integers(0, 4),
    inner=st.integers(1, 3),
    half=st.integers(1, 70),
    gap=st.integers(0, 9),
    scale=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_views_of_any_two_strides(kind, rows, inner, half, gap, scale):
    function, _, more, _ = CASES[kind]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffer = torch.randn(inner, rows, 2 * half + gap, device=device) * scale
    x = buffer[..., : 2 * half].transpose(0, 1)
    check(kind, function(x, *more), x)


def test_extreme_values_have_torchs_infinities_and_nans(device, kind):
    """exp overflows here: a saturated gate must come out as 0 or the identity, and a NaN as a NaN."""
    function, name, more, _ = CASES[kind]
    gate = torch.tensor([-3e38, -1e30, -1e4, -89.0, -0.0, 0.0, 89.0, 1e4, 1e18, math.inf, -math.inf, math.nan])
    x = torch.cat((gate, torch.ones_like(gate))).to(device)
    out = function(x, *more)
    exact, plain = formula(kind, x.double()), getattr(reference.activation, name)(x, *more)
    for element in zip(out, exact, plain, strict=True):
        assert_accurate(*element)


def test_fp32_products_are_rounded_once(device):
    """silu(gate), rounded to fp16, would be a subnormal of a few bits; the product is not."""
    x = torch.tensor([[-17.0, 2.0**15]], device=device, dtype=torch.float16)
    expected = (torch.nn.functional.silu(x[:, :1].double()) * x[:, 1:].double()).half()
    assert torch.equal(octavo.silu_and_mul(x), expected)


def test_reference_against_the_formula(kind):
    _, name, more, _ = CASES[kind]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = 3 * torch.randn(3, 2, 96, dtype=dtype)
        out = getattr(reference.activation, name)(x, *more)
        assert out.dtype == dtype
        check(kind, out, x)


def test_opcheck_and_compile(device, kind):
    function, name, more, _ = CASES[kind]
    x = torch.randn(4, 3, 64, device=device)
    check_op(name, function, (x, *more), x, *more)
    check_op(name, function, (x[:, :, :32], *more), x[:, :, :32], *more)


@pytest.mark.gpu
def test_graph_capture_and_replay(kind):
    function, _, more, _ = CASES[kind]
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    function(x, *more)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(x, *more)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, function(x, *more))


@pytest.mark.gpu
def test_offsets_beyond_int32(kind):
    function, _, more, _ = CASES[kind]
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=torch.float16)[:, :64]
    x.normal_()
    assert torch.equal(function(x, *more), function(x.contiguous(), *more))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), TypeError, "x: dtype int32 is not accepted"),
        ([1.0], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.zeros(8, 2).t(), ValueError, "x: the last dimension has stride 2"),
        (torch.zeros(2, 0), ValueError, r"x: shape \(2, 0\)"),
        (torch.zeros(()), ValueError, r"x: shape \(\)"),
        (torch.zeros(4, 4, 4, 8)[::2, ::2, ::2], ValueError, "x: shape .* needs 3 strides"),
    ],
)
def test_errors(kind, x, error, message):
    function, _, more, _ = CASES[kind]
    with pytest.raises(error, match=message):
        function(x, *more)


def test_errors_of_gated_activations():
    for function in (octavo.silu_and_mul, octavo.gelu_and_mul):
        with pytest.raises(ValueError, match="x: last dimension 7 is odd"):
            function(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="approximate: 'erf'; expected"):
        octavo.gelu_and_mul(torch.zeros(2, 8), "erf")


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for width in (2, 256, 512, 14336):
        for kind in CASES:
            x = torch.empty(8, width * 2, device="meta", dtype=dtype)
            activation._activation_cuda(x, kind, gated=kind != "relu2")
