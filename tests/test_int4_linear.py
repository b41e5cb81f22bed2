import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.kernels.quant import cpu, int4
from octavo.reference import quant as reference
from octavo.testing import assert_accurate, check_op, without_interpreter

HALF = torch.float16


def case(n, k, group, device="cpu", dtype=HALF, minimum=True, bias=False):
    """Weights q, and the arguments of int4_linear after x; scale and minimum as a quantiser gives them."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scale = (torch.rand(k // group, n, device=device) * 0.02 + 0.005).to(dtype)
    low = (-scale * torch.randint(4, 12, scale.shape, device=device)).to(dtype) if minimum else None
    return q, [octavo.int4_pack(q), scale, low, torch.randn(n, device=device).to(dtype) if bias else None]


def dequantized(q, scale, minimum):
    """In float64, from the formula."""

    def per_input(values):
        return values.double().t().repeat_interleave(q.shape[1] // values.shape[0], 1)

    if minimum is None:
        return (q.double() - 8) * per_input(scale)
    return q.double() * per_input(scale) + per_input(minimum)


def check(out, x, q, args, residual=None, activation=None):
    _, scale, minimum, bias = args
    w = dequantized(q, scale, minimum)
    exact, plain = x.double() @ w.t(), x @ w.to(x.dtype).t()
    if bias is not None:
        exact, plain = exact + bias.double(), plain + bias.to(x.dtype)
    if activation is not None:
        gate, up = (exact.view(len(exact), -1, 2, 8)[:, :, i].flatten(1) for i in range(2))
        exact = gate / (1 + (-gate).exp()) * up
        gate, up = (plain.view(len(plain), -1, 2, 8)[:, :, i].flatten(1) for i in range(2))
        plain = octavo.silu_and_mul(torch.cat([gate, up], -1))
    if residual is not None:
        exact, plain = exact + residual.double(), plain + residual
    assert out.dtype == x.dtype and out.is_contiguous()
    assert_accurate(out, exact, plain)


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
    ],
)
def test_int4_linear(device, dtype, m, n, k, group, minimum, bias):
    q, args = case(n, k, group, device, dtype, minimum, bias)
    x = torch.randn(m, k, device=device, dtype=dtype)
    check(octavo.int4_linear(x, *args, group_size=group), x, q, args)


@given(
    m=st.integers(0, 20),
    n=st.integers(1, 130),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 96, 128]),
    gap=st.integers(0, 9),
    minimum=st.booleans(),
)
def test_any_shape_and_strided_rows(m, n, groups, group, gap, minimum):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    k = groups * group
    q, args = case(n, k, group, device, torch.float32, minimum, bias=True)
    x = torch.randn(m, 2, k + gap, device=device, dtype=HALF)[..., :k]
    check(octavo.int4_linear(x, *args, group_size=group), x, q, args)


@given(
    m=st.integers(0, 20),
    n=st.integers(1, 10),
    group=st.sampled_from([32, 96, 128]),
    minimum=st.booleans(),
    bias=st.booleans(),
    with_residual=st.booleans(),
    activation=st.sampled_from([None, "silu_and_mul"]),
    dtype=st.sampled_from([HALF, torch.float32]),
)
def test_what_follows(m, n, group, minimum, bias, with_residual, activation, dtype):
    """The residual, and SiLU × gate, beside everything else; by the kernel, the reference and the CPU backend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, args = case(16 * n, 2 * group, group, device, dtype, minimum, bias)
    x = torch.randn(m, 2 * group, device=device, dtype=dtype)
    residual = None
    if with_residual:
        residual = torch.randn(m, 8 * n if activation else 16 * n, device=device, dtype=dtype)
    for function in (octavo.int4_linear, reference.int4_linear, cpu.int4_linear):
        if function is octavo.int4_linear:
            out = function(x, *args, group_size=group, residual=residual, activation=activation)
        else:
            out = function(x, *args, group, residual, activation)
        assert out.shape == (m, 8 * n if activation else 16 * n)
        check(out, x, q, args, residual, activation)


def test_gate_and_up_interleaved(device):
    """Rows of q and columns of scale and minimum go along, and the layer does as the two would."""
    q, args = case(48, 128, 64, device, torch.float32, bias=True)
    x = torch.randn(3, 128, device=device)
    expected = octavo.silu_and_mul(octavo.int4_linear(x, *args, group_size=64))
    packed = octavo.int4_pack(octavo.interleave_gate_up(q))
    scale, minimum = (octavo.interleave_gate_up(t, dim=1) for t in args[1:3])
    assert scale.is_contiguous() and torch.equal(scale[:, 8:16], args[1][:, 24:32])
    bias = octavo.interleave_gate_up(args[3])
    out = octavo.int4_linear(x, packed, scale, minimum, bias, group_size=64, activation="silu_and_mul")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "dim"), [((4, 24), 1), ((16, 8), -1), ((16,), 1), ((16,), -2)])
