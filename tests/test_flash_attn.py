"""FlashAttention's functions against the attention with an explicit mask, one sequence after another, in float64."""

import inspect
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo.kernels.attention.flash_views import as_pages
from octavo.testing import INTERPRET, assert_accurate, without_interpreter

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NaNs are meant


def one(
    q,
    k,
    v,
    dtype,
    *,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    softmax_scale=None,
    alibi_slopes=None,
    s_aux=None,
):
    """The definition for a sequence, q [n, heads, d] and k [m, heads, d], each step in `dtype`: out and lse [n, h]."""
    (n, heads, d), (m, kv_heads, _) = q.shape, k.shape
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (d**-0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    i = torch.arange(n, device=q.device)[:, None] + m - n
    j = torch.arange(m, device=q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * (i - j).abs()
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros_like(i * j, dtype=torch.bool)
    hidden |= (j < i - left) if left >= 0 else hidden
    hidden |= (j > i + right) if right >= 0 else hidden
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.to(dtype)[:, None, None].expand(-1, n, 1)), 2)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num()[..., :m], v)
    return out, scores.logsumexp(-1).t() if scores.shape[2] else out.new_full((n, heads), -torch.inf)


def hold(out, lse, sequences, **options):
    """Out [rows, heads, d] and lse [rows, heads] to the definition for `sequences` of (q, k, v), one after another."""
    both = [[one(*sequence, kind, **options) for sequence in sequences] for kind in (torch.float64, out.dtype)]
    exact, plain = (torch.cat([o for o, _ in side]) for side in both)
    assert_accurate(out, exact, plain)
    single = torch.cat([one(*sequence, torch.float32, **options)[1] for sequence in sequences])
    assert_accurate(lse, torch.cat([s for _, s in both[0]]), single)


def dense(batch=2, n=5, m=20, heads=4, kv_heads=2, d=16, device="cpu", dtype=torch.float32):
    """q, k and v of odd strides: k and v are halves of one buffer that is longer than they are."""
    kv = torch.full((batch, m + 3, 2, kv_heads, d), torch.nan, dtype=dtype, device=device)
    kv[:, :m] = torch.randn(batch, m, 2, kv_heads, d, dtype=dtype, device=device)
    q = torch.randn(batch, n, heads + 1, d, dtype=dtype, device=device)[:, :, 1:]
    return q, *kv[:, :m].unbind(2)


def check_dense(q, k, v, **options):
    out, lse, nothing = octavo.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous() and nothing.numel() == 0
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32 and lse.is_contiguous()
    hold(out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1), list(zip(q, k, v, strict=True)), **options)
    return out


OPTIONS = [
    dict(),
    dict(causal=True),
    dict(causal=True, window_size=(6, 6), softcap=3.0),
    dict(window_size=(6, 0), softmax_scale=-0.7),
    dict(window_size=(4, -1)),
    dict(window_size=(-1, 0)),
    dict(window_size=(1000, 1000)),
    dict(window_size=(0, 0)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense(device, options):
    check_dense(*dense(device=device, dtype=torch.float16), **options)


@pytest.mark.parametrize(("n", "m"), [(1, 33), (21, 21), (9, 4), (2, 128), (3, 16)], ids=str)
def test_dense_lengths(device, dtype, n, m):
    check_dense(*dense(1, n, m, device=device, dtype=dtype), causal=True, window_size=(17, 0), softcap=3.0)


@pytest.mark.parametrize("name", ["alibi_slopes", "s_aux"])
def test_what_heads_have(device, dtype, name):
    options = {name: torch.tensor([0.5, 0.1, 0.02, 2.0], device=device)}
    for n, m in [(1, 20), (5, 3)]:
        check_dense(*dense(n=n, m=m, device=device, dtype=dtype), causal=True, **options)


@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_head_sizes(device, d):
    check_dense(*dense(1, d=d, device=device, dtype=torch.float16), causal=True)


def test_dense_agrees_with_sdpa(device, dtype):
    q, k, v = dense(n=20, m=20, device=device, dtype=dtype)
    for causal in (False, True):
        sides = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2).to(kind) for x in (q, k, v)), is_causal=causal, enable_gqa=True
            ).transpose(1, 2)
            for kind in (torch.float64, dtype)
        ]
        assert_accurate(octavo.flash_attn_func(q, k, v, causal=causal), *sides)


