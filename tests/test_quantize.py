import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.launch import record_launches
from octavo.kernels.quant import by_tensor, quantize
from octavo.kernels.tiles import KNOWN_DEVICES, device_properties
from octavo.testing import INTERPRET, check_op

LIMITS = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}
SMALLEST = 2.0**-126
NAN, INF = math.nan, math.inf


@pytest.fixture(params=LIMITS, ids=lambda d: str(d).removeprefix("torch."))
def out_dtype(request):
    return request.param


@pytest.fixture(params=["token", "group", "tensor"])
def granularity(request):
    return request.param


def call(x, dtype, scale=None, **options):
    if dtype == torch.int8:
        return octavo.quantize_int8(x, scale, **options)
    return octavo.quantize_fp8(x, scale, dtype=dtype, **options)


def bits(q):
    """What can be compared: fp8 has no equality of its own, and its NaN has several patterns."""
    return q if q.dtype == torch.int8 else q.float().nan_to_num(nan=1e9)


def same(actual, expected):
    """Bit for bit: every step of these ops is one rounding of fp32, on a GPU as on a CPU."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape and a.is_contiguous()
        assert torch.equal(bits(a).cpu(), bits(e).cpu())


def expected(x, dtype, granularity="token", group_size=128):
    return reference.quantize.quantize(x.cpu(), None, granularity, group_size, dtype)


def values(dtype):
    """The numbers of a dtype from 0 to its limit, in order."""
    if dtype == torch.int8:
        return torch.arange(128.0)
    numbers = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 111), (37, 128), (4, 4096), (1, 14336), (2, 20000), (0, 8)])
def test_against_the_reference(device, dtype, out_dtype, granularity, shape):
    x = (torch.randn(shape) * torch.randn((*shape[:-1], 1)).exp()).to(device, dtype)
    group_size = next(size for size in (128, 37, 32, 21, 8, 1) if shape[-1] % size == 0)
    out = call(x, out_dtype, granularity=granularity, group_size=group_size)
    same(out, expected(x, out_dtype, granularity, group_size))
    by = {"token": (*shape[:-1], 1), "group": (*shape[:-1], shape[-1] // group_size), "tensor": (1,)}
    assert out[1].shape == by[granularity]


@pytest.mark.parametrize("shape", [(3, 63), (2, 5, 111), (2, 14336), (0, 8)])
def test_a_given_scale(device, dtype, out_dtype, shape):
    x = torch.randn(shape, device=device, dtype=dtype)
    for scale in (torch.tensor([3 / LIMITS[out_dtype]]), torch.tensor(0.5)):
        q = call(x, out_dtype, scale.to(device))
        same([q], [reference.quantize.quantize(x.cpu(), scale, "token", 0, out_dtype)[0]])


@given(
    rows=st.integers(0, 5),
    inner=st.integers(1, 4),
    groups=st.integers(1, 5),
    group_size=st.integers(1, 70),
    gap=st.integers(0, 9),
    dtype=st.sampled_from(list(LIMITS)),
    granularity=st.sampled_from(["token", "group", "tensor"]),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_views_of_any_two_strides(rows, inner, groups, group_size, gap, dtype, granularity, size):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = groups * group_size
    x = (torch.randn(inner, rows, width + gap) * size).to(device)[..., :width].transpose(0, 1)
    out = call(x, dtype, granularity=granularity, group_size=group_size)
    same(out, expected(x, dtype, granularity, group_size))


def test_every_number_and_every_tie(device, out_dtype):
    """Ties go to the even neighbour, what is a hair off a tie to the nearer one, what is beyond the limit to it."""
    numbers = values(out_dtype)
    ties = (numbers[1:] + numbers[:-1]) / 2
    even = torch.where(torch.arange(len(ties)) % 2 == 0, numbers[:-1], numbers[1:])
    x = torch.cat([numbers, ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), torch.tensor([1e5, INF])])
    rounded = torch.cat([numbers, even, numbers[1:], numbers[:-1], numbers[-1:], numbers[-1:]])
    q = call(torch.stack([x, -x]).to(device), out_dtype, torch.ones(1, device=device)).float().cpu()
    assert torch.equal(q, torch.stack([rounded, -rounded]))
    assert numbers[-1] == LIMITS[out_dtype]


def test_the_reference_is_within_half_a_unit(out_dtype):
    """Against float64: the scale to fp32's rounding, and each number half the distance to its neighbour off at most."""
    x = torch.randn(50, 300) * torch.randn(50, 1).exp()
    q, scale = reference.quantize.quantize(x, None, "token", 0, out_dtype)
    exact = x.double().abs().amax(-1, keepdim=True) / LIMITS[out_dtype]
    torch.testing.assert_close(scale.double(), exact, rtol=1e-7, atol=0)
    numbers = values(out_dtype).double()
    size = (x.double() / exact).abs().contiguous()
    above = torch.searchsorted(numbers, size).clamp(1, len(numbers) - 1)
    unit = numbers[above] - numbers[above - 1]
    assert ((q.double().abs() - size).abs() <= unit / 2 + 1e-6 * size).all()
    assert (q.double().sign() * x.sign() >= 0).all()