def test_errors_of_interleaving_columns(shape, dim):
    with pytest.raises(
        ValueError, match=r"weight: shape .*; expected gate and up along dimension .*, a multiple of 16"
    ):
        octavo.interleave_gate_up(torch.zeros(shape), dim)


def test_weights_are_not_rounded(device):
    """fp32 scales beside half activations keep their digits: one product an output shows them."""
    q, args = case(64, 128, 128, device, torch.float32, minimum=False)
    x = torch.zeros(1, 128, device=device, dtype=HALF)
    x[0, 5] = 1.0
    out = octavo.int4_linear(x, *args, group_size=128)
    assert torch.equal(out[0], dequantized(q, *args[1:3])[:, 5].to(HALF))


def test_scale_may_be_a_slice_of_a_wider_one(device):
    """As the rows of a fused projection, or of a tensor-parallel shard."""
    q, args = case(192, 128, 64, device)
    x = torch.randn(2, 128, device=device, dtype=HALF)
    part = [args[0][1:2], args[1][:, 64:128], args[2][:, 64:128], None]
    check(octavo.int4_linear(x, *part, group_size=64), x, q[64:128], part)


def test_no_tokens_and_one_dimension(device):
    q, args = case(40, 64, 32, device)
    assert octavo.int4_linear(torch.empty(0, 3, 64, device=device, dtype=HALF), *args, group_size=32).shape == (
        0,
        3,
        40,
    )
    x = torch.randn(64, device=device, dtype=HALF)
    check(octavo.int4_linear(x, *args, group_size=32), x, q, args)


def test_reference_against_the_formula():
    for minimum in (False, True):
        q, args = case(100, 160, 32, minimum=minimum, bias=True)
        x = torch.randn(5, 160, dtype=HALF)
        check(reference.int4_linear(x, *args, 32), x, q, args)


def test_opcheck_and_compile(device):
    _, args = case(100, 160, 32, device, bias=True)
    x = torch.randn(3, 160, device=device, dtype=HALF)
    check_op("int4_linear", octavo.int4_linear, (x, *args, 32), x, *args, group_size=32)
    _, args = case(96, 160, 32, device)
    after = torch.randn(3, 48, device=device, dtype=HALF), "silu_and_mul"
    more = dict(zip(("residual", "activation"), after, strict=True))
    check_op("int4_linear", octavo.int4_linear, (x, *args, 32, *after), x, *args, group_size=32, **more)


@pytest.fixture
def cache(monkeypatch):
    """The CPU backend with nothing kept and an ample budget; what it dequantises is counted."""
    monkeypatch.setattr(cpu, "_copies", {})
    monkeypatch.setenv("OCTAVO_CPU_WEIGHT_CACHE", "1")
    dequantize = reference.dequantize_int4
    calls = []
    monkeypatch.setattr(reference, "dequantize_int4", lambda *a: (calls.append(1), dequantize(*a))[1])
    with without_interpreter():
        yield calls


@pytest.mark.parametrize("inference", [False, True])
def test_cpu_backend_dequantises_once(cache, inference):
    with torch.inference_mode(inference):
        q, args = case(100, 160, 32, bias=True)
        for m in (1, 7):
            x = torch.randn(m, 160, dtype=HALF)
            check(octavo.int4_linear(x, *args, group_size=32), x, q, args)
    assert len(cache) == 1


def test_cpu_backend_frees_the_copy_with_the_weight(cache):
    _, args = case(64, 64, 32)
    octavo.int4_linear(torch.randn(1, 64), *args, group_size=32)
    (copy,) = (weakref.ref(c.weight) for c in cpu._copies.values())
    del args[0]
    gc.collect()
    assert cpu._copies == {} and copy() is None


def change_scale(args):
    args[1].mul_(2)


def change_packed(args):
    args[0].bitwise_xor_(3)


def replace_memory_of_minimum(args):
    args[2].data = args[2] * 3


def replace_scale(args):
    args[1] = args[1] * 2


def drop_minimum(args):
    args[2] = None


@pytest.mark.parametrize(
    "change", [change_scale, change_packed, replace_memory_of_minimum, replace_scale, drop_minimum]
)
def test_cpu_backend_sees_changes(cache, change):
    _, args = case(64, 64, 32)
    x = torch.randn(2, 64)
    before = octavo.int4_linear(x, *args, group_size=32)
    change(args)
    out = octavo.int4_linear(x, *args, group_size=32)
    q = octavo.int4_unpack(args[0], 64, 64)
    check(out, x, q, args)
    assert not torch.equal(out, before) and len(cpu._copies) == 1


