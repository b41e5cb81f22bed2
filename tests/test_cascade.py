"""`cascade_attention` against the attention over whole sequences, each with a copy of the prefix in its cache."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_paged_features import QUANTISED, caches, definition, scales_of

import octavo
from octavo.testing import assert_accurate, without_interpreter

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NaNs are meant
INT_MAX = 2**31 - 1


def case(
    prefix,
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
    **scales,
):
    """A prefix and sequences of `(queries, own keys)`: arguments of the cascade, and of attention over the whole."""
    options = dict(device=device, dtype=dtype)
    pieces = [torch.randn(2, keys, kv_heads, d, **options) for keys in (prefix, *(keys for _, keys in lengths))]
    starts = list(accumulate((queries for queries, _ in lengths), initial=0))
    shared = dict(
        query=torch.randn(starts[-1] + padding, heads + 1, d, **options)[:, 1:],
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=device),
    )

    def stored(parts):
        """Caches that hold these keys and values, and the table of each part."""
        counts = [-(-part.shape[1] // page_size) for part in parts]
        order = torch.randperm(sum(counts) + 2).tolist()
        made = caches(len(order), page_size, kv_heads, d, dtype=cache_dtype or dtype, device=device, layout=layout)
        table = torch.full((len(parts), max(counts, default=0) + 1), INT_MAX, dtype=torch.int32)
        for b, part in enumerate(parts):
            for page in range(counts[b]):
                table[b, page] = order.pop()
            j = torch.arange(part.shape[1])
            slots = table[b].long()[j // page_size] * page_size + j % page_size
            octavo.write_kv(*part, slot_mapping=slots.to(device), **made, **scales)
        return made | scales, table.to(device)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    apart, tables = stored(pieces)
    cascade = dict(
        prefix_block_table=tables[:1],
        prefix_len=ints([prefix]),
        suffix_block_table=tables[1:],
        suffix_lens=ints([keys for _, keys in lengths]),
    )
    together, table = stored([torch.cat([pieces[0], piece], 1) for piece in pieces[1:]])
    whole = dict(block_table=table, seq_lens=ints([prefix + keys for _, keys in lengths]))
    longest = max((queries for queries, _ in lengths), default=0)
    return shared | apart | cascade, shared | together | whole, longest


def check(args, whole, longest, **options):
    out, lse = octavo.cascade_attention(**args, max_seqlen_q=longest, return_lse=True, **options)
    exact, plain = (definition(whole, kind, **options) for kind in (torch.float64, out.dtype))
    assert out.is_contiguous() and out.dtype == args["query"].dtype and lse.dtype == torch.float32
    assert_accurate(out, exact[0], plain[0])
    assert_accurate(lse, exact[1], definition(whole, torch.float32, **options)[1])
    return out, lse


MIX = [(1, 30), (9, 9), (0, 20), (5, 23), (1, 1), (2, 2)]
OPTIONS = [
    dict(),
    dict(softcap=3.0),
    dict(scale=-0.7),
    dict(causal=False),
    dict(sinks=torch.tensor([0.5, -1.0, 2.0, 40.0])),
    dict(sinks=torch.tensor([-torch.inf, -50.0, 0.5, 5.0]), softcap=2.0),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prefix", [41, 0])
def test_decode_and_chunks(device, dtype, prefix, options):
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    args = case(prefix, MIX, padding=3, device=device, dtype=dtype)
    out, _ = check(*args, **options)
    plain = octavo.cascade_attention(**args[0], max_seqlen_q=args[2], **options)
    assert isinstance(plain, torch.Tensor) and torch.equal(plain, out)


@pytest.mark.parametrize("cache_dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_quantised_caches(device, dtype, cache_dtype, layout):
    scales = scales_of(cache_dtype, "heads", device=device)
    check(*case(21, MIX, device=device, dtype=dtype, cache_dtype=cache_dtype, layout=layout, **scales), softcap=3.0)


@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_head_sizes(device, d):
    check(*case(37, [(1, 9), (3, 20)], d=d, device=device, dtype=torch.float16))


@given(
    prefix=st.integers(0, 40),
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20)), max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    page_size=st.integers(1, 9),
    padding=st.integers(0, 3),
    causal=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    cache_dtype=st.sampled_from([None, None, *QUANTISED]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    invariant=st.booleans(),
)
def test_any_mix(prefix, lengths, kv_heads, group, page_size, padding, causal, softcap, cache_dtype, dtype, invariant):
    lengths = [(queries, queries + history) for queries, history in lengths]
    shape = dict(heads=group * kv_heads, kv_heads=kv_heads, page_size=page_size, padding=padding)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args, whole, longest = case(prefix, lengths, **shape, cache_dtype=cache_dtype, dtype=dtype, device=device)
    if not lengths:
        assert octavo.cascade_attention(**args, max_seqlen_q=0).eq(0).all()
        return
    options = dict(max_seqlen_q=longest, causal=causal, softcap=softcap)
    out = octavo.cascade_attention(**args, **options, batch_invariant=invariant)
    del options["max_seqlen_q"]
    assert_accurate(out, *(definition(whole, kind, **options)[0] for kind in (torch.float64, dtype)))


def test_sequences_without_keys_of_their_own(device, dtype):
    """A padding entry's query sees the prefix, as the last of its positions would; with no prefix it sees nothing."""
    check(*case(22, [(1, 0), (1, 5), (0, 0)], padding=2, device=device, dtype=dtype))
    args, _, longest = case(0, [(1, 0), (1, 5), (3, 0)], padding=2, device=device, dtype=dtype)
    out, lse = octavo.cascade_attention(**args, max_seqlen_q=longest, return_lse=True)
    empty = torch.tensor([True, False, *[True] * 5], device=device)
    assert out[empty].eq(0).all() and lse[empty].eq(-torch.inf).all() and out[~empty].ne(0).all()