def test_queries_without_keys_are_zero(device, dtype):
    q, k, v = dense(n=9, m=4, device=device, dtype=dtype)
    out, lse, _ = octavo.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert out[:, :5].eq(0).all() and lse[..., :5].eq(-torch.inf).all() and out[:, 5:].ne(0).all()
    out, lse, _ = octavo.flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    assert octavo.flash_attn_func(q[:, :0], k, v).shape == (2, 0, 4, 16)
    assert octavo.flash_attn_func(q[:0], k[:0], v[:0]).shape == (0, 9, 4, 16)


def layouts(batch, m, heads, d, device):
    """k and v [batch, m, heads, d] of random numbers in every layout that a caller may have."""

    def made(*shape):
        return torch.randn(shape, device=device)

    yield "contiguous", made(batch, m, heads, d), made(batch, m, heads, d)
    yield "heads first", *(made(batch, heads, m, d).transpose(1, 2) for _ in range(2))
    yield "static cache", *(made(batch, heads, m + 5, d)[:, :, :m].transpose(1, 2) for _ in range(2))
    yield "one buffer", *made(batch, m, 3, heads, d)[:, :, 1:].unbind(2)
    yield "one row for all", *(made(1, m, heads, d).expand(batch, -1, -1, -1) for _ in range(2))
    yield "each its own", made(batch, m, heads, d), made(batch, m + 3, heads, d)[:, 3:]
    yield (
        "rows apart by half a token",
        *(
            made(batch * m * heads * d + 50).as_strided((batch, m, heads, d), (m * heads * d + 8, heads * d, d, 1))
            for _ in range(2)
        ),
    )
    yield "tokens first", *(made(m, batch, heads, d).transpose(0, 1) for _ in range(2))
    yield "one token for all", *(made(batch, 1, heads, d).expand(-1, m, -1, -1) for _ in range(2))


@pytest.mark.parametrize("which", range(9))
@pytest.mark.parametrize(("batch", "m"), [(3, 7), (2, 16)], ids=str)
def test_layouts(device, which, batch, m):
    _, k, v = list(layouts(batch, m, 2, 16, device))[which]
    q = torch.randn(batch, 4, 3, 16, device=device).transpose(1, 2)
    check_dense(q, k, v, causal=True)


MIXED = {"each its own", "rows apart by half a token"}


@pytest.mark.parametrize("which", range(9))
@pytest.mark.parametrize("m", [7, 48, 128])
def test_the_length_is_no_page_size(which, m):
    """It is compiled into kernels. What has no common page numbers, or under torch.compile may have none, is copied."""
    name, k, v = list(layouts(2, m, 2, 16, "cpu"))[which]
    pages = as_pages(k, v, copies=True)
    size = {7: 1, 48: 16, 128: 128}[m]
    expected = 1 if name == "static cache" else size  # whose rows lie m + 5 tokens apart
    assert pages.key.shape[1] == pages.value.shape[1] == expected
    copied = [page.data_ptr() != x.data_ptr() for page, x in zip(pages, (k, v), strict=False)]
    assert copied == [name in MIXED and not x.is_contiguous() for x in (k, v)]
    torch.compiler.reset()
    compiled = torch.compile(lambda k, v: as_pages(k, v, copies=True)[:2], fullgraph=True, backend="aot_eager")
    assert {page.shape[1] for page in compiled(k, v)} == {size}
    assert as_pages(k, v).key.shape[1] == (m if name in MIXED else expected)


@given(
    batch=st.integers(1, 3),
    n=st.integers(0, 9),
    m=st.integers(0, 40),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 4),
    causal=st.booleans(),
    left=st.integers(-1, 30),
    half=st.booleans(),
)
def test_any_shape(batch, n, m, kv_heads, group, causal, left, half):
    where = dict(device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.float16 if half else torch.float32)
    args = dense(batch, n, m, group * kv_heads, kv_heads, **where)
    check_dense(*args, causal=causal, window_size=(left, -1))


