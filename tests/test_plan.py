"""`plan_attention`, and `paged_attention` with its plan, which gives the bits that it gives without."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter
from attention_args import TENSORS, op_args
from hypothesis import given
from hypothesis import strategies as st
from test_paged_attention import DECODE, MIX, OPTIONS, case, check, dense

import octavo
from octavo.kernels import tiles as tiles_module
from octavo.kernels.attention import decode, merge_parts, paged, plan_attention
from octavo.kernels.attention.schedule import share_of
from octavo.kernels.launch import INTERPRET, Recorder, recording
from octavo.kernels.registry import without_interpreter
from octavo.kernels.tiles import KNOWN_DEVICES, cdiv
from octavo.testing import assert_accurate, check_op

PLANNED = ("query", "key_cache", "block_table", "seq_lens", "cu_seqlens_q")
SHARED = ("max_seqlen_q", "causal", "window_size", "rolling")
RECORD = decode.RECORD.value
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
interpreted = pytest.mark.skipif(not INTERPRET, reason="is about the interpreter")
device = "cuda" if torch.cuda.is_available() else "cpu"


def plan_of(args, options):
    shared = {name: options[name] for name in SHARED if name in options}
    return octavo.plan_attention(*(args[name] for name in PLANNED), **shared, alibi="alibi_slopes" in options)


def with_plan(**given):
    """`octavo.paged_attention` with a plan of its own, which stays as it was; the bits are those without."""
    args = {name: given.pop(name) for name in TENSORS}
    plan = plan_of(args, given)
    before = plan.clone()
    result = octavo.paged_attention(**args, **given, plan=plan)
    assert torch.equal(plan, before)
    expected = octavo.paged_attention(**args, **given)
    for ours, without in zip(*((x if isinstance(x, tuple) else (x,)) for x in (result, expected)), strict=True):
        assert torch.equal(ours, without)
    return result


@pytest.fixture
def many_workers(monkeypatch):
    """As on a GPU, an item may be cut into many parts."""
    monkeypatch.setattr(tiles_module, "_INTERPRETER", replace(tiles_module._INTERPRETER, num_sms=40))


@pytest.mark.parametrize("lengths", [DECODE, [(1, 300)], [(1, 90), (4, 70), (0, 9)], MIX], ids=str)
def test_decode_and_mixes(device, dtype, lengths, many_workers):
    check(*case(lengths, device=device, dtype=dtype, padding=2), function=with_plan)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(device, dtype, options):
    lengths = [(1, 150), (3, 70), (0, 20), (1, 0), (2, 33)]
    check(*case(lengths, device=device, dtype=dtype), function=with_plan, **options)


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(2, 2, 80), (6, 2, 64), (5, 1, 96), (16, 4, 128), (4, 1, 256)])
def test_heads(device, dtype, heads, kv_heads, d, many_workers):
    args = case([(1, 200), (1, 30)], heads=heads, kv_heads=kv_heads, d=d, device=device, dtype=dtype)
    check(*args, function=with_plan)


@pytest.mark.parametrize(
    ("d", "queries", "long", "at"),
    [(64, 1, 600, 0), (64, 3, 300, 5), (128, 3, 600, 5), (128, 1, 300, 12), (256, 1, 600, 5)],
)
def test_many_parts_among_short_sequences(device, dtype, d, queries, long, at, many_workers, monkeypatch):
    """Merged by worker, where programs take a row each."""
    step = merge_parts.merge_step
    monkeypatch.setattr(merge_parts, "merge_step", lambda _, *given: step(10**6, *given))
    lengths = [(queries, 3 + b) for b in range(12)]
    lengths.insert(at, (queries, long))
    kv_heads = 1 if dtype == torch.float32 else 4
    args, longest = case(lengths, heads=2 * kv_heads, kv_heads=kv_heads, d=d, padding=1, device=device, dtype=dtype)
    plan = plan_of(args, dict(max_seqlen_q=longest))
    assert (plan[:, 0] == at).sum() > 8
    check(args, longest, function=with_plan)


def test_many_tokens(device, dtype):
    """Other tiles than few have."""
    args = case([(1, 1 + b % 7) for b in range(34)] + [(1, 200)], device=device, dtype=dtype)
    check(*args, function=with_plan)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=7),
    long=st.integers(0, 400),
    at=st.integers(0, 7),
    kv_heads=st.sampled_from([1, 2, 4]),
    group=st.integers(1, 5),
    page_size=st.integers(1, 17),
    padding=st.integers(0, 3),
    causal=st.booleans(),
    window_size=st.one_of(st.none(), st.integers(1, 90)),
    heads_first=st.booleans(),
    half=st.booleans(),
)
def test_one_long_among_short(
    lengths, long, at, kv_heads, group, page_size, padding, causal, window_size, heads_first, half
):
    lengths = [(queries, queries + history) for queries, history in lengths]
    lengths.insert(at, (1, long))
    args, longest = case(
        lengths,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        page_size=page_size,
        padding=padding,
        dtype=torch.float16 if half else torch.float32,
        device=device,
    )
    if heads_first:
        for name in ("key_cache", "value_cache"):
            args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(args, longest, function=with_plan, causal=causal, window_size=window_size)


@pytest.mark.parametrize("spare", [0, 2])
def test_rings(device, dtype, spare):
    args, longest = case([(1, 150), (2, 37), (1, 5)], device=device, dtype=dtype)
    pages = cdiv(30 + longest - 1, 4) + spare
    ring = args | {
        name: torch.full((3 * pages, 4, 2, 16), torch.nan, dtype=dtype, device=device) for name in TENSORS[1:3]
    }
    ring["block_table"] = torch.arange(3 * pages, dtype=torch.int32, device=device).view(3, pages)
    for b, length in enumerate(args["seq_lens"].tolist()):
        for j in range(length):
            for name in TENSORS[1:3]:
                at = ring["block_table"][b, j // 4 % pages], j % 4
                ring[name][at] = args[name][args["block_table"][b, j // 4], j % 4]
    exact, plain = (dense(args, kind, window_size=30)[0] for kind in (torch.float64, dtype))
    out = with_plan(**ring, max_seqlen_q=longest, window_size=30, rolling=True)
    assert_accurate(out, exact, plain)


def test_layers_and_steps(device, dtype, many_workers):
    """One plan for layers with other keys; a plan for each step; memory of one plan for the next."""
    for step in range(3):
        lengths = [(1, 100 + 30 * step), (1, 7 + step), (2, 50)]
        layers = [case(lengths, device=device, dtype=dtype) for _ in range(3)]
        plan = plan_of(layers[0][0], dict(max_seqlen_q=2))
        for args, longest in layers:
            check(args, longest, function=lambda **given: octavo.paged_attention(**given, plan=plan))  # noqa: B023


@triton.jit(do_not_specialize=["total", "common", "workers", "least"])
def _share_kernel(out_ptr, total, common, workers, least):
    tl.store(out_ptr, share_of(total, common, workers, least))


def share_found(*given):
    out = torch.empty(1, dtype=torch.int32, device=device)
    _share_kernel[(1,)](out, *given)
    return out.item()


@pytest.mark.parametrize(
    ("total", "common", "workers", "expected"),
    [
        (64 * 256 + 1, 256, 132, 128),  # of 125: each sequence has two
        (256 * 64 + 1, 64, 132, 128),  # each has two sequences
        (63 * 64 + 4096 + 1, 64, 132, 64),  # of 62
        (64 * 64 + 1, 64, 132, 32),
        (62 * 256 + 1, 256, 132, 128),  # of 121
        (60 * 256 + 1, 256, 132, 117),  # 128 are too many
        (66 * 256 + 1, 256, 132, 129),  # one above a power of two
        (64 * 256 + 1, 1, 132, 125),  # nothing in common
        (64 * 192 + 1, 64, 132, 94),
        (264 * 192 + 1, 64, 132, 385),  # 6 * 64 + 1
        (263 * 192 + 1, 64, 132, 384),  # of 383
        (14 * 132, 64, 132, 14),  # few tiles
        (15 * 132, 64, 132, 16),
        (32 * 256 + 1, 256, 132, 64),  # of 63: each has four
        (8 * 2048 + 1, 2048, 66, 249),  # with 256, each would have eight
        (8192 + 1, 8192, 66, 125),
        (1, 2**30, 132, 2),  # padding alone
        (2**30, 2**30, 132, 8134408),
        (2**30, 2**20, 1, 2**30),
        (2**30 - 1, 2**20, 1, 2**30),
    ],
)
def test_shares_end_where_sequences_do(total, common, workers, expected):
    assert share_found(total, common, workers, 2) == expected


@given(
    total=st.integers(1, 1 << 27),
    small=st.integers(1, 1 << 14),
    power=st.integers(0, 30),
    workers=st.integers(1, 300),
    least=st.integers(1, 2),
)
def test_shares_cover_all_tiles(total, small, power, workers, least):
    for tiles in (total, small):
        found, fewest = share_found(tiles, 1 << power, workers, least), max(cdiv(tiles, workers), least)
        assert fewest <= found <= fewest + fewest // 15 and found * workers >= tiles
        assert found == fewest or found % (1 << power) == 0 or (1 << power) % found == 0


@interpreted
@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([64] * 15, 64),  # of 61: no sequence is cut
        ([64] * 7 + [512], 64),  # of 60: the long one alone
        ([64] * 14 + [63], 60),  # and a length that fits not
        ([0] + [64] * 15, 61),  # one tile without a key
        ([], 1),
    ],
)
def test_shares_of_lengths_in_common(monkeypatch, counts, expected):
    """In tiles; the padding's tile, which is last, does not count for what they have in common."""
    monkeypatch.setattr(tiles_module, "_INTERPRETER", replace(tiles_module._INTERPRETER, num_sms=32))
    args, _ = case([(1, 0)] * max(len(counts), 1))
    tiles = plan_attention._tiles(args["query"], args["key_cache"], 1, False)
    args["seq_lens"] = torch.tensor([n * tiles.block_n for n in counts], dtype=torch.int32)
    args["block_table"] = torch.zeros(len(counts), 10**4, dtype=torch.int32)
    args["cu_seqlens_q"] = torch.arange(len(counts) + 1, dtype=torch.int32)
    rows = plan_of(args, dict(max_seqlen_q=1))
    assert len(rows) == 16 and rows[:, 4].eq(expected).all()


