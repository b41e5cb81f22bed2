from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.kernels.quant import w8a8, w8a8_linear
from octavo.kernels.quant.stream_k import share_out
from octavo.kernels.tiles import KNOWN_DEVICES, device_properties
from octavo.reference import w8a8 as reference
from octavo.testing import assert_accurate, check_op

HALF, INT8, FP8 = torch.float16, torch.int8, torch.float8_e4m3fn
KINDS = ["token", "tensor", "zero", "blocks"]


def numbers(dtype, *shape, device="cpu"):
    if dtype == INT8:
        return torch.randint(-128, 128, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).mul_(60).clamp_(-448, 448).to(dtype)


def case(dtype, m, n, k, kind="token", device="cpu", bias=False):
    """All arguments of a linear layer but out_dtype, by name; kind is of the scales, or "zero" for asymmetric x."""
    args = dict(x=numbers(dtype, m, k, device=device), weight=numbers(dtype, n, k, device=device))

    def scales(*shape):
        return (torch.rand(shape, device=device) + 0.5) / (70 * k**0.25)

    if kind == "blocks":
        args |= dict(x_scale=scales(m, k // 128), weight_scale=scales(-(-n // 128), k // 128))
    elif kind == "tensor":
        args |= dict(x_scale=scales(1), weight_scale=scales(1))
    else:
        args |= dict(x_scale=scales(m, 1), weight_scale=scales(n))
    args["bias"] = torch.randn(n, device=device).to(HALF) if bias else None
    if kind == "zero":
        args["x_zero"] = torch.randint(-128, 128, (m, 1), dtype=torch.int32, device=device)
        args["weight_sum"] = args["weight"].sum(1, dtype=torch.int32)
    return args


def function(dtype):
    return octavo.int8_int8_linear if dtype == INT8 else octavo.fp8_linear


def formula(
    x, weight, x_scale, weight_scale, bias, x_zero=None, weight_sum=None, residual=None, activation=None, *, dtype
):
    """With operands dequantised in `dtype`, and all that follows in it."""
    x, weight, x_scale, weight_scale = (t.double() for t in (x, weight, x_scale, weight_scale))
    if x_zero is not None:
        x = x - x_zero
    if x_scale.dim() == 2 and x_scale.shape[1] > 1:
        x_scale = x_scale.repeat_interleave(128, 1)
        weight_scale = weight_scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)
    elif weight_scale.numel() > 1:
        weight_scale = weight_scale.view(-1, 1)
    y = (x * x_scale).to(dtype) @ (weight * weight_scale).to(dtype).t()
    if bias is not None:
        y = y + bias.to(dtype)
    if activation is not None:
        of_up = torch.arange(y.shape[1], device=y.device) // 8 % 2 == 1
        y = torch.nn.functional.silu(y[:, ~of_up]) * y[:, of_up]
    return y if residual is None else y + residual.to(dtype)


def check(out, args):
    assert out.is_contiguous()
    on_tensor_cores = out.is_cuda and args["weight"].dtype == FP8
    if on_tensor_cores and out.dtype == torch.float32:
        out = out.bfloat16()  # Hopper's keep 14 bits of a sum
    exact, plain = formula(**args, dtype=torch.float64), formula(**args, dtype=out.dtype)
    of_tokens = args["x_scale"].shape[-1] == 1 and args["weight_scale"].numel() > 1
    if (
        on_tensor_cores
        and of_tokens
        and out.dtype == torch.bfloat16
        and args["bias"] is None
        and not {"residual", "activation"} & set(args)
        and out.shape[1] % 16 == 0
    ):
        # Over all of K, as torch's own do.
        scales = dict(scale_a=args["x_scale"], scale_b=args["weight_scale"].view(1, -1))
        more = dict(out_dtype=out.dtype, use_fast_accum=True)
        plain = torch._scaled_mm(args["x"], args["weight"].t(), **scales, **more)
    assert_accurate(out, exact, plain)


@pytest.mark.parametrize("m", [1, 3, 17, 70])
@pytest.mark.parametrize(
    ("n", "k", "bias", "kind"),
    [(1, 16, False, "token"), (63, 96, True, "any"), (130, 384, True, "tensor"), (300, 1024, False, "any")],
)
@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
def test_linear(device, dtype, m, n, k, bias, kind, operand):
    if kind == "any":
        kind = "zero" if operand == INT8 else "blocks" if k % 128 == 0 else "token"
    args = case(operand, m, n, k, kind, device, bias)
    out = function(operand)(**args, out_dtype=dtype)
    assert out.dtype == dtype
    check(out, args)


@given(
    m=st.integers(0, 40),
    n=st.integers(1, 280),
    k=st.integers(1, 40),
    gap=st.integers(0, 9),
    operand=st.sampled_from([INT8, FP8]),
    split=st.booleans(),
)
def test_any_shape_and_strided_rows(m, n, k, gap, operand, split):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = case(operand, 2 * m, n, 16 * k, device=device, bias=True)
    wide = numbers(INT8, m, 2, 16 * k + gap, device=device)
    wide[..., : 16 * k] = args["x"].view(INT8).view(m, 2, 16 * k)
    wide = wide.view(operand)
    given_args = args | dict(x=wide[..., : 16 * k], x_scale=args["x_scale"].view(m, 2, 1))
    op, more = torch.ops.octavo.int8_int8_linear, (None, None, torch.float32)
    if operand == FP8:
        op, more = torch.ops.octavo.fp8_linear, (torch.float32, True)
    choose = w8a8.choose_tiles
    with patch.object(w8a8, "choose_tiles", lambda *a, **options: replace(choose(*a, **options), split=split)):
        out = op(*given_args.values(), *more)
    check(out.flatten(0, 1), args)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 20),
    k=st.integers(1, 40),
    operand=st.sampled_from([INT8, FP8]),
    kind=st.sampled_from(["token", "tensor", "zero"]),
    bias=st.booleans(),
    with_residual=st.booleans(),
    activation=st.sampled_from([None, "silu_and_mul"]),
    split=st.booleans(),
    out_dtype=st.sampled_from([HALF, torch.float32]),
)
def test_what_follows(m, n, k, operand, kind, bias, with_residual, activation, split, out_dtype):
    """The residual, and SiLU × gate, whichever tile, and beside everything else."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "token" if operand == FP8 and kind == "zero" else kind
    args = case(operand, m, 16 * n, 16 * k, kind, device, bias)
    if with_residual:
        args["residual"] = torch.randn(m, 8 * n if activation else 16 * n, device=device).to(out_dtype)
    args["activation"] = activation
    choose = w8a8.choose_tiles
    with patch.object(w8a8, "choose_tiles", lambda *a, **options: replace(choose(*a, **options), split=split)):
        out = function(operand)(**args, out_dtype=out_dtype)
    assert out.shape == (m, 8 * n if activation else 16 * n)
    check(out, args)


def test_interleaving(device):
    """Eight of gate, the same eight of up; what belongs to them goes along, and the layer does as the two would."""
    order = octavo.interleave_gate_up(torch.arange(48, device=device))
    assert order.tolist() == [*range(8), *range(24, 32), *range(8, 16), *range(32, 40), *range(16, 24), *range(40, 48)]
    args = case(INT8, 5, 48, 256, "zero", device, bias=True)
    gate_and_up = octavo.int8_int8_linear(**args, out_dtype=torch.float32)
    for name in ("weight", "weight_scale", "weight_sum", "bias"):
        args[name] = octavo.interleave_gate_up(args[name])
        assert args[name].is_contiguous()
    out = octavo.int8_int8_linear(**args, out_dtype=torch.float32, activation="silu_and_mul")
    torch.testing.assert_close(out, octavo.silu_and_mul(gate_and_up), rtol=1e-5, atol=1e-5)
    wide = torch.randn(32, 6, device=device).t().contiguous().t()
    rows = octavo.interleave_gate_up(torch.arange(32, device=device))
    assert torch.equal(octavo.interleave_gate_up(wide), wide[rows])


@pytest.mark.parametrize("shape", [(), (24, 4), (8,)])
def test_errors_of_interleaving(shape):
    with pytest.raises(ValueError, match=r"weight: shape .* expected \[gate and up, ...\], a multiple of 16"):
        octavo.interleave_gate_up(torch.zeros(shape))


def test_int8_sums_are_exact(device):
    """At the largest K, with the largest products."""
    x = torch.full((2, 65536), -128, dtype=INT8, device=device)
    x[1] = 127
    weight, one = torch.full((16, 65536), -128, dtype=INT8, device=device), torch.ones(1, device=device)
    zero = torch.tensor([[127], [-128]], dtype=torch.int32, device=device)
    options = dict(x_zero=zero, weight_sum=weight.sum(1, dtype=torch.int32), out_dtype=torch.float32)
    out = octavo.int8_int8_linear(x, weight, one, one, **options)
    assert out.tolist() == [[255.0 * 128 * 65536] * 16, [-255.0 * 128 * 65536] * 16]


@pytest.mark.parametrize("quantize", [octavo.quantize_int8, octavo.quantize_fp8])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 3)])
def test_after_quantising(device, quantize, shape):
    """What the quantising ops return fits as it is; every shape of x does."""
    x = torch.randn(*shape, 256, device=device)
    q, scale = quantize(x)
    weight, weight_scale = quantize(torch.randn(40, 256, device=device))
    out = function(q.dtype)(q, weight, scale, weight_scale, out_dtype=torch.float32)
    assert out.shape == (*shape, 40)
    args = dict(x=q.view(-1, 256), x_scale=scale.view(-1, 1), weight=weight, weight_scale=weight_scale, bias=None)
    check(out.view(-1, 40), args)
    if quantize is octavo.quantize_fp8:
        q, scale = quantize(x, granularity="group")
        out = octavo.fp8_linear(q, weight, scale, torch.ones(1, 2, device=device), out_dtype=torch.float32)
        args |= dict(x=q.view(-1, 256), x_scale=scale.view(-1, 2), weight_scale=torch.ones(1, 2, device=device))
        check(out.view(-1, 40), args)


@given(tiles=st.integers(1, 300), steps=st.integers(1, 120), idle=st.integers(0, 300), least=st.integers(1, 200))
def test_shares(tiles, steps, idle, least):
    """Shares cover all steps, no program is without one, and parts fit the slots."""
    programs, share = share_out(tiles, steps, tiles + idle, least)
    assert programs <= tiles + idle and min(least, steps) <= share <= steps
    assert (programs - 1) * share < tiles * steps <= programs * share


def test_counters_need_no_clearing(device, monkeypatch):
    """A workspace is whatever memory there is, beside what a call leaves."""
    args = case(INT8, 2, 60, 2048, "zero", device)
    monkeypatch.setattr(w8a8, "_may_copy", lambda *_: False)  # Hopper's own kernels have no counters
    octavo.int8_int8_linear.plans.clear()
    expected = octavo.int8_int8_linear(**args)
    workspaces = []

    def filled(value):
        def allocate(shape, dtype, device):
            if dtype != torch.int64:
                return torch.empty(shape, dtype=dtype, device=device)
            workspaces.append(torch.full(shape, value, dtype=dtype, device=device))
            return workspaces[-1]

        return allocate

    for value in (0, 1, -1, 2**63 - 1):
        monkeypatch.setattr(w8a8, "empty", filled(value))
        out = torch.ops.octavo.int8_int8_linear(*args.values(), torch.bfloat16)
        assert torch.equal(out, expected)
    assert len(workspaces) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_reference_against_the_formula(kind):
    operand = INT8 if kind == "zero" else FP8
    args = case(operand, 5, 140, 384, kind, bias=True)
    last = args.pop("x_zero", None), args.pop("weight_sum", None)
    if operand == INT8:
        out = reference.int8_int8_linear(*args.values(), *last, HALF)
        args |= dict(x_zero=last[0], weight_sum=last[1])
    else:
        out = reference.fp8_linear(*args.values(), HALF, True)
    check(out, args)


def test_opcheck_and_compile(device):
    for operand, last in ((INT8, (None, None, HALF)), (FP8, (HALF, True))):
        args = case(operand, 3, 96, 160, "token", device, bias=True)
        more = dict(residual=torch.randn(3, 48, device=device).to(HALF), activation="silu_and_mul")
        name = function(operand).__name__
        check_op(name, function(operand), (*args.values(), *last, *more.values()), **args, **more, out_dtype=HALF)
    args = case(INT8, 3, 100, 160, "zero", device, bias=True)
    check_op("int8_int8_linear", octavo.int8_int8_linear, (*args.values(), HALF), **args, out_dtype=HALF)
    for kind in ("token", "blocks"):
        args = case(FP8, 3, 100, 256, kind, device, bias=True)
        check_op(
            "fp8_linear", octavo.fp8_linear, (*args.values(), HALF, False), **args, out_dtype=HALF, fast_accum=False
        )


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 128, 256, 1024])
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (6144, 4096), (576, 1536), (49152, 576)])
@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
def test_real_shapes(m, n, k, operand):
    for kind in ("token", "tensor", "zero") if operand == INT8 else ("token", "blocks"):
        if kind == "blocks" and k % 128:
            continue
        args = case(operand, m, n, k, kind, "cuda")
        out = function(operand)(**args)
        check(out, args)
        assert torch.equal(out, function(operand)(**args))


@pytest.mark.gpu
def test_precise_sums():
    args = case(FP8, 512, 4096, 14336, device="cuda")
    exact = formula(**args, dtype=torch.float64)
    assert_accurate(octavo.fp8_linear(**args, fast_accum=False), exact, formula(**args, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [4, 200])
def test_graph_capture_and_replay(m):
    args = case(INT8, m, 8192, 1024, device="cuda")
    octavo.int8_int8_linear(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.int8_int8_linear(**args)
    args["x"].copy_(numbers(INT8, m, 1024, device="cuda"))
    for _ in range(3):
        graph.replay()
    assert torch.equal(out, octavo.int8_int8_linear(**args))


@pytest.mark.gpu
def test_streams_do_not_meet():
    args = [case(FP8, 8, 4096, 8192, device="cuda") for _ in range(4)]
    expected = [octavo.fp8_linear(**a) for a in args]
    streams = [torch.cuda.Stream() for _ in args]
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for stream, a in zip(streams, args, strict=True):
            with torch.cuda.stream(stream):
                outs.append(octavo.fp8_linear(**a))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i % 4]) for i, out in enumerate(outs))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [2, 100])
def test_offsets_beyond_int32(m):
    args = case(INT8, m, 100, 64, device="cuda")
    x = torch.empty(m, (2**31 + 63 * m) // (m - 1) // 16 * 16, device="cuda", dtype=INT8)[:, :64].copy_(args["x"])
    assert torch.equal(octavo.int8_int8_linear(**args | dict(x=x)), octavo.int8_int8_linear(**args))
    n = 2**31 // 1024 + 128
    args = case(INT8, 1030, n, 1024, device="cuda")
    last = {name: args[name][-128:].contiguous() for name in ("weight", "weight_scale")}
    for rows in (m, 1030):  # of out: more than 2³¹ elements at the second
        part = {name: args[name][:rows] for name in ("x", "x_scale")}
        out = octavo.int8_int8_linear(**args | part)[:, -128:]
        assert torch.equal(out, octavo.int8_int8_linear(**args | part | last))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 256)}, TypeError, "x: dtype float32 is not accepted; expected int8"),
        ({"x": torch.zeros(256, 2, dtype=INT8).t()}, ValueError, "x: the last dimension has stride 2"),
        ({"x": torch.zeros(2, 100, dtype=INT8)}, ValueError, r"x: shape \(2, 100\); expected a .* multiple of 16"),
        ({"x": torch.zeros(2, 65552, dtype=INT8)}, ValueError, r"weight: shape \(70, 256\); expected \(70, 65552\)"),
        ({"weight": torch.zeros(70, 256)}, TypeError, "weight: dtype float32"),
        ({"weight": torch.zeros(256, 70, dtype=INT8).t()}, ValueError, "weight: strides .* not contiguous"),
        ({"weight": torch.zeros(70, 256, dtype=INT8, device="meta")}, ValueError, "weight: on meta, but x is on cpu"),
        ({"x_scale": torch.ones(2, 1, dtype=HALF)}, TypeError, "x_scale: dtype float16"),
        ({"x_scale": torch.ones(3, 1)}, ValueError, r"x_scale: shape \(3, 1\); expected one element, or \(2, 1\)"),
        ({"weight_scale": torch.ones(1, 2)}, ValueError, r"weight_scale: shape \(1, 2\); expected one element, or"),
        ({"bias": torch.zeros(71)}, ValueError, r"bias: shape \(71,\); expected \(70,\)"),
        ({"x_zero": torch.zeros(1, dtype=torch.int32)}, ValueError, "weight_sum: None beside x_zero"),
        ({"weight_sum": torch.zeros(70, dtype=torch.int32)}, ValueError, "x_zero: None beside weight_sum"),
        ({"out_dtype": INT8}, TypeError, "out_dtype: torch.int8; expected torch.float16"),
        ({"residual": torch.zeros(2, 70, dtype=HALF)}, TypeError, "residual: dtype float16 .* expected bfloat16"),
        ({"residual": torch.zeros(2, 71).bfloat16()}, ValueError, r"residual: shape \(2, 71\); expected \(2, 70\)"),
        ({"residual": torch.zeros(70, 2).bfloat16().t()}, ValueError, "residual: strides .* not contiguous"),
        ({"activation": "gelu"}, ValueError, "activation: 'gelu'; expected None or \"silu_and_mul\""),
        ({"activation": "silu_and_mul"}, ValueError, "weight: 70 outputs; expected a multiple of 16 beside activation"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        octavo.int8_int8_linear(**case(INT8, 2, 70, 256) | change)


def test_errors_of_zero_points():
    args = case(INT8, 2, 70, 256, "zero")
    for change, error, message in (
        ({"x_zero": torch.zeros(2, 1)}, TypeError, "x_zero: dtype float32"),
        ({"x_zero": torch.zeros(3, dtype=torch.int32)}, ValueError, r"x_zero: shape \(3,\); expected one element"),
        ({"weight_sum": torch.zeros(71, dtype=torch.int32)}, ValueError, r"weight_sum: shape \(71,\); expected"),
    ):
        with pytest.raises(error, match=message):
            octavo.int8_int8_linear(**args | change)
    args = case(INT8, 2, 16, 65552)
    with pytest.raises(ValueError, match="x: 65552 inputs; expected at most 65536"):
        octavo.int8_int8_linear(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 256, dtype=torch.float8_e5m2)}, TypeError, "x: dtype float8_e5m2"),
        ({"x_scale": torch.ones(2, 1)}, ValueError, r"x_scale: shape \(2, 1\); expected \(2, 2\)"),
        ({"weight_scale": torch.ones(3, 2)}, ValueError, r"or \(70,\): one for each output, or \(1, 2\): one for 128"),
    ],
)
def test_errors_of_blocks(change, error, message):
    with pytest.raises(error, match=message):
        octavo.fp8_linear(**case(FP8, 2, 70, 256, "blocks") | change)


def test_what_blocks_have_to_fit():
    args = case(FP8, 2, 200, 144) | dict(weight_scale=torch.ones(2, 2), x_scale=torch.ones(2, 2))
    with pytest.raises(ValueError, match="x: 144 inputs; expected a multiple of 128 beside weight_scale by blocks"):
        octavo.fp8_linear(**args)
    args = case(FP8, 2, 256, 256, "blocks")
    with pytest.raises(ValueError, match="activation: 'silu_and_mul' beside weight_scale by blocks"):
        octavo.fp8_linear(**args, activation="silu_and_mul")


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    few = [(m, n) for m in (7, 30, 64) for n in (1024, 8192)]
    for m, n in (*few, (64, 57344), (128, 4096), (128, 8192), (256, 1024), (256, 8192), (1024, 8192)):
        for k, full in ((4096, False), (4112, True), (8192, False)):
            scales, bias = (empty(m, 1), empty(n)), empty(n, dtype=dtype) if full else None
            zero = (empty(m, 1, dtype=torch.int32), empty(n, dtype=torch.int32)) if full else (None, None)
            x, weight = empty(m, k, dtype=INT8), empty(n, k, dtype=INT8)
            after = None, None
            if full:
                after = empty(m, n // 2, dtype=dtype), "silu_and_mul"
            elif k == 8192:
                after = empty(m, n, dtype=dtype), None
            w8a8_linear._int8_int8_linear_cuda(x, weight, *scales, bias, *zero, dtype, *after)
            if full:
                w8a8_linear._int8_int8_linear_cuda(x, weight, *scales, None, None, None, dtype, *after)
            if device_properties(torch.device("meta")).capability < (8, 9):
                continue
            x, weight = empty(m, k, dtype=FP8), empty(n, k, dtype=FP8)
            w8a8_linear._fp8_linear_cuda(x, weight, *scales, bias, dtype, True, *after)
            if k == 4096:
                w8a8_linear._fp8_linear_cuda(x, weight, *scales, bias, dtype, False)
                scales = empty(m, k // 128), empty(n // 128, k // 128)
                w8a8_linear._fp8_linear_cuda(x, weight, *scales, bias, dtype, True)
    if device_properties(torch.device("meta")).capability == (9, 0):
        for m, n, k in ((16, 10240, 8192), (128, 4096, 14336), (256, 4096, 14336), (4096, 8192, 4096)):
            x, weight, residual = empty(m, k, dtype=FP8), empty(n, k, dtype=FP8), empty(m, n, dtype=dtype)
            for after in ((), (residual,)):
                scales = empty(m, k // 128), empty(n // 128, k // 128)
                w8a8_linear._fp8_linear_cuda(x, weight, *scales, None, dtype, True, *after)
                scales = empty(m, 1), empty(n)
                w8a8_linear._fp8_linear_cuda(x, weight, *scales, None, dtype, True, *after)
                w8a8_linear._fp8_linear_cuda(x, weight, *scales, None, dtype, False, *after)
                x8, weight8 = empty(m, k, dtype=INT8), empty(n, k, dtype=INT8)
                w8a8_linear._int8_int8_linear_cuda(x8, weight8, *scales, None, None, None, dtype, *after)


def test_tiles_fit():
    """On Hopper: tiles of 256 outputs where they need less than twice the waves; few tiles are shared."""
    h100 = KNOWN_DEVICES[90]
    options = dict(copied=True, narrow=False, promoted=False)

    def chosen(tokens, outputs, inputs=8192, **more):
        return w8a8.choose_tiles(tokens, outputs, inputs, h100, **options | more)

    assert [chosen(16, n).split for n in (1024, 4096, 8192)] == [True, False, False]
    many = {
        (128, 28672): 128,
        (256, 8192): 128,
        (256, 28672): 256,
        (256, 57344): 128,
        (1024, 8192): 256,
        (1024, 6144): 128,
    }
    assert {shape: chosen(*shape).block_n for shape in many} == many
    assert all(chosen(*shape).gluon for shape in many)
    for tokens, outputs in ((300, 8192), (70, 57344), (1500, 6144)):  # as a warm-up at powers of two meets it
        power = 1 << tokens.bit_length()
        assert chosen(tokens, outputs) == chosen(power, outputs)
    promoted = {(1024, 8192): 128, (4096, 4096): 128, (4096, 6144): 128, (1024, 28672): 256, (8192, 8192): 256}
    assert {shape: chosen(*shape, promoted=True).block_n for shape in promoted} == promoted
    assert chosen(1024, 4096, 14336, promoted=True).block_n == 256
    assert [chosen(256, n, k).parts for n, k in ((4096, 8192), (4096, 14336), (8192, 14336))] == [1, 2, 1]
    narrow = [chosen(256, n, narrow=True) for n in (4096, 6144)]
    assert [(t.split, t.gluon) for t in narrow] == [(True, False), (False, False)]
