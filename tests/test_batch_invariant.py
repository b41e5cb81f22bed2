"""`paged_attention(batch_invariant=True)`: a token's bits depend on its query and on what it sees, and on nothing else.

Each case writes a few sequences into a cache and asks for their last tokens in many ways: all at once, in chunks, one
at a time, alone and beside others, in any order. Every token must come out as it did the first time.
"""

from itertools import accumulate

import pytest
import torch
from attention_args import op_args
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_features import QUANTISED, caches, definition, scales_of

import octavo
from octavo import reference
from octavo.kernels.attention import paged
from octavo.kernels.attention.attention_tiles import choose_tiles
from octavo.kernels.launch import record_launches
from octavo.kernels.tiles import KNOWN_DEVICES, device_properties
from octavo.testing import INTERPRET, assert_accurate, check_op, without_interpreter

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NaNs are meant
INT_MAX = 2**31 - 1


class Sequences:
    """Sequences of some lengths in one cache, `size` of the numbers in it, and the queries of all their positions."""

    def __init__(
        self,
        lengths,
        *,
        heads=4,
        kv_heads=2,
        d=16,
        page_size=4,
        device="cpu",
        dtype=torch.float32,
        cache_dtype=None,
        layout="tokens first",
        size=1.0,
        **scales,
    ):
        self.lengths, self.device = lengths, device
        counts = [-(-length // page_size) for length in lengths]
        order = torch.randperm(sum(counts) + 2).tolist()
        shape = dict(dtype=cache_dtype or dtype, device=device, layout=layout)
        stored = caches(len(order), page_size, kv_heads, d, **shape)
        self.table = torch.full((len(lengths), max(counts) + 1), INT_MAX, dtype=torch.int32)
        slots = []
        for b, length in enumerate(lengths):
            for page in range(counts[b]):
                self.table[b, page] = order.pop()
            j = torch.arange(length)
            slots.append(self.table[b].long()[j // page_size] * page_size + j % page_size)
        slots = torch.cat(slots).to(device)
        key, value = (size * torch.randn(len(slots), kv_heads, d, device=device, dtype=dtype) for _ in range(2))
        value *= torch.rand(len(slots), 1, 1, device=device).add(0.01).to(dtype)  # int8: another scale each token
        octavo.write_kv(key, value, slot_mapping=slots, **stored, **scales)
        self.stored = stored | scales
        self.queries = [torch.randn(length, heads, d, device=device, dtype=dtype) for length in lengths]

    def args(self, batch, padding=0):
        """A call's arguments for `(sequence, first position, end)` each: no key at or after the end is there yet."""
        parts = [self.queries[b][first:end] for b, first, end in batch]
        parts.append(torch.full((padding, *self.queries[0].shape[1:]), torch.nan).to(self.queries[0]))
        starts = list(accumulate((end - first for _, first, end in batch), initial=0))
        ints = dict(dtype=torch.int32, device=self.device)
        tables = dict(
            block_table=self.table[[b for b, _, _ in batch]].to(self.device),
            seq_lens=torch.tensor([end for _, _, end in batch], **ints),
            cu_seqlens_q=torch.tensor(starts, **ints),
        )
        return dict(query=torch.cat(parts)) | tables | self.stored

    def run(self, batch, function=octavo.paged_attention, padding=0, max_seqlen_q=None, **options):
        """Result and log-sum-exp of the tokens of each part of the batch."""
        sizes = [end - first for _, first, end in batch]
        longest = max(sizes) if max_seqlen_q is None else max_seqlen_q
        args = self.args(batch, padding)
        out, lse = function(**args, max_seqlen_q=longest, batch_invariant=True, return_lse=True, **options)
        assert out[sum(sizes) :].eq(0).all()
        return list(zip(*(x.split([*sizes, padding])[: len(sizes)] for x in (out, lse)), strict=True))

    def check(self, steps, function=octavo.paged_attention, **options):
        """Every token of `steps`, a list of batches, has one result, whichever batch it is in."""
        seen = {}
        for batch, how in steps:
            for (b, first, end), results in zip(batch, self.run(batch, function, **how, **options), strict=True):
                for i in range(first, end):
                    mine = [x[i - first] for x in results]
                    assert all(x.isfinite().all() for x in mine)
                    for x, expected in zip(mine, seen.setdefault((b, i), mine), strict=True):
                        assert torch.equal(x, expected), (b, i, batch)
        return seen


def chunks(b, first, length, size):
    """A sequence's tokens from `first` on, `size` at a time."""
    return [(b, i, min(i + size, length)) for i in range(first, length, size)]


def all_ways(lengths, tail):
    """The last `tail` tokens of each sequence: whole, in chunks of 1 and 3, together and alone, in other orders."""
    tails = [max(length - tail, 0) for length in lengths]
    whole = [(b, first, length) for b, (first, length) in enumerate(zip(tails, lengths, strict=True))]
    steps = [(whole, {}), (whole[::-1], dict(padding=5)), (whole, dict(max_seqlen_q=1))]
    steps.append((whole[:1], {}))
    for rounds in zip(*(chunks(b, first, length, 1) for b, first, length in whole), strict=False):
        steps.append((list(rounds), {}))
    steps += [([part], {}) for part in chunks(*whole[0], 3)]
    # A prefill of one, among decode steps of the others.
    steps.append(([whole[0], *((b, length - 1, length) for b, _, length in whole[1:])], {}))
    return steps


LENGTHS, TAIL = [90, 37, 12], 4
OPTIONS = [
    dict(),
    dict(window_size=1),
    dict(window_size=21),
    dict(window_size=100, softcap=3.0),
    dict(scale=-0.7, softcap=2.0),
    dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    dict(alibi_slopes=torch.tensor([0.5, 0.03125, 0.0, -0.1]), window_size=40),
]


def on(device, options):
    return {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o))
def test_options(device, dtype, options):
    Sequences(LENGTHS, device=device, dtype=dtype).check(all_ways(LENGTHS, TAIL), **on(device, options))


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("options", [{}, dict(window_size=21, softcap=3.0)], ids=str)
def test_quantised_caches(device, dtype, cache_dtype, options):
    scales = scales_of(cache_dtype, "heads", device=device)
    sequences = Sequences(LENGTHS, device=device, dtype=dtype, cache_dtype=cache_dtype, **scales)
    sequences.check(all_ways(LENGTHS, TAIL), **options)


@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_small_and_large_values_in_int8(device, size):
    """In fp16 the sum of values is kept in units of their scales, and those are each token's own."""
    sequences = Sequences(LENGTHS, device=device, dtype=torch.float16, cache_dtype=torch.int8, size=size)
    sequences.check(all_ways(LENGTHS, TAIL))


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
@pytest.mark.parametrize(("d", "page_size"), [(64, 8), (64, 256), (128, 16), (128, 128)])
def test_head_sizes_pages_and_layouts(device, d, page_size, layout):
    sequences = Sequences(LENGTHS[:2], d=d, page_size=page_size, layout=layout, device=device, dtype=torch.float16)
    sequences.check(all_ways(LENGTHS[:2], 5), window_size=70)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (5, 1), (16, 2), (71, 1)])
def test_groups(device, heads, kv_heads):
    """Also more query heads than a tile has rows."""
    shape = dict(heads=heads, kv_heads=kv_heads, device=device, dtype=torch.float16)
    Sequences([30, 9], **shape).check(all_ways([30, 9], 3))


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=2),
    cuts=st.lists(st.lists(st.sampled_from([1, 1, 2, 3, 7, 15, 16, 17, 33, 64]), max_size=4), min_size=3, max_size=3),
    others=st.lists(st.integers(0, 2), max_size=3),
    group=st.integers(1, 3),
    page_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    cache_dtype=st.sampled_from([None, None, *QUANTISED]),
    window_size=st.one_of(st.none(), st.integers(1, 90)),
    softcap=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=15)