def test_shares_are_those_of_the_lengths(device, many_workers):
    lengths = [(1, 150), (3, 40), (0, 9), (1, 0), (2, 77)]
    args, longest = case(lengths, device=device, padding=1, dtype=torch.float16)
    options = dict(max_seqlen_q=longest, window_size=60)
    rows = plan_of(args, options).tolist()
    tiles = plan_attention._tiles(args["query"], args["key_cache"], longest, False)
    block_q, keys = tiles.block_m // 2, decode.keys_of_group(tiles)
    starts, sequences, first = [0, 1, 4, 4, 5, 7, 8], [], 0
    for (queries, length), start in zip([*lengths, (1, 0)], starts, strict=False):
        length = min(length, 60 - 1 + min(queries, block_q) + keys - 1)
        total = max(cdiv(queries, block_q), 1) * max(cdiv(length, tiles.block_n), 1)
        sequences.append((first, first + total, start, start + queries))
        first += total
    share = max(cdiv(first, len(rows)), tiles.least)
    for worker, row in enumerate(rows):
        begin, stop = worker * share, min((worker + 1) * share, first)
        assert row[2:5] == [begin, stop, share]
        if begin < stop:
            b = next(b for b, (_, end, *_) in enumerate(sequences) if begin < end)
            assert row[:2] == [b, sequences[b][0]] and row[5:7] == list(sequences[b][2:])
            assert row[7] == [*(length for _, length in lengths), 0][b]