def packed(lengths, *, padding=0, heads=4, kv_heads=2, d=16, device="cpu", dtype=torch.float32):
    """Arguments for sequences of (queries, keys), and the sequences; what belongs to none is NaN."""
    n, m = (sum(column) for column in zip(*lengths, strict=True))
    q = torch.randn(n + padding, heads, d, dtype=dtype, device=device)
    kv = torch.full((m + padding, 2, kv_heads, d), torch.nan, dtype=dtype, device=device)
    kv[:m] = torch.randn(m, 2, kv_heads, d, dtype=dtype, device=device)
    k, v = kv.unbind(1)
    starts = [list(accumulate(column, initial=0)) for column in zip(*lengths, strict=True)]
    args = dict(q=q, k=k, v=v)
    args |= {
        f"cu_seqlens_{x}": torch.tensor(s, dtype=torch.int32, device=device) for x, s in zip("qk", starts, strict=True)
    }
    args |= {f"max_seqlen_{x}": max(column) for x, column in zip("qk", zip(*lengths, strict=True), strict=True)}
    (a, b), sequences = starts, []
    for i in range(len(lengths)):
        keys = slice(b[i], b[i + 1])
        sequences.append((q[a[i] : a[i + 1]], k[keys], v[keys]))
    return args, sequences


MIX = [(5, 20), (1, 33), (7, 7), (0, 4), (4, 2), (3, 0)]


def check_packed(args, sequences, **options):
    out, lse, _ = octavo.flash_attn_varlen_func(**args, return_attn_probs=True, **options)
    rows = sum(len(q) for q, _, _ in sequences)
    assert out.shape == args["q"].shape and lse.shape == (out.shape[1], out.shape[0]) and lse.is_contiguous()
    hold(out[:rows], lse.t()[:rows], sequences, **options)
    assert out[rows:].eq(0).all() and lse[:, rows:].eq(-torch.inf).all()
    return out


@pytest.mark.parametrize("options", [o for o in OPTIONS if "softcap" not in o], ids=str)
def test_packed(device, options):
    check_packed(*packed(MIX, padding=2, device=device, dtype=torch.float16), **options)


