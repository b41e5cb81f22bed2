import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.moe import combine, grouped, grouped_linear, schedule
from octavo.kernels.moe.grouped_tiles import Tiles, choose_tiles, rows_of_plain
from octavo.kernels.moe.schedule import most_tiles
from octavo.kernels.tiles import KNOWN_DEVICES, cdiv
from octavo.testing import assert_accurate, check_op

H100 = KNOWN_DEVICES[90]


def case(counts, k, n, dtype=torch.float32, device="cpu", *, before=0, after=0, bias=False):
    """x, weights, offsets and bias for that many rows of each expert, and rows of none before and behind them."""
    rows = before + sum(counts) + after
    x = torch.randn(rows, k, device=device, dtype=dtype)
    weight = (torch.randn(len(counts), n, k, device=device) / k**0.5).to(dtype)
    offsets = torch.tensor([before, *counts], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return x, weight, offsets, torch.randn(len(counts), n, device=device).to(dtype) if bias else None


def products(x, weight, offsets, bias, dtype):
    """One row after the other, at one precision."""
    out = torch.zeros(len(x), weight.shape[1], dtype=dtype, device=x.device)
    for e in range(len(weight)):
        for s in range(int(offsets[e]), int(offsets[e + 1])):
            out[s] = weight[e].to(dtype) @ x[s].to(dtype) + (0 if bias is None else bias[e].to(dtype))
    return out


def check(args, out=None):
    x, weight, offsets, bias = args
    out = octavo.grouped_linear(x, weight, offsets, bias=bias) if out is None else out
    assert out.shape == (len(x), weight.shape[1]) and out.dtype == x.dtype and out.is_contiguous()
    assert_accurate(out, products(*args, torch.float64), products(*args, x.dtype))


@pytest.mark.parametrize(
    ("counts", "k", "n"),
    [
        ([3, 0, 18, 1], 64, 128),
        ([0, 70], 72, 40),
        ([1], 1, 1),
        ([0, 0, 5, 0, 0, 2, 0], 130, 300),
        ([140, 1, 3], 33, 70),
    ],
)
def test_grouped_linear(device, dtype, counts, k, n):
    check(case(counts, k, n, dtype, device))
    check(case(counts, k, n, dtype, device, before=2, after=3, bias=True))


def int8(experts, n, k, groups, device):
    """Weights of all 256 values, their scales, and what they stand for."""
    q = torch.randint(-128, 128, (experts, n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(experts, groups, n, device=device) + 0.5) / (80 * k**0.5)
    return q, scale, q.double() * scale.double().transpose(1, 2).repeat_interleave(k // groups, 2)


@pytest.mark.parametrize(
    ("counts", "k", "n", "groups"),
    [([3, 0, 18, 1], 64, 128, 2), ([0, 40], 96, 40, 1), ([0, 5, 0, 2], 160, 300, 5), ([34, 1, 3], 256, 70, 2)],
)
def test_int8_weights_alone(device, dtype, counts, k, n, groups):
    x, _, offsets, bias = case(counts, k, n, dtype, device, before=2, after=3, bias=True)
    weight, scale, exact = int8(len(counts), n, k, groups, device)
    for bias_or_none in (bias, None):
        args = x, exact, offsets, bias_or_none
        check(args, octavo.grouped_linear(x, weight, offsets, bias=bias_or_none, scale=scale))
        check(args, reference.moe.grouped_linear(x, weight, offsets, bias_or_none, scale))


@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=6), k=st.integers(1, 70), n=st.integers(1, 140))
def test_any_counts(counts, k, n):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(case(counts, k, n, device=device, after=1))


def test_no_rows(device):
    out = octavo.grouped_linear(*case([0, 0, 0], 32, 48, device=device)[:3])
    assert out.shape == (0, 48)


def test_rows_of_x_may_lie_apart(device):
    _, weight, offsets, bias = case([3, 4], 64, 32, device=device)
    apart = torch.randn(7, 90, device=device)[:, :64]
    check((apart, weight, offsets, bias))


def test_offsets_out_of_range_reach_nothing_else(device):
    """What the offsets say is not looked at by the host: a kernel leaves out what is not there."""
    x, weight, _, _ = case([3, 4, 5], 64, 32, device=device)
    wrong = torch.tensor([0, 3, 300, 2**30], dtype=torch.int32, device=device)
    out = octavo.grouped_linear(x, weight, wrong)
    right = torch.tensor([0, 3, 12, 12], dtype=torch.int32, device=device)
    assert torch.equal(out, octavo.grouped_linear(x, weight, right))


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 33, 16, 17], [0] * 30 + [400] + [0] * 20, [5] * 40])
@pytest.mark.parametrize("tile", [16, 128])
def test_plan(counts, tile, device):
    """Each row of an expert is in one tile of it; groups are whole, of one expert, and at most 8."""
    rows = sum(counts) + 5
    offsets = torch.tensor([0, *counts], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    out = torch.full((rows, 3), 7.0, device=device)
    plan = schedule.plan_and_clear(out, offsets, tile).cpu()
    assert (out[:-5] == 7).all() and (out[-5:] == 0).all()
    count = int(plan[0])
    assert count == sum(cdiv(c, tile) for c in counts) <= most_tiles(rows, len(counts), tile)
    tiles = plan[8:].view(-1, 8)[:count, :5].tolist()
    seen = []
    for i, (expert, first, of_tile, group, size) in enumerate(tiles):
        assert int(offsets[expert]) <= first and first + of_tile <= int(offsets[expert + 1]) and 0 < of_tile <= tile
        assert group <= i < group + size <= count and size <= schedule.GROUP
        assert tiles[group][0] == tiles[group + size - 1][0] == expert and tiles[group][3:] == [group, size]
        seen += range(first, first + of_tile)
    assert seen == list(range(sum(counts)))


def test_parts_are_added_up_in_order(device):
    parts = torch.randn(3, 6, 70, device=device)
    offsets = torch.tensor([1, 3, 3, 4], dtype=torch.int32, device=device)
    out = torch.empty(6, 70, device=device)
    combine.add_parts(out, parts, offsets)
    expected = parts[0] + parts[1] + parts[2]
    expected[[0, 4, 5]] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("experts", [1, 8, 64, 256])
@pytest.mark.parametrize(("n", "k"), [(28672, 4096), (4096, 14336), (1408, 2048), (96, 160)])
def test_tiles(experts, n, k):
    """What a tile takes fits; parts have work; rows of a tile rise with the number of rows, up to those of many."""
    before = 0
    for rows in (1, 2, 8, 33, 64, 100, 128, 500, 512, 4096, 8192):
        for copied in (False, True):
            tile = rows_of_plain(rows, experts, copied=copied)
            for gated in (False, True):
                tiles = choose_tiles(rows, experts, n, k, tile, H100, gated=gated, copied=copied, itemsize=2)
                assert tiles.rows == tile and 16 <= tile <= 256
                assert (tiles.kernel == "triton") == (not copied)
                if copied:
                    stage = (tile + tiles.tail + tiles.outputs) * tiles.block_k * 2
                    assert tiles.stages * stage + 1024 < H100.shared_memory and tiles.stages >= 2
                steps = cdiv(k, tiles.block_k)
                assert tiles.parts == 1 or (copied and not gated)
                assert cdiv(steps, cdiv(steps, tiles.parts)) == tiles.parts  # none is without a step
        assert tile >= before or tiles.kernel == "many"
        before = tile


def test_reference_against_a_loop():
    for bias in (False, True):
        args = case([3, 0, 2], 20, 30, torch.float16, after=2, bias=bias)
        assert_accurate(
            reference.moe.grouped_linear(*args), products(*args, torch.float64), products(*args, torch.float16)
        )


def test_opcheck_and_compile(device):
    x, weight, offsets, bias = case([3, 0, 18], 64, 96, device=device, bias=True)
    check_op("grouped_linear", octavo.grouped_linear, (x, weight, offsets, bias), x, weight, offsets, bias=bias)
    weight, scale, _ = int8(3, 96, 64, 2, device)
    args = (x, weight, offsets, None, scale)
    check_op("grouped_linear", octavo.grouped_linear, args, x, weight, offsets, scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[1, 0, 2], [20, 30, 0, 4], [100, 70], [0, 700, 130, 64], [9000, 1]])
