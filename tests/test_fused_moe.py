import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.moe import combine, fused_moe, schedule
from octavo.kernels.quant.packing import packed_shape
from octavo.kernels.tiles import device_properties
from octavo.reference.quantize import LIMITS, quantize_rows
from octavo.testing import assert_accurate, check_op


def case(tokens, experts, top_k, hidden, intermediate, dtype=torch.float32, device="cpu"):
    """x, w1, w2, weights and ids of a layer, each token having top_k experts."""
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    w1 = (torch.randn(experts, 2 * intermediate, hidden, device=device) / hidden**0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, intermediate, device=device) / intermediate**0.5).to(dtype)
    ids = torch.rand(tokens, experts, device=device).topk(top_k, 1).indices.int()
    return x, w1, w2, torch.rand(tokens, top_k, device=device), ids


def layer(x, w1, w2, weights, ids, dtype, expert_map=None):
    """One token and one expert after the other, at one precision."""
    x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    out = torch.zeros_like(x)
    for t, of_token in enumerate(ids.tolist()):
        for j, e in enumerate(of_token):
            if expert_map is not None:
                e = int(expert_map[e]) if 0 <= e < len(expert_map) else -1
            if 0 <= e < len(w1):
                gate, up = (w1[e] @ x[t]).chunk(2)
                out[t] += weights[t, j].to(dtype) * (w2[e] @ (gate / (1 + (-gate).exp()) * up))
    return out


def check(args, expert_map=None):
    out = octavo.fused_moe(*args, expert_map=expert_map)
    assert out.shape == args[0].shape and out.dtype == args[0].dtype and out.is_contiguous()
    assert_accurate(out, layer(*args, torch.float64, expert_map), layer(*args, args[0].dtype, expert_map))


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate"),
    [(1, 8, 2, 64, 64), (7, 4, 2, 160, 96), (33, 3, 1, 72, 40), (5, 16, 6, 33, 130), (140, 2, 2, 40, 24)],
)
def test_fused_moe(device, dtype, tokens, experts, top_k, hidden, intermediate):
    check(case(tokens, experts, top_k, hidden, intermediate, dtype, device))


