import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels import debug
from octavo.kernels.launch import record_launches
from octavo.kernels.moe import permute, sort
from octavo.kernels.tiles import KNOWN_DEVICES, device_properties
from octavo.testing import assert_accurate, check_op, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_loops(ids, num_experts, expert_map=None):
    """Sorted pairs, offsets and positions, a pair at a time."""
    rows = [[] for _ in range(num_experts)]
    nowhere = []
    for token, experts in enumerate(ids.tolist()):
        for j, expert in enumerate(experts):
            if expert_map is not None:
                expert = expert_map[expert].item() if 0 <= expert < len(expert_map) else -1
            (rows[expert] if 0 <= expert < num_experts else nowhere).append((token, j))
    pairs = [pair for expert in rows for pair in expert]
    offsets = [0]
    for expert in rows:
        offsets.append(offsets[-1] + len(expert))
    positions = torch.full(ids.shape, -1, dtype=torch.int32)
    for place, (token, j) in enumerate(pairs):
        positions[token, j] = place
    order = [token * ids.shape[1] + j for token, j in pairs + nowhere]
    return torch.tensor(order, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32), positions


def permuted(x, order, offsets, top_k):
    rows = x[order.long() // top_k].clone()
    rows.view(torch.uint8)[offsets[-1] :] = 0
    return rows


def same(actual, expected):
    return all(torch.equal(a.cpu(), e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True))


def test_ids_are_looked_at_where_a_debug_option_asks_for_it(device, monkeypatch):
    """Without it they are left out, by every op; -1 is none, and no error."""
    x, weights, ids = torch.randn(3, 32, device=device), torch.ones(3, 2, device=device), torch.full((3, 2), -1)
    ids[:, 1] = torch.tensor([0, 1, 1])
    w1, w2 = torch.randn(2, 16, 32, device=device), torch.randn(2, 32, 8, device=device)
    elsewhere = torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    calls = {
        "topk_ids": lambda ids: octavo.fused_moe(x, w1, w2, weights, ids.to(device)),
        "topk_ids of all": lambda ids: octavo.moe_permute(x, ids.to(device), 2)[0],
        "expert_map": lambda ids: octavo.moe_permute(x, ids.to(device), 2, elsewhere + ids.amax().to(device) // 2)[0],
        "positions": lambda ids: octavo.moe_unpermute(x[:2], ids.int().to(device), weights),
        "offsets": lambda ids: octavo.grouped_linear(x, w1, offsets + 3 * (ids.amax().int().to(device) > 1)),
    }
    wrong = ids.clone()
    wrong[1, 1] = 7
    for ask in (False, True) if device == "cpu" else (False,):
        monkeypatch.setattr(debug, "DEBUG", ask)
        for name, call in calls.items():
            assert call(ids).isfinite().all(), name
            if ask:
                with pytest.raises(RuntimeError, match=rf"^{name.split()[0]}: "):
                    call(wrong)
            else:
                assert call(wrong).isfinite().all(), name


@pytest.mark.gpu
def test_a_debug_run_on_a_gpu_says_what_is_wrong():
    """In a process of its own, whose GPU is of no use afterwards; without the option the same runs to its end."""
    code = """
import torch, octavo
x, w1, w2 = (torch.randn(shape, device="cuda") for shape in ((3, 32), (2, 16, 32), (2, 32, 8)))
ids, weights = torch.zeros(3, 2, dtype=torch.int32, device="cuda"), torch.ones(3, 2, device="cuda")
for value in (0, 0, 0, -1, 7):
    octavo.fused_moe(x, w1, w2, weights, ids.fill_(value))
torch.cuda.synchronize()
"""
    for ask in ("0", "1"):
        environment = os.environ | {"OCTAVO_DEBUG": ask}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert (run.returncode != 0) == (ask == "1"), run.stderr
        assert ("topk_ids: has an id out of range" in run.stdout + run.stderr) == (ask == "1")


@pytest.fixture(params=["at once", "compared", "counted"])
def counted(request, monkeypatch):
    """Whether few pairs are sorted as more are, or as many."""
    if request.param != "at once":
        monkeypatch.setattr(permute, "MOST_PAIRS", 0)
    if request.param == "counted":
        monkeypatch.setattr(sort, "MOST_COMPARED", 0)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 2, 8), (7, 1, 1), (64, 2, 8), (33, 6, 60), (300, 3, 7), (5, 8, 512), (3, 8, 128), (0, 2, 8), (1030, 1, 3)],
)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_sort_is_stable(device, counted, tokens, top_k, experts, ids_dtype):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), device=device, dtype=ids_dtype)  # some out of range
    assert same(sort.sort_by_expert(ids, experts, None), by_loops(ids, experts))