def in_pages(sequences, page_size, device):
    """The keys and values of sequences in shuffled pages: caches and block table."""
    counts = [-(-len(k) // page_size) for _, k, _ in sequences]
    order = torch.randperm(sum(counts) + 1).tolist()
    _, heads, d = sequences[0][1].shape
    k_cache, v_cache = torch.full(
        (2, len(order), page_size, heads, d), torch.nan, dtype=sequences[0][1].dtype, device=device
    )
    table = torch.full((len(sequences), max(counts) + 1), 2**31 - 1, dtype=torch.int32)
    for b, (_, k, v) in enumerate(sequences):
        for page in range(counts[b]):
            table[b, page] = order.pop()
            part = slice(page * page_size, (page + 1) * page_size)
            for cache, x in ((k_cache, k), (v_cache, v)):
                cache[table[b, page], : len(x[part])] = x[part]
    return k_cache, v_cache, table.to(device)


def test_packed_queries_over_pages(device, dtype):
    args, sequences = packed(MIX, device=device, dtype=dtype)
    k_cache, v_cache, table = in_pages(sequences, 4, device)
    args |= dict(k=k_cache, v=v_cache, block_table=table)
    out = check_packed(args, sequences, causal=True)
    used = args["cu_seqlens_k"].diff().int()
    again = octavo.flash_attn_varlen_func(**args | dict(cu_seqlens_k=None, seqused_k=used), causal=True)
    assert torch.equal(out, again)


def test_the_first_keys_of_each_sequence(device):
    args, sequences = packed(MIX, device=device)
    used = [10, 33, 0, 1, 2, 0]
    args |= dict(seqused_k=torch.tensor(used, dtype=torch.int32, device=device))
    args |= dict(max_seqlen_q=torch.tensor(args["max_seqlen_q"]), max_seqlen_k=torch.tensor(args["max_seqlen_k"]))
    check_packed(args, [(q, k[:u], v[:u]) for (q, k, v), u in zip(sequences, used, strict=True)], causal=True)


def test_packed_is_dense(device, dtype):
    q, k, v = dense(n=6, m=6, device=device, dtype=dtype)
    starts = torch.tensor([0, 6, 12], dtype=torch.int32, device=device)
    rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = octavo.flash_attn_varlen_func(*rows, starts, starts, 6, 6, 0.0, None, True)
    assert torch.equal(out.view(q.shape), octavo.flash_attn_func(q, k, v, 0.0, None, True))


def test_nothing_is_packed(device):
    args, _ = packed([(3, 0), (2, 0)], device=device)
    assert octavo.flash_attn_varlen_func(**args).eq(0).all()


PAST = [9, 0, 17]


def cache(kind, capacity, n=2, new=2, device="cpu", dtype=torch.float32):
    """Arguments for three sequences with PAST keys, and their (q, k, v) after `new` more; unused places are NaN."""
    q = torch.randn(3, n, 4, 16, dtype=dtype, device=device)
    k, v = torch.randn(2, 3, new, 2, 16, dtype=dtype, device=device)
    old = [torch.randn(2, length, 2, 16, dtype=dtype, device=device) for length in PAST]
    args = dict(q=q, k=k, v=v, cache_seqlens=torch.tensor(PAST, dtype=torch.int32, device=device))
    if kind == "paged":
        room = [(None, *torch.nn.functional.pad(x, (0, 0, 0, 0, 0, new), value=torch.nan)) for x in old]
        args["k_cache"], args["v_cache"], args["block_table"] = in_pages(room, 4, device)
    else:
        where = [4, 0, 3] if kind == "rows" else [0, 1, 2]
        pad = [3, 1, 0] if kind == "left padding" else [0, 0, 0]
        caches = torch.full((2, 5, capacity, 2, 16), torch.nan, dtype=dtype, device=device)
        for b, x in enumerate(old):
            caches[:, where[b], pad[b] : pad[b] + PAST[b]] = x
        args["k_cache"], args["v_cache"] = caches
        if kind == "rows":
            args["cache_batch_idx"] = torch.tensor(where, dtype=torch.int32, device=device)
        if kind == "left padding":
            args["cache_leftpad"] = torch.tensor(pad, dtype=torch.int32, device=device)
            args["cache_seqlens"] += args["cache_leftpad"]
    return args, [(q[b], torch.cat((old[b][0], k[b])), torch.cat((old[b][1], v[b]))) for b in range(3)]


KINDS = ["dense", "rows", "left padding", "paged"]


def check_cache(args, sequences, **options):
    before = {name: x.clone() for name, x in args.items() if isinstance(x, torch.Tensor)}
    out, lse = octavo.flash_attn_with_kvcache(**args, return_softmax_lse=True, **options)
    assert out.shape == args["q"].shape and lse.shape == (3, 4, out.shape[1]) and lse.is_contiguous()
    hold(out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1), sequences, **options)
    for name in before.keys() - {"k_cache", "v_cache"}:
        assert torch.equal(before[name], args[name]), name
    for name, x in (("k_cache", "k"), ("v_cache", "v")):
        changed = before[name].isnan() & ~args[name].isnan()
        kept = ~before[name].isnan()
        assert torch.equal(before[name][kept], args[name][kept])
        wanted = args[name][:0] if args.get(x) is None else args[x]
        assert torch.equal(args[name][changed].sort().values, wanted.flatten().sort().values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [128, 32, 21])
def test_cache(device, kind, capacity):
    if kind != "paged" or capacity == 21:
        check_cache(*cache(kind, capacity, device=device, dtype=torch.float16), causal=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_query_and_more_new_keys(device, dtype, kind):
    check_cache(*cache(kind, 24, 1, 3, device=device, dtype=dtype), window_size=(5, 0), softcap=2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_without_new_keys(device, kind):
    args, sequences = cache(kind, 24, 2, 0, device=device)
    check_cache(args | dict(k=None, v=None), sequences, causal=True)


def test_left_padding_in_caches_of_other_strides(device):
    args, sequences = cache("left padding", 24, 2, 0, device=device)
    args["v_cache"] = torch.nn.functional.pad(args["v_cache"], (0, 0, 0, 0, 0, 3))[:, :24]
    check_cache(args | dict(k=None, v=None), sequences, causal=True)


def test_one_length_for_all_and_the_whole_cache(device, dtype):
    q, k, v = dense(n=2, m=24, device=device, dtype=dtype)
    whole = octavo.flash_attn_with_kvcache(q, k, v)
    assert_accurate(whole, octavo.flash_attn_func(q.double().float(), k.float(), v.float()).double(), whole)
    out = octavo.flash_attn_with_kvcache(q, k, v, cache_seqlens=11, causal=True)
    hold_to = [
        one(a, b[:11], c[:11], kind, causal=True)[0]
        for kind in (torch.float64, dtype)
        for a, b, c in zip(q, k, v, strict=True)
    ]
    assert_accurate(out, torch.stack(hold_to[:2]), torch.stack(hold_to[2:]))


@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary(device, kind, interleaved, causal):
    args, sequences = cache(kind, 21, 2, 2, device=device)
    angles = torch.rand(32, 4, device=device) * 6

    def turn(x, positions):
        a = angles[positions][:, None]
        first, second = (x[..., :8:2], x[..., 1:8:2]) if interleaved else (x[..., :4], x[..., 4:8])
        pair = first * a.cos() - second * a.sin(), second * a.cos() + first * a.sin()
        return torch.cat((torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), x[..., 8:]), -1)

    expected = []
    for past, (q, k, v) in zip(PAST, sequences, strict=True):
        new = torch.tensor([past, past + 1], device=device)
        expected.append((turn(q, new if causal else new[:1].expand(2)), torch.cat((k[:past], turn(k[past:], new))), v))
    options = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=interleaved, causal=causal)
    out = octavo.flash_attn_with_kvcache(**args, **options)
    exact = torch.cat([one(*sequence, torch.float64, causal=causal)[0] for sequence in expected])
    assert_accurate(out.flatten(0, 1), exact, torch.cat([one(*s, torch.float32, causal=causal)[0] for s in expected]))


def test_what_is_past_the_capacity_is_not_written(device):
    args, _ = cache("dense", 18, 1, 3, device=device)
    before = args["k_cache"].clone()
    if torch.device(device).type == "cpu":
        with without_interpreter(), pytest.raises(ValueError, match=r"cache_seqlens: \[9, 0, 17\]; expected 0 to 15"):
            octavo.flash_attn_with_kvcache(**args)
        args["k_cache"].copy_(before)
    octavo.flash_attn_with_kvcache(**args)
    assert torch.equal(args["k_cache"][3:].isnan(), before[3:].isnan()) and args["k_cache"][2, 17].isfinite().all()


def test_the_reference():
    with without_interpreter():
        check_dense(*dense(n=9, m=20), causal=True, window_size=(6, 0))
        check_packed(*packed(MIX), causal=True)
        for kind in KINDS:
            check_cache(*cache(kind, 21), causal=True)


def calls(device):
    args, _ = packed(MIX, device=device)
    yield octavo.flash_attn_varlen_func, args | dict(causal=True)
    q, k, v = dense(n=3, m=20, device=device)
    yield octavo.flash_attn_func, dict(q=q, k=k, v=v, causal=True, return_attn_probs=True)
    angles = torch.rand(32, 4, device=device)
    for kind in ("left padding", "paged"):
        more = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin()) if kind == "paged" else {}
        yield octavo.flash_attn_with_kvcache, cache(kind, 21, device=device)[0] | more | dict(causal=True)