@pytest.mark.parametrize("width", [40, 2600, 20000])
def test_zeros_have_a_scale(device, dtype, out_dtype, granularity, width):
    x = torch.zeros(3, width, device=device, dtype=dtype)
    q, scale = call(x, out_dtype, granularity=granularity, group_size=20)
    assert (q.float() == 0).all() and (scale == SMALLEST).all()


def test_no_rows_have_a_scale_of_their_tensor(device, out_dtype):
    q, scale = call(torch.zeros(0, 8, device=device), out_dtype, granularity="tensor")
    assert q.shape == (0, 8) and scale.tolist() == [SMALLEST]


@pytest.mark.parametrize("width", [40, 2600, 20000])
def test_nan_and_infinities_spoil_no_other_value(device, dtype, out_dtype, granularity, width):
    """A NaN counts for no scale; neither does an infinity, which saturates."""
    x = torch.randn(4, width, device=device, dtype=dtype)
    x[0] = 0.5
    x[2] = NAN
    clean = x.clone()
    clean[2], clean[3, 7:10] = 0, 0
    x[3, 7], x[3, 8], x[3, 9] = NAN, INF, -INF
    q, scale = call(x, out_dtype, granularity=granularity, group_size=20)
    expected_q, expected_scale = call(clean, out_dtype, granularity=granularity, group_size=20)
    assert torch.equal(scale, expected_scale) and scale.isfinite().all()
    limit, nothing = LIMITS[out_dtype], 0.0 if out_dtype == torch.int8 else NAN
    wanted = expected_q.float()
    wanted[2] = nothing
    wanted[3, 7:10] = torch.tensor([nothing, limit, -limit])
    torch.testing.assert_close(q.float(), wanted, rtol=0, atol=0, equal_nan=True)


def test_tiny_numbers_keep_their_digits(device, out_dtype):
    """Far below fp16's smallest number; what is below 2⁻¹²⁶ scales is rounded in units of it."""
    x = torch.linspace(-1, 1, 255, device=device)
    q, scale = call(x * 2.0**-100, out_dtype)
    same([q, scale * 2.0**100], call(x, out_dtype))
    q, scale = call(x * 2.0**-130, out_dtype)
    assert scale.item() == SMALLEST and q.float().abs().max() <= 2.0**-4


def test_minus_128_is_never_made(device):
    x = torch.tensor([[-1.0, 0.99], [-1e30, 1.0]], device=device)
    assert octavo.quantize_int8(x)[0][:, 0].tolist() == [-127, -127]
    assert octavo.quantize_int8(x, torch.tensor([1e-3], device=device))[0].tolist() == [-127, 127]


def test_one_dimension_is_one_token(device, out_dtype):
    x = torch.randn(130, device=device)
    q, scale = call(x, out_dtype)
    assert q.shape == (130,) and scale.shape == (1,)
    same([q, scale], expected(x, out_dtype))


def test_opcheck_and_compile(device, granularity):
    x, scale = torch.randn(4, 3, 64, device=device), torch.tensor([0.02], device=device)
    options = dict(granularity=granularity, group_size=32)
    check_op("quantize_int8", octavo.quantize_int8, (x, None, granularity, 32), x, **options)
    e5m2 = torch.float8_e5m2
    check_op("quantize_fp8", octavo.quantize_fp8, (x, None, granularity, 32, e5m2), x, dtype=e5m2, **options)
    if granularity == "tensor":
        check_op("quantize_int8", octavo.quantize_int8, (x, scale, "tensor", 32), x, scale)
        check_op("quantize_fp8", octavo.quantize_fp8, (x, scale, "token", 32, torch.float8_e4m3fn), x, scale)