def test_sort_of_more_pairs_than_are_compared(device):
    tokens = sort.MOST_COMPARED // 2 + 77
    ids = torch.randint(0, 9, (tokens, 2), device=device)
    x = torch.arange(tokens, device=device, dtype=torch.float32)[:, None].expand(-1, 4).contiguous()
    rows, offsets, positions = octavo.moe_permute(x, ids, 9)
    order, *expected = by_loops(ids, 9)
    assert same((offsets, positions), expected)
    assert torch.equal(rows[:, 3].cpu().int(), order // 2)


@pytest.mark.parametrize("where", ["one", "last", "none", "map"])
def test_uneven_routing(device, counted, where):
    """All pairs on one expert, none on some, none on this device, experts of other devices."""
    ids = torch.randint(0, 24, (70, 4), device=device)
    expert_map = None
    if where == "map":
        expert_map = torch.full((24,), -1, dtype=torch.int32, device=device)
        expert_map[3:11] = torch.arange(7, -1, -1, dtype=torch.int32)
        ids[0, 0], ids[1, 1] = 24, -7
    else:
        ids[:] = {"one": 2, "last": 7, "none": 8}[where]
    x = torch.randn(70, 24, device=device)
    results = octavo.moe_permute(x, ids, 8, expert_map)
    order, offsets, positions = by_loops(ids, 8, expert_map)
    assert same(results, (permuted(x.cpu(), order, offsets, 4), offsets, positions))
    assert (results[0][offsets[-1] :] == 0).all() and (where != "none" or offsets[-1] == 0)


def test_a_map_to_experts_that_are_not_there(device, counted):
    """A local number out of range is no expert, as an id out of range is none."""
    ids = torch.tensor([[0, 1, 2], [2, 3, 4]], device=device)
    expert_map = torch.tensor([5, 1, -9, 0], dtype=torch.int32, device=device)
    expected = by_loops(ids, 2, expert_map)
    assert same(sort.sort_by_expert(ids, 2, expert_map), expected)
    assert same(octavo.moe_permute(torch.ones(2, 8, device=device), ids, 2, expert_map)[1:], expected[1:])


def test_ids_that_are_out_of_range_in_int64_alone(device, counted):
    ids = torch.tensor([[0, 2**32], [-(2**32), 2**40 + 1]], device=device)
    assert same(octavo.moe_permute(torch.ones(2, 8, device=device), ids, 2)[1:], by_loops(ids, 2)[1:])
    _, offsets, positions = sort.sort_by_expert(ids, 2, None)
    assert offsets.tolist() == [0, 1, 1] and positions.tolist() == [[0, -1], [-1, -1]]


@pytest.mark.parametrize("dtype", permute.MOVED, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (9, 71), (5, 1030), (3, 1)])
def test_rows_are_moved_to_the_bit(device, dtype, tokens, width):
    x = (3 * torch.randn(tokens, width + 2, device=device)).to(dtype)[:, :-2]
    ids = torch.randint(0, 5, (tokens, 3), device=device)
    ids[0, 0] = -1
    results = octavo.moe_permute(x, ids, 5)
    order, offsets, positions = by_loops(ids, 5)
    expected = permuted(x.cpu(), order, offsets, 3)
    assert same(results[1:], (offsets, positions)) and results[0].dtype == dtype and results[0].is_contiguous()
    assert torch.equal(results[0].cpu().view(torch.uint8), expected.view(torch.uint8))


def exact(y, positions, weights):
    rows = torch.cat([y, y.new_zeros(1, y.shape[1])])[positions.long()]
    return (rows.double() * weights.double()[..., None]).sum(1)


def plain(y, positions, weights):
    rows = torch.cat([y, y.new_zeros(1, y.shape[1])])[positions.long()]
    return (rows * weights.to(y.dtype)[..., None]).sum(1)


@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 11])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (9, 71), (4, 1030)])
def test_unpermute(device, dtype, tokens, width, top_k):
    rows = tokens * top_k + 3
    y = torch.randn(rows, width + 2, device=device, dtype=dtype)[:, :-2]
    positions = torch.randperm(rows, device=device)[: tokens * top_k].view(tokens, top_k).int()
    weights = torch.rand(tokens, top_k + 1, device=device)[:, :-1]
    positions[:, 0] = torch.where(torch.arange(tokens, device=device) % 2 == 0, -1, positions[:, 0])
    out = octavo.moe_unpermute(y, positions, weights)
    assert out.dtype == dtype and out.is_contiguous()
    assert_accurate(out, exact(y, positions, weights), plain(y, positions, weights))