@pytest.mark.parametrize("which", range(4))
def test_compiles_as_one_graph(device, which):
    torch.compiler.reset()
    compiled = None
    for _ in range(2):
        function, args = list(calls(device))[which]
        backend = "inductor" if args["q"].is_cuda else "aot_eager"
        compiled = compiled or torch.compile(function, fullgraph=True, backend=backend)
        mine = {name: x.clone() if name.endswith("cache") else x for name, x in args.items()}
        out, expected = compiled(**mine), function(**args)
        pairs = zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]
        assert all(torch.equal(*pair) for pair in pairs)
        for name in mine:
            if name.endswith("cache"):
                assert torch.equal(mine[name].nan_to_num(), args[name].nan_to_num())


def test_compiles_for_any_length(device):
    torch.compiler.reset()
    backend = "inductor" if torch.device(device).type == "cuda" else "aot_eager"
    compiled = torch.compile(octavo.flash_attn_func, fullgraph=True, backend=backend, dynamic=True)
    for n, m in [(3, 20), (4, 21), (5, 35)]:
        q, k, v = dense(n=n, m=m, device=device)
        q, k, v = (x.contiguous() for x in (q, k, v))
        assert torch.equal(compiled(q, k, v, causal=True), octavo.flash_attn_func(q, k, v, causal=True))


def attention_within(q, k, past):
    """As in a compiled model whose static cache is updated within it: the keys are a slice of an intermediate."""
    cache = torch.zeros(2, 2, 40, 16, dtype=q.dtype, device=q.device)
    cache[:, :, : k.shape[2]] = k * 2
    k = cache[:, :, : k.shape[2]].transpose(1, 2)
    outs = octavo.flash_attn_func(q, k, k), octavo.flash_attn_with_kvcache(q, k, k, cache_leftpad=past)
    return torch.cat(outs)