def test_cpu_backend_keeps_to_its_budget(cache, monkeypatch):
    cases = [case(64, 64, 32)[1] for _ in range(3)]
    x = torch.randn(1, 64)
    monkeypatch.setenv("OCTAVO_CPU_WEIGHT_CACHE", str(2.5 * 64 * 64 * 4 / 1e9))
    for _ in range(2):
        for args in cases:
            octavo.int4_linear(x, *args, group_size=32)
    assert len(cpu._copies) == 2 and len(cache) == 4


def test_cpu_backend_without_copies(cache, monkeypatch):
    monkeypatch.setenv("OCTAVO_CPU_WEIGHT_CACHE", "0")
    q, args = case(64, 64, 32)
    x = torch.randn(2, 64)
    for _ in range(2):
        check(octavo.int4_linear(x, *args, group_size=32), x, q, args)
    assert cpu._copies == {} and len(cache) == 2


def test_cpu_budget_is_a_quarter_of_memory_by_default(monkeypatch):
    monkeypatch.delenv("OCTAVO_CPU_WEIGHT_CACHE", raising=False)
    monkeypatch.setattr(cpu.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert cpu._budget() == 1024_000


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 256])
@pytest.mark.parametrize(
    ("n", "k", "group", "minimum"),
    [(4096, 14336, 128, False), (4096, 14336, 32, True), (576, 1536, 64, True), (49155, 576, 576, False)],
)
def test_real_shapes(m, n, k, group, minimum):
    q, args = case(n, k, group, "cuda", torch.bfloat16, minimum)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    out = octavo.int4_linear(x, *args, group_size=group)
    check(out, x, q, args)
    assert torch.equal(out, octavo.int4_linear(x, *args, group_size=group))


@pytest.mark.gpu
def test_graph_capture_and_replay():
    _, args = case(512, 1024, 128, "cuda", bias=True)
    x = torch.randn(4, 1024, device="cuda", dtype=HALF)
    octavo.int4_linear(x, *args, group_size=128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.int4_linear(x, *args, group_size=128)
    x.normal_()
    graph.replay()
    assert torch.equal(out, octavo.int4_linear(x, *args, group_size=128))


@pytest.mark.gpu
def test_offsets_beyond_int32_in_x():
    _, args = case(100, 64, 32, "cuda")
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=HALF)[:, :64]
    x.normal_()
    assert torch.equal(octavo.int4_linear(x, *args, group_size=32), octavo.int4_linear(x.clone(), *args, group_size=32))


@pytest.mark.gpu
def test_offsets_beyond_int32_in_packed_and_out():
    n, k, last = 2**31 // 32 // 32 + 128, 4096, slice(-128, None)  # of packed: 2³¹ words and two rows of tiles more
    packed = torch.randint(-(2**15), 2**15, (n // 64, k // 128, 64, 32), dtype=torch.int16, device="cuda")
    scale = torch.rand(k // 128, n, device="cuda").half()
    for m in (1, 1030):  # of out: more than 2³¹ elements at the second
        x = torch.randn(m, k, device="cuda", dtype=HALF)
        out = octavo.int4_linear(x, packed, scale, group_size=128)
        q = octavo.int4_unpack(packed[-2:], 128, k)
        check(out[:, last].contiguous(), x, q, [None, scale[:, last], None, None])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 128, dtype=torch.int32)}, TypeError, "x: dtype int32 is not accepted"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: shape \(\)"),
        ({"x": torch.zeros(128, 2).t()}, ValueError, "x: the last dimension has stride 2"),
        (
            {"x": torch.zeros(2, 96)},
            ValueError,
            "group_size: 64; expected a multiple of 32 that divides x's 96 inputs",
        ),
        ({"group_size": 16}, ValueError, "group_size: 16; expected a multiple of 32"),
        ({"group_size": -1}, ValueError, "group_size: -1"),
        ({"group_size": 128}, ValueError, r"scale: shape \(2, 70\); expected \(1, 70\)"),
        ({"packed": torch.zeros(2, 1, 64, 32)}, TypeError, "packed: dtype float32"),
        (
            {"packed": torch.zeros(1, 1, 64, 32, dtype=torch.int16)},
            ValueError,
            r"packed: shape .* expected \(2, 1, 64, 3",
        ),
        ({"packed": torch.zeros(2, 1, 32, 64, dtype=torch.int16).mT}, ValueError, "packed: strides .* not contiguous"),
        (
            {"packed": torch.zeros(2, 1, 64, 32, dtype=torch.int16, device="meta")},
            ValueError,
            "packed: on meta, but x",
        ),
        ({"scale": torch.zeros(2, 70, dtype=torch.int8)}, TypeError, "scale: dtype int8"),
        ({"scale": torch.zeros(70)}, ValueError, r"scale: shape \(70,\) has 1 dimensions; expected 2"),
        ({"scale": torch.zeros(70, 2).t()}, ValueError, "scale: the last dimension has stride 2"),
        ({"scale": torch.zeros(2, 70, device="meta")}, ValueError, "scale: on meta, but x is on cpu"),
        ({"minimum": torch.zeros(2, 71)}, ValueError, r"minimum: shape \(2, 71\); expected \(2, 70\)"),
        ({"minimum": torch.zeros(2, 70, dtype=torch.int8)}, TypeError, "minimum: dtype int8"),
        ({"bias": torch.zeros(69)}, ValueError, r"bias: shape \(69,\); expected \(70,\)"),
        ({"bias": torch.zeros(70, device="meta")}, ValueError, "bias: on meta"),
        ({"activation": "gelu"}, ValueError, "activation: 'gelu'; expected None or \"silu_and_mul\""),
        ({"activation": "silu_and_mul"}, ValueError, "scale: 70 outputs; expected a multiple of 16 beside activation"),
        ({"residual": torch.zeros(2, 70).half()}, TypeError, "residual: dtype float16"),
        ({"residual": torch.zeros(2, 35)}, ValueError, r"residual: shape \(2, 35\); expected \(2, 70\)"),
        ({"residual": torch.zeros(70, 2).t()}, ValueError, "residual: strides .* not contiguous"),
        ({"residual": torch.zeros(2, 70, device="meta")}, ValueError, "residual: on meta, but x is on cpu"),
    ],
)
def test_errors(change, error, message):
    _, (packed, scale, minimum, bias) = case(70, 128, 64, bias=True)
    args = {
        "x": torch.zeros(2, 128),
        "packed": packed,
        "scale": scale,
        "minimum": minimum,
        "bias": bias,
        "group_size": 64,
    } | change
    with pytest.raises(error, match=message):
        octavo.int4_linear(**args)


