from itertools import accumulate, pairwise

import pytest
import torch
from attention_args import TENSORS, op_args
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.attention import paged
from octavo.kernels.tiles import KNOWN_DEVICES
from octavo.testing import assert_accurate, check_op

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def case(lengths, *, heads=4, kv_heads=2, d=16, page_size=4, padding=0, device="cpu", dtype=torch.float32):
    """Arguments for sequences of `(queries, keys)`; whatever must not be read is NaN, or no page id at all."""
    counts = [-(-keys // page_size) for _, keys in lengths]
    order = torch.randperm(sum(counts) + 2).tolist()
    k_cache, v_cache = torch.full((len(order), 2, page_size, kv_heads, d), torch.nan, dtype=dtype).unbind(1)
    table = torch.tensor([[INT_MIN, INT_MAX, -1, len(order)]] * len(lengths), dtype=torch.int32)
    table = table.reshape(len(lengths), 4).repeat(1, max(counts, default=0) // 4 + 1)
    for b, (_, keys) in enumerate(lengths):
        for j in range(keys):
            if j % page_size == 0:
                table[b, j // page_size] = order.pop()
            k_cache[table[b, j // page_size], j % page_size] = torch.randn(kv_heads, d)
            v_cache[table[b, j // page_size], j % page_size] = torch.randn(kv_heads, d)
    starts = list(accumulate((queries for queries, _ in lengths), initial=0))
    query = torch.randn(starts[-1] + padding, heads + 3, d, dtype=dtype)[:, 2 : 2 + heads]
    args = dict(
        query=query.to(device),
        key_cache=k_cache.to(device),
        value_cache=v_cache.to(device),
        block_table=table.to(device),
        seq_lens=torch.tensor([keys for _, keys in lengths], dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
    )
    return args, max((queries for queries, _ in lengths), default=0)


def dense(args, dtype, *, scale=None, causal=True, window_size=None, softcap=0.0):
    """The definition, one sequence after another, every step in `dtype`; keys whose page id is no page are left out."""
    q, k_cache, v_cache = (args[name].to(dtype) for name in ("query", "key_cache", "value_cache"))
    (pages, page_size, kv_heads, d), heads = k_cache.shape, q.shape[1]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    starts = args["cu_seqlens_q"].tolist()
    for b, length in enumerate(args["seq_lens"].tolist()):
        table = args["block_table"][b].long()
        keys = [j for j in range(length) if 0 <= table[j // page_size] < pages]
        if not keys or starts[b] == starts[b + 1]:
            continue
        j = torch.tensor(keys, device=q.device)
        at = table[j // page_size], j % page_size
        k, v = (cache[at].repeat_interleave(heads // kv_heads, 1) for cache in (k_cache, v_cache))
        i = torch.arange(length - (starts[b + 1] - starts[b]), length, device=q.device)[:, None]
        rows = slice(starts[b], starts[b + 1])
        scores = torch.einsum("ihd,jhd->hij", q[rows], k) * (d**-0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        hidden = (j > i) & causal if window_size is None else ((j > i) & causal) | (i - j >= window_size)
        scores = scores.masked_fill(hidden, -torch.inf)
        out[rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(), v)
        lse[rows] = scores.logsumexp(-1).t()
    return out, lse


def check(args, max_seqlen_q, function=octavo.paged_attention, **options):
    out, lse = function(**args, max_seqlen_q=max_seqlen_q, return_lse=True, **options)
    exact, plain = dense(args, torch.float64, **options), dense(args, args["query"].dtype, **options)
    assert out.is_contiguous() and out.dtype == args["query"].dtype and lse.dtype == torch.float32
    assert_accurate(out, exact[0], plain[0])
    assert_accurate(lse, exact[1], dense(args, torch.float32, **options)[1])
    return out


def reference_with_options(**args):
    options = {name: args.pop(name) for name in list(args) if name not in TENSORS}
    return reference.attention.paged_attention(*op_args(args, **options))


DECODE = [(1, 150), (1, 1), (1, 33), (1, 64)]
MIX = [(1, 70), (9, 9), (0, 20), (5, 43), (1, 0), (2, 2)]
OPTIONS = [
    dict(),
    dict(window_size=1),
    dict(window_size=20),
    dict(softcap=3.0),
    dict(scale=-0.7),
    dict(causal=False),
    dict(causal=False, window_size=4, softcap=2.0),
]


@pytest.mark.parametrize("lengths", [DECODE, [(70, 70), (3, 3)], [(17, 130), (1, 2)], MIX], ids=str)
def test_decode_prefill_chunks_and_mixes(device, dtype, lengths):
    check(*case(lengths, device=device, dtype=dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(device, dtype, options):
    check(*case(MIX, padding=3, device=device, dtype=dtype), **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (5, 1), (7, 1), (16, 2), (17, 1), (40, 1)])
def test_groups(device, dtype, heads, kv_heads):
    check(*case([(1, 40), (4, 9)], heads=heads, kv_heads=kv_heads, device=device, dtype=dtype))


def test_more_query_heads_than_rows_of_a_tile(device):
    check(*case([(1, 20), (2, 3)], heads=150, kv_heads=1, device=device, dtype=torch.float16))


@pytest.mark.parametrize("d", [8, 24, 64, 80, 96, 128, 256])
def test_head_sizes(device, dtype, d):
    check(*case([(1, 70), (9, 20)], d=d, device=device, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 3, 16, 32, 544])
def test_page_sizes(device, dtype, page_size):
    check(*case([(1, 70), (3, 20)], page_size=page_size, device=device, dtype=dtype))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=5),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    page_size=st.integers(1, 9),
    padding=st.integers(0, 3),
    causal=st.booleans(),
    window_size=st.one_of(st.none(), st.integers(1, 30)),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_any_mix(lengths, kv_heads, group, page_size, padding, causal, window_size, softcap):
    lengths = [(queries, queries + history) for queries, history in lengths]
    shape = dict(heads=group * kv_heads, kv_heads=kv_heads, page_size=page_size, padding=padding)
    args = case(lengths, **shape, device="cuda" if torch.cuda.is_available() else "cpu")
    check(*args, causal=causal, window_size=window_size, softcap=softcap)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_of_any_size(device, causal):
    """Also one that says "none" as the largest integer."""
    args, longest = case([(1, 150), (4, 70)], device=device)
    for name in ("key_cache", "value_cache"):
        args[name].nan_to_num_(nan=1.0)
    expected = octavo.paged_attention(**args, max_seqlen_q=longest, causal=causal, window_size=1000)
    for window_size in (2**30, INT_MAX, 2**40):
        options = dict(max_seqlen_q=longest, causal=causal, window_size=window_size)
        assert torch.equal(octavo.paged_attention(**args, **options), expected)


def test_rows_without_keys_are_zero(device, dtype):
    args, longest = case([(1, 0), (2, 5), (3, 0), (0, 0)], padding=20, device=device, dtype=dtype)
    out, lse = octavo.paged_attention(**args, max_seqlen_q=longest, return_lse=True)
    empty = torch.tensor([True, False, False] + [True] * 23, device=device)
    assert out[empty].eq(0).all() and lse[empty].eq(-torch.inf).all()
    assert out[~empty].ne(0).all() and lse[~empty].isfinite().all()


def test_nothing_at_all(device):
    args, _ = case([], device=device)
    assert octavo.paged_attention(**args, max_seqlen_q=0).shape == (0, 4, 16)
    args, _ = case([], padding=2, device=device)
    assert octavo.paged_attention(**args, max_seqlen_q=0).eq(0).all()


def test_more_queries_than_keys_leaves_the_first_without_any(device, dtype):
    args = case([(5, 3), (1, 4)], device=device, dtype=dtype)
    out = check(*args)
    assert out[:2].eq(0).all()
    check(*args, function=reference_with_options)


@pytest.mark.parametrize("function", [octavo.paged_attention, reference_with_options], ids=["op", "reference"])
def test_nothing_before_the_window_is_read(device, dtype, function):
    args, _ = case([(2, 90)], device=device, dtype=dtype)
    options = dict(max_seqlen_q=2, window_size=30, return_lse=True)
    expected = function(**args, **options)
    page, offset = divmod(90 - 2 - 29, 4)
    for name in ("key_cache", "value_cache"):
        args[name][args["block_table"][0, page], :offset] = torch.nan
    args["block_table"][0, :page] = INT_MAX
    out = function(**args, **options)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("wrong", [-1, 1000, INT_MIN, INT_MAX])
def test_the_kernel_leaves_out_what_is_no_page(device, dtype, wrong):
    args, longest = case([(1, 70), (5, 30)], device=device, dtype=dtype)
    args["block_table"][0, 3] = wrong
    args["block_table"][1, 0] = wrong
    check(args, longest)


def test_the_kernel_stays_inside_the_block_table(device):
    args, longest = case([(2, 20), (1, 12)], device=device)
    args["block_table"] = torch.cat([args["block_table"][:, :3], torch.full((2, 3), INT_MAX).int().to(device)], 1)
    expected = octavo.paged_attention(**args, max_seqlen_q=longest)
    args["block_table"] = args["block_table"][:, :3]  # what follows in memory is a page id of another sequence
    args["block_table"]._base[:, 3:] = 0
    assert torch.equal(octavo.paged_attention(**args, max_seqlen_q=longest), expected)


def test_chunks_make_the_whole(device, dtype):
    args, _ = case([(45, 45)], device=device, dtype=dtype)
    exact, plain = dense(args, torch.float64)[0], dense(args, dtype)[0]
    for cuts in ([0, 45], [0, 1, 20, 44, 45]):
        parts = []
        for start, end in pairwise(cuts):
            lengths = dict(
                seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
                cu_seqlens_q=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            )
            chunk = args | lengths | dict(query=args["query"][start:end])
            parts.append(octavo.paged_attention(**chunk, max_seqlen_q=end - start))
        assert_accurate(torch.cat(parts), exact, plain)


@pytest.mark.parametrize("max_seqlen_q", [0, 1, 7, 1000])
def test_max_seqlen_q_changes_no_result_beyond_rounding(device, max_seqlen_q):
    args, _ = case([(1, 30), (11, 40)], device=device, dtype=torch.float16)
    check(args, max_seqlen_q)


def test_softcap_of_huge_scores(device, dtype):
    args, longest = case([(1, 20), (4, 9)], device=device, dtype=dtype)
    args["query"] = args["query"] * 1e4
    args["key_cache"] = args["key_cache"].contiguous() * 10
    check(args, longest, softcap=30.0)


def test_large_scores_do_not_overflow(device, dtype):
    args, longest = case([(3, 40)], device=device, dtype=dtype)
    args["query"] = torch.full_like(args["query"], 200.0)
    out = octavo.paged_attention(**args, max_seqlen_q=longest)
    exact = dense(args, torch.float64)[0]
    assert_accurate(out, exact, dense(args, torch.float32)[0].to(dtype))


def test_strides(device):
    args, longest = case([(2, 30), (1, 9)], device=device)
    expected = octavo.paged_attention(**args, max_seqlen_q=longest)
    heads_first = {n: args[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("key_cache", "value_cache")}
    wide = torch.cat([args["block_table"], args["block_table"]], 1)[:, : args["block_table"].shape[1]]
    others = dict(query=args["query"].transpose(0, 1).contiguous().transpose(0, 1), block_table=wide)
    assert torch.equal(octavo.paged_attention(**args | heads_first | others, max_seqlen_q=longest), expected)
    one = dict(value_cache=heads_first["value_cache"])
    assert torch.equal(octavo.paged_attention(**args | one, max_seqlen_q=longest), expected)


def test_without_lse(device):
    args, longest = case(MIX, device=device)
    out = octavo.paged_attention(**args, max_seqlen_q=longest)
    assert torch.equal(out, octavo.paged_attention(**args, max_seqlen_q=longest, return_lse=True)[0])
    op_out, lse = torch.ops.octavo.paged_attention(*op_args(args, longest))
    assert torch.equal(op_out, out) and lse.shape == (0,)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [DECODE, MIX], ids=str)
def test_reference_against_the_definition(options, lengths):
    for dtype in (torch.float32, torch.float16):
        args, longest = case(lengths, heads=6, kv_heads=2, page_size=3, padding=2, dtype=dtype)
        check(args, longest, function=reference_with_options, **options)
        assert reference_with_options(**args, max_seqlen_q=longest, **options)[1].shape == (0,)


@pytest.mark.parametrize(("causal", "window_size"), [(True, None), (True, 5), (False, None), (False, 5)])
def test_reference_against_sdpa(causal, window_size):
    args, longest = case([(7, 30)], heads=6, kv_heads=2)
    page, offset = args["block_table"][0, torch.arange(30) // 4].long(), torch.arange(30) % 4
    mask = torch.ones(7, 30, dtype=torch.bool)
    for i in range(7):
        for j in range(30):
            mask[i, j] = (not causal or j <= 23 + i) and (window_size is None or j > 23 + i - window_size)
    results = []
    for dtype in (torch.float64, torch.float32):
        q, k, v = (
            x.transpose(0, 1)[None].to(dtype)
            for x in (args["query"], args["key_cache"][page, offset], args["value_cache"][page, offset])
        )
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        results.append(o[0].transpose(0, 1))
    out, _ = reference_with_options(**args, max_seqlen_q=longest, causal=causal, window_size=window_size)
    assert_accurate(out, *results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(block_table=[[0, 7], [0, 0]]), r"block_table\[0\]: page id 7; expected 0 to 4"),
        (dict(block_table=[[0, 1], [-3, 0]]), r"block_table\[1\]: page id -3"),
        (dict(seq_lens=[9, 1]), r"block_table\[0\]: 2 pages of 4 slots are too few for seq_lens = 9"),
        (dict(cu_seqlens_q=[1, 1, 2]), r"cu_seqlens_q: \[1, 1, 2\]; expected 0 first"),
        (dict(cu_seqlens_q=[0, 2, 1]), r"cu_seqlens_q: \[0, 2, 1\]; expected 0 first, then no decrease"),
        (dict(cu_seqlens_q=[0, 1, 3]), r"cu_seqlens_q: \[0, 1, 3\]; .* at most 2 \(tokens\)"),
    ],
)
def test_reference_names_values_that_contradict(change, message):
    values = dict(block_table=[[0, 1], [2, 0]], seq_lens=[8, 4], cu_seqlens_q=[0, 1, 2]) | change
    cache = torch.zeros(5, 4, 2, 16)
    args = dict(query=torch.zeros(2, 4, 16), key_cache=cache, value_cache=cache)
    args |= {name: torch.tensor(value, dtype=torch.int32) for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        reference_with_options(**args, max_seqlen_q=1)


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck_and_compile(device, return_lse):
    args, longest = case([(1, 5), (3, 4)], device=device)
    args["key_cache"], args["value_cache"] = (args[n].nan_to_num(nan=1.0) for n in ("key_cache", "value_cache"))
    tensors = tuple(args.values())
    check_op(
        "paged_attention",
        octavo.paged_attention,
        op_args(args, longest, window_size=3, softcap=2.0, return_lse=return_lse),
        *tensors,
        max_seqlen_q=longest,
        scale=0.25,
        window_size=3,
        softcap=2.0,
        return_lse=return_lse,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(query=torch.zeros(3, 4, 16).int()), TypeError, "query: dtype int32 is not accepted"),
        (dict(query=torch.zeros(3, 64)), ValueError, r"query: shape \(3, 64\) has 2 dimensions; expected 3"),
        (dict(query=torch.zeros(3, 4, 20)), ValueError, "query: head_size 20; expected a multiple of 8 up to 256"),
        (dict(query=torch.zeros(3, 4, 264)), ValueError, "query: head_size 264"),
        (dict(query=torch.zeros(3, 5, 16)), ValueError, "query: 5 heads; expected a multiple of the 2 heads"),
        (dict(query=torch.zeros(3, 16, 4).mT), ValueError, "query: the last dimension has stride 4"),
        (dict(key_cache=torch.zeros(5, 4, 2, 16).half()), TypeError, "key_cache: dtype float16"),
        (dict(key_cache=torch.zeros(5, 8, 16)), ValueError, r"key_cache: shape \(5, 8, 16\) has 3 dimensions"),
        (dict(key_cache=torch.zeros(5, 4, 2, 8)), ValueError, r"key_cache: shape .* expected .*, 16\], the head_size"),
        (
            dict(key_cache=torch.zeros(0, 4, 2, 16)),
            ValueError,
            r"key_cache: shape \(0, 4, 2, 16\); .* at least one page",
        ),
        (dict(value_cache=torch.zeros(5, 4, 2, 16).half()), TypeError, "value_cache: dtype float16"),
        (dict(value_cache=torch.zeros(5, 4, 1, 16)), ValueError, r"value_cache: shape .* expected \(5, 4, 2, 16\)"),
        (dict(value_cache=torch.zeros(5, 4, 16, 2).mT), ValueError, "value_cache: the last dimension has stride 2"),
        (dict(block_table=torch.zeros(2, 3)), TypeError, "block_table: dtype float32"),
        (dict(block_table=torch.zeros(6).int()), ValueError, r"block_table: shape \(6,\) has 1 dimensions"),
        (dict(seq_lens=torch.zeros(2).long()), TypeError, "seq_lens: dtype int64 is not accepted; expected int32"),
        (dict(seq_lens=torch.zeros(3).int()), ValueError, r"seq_lens: shape \(3,\); expected \(2,\)"),
        (dict(cu_seqlens_q=torch.zeros(3).long()), TypeError, "cu_seqlens_q: dtype int64"),
        (dict(cu_seqlens_q=torch.zeros(2).int()), ValueError, r"cu_seqlens_q: shape \(2,\); expected \(3,\)"),
        (dict(seq_lens=torch.zeros(2, device="meta").int()), ValueError, "seq_lens: on meta, but query is on cpu"),
        (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q: -1"),
        (dict(window_size=0), ValueError, "window_size: 0; expected at least 1"),
        (dict(window_size=-4), ValueError, "window_size: -4"),
        (dict(softcap=-1.0), ValueError, "softcap: -1.0"),
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


@pytest.mark.parametrize("properties", KNOWN_DEVICES.values(), ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_any_model(properties, dtype):
    for d in range(8, 257, 8):
        for group in (1, 3, 8, 71, 200):
            for longest in (0, 1, 9, 8192):
                tiles = paged.choose_tiles(d, 8, group, longest, longest, dtype, properties)
                queries = tiles.block_m * (tiles.num_warps if tiles.by_warps else 1)
                held = 2 * (tiles.num_stages - 1) * tiles.block_n * tiles.heads + queries
                assert tiles.num_stages >= 2, "a loop without a pipeline"
                assert held * tiles.block_d * dtype.itemsize <= properties.shared_memory


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("lengths", [[(1, 4000), (1, 513)], [(700, 700), (1, 2000), (300, 1900)]], ids=str)
def test_large(dtype, d, lengths):
    args = case(lengths, heads=16, kv_heads=4, d=d, page_size=16, device="cuda", dtype=dtype)
    check(*args)
    check(*args, window_size=200, softcap=20.0)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_other_lengths(dtype):
    lengths = [(1, 40), (1, 9), (12, 64), (0, 0), (2, 30)]
    args, _ = case([(1, 0)] * 5, padding=11, device="cuda", dtype=dtype)
    filled, _ = case(lengths, device="cuda", dtype=dtype)
    args |= {name: filled[name] for name in ("key_cache", "value_cache")}
    args["block_table"] = torch.zeros_like(filled["block_table"])
    octavo.paged_attention(**args, max_seqlen_q=12)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.paged_attention(**args, max_seqlen_q=12)
    graph.replay()
    assert out.eq(0).all()
    for name in ("query", "block_table", "seq_lens", "cu_seqlens_q"):
        args[name].copy_(filled[name])
    graph.replay()
    assert_accurate(out, dense(args, torch.float64)[0], dense(args, dtype)[0])
    assert torch.equal(out, octavo.paged_attention(**args, max_seqlen_q=12))


@pytest.mark.gpu
def test_caches_beyond_int32():
    args, longest = case([(1, 20), (3, 30)], d=128, kv_heads=2, page_size=16, device="cuda", dtype=torch.float16)
    expected = octavo.paged_attention(**args, max_seqlen_q=longest)
    pages = args["key_cache"].shape[0]
    for name in ("key_cache", "value_cache"):
        large = torch.zeros(2**19 + pages, 16, 2, 128, device="cuda", dtype=torch.float16)  # past 2³¹ elements
        large[2**19 :] = args[name]
        args[name] = large
    used = (args["block_table"] >= 0) & (args["block_table"] < pages)
    args["block_table"] = torch.where(used, args["block_table"] + 2**19, -1)
    assert torch.equal(octavo.paged_attention(**args, max_seqlen_q=longest), expected)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for d in (64, 96, 128, 256):
        for group, longest in ((1, 1), (4, 1), (8, 1), (4, 16), (1, 512), (8, 512)):
            if group != 1 and (dtype == torch.bfloat16 or d == 128):  # fp16 differs in no register
                _launch(d, group, longest, None, 0.0, False, dtype)
            if dtype == torch.bfloat16:
                _launch(d, group, longest, 100, 50.0, True, dtype)
    if dtype != torch.bfloat16:
        return
    _launch(80, 4, 1, 100, 50.0, True, dtype)  # the tiles of 96
    _launch(80, 4, 512, 100, 50.0, True, dtype)
    _launch(128, 4, 1, 100, 0.0, False, dtype)
    _launch(128, 4, 512, None, 50.0, False, dtype)
    for d in (64, 128, 256):
        _launch(d, 4, 8, 100, 50.0, True, torch.float32)


def _launch(d, group, longest, window_size, softcap, lse, dtype):
    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, device="meta", dtype=dtype)

    query, cache = empty(64, 8 * group, d, dtype=dtype), empty(100, 16, 8, d, dtype=dtype)
    args = dict(zip(TENSORS, (query, cache, cache, empty(4, 50), empty(4), empty(5)), strict=True))
    options = dict(window_size=window_size, softcap=softcap, return_lse=lse)
    paged._paged_attention_cuda(*op_args(args, longest, **options))
