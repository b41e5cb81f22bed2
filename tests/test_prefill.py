"""The prefill kernel of Hopper, which no interpreter runs: on a GPU as defined, elsewhere which calls it takes."""

import math
from itertools import accumulate

import pytest
import test_paged_features as features
import torch
from attention_args import op_args
from hypothesis import given
from hypothesis import strategies as st
from test_paged_attention import check, dense

import octavo
from octavo import reference
from octavo.kernels.attention import prefill
from octavo.kernels.launch import Recorder, recording
from octavo.kernels.tiles import KNOWN_DEVICES
from octavo.testing import assert_accurate, check_op

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")]


def case(lengths, *, heads=8, kv_heads=2, d=128, page_size=16, padding=0, dtype=torch.bfloat16, factor=1.0, spare=3):
    """Arguments for sequences of `(queries, keys)`; what no sequence has written is NaN, or no page id at all."""
    counts = [-(-keys // page_size) for _, keys in lengths]
    on = dict(device="cuda", dtype=dtype)
    caches = torch.full((sum(counts) + spare, 2, page_size, kv_heads, d), torch.nan, **on).unbind(1)
    order = torch.randperm(sum(counts) + spare, device="cuda").int()
    table = torch.full((len(lengths), max(counts, default=0) + 2), 2**31 - 1, device="cuda", dtype=torch.int32)
    for row, pages, (_, keys) in zip(table, order.split([*counts, spare])[:-1], lengths, strict=True):
        row[: len(pages)] = pages
        for cache in caches:
            values = torch.full((len(pages) * page_size, kv_heads, d), torch.nan, **on)
            values[:keys] = torch.randn(keys, kv_heads, d, **on) * factor
            cache[pages.long()] = values.view(-1, page_size, kv_heads, d)
    starts = list(accumulate((queries for queries, _ in lengths), initial=0))
    args = dict(
        query=torch.randn(starts[-1] + padding, heads + 3, d, **on)[:, 2 : 2 + heads],
        key_cache=caches[0],
        value_cache=caches[1],
        block_table=table,
        seq_lens=torch.tensor([keys for _, keys in lengths], device="cuda", dtype=torch.int32),
        cu_seqlens_q=torch.tensor(starts, device="cuda", dtype=torch.int32),
    )
    return args, max(1000, *(queries for queries, _ in lengths))  # so that this kernel is chosen


def float8_case(lengths, cache_dtype, kind="heads", *, heads=8, kv_heads=2, **shape):
    """Arguments for a float8 cache, with scales of that kind unless some are given."""
    shape = dict(d=128, page_size=16, dtype=torch.bfloat16) | shape
    if "v_scale" not in shape:
        shape |= features.scales_of(cache_dtype, kind, kv_heads, "cuda")
    shape |= dict(heads=heads, kv_heads=kv_heads)
    return features.case(lengths, device="cuda", cache_dtype=cache_dtype, **shape)[0]


def growing(args, bits):
    """The last number of each key is `bits` of how far its position is from the sequence's last, where tiles begin.

    The last: tensor cores cut what is added to a large sum, so that a large first product takes bits of all others.
    """
    page_size = args["key_cache"].shape[1]
    for pages, keys in zip(args["block_table"], args["seq_lens"].tolist(), strict=True):
        j = torch.arange(keys, device="cuda")
        args["key_cache"][pages[j // page_size].long(), j % page_size, :, -1] = bits(keys - 1 - j).to(args["query"])[
            :, None
        ]


def launched(args, longest, **options):
    """The kernels of a call."""
    with recording(Recorder()) as recorder:
        octavo.paged_attention(**args, max_seqlen_q=longest, **options)
    return [launch.kernel.__name__ for launch in recorder.launches]


LENGTHS = [(77, 77), (1, 300), (200, 1000), (5, 5), (0, 0), (0, 30), (3, 0), (129, 640)]
OPTIONS = [
    dict(),
    dict(causal=False),
    dict(window_size=100),
    dict(window_size=1),
    dict(softcap=3.0),
    dict(scale=0.3),
    dict(causal=False, window_size=40, softcap=2.0),
]
CHANGES = {
    "a plain call": (dict(), True),
    "fp32": (dict(dtype=torch.float32), False),
    "heads of 40": (dict(d=40), False),
    "heads of 80": (dict(d=80), True),
    "heads of 256": (dict(d=256), True),
    "pages of 8": (dict(page_size=8), False),
    "pages of 48": (dict(page_size=48), True),
    "no tokens": (dict(tokens=0), False),
    "ALiBi": (dict(alibi_slopes=torch.empty(8)), False),
    "batch-invariant": (dict(batch_invariant=True), False),
    "a negative scale": (dict(scale=-1.0), False),
    "a scale that is 0 in fp32": (dict(scale=1e-50), False),
    "an A100": (dict(properties=KNOWN_DEVICES[80]), False),
    "a float8 cache": (dict(cache=torch.float8_e4m3fn), True),
    "a float8 cache for fp16": (dict(cache=torch.float8_e5m2, dtype=torch.float16), True),
    "a float8 cache for fp32": (dict(cache=torch.float8_e5m2, dtype=torch.float32), False),
    "a float8 cache of heads of 80": (dict(cache=torch.float8_e4m3fn, d=80), True),
    "a float8 cache of heads of 72": (dict(cache=torch.float8_e4m3fn, d=72), False),
    "a float8 cache of heads of 256": (dict(cache=torch.float8_e4m3fn, d=256), False),
    "an int8 cache": (dict(cache=torch.int8), False),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=list(CHANGES))
def test_what_it_takes(monkeypatch, change, expected):
    monkeypatch.setattr(prefill, "INTERPRET", False)
    change = dict(dtype=torch.bfloat16, d=128, page_size=16, tokens=500, cache=None) | change
    dtype = change["dtype"]
    query = torch.empty(change["tokens"], 8, change["d"], device="meta", dtype=dtype)
    cache = torch.empty(9, change["page_size"], 2, change["d"], device="meta", dtype=change["cache"] or dtype)
    others = (change.get(n, v) for n, v in dict(alibi_slopes=None, scale=1.0, batch_invariant=False).items())
    assert prefill.takes(query, cache, cache, *others, change.get("properties", KNOWN_DEVICES[90])) == expected


def test_rows_that_the_copy_engine_cannot_read(monkeypatch):
    monkeypatch.setattr(prefill, "INTERPRET", False)
    query, cache = (torch.empty(*shape, device="meta", dtype=torch.float16) for shape in ((500, 8, 64), (9, 16, 2, 68)))
    assert not prefill.takes(query, cache[..., :64], cache[..., :64], None, 1.0, False, KNOWN_DEVICES[90])
    cache = torch.empty(9, 16, 2, 72, device="meta", dtype=torch.float16)
    assert prefill.takes(query, cache[..., :64], cache[..., :64], None, 1.0, False, KNOWN_DEVICES[90])
    cache = torch.empty(9, 16, 1, 64, device="meta", dtype=torch.float16)
    assert not prefill.takes(query, cache.expand(9, 16, 8, 64), cache, None, 1.0, False, KNOWN_DEVICES[90])
    odd = cache.as_strided(cache.shape, (1024, 64, 131, 1))  # no stride leads anywhere in a dimension of one
    assert prefill.takes(query, odd, odd, None, 1.0, False, KNOWN_DEVICES[90])
    assert prefill._boxes(odd, 16, 64, joined=False).strides == [1024, 8, 64, 1]


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_options(self, dtype, options):
        args, longest = case(LENGTHS, padding=90, dtype=dtype)
        assert launched(args, longest, **options) == ["_reset_kernel", "_prefill_kernel"]
        check(args, longest, **options)

    @pytest.mark.parametrize("d", [64, 72, 80, 96, 128, 192, 256])
    def test_head_sizes(self, d):
        check(*case(LENGTHS, d=d))
        check(*case(LENGTHS, d=d), window_size=70)

    @pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1), (7, 1), (12, 2), (32, 1), (71, 1)])
    def test_groups(self, heads, kv_heads):
        check(*case([(200, 300), (40, 700)], heads=heads, kv_heads=kv_heads, d=64))

    @pytest.mark.parametrize("page_size", [16, 32, 48, 64, 80, 128, 256, 544])
    def test_page_sizes(self, page_size):
        check(*case(LENGTHS, page_size=page_size))

    @given(
        lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 700)), min_size=1, max_size=6),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 6),
        d=st.sampled_from([64, 96, 128, 256]),
        page_size=st.sampled_from([16, 32, 48]),
        padding=st.integers(0, 200),
        causal=st.booleans(),
        window_size=st.one_of(st.none(), st.integers(1, 400)),
        softcap=st.sampled_from([0.0, 2.0]),
    )
    def test_any_mix(self, lengths, kv_heads, group, d, page_size, padding, causal, window_size, softcap):
        lengths = [(queries, queries + history) for queries, history in lengths]
        shape = dict(heads=group * kv_heads, kv_heads=kv_heads, d=d, page_size=page_size, padding=padding)
        check(*case(lengths, **shape), causal=causal, window_size=window_size, softcap=softcap)

    def test_large_scores(self):
        """Weights that are all but one or zero, and scores far beyond what half precision holds."""
        args, longest = case([(300, 900)], factor=30.0, dtype=torch.bfloat16)
        check(args, longest, scale=1.0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("d", [64, 96, 128, 256])
    @pytest.mark.parametrize("growth", ["slow", "jump", "both", "fall"])
    def test_maxima_that_grow(self, growth, d, dtype):
        """By less than what sums are rescaled for, tile after tile, so that it adds up; at once; and not at all."""
        args, longest = case([(300, 3000), (150, 700)], d=d, dtype=dtype)
        args["query"].mul_(d**-0.5)[..., -1] = 1.0
        slow, jump = (lambda back: back / 128 * 5), (lambda back: (back > 400) * 40.0)
        kinds = dict(slow=slow, jump=jump, both=lambda back: slow(back) + jump(back), fall=lambda back: -slow(back))
        growing(args, kinds[growth])
        check(args, longest, scale=math.log(2))
        check(args, longest, scale=math.log(2), window_size=600)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("d", [64, 96, 128, 256])
    @pytest.mark.parametrize("options", [dict(), dict(window_size=500), dict(causal=False, softcap=300.0)], ids=str)
    def test_a_row_has_the_same_bits_beside_loud_ones(self, options, d, dtype):
        """A warp has 16 rows, the four heads of four tokens here: it rescales all of them where one's maximum grows."""
        args, longest = case([(400, 1500), (130, 130)], d=d, dtype=dtype)
        growing(args, lambda back: (back // 64).float())
        query = args["query"]
        query *= torch.randint(1, 13, (*query.shape[:2], 1), device="cuda")  # some rescale now and then by themselves
        query[..., -1] = 0.0
        options = dict(max_seqlen_q=longest, return_lse=True, **options)
        alone = octavo.paged_attention(**args, **options)
        loud = torch.rand(query.shape[:2], device="cuda") < 0.5
        query[..., -1] = torch.where(loud, 20.0 * d**0.5, 0.0)
        beside = octavo.paged_attention(**args, **options)
        for a, b in zip(alone, beside, strict=True):
            assert torch.equal(a[~loud], b[~loud]) and not torch.equal(a[loud], b[loud])

    def test_long(self):
        """Sections of heads, and more tiles than programs."""
        args, longest = case([(150, 32768), (700, 9000)], heads=8, kv_heads=8)
        check(args, longest)

    def test_more_queries_than_keys_leaves_the_first_without_any(self):
        out = check(*case([(300, 200), (5, 3)]))
        assert out[:100].eq(0).all()

    def test_nothing_before_the_window_is_read(self):
        args, longest = case([(130, 900)])
        options = dict(max_seqlen_q=longest, window_size=60)
        expected = octavo.paged_attention(**args, **options)
        page, offset = divmod(900 - 130 - 59, 16)
        for name in ("key_cache", "value_cache"):
            args[name][args["block_table"][0, page], :offset] = torch.nan
        args["block_table"][0, : page // 8 * 8] = 2**31 - 1
        assert torch.equal(octavo.paged_attention(**args, **options), expected)

    @pytest.mark.parametrize("wrong", [-1, 10**6, -(2**31)])
    def test_pages_that_are_none_do_no_harm(self, wrong):
        args, longest = case([(130, 900), (200, 200)])
        expected = octavo.paged_attention(**args, max_seqlen_q=longest)
        args["block_table"][0, 7] = wrong
        out = octavo.paged_attention(**args, max_seqlen_q=longest)
        assert out.isfinite().all() and torch.equal(out[130:], expected[130:])

    def test_one_head_with_a_stride_that_leads_nowhere(self):
        args, longest = case([(200, 300)], heads=4, kv_heads=1, d=64)
        expected = octavo.paged_attention(**args, max_seqlen_q=longest)
        for name in ("key_cache", "value_cache"):
            cache = args[name]
            args[name] = cache.as_strided(cache.shape, (*cache.stride()[:2], 131, 1), cache.storage_offset())
        assert torch.equal(octavo.paged_attention(**args, max_seqlen_q=longest), expected)

    def test_warmed_up_it_compiles_nothing_more(self):
        args, longest = case([(200, 300)], d=80, page_size=80, heads=4)

        def call():
            octavo.paged_attention(**{n: x.to("meta") for n, x in args.items()}, max_seqlen_q=longest)

        octavo.warmup([call])
        before = octavo.compile_count()
        octavo.paged_attention(**args, max_seqlen_q=longest)
        args, longest = case([(99, 99), (400, 800)], d=80, page_size=80, heads=4)
        octavo.paged_attention(**args, max_seqlen_q=longest)
        assert octavo.compile_count() == before

    @pytest.mark.parametrize("d", [64, 128, 256])
    def test_heads_first_and_views(self, d):
        args, longest = case(LENGTHS, d=d)
        expected = octavo.paged_attention(**args, max_seqlen_q=longest)
        for name in ("key_cache", "value_cache"):
            args[name] = args[name].transpose(1, 2).contiguous().transpose(1, 2)
        assert launched(args, longest) == ["_reset_kernel", "_prefill_kernel"]
        assert torch.equal(octavo.paged_attention(**args, max_seqlen_q=longest), expected)

    def test_sinks(self):
        args, longest = case([(200, 300), (3, 0)], padding=4)
        sinks = torch.randn(8, device="cuda")
        out, lse = octavo.paged_attention(**args, max_seqlen_q=longest, sinks=sinks, return_lse=True)
        plain, log = dense(args, torch.float64)
        share = 1 / (1 + (sinks.double() - log).exp())
        low, low_log = dense(args, torch.bfloat16)
        assert_accurate(out, plain * share[..., None], low * share[..., None].bfloat16())
        assert_accurate(lse, torch.logaddexp(log, sinks.double().expand_as(log)), low_log.float().logaddexp(sinks))

    @pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *features.FLOAT8], ids=str)
    def test_rings(self, cache_dtype):
        """A ring holds what a window needs: the result is that of the full cache."""
        lengths = [(100, 500), (60, 60), (33, 1000)]
        args = case(lengths)[0] if cache_dtype == torch.bfloat16 else float8_case(lengths, cache_dtype)
        options = dict(max_seqlen_q=100, window_size=50)
        width = 10  # of 16 slots, for 149 keys
        ring = args | {name: torch.full_like(args[name], torch.nan) for name in ("key_cache", "value_cache")}
        ring["block_table"] = torch.arange(3 * width, device="cuda", dtype=torch.int32).view(3, width)
        for b, (_, keys) in enumerate(lengths):
            j = torch.arange(max(0, keys - width * 16), keys, device="cuda")
            for name in ("key_cache", "value_cache"):
                page = ring["block_table"][b, j // 16 % width].long()
                ring[name][page, j % 16] = args[name][args["block_table"][b, j // 16].long(), j % 16]
        assert launched(ring, 100, window_size=50, rolling=True) == ["_reset_kernel", "_prefill_kernel"]
        out = octavo.paged_attention(**ring, **options, rolling=True)
        assert torch.equal(out, octavo.paged_attention(**args, **options))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["none", "number", "one", "heads"])
    @pytest.mark.parametrize("cache_dtype", features.FLOAT8, ids=str)
    def test_float8_caches(self, cache_dtype, kind, dtype):
        args = float8_case(LENGTHS, cache_dtype, kind, dtype=dtype, padding=90)
        assert launched(args, 1000) == ["_reset_kernel", "_prefill_kernel"]
        for options in OPTIONS:
            features.check(args, 1000, **options)

    @pytest.mark.parametrize("d", [64, 80, 96, 112, 128])
    @pytest.mark.parametrize("page_size", [16, 48, 64, 128, 544])
    def test_float8_caches_of_other_shapes(self, page_size, d):
        for heads, kv_heads in ((4, 4), (7, 1)):
            args = float8_case(LENGTHS, torch.float8_e4m3fn, heads=heads, kv_heads=kv_heads, d=d, page_size=page_size)
            assert launched(args, 1000) == ["_reset_kernel", "_prefill_kernel"]
            features.check(args, 1000)
            features.check(args, 1000, window_size=70)

    @pytest.mark.parametrize("layout", ["heads first", "halves of pages, heads first", "halves of heads"])
    def test_float8_caches_in_any_order(self, layout):
        args = float8_case([(200, 700), (90, 90)], torch.float8_e4m3fn, layout=layout, page_size=32)
        assert launched(args, 1000) == ["_reset_kernel", "_prefill_kernel"]
        features.check(args, 1000)

    @pytest.mark.parametrize("cache_dtype", features.FLOAT8, ids=str)
    def test_float8_caches_of_long_sequences(self, cache_dtype):
        features.check(float8_case([(700, 9000), (150, 20000)], cache_dtype, heads=8, kv_heads=8, page_size=64), 1000)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("cache_dtype", features.FLOAT8, ids=str)
    def test_every_float8_is_read_exactly(self, cache_dtype, dtype):
        """One key: the output is its value, and the log-sum-exp of a query of one 1 is that element of the key."""
        args = float8_case([(128, 1)], cache_dtype, "none", heads=1, kv_heads=1, dtype=dtype)
        args["query"] = torch.eye(128, device="cuda", dtype=dtype)[:, None]
        page = args["block_table"][0, 0]
        for codes in torch.arange(256, device="cuda").to(torch.uint8).view(cache_dtype).chunk(2):
            finite = codes.float().isfinite()
            args["value_cache"][page, 0, 0] = codes
            args["key_cache"][page, 0, 0] = codes.where(finite, torch.zeros_like(codes))
            out, lse = octavo.paged_attention(**args, max_seqlen_q=1000, causal=False, scale=2**-12, return_lse=True)
            expected = codes.to(dtype).expand(128, 128)
            assert torch.equal(out[:, 0].nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))
            exact = (
                codes.double().where(finite, 0.0) * 2**-12
            )  # or a score of 57344 would cost the weight its last bits
            assert_accurate(lse[:, 0], exact, exact.float())

    @pytest.mark.parametrize("cache_dtype", features.FLOAT8, ids=str)
    def test_scales_below_zero(self, cache_dtype):
        scales = {name: torch.tensor([-0.3, 0.2], device="cuda") for name in ("k_scale", "v_scale")}
        features.check(float8_case([(130, 400), (60, 60)], cache_dtype, **scales), 1000)
        scales["k_scale"] *= 0
        args = float8_case([(130, 400)], cache_dtype, v_scale=scales["v_scale"])
        args["k_scale"] = scales["k_scale"]
        features.check(args, 1000)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", ["k_scale", "v_scale"])
    def test_a_bad_scale_of_a_head_reaches_its_rows_alone(self, name, bad):
        args = float8_case([(200, 300), (3, 0), (50, 20)], torch.float8_e4m3fn, "heads", padding=5)
        args[name][0] = 0.5
        expected = octavo.paged_attention(**args, max_seqlen_q=1000)
        args[name] = torch.tensor([0.5, bad], device="cuda")
        out = octavo.paged_attention(**args, max_seqlen_q=1000)
        assert torch.equal(out[:, :4], expected[:, :4])
        assert out[:200, 4:].isnan().all() and out[233:253, 4:].isnan().all()
        assert out[200:233].eq(0).all() and out[253:].eq(0).all(), "nothing to attend to is 0 whatever the scale"

    def test_same_bits_and_graphs(self):
        """Whichever program takes a tile; and a graph is replayed with other lengths."""
        args, longest = case([(400, 400), (300, 1500), (20, 20)])
        first = octavo.paged_attention(**args, max_seqlen_q=longest)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = octavo.paged_attention(**args, max_seqlen_q=longest)
        for _ in range(5):
            graph.replay()
            assert torch.equal(out, first)
        args["seq_lens"].copy_(torch.tensor([350, 900, 20]))
        args["cu_seqlens_q"].copy_(torch.tensor([0, 350, 500, 520]))
        graph.replay()
        assert torch.equal(out, octavo.paged_attention(**args, max_seqlen_q=longest))
        assert out[520:].eq(0).all()

    def test_repeated_with_other_tensors(self):
        """From the third on, calls are repeated; descriptors are those of each call's own tensors."""
        octavo.paged_attention.plans.clear()
        calls = [case([(200, 300), (7, 7)]) for _ in range(4)]
        for args, longest in calls:
            check(args, longest)
        assert [len(plans) for plans in octavo.paged_attention.plans.values()] == [1]

    def test_the_reference_agrees(self):
        args, longest = case([(70, 200)], d=64, dtype=torch.float16)
        out, _ = reference.attention.paged_attention(*op_args(args, longest))
        assert_accurate(
            octavo.paged_attention(**args, max_seqlen_q=longest), *(x[0] for x in (dense(args, torch.float64), (out,)))
        )

    def test_check_op(self):
        args, longest = case([(200, 300), (7, 7)], d=64, heads=4)
        check_op("paged_attention", octavo.paged_attention, op_args(args, longest), **args, max_seqlen_q=longest)
