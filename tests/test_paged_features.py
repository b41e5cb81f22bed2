"""`paged_attention` of every kind of cache, and all that its softmax may hold: formats, layouts, rings, sinks, ALiBi.

Caches are written with `write_kv`; the oracle attends to what they hold, read back exactly.
"""

from itertools import accumulate

import pytest
import torch
from attention_args import op_args
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.attention import kv_cache, paged
from octavo.kernels.launch import record_launches
from octavo.kernels.tiles import KNOWN_DEVICES, device_properties
from octavo.testing import assert_accurate, check_op

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NaNs are meant
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
QUANTISED = [*FLOAT8, torch.int8]
INT_MAX = 2**31 - 1
CACHES = ("key_cache", "value_cache", "key_scale_cache", "value_scale_cache")


def caches(pages, page_size, kv_heads, d, *, dtype, device, layout="tokens first"):
    """K and V caches, int8 with their scales, full of what must not be read."""
    empty = torch.nan if dtype.is_floating_point else -128
    names, last = CACHES[:2], (d,)
    made = {}
    for fill, kind in ((empty, dtype), (torch.nan, torch.float32)):
        options = dict(dtype=kind, device=device, fill_value=fill)
        if layout == "heads first":
            pair = torch.full((2, pages, kv_heads, page_size, *last), **options).transpose(2, 3).unbind(0)
        elif layout == "halves of pages":
            pair = torch.full((pages, 2, page_size, kv_heads, *last), **options).unbind(1)
        elif layout == "halves of pages, heads first":
            pair = torch.full((pages, 2, kv_heads, page_size, *last), **options).transpose(2, 3).unbind(1)
        elif layout == "halves of heads":
            pair = torch.full((pages, page_size, kv_heads, 2, *last), **options).unbind(3)
        else:
            pair = torch.full((2, pages, page_size, kv_heads, *last), **options).unbind(0)
        made |= dict(zip(names, pair, strict=True))
        if dtype != torch.int8:
            break
        names, last = CACHES[2:], ()
    return made