def test_compiles_with_keys_that_are_made_inside(device):
    torch.compiler.reset()
    backend = "inductor" if torch.device(device).type == "cuda" else "aot_eager"
    args = torch.randn(2, 3, 4, 16, device=device), torch.randn(2, 2, 20, 16, device=device)
    past = torch.tensor([3, 0], dtype=torch.int32, device=device)
    compiled = torch.compile(attention_within, fullgraph=True, backend=backend)
    assert_accurate(*(f(*args, past) for f in (compiled, attention_within, attention_within)))


def test_signatures_are_those_of_flash_attn():
    """So that arguments by position mean the same."""
    masks = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    caches = "k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale causal"
    more = "window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse"
    expected = {
        octavo.flash_attn_func: f"q k v {masks}",
        octavo.flash_attn_varlen_func: f"q k v {lengths} {masks} block_table",
        octavo.flash_attn_with_kvcache: f"q k_cache v_cache {caches} {more}",
    }
    for function, names in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == names.split()


Q, K = torch.zeros(2, 3, 4, 16), torch.zeros(2, 5, 2, 16)
ONES = torch.ones(2, dtype=torch.int32)
STARTS = torch.tensor([0, 1], dtype=torch.int32)
VARLEN = dict(q=Q[0], k=K[0], v=K[0], cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, max_seqlen_q=1, max_seqlen_k=1)
PAGED = dict(block_table=torch.zeros(2, 1, dtype=torch.int32))
ERRORS = [
    ("func", dict(dropout_p=0.1), ValueError, "dropout_p: 0.1; expected 0.0"),
    ("func", dict(window_size=(-1, 3)), ValueError, r"window_size: \(-1, 3\); expected 0 on the right"),
    ("func", dict(softcap=-1.0), ValueError, "softcap: -1.0"),
    (
        "func",
        dict(alibi_slopes=torch.zeros(2, 4)),
        ValueError,
        r"alibi_slopes: shape \(2, 4\); expected \(4,\): \[heads\]",
    ),
    ("func", dict(s_aux=torch.zeros(3)), ValueError, r"s_aux: shape \(3,\); expected \(4,\)"),
    ("func", dict(q=Q.double()), TypeError, "q: dtype float64"),
    ("func", dict(q=Q[0]), ValueError, r"q: shape \(3, 4, 16\) has 3 dimensions; expected 4: \[batch"),
    ("func", dict(q=Q[..., :12]), ValueError, "q: head_size 12; expected a multiple of 8"),
    ("func", dict(q=Q[:, :, :3]), ValueError, "k: 2 heads of size 16; .* of q's 3 heads a multiple"),
    ("func", dict(k=K.half()), TypeError, "k: dtype float16 is not accepted; expected float32"),
    ("func", dict(k=K[:1], v=K[:1]), ValueError, r"k: shape \(1, 5, 2, 16\); expected \(2, 5, 2, 16\)"),
    ("func", dict(v=K[:, :4]), ValueError, r"v: shape \(2, 4, 2, 16\); expected \(2, 5, 2, 16\): the shape of k"),
    ("func", dict(k=K.mT.contiguous().mT), ValueError, "k: the last dimension has stride 2"),
    ("func", dict(k=K.to("meta")), ValueError, "k: on meta, but q is on cpu"),
    ("varlen", dict(dropout_p=0.1), ValueError, "dropout_p: 0.1"),
    ("varlen", dict(cu_seqlens_q=STARTS.long()), TypeError, "cu_seqlens_q: dtype int64"),
    ("varlen", dict(cu_seqlens_k=STARTS[:1]), ValueError, r"cu_seqlens_k: shape \(1,\); expected \(2,\)"),
    ("varlen", dict(cu_seqlens_k=None), ValueError, "cu_seqlens_k: None; expected"),
    ("varlen", dict(seqused_k=ONES), ValueError, r"seqused_k: shape \(2,\); expected \(1,\)"),
    ("varlen", dict(k=K), ValueError, "k: shape .* has 4 dimensions; expected 3"),
    ("varlen", dict(k=K, v=K, **PAGED), ValueError, r"block_table: shape \(2, 1\); expected \(1, 1\)"),
    ("varlen", dict(max_seqlen_q=-1), ValueError, "max_seqlen_q: -1"),
    ("cache", dict(k=K), ValueError, "v: None with k; expected both"),
    ("cache", dict(v=K), ValueError, "v: given without k"),
    ("cache", dict(k=K, v=K), ValueError, "cache_seqlens: None with k"),
    ("cache", dict(k=K[:1], v=K[:1], cache_seqlens=0), ValueError, r"k: shape \(1, 5, 2, 16\); expected \(2, 5"),
    ("cache", dict(cache_seqlens=ONES.long()), TypeError, "cache_seqlens: dtype int64"),
    ("cache", dict(cache_batch_idx=ONES[:1]), ValueError, r"cache_batch_idx: shape \(1,\); expected \(2,\)"),
    ("cache", dict(cache_batch_idx=ONES, **PAGED), ValueError, "cache_batch_idx: given with block_table"),
    ("cache", dict(cache_leftpad=ONES, **PAGED), ValueError, "cache_leftpad: given with block_table"),
    ("cache", dict(k_cache=K[:1], v_cache=K[:1]), ValueError, "k_cache: 1 rows; expected at least 2"),
    ("cache", dict(k_cache=K.half()), TypeError, "k_cache: dtype float16"),
    (
        "cache",
        dict(k=K, v=K, cache_seqlens=0, cache_leftpad=ONES, v_cache=torch.zeros(2, 6, 2, 16)[:, 1:]),
        ValueError,
        "k_cache: strides .* apart",
    ),
    ("cache", dict(rotary_cos=torch.zeros(5, 4)), ValueError, "rotary_cos: expected with rotary_sin and k"),
    (
        "cache",
        dict(k=K, v=K, cache_seqlens=0, rotary_cos=torch.zeros(4, 4), rotary_sin=torch.zeros(4, 4)),
        ValueError,
        r"rotary_cos: shape \(4, 4\); expected at least 5 rows",
    ),
    ("func", dict(window_size=None), TypeError, r"window_size: None; expected \(left, right\)"),
    ("func", dict(window_size=(1, 2, 3)), TypeError, r"window_size: \(1, 2, 3\); expected \(left, right\)"),
    ("varlen", dict(window_size=None), TypeError, "window_size: None"),
    ("varlen", dict(max_seqlen_q=None), TypeError, "max_seqlen_q: None; expected a whole number"),
    ("varlen", dict(max_seqlen_k=None), TypeError, "max_seqlen_k: None; expected a whole number"),
    ("varlen", dict(max_seqlen_k=torch.tensor(2.5)), TypeError, "max_seqlen_k: 2.5; expected a whole number"),
    ("varlen", dict(max_seqlen_k=-1), ValueError, "max_seqlen_k: -1; expected at least 0"),
    ("varlen", dict(max_seqlen_q=ONES), ValueError, r"max_seqlen_q: shape \(2,\); expected \(1,\)"),
    ("varlen", dict(cu_seqlens_q=STARTS[:0]), ValueError, r"cu_seqlens_q: shape \(0,\); expected \[batch \+ 1\]"),
    ("cache", dict(window_size=None), TypeError, "window_size: None"),
    ("cache", dict(cache_seqlens=6), ValueError, "cache_seqlens: 6; expected 0 to 5: the capacity 5"),
    ("cache", dict(cache_seqlens=-1), ValueError, "cache_seqlens: -1; expected 0 to 5"),
]


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32)