def test_any_chunks(lengths, cuts, others, group, page_size, dtype, cache_dtype, window_size, softcap):
    """Every sequence from its first token on, cut anywhere, beside chunks of the others that come along."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = dict(heads=2 * group, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype, device=device)
    sequences = Sequences(lengths, **shape)
    whole = [(b, 0, length) for b, length in enumerate(lengths)]
    steps, done = [(whole, {})], [0] * len(lengths)
    for sizes in zip(*cuts, strict=False):
        batch = []
        for b, size in list(enumerate(sizes))[: len(lengths)]:
            if done[b] < lengths[b]:
                batch.append((b, done[b], min(done[b] + size, lengths[b])))
                done[b] = batch[-1][2]
        if batch:
            steps.append((batch, dict(padding=len(others))))
    steps += [([(b, done[b], length)], {}) for b, length in enumerate(lengths) if done[b] < length]
    steps.append(([(b, lengths[b] - 1, lengths[b]) for b in others if b < len(lengths)] or whole, {}))
    sequences.check(steps, window_size=window_size, softcap=softcap)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize(("window_size", "page_size", "width"), [(21, 4, 8), (9, 16, 2)])
def test_rings(device, dtype, cache_dtype, window_size, page_size, width):
    """A ring gives the bits of the full cache, whichever chunks fill it, although a chunk has overwritten old keys."""
    length, kv_heads, d = 45, 2, 16
    longest = width * page_size - window_size + 1
    full = Sequences([length], page_size=page_size, device=device, dtype=dtype, cache_dtype=cache_dtype)
    expected = full.check([([(0, 0, length)], {})], window_size=window_size)
    at = torch.arange(length)
    old = full.table[0].long()[at // page_size], at % page_size
    for size in (1, longest):
        ring = caches(width, page_size, kv_heads, d, dtype=cache_dtype or dtype, device=device)
        order = torch.randperm(width)
        for _, first, end in chunks(0, 0, length, size):
            new = order[at[first:end] // page_size % width].to(device), at[first:end].to(device) % page_size
            for name, cache in ring.items():
                cache[new] = full.stored[name][old[0][first:end].to(device), old[1][first:end].to(device)]
            if size == 1 and first % 3 and INTERPRET:  # it is filled all the same, and a third of the steps looked at
                continue
            args = full.args([(0, first, end)]) | ring
            args["block_table"] = order[None].to(device, torch.int32)
            options = dict(window_size=window_size, rolling=True, batch_invariant=True, return_lse=True)
            results = octavo.paged_attention(**args, max_seqlen_q=end - first, **options)
            for i in range(first, end):
                for x, wanted in zip(results, expected[0, i], strict=True):
                    assert torch.equal(x[i - first], wanted), (size, i)


@pytest.mark.parametrize("options", [{}, dict(window_size=30), dict(softcap=3.0)], ids=str)
def test_not_causal(device, dtype, options):
    """A query sees its whole sequence: its result does not depend on how many others ask, nor on the batch."""
    sequences = Sequences(LENGTHS, device=device, dtype=dtype)
    steps = [(batch, how) for batch, how in all_ways(LENGTHS, TAIL) if all(end == LENGTHS[b] for b, _, end in batch)]
    assert len(steps) > 4
    sequences.check(steps, causal=False, **options)


def test_only_what_is_in_sight_is_read(device, dtype):
    """Table entries wholly before the first query's window may be anything, and so may slots outside of it."""
    sequences = Sequences([90], device=device, dtype=dtype)
    args = sequences.args([(0, 88, 90)])
    options = dict(max_seqlen_q=2, window_size=30, batch_invariant=True, return_lse=True)
    expected = octavo.paged_attention(**args, **options)
    page, offset = divmod(90 - 2 - 29, 4)
    for name in ("key_cache", "value_cache"):
        args[name][args["block_table"][0, page], :offset] = torch.nan
    args["block_table"][0, :page] = INT_MAX
    out = octavo.paged_attention(**args, **options)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_scale_of_a_token_reaches_those_who_see_it_alone(device, dtype, bad):
    sequences = Sequences([80], device=device, dtype=dtype, cache_dtype=torch.int8)
    expected = sequences.check([([(0, 60, 80)], {})])
    for name in ("key_scale_cache", "value_scale_cache"):
        damaged = sequences.stored[name].clone()
        at = sequences.table[0, 70 // 4], 70 % 4, 1
        damaged[at] = bad
        args = sequences.args([(0, 60, 80)]) | {name: damaged}
        cache = name.replace("_scale", "")
        args[cache] = args[cache].clone()
        args[cache][at] = 0  # as `write_kv` leaves a head that holds NaN or an infinity
        out = octavo.paged_attention(**args, max_seqlen_q=20, batch_invariant=True)
        assert torch.equal(out[:10], torch.stack([expected[0, i][0] for i in range(60, 70)]))
        assert torch.equal(out[10:, :2], torch.stack([expected[0, i][0] for i in range(70, 80)])[:, :2])
        assert out[10:, 2:].isnan().all()


@pytest.mark.parametrize("options", [*OPTIONS, dict(causal=False, window_size=21)], ids=str)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
def test_right_as_well(device, dtype, cache_dtype, options):
    sequences = Sequences(LENGTHS, device=device, dtype=dtype, cache_dtype=cache_dtype)
    batch = [(0, 80, 90), (1, 36, 37), (2, 0, 12)]
    args, options = sequences.args(batch, padding=2), on(device, options)
    args["query"] = args["query"].nan_to_num()
    out, lse = octavo.paged_attention(**args, max_seqlen_q=70, batch_invariant=True, return_lse=True, **options)
    exact, plain = definition(args, torch.float64, **options), definition(args, dtype, **options)
    assert_accurate(out, exact[0], plain[0])
    assert_accurate(lse, exact[1], definition(args, torch.float32, **options)[1])


@pytest.mark.parametrize("options", [*OPTIONS, dict(causal=False, window_size=21)], ids=str)
def test_the_reference(options):
    """Devices without Triton keep the promise too, one query at a time."""

    def function(**args):
        names = "max_seqlen_q", "scale", "causal", "window_size", "softcap", "batch_invariant", "return_lse"
        given = {name: args.pop(name) for name in names if name in args}
        return reference.attention.paged_attention(*op_args(args, **given))

    sequences = Sequences(LENGTHS)
    steps = all_ways(LENGTHS, TAIL)
    if not options.get("causal", True):
        steps = [(batch, how) for batch, how in steps if all(end == LENGTHS[b] for b, _, end in batch)]
    with without_interpreter():
        sequences.check(steps, function, **options)
        args = sequences.args([(0, 80, 90), (1, 36, 37), (2, 0, 12)])
        out, lse = octavo.paged_attention(**args, max_seqlen_q=70, batch_invariant=True, return_lse=True, **options)
    exact, plain = (definition(args, kind, **options) for kind in (torch.float64, torch.float32))
    assert_accurate(out, exact[0], plain[0])
    assert_accurate(lse, exact[1], plain[1])


def kernels(device, batch_invariant, batches, **case):
    """What is compiled for some batches `(tokens, sequences, max_seqlen_q)`: kernels with their constants."""
    with record_launches(device) as recorded:
        for tokens, sequences, longest in batches:
            launch(
                torch.bfloat16, tokens=tokens, sequences=sequences, longest=longest, invariant=batch_invariant, **case
            )
    return {(r.kernel.__name__, *sorted(r.constexprs.items()), r.num_warps, r.num_stages) for r in recorded}


@pytest.mark.parametrize("properties", KNOWN_DEVICES.values(), ids=lambda p: p.name)
def test_no_batch_chooses_the_kernel(properties):
    """One kernel and one tile choice for all batches, where there are several without the option."""
    batches = [(1, 1, 1), (64, 64, 1), (64, 4, 16), (8192, 1, 8192), (8192, 64, 512), (4096, 4096, 1)]
    for cache_dtype in (torch.bfloat16, torch.float8_e5m2, torch.int8):
        for d, group in ((64, 1), (128, 4), (256, 8)):
            case = dict(cache_dtype=cache_dtype, d=d, group=group)
            ((name, *_),) = kernels(properties, True, batches, **case)
            assert name == "_paged_attention_kernel"
            assert len(kernels(properties, False, batches, **case)) > 1
    for dtype in (torch.float16, torch.float32):
        for plain in (True, False):
            tiles = {
                choose_tiles(128, 8, 4, tokens, longest, dtype, properties, plain=plain, batch_invariant=True)
                for tokens, _, longest in batches
            }
            assert len(tiles) == 1 and tiles.pop().workers == 0


def test_without_it_the_bits_depend_on_the_batch(device):
    """What the option is for."""
    sequences = Sequences([150], device=device, dtype=torch.float16)
    at_once, chunk = ([(0, first, 150)] for first in (0, 149))
    results = [
        octavo.paged_attention(**sequences.args(batch), max_seqlen_q=longest)[-1]
        for batch, longest in ((at_once, 150), (chunk, 1))
    ]
    assert not torch.equal(*results)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
def test_opcheck_and_compile(device, cache_dtype):
    sequences = Sequences([9, 4], device=device, cache_dtype=cache_dtype)
    args = sequences.args([(0, 6, 9), (1, 3, 4)])
    for name, x in args.items():
        args[name] = x.nan_to_num(nan=1.0) if x.is_floating_point() else x
    options = dict(window_size=3, batch_invariant=True)
    given = op_args(args, 3, **options)
    check_op("paged_attention", octavo.paged_attention, given, max_seqlen_q=3, **args, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_large(dtype, cache_dtype, d):
    lengths = [2000, 513, 1300]
    shape = dict(heads=16, kv_heads=4, d=d, page_size=16, device="cuda", dtype=dtype, cache_dtype=cache_dtype)
    sequences = Sequences(lengths, **shape)
    for options in (dict(), dict(window_size=200, softcap=20.0, alibi_slopes=torch.rand(16, device="cuda") / 10)):
        sequences.check(all_ways(lengths, 150), **options)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_other_lengths(dtype):
    sequences = Sequences(LENGTHS, device="cuda", dtype=dtype)
    args = sequences.args([(0, 80, 90), (1, 36, 37), (2, 2, 12)], padding=3)
    octavo.paged_attention(**args, max_seqlen_q=10, batch_invariant=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.paged_attention(**args, max_seqlen_q=10, batch_invariant=True)
    other = sequences.args([(2, 11, 12), (0, 81, 90), (1, 30, 37)], padding=7)
    for name in ("query", "block_table", "seq_lens", "cu_seqlens_q"):
        args[name].copy_(other[name])
    graph.replay()
    assert torch.equal(out, octavo.paged_attention(**other, max_seqlen_q=10, batch_invariant=True))


def launches(dtype):
    """The tile choices that ship, on meta tensors: tests/test_compile.py compiles them."""
    old = device_properties(torch.device("meta")).capability < (8, 9)
    quantised = torch.float8_e5m2, torch.int8, *([] if old else [torch.float8_e4m3fn])
    everything = dict(window_size=100, softcap=50.0, return_lse=True)
    for d in (64, 128, 256):
        if dtype == torch.bfloat16:  # fp16 has other tiles where a cache is quantised, and there alone
            for group in (1, 8):
                launch(dtype, dtype, d, group)
            launch(dtype, dtype, d, 4, **everything)
        for cache_dtype in quantised:
            launch(dtype, cache_dtype, d, 4, **everything)
    if dtype == torch.bfloat16:
        launch(dtype, dtype, 80, 4, window_size=100, rolling=True)
        launch(dtype, dtype, 128, 4, causal=False)
        launch(dtype, dtype, 128, 4, alibi=True, **everything)
        for d in (64, 128, 256):
            launch(torch.float32, torch.float32, d, 4, **everything)


def launch(dtype, cache_dtype, d, group, *, tokens=64, sequences=4, longest=16, invariant=True, alibi=False, **options):
    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, device="meta", dtype=dtype)

    cache, heads = empty(100, 16, 8, d, dtype=cache_dtype), 8 * group
    args = dict(query=empty(tokens, heads, d, dtype=dtype), key_cache=cache, value_cache=cache)
    args |= dict(block_table=empty(sequences, 80), seq_lens=empty(sequences), cu_seqlens_q=empty(sequences + 1))
    if cache_dtype == torch.int8:
        args |= {name: empty(100, 16, 8, dtype=torch.float32) for name in ("key_scale_cache", "value_scale_cache")}
    elif cache_dtype != dtype:
        args |= {name: empty(8, dtype=torch.float32) for name in ("k_scale", "v_scale")}
    if alibi:
        args["alibi_slopes"] = empty(heads, dtype=torch.float32)
    paged._paged_attention_cuda(*op_args(args, longest, batch_invariant=invariant, **options))