@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 70),
)
def test_any_ids(tokens, experts, top_k, hidden, intermediate):
    """The same expert twice for one token, and ids that are no expert's, which are left out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w1, w2, weights, _ = case(tokens, max(experts, top_k), top_k, hidden, intermediate, device=device)
    ids = torch.randint(-2, len(w1) + 2, (tokens, top_k), device=device)
    check((x, w1, w2, weights, ids))


def quantized(w, dtype, by_expert):
    """Weights and their scales, one an output or one an expert."""
    scale = w.float().abs().amax((1, 2) if by_expert else 2, keepdim=True) / LIMITS[dtype]
    q = w.float() / scale
    return (q.round() if dtype == torch.int8 else q).to(dtype), scale.view(len(w)) if by_expert else scale[
        :, :, 0
    ].contiguous()


def quantized_layer(x, w1, w2, weights, ids, w1_scale, w2_scale, dtype):
    """With tokens quantised as the op does it; what lies between is too, but in float64: there it is exact."""

    def product(rows, w, scale):
        scale = scale[:, None] if scale.dim() else scale
        return rows.to(dtype) @ (w.double() * scale).to(dtype).t()

    def rounded(rows, like):
        q, row_scale = quantize_rows(rows, like.dtype, None, None)
        return q.double() * row_scale

    out = torch.zeros_like(x, dtype=dtype)
    for t in range(len(x)):
        for j, e in enumerate(ids[t].tolist()):
            gate, up = product(rounded(x[t : t + 1], w1), w1[e], w1_scale[e]).chunk(2, 1)
            hidden = torch.nn.functional.silu(gate) * up
            hidden = hidden if dtype == torch.float64 else rounded(hidden.to(x.dtype), w2)
            out[t] += weights[t, j].to(dtype) * product(hidden, w2[e], w2_scale[e])[0]
    return out


@pytest.mark.parametrize("by_expert", [False, True])
@pytest.mark.parametrize("of_weights", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate"),
    [(1, 8, 2, 64, 64), (9, 4, 2, 160, 96), (140, 2, 2, 48, 33)],
)
def test_quantized(device, of_weights, by_expert, tokens, experts, top_k, hidden, intermediate):
    x, w1, w2, weights, ids = case(tokens, experts, top_k, hidden, intermediate, torch.float32, device)
    (w1, w1_scale), (w2, w2_scale) = (quantized(w, of_weights, by_expert) for w in (w1, w2))
    out = octavo.fused_moe(x, w1, w2, weights, ids, w1_scale=w1_scale, w2_scale=w2_scale)
    args = x, w1, w2, weights, ids, w1_scale, w2_scale
    exact, plain = quantized_layer(*args, torch.float64), quantized_layer(*args, torch.float16)
    assert_accurate(out, exact, plain)
    expected = reference.moe.fused_moe(*args[:5], None, *args[5:])
    assert_accurate(expected, exact, plain)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "hidden"), [(1, 4, 2, 256), (9, 4, 2, 128), (130, 2, 2, 128)])
def test_quantized_in_blocks(device, tokens, experts, top_k, hidden):
    of_weights = torch.float8_e4m3fn
    x, w1, w2, weights, ids = case(tokens, experts, top_k, hidden, 128, torch.float32, device)

    def in_blocks(w):
        outputs = -(-w.shape[1] // 128)
        scale = torch.rand(experts, outputs, w.shape[2] // 128, device=device) / 2 + 0.5
        q, row_scale = quantized(w, of_weights, True)
        return q, scale * row_scale[:, None, None]

    (w1, w1_scale), (w2, w2_scale) = in_blocks(w1), in_blocks(w2)
    out = octavo.fused_moe(x, w1, w2, weights, ids, w1_scale=w1_scale, w2_scale=w2_scale)

    def of_blocks(dtype):
        """With tokens quantised as the op does it; what lies between is too, but in float64: there it is exact."""

        def rounded(rows):
            q, scale = quantize_rows(rows, of_weights, None, 128)
            return (q.double() * scale.repeat_interleave(128, 1)).to(dtype)

        def spread(w, scale):
            scale = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)
            return (w.double() * scale).to(dtype)

        rows, result = rounded(x), torch.zeros_like(x, dtype=dtype)
        for t, of_token in enumerate(ids.tolist()):
            for j, e in enumerate(of_token):
                gate, up = (rows[t : t + 1] @ spread(w1[e], w1_scale[e]).t()).chunk(2, 1)
                hidden = torch.nn.functional.silu(gate) * up
                hidden = hidden if dtype == torch.float64 else rounded(hidden.to(x.dtype))
                result[t] += weights[t, j].to(dtype) * (hidden @ spread(w2[e], w2_scale[e]).t())[0]
        return result

    exact, plain = of_blocks(torch.float64), of_blocks(torch.float16)
    assert_accurate(out, exact, plain)
    assert_accurate(reference.moe.fused_moe(x, w1, w2, weights, ids, None, w1_scale, w2_scale), exact, plain)


def wide(of_groups, k):
    """What belongs to groups, for each weight."""
    return of_groups.double().transpose(1, 2).repeat_interleave(k // of_groups.shape[1], 2)


def int4(experts, n, k, groups, device, zeros=False):
    """Packed weights, their scales, and the weights themselves; `zeros`: minima, in fp32, before those."""
    q = torch.randint(0, 16, (experts, n, k), dtype=torch.uint8, device=device)
    scale = ((torch.rand(experts, groups, n, device=device) + 0.5) / (5 * k**0.5)).half()
    packed = torch.stack([octavo.int4_pack(q[e]) for e in range(experts)])
    if not zeros:
        return packed, scale, (q.double() - 8) * wide(scale, k)
    minimum = -torch.randint(0, 16, scale.shape, device=device) * scale.float()
    return packed, scale, minimum, q.double() * wide(scale, k) + wide(minimum, k)


def int8(experts, n, k, groups, device):
    """Weights of all 256 values, their scales, and what they stand for."""
    q = torch.randint(-128, 128, (experts, n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(experts, groups, n, device=device) + 0.5) / (80 * k**0.5)
    return q, scale, q.double() * wide(scale, k)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate", "groups"),
    [(1, 8, 2, 128, 128, (1, 1)), (9, 4, 2, 160, 96, (5, 1)), (70, 2, 2, 256, 32, (2, 1)), (3, 3, 1, 64, 320, (1, 10))],
)
def test_int4(device, dtype, tokens, experts, top_k, hidden, intermediate, groups):
    x, _, _, weights, ids = case(tokens, experts, top_k, hidden, intermediate, dtype, device)
    w1, w1_scale, exact_w1 = int4(experts, 2 * intermediate, hidden, groups[0], device)
    w2, w2_scale, exact_w2 = int4(experts, hidden, intermediate, groups[1], device)
    out = octavo.fused_moe(x, w1, w2, weights, ids, w1_scale=w1_scale, w2_scale=w2_scale)
    args = x, exact_w1, exact_w2, weights, ids
    exact, plain = layer(*args, torch.float64), layer(*args, dtype)
    assert_accurate(out, exact, plain)
    assert_accurate(reference.moe.fused_moe(x, w1, w2, weights, ids, None, w1_scale, w2_scale), exact, plain)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate", "groups", "which"),
    [
        (1, 8, 2, 128, 64, (1, 1), "w1 w2"),
        (9, 4, 2, 160, 96, (5, 1), "w2"),
        (9, 4, 2, 96, 160, (1, 5), "w1"),
        (50, 2, 2, 256, 32, (2, 1), "w1 w2"),
    ],
)
def test_int4_with_minima(device, dtype, tokens, experts, top_k, hidden, intermediate, groups, which):
    x, _, _, weights, ids = case(tokens, experts, top_k, hidden, intermediate, dtype, device)
    w1, w1_scale, *w1_minimum, exact_w1 = int4(experts, 2 * intermediate, hidden, groups[0], device, "w1" in which)
    w2, w2_scale, *w2_minimum, exact_w2 = int4(experts, hidden, intermediate, groups[1], device, "w2" in which)
    given = dict(w1_scale=w1_scale, w2_scale=w2_scale)
    given |= dict(w1_minimum=next(iter(w1_minimum), None), w2_minimum=next(iter(w2_minimum), None))
    out = octavo.fused_moe(x, w1, w2, weights, ids, **given)
    args = x, exact_w1, exact_w2, weights, ids
    exact, plain = layer(*args, torch.float64), layer(*args, dtype)
    assert_accurate(out, exact, plain)
    assert_accurate(reference.moe.fused_moe(x, w1, w2, weights, ids, None, **given), exact, plain)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "intermediate", "groups"),
    [(1, 8, 2, 128, 96, (1, 1)), (9, 4, 2, 160, 96, (5, 1)), (50, 2, 2, 256, 32, (2, 1)), (3, 3, 1, 64, 320, (1, 10))],
)
def test_int8_weights_alone(device, dtype, tokens, experts, top_k, hidden, intermediate, groups):
    x, _, _, weights, ids = case(tokens, experts, top_k, hidden, intermediate, dtype, device)
    w1, w1_scale, exact_w1 = int8(experts, 2 * intermediate, hidden, groups[0], device)
    w2, w2_scale, exact_w2 = int8(experts, hidden, intermediate, groups[1], device)
    given = dict(w1_scale=w1_scale, w2_scale=w2_scale, weights_only=True)
    out = octavo.fused_moe(x, w1, w2, weights, ids, **given)
    args = x, exact_w1, exact_w2, weights, ids
    exact, plain = layer(*args, torch.float64), layer(*args, dtype)
    assert_accurate(out, exact, plain)
    assert_accurate(reference.moe.fused_moe(x, w1, w2, weights, ids, None, **given), exact, plain)


@given(
    tokens=st.integers(1, 9),
    hidden=st.integers(1, 5),
    intermediate=st.integers(1, 5),
    whole=st.booleans(),
    is_int4=st.booleans(),
)
def test_any_groups(tokens, hidden, intermediate, whole, is_int4):
    """Weights alone, of any multiple of 32 inputs, with ids that are no expert's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, intermediate = 32 * hidden, 32 * intermediate
    x, _, _, weights, _ = case(tokens, 3, 2, hidden, intermediate, device=device)
    ids = torch.randint(-1, 4, (tokens, 2), device=device)
    make = (lambda *sizes: int4(*sizes, zeros=True)) if is_int4 else int8
    w1, w1_scale, *w1_minimum, exact_w1 = make(3, 2 * intermediate, hidden, 1 if whole else hidden // 32, device)
    w2, w2_scale, *w2_minimum, exact_w2 = make(3, hidden, intermediate, 1 if whole else intermediate // 32, device)
    given = dict(w1_scale=w1_scale, w2_scale=w2_scale, weights_only=True)
    if is_int4:
        given |= dict(w1_minimum=w1_minimum[0], w2_minimum=w2_minimum[0])
    out = octavo.fused_moe(x, w1, w2, weights, ids, **given)
    args = x, exact_w1, exact_w2, weights, ids
    assert_accurate(out, layer(*args, torch.float64), layer(*args, x.dtype))


@pytest.mark.parametrize("expert", [0, 3])
def test_all_tokens_on_one_expert(device, expert):
    x, w1, w2, weights, ids = case(20, 4, 2, 64, 32, device=device)
    check((x, w1, w2, weights, torch.full_like(ids, expert)))


def test_experts_elsewhere(device):
    x, w1, w2, weights, _ = case(9, 3, 2, 64, 32, device=device)
    ids = torch.randint(-1, 9, (9, 2), device=device)
    expert_map = torch.tensor([2, -1, 0, -1, -1, 1, 7], dtype=torch.int32, device=device)
    check((x, w1, w2, weights, ids), expert_map)
    nowhere = torch.full((9,), -1, dtype=torch.int32, device=device)
    out = octavo.fused_moe(x, w1, w2, weights, ids, expert_map=nowhere)
    assert torch.equal(out, torch.zeros_like(x))


def test_shards_of_the_experts_add_up(device):
    """What two devices make of their experts is what one makes of all."""
    x, w1, w2, weights, ids = case(10, 4, 2, 64, 32, device=device)
    total = torch.zeros_like(x)
    for first in (0, 2):
        expert_map = torch.full((4,), -1, dtype=torch.int32, device=device)
        expert_map[first : first + 2] = torch.arange(2, dtype=torch.int32, device=device)
        shard = w1[first : first + 2], w2[first : first + 2]
        total += octavo.fused_moe(x, *shard, weights, ids, expert_map=expert_map)
    assert_accurate(total, octavo.fused_moe(x, w1, w2, weights, ids).double(), layer(x, w1, w2, weights, ids, x.dtype))


def test_no_tokens(device):
    x, w1, w2, weights, ids = case(3, 4, 2, 64, 32, device=device)
    assert octavo.fused_moe(x[:0], w1, w2, weights[:0], ids[:0]).shape == (0, 64)


def test_views(device):
    """Tokens and routing that are cut out of something wider."""
    x, w1, w2, weights, ids = case(6, 4, 2, 64, 32, device=device)
    wide = torch.randn(6, 100, device=device)
    wide[:, :64] = x
    more = torch.cat([weights, weights], 1)[:, 1:3], torch.cat([ids, ids], 1)[:, 1:3].long()
    expected = octavo.fused_moe(x, w1, w2, *(m.contiguous() for m in more))
    assert torch.equal(octavo.fused_moe(wide[:, :64], w1, w2, *more), expected)


def test_what_spoils_a_token_stays_with_it(device):
    x, w1, w2, weights, ids = case(6, 3, 2, 64, 32, device=device)
    expected = octavo.fused_moe(x, w1, w2, weights, ids)
    x[2, 5] = torch.nan
    out = octavo.fused_moe(x, w1, w2, weights, ids)
    assert out[2].isnan().all()
    others = torch.arange(6, device=device) != 2
    assert torch.equal(out[others], expected[others])


def test_gather(device):
    x = torch.randn(5, 70, device=device)
    order = torch.tensor([3, 9, 0, 1, 8, 2, 4, 5, 6, 7], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    scale = torch.rand(5, 3, device=device)
    rows, scales, plan = schedule.gather_and_plan(x, order, offsets, 2, 16, 0, scale)
    assert torch.equal(rows, x[order.long() // 2]) and torch.equal(scales, scale[order.long() // 2])
    assert torch.equal(plan[:21].cpu()[[0, 8, 9, 10, 16, 17, 18]], torch.tensor([2, 0, 0, 4, 1, 4, 6]))


def test_combine(device):
    """Weighted sums in the order of a token's experts; what has no position is not read, whatever its weight."""
    parts = torch.randn(2, 5, 40, device=device)
    positions = torch.tensor([[3, 0], [-1, 2], [-1, -1]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.5, 2.0], [torch.inf, 0.25], [torch.nan, 1.0]], device=device)
    out = torch.empty(3, 40, device=device)
    combine.combine(out, parts, positions, weights)
    y = parts[0] + parts[1]
    expected = torch.stack([0.5 * y[3] + 2.0 * y[0], 0.25 * y[2], torch.zeros_like(y[0])])
    assert_accurate(out, expected.double(), expected)


def test_reference_against_a_loop():
    args = case(6, 4, 2, 64, 32, torch.float16)
    out = reference.moe.fused_moe(*args, None)
    assert_accurate(out, layer(*args, torch.float64), layer(*args, torch.float16))


def test_opcheck_and_compile(device):
    args = case(5, 4, 2, 64, 32, device=device)
    expert_map = torch.tensor([1, -1, 0, 3], dtype=torch.int32, device=device)
    check_op("fused_moe", octavo.fused_moe, (*args, None), *args)
    check_op("fused_moe", octavo.fused_moe, (*args, expert_map), *args, expert_map=expert_map)
    w1, w1_scale, _ = int8(4, 64, 64, 2, device)
    w2, w2_scale, _ = int8(4, 64, 32, 1, device)
    args = args[0], w1, w2, *args[3:]
    given = dict(w1_scale=w1_scale, w2_scale=w2_scale, weights_only=True)
    check_op("fused_moe", octavo.fused_moe, (*args, None, w1_scale, w2_scale, None, None, True), *args, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 60, 200, 600, 3000])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "intermediate"),
    [(8, 2, 1024, 1792), (64, 6, 512, 352), (128, 8, 512, 200), (4, 1, 520, 100), (300, 3, 128, 66)],
)
def test_large_on_a_gpu(tokens, experts, top_k, hidden, intermediate):
    x, w1, w2, weights, drawn = case(tokens, experts, top_k, hidden, intermediate, torch.bfloat16, "cuda")
    for ids in (drawn, torch.full_like(drawn, experts - 1), torch.randint_like(drawn, -1, experts + 1)):
        args = x, w1, w2, weights, ids
        out = octavo.fused_moe(*args)
        exact = reference.moe.fused_moe(*(a.double() for a in args[:3]), weights, ids, None).double()
        plain = reference.moe.fused_moe(*args, None)
        assert_accurate(out, exact, plain)
        for _ in range(5):
            assert torch.equal(out, octavo.fused_moe(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 60, 200, 600])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, None], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 with minima"])