TWO = dict(cu_seqlens_q=numbers(0, 1, 3))
# What needs a tensor's values is an error on the CPU only: on a GPU reading them would be a synchronisation.
ERRORS_OF_VALUES = [
    ("varlen", dict(cu_seqlens_k=numbers(0, 9), max_seqlen_k=9), r"cu_seqlens_k: \[0, 9\]; .* up to 5, the rows of k"),
    ("varlen", TWO | dict(cu_seqlens_k=numbers(0, 4, 2)), r"cu_seqlens_k: \[0, 4, 2\]; expected no number less"),
    (
        "varlen",
        TWO | dict(k=K, v=K, cu_seqlens_k=numbers(0, 4, 2)) | PAGED,
        r"cu_seqlens_k: \[0, 4, 2\]; expected no number less than the one before",
    ),
    ("varlen", dict(cu_seqlens_k=numbers(0, 5), max_seqlen_k=4), "max_seqlen_k: 4; expected at least 5, the most keys"),
    ("varlen", dict(seqused_k=numbers(2)), r"seqused_k: \[2\]; expected at most \[1\], the keys of each"),
    ("varlen", dict(seqused_k=numbers(-1)), r"seqused_k: \[-1\]; expected at least 0"),
    ("cache", dict(cache_seqlens=numbers(3, 6)), r"cache_seqlens: \[3, 6\]; expected 0 to 5: the capacity 5"),
    ("cache", dict(cache_seqlens=numbers(3, 6)) | PAGED, r"cache_seqlens: \[3, 6\]; expected 0 to 5: the capacity 5"),
    ("cache", dict(k=K[:, :2], v=K[:, :2], cache_seqlens=4), "cache_seqlens: 4; expected 0 to 3: .* less 2 of k"),
    ("cache", dict(cache_leftpad=numbers(0, 6)), r"cache_leftpad: \[0, 6\]; expected 0 to cache_seqlens, \[5, 5\]"),
    (
        "cache",
        dict(k=K[:, :1], v=K[:, :1], cache_seqlens=numbers(1, 2), cache_leftpad=numbers(2, 0)),
        r"cache_leftpad: \[2, 0\]; expected 0 to cache_seqlens, \[1, 2\]",
    ),
    ("cache", dict(cache_batch_idx=numbers(0, 2)), r"cache_batch_idx: \[0, 2\]; expected 0 to 1, the rows of k_cache"),
]