HOPPER_CUTS = [
    (7, 6144, 4096, 128, False),
    (7, 28672, 4096, 128, False),
    (7, 4096, 14336, 128, False),
    (7, 4096, 4096, 32, True),
    (20, 8192, 8192, 128, False),
    (20, 8192, 8192, 32, True),
    (20, 28672, 4096, 128, False),
    (20, 28672, 4096, 32, True),
    (20, 4096, 14336, 128, False),
    (20, 4096, 14336, 32, True),
    (64, 28672, 4096, 128, False),
    (64, 28672, 4096, 32, True),
    (64, 8192, 8192, 128, False),
    (64, 8192, 8192, 64, True),
    (128, 28672, 4096, 128, True),
    (128, 28672, 4096, 128, False),
    (256, 8192, 8192, 128, True),
    (256, 8192, 8192, 32, True),
    (1024, 8192, 8192, 128, True),
    (1024, 8192, 8192, 128, False),
    (1024, 8192, 8192, 64, False),
]
"""Tokens, outputs, inputs, group size and minimum, each of which Hopper's kernel cuts or shares in another way."""


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them.

    Hopper's own kernel takes no tokens with two strides, as those of some heads have.
    """
    packed = torch.empty(64, 32, 64, 32, device="meta", dtype=torch.int16)
    tokens = {m: torch.empty(m, 4096, device="meta", dtype=dtype) for m in (7, 20, 64, 1024, 1280)}
    heads = [torch.empty(m, 3, 4096, device="meta", dtype=dtype)[:, :2] for m in (4, 32, 512)]
    for x in (*tokens.values(), *heads, tokens[7].float()):
        for group, with_minimum in ((128, False), (128, True), (64, True), (32, True)):
            scale = torch.empty(4096 // group, 4096, device="meta", dtype=x.dtype)
            int4._int4_linear_cuda(x, packed, scale, scale if with_minimum else None, None, group)
    for x in (*heads, tokens[7].float()):
        scale = torch.empty(128, 4096, device="meta", dtype=x.dtype)
        for n, activation in ((4096, None), (2048, "silu_and_mul")):
            residual = torch.empty(*x.shape[:-1], n, device="meta", dtype=x.dtype)
            int4._int4_linear_cuda(x, packed, scale, scale, scale[0], 32, residual, activation)
    for i, (m, n, k, group, with_minimum) in enumerate(HOPPER_CUTS):
        x = torch.empty(m, k, device="meta", dtype=dtype)
        packed = torch.empty(n // 64, k // 128, 64, 32, device="meta", dtype=torch.int16)
        scale = torch.empty(k // group, n, device="meta", dtype=dtype)
        minimum = scale if with_minimum else None
        int4._int4_linear_cuda(x, packed, scale, minimum, None, group)
        if i % 3:  # what follows the product comes to the same thing in each cut, and takes its time to compile
            continue
        activation = (None, "silu_and_mul")[i % 2]
        residual = torch.empty(m, n // 2 if activation else n, device="meta", dtype=dtype)
        int4._int4_linear_cuda(x, packed, scale, minimum, None, group, residual, activation)