def test_weights_alone_on_a_gpu(tokens, group, kind, dtype):
    """Also of sizes that are no multiple of a tile's."""
    hidden, intermediate = (480, 768) if group == 96 else (768, 1280)
    sizes = (hidden // (group or hidden), intermediate // (group or intermediate))
    x, _, _, weights, drawn = case(tokens, 8, 2, hidden, intermediate, dtype, "cuda")
    make = int8 if kind == "int8" else (lambda *of: int4(*of, zeros=kind != "int4"))
    w1, w1_scale, *w1_minimum, exact_w1 = make(8, 2 * intermediate, hidden, sizes[0], "cuda")
    w2, w2_scale, *w2_minimum, exact_w2 = make(8, hidden, intermediate, sizes[1], "cuda")
    given = dict(w1_scale=w1_scale, w2_scale=w2_scale, weights_only=True)
    given |= dict(w1_minimum=next(iter(w1_minimum), None), w2_minimum=next(iter(w2_minimum), None))
    for ids in (drawn, torch.full_like(drawn, 7), torch.randint_like(drawn, -1, 9)):
        out = octavo.fused_moe(x, w1, w2, weights, ids, **given)
        exact, plain = (
            reference.moe.fused_moe(x.to(of), exact_w1.to(of), exact_w2.to(of), weights, ids, None)
            for of in (torch.float64, dtype)
        )
        assert_accurate(out, exact.double(), plain)
        for _ in range(3):
            assert torch.equal(out, octavo.fused_moe(x, w1, w2, weights, ids, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_graph_replayed_with_other_ids(tokens):
    x, w1, w2, weights, ids = case(tokens, 8, 2, 512, 256, torch.bfloat16, "cuda")
    octavo.fused_moe(x, w1, w2, weights, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.fused_moe(x, w1, w2, weights, ids)
    for other in (torch.zeros_like(ids), torch.full_like(ids, -1), torch.randint_like(ids, 0, 8)):
        ids.copy_(other)
        graph.replay()
        assert torch.equal(out, octavo.fused_moe(x, w1, w2, weights, ids))


BYTES = dict(w1=torch.zeros(3, 12, 8).char(), w2=torch.zeros(3, 8, 6).char())
BYTES |= dict(w1_scale=torch.zeros(3, 12), w2_scale=torch.zeros(3))


ALONE = dict(x=torch.zeros(4, 32), w1=torch.zeros(3, 128, 32).char(), w2=torch.zeros(3, 32, 64).char())
ALONE |= dict(w1_scale=torch.zeros(3, 1, 128), w2_scale=torch.zeros(3, 2, 32), weights_only=True)
INT4 = ALONE | dict(w1=torch.zeros(3, 2, 1, 64, 32).short(), w2=torch.zeros(3, 1, 1, 64, 32).short())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(4, 8, dtype=torch.int8)), TypeError, "x: dtype int8 is not accepted"),
        (dict(x=torch.zeros(8)), ValueError, r"x: shape \(8,\) has 1 dimensions; expected 2"),
        (dict(x=torch.zeros(4, 0)), ValueError, r"x: shape \(4, 0\); expected at least one element"),
        (dict(w1=torch.zeros(3, 12, 8).half()), TypeError, "w1: dtype float16"),
        (dict(w1=torch.zeros(3, 10, 8)), ValueError, r"w1: shape \(3, 10, 8\); expected \(3, 12, 8\)"),
        (dict(w1=torch.zeros(2, 12, 8)), ValueError, r"w1: shape \(2, 12, 8\); expected \(3, 12, 8\)"),
        (dict(w2=torch.zeros(3, 7, 6)), ValueError, r"w2: shape \(3, 7, 6\); expected \(3, 8, 6\)"),
        (dict(w2=torch.zeros(3, 6, 8).transpose(1, 2)), ValueError, "w2: strides .* are not contiguous"),
        (dict(w2=torch.zeros(3, 8, 0)), ValueError, "w2: .* expected at least one intermediate"),
        (dict(topk_ids=torch.zeros(4, 2)), TypeError, "topk_ids: dtype float32"),
        (dict(topk_ids=torch.zeros(3, 2, dtype=torch.int32)), ValueError, r"topk_ids: shape \(3, 2\)"),
        (dict(topk_weights=torch.zeros(4, 3)), ValueError, r"topk_weights: shape \(4, 3\); expected \(4, 2\)"),
        (dict(topk_weights=torch.zeros(4, 2).half()), TypeError, "topk_weights: dtype float16"),
        (dict(topk_weights=torch.zeros(4, 2, device="meta")), ValueError, "topk_weights: on meta, but x is on cpu"),
        (dict(w1_scale=torch.zeros(3, 12)), ValueError, "w1_scale: given beside weights of x's dtype"),
        (dict(w1=torch.zeros(3, 12, 8).char()), TypeError, "w2: dtype float32 is not accepted; expected int8"),
        (BYTES | dict(w2_scale=None), ValueError, "w2_scale: None beside quantised weights"),
        (
            BYTES | dict(w1_scale=torch.zeros(3, 6)),
            ValueError,
            r"w1_scale: shape \(3, 6\); expected one of \(3,\), \(3, 12\)",
        ),
        (BYTES | dict(w2_scale=torch.zeros(3, 1, 1)), ValueError, r"w2_scale: shape \(3, 1, 1\); expected one of"),
        (BYTES | dict(w1_scale=torch.zeros(3, 12).half()), TypeError, "w1_scale: dtype float16"),
        (dict(expert_map=torch.zeros(9)), TypeError, "expert_map: dtype float32"),
        (dict(weights_only=True), ValueError, "weights_only: True beside w1 of dtype float32; it is for int8 weights"),
        (dict(w2_minimum=torch.zeros(3, 1, 8)), ValueError, "w2_minimum: given beside weights that are not int4"),
        (ALONE | dict(w1_scale=torch.zeros(3, 12)), ValueError, r"w1_scale: shape \(3, 12\) has 2 dimensions"),
        (ALONE | dict(w2_scale=None), ValueError, "w2_scale: None beside quantised weights"),
        (ALONE | dict(w2_scale=torch.zeros(3, 3, 32)), ValueError, "w2_scale: 3 groups of 64 inputs"),
        (ALONE | dict(w1_scale=torch.zeros(3, 1, 64)), ValueError, r"w1_scale: shape .* expected \(3, 1, 128\)"),
        (INT4 | dict(w1_minimum=torch.zeros(3, 1, 64)), ValueError, r"w1_minimum: shape .* expected \(3, 1, 128\)"),
        (INT4 | dict(w2_minimum=torch.zeros(3, 1, 32)), ValueError, r"w2_minimum: shape .* expected \(3, 2, 32\)"),
        (INT4 | dict(w2_minimum=torch.zeros(3, 2, 32).int()), TypeError, "w2_minimum: dtype int32"),
    ],
)
def test_errors(change, error, message):
    args = dict(x=torch.zeros(4, 8), w1=torch.zeros(3, 12, 8), w2=torch.zeros(3, 8, 6))
    args |= dict(topk_weights=torch.zeros(4, 2), topk_ids=torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(error, match=message):
        octavo.fused_moe(**args | change)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""

    def new(*shape, dtype=dtype):
        return torch.empty(shape, device="meta", dtype=dtype)

    for experts, top_k, hidden, intermediate in ((8, 2, 4096, 14336), (64, 6, 2048, 1408), (8, 2, 161, 96)):
        for tokens in (1, 2, 16, 64, 128, 256, 512, 1024, 4096):
            ids, weights = new(tokens, top_k, dtype=torch.int32), new(tokens, top_k, dtype=torch.float32)
            w1, w2 = new(experts, 2 * intermediate, hidden), new(experts, hidden, intermediate)
            fused_moe._fused_moe_cuda(new(tokens, hidden), w1, w2, weights, ids, None)
            for group in (None, 128, 64, 32) if tokens in (16, 64, 256, 1024) and hidden > 161 else ():
                launches_alone(new, dtype, experts, ids, weights, hidden, intermediate, group)
                if group == 128 and experts == 8 and tokens < 256:  # in fp32, too
                    launches_alone(new, torch.float32, experts, ids, weights, hidden, intermediate, group)
            if tokens % 3 == 1:  # of each kernel's tiles one or two
                for of_weights in _bytes_here():
                    scales = new(experts, 2 * intermediate, dtype=torch.float32), new(experts, dtype=torch.float32)
                    w1 = new(experts, 2 * intermediate, hidden, dtype=of_weights)
                    w2 = new(experts, hidden, intermediate, dtype=of_weights)
                    fused_moe._fused_moe_cuda(new(tokens, hidden), w1, w2, weights, ids, None, *scales)
                    if of_weights == torch.float8_e4m3fn and hidden > 161:
                        scales = [new(experts, *(s // 128 for s in w.shape[1:]), dtype=torch.float32) for w in (w1, w2)]
                        fused_moe._fused_moe_cuda(new(tokens, hidden), w1, w2, weights, ids, None, *scales)


def launches_alone(new, dtype, experts, ids, weights, hidden, intermediate, group):
    """Weights alone, int8 and int4 with minima or without; None: a scale an output, in fp32."""
    x, scale_dtype = new(len(ids), hidden, dtype=dtype), torch.float32 if group is None else dtype
    scales, packed, plain = [], [], []
    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        scales.append(new(experts, k // (group or k), n, dtype=scale_dtype))
        packed.append(new(experts, *packed_shape(n, k), dtype=torch.int16))
        plain.append(new(experts, n, k, dtype=torch.int8))
    fused_moe._fused_moe_cuda(x, *plain, weights, ids, None, *scales, weights_only=True)
    if group is not None:
        for minima in ((), scales):
            fused_moe._fused_moe_cuda(x, *packed, weights, ids, None, *scales, *minima)


def _bytes_here():
    """Dtypes of quantised weights that the device has which is compiled for."""
    old = device_properties(torch.device("meta")).capability < (8, 9)
    return (torch.int8,) if old else (torch.int8, torch.float8_e4m3fn)
