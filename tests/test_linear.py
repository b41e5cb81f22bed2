import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_gemv import check_layer, check_rows_cut_out, exact, formula

import octavo
from octavo.kernels import linear
from octavo.kernels.compilation import ToLaunchers
from octavo.kernels.launch import record_launches
from octavo.kernels.tiles import KNOWN_DEVICES
from octavo.testing import assert_accurate, check_op


@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
@pytest.mark.parametrize("shape", [(1, 128, 1040), (3, 66, 96), (2, 3, 48, 520), (40, 80, 256), (70, 32, 128)])
def test_linear(device, dtype, shape, activation):
    check_layer(octavo.linear, shape, activation, dtype, device)


@given(
    rows=st.integers(0, 70),
    inner=st.integers(1, 2),
    n=st.integers(1, 40),
    k=st.integers(1, 100),
    gap=st.integers(0, 9),
    gated=st.booleans(),
)
def test_rows_cut_out_of_others(rows, inner, n, k, gap, gated):
    check_rows_cut_out(octavo.linear, (rows, inner), n, k, gap, gated)


@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
def test_the_op_itself(device, dtype, activation):
    """Where the public function takes torch's product, the op would still be right."""
    x, weight, bias = (torch.randn(s, device=device, dtype=dtype) for s in ((3, 96), (66, 96), (66,)))
    out = torch.ops.octavo.linear(x, weight, bias, activation, False)
    assert_accurate(out, exact(x, weight, bias, activation), formula(x, weight, bias, activation))


def test_which_kernel_computes(monkeypatch):
    monkeypatch.setattr("octavo.kernels.linear_few.INTERPRET", False)

    def empty(*shape):
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    def kernels(x, weight, arch=90, **options):
        with record_launches(KNOWN_DEVICES[arch]) as launches, ToLaunchers():
            octavo.linear(x, weight, **options)
        return [launch.kernel.__name__ for launch in launches]

    weight, few, single = empty(4096, 4096), empty(9, 4096), empty(1, 4096)
    for activation, behind in ((None, []), ("silu_and_mul", ["_activation_kernel"])):
        for early in (False, True):
            options = dict(activation=activation, prefetch_weight=early)
            for x in (few, few[:, None], empty(64, 4096), empty(9, 5000)[:, :4096]):
                assert kernels(x, weight, **options) == ["_linear_few_kernel"]
            of_one = ["_linear_few_kernel" if early else "_gemv_kernel"]
            assert kernels(single, weight, **options) == kernels(single[0], weight, **options) == of_one
            assert kernels(single, weight, 80, **options) == ["_gemv_kernel"]
            for other in (weight[:4080], empty(8192, 2040), weight.float()):
                x = single[:, : other.shape[1]].to(other.dtype)
                assert kernels(x, other, **options) == ["_gemv_kernel"]
            for x, other, arch in (
                (few, weight, 80),
                (empty(65, 4096), weight, 90),
                (few.float(), weight.float(), 90),
                (empty(9, 4100), empty(4096, 4100), 90),
                (empty(9, 4100)[:, :4096], weight, 90),
                (few.expand(2, 9, 4096), weight, 90),
                (few[:, :2040], empty(8192, 2040), 90),
                (few, weight[:4080], 90),
            ):
                assert kernels(x, other, arch, **options) == behind
    assert kernels(few, empty(4104, 4096), activation="silu_and_mul") == ["_activation_kernel"]
    assert kernels(few, empty(4104, 4096)) == ["_linear_few_kernel"]


def test_opcheck_and_compile(device):
    x, weight, bias = (torch.randn(s, device=device) for s in ((1, 64), (32, 64), (32,)))
    check_op("linear", octavo.linear, (x, weight, bias, None, False), x, weight, bias)
    check_op("linear", octavo.linear, (x, weight, None, "silu_and_mul", True), x, weight, activation="silu_and_mul")


@pytest.mark.parametrize("activation", [None, "silu_and_mul"])
def test_compiled_for_any_number_of_tokens(device, activation):
    torch.compiler.reset()
    weight = torch.randn(48, 64, device=device, dtype=torch.float16)
    compiled = torch.compile(
        lambda x: octavo.linear(x, weight, activation=activation), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (1, 2, 40, 100):
        x = torch.randn(tokens, 64, device=device, dtype=torch.float16)
        torch.testing.assert_close(compiled(x), octavo.linear(x, weight, activation=activation), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(1, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=torch.zeros(8, 2).t()), ValueError, "x: the last dimension has stride 2"),
        (dict(weight=torch.zeros(4, 8).half()), TypeError, "weight: dtype float16"),
        (dict(weight=torch.zeros(4, 7)), ValueError, r"weight: shape \(4, 7\); expected \[outputs, 8\]"),
        (dict(weight=torch.zeros(8, 4).t()), ValueError, "weight: strides"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias: shape \(5,\); expected \(4,\)"),
        (dict(activation="gelu"), ValueError, "activation: 'gelu'; expected None or"),
        (dict(activation="silu_and_mul", weight=torch.zeros(3, 8), bias=None), ValueError, "weight: 3 outputs"),
    ],
)
def test_errors(change, error, message):
    args = dict(x=torch.zeros(3, 8), weight=torch.zeros(4, 8), bias=torch.zeros(4)) | change
    with pytest.raises(error, match=message):
        octavo.linear(args.pop("x"), args.pop("weight"), args.pop("bias"), **args)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    sizes = (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (48, 520)
    for n, k in sizes:
        weight, bias = (torch.empty(s, device="meta", dtype=dtype) for s in ((n, k), (n,)))
        for tokens in (8, 16, 32, 64):
            x = torch.empty(tokens, k, device="meta", dtype=dtype)
            for activation in (None, "silu_and_mul"):
                linear._linear_cuda(x, weight, None, activation, True)
                if n in (6144, 4096):
                    linear._linear_cuda(x, weight, bias, activation, False)