def case(
    lengths,
    *,
    heads=4,
    kv_heads=2,
    d=16,
    page_size=4,
    padding=0,
    device="cpu",
    dtype=torch.float32,
    cache_dtype=None,
    layout="tokens first",
    size=1.0,
    **scales,
):
    """Arguments for sequences of `(queries, keys)`; keys and values as large as `size`."""
    counts = [-(-keys // page_size) for _, keys in lengths]
    order = torch.randperm(sum(counts) + 2).tolist()
    stored = caches(len(order), page_size, kv_heads, d, dtype=cache_dtype or dtype, device=device, layout=layout)
    table = torch.full((len(lengths), max(counts, default=0) + 1), INT_MAX, dtype=torch.int32)
    slots = []
    for b, (_, keys) in enumerate(lengths):
        for j in range(keys):
            if j % page_size == 0:
                table[b, j // page_size] = order.pop()
            slots.append(int(table[b, j // page_size]) * page_size + j % page_size)
    key, value = (size * torch.randn(len(slots), kv_heads, d, device=device, dtype=dtype) for _ in range(2))
    octavo.write_kv(key, value, slot_mapping=torch.tensor(slots, device=device).long(), **stored, **scales)
    starts = list(accumulate((queries for queries, _ in lengths), initial=0))
    args = dict(
        query=torch.randn(starts[-1] + padding, heads, d, device=device, dtype=dtype),
        block_table=table.to(device),
        seq_lens=torch.tensor([keys for _, keys in lengths], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
    )
    return args | stored | scales, max((queries for queries, _ in lengths), default=0)


def held(args, b, name):
    """The keys or values of sequence b as its cache holds them, exactly: `[keys, kv_heads, d]` in fp64."""
    cache, length = args[f"{name}_cache"], int(args["seq_lens"][b])
    at = torch.arange(length, device=cache.device)
    at = args["block_table"][b].long()[at // cache.shape[1]], at % cache.shape[1]
    x, scale = cache[at].double(), args.get(f"{name[0]}_scale")
    if scale is not None:
        x = x * scale.double().view(-1, 1)
    if f"{name}_scale_cache" in args:
        x = x * args[f"{name}_scale_cache"][at].double()[..., None]
    return x


def definition(args, dtype, *, scale=None, causal=True, window_size=None, softcap=0.0, sinks=None, alibi_slopes=None):
    """The formula, one sequence after another, every step in `dtype`."""
    q = args["query"].to(dtype)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    if sinks is not None:
        lse[:] = sinks
    starts = args["cu_seqlens_q"].tolist()
    for b, length in enumerate(args["seq_lens"].tolist()):
        rows = slice(starts[b], starts[b + 1])
        if not length or starts[b] == starts[b + 1]:
            continue
        group = q.shape[1] // args["key_cache"].shape[2]
        k, v = (held(args, b, name).to(dtype).repeat_interleave(group, 1) for name in ("key", "value"))
        i = torch.arange(length - (starts[b + 1] - starts[b]), length, device=q.device)[:, None]
        j = torch.arange(length, device=q.device)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k) * (q.shape[2] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(dtype)[:, None, None] * (i - j).abs()
        hidden = (j > i) & causal if window_size is None else ((j > i) & causal) | (i - j >= window_size)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
        out[rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num()[..., :length], v)
        lse[rows] = scores.logsumexp(-1).t()
    return out, lse


def check(args, max_seqlen_q, function=octavo.paged_attention, **options):
    out, lse = function(**args, max_seqlen_q=max_seqlen_q, return_lse=True, **options)
    exact, plain = definition(args, torch.float64, **options), definition(args, args["query"].dtype, **options)
    assert out.is_contiguous() and out.dtype == args["query"].dtype and lse.dtype == torch.float32
    assert_accurate(out, exact[0], plain[0])
    assert_accurate(lse, exact[1], definition(args, torch.float32, **options)[1])
    return out


def of_reference(**args):
    options = {name: args.pop(name) for name in OPTIONS if name in args}
    return reference.attention.paged_attention(*op_args(args, **options))


OPTIONS = ("max_seqlen_q", "scale", "causal", "window_size", "rolling", "softcap", "return_lse")
MIX = [(1, 70), (9, 9), (0, 20), (5, 43), (1, 0), (2, 2)]


def scales_of(cache_dtype, kind, kv_heads=2, device="cpu"):
    """Scales of a float8 cache: none, one number, or one a KV head."""
    if cache_dtype not in FLOAT8 or kind == "none":
        return {}
    shape = () if kind == "number" else (1 if kind == "one" else kv_heads,)
    return {name: torch.rand(shape, device=device) + 0.02 for name in ("k_scale", "v_scale")}


@pytest.mark.parametrize(
    ("cache_dtype", "kind"),
    [(dtype, kind) for dtype in FLOAT8 for kind in ("none", "number", "one", "heads")] + [(torch.int8, "none")],
    ids=str,
)
def test_quantised_caches(device, dtype, cache_dtype, kind):
    scales = scales_of(cache_dtype, kind, device=device)
    args = case(MIX, padding=3, device=device, dtype=dtype, cache_dtype=cache_dtype, **scales)
    check(*args)
    check(*args, window_size=20, softcap=3.0)
    check(*args, function=of_reference, window_size=20, softcap=3.0)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    page_size=st.integers(1, 9),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    cache_dtype=st.sampled_from(QUANTISED),
    kind=st.sampled_from(["none", "number", "one", "heads"]),
    causal=st.booleans(),
    window_size=st.one_of(st.none(), st.integers(1, 30)),
)
def test_any_mix_in_any_format(lengths, kv_heads, group, page_size, dtype, cache_dtype, kind, causal, window_size):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = dict(heads=group * kv_heads, kv_heads=kv_heads, page_size=page_size, dtype=dtype, device=device)
    scales = scales_of(cache_dtype, kind, kv_heads, device)
    args = case([(q, q + k) for q, k in lengths], cache_dtype=cache_dtype, **shape, **scales)
    check(*args, causal=causal, window_size=window_size)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_head_sizes_of_quantised_caches(device, cache_dtype, d):
    check(*case([(1, 40), (9, 20)], d=d, device=device, dtype=torch.float16, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_every_number_is_read_exactly(device, dtype, cache_dtype):
    """One key: the output is its value, and the log-sum-exp of a query of one 1 is that element of the key."""
    codes = torch.arange(256, device=device).to(torch.uint8).view(cache_dtype)
    args, _ = case([(256, 1)], heads=1, kv_heads=1, d=256, device=device, dtype=dtype, cache_dtype=cache_dtype)
    args["query"] = torch.eye(256, device=device, dtype=dtype)[:, None]
    page = args["block_table"][0, 0]
    finite = codes.float().isfinite()
    args["value_cache"][page, 0, 0] = codes
    args["key_cache"][page, 0, 0] = codes.where(finite, torch.zeros_like(codes))
    for name in ("key_scale_cache", "value_scale_cache"):
        if name in args:
            args[name][page, 0] = 1.0
    out, lse = octavo.paged_attention(**args, max_seqlen_q=256, causal=False, scale=1.0, return_lse=True)
    expected = codes.to(dtype).expand(256, 256)
    assert torch.equal(out[:, 0].nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))
    exact = codes.double().where(finite, 0.0)
    assert_accurate(lse[:, 0], exact, exact.float())
    args["key_cache"][page, 0, 0] = codes
    if not finite.all():
        assert octavo.paged_attention(**args, max_seqlen_q=256, causal=False).isnan().all()


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 300.0])
def test_small_and_large_values_in_int8(device, dtype, size):
    """Scales that are small numbers of fp16, alone and beside large ones."""
    args, longest = case([(1, 90), (3, 40)], device=device, dtype=dtype, cache_dtype=torch.int8, size=size)
    args["key_scale_cache"] /= size
    check(args, longest)
    mixed = args["value_scale_cache"].clone()
    mixed[::2] /= 1000
    check(args | dict(value_scale_cache=mixed), longest)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_bad_scale_of_a_token_reaches_those_who_see_it(device, dtype, name, bad):
    """As `write_kv` leaves a head that holds NaN or an infinity: such a scale, and zeros."""
    args, _ = case([(3, 80), (1, 70)], device=device, dtype=dtype, cache_dtype=torch.int8)
    expected = octavo.paged_attention(**args, max_seqlen_q=3)
    page, offset = args["block_table"][0, 40 // 4], 40 % 4
    args[f"{name}_scale_cache"][page, offset, 1] = bad
    args[f"{name}_cache"][page, offset, 1] = 0
    out = octavo.paged_attention(**args, max_seqlen_q=3)
    assert out[:3, 2:].isnan().all()
    assert torch.equal(out[:3, :2], expected[:3, :2]) and torch.equal(out[3], expected[3])
    assert octavo.paged_attention(**args, max_seqlen_q=3, window_size=20).isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_bad_scale_of_a_head_reaches_its_rows_alone(device, name, bad):
    scales = dict(k_scale=torch.full((2,), 0.5, device=device), v_scale=torch.full((2,), 0.5, device=device))
    args, _ = case([(3, 20), (1, 0)], padding=1, device=device, cache_dtype=torch.float8_e5m2, **scales)
    expected = octavo.paged_attention(**args, max_seqlen_q=3)
    args[name] = torch.tensor([0.5, bad], device=device)
    out = octavo.paged_attention(**args, max_seqlen_q=3)
    assert out[:3, 2:].isnan().all() and torch.equal(out[:, :2], expected[:, :2])
    assert out[3:].eq(0).all(), "nothing to attend to is 0 whatever the scale"


LAYOUTS = ["tokens first", "heads first", "halves of pages", "halves of pages, heads first", "halves of heads"]
PAGES = [1, 3, 16, 64, 128]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache_dtype", [None, *QUANTISED], ids=str)
def test_layouts(device, layout, cache_dtype):
    """Any order of pages, tokens and heads in memory, K and V apart or in one buffer, as `write_kv` fills them."""
    at = LAYOUTS.index(layout) + [None, *QUANTISED].index(cache_dtype)
    shape = dict(d=[64, 80, 96, 128, 256][at % 5], page_size=PAGES[(2 * at + 1) % 5], layout=layout)
    args, longest = case([(1, 70), (5, 43)], **shape, device=device, dtype=torch.float16, cache_dtype=cache_dtype)
    check(args, longest)
    check(args, longest, function=of_reference)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float8_e5m2, torch.int8], ids=str)
def test_layouts_of_the_fused_write(device, layout, cache_dtype):
    """`rotary_embedding_write_kv` and `write_kv` fill a cache of any layout with the same bits, and nothing else."""
    shape = dict(pages=4, page_size=3, kv_heads=2, d=16, dtype=cache_dtype, device=device)
    plain, other = caches(**shape), caches(**shape, layout=layout)
    query, key, value = torch.randn(3, 5, 2, 16, device=device, dtype=torch.float16)
    slots = torch.tensor([7, 0, -1, 11, 4], device=device)
    table = torch.tensor([[1.0] * 8 + [0.0] * 8], device=device)  # turns nothing
    octavo.write_kv(key, value, slot_mapping=slots, **plain)
    positions = torch.zeros_like(slots)
    octavo.rotary_embedding_write_kv(query, key, value, positions, table, slot_mapping=slots, **other)
    for name in plain:
        bits = [x.contiguous().view(torch.uint8) for x in (plain[name], other[name])]
        assert torch.equal(*bits), name


def steps_of(chunks, table, page_size, rolling):
    """Slots of each step of one or several sequences: sequence b takes `chunks[step][b]` more tokens."""
    lengths, steps = [0] * len(table), []
    for step in chunks:
        slots = []
        for b, count in enumerate(step):
            for j in range(lengths[b], lengths[b] + count):
                page = j // page_size % len(table[b]) if rolling else j // page_size
                slots.append(table[b][page] * page_size + j % page_size)
            lengths[b] += count
        steps.append((slots, list(lengths)))
    return steps


@given(
    window_size=st.integers(1, 12),
    page_size=st.integers(1, 7),
    spare=st.integers(0, 2),
    chunks=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=4),
    cache_dtype=st.sampled_from([None, torch.float8_e5m2, torch.int8]),
    causal=st.booleans(),
)
@settings(max_examples=6)
def test_a_rolling_buffer_is_the_full_cache(window_size, page_size, spare, chunks, cache_dtype, causal):
    """Two sequences, step by step in chunks and single tokens, through several turns of the ring: the same bits."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chunks = [*chunks, (1, 1), (1, 0), (2, 1), *chunks[::-1]]
    longest = max(map(max, chunks))
    ring = -(-(window_size + longest - 1) // page_size) + spare
    full = -(-max(map(sum, zip(*chunks, strict=True))) // page_size)
    sides = []
    for width, rolling in ((ring, True), (full, False)):
        order = torch.randperm(2 * width + 1)[: 2 * width].view(2, width).tolist()
        shape = dict(dtype=cache_dtype or torch.float32, device=device)
        stored = caches(2 * width + 1, page_size, 2, 8, **shape)
        table = torch.tensor(order, dtype=torch.int32, device=device)
        sides.append((stored, table, rolling, steps_of(chunks, order, page_size, rolling)))
    for step, counts in enumerate(chunks):
        query, key, value = torch.randn(3, sum(counts), 4, 8, device=device)
        results = []
        for stored, table, rolling, steps in sides:
            slots, lengths = steps[step]
            octavo.write_kv(key[:, :2], value[:, :2], slot_mapping=torch.tensor(slots, device=device).long(), **stored)
            given = dict(
                query=query,
                block_table=table,
                seq_lens=torch.tensor(lengths, device=device).int(),
                cu_seqlens_q=torch.tensor([0, counts[0], sum(counts)], device=device).int(),
            )
            options = dict(max_seqlen_q=longest, window_size=window_size, causal=causal, rolling=rolling)
            for function in (octavo.paged_attention, of_reference):
                results.append(function(**given, **stored, **options, return_lse=True))
        for ours, expected in zip(results[:2], results[2:], strict=True):
            assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("queries", [1, 4])
def test_a_rolling_buffer_far_along(device, dtype, queries):
    """After a billion tokens, of which the ring holds 15; the block table's other column is another buffer's."""
    length, page_size, width, window_size = 10**9 + 7, 3, 5, 12
    args, _ = case([(queries, 15)], page_size=page_size, device=device, dtype=dtype)
    plain = {name: args[name].clone() for name in CACHES[:2]}
    table = args["block_table"][:, :width].contiguous()
    for j in range(15):  # what is 15th from the end lies where position length - 15 + j belongs
        at = length - 15 + j
        page, old = table[0, at // page_size % width], table[0, j // page_size]
        for name in CACHES[:2]:
            args[name][page, at % page_size] = plain[name][old, j % page_size]
    exact, rounded = (definition(args | plain, kind, window_size=window_size)[0] for kind in (torch.float64, dtype))
    rolled = args | dict(block_table=table, seq_lens=torch.full_like(args["seq_lens"], length))
    for function in (octavo.paged_attention, of_reference):
        out = function(**rolled, max_seqlen_q=queries, window_size=window_size, rolling=True)
        assert_accurate(out if isinstance(out, torch.Tensor) else out[0], exact, rounded)


def test_what_a_ring_has_lost_is_left_out(device):
    """More queries than max_seqlen_q admits: the kernel attends to what is there, the reference says so."""
    args, _ = case([(9, 12)], page_size=4, device=device)
    args["block_table"] = args["block_table"][:, :3].contiguous()
    options = dict(max_seqlen_q=1, window_size=8, rolling=True)
    out = octavo.paged_attention(**args, **options)
    assert torch.equal(out, octavo.paged_attention(**args, max_seqlen_q=1, window_size=8))
    # The ring of two pages after 12 positions: 8 to 11 have replaced 0 to 3, 4 to 7 are there yet.
    short = args | dict(block_table=args["block_table"][:, :2].contiguous())
    for name in CACHES[:2]:
        short[name] = args[name].clone()
        short[name][args["block_table"][0, 0]] = args[name][args["block_table"][0, 2]]
    out = octavo.paged_attention(**short, **options)
    assert out.isfinite().all() and out[0].eq(0).all() and out[1:].ne(0).all()
    exact = definition(
        args | dict(query=args["query"][-1:], cu_seqlens_q=torch.tensor([0, 1])), torch.float64, window_size=8
    )
    assert_accurate(out[-1:], exact[0], exact[0].float())
    with pytest.raises(ValueError, match=r"block_table\[0\]: 2 pages of 4 slots are too few for the 12 keys in sight"):
        of_reference(**short, **options)


@pytest.mark.parametrize("options", [dict(), dict(window_size=5), dict(softcap=3.0, causal=False)], ids=str)
def test_sinks(device, dtype, options):
    """Sinks in fp32 and in query's dtype, of all sizes beside the scores; also where a row sees no key."""
    args, longest = case([*MIX, (5, 3)], padding=3, device=device, dtype=dtype)
    for sinks in (torch.tensor([-3.0, 0.0, 1.0, 40.0]), torch.tensor([-torch.inf, -50.0, 0.5, 5.0])):
        for kind in (dtype, torch.float32):
            options = options | dict(sinks=sinks.to(device, kind))
            check(args, longest, **options)
        check(args, longest, function=of_reference, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(causal=False, softcap=3.0),
        dict(window_size=5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
        dict(scale=0.01),
    ],
    ids=["causal", "not causal, capped", "window and sinks", "scale"],
)
def test_alibi(device, dtype, options):
    slopes = torch.tensor([0.5, 0.03125, 0.0, -0.1], device=device)
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    args, longest = case([*MIX, (5, 3)], padding=3, device=device, dtype=dtype)
    check(args, longest, alibi_slopes=slopes, **options)
    check(args, longest, function=of_reference, alibi_slopes=slopes, **options)


def test_sinks_that_weigh_nothing_change_nothing(device, dtype):
    args, longest = case(MIX, padding=2, device=device, dtype=dtype)
    expected = octavo.paged_attention(**args, max_seqlen_q=longest, return_lse=True)
    sinks = torch.full((4,), -torch.inf, device=device)
    out, lse = octavo.paged_attention(**args, max_seqlen_q=longest, return_lse=True, sinks=sinks)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("cache_dtype", [None, *QUANTISED], ids=str)
def test_large(dtype, cache_dtype, d):
    shape = dict(heads=16, kv_heads=4, d=d, page_size=16, device="cuda", dtype=dtype, cache_dtype=cache_dtype)
    args, longest = case([(1, 2000), (300, 1500), (1, 513)], **shape)
    check(args, longest)
    options = dict(sinks=torch.randn(16, device="cuda"), alibi_slopes=torch.rand(16, device="cuda") / 10)
    check(args, longest, window_size=200, softcap=20.0, **options)


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
def test_opcheck_and_compile(device, cache_dtype):
    scales = scales_of(cache_dtype, "heads", device=device)
    args, longest = case([(1, 5), (3, 4)], device=device, cache_dtype=cache_dtype, **scales)
    for name in CACHES:
        if name in args and args[name].dtype == torch.float32:
            args[name].nan_to_num_(nan=1.0)
    args |= dict(sinks=torch.randn(4, device=device), alibi_slopes=torch.rand(4, device=device))
    check_op("paged_attention", octavo.paged_attention, op_args(args, longest), max_seqlen_q=longest, **args)


IN_FLOAT8 = {name: torch.zeros(5, 4, 2, 16, dtype=torch.float8_e4m3fn) for name in CACHES[:2]}
IN_INT8 = {name: torch.zeros(5, 4, 2, 16, dtype=torch.int8) for name in CACHES[:2]}
IN_INT8 |= {name: torch.zeros(5, 4, 2) for name in CACHES[2:]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(key_cache=torch.zeros(5, 4, 2, 16).long()),
            TypeError,
            "expected float32, float8_e4m3fn, float8_e5m2, int8",
        ),
        (IN_FLOAT8 | dict(value_cache=torch.zeros(5, 4, 2, 16)), TypeError, "value_cache: dtype float32 is not"),
        (dict(sinks=torch.zeros(4).half()), TypeError, "sinks: dtype float16 is not accepted; expected float32"),
        (dict(alibi_slopes=torch.zeros(4).half()), TypeError, "alibi_slopes: dtype float16 is not accepted"),
        (dict(alibi_slopes=torch.zeros(2, 4)), ValueError, r"alibi_slopes: shape \(2, 4\); expected \(4,\)"),
        (dict(rolling=True), ValueError, "rolling: True without window_size"),
        (
            dict(rolling=True, window_size=11, max_seqlen_q=3),
            ValueError,
            r"block_table: 3 pages of 4 slots a sequence; expected at least 13 slots, window_size \+ max_seqlen_q - 1",
        ),
        (dict(sinks=torch.zeros(2)), ValueError, r"sinks: shape \(2,\); expected \(4,\): \[heads\]"),
        (dict(sinks=torch.zeros(8)[::2]), ValueError, "sinks: the last dimension has stride 2"),
        (dict(sinks=torch.zeros(4, device="meta")), ValueError, "sinks: on meta, but query is on cpu"),
        (dict(k_scale=torch.ones(1)), ValueError, "k_scale: given with a cache of float32; expected None"),
        (IN_FLOAT8 | dict(k_scale=torch.ones(1).half()), TypeError, "k_scale: dtype float16"),
        (IN_FLOAT8 | dict(v_scale=torch.ones(3)), ValueError, r"v_scale: shape \(3,\); expected one element or \[2\]"),
        (IN_FLOAT8 | dict(v_scale=torch.ones(1, device="meta")), ValueError, "v_scale: on meta, but query is on cpu"),
        (
            IN_FLOAT8 | dict(key_scale_cache=torch.ones(5, 4, 2)),
            ValueError,
            "key_scale_cache: given with a cache of float8_e4m3fn; expected None",
        ),
        (IN_INT8 | dict(k_scale=torch.ones(1)), ValueError, "k_scale: given with a cache of int8; expected None"),
        (IN_INT8 | dict(value_scale_cache=None), ValueError, "value_scale_cache: missing with a cache of int8"),
        (IN_INT8 | dict(key_scale_cache=torch.ones(5, 4, 2).half()), TypeError, "key_scale_cache: dtype float16"),
        (IN_INT8 | dict(key_scale_cache=torch.ones(5, 4)), ValueError, r"key_scale_cache: .* expected \(5, 4, 2\)"),
    ],
)
def test_errors(change, error, message):
    args = dict(
        query=torch.zeros(3, 4, 16),
        key_cache=torch.zeros(5, 4, 2, 16),
        value_cache=torch.zeros(5, 4, 2, 16),
        block_table=torch.zeros(2, 3, dtype=torch.int32),
        seq_lens=torch.zeros(2, dtype=torch.int32),
        cu_seqlens_q=torch.zeros(3, dtype=torch.int32),
        max_seqlen_q=1,
    )
    with pytest.raises(error, match=message):
        octavo.paged_attention(**args | change)


def test_float8_e4m3fn_before_sm_89(monkeypatch):
    monkeypatch.setattr(kv_cache, "INTERPRET", False)
    with record_launches(KNOWN_DEVICES[80]), pytest.raises(ValueError, match="key_cache: dtype float8_e4m3fn needs"):
        launch(torch.float16, torch.float8_e4m3fn, 64, 4, 1)


GPT_OSS = dict(sinks=torch.bfloat16, window_size=128, rolling=True, return_lse=True)
MISTRAL = dict(window_size=4096)
GEMMA = dict(softcap=50.0, window_size=1024, rolling=True)
MPT = dict(alibi_slopes=torch.float32, return_lse=True)


def launches(dtype):
    """Every format of a cache, and options as models have them, on meta tensors: tests/test_compile.py compiles them.

    fp16 differs from bf16 in how a cache is converted.
    """
    old = device_properties(torch.device("meta")).capability < (8, 9)
    formats = torch.float8_e5m2, torch.int8, *([] if old else [torch.float8_e4m3fn])
    cases = [(cache, d, {}) for cache in formats for d in ((64, 128, 256) if dtype == torch.bfloat16 else (128,))]
    if dtype == torch.bfloat16:
        cases += [(dtype, 64, GPT_OSS), (dtype, 128, GPT_OSS), (dtype, 256, GEMMA), (dtype, 128, MPT)]
        cases += [(dtype, 64, GPT_OSS | dict(rolling=False))]  # with three warpgroups in Hopper's prefill kernel
        cases += [(torch.int8, 64, GPT_OSS), (torch.float8_e5m2, 128, MISTRAL), (torch.float8_e5m2, 80, GPT_OSS)]
    for cache, d, options in cases:
        for group, longest in ((4, 1), (8, 512)):
            launch(dtype, cache, d, group, longest, **options)


def launch(dtype, cache_dtype, d, group, longest, **options):
    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, device="meta", dtype=dtype)

    cache, heads = empty(100, 16, 8, d, dtype=cache_dtype), 8 * group
    args = dict(query=empty(64, heads, d, dtype=dtype), key_cache=cache, value_cache=cache)
    args |= dict(block_table=empty(4, 80), seq_lens=empty(4), cu_seqlens_q=empty(5))
    if cache_dtype == torch.int8:
        args |= {name: empty(100, 16, 8, dtype=torch.float32) for name in CACHES[2:]}
    elif cache_dtype in FLOAT8:
        args |= dict(k_scale=empty(8, dtype=torch.float32), v_scale=empty(8, dtype=torch.float32))
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            options[name] = empty(heads, dtype=options[name])
    paged._paged_attention_cuda(*op_args(args, longest, **options))