@pytest.mark.parametrize("k", [1024, 1032, 1034])
def test_large_on_a_gpu(counts, k):
    for bias in (False, True):
        args = case(counts, k, 1000, torch.bfloat16, "cuda", after=3, bias=bias)
        out = octavo.grouped_linear(*args[:3], bias=args[3])
        exact = reference.moe.grouped_linear(args[0].double(), args[1].double(), args[2], args[3])
        assert_accurate(out, exact.double(), exact.bfloat16())
        for _ in range(5):
            assert torch.equal(out, octavo.grouped_linear(*args[:3], bias=args[3]))


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[1, 0, 2], [20, 30, 0, 4], [100, 70], [0, 700, 130, 64]])
@pytest.mark.parametrize(("k", "groups"), [(1024, 1), (1024, 8), (1056, 33), (1152, 18), (1184, 1)])
def test_int8_weights_alone_on_a_gpu(counts, k, groups):
    """Also beside inputs of a number that the copy engine does not take."""
    x, _, offsets, bias = case(counts, k, 1000, torch.bfloat16, "cuda", after=3, bias=True)
    weight, scale, exact = int8(len(counts), 1000, k, groups, "cuda")
    for bias_or_none in (bias, None):
        out = octavo.grouped_linear(x, weight, offsets, bias=bias_or_none, scale=scale)
        expected = reference.moe._products(x, exact, offsets, bias_or_none)
        assert_accurate(out, expected.double(), expected.bfloat16())
        for _ in range(3):
            assert torch.equal(out, octavo.grouped_linear(x, weight, offsets, bias=bias_or_none, scale=scale))