def test_the_shape_is_that_of_any_lengths(device):
    shapes = {plan_of(case([(1, n), (1, 3)], device=device)[0], dict(max_seqlen_q=1)).shape for n in (0, 5, 99)}
    ((workers, width),) = shapes
    assert workers > 0 and width == RECORD


def test_nothing_to_plan(device):
    """Prefill, no tokens, and what has no Triton: an empty plan, which changes nothing."""
    for lengths, longest in (([(100, 100)], 100), ([], 0)):
        args, _ = case(lengths, device=device)
        plan = plan_of(args, dict(max_seqlen_q=longest))
        assert plan.shape == (0, 0)
        expected = octavo.paged_attention(**args, max_seqlen_q=longest)
        assert torch.equal(octavo.paged_attention(**args, max_seqlen_q=longest, plan=plan), expected)
    args, longest = case(DECODE)
    with without_interpreter():
        plan = plan_of(args, dict(max_seqlen_q=1))
        assert plan.shape == (0, 0)
        check(args, longest, function=lambda **given: octavo.paged_attention(**given, plan=plan))


class Watched:
    """Triton's interpreter, which may touch no memory but that of the tensors of `regions()`."""

    def __init__(self, real, regions):
        self.real, self.regions = real, regions

    def __getattr__(self, name):
        return getattr(self.real, name)

    def check(self, addresses, mask):
        used = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(addresses.shape, mask.shape))
        ]
        inside = np.zeros(used.shape, bool)
        for x in self.regions():
            span = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1 if x.numel() else 0
            inside |= (used >= x.data_ptr()) & (used < x.data_ptr() + span * x.element_size())
        assert inside.all(), "outside of all tensors"

    def load(self, addresses, mask, *others):
        self.check(addresses, mask)
        return self.real.load(addresses, mask, *others)

    def store(self, addresses, values, mask):
        self.check(addresses, mask)
        return self.real.store(addresses, values, mask)


