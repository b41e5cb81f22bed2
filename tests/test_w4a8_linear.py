from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.kernels.quant import w4a8, w4a8_linear
from octavo.kernels.tiles import KNOWN_DEVICES
from octavo.reference import w8a8 as reference
from octavo.testing import assert_accurate, check_op

HALF, INT8 = torch.float16, torch.int8


def case(m, n, k, group, minimum=True, bias=False, device="cpu", dtype=HALF):
    """Weights q, and the arguments of int4_int8_linear by name; scale and minimum as a quantiser gives them."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scale = (torch.rand(k // group, n, device=device) * 0.02 + 0.005).to(dtype)
    return q, dict(
        x=torch.randint(-128, 128, (m, k), dtype=INT8, device=device),
        packed=octavo.int4_pack(q),
        x_scale=(torch.rand(m, 1, device=device) + 0.5) / 70,
        scale=scale,
        minimum=(-scale * torch.randint(4, 12, scale.shape, device=device)).to(dtype) if minimum else None,
        bias=torch.randn(n, device=device).to(dtype) if bias else None,
        group_size=group,
    )


def formula(q, x, packed, x_scale, scale, minimum, bias, group_size, *, dtype):
    """With operands dequantised in `dtype`."""

    def per_input(values):
        return values.double().t().repeat_interleave(group_size, 1)

    w = (q.double() - 8) * per_input(scale) if minimum is None else q * per_input(scale) + per_input(minimum)
    y = (x * x_scale.double()).to(dtype) @ w.to(dtype).t()
    return y if bias is None else y + bias.to(dtype)


def check(out, q, args):
    assert out.is_contiguous()
    assert_accurate(out, formula(q, **args, dtype=torch.float64), formula(q, **args, dtype=out.dtype))


def choosing(tiles):
    return patch.object(w4a8, "choose_tiles", lambda *_: tiles)


@pytest.mark.parametrize("m", [1, 3, 17, 70])
@pytest.mark.parametrize(
    ("n", "k", "group", "minimum", "bias"),
    [
        (1, 32, 32, True, False),
        (63, 96, 96, False, True),
        (100, 160, 32, True, True),
        (192, 256, 128, True, False),
        (70, 192, 64, False, False),
        (65, 384, 384, True, True),
        (130, 512, 256, False, True),
    ],
)
def test_int4_int8_linear(device, dtype, m, n, k, group, minimum, bias):
    q, args = case(m, n, k, group, minimum, bias, device, dtype)
    out = octavo.int4_int8_linear(**args, out_dtype=dtype)
    assert out.dtype == dtype
    check(out, q, args)


@given(
    m=st.integers(0, 20),
    n=st.integers(1, 130),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 96, 128, 256]),
    gap=st.integers(0, 9),
    minimum=st.booleans(),
    splits=st.integers(1, 5),
)
def test_any_shape_and_strided_rows(m, n, groups, group, gap, minimum, splits):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    k = groups * group
    q, args = case(2 * m, n, k, group, minimum, True, device, torch.float32)
    wide = torch.randint(-128, 128, (m, 2, k + gap), dtype=INT8, device=device)
    wide[..., :k] = args["x"].view(m, 2, k)
    given_args = args | dict(x=wide[..., :k], x_scale=args["x_scale"].view(m, 2, 1))
    with patch.object(w4a8.Tiles, "splits", lambda self, tiles, steps, properties: min(splits, steps)):
        out = torch.ops.octavo.int4_int8_linear(*given_args.values(), torch.float32)
    check(out.flatten(0, 1), q, args)


def test_sums_of_a_group_are_exact(device):
    """The largest products at the largest K whose sums fit, and one that is larger."""
    one = torch.ones(1, device=device)
    for k in (w4a8.MAX_EXACT, w4a8.MAX_EXACT + 128):
        x = torch.full((2, k), -128, dtype=INT8, device=device)
        x[1] = 127
        packed = octavo.int4_pack(torch.zeros(3, k, dtype=torch.uint8, device=device))
        out = octavo.int4_int8_linear(
            x, packed, one, torch.ones(1, 3, device=device), group_size=k, out_dtype=torch.float32
        )
        assert out.tolist() == [[8.0 * 128 * k] * 3, [-8.0 * 127 * k] * 3]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 3)])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_after_quantising(device, shape, granularity):
    """What the quantising op returns fits as it is; every shape of x does."""
    q, args = case(1, 40, 256, 64, device=device)
    x, x_scale = octavo.quantize_int8(torch.randn(*shape, 256, device=device), granularity=granularity)
    args |= dict(x=x, x_scale=x_scale)
    out = octavo.int4_int8_linear(**args, out_dtype=torch.float32)
    assert out.shape == (*shape, 40)
    args |= dict(x=x.view(-1, 256), x_scale=x_scale.view(-1, 1))
    check(out.view(-1, 40), q, args)


def test_scale_may_be_a_slice_of_a_wider_one(device):
    """As the rows of a fused projection, or of a tensor-parallel shard."""
    q, args = case(2, 192, 128, 64, device=device)
    part = dict(packed=args["packed"][1:2], scale=args["scale"][:, 64:128], minimum=args["minimum"][:, 64:128])
    check(octavo.int4_int8_linear(**args | part), q[64:128], args | part)


def test_as_weights_that_are_not_quantised_again(device):
    """Beside int4_linear, whose weights they are, and activations that int8 holds exactly."""
    _, args = case(4, 100, 192, 64, device=device, dtype=torch.float32)
    x = args.pop("x")
    args.pop("x_scale")
    expected = octavo.int4_linear(x.float(), **args)
    out = octavo.int4_int8_linear(x, x_scale=torch.ones(1, device=device), **args, out_dtype=torch.float32)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)


def test_counters_need_no_clearing(device, monkeypatch):
    """A workspace is whatever memory there is."""
    _, args = case(2, 60, 2048, 128, False, device=device)
    expected = octavo.int4_int8_linear(**args)
    workspaces = []

    def filled(value):
        def allocate(shape, dtype, device):
            if dtype != torch.int64:
                return torch.empty(shape, dtype=dtype, device=device)
            workspaces.append(torch.full(shape, value, dtype=dtype, device=device))
            return workspaces[-1]

        return allocate

    for value in (0, 1, -1, 2**63 - 1):
        monkeypatch.setattr(w4a8, "empty", filled(value))
        out = torch.ops.octavo.int4_int8_linear(*args.values(), torch.bfloat16)
        assert torch.equal(out, expected)
    assert len(workspaces) == 4


@pytest.mark.parametrize("minimum", [False, True])
def test_reference_against_the_formula(minimum):
    q, args = case(5, 100, 160, 32, minimum, True)
    check(reference.int4_int8_linear(*args.values(), HALF), q, args)


def test_opcheck_and_compile(device):
    for minimum in (False, True):
        _, args = case(3, 100, 1280, 32, minimum, True, device)
        check_op("int4_int8_linear", octavo.int4_int8_linear, (*args.values(), HALF), **args, out_dtype=HALF)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 256, 1024])
@pytest.mark.parametrize(
    ("n", "k", "group", "minimum"),
    [
        (4096, 14336, 128, False),
        (4096, 14336, 32, True),
        (6144, 4096, 4096, False),
        (576, 1536, 64, True),
        (49155, 576, 576, False),
    ],
)
def test_real_shapes(m, n, k, group, minimum):
    q, args = case(m, n, k, group, minimum, device="cuda", dtype=torch.bfloat16)
    out = octavo.int4_int8_linear(**args)
    check(out, q, args)
    assert torch.equal(out, octavo.int4_int8_linear(**args))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [4, 200])
def test_graph_capture_and_replay(m):
    _, args = case(m, 512, 4096, 128, device="cuda", bias=True)
    octavo.int4_int8_linear(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.int4_int8_linear(**args)
    args["x"].copy_(torch.randint(-128, 128, (m, 4096), dtype=INT8, device="cuda"))
    for _ in range(3):
        graph.replay()
    assert torch.equal(out, octavo.int4_int8_linear(**args))


@pytest.mark.gpu
def test_streams_do_not_meet():
    args = [case(8, 4096, 8192, 128, device="cuda")[1] for _ in range(4)]
    expected = [octavo.int4_int8_linear(**a) for a in args]
    streams = [torch.cuda.Stream() for _ in args]
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for stream, a in zip(streams, args, strict=True):
            with torch.cuda.stream(stream):
                outs.append(octavo.int4_int8_linear(**a))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i % 4]) for i, out in enumerate(outs))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    _, args = case(2, 100, 64, 32, device="cuda")
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=INT8)[:, :64].copy_(args["x"])
    assert torch.equal(octavo.int4_int8_linear(**args | dict(x=x)), octavo.int4_int8_linear(**args))
    n, k, last = 2**31 // 32 // 32 + 128, 4096, slice(-128, None)  # of packed: 2³¹ words and two rows of tiles more
    packed = torch.randint(-(2**15), 2**15, (n // 64, k // 128, 64, 32), dtype=torch.int16, device="cuda")
    scale = torch.rand(k // 128, n, device="cuda").half()
    q = octavo.int4_unpack(packed[-2:], 128, k)
    for m in (1, 1030):  # of out: more than 2³¹ elements at the second
        _, args = case(m, 1, k, 128, False, device="cuda")
        out = octavo.int4_int8_linear(**args | dict(packed=packed, scale=scale))
        check(out[:, last].contiguous(), q, args | dict(scale=scale[:, last]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 128)}, TypeError, "x: dtype float32 is not accepted; expected int8"),
        ({"x": torch.zeros((), dtype=INT8)}, ValueError, r"x: shape \(\)"),
        ({"x": torch.zeros(128, 2, dtype=INT8).t()}, ValueError, "x: the last dimension has stride 2"),
        ({"x": torch.zeros(2, 96, dtype=INT8)}, ValueError, "group_size: 64; expected .* divides x's 96 inputs"),
        ({"group_size": 16}, ValueError, "group_size: 16; expected a multiple of 32"),
        ({"group_size": 128}, ValueError, r"scale: shape \(2, 70\); expected \(1, 70\)"),
        ({"packed": torch.zeros(2, 1, 64, 32)}, TypeError, "packed: dtype float32"),
        ({"packed": torch.zeros(1, 1, 64, 32, dtype=torch.int16)}, ValueError, r"packed: shape .* expected \(2, 1, 64"),
        ({"packed": torch.zeros(2, 1, 32, 64, dtype=torch.int16).mT}, ValueError, "packed: strides .* not contiguous"),
        ({"packed": torch.zeros(2, 1, 64, 32, dtype=torch.int16, device="meta")}, ValueError, "packed: on meta, but x"),
        ({"x_scale": torch.ones(2, 1, dtype=HALF)}, TypeError, "x_scale: dtype float16"),
        ({"x_scale": torch.ones(3, 1)}, ValueError, r"x_scale: shape \(3, 1\); expected one element, or \(2, 1\)"),
        ({"x_scale": torch.ones(4, 1)[::2]}, ValueError, "x_scale: strides .* not contiguous"),
        ({"x_scale": torch.ones(2, 1, device="meta")}, ValueError, "x_scale: on meta, but x is on cpu"),
        ({"scale": torch.zeros(2, 70, dtype=INT8)}, TypeError, "scale: dtype int8"),
        ({"minimum": torch.zeros(2, 71)}, ValueError, r"minimum: shape \(2, 71\); expected \(2, 70\)"),
        ({"bias": torch.zeros(71)}, ValueError, r"bias: shape \(71,\); expected \(70,\)"),
        ({"out_dtype": INT8}, TypeError, "out_dtype: torch.int8; expected torch.float16"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        octavo.int4_int8_linear(**case(2, 70, 128, 64, bias=True)[1] | change)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    def start(m, n, k, group, with_minimum):
        scale, bias = empty(k // group, n, dtype=dtype), empty(n, dtype=dtype) if k % 128 else None
        packed = empty(n // 64, -(-k // 128), 64, 32, dtype=torch.int16)
        args = empty(m, k, dtype=INT8), packed, empty(m, 1), scale, scale if with_minimum else None, bias
        w4a8_linear._int4_int8_linear_cuda(*args, group, dtype)

    for m in (7, 30, 64, 1024):
        ragged = ((4128, 32), (4160, 64)) if m in (7, 1024) else ()
        for k, group in ((4096, 128), (4096, 64), (4096, 32), (4096, 4096), *ragged):
            for with_minimum in (False, True) if group < 4096 else (False,):
                start(m, 4096, k, group, with_minimum)
    for m, n in ((7, 65536), (1024, 1024)):  # few tokens of whole tiles, many of shared ones
        start(m, n, 4096, 128, False)


def test_tiles():
    """As a warm-up at powers of two meets them; programs fill the GPU where there are few tiles, and no more."""
    h100 = KNOWN_DEVICES[90]
    for tokens in (3, 17, 40, 100, 1000):
        power = 1 << (tokens - 1).bit_length()
        assert w4a8.choose_tiles(tokens, 128, False, h100) == w4a8.choose_tiles(power, 128, False, h100)
    few, many = (w4a8.choose_tiles(tokens, 128, False, h100) for tokens in (16, 1024))
    assert [few.splits(tiles, 64, h100) for tiles in (16, 128, 448, 1000)] == [16, 4, 1, 1]
    assert [many.splits(tiles, 64, h100) for tiles in (32, 128, 1024)] == [4, 1, 1]
    assert replace(few, programs_per_sm=8).splits(128, 9, h100) == 2, "a program has four steps"