@pytest.mark.parametrize(("kind", "change", "message"), ERRORS_OF_VALUES)
def test_errors_of_values(kind, change, message):
    with without_interpreter():
        test_errors(kind, change, ValueError, message)


def test_padding_beyond_the_keys_writes_nowhere_else(device):
    """On a GPU, where it is no error: a slot before a row's first is in no page."""
    caches = torch.zeros(2, 3, 8, 2, 16, device=device)
    new = torch.ones(3, 1, 2, 16, device=device)
    lengths, padding = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([1, 2, 0], [2, 5, 0]))
    if torch.device(device).type == "cpu" and not INTERPRET:
        pytest.skip("an error on the CPU")
    q = torch.randn(3, 1, 4, 16, device=device)
    octavo.flash_attn_with_kvcache(q, *caches, new, new, cache_seqlens=lengths, cache_leftpad=padding)
    written = caches.ne(0).flatten(3).any(3)
    assert written.sum() == 2 and written[:, 2, 0].all()


@pytest.mark.parametrize(("kind", "change", "error", "message"), ERRORS)
def test_errors(kind, change, error, message):
    function, args = {
        "func": (octavo.flash_attn_func, dict(q=Q, k=K, v=K)),
        "varlen": (octavo.flash_attn_varlen_func, VARLEN),
        "cache": (octavo.flash_attn_with_kvcache, dict(q=Q, k_cache=K, v_cache=K)),
    }[kind]
    with pytest.raises(error, match=message):
        function(**args | change)


@pytest.mark.gpu
@pytest.mark.parametrize("which", range(4))
def test_graph_capture_and_replay(which):
    function, args = list(calls("cuda"))[which]
    mine = {name: x.clone() if name.endswith("cache") else x for name, x in args.items()}
    for _ in range(2):
        function(**mine)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**mine)
    for name in mine:
        if name.endswith("cache"):
            mine[name].copy_(args[name])
    for name in ("q", "k", "v"):
        mine[name].copy_(torch.randn_like(mine[name]))
    graph.replay()
    first, second = (x[0] if isinstance(x, tuple) else x for x in (out, function(**args | {n: mine[n] for n in "qkv"})))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_replay_with_other_lengths():
    args, _ = packed(MIX, device="cuda")
    octavo.flash_attn_varlen_func(**args, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.flash_attn_varlen_func(**args, causal=True)
    args["cu_seqlens_q"].copy_(torch.tensor([0, 1, 3, 9, 12, 12, 20], device="cuda"))
    args["cu_seqlens_k"].copy_(torch.tensor([0, 1, 33, 40, 50, 50, 66], device="cuda"))
    graph.replay()
    assert torch.equal(out, octavo.flash_attn_varlen_func(**args, causal=True))