@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 9),
    experts=st.integers(1, 70),
    width=st.integers(1, 40),
    gap=st.integers(0, 3),
    mapped=st.booleans(),
)
def test_there_and_back(tokens, top_k, experts, width, gap, mapped):
    ids = torch.randint(-1, experts + 2, (tokens, top_k + gap), device=DEVICE)[:, :top_k]
    expert_map = torch.randint(-1, experts + 1, (experts + 1,), device=DEVICE, dtype=torch.int32) if mapped else None
    x = torch.randn(tokens, width + gap, device=DEVICE)[:, :width]
    weights = torch.rand(tokens, top_k, device=DEVICE)
    rows, offsets, positions = octavo.moe_permute(x, ids, experts, expert_map)
    order, *expected = by_loops(ids, experts, expert_map)
    assert same((rows, offsets, positions), (permuted(x.cpu(), order, expected[0], top_k), *expected))
    back = octavo.moe_unpermute(rows, positions, weights)
    factor = weights.double().masked_fill(positions < 0, 0.0).sum(1, keepdim=True)
    assert_accurate(back, x.double() * factor, plain(rows, positions, weights))


def test_what_is_left_out_does_not_count(device):
    """Neither its weight nor any row, be they NaN."""
    y = torch.full((3, 8), torch.nan, device=device)
    y[1] = 2.0
    positions = torch.tensor([[1, -1], [-1, -1], [3, 1]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, torch.nan], [1.0, 1.0], [torch.nan, 3.0]], device=device)
    assert octavo.moe_unpermute(y, positions, weights)[:, 0].tolist() == [1.0, 0.0, 6.0]
    out = reference.moe.moe_unpermute(y, positions[:2], weights[:2])
    assert out[:, 0].tolist() == [1.0, 0.0]


def test_a_nan_row_spoils_its_token_alone(device):
    y = torch.ones(4, 8, device=device)
    y[2] = torch.nan
    positions = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    out = octavo.moe_unpermute(y, positions, torch.ones(2, 2, device=device))
    assert (out[0] == 2).all() and out[1].isnan().all()


def test_sums_go_in_order(device):
    """1 is lost beside 2²⁵ in fp32: the result says what was added first."""
    y = torch.tensor([[2.0**25], [1.0], [-(2.0**25)]], device=device)
    weights = torch.ones(1, 3, device=device)
    for order, expected in (((0, 1, 2), 0.0), ((0, 2, 1), 1.0), ((1, 0, 2), 0.0)):
        positions = torch.tensor([order], dtype=torch.int32, device=device)
        assert octavo.moe_unpermute(y, positions, weights).item() == expected
        assert reference.moe.moe_unpermute(y, positions, weights).item() == expected


@pytest.mark.parametrize("mapped", [False, True])
def test_reference_against_the_loops(mapped):
    ids = torch.randint(-2, 9, (50, 4))
    expert_map = torch.randint(-1, 7, (8,), dtype=torch.int32) if mapped else None
    order, offsets, positions = by_loops(ids, 6, expert_map)
    assert same(reference.moe.sort_by_expert(ids, 6, expert_map), (order, offsets, positions))
    x, weights = torch.randn(50, 12), torch.rand(50, 4)
    rows, *others = reference.moe.moe_permute(x, ids, 6, expert_map)
    assert same((rows, *others), (permuted(x, order, offsets, 4), offsets, positions))
    out = reference.moe.moe_unpermute(rows, positions, weights)
    assert_accurate(out, exact(rows, positions, weights), plain(rows, positions, weights))


