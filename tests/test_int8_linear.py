import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.kernels.quant import cpu, int8
from octavo.reference import quant as reference
from octavo.testing import assert_accurate, check_op, without_interpreter

HALF = torch.float16


def case(n, k, group, device="cpu", dtype=HALF, bias=False):
    """The arguments of int8_linear after x."""
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(k // group, n, device=device) * 0.002 + 0.0005).to(dtype)
    return [weight, scale, torch.randn(n, device=device).to(dtype) if bias else None]


def check(out, x, weight, scale, bias):
    w = weight.double() * scale.double().t().repeat_interleave(weight.shape[1] // scale.shape[0], 1)
    exact, plain = x.double() @ w.t(), x @ w.to(x.dtype).t()
    if bias is not None:
        exact, plain = exact + bias.double(), plain + bias.to(x.dtype)
    assert out.dtype == x.dtype and out.is_contiguous()
    assert_accurate(out, exact, plain)


@pytest.mark.parametrize("m", [1, 3, 17, 70])
@pytest.mark.parametrize(
    ("n", "k", "group", "bias"),
    [
        (1, 32, 32, False),
        (63, 96, 96, True),
        (100, 160, 32, True),
        (192, 256, 128, False),
        (70, 192, 64, False),
        (65, 320, 320, True),
    ],
)
def test_int8_linear(device, dtype, m, n, k, group, bias):
    args = case(n, k, group, device, dtype, bias)
    x = torch.randn(m, k, device=device, dtype=dtype)
    check(octavo.int8_linear(x, *args, group_size=group), x, *args)


@given(
    m=st.integers(0, 20),
    n=st.integers(1, 130),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 64, 96, 128]),
    gap=st.integers(0, 9),
)
def test_any_shape_and_strided_rows(m, n, groups, group, gap):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    k = groups * group
    args = case(n, k, group, device, torch.float32, bias=True)
    x = torch.randn(m, 2, k + gap, device=device, dtype=HALF)[..., :k]
    check(octavo.int8_linear(x, *args, group_size=group), x, *args)


def test_every_weight_is_exact(device, dtype):
    """All 256 values, unscaled and one at a time, come out as they are."""
    weight = torch.arange(-128, 128, device=device, dtype=torch.int8)[:, None].expand(256, 32).contiguous()
    x = torch.zeros(1, 32, device=device, dtype=dtype)
    x[0, 7] = 1.0
    out = octavo.int8_linear(x, weight, torch.ones(1, 256, device=device), group_size=32)
    assert torch.equal(out[0], weight[:, 7].to(dtype))


def test_scale_may_be_a_slice_of_a_wider_one(device):
    weight, scale, _ = case(190, 128, 64, device)
    x = torch.randn(2, 128, device=device, dtype=HALF)
    part = weight[60:130], scale[:, 60:130], None
    check(octavo.int8_linear(x, *part, group_size=64), x, *part)


def test_no_tokens_and_one_dimension(device):
    args = case(40, 64, 32, device)
    assert octavo.int8_linear(torch.empty(0, 3, 64, device=device, dtype=HALF), *args, group_size=32).shape == (
        0,
        3,
        40,
    )
    x = torch.randn(64, device=device, dtype=HALF)
    check(octavo.int8_linear(x, *args, group_size=32), x, *args)


def test_reference_against_the_formula():
    args = case(100, 160, 32, bias=True)
    x = torch.randn(5, 160, dtype=HALF)
    check(reference.int8_linear(x, *args, 32), x, *args)


def test_opcheck_and_compile(device):
    args = case(100, 160, 32, device, bias=True)
    x = torch.randn(3, 160, device=device, dtype=HALF)
    check_op("int8_linear", octavo.int8_linear, (x, *args, 32), x, *args, group_size=32)


def test_cpu_backend_keeps_a_copy_as_long_as_the_weight(monkeypatch):
    """Its other properties are tested with int4_linear, which shares it."""
    monkeypatch.setattr(cpu, "_copies", {})
    monkeypatch.setenv("OCTAVO_CPU_WEIGHT_CACHE", "1")
    args = case(100, 160, 32, bias=True)
    with without_interpreter():
        for m in (1, 7):
            x = torch.randn(m, 160, dtype=HALF)
            check(octavo.int8_linear(x, *args, group_size=32), x, *args)
        args[0].neg_()
        check(octavo.int8_linear(x, *args, group_size=32), x, *args)
    assert [c.weight.shape for c in cpu._copies.values()] == [(100, 160)]
    del args
    gc.collect()
    assert cpu._copies == {}


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 256])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(4096, 14336, 14336), (4096, 14336, 32), (576, 1536, 64), (49155, 576, 576)]
)
def test_real_shapes(m, n, k, group):
    args = case(n, k, group, "cuda", torch.bfloat16)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    out = octavo.int8_linear(x, *args, group_size=group)
    check(out, x, *args)
    assert torch.equal(out, octavo.int8_linear(x, *args, group_size=group))