def test_rows_of_padding_are_zero(device, dtype):
    args, _, longest = case(22, [(1, 4)], padding=4, device=device, dtype=dtype)
    args["query"][1:] = torch.nan
    out, lse = octavo.cascade_attention(**args, max_seqlen_q=longest, return_lse=True)
    assert out[1:].eq(0).all() and lse[1:].eq(-torch.inf).all() and lse[0].isfinite().all()
    sinks = torch.randn(4, device=device)
    out, lse = octavo.cascade_attention(**args, max_seqlen_q=longest, return_lse=True, sinks=sinks)
    assert out[1:].eq(0).all() and torch.equal(lse[1:], sinks.expand(4, 4))


def test_nothing_at_all(device):
    args, _, _ = case(9, [], device=device)
    assert octavo.cascade_attention(**args, max_seqlen_q=0).shape == (0, 4, 16)
    args, _, _ = case(9, [], padding=2, device=device)
    assert octavo.cascade_attention(**args, max_seqlen_q=0).eq(0).all()


def test_whole_tables_cut_at_a_page(device, dtype):
    """As vLLM keeps them: the prefix's pages stand first in every row."""
    args, whole, longest = case(12, [(1, 7), (3, 5)], device=device, dtype=dtype)
    table = torch.cat([args["prefix_block_table"][:, :3].expand(2, -1), args["suffix_block_table"]], 1)
    lengths = args["suffix_lens"] + 12
    cut = dict(prefix_block_table=table[:1, :3], suffix_block_table=table[:, 3:], suffix_lens=lengths - 12)
    out = octavo.cascade_attention(**args | cut, max_seqlen_q=longest)
    assert torch.equal(out, octavo.cascade_attention(**args, max_seqlen_q=longest))
    names = "query", "key_cache", "value_cache", "cu_seqlens_q"
    full = {name: args[name] for name in names} | dict(block_table=table, seq_lens=lengths)
    plain = octavo.paged_attention(**full, max_seqlen_q=longest)
    assert_accurate(out, definition(whole, torch.float64)[0], plain)


def test_batch_invariant(device, dtype):
    """A token has the same bits alone and beside others, at once and after the others of its chunk."""
    args, _, longest = case(41, [(4, 30), (1, 9), (5, 5)], device=device, dtype=dtype)
    options = dict(batch_invariant=True, return_lse=True)
    expected = octavo.cascade_attention(**args, max_seqlen_q=longest, **options)
    for row, (b, keys) in enumerate([(0, 27), (0, 28), (0, 29), (0, 30), (1, 9), *((2, n) for n in range(1, 6))]):
        alone = dict(
            query=args["query"][row : row + 1],
            suffix_block_table=args["suffix_block_table"][b : b + 1],
            suffix_lens=torch.tensor([keys], dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=device),
        )
        out, lse = octavo.cascade_attention(**args | alone, max_seqlen_q=1, **options)
        assert torch.equal(out[0], expected[0][row]) and torch.equal(lse[0], expected[1][row])


def test_the_reference():
    args, whole, longest = case(22, MIX, padding=2)
    with without_interpreter():
        check(args, whole, longest, softcap=2.0, sinks=torch.randn(4))