@pytest.fixture
def watched(monkeypatch):
    """Inside `with watched(tensors)`, kernels touch these and what launchers allocate, and nothing else."""
    real = triton.runtime.interpreter._interpreter

    class Inside:
        def __init__(self, tensors):
            self.tensors = tensors

        def __enter__(self):
            self.recording = recording(Recorder())
            recorder = self.recording.__enter__()
            proxy = Watched(real, lambda: [*self.tensors, *recorder.outputs])
            monkeypatch.setattr(triton.runtime.interpreter, "_interpreter", proxy)

        def __exit__(self, *error):
            monkeypatch.setattr(triton.runtime.interpreter, "_interpreter", real)
            self.recording.__exit__(*error)

    return Inside


NUMBERS = st.sampled_from([INT_MIN, INT_MIN + 1, -1, 0, 1, 2, 3, 5, 9, 1000, 2**30, 2**30 + 1, INT_MAX - 1, INT_MAX])


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(data=st.data(), half=st.booleans(), window_size=st.sampled_from([None, 1, 20, INT_MAX]), causal=st.booleans())
def test_garbage_touches_nothing_else(watched, data, half, window_size, causal):
    lengths = [(1, 70), (3, 20), (0, 4), (1, 0)]
    args, longest = case(lengths, padding=1, dtype=torch.float16 if half else torch.float32)
    options = dict(max_seqlen_q=longest, window_size=window_size, causal=causal)
    plan = plan_of(args, options)
    for x in plan.view(-1):
        if data.draw(st.booleans()):
            x.fill_(data.draw(NUMBERS))
    with watched([*args.values(), plan]):
        octavo.paged_attention(**args, **options, plan=plan)
    plan = plan_of(args, options)  # anew, it is right again
    check(args, longest, **options_of(options), function=lambda **given: octavo.paged_attention(**given, plan=plan))


def options_of(options):
    return {name: value for name, value in options.items() if name != "max_seqlen_q"}


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(
    old=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 150)), min_size=1, max_size=5),
    new=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 150)), min_size=1, max_size=5),
    rolling=st.booleans(),
)
def test_a_plan_of_other_lengths_touches_nothing_else(watched, old, new, rolling):
    tokens = max(sum(q for q, _ in old), sum(q for q, _ in new)) + 1
    both = [case(x, padding=tokens - sum(q for q, _ in x))[0] for x in (old, new)]
    options = dict(max_seqlen_q=4)
    if rolling:
        options |= dict(window_size=3, rolling=True)
        for args in both:
            args["block_table"] = args["block_table"][:, :2].contiguous()
    plan = plan_of(both[0], options)
    with watched([*both[1].values(), plan]):
        octavo.paged_attention(**both[1], **options, plan=plan)


@interpreted
def test_the_watch_works(watched):
    args, longest = case(DECODE)
    with watched([args[name] for name in args if name != "seq_lens"]), pytest.raises(Exception, match="outside of all"):
        octavo.paged_attention(**args, max_seqlen_q=longest)
    check(args, longest)