@pytest.mark.gpu
def test_graph_capture_and_replay():
    args = case(512, 1024, 128, "cuda", bias=True)
    x = torch.randn(4, 1024, device="cuda", dtype=HALF)
    octavo.int8_linear(x, *args, group_size=128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.int8_linear(x, *args, group_size=128)
    x.normal_()
    graph.replay()
    assert torch.equal(out, octavo.int8_linear(x, *args, group_size=128))


@pytest.mark.gpu
def test_offsets_beyond_int32_in_x():
    args = case(100, 64, 32, "cuda")
    x = torch.empty(2, 2**31 + 64, device="cuda", dtype=HALF)[:, :64]
    x.normal_()
    assert torch.equal(octavo.int8_linear(x, *args, group_size=32), octavo.int8_linear(x.clone(), *args, group_size=32))


@pytest.mark.gpu
def test_offsets_beyond_int32_in_weight_and_out():
    n, k, last = 2**31 // 1024 + 128, 1024, slice(-128, None)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    scale = torch.rand(k // 128, n, device="cuda").half()
    for m in (1, 1030):  # of out: more than 2³¹ elements at the second
        x = torch.randn(m, k, device="cuda", dtype=HALF)
        out = octavo.int8_linear(x, weight, scale, group_size=128)
        check(out[:, last].contiguous(), x, weight[last], scale[:, last], None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 128, dtype=torch.int32)}, TypeError, "x: dtype int32 is not accepted"),
        ({"x": torch.zeros(128, 2).t()}, ValueError, "x: the last dimension has stride 2"),
        (
            {"x": torch.zeros(2, 96)},
            ValueError,
            "group_size: 64; expected a multiple of 32 that divides x's 96 inputs",
        ),
        ({"group_size": 48}, ValueError, "group_size: 48; expected a multiple of 32"),
        ({"group_size": 128}, ValueError, r"scale: shape \(2, 70\); expected \(1, 70\)"),
        ({"weight": torch.zeros(70, 128)}, TypeError, "weight: dtype float32"),
        (
            {"weight": torch.zeros(71, 128, dtype=torch.int8)},
            ValueError,
            r"weight: shape \(71, 128\); expected \(70, 128\)",
        ),
        ({"weight": torch.zeros(128, 70, dtype=torch.int8).t()}, ValueError, "weight: strides .* not contiguous"),
        ({"weight": torch.zeros(70, 128, dtype=torch.int8, device="meta")}, ValueError, "weight: on meta, but x"),
        ({"scale": torch.zeros(2, 70, dtype=torch.int8)}, TypeError, "scale: dtype int8"),
        ({"bias": torch.zeros(69)}, ValueError, r"bias: shape \(69,\); expected \(70,\)"),
    ],
)
def test_errors(change, error, message):
    weight, scale, bias = case(70, 128, 64, bias=True)
    args = {"x": torch.zeros(2, 128), "weight": weight, "scale": scale, "bias": bias, "group_size": 64} | change
    with pytest.raises(error, match=message):
        octavo.int8_linear(**args)


HOPPER_CUTS = [
    (7, 8192, 8192),
    (7, 28672, 4096),
    (7, 57344, 8192),
    (20, 4096, 14336),
    (20, 28672, 4096),
    (20, 57344, 8192),
    (64, 6144, 4096),
    (64, 4096, 14336),
    (64, 28672, 4096),
    (128, 8192, 8192),
    (128, 28672, 4096),
    (1024, 8192, 8192),
]
"""Tokens, outputs and inputs, each of which Hopper's kernel cuts or shares in another way."""


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them.

    Hopper's own kernel takes no tokens with two strides, as those of some heads have.
    """
    weight = torch.empty(4096, 4096, device="meta", dtype=torch.int8)
    tokens = [torch.empty(m, 4096, device="meta", dtype=dtype) for m in (7, 64, 1024)]
    heads = [torch.empty(m, 3, 4096, device="meta", dtype=dtype)[:, :2] for m in (4, 32, 512)]
    for x in (*tokens, *heads, tokens[0].float()):
        for group in (32, 64, 4096):
            scale = torch.empty(4096 // group, 4096, device="meta", dtype=x.dtype)
            int8._int8_linear_cuda(x, weight, scale, None, group)
    for i, (m, n, k) in enumerate(HOPPER_CUTS):
        x = torch.empty(m, k, device="meta", dtype=dtype)
        weight = torch.empty(n, k, device="meta", dtype=torch.int8)
        for group in (k, 128, (64, 32)[i % 2]):
            scale = torch.empty(k // group, n, device="meta", dtype=dtype)
            int8._int8_linear_cuda(x, weight, scale, None, group)