@pytest.mark.gpu
def test_graph_replayed_with_other_offsets():
    x, weight, offsets, _ = case([3, 20, 0, 9], 512, 256, torch.bfloat16, "cuda")
    octavo.grouped_linear(x, weight, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.grouped_linear(x, weight, offsets)
    for counts in ([0, 0, 0, 32], [32, 0, 0, 0], [8, 8, 8, 0]):
        offsets[1:] = torch.tensor(counts).cumsum(0)
        graph.replay()
        assert torch.equal(out, octavo.grouped_linear(x, weight, offsets))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    weight = torch.empty(3, 2**15, 2**15, device="cuda", dtype=torch.bfloat16)
    for i in range(3):
        weight[i].normal_(std=2**-7)
    x = torch.randn(40, 2**15, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 8, 8, 40], dtype=torch.int32, device="cuda")
    out = octavo.grouped_linear(x, weight, offsets)
    exact = torch.cat([x[:8].double() @ weight[0, :64].t().double(), x[8:].double() @ weight[2, :64].t().double()])
    assert_accurate(out[:, :64], exact, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(4, 8, dtype=torch.int32)), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=torch.zeros(8)), ValueError, r"x: shape \(8,\) has 1 dimensions; expected 2"),
        (dict(x=torch.zeros(8, 4).t()), ValueError, "x: the last dimension has stride 4"),
        (dict(x=torch.zeros(4, 0)), ValueError, r"x: shape \(4, 0\); expected at least one input"),
        (dict(weight=torch.zeros(3, 5, 8).half()), TypeError, "weight: dtype float16"),
        (dict(weight=torch.zeros(3, 5, 7)), ValueError, r"weight: shape \(3, 5, 7\); expected \(3, 5, 8\)"),
        (dict(weight=torch.zeros(5, 8)), ValueError, "weight: shape .* has 2 dimensions; expected 3"),
        (dict(weight=torch.zeros(3, 8, 5).transpose(1, 2)), ValueError, "weight: strides .* are not contiguous"),
        (dict(weight=torch.zeros(0, 5, 8)), ValueError, "weight: .* expected at least one expert"),
        (dict(weight=torch.zeros(513, 1, 8)), ValueError, "weight: 513 experts; expected at most 512"),
        (dict(weight=torch.zeros(3, 5, 8, device="meta")), ValueError, "weight: on meta, but x is on cpu"),
        (dict(offsets=torch.zeros(4)), TypeError, "offsets: dtype float32"),
        (dict(offsets=torch.zeros(3, dtype=torch.int32)), ValueError, r"offsets: shape \(3,\); expected \(4,\)"),
        (dict(bias=torch.zeros(3, 4)), ValueError, r"bias: shape \(3, 4\); expected \(3, 5\)"),
        (dict(scale=torch.zeros(3, 1, 5)), ValueError, "scale: given beside weights of x's dtype; expected None"),
        (dict(weight=torch.zeros(3, 5, 8).char()), ValueError, "scale: None beside quantised weights"),
        (
            dict(weight=torch.zeros(3, 5, 8).char(), scale=torch.zeros(3, 1, 5)),
            ValueError,
            "scale: 1 groups of 8 inputs; expected a group size, a multiple of 32",
        ),
    ],
)
def test_errors(change, error, message):
    args = dict(x=torch.zeros(4, 8), weight=torch.zeros(3, 5, 8), offsets=torch.zeros(4, dtype=torch.int32), bias=None)
    with pytest.raises(error, match=message):
        octavo.grouped_linear(**args | change)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""

    def new(*shape, dtype=dtype):
        return torch.empty(shape, device="meta", dtype=dtype)

    for rows in (2, 8, 256, 512, 1024, 4096):
        for experts, n, k in ((8, 4096, 14336), (64, 2048, 1408), (8, 96, 161)):
            offsets = new(experts + 1, dtype=torch.int32)
            for bias in (None, new(experts, n)):
                grouped_linear._grouped_linear_cuda(new(rows, k), new(experts, n, k), offsets, bias)
                if experts == 8 and k % 128 == 0 and rows in (8, 512):  # fused_moe has the rest of such tiles
                    weight, scale = new(experts, n, k, dtype=torch.int8), new(experts, 1, n)
                    grouped_linear._grouped_linear_cuda(new(rows, k), weight, offsets, bias, scale)
    for tiles in (Tiles("many", 128, 128, 64, 4, 6, 1), Tiles("triton", 16, 128, 32, 4, 3, 1)):
        wide = torch.float32 if tiles.kernel == "triton" else dtype
        x, plan = new(512, 1024, dtype=wide), new(800, dtype=torch.int32)
        if tiles.kernel == "triton" or grouped.may_copy(grouped.device_properties(x.device), x):
            grouped.grouped(
                new(1, 512, 512, dtype=wide), x, new(8, 512, 1024, dtype=wide), None, plan, tiles, gated=False
            )