@pytest.mark.parametrize("name", ["plan_attention", "paged_attention"])
def test_opcheck_and_compile(device, name, monkeypatch):
    # What is launched is also looked at as on an H100, where a plan must have the same shape.
    sms = replace(tiles_module._INTERPRETER, num_sms=KNOWN_DEVICES[90].num_sms)
    monkeypatch.setattr(tiles_module, "_INTERPRETER", sms)
    args, longest = case([(1, 90), (3, 4)], device=device)
    for cache in ("key_cache", "value_cache"):
        args[cache] = args[cache].nan_to_num(nan=1.0)
    args["block_table"] = args["block_table"].clamp(0, 1)
    options = dict(max_seqlen_q=longest, window_size=50)
    if name == "plan_attention":
        given = tuple(args[x] for x in PLANNED)
        check_op(name, octavo.plan_attention, (*given, longest, True, 50, False, False), *given, **options)
        return
    plan = plan_of(args, options)
    op = op_args(args, longest, window_size=50, plan=plan)
    check_op(name, octavo.paged_attention, op, *args.values(), **options, plan=plan)


def test_compiled_with_its_plan(device):
    """Two layers and their plan as one graph."""

    def step(args, other):
        plan = octavo.plan_attention(*(args[x] for x in PLANNED), max_seqlen_q=1)
        outs = [octavo.paged_attention(**x, max_seqlen_q=1, plan=plan) for x in (args, other)]
        return outs[0] + outs[1], plan

    args, _ = case([(1, 90), (1, 4)], device=device)
    other = args | dict(query=2 * args["query"])
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    for _ in range(2):
        for found, expected in zip(compiled(args, other), step(args, other), strict=True):
            assert torch.equal(found, expected)


ARGS = dict(
    query=torch.zeros(3, 4, 16),
    key_cache=torch.zeros(5, 4, 2, 16),
    block_table=torch.zeros(2, 3, dtype=torch.int32),
    seq_lens=torch.zeros(2, dtype=torch.int32),
    cu_seqlens_q=torch.zeros(3, dtype=torch.int32),
    max_seqlen_q=1,
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(query=torch.zeros(3, 4, 16).int()), TypeError, "query: dtype int32 is not accepted"),
        (dict(query=torch.zeros(3, 4, 20)), ValueError, "query: head_size 20; expected a multiple of 8"),
        (dict(key_cache=torch.zeros(5, 4, 3, 16)), ValueError, "query: 4 heads; expected a multiple of the 3 heads"),
        (
            dict(key_cache=torch.zeros(5, 4, 2, 16, device="meta")),
            ValueError,
            "key_cache: on meta, but query is on cpu",
        ),
        (dict(block_table=torch.zeros(2, 3)), TypeError, "block_table: dtype float32"),
        (dict(seq_lens=torch.zeros(3).int()), ValueError, r"seq_lens: shape \(3,\); expected \(2,\)"),
        (dict(cu_seqlens_q=torch.zeros(2).int()), ValueError, r"cu_seqlens_q: shape \(2,\)"),
        (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q: -1"),
        (dict(window_size=0), ValueError, "window_size: 0; expected at least 1"),
        (dict(rolling=True), ValueError, "rolling: True without window_size"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        octavo.plan_attention(**ARGS | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda plan: plan.float(), TypeError, "plan: dtype float32 is not accepted; expected int32"),
        (lambda plan: plan.view(-1), ValueError, "plan: shape .* has 1 dimensions; expected 2"),
        (lambda plan: plan.t(), ValueError, r"plan: strides .* not contiguous"),
        (lambda plan: plan.to("meta"), ValueError, "plan: on meta, but query is on cpu"),
        (
            lambda plan: plan[1:],
            ValueError,
            r"plan: shape \(\d+, \d+\); expected \(\d+, \d+\): make it with octavo.plan_attention from the query",
        ),
    ],
)
def test_errors_of_a_plan(change, error, message):
    args = ARGS | dict(value_cache=ARGS["key_cache"])
    plan = octavo.plan_attention(**ARGS)
    with pytest.raises(error, match=message):
        octavo.paged_attention(**args, plan=change(plan))