@pytest.mark.gpu
def test_graph_capture_and_replay(out_dtype, granularity):
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    call(x, out_dtype, granularity=granularity)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, out_dtype, granularity=granularity)
    for size in (100.0, 0.01):  # nothing of a larger maximum is left
        x.copy_(torch.randn_like(x) * size)
        graph.replay()
        same(out, call(x, out_dtype, granularity=granularity))


@pytest.mark.gpu
def test_offsets_beyond_int32(out_dtype, granularity):
    x = torch.empty(2, 2**31 + 128, device="cuda", dtype=torch.float16)[:, :128]
    x.normal_()
    same(call(x, out_dtype, granularity=granularity), call(x.contiguous(), out_dtype, granularity=granularity))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=[1.0]), TypeError, "x: expected a torch.Tensor, got list"),
        (dict(x=torch.zeros(8, 2).t()), ValueError, "x: the last dimension has stride 2"),
        (dict(x=torch.zeros(2, 0)), ValueError, r"x: shape \(2, 0\)"),
        (dict(x=torch.zeros(())), ValueError, r"x: shape \(\)"),
        (dict(x=torch.zeros(4, 4, 4, 8)[::2, ::2, ::2]), ValueError, "x: shape .* needs 3 strides"),
        (dict(scale=torch.ones(2)), ValueError, r"scale: shape \(2,\); expected one element"),
        (dict(scale=torch.ones(1).half()), TypeError, "scale: dtype float16 is not accepted; expected float32"),
        (dict(scale=0.5), TypeError, "scale: expected a torch.Tensor, got float"),
        (dict(scale=torch.ones(1, device="meta")), ValueError, "scale: on meta, but x is on cpu"),
        (
            dict(scale=torch.ones(1), granularity="group", group_size=4),
            ValueError,
            "granularity: 'group' beside a scale",
        ),
        (dict(granularity="row"), ValueError, "granularity: 'row'; expected"),
        (dict(granularity="group", group_size=3), ValueError, "group_size: 3; expected a divisor of the 8 elements"),
        (dict(granularity="group", group_size=0), ValueError, "group_size: 0; expected a divisor"),
        (dict(granularity="group", group_size=16), ValueError, "group_size: 16; expected a divisor"),
    ],
)
def test_errors(change, error, message):
    for function in (octavo.quantize_int8, octavo.quantize_fp8):
        with pytest.raises(error, match=message):
            function(**dict(x=torch.zeros(2, 8)) | change)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"dtype: torch.int8; expected torch.float8_e4m3fn or torch.float8_e5m2"):
        octavo.quantize_fp8(torch.zeros(2, 8), dtype=torch.int8)


def test_e4m3_needs_a_gpu_that_has_it():
    x = torch.empty(2, 8, device="meta")
    for capability, properties in KNOWN_DEVICES.items():
        with record_launches(properties) as recorded:
            quantize._quantize_cuda(x, None, "token", 0, torch.float8_e5m2)
            if capability == 80:
                with pytest.raises(ValueError, match=r"float8_e4m3fn on A100 \(compute capability 8.0\); expected"):
                    quantize._quantize_cuda(x, None, "token", 0, torch.float8_e4m3fn)
            else:
                quantize._quantize_cuda(x, None, "token", 0, torch.float8_e4m3fn)
        # Under the interpreter nothing is native.
        assert all(launch.constexprs["NATIVE"] == (capability == 90 and not INTERPRET) for launch in recorded)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    scale = torch.empty(1, device="meta")
    for out_dtype in LIMITS:
        if out_dtype == torch.float8_e4m3fn and device_properties(scale.device).capability < (8, 9):
            continue
        for width in (64, 4544, 14336, 28672):
            x = torch.empty(8, width, device="meta", dtype=dtype)
            quantize._quantize_cuda(x, None, "token", 0, out_dtype)
        quantize._quantize_cuda(x, None, "group", 128, out_dtype)
        by_tensor.by_tensor_cuda(x, None, out_dtype)
        by_tensor.by_tensor_cuda(x, scale, out_dtype)