@pytest.mark.parametrize("return_lse", [False, True])
def test_compiles_as_one_graph(device, return_lse):
    args, _, longest = case(9, [(1, 5), (3, 4)], device=device)
    options = dict(max_seqlen_q=longest, softcap=2.0, return_lse=return_lse)
    expected = octavo.cascade_attention(**args, **options)
    torch.compiler.reset()
    backend = "inductor" if args["query"].is_cuda else "aot_eager"
    compiled = torch.compile(octavo.cascade_attention, fullgraph=True, backend=backend)
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(compiled(**args, **options), expected, strict=True))
    args, _, longest = case(9, [(2, 5), (3, 4), (1, 1)], device=device)  # other sizes
    options["max_seqlen_q"] = longest
    expected = octavo.cascade_attention(**args, **options)
    assert all(torch.equal(*pair) for pair in zip(compiled(**args, **options), expected, strict=True))


def test_it_can_be_warmed_up_for():
    """A call on meta tensors, which is what `warmup` takes, works and says what it returns."""
    args, _, longest = case(9, [(1, 5), (3, 4)])
    args = {name: x.to("meta") for name, x in args.items()}
    out, lse = octavo.cascade_attention(**args, max_seqlen_q=longest, return_lse=True)
    assert out.shape == args["query"].shape and lse.shape == out.shape[:2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(window_size=128), ValueError, "window_size: 128; expected None, .*: call paged_attention with whole"),
        (dict(alibi_slopes=torch.zeros(4)), ValueError, r"alibi_slopes: shape \(4,\); expected None"),
        (dict(prefix_block_table=torch.zeros(2, 3).int()), ValueError, "prefix_block_table: 2 rows; expected 1"),
        (
            dict(prefix_block_table=torch.zeros(3).int()),
            ValueError,
            r"prefix_block_table: shape \(3,\) has 1 dimensions",
        ),
        (dict(prefix_block_table=torch.zeros(1, 3)), TypeError, "prefix_block_table: dtype float32"),
        (dict(suffix_block_table=torch.zeros(2, 3)), TypeError, "suffix_block_table: dtype float32"),
        (dict(prefix_len=12), TypeError, "prefix_len: expected a torch.Tensor, got int"),
        (
            dict(prefix_len=torch.zeros(2).int()),
            ValueError,
            r"prefix_len: shape \(2,\); expected \(1,\): \[1\], a length",
        ),
        (dict(prefix_len=torch.zeros(1)), TypeError, "prefix_len: dtype float32"),
        (dict(prefix_len=torch.zeros(1, device="meta").int()), ValueError, "prefix_len: on meta, but query is on cpu"),
        (dict(suffix_lens=torch.zeros(3).int()), ValueError, r"suffix_lens: shape \(3,\); expected \(2,\)"),
        (dict(suffix_lens=torch.zeros(2).long()), TypeError, "suffix_lens: dtype int64"),
        (dict(cu_seqlens_q=torch.zeros(2).int()), ValueError, r"cu_seqlens_q: shape \(2,\); expected \(3,\)"),
        (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q: -1"),
        (dict(softcap=-1.0), ValueError, "softcap: -1.0"),
        (dict(sinks=torch.zeros(2)), ValueError, r"sinks: shape \(2,\)"),
        (dict(query=torch.zeros(3, 5, 16)), ValueError, "query: 5 heads"),
        (dict(k_scale=torch.ones(1)), ValueError, "k_scale: given with a cache of float32"),
    ],
)
def test_errors(change, error, message):
    args = dict(
        query=torch.zeros(3, 4, 16),
        key_cache=torch.zeros(5, 4, 2, 16),
        value_cache=torch.zeros(5, 4, 2, 16),
        prefix_block_table=torch.zeros(1, 3, dtype=torch.int32),
        prefix_len=torch.zeros(1, dtype=torch.int32),
        suffix_block_table=torch.zeros(2, 3, dtype=torch.int32),
        suffix_lens=torch.zeros(2, dtype=torch.int32),
        cu_seqlens_q=torch.zeros(3, dtype=torch.int32),
        max_seqlen_q=1,
    )
    with pytest.raises(error, match=message):
        octavo.cascade_attention(**args | change)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_another_prefix(dtype):
    args, _, _ = case(40, [(1, 9), (1, 20), (3, 7)], padding=2, device="cuda", dtype=dtype)
    octavo.cascade_attention(**args, max_seqlen_q=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.cascade_attention(**args, max_seqlen_q=3)
    args["prefix_len"].fill_(13)
    args["suffix_lens"].copy_(torch.tensor([4, 20, 0], device="cuda"))
    args["cu_seqlens_q"].copy_(torch.tensor([0, 2, 5, 5], device="cuda"))
    graph.replay()
    assert torch.equal(out, octavo.cascade_attention(**args, max_seqlen_q=3))
    assert out[5:].eq(0).all() and out[:5].ne(0).any()