def test_a_plan_where_there_is_nothing_to_share_out():
    args, _ = case([(100, 100)])
    with pytest.raises(
        ValueError, match=r"plan: shape \(4, 8\); expected \(0, 0\): make it with octavo.plan_attention"
    ):
        octavo.paged_attention(**args, max_seqlen_q=100, plan=torch.zeros(4, 8, dtype=torch.int32))


@pytest.mark.gpu
def test_graph_capture_and_replay_with_other_lengths(dtype):
    """The plan is made inside, once for two layers."""
    lengths = [(1, 4000), (1, 9), (3, 640), (0, 0), (2, 30)]
    args, _ = case([(1, 0)] * 5, padding=2, device="cuda", dtype=dtype)
    filled, _ = case(lengths, device="cuda", dtype=dtype)
    args |= {name: filled[name] for name in ("key_cache", "value_cache")}
    args["block_table"] = torch.zeros_like(filled["block_table"])

    def step():
        plan = plan_of(args, dict(max_seqlen_q=3))
        return [octavo.paged_attention(**args, max_seqlen_q=3, plan=plan) for _ in range(2)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    graph.replay()
    assert all(out.eq(0).all() for out in outs)
    for name in ("query", "block_table", "seq_lens", "cu_seqlens_q"):
        args[name].copy_(filled[name])
    for _ in range(3):
        graph.replay()
        for out in outs:
            assert_accurate(out, dense(args, torch.float64)[0], dense(args, dtype)[0])
        assert torch.equal(*outs)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("lengths", [[(1, 30000)], [(1, 4000), (1, 513)], [(1, 50)] * 63 + [(1, 9000)]], ids=str)
def test_large(dtype, d, lengths):
    """Every run gives the same bits."""
    args, longest = case(lengths, heads=16, kv_heads=4, d=d, page_size=16, device="cuda", dtype=dtype)
    check(args, longest, function=with_plan)
    plan = plan_of(args, dict(max_seqlen_q=1))
    outs = [octavo.paged_attention(**args, max_seqlen_q=1, plan=plan) for _ in range(20)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def launches(dtype):
    """Every tile choice that ships and a plan changes, on meta tensors: tests/test_compile.py compiles them."""
    bf16 = dtype == torch.bfloat16
    for d in (64, 96, 128, 256) if bf16 else (128,):
        for tokens in (1, 8, 64):
            _launch(dtype, d, 4, tokens, 1)
        for group, longest in ((1, 1), (8, 1), (4, 16)):
            _launch(dtype, d, group, 64, longest, window_size=100, softcap=50.0, return_lse=True)
    for cache_dtype in (torch.int8, torch.float8_e5m2) if bf16 else ():
        for d in (64, 128, 256):
            _launch(dtype, d, 4, 64, 1, cache_dtype)
    if bf16:
        _launch(dtype, 80, 4, 1, 1, window_size=100, softcap=50.0, return_lse=True)
        _launch(dtype, 128, 4, 1, 1, window_size=100, rolling=True)
        _launch(dtype, 128, 4, 4, 1, alibi=True)
        for d in (64, 128, 256):
            _launch(torch.float32, d, 4, 64, 1, window_size=100, return_lse=True)


def _launch(dtype, d, group, tokens, longest, cache_dtype=None, rolling=False, alibi=False, **options):
    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, device="meta", dtype=dtype)

    query, cache = empty(tokens, 8 * group, d, dtype=dtype), empty(100, 16, 8, d, dtype=cache_dtype or dtype)
    args = dict(zip(TENSORS, (query, cache, cache, empty(4, 50), empty(4), empty(5)), strict=True))
    if cache_dtype == torch.int8:
        args |= {name: empty(100, 16, 8, dtype=torch.float32) for name in ("key_scale_cache", "value_scale_cache")}
    if alibi:
        args["alibi_slopes"] = empty(8 * group, dtype=torch.float32)
    shared = longest, True, options.get("window_size"), rolling, alibi
    plan = plan_attention._plan_attention_cuda(*(args[name] for name in PLANNED), *shared)
    paged._paged_attention_cuda(*op_args(args, longest, rolling=rolling, plan=plan, **options))