def test_reference_of_a_layer_against_transformers():
    """The three ops, with grouped products between them, are Mixtral's block."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=24, intermediate_size=40, num_local_experts=5, num_experts_per_tok=3)
    block = MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(30, 24)
    w1, w2 = block.experts.gate_up_proj.data, block.experts.down_proj.data
    with torch.no_grad():
        expected = block(x[None])[0]
    weights, ids = reference.moe.moe_route(x @ block.gate.weight.data.t(), 3, "softmax", True, None, None, None, 1.0, 0)
    torch.testing.assert_close(reference.moe.fused_moe(x, w1, w2, weights, ids, None), expected, rtol=1e-4, atol=1e-4)
    rows, offsets, positions = reference.moe.moe_permute(x, ids, 5, None)
    hidden = reference.activation.silu_and_mul(reference.moe.grouped_linear(rows, w1, offsets, None))
    out = reference.moe.moe_unpermute(reference.moe.grouped_linear(hidden, w2, offsets, None), positions, weights)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_opcheck_and_compile(device):
    x, ids = torch.randn(4, 16, device=device), torch.randint(0, 5, (4, 3), device=device)
    expert_map = torch.tensor([1, -1, 0, 2, -1], dtype=torch.int32, device=device)
    check_op("moe_permute", octavo.moe_permute, (x, ids, 5, None), x, ids, 5)
    check_op("moe_permute", octavo.moe_permute, (x, ids, 3, expert_map), x, ids, 3, expert_map)
    rows, _, positions = octavo.moe_permute(x, ids, 5)
    args = rows, positions, torch.rand(4, 3, device=device)
    check_op("moe_unpermute", octavo.moe_unpermute, args, *args)


def test_opcheck_and_compile_of_many_pairs(device, monkeypatch):
    monkeypatch.setattr(sort, "MOST_COMPARED", 0)
    x, ids = torch.randn(4, 16, device=device), torch.randint(0, 5, (4, 3), device=device)
    with poisoned_memory():
        check_op("moe_permute", octavo.moe_permute, (x, ids, 5, None), x, ids, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [3, 300, 5000])
def test_graph_capture_and_replay(tokens):
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, 64, (tokens, 6), device="cuda", dtype=torch.int32)
    weights = torch.rand(tokens, 6, device="cuda")

    def step():
        rows, offsets, positions = octavo.moe_permute(x, ids, 64)
        return rows, offsets, positions, octavo.moe_unpermute(rows, positions, weights)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for routing in (torch.randint(0, 64, ids.shape, device="cuda"), torch.full_like(ids, 63), torch.full_like(ids, -1)):
        ids.copy_(routing)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(4096, 8, 128), (131072, 8, 512), (2048, 2, 8), (2049, 2, 8)])
def test_many_pairs(tokens, top_k, experts):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), device="cuda")
    expected = [t.cpu() for t in reference.moe.sort_by_expert(ids, experts, None)]
    for _ in range(3):
        assert same(sort.sort_by_expert(ids, experts, None), expected)


@pytest.mark.gpu
def test_rows_beyond_int32():
    x = torch.randn(2**18 + 1, 4096, device="cuda").to(torch.int8)  # 2³¹ elements, twice
    ids = torch.stack([torch.zeros(len(x), dtype=torch.int32), torch.ones(len(x), dtype=torch.int32)], 1).cuda()
    rows, offsets, _ = octavo.moe_permute(x, ids, 2)
    assert offsets.tolist() == [0, len(x), 2 * len(x)]
    assert torch.equal(rows[-3:], x[-3:]) and torch.equal(rows[len(x) : len(x) + 3], x[:3])
    del rows
    y = torch.randn(2**17 + 1, 16384, device="cuda", dtype=torch.float16)
    positions = torch.arange(len(y), device="cuda", dtype=torch.int32)[:, None]
    out = octavo.moe_unpermute(y, positions, torch.ones(len(y), 1, device="cuda"))
    assert torch.equal(out[-3:], y[-3:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(4, 8).int()), TypeError, "x: dtype int32 is not accepted"),
        (dict(x=torch.zeros(8)), ValueError, r"x: shape \(8,\) has 1 dimensions; expected 2: \[tokens, hidden\]"),
        (dict(x=torch.zeros(8, 4).t()), ValueError, "x: the last dimension has stride 4"),
        (dict(topk_ids=torch.zeros(4, 2)), TypeError, "topk_ids: dtype float32 is not accepted"),
        (dict(topk_ids=torch.zeros(4).int()), ValueError, r"topk_ids: shape \(4,\) has 1 dimensions; expected 2"),
        (dict(topk_ids=torch.zeros(3, 2).int()), ValueError, r"topk_ids: shape \(3, 2\); expected \(4, top_k\)"),
        (dict(topk_ids=torch.zeros(4, 0).int()), ValueError, r"topk_ids: shape \(4, 0\); expected \(4, top_k\)"),
        (dict(topk_ids=torch.zeros(2, 4).int().t()), ValueError, "topk_ids: the last dimension has stride 4"),
        (dict(topk_ids=torch.zeros(4, 2, device="meta").int()), ValueError, "topk_ids: on meta, but x is on cpu"),
        (dict(num_experts=0), ValueError, "num_experts: 0; expected 1 to 512"),
        (dict(num_experts=513), ValueError, "num_experts: 513; expected 1 to 512"),
        (dict(expert_map=torch.zeros(5)), TypeError, "expert_map: dtype float32 is not accepted; expected int32"),
        (dict(expert_map=torch.zeros(5, 1).int()), ValueError, r"expert_map: shape \(5, 1\) has 2 dimensions"),
        (dict(expert_map=torch.zeros(10).int()[::2]), ValueError, r"expert_map: strides \(2,\)"),
        (dict(expert_map=torch.zeros(0).int()), ValueError, "expert_map: no experts"),
        (dict(expert_map=torch.zeros(5, device="meta").int()), ValueError, "expert_map: on meta, but x is on cpu"),
    ],
)
def test_errors_of_permute(change, error, message):
    args = dict(x=torch.zeros(4, 8), topk_ids=torch.zeros(4, 2).int(), num_experts=5, expert_map=None)
    with pytest.raises(error, match=message):
        octavo.moe_permute(**args | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(y=torch.zeros(8, 8).int()), TypeError, "y: dtype int32 is not accepted"),
        (dict(y=torch.zeros(8)), ValueError, r"y: shape \(8,\) has 1 dimensions; expected 2: \[rows, hidden\]"),
        (dict(y=torch.zeros(8, 8).t()[:, ::2]), ValueError, "y: the last dimension has stride 16"),
        (dict(positions=torch.zeros(4, 2).long()), TypeError, "positions: dtype int64 is not accepted"),
        (dict(positions=torch.zeros(4).int()), ValueError, r"positions: shape \(4,\) has 1 dimensions"),
        (dict(positions=torch.zeros(2, 4).int().t()), ValueError, "positions: the last dimension has stride 4"),
        (dict(positions=torch.zeros(4, 2, device="meta").int()), ValueError, "positions: on meta, but y is on cpu"),
        (dict(topk_weights=torch.zeros(4, 2).half()), TypeError, "topk_weights: dtype float16 is not accepted"),
        (dict(topk_weights=torch.zeros(4, 3)), ValueError, r"topk_weights: shape \(4, 3\); expected \(4, 2\)"),
        (dict(topk_weights=torch.zeros(2, 4).t()), ValueError, "topk_weights: the last dimension has stride 4"),
        (dict(topk_weights=torch.zeros(4, 2, device="meta")), ValueError, "topk_weights: on meta, but y is on cpu"),
    ],
)
def test_errors_of_unpermute(change, error, message):
    args = dict(y=torch.zeros(8, 8), positions=torch.zeros(4, 2).int(), topk_weights=torch.zeros(4, 2))
    with pytest.raises(error, match=message):
        octavo.moe_unpermute(**args | change)


def test_e4m3_needs_a_gpu_that_has_it():
    x, ids = torch.empty(2, 8, device="meta", dtype=torch.float8_e4m3fn), torch.empty(2, 2, device="meta").int()
    for capability, properties in KNOWN_DEVICES.items():
        old = capability == 80
        message = r"x: float8_e4m3fn on A100 \(compute capability 8.0\); expected .* permute x.view\(torch.int8\)"
        with record_launches(properties), pytest.raises(ValueError, match=message) if old else nullcontext():
            permute._moe_permute_cuda(x, ids, 5, None)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for tokens, top_k, experts, ids_dtype, mapped in (
        (9, 2, 8, torch.int32, False),
        (9, 8, 128, torch.int64, True),
        (4999, 1, 1, torch.int32, False),
        (300, 2, 8, torch.int32, False),
        (100, 8, 128, torch.int64, True),
        (4096, 2, 8, torch.int32, False),
        (4096, 6, 60, torch.int32, True),
        (4096, 8, 512, torch.int64, False),
    ):
        ids = torch.empty(tokens, top_k + mapped, device="meta", dtype=ids_dtype)[:, :top_k]
        expert_map = torch.empty(2 * experts, device="meta", dtype=torch.int32) if mapped else None
        for width in (71, 4096):
            x = torch.empty(tokens, width, device="meta", dtype=dtype)
            permute._moe_permute_cuda(x, ids, experts, expert_map)
            y = torch.empty(tokens * top_k, width, device="meta", dtype=dtype)
            positions = torch.empty(tokens, top_k, device="meta", dtype=torch.int32)
            permute._moe_unpermute_cuda(y, positions, torch.empty(tokens, top_k, device="meta"))
    ids = torch.empty(9, 2, device="meta", dtype=torch.int32)
    for moved in (torch.float32, torch.int8, torch.float8_e4m3fn):
        if moved == torch.float8_e4m3fn and device_properties(ids.device).capability < (8, 9):
            continue
        permute._moe_permute_cuda(torch.empty(9, 512, device="meta", dtype=moved), ids, 8, None)
