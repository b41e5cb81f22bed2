import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.attention import kv_cache
from octavo.kernels.attention import write_kv as module
from octavo.kernels.launch import record_launches
from octavo.kernels.tiles import KNOWN_DEVICES, device_properties
from octavo.testing import check_op

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NaNs are meant
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
QUANTISED = [*FLOAT8, torch.int8]
ABSENT = [None] * 4


def caches(layout, pages, page_size, heads, d, dtype=torch.float32, **kwargs):
    """K and V caches full of NaN or -128: two tensors, halves of one buffer, or heads before tokens in memory."""
    kwargs |= dict(dtype=dtype, fill_value=torch.nan if dtype.is_floating_point else -128)
    if layout == "halves":
        k, v = torch.full((pages, 2, page_size, heads, d), **kwargs).unbind(1)
    elif layout == "heads_first":
        k, v = torch.full((2, pages, heads, page_size, d), **kwargs).transpose(2, 3).unbind(0)
    else:
        k, v = torch.full((2, pages, page_size, heads, d), **kwargs).unbind(0)
    return k, v


def scale_caches(layout, pages, page_size, heads, **kwargs):
    """Caches of int8 scales full of NaN, laid out in memory as `caches` lays out heads."""
    return tuple(cache[..., 1] for cache in caches(layout, pages, page_size, heads, 3, **kwargs))


def looped(cache, source, slots):
    """What the cache must hold after a write, one token after another."""
    cache = cache.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = source[token]
    return cache


def quantised(x, dtype, scale):
    """x as a cache of that dtype holds it, and the scales of its heads."""
    if dtype == torch.int8:
        scale = x.float().abs().amax(-1) / 127
        q = (x.float() / scale[..., None]).clamp(-127, 127).round()
        return q.nan_to_num(0).to(dtype), scale
    most = torch.finfo(dtype).max
    x = x.float() if scale is None else x.float() / scale[..., None]
    return x.clamp(-most, most).to(dtype), None


def same_bits(a, b):
    if a.dtype.itemsize == 1:  # the bits, but for the sign of a NaN, which a GPU's conversion drops
        a, b = (x.contiguous().view(torch.uint8).where(~x.float().isnan(), 127) for x in (a, b))
        return torch.equal(a, b)
    return torch.equal(a.nan_to_num(nan=-12345.0), b.nan_to_num(nan=-12345.0))


@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("heads", "page_size", "layout"), [(1, 1, "two"), (3, 16, "halves"), (8, 5, "heads_first")])
def test_write_kv(device, dtype, d, heads, page_size, layout):
    k_cache, v_cache = caches(layout, 7, page_size, heads, d, device=device, dtype=dtype)
    slots = torch.randperm(7 * page_size)[:5].tolist()
    slots[2] = -1
    fused = torch.randn(5, 4 * heads + 1, d, device=device, dtype=dtype)
    key, value = fused[:, 2 * heads : 3 * heads], fused[:, 3 * heads : 4 * heads]
    expected = looped(k_cache, key, slots), looped(v_cache, value, slots)
    octavo.write_kv(key, value, k_cache, v_cache, torch.tensor(slots, device=device))
    assert same_bits(k_cache, expected[0]) and same_bits(v_cache, expected[1])


@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 5),
    d=st.integers(1, 70),
    page_size=st.integers(1, 20),
    layout=st.sampled_from(["two", "halves", "heads_first"]),
    data=st.data(),
)
def test_any_shape_and_slots(tokens, heads, d, page_size, layout, data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pages = tokens // page_size + 2
    k_cache, v_cache = caches(layout, pages, page_size, heads, d, device=device)
    order = data.draw(st.permutations(range(pages * page_size)))[:tokens]
    slots = [data.draw(st.sampled_from([slot, slot, slot, -1])) for slot in order]
    key, value = (torch.randn(tokens, heads, d, device=device) for _ in range(2))
    expected = looped(k_cache, key, slots), looped(v_cache, value, slots)
    slot_mapping = torch.tensor(slots, dtype=torch.int32, device=device)
    octavo.write_kv(key, value, k_cache, v_cache, slot_mapping)
    assert same_bits(k_cache, expected[0]) and same_bits(v_cache, expected[1])


@given(
    tokens=st.integers(0, 20),
    heads=st.integers(1, 5),
    d=st.integers(1, 70),
    page_size=st.integers(1, 20),
    layout=st.sampled_from(["two", "halves", "heads_first"]),
    scale_layout=st.sampled_from(["two", "halves", "heads_first"]),
    source=st.sampled_from([torch.float16, torch.float32]),
    dtype=st.sampled_from(QUANTISED),
    per_head=st.booleans(),
    data=st.data(),
)
@settings(max_examples=30)
def test_quantised_formats(tokens, heads, d, page_size, layout, scale_layout, source, dtype, per_head, data):
    """Scales, where the format has them, of one element or one a head; the values' may be absent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pages = tokens // page_size + 2
    stored = caches(layout, pages, page_size, heads, d, dtype=dtype, device=device)
    order = data.draw(st.permutations(range(pages * page_size)))[:tokens]
    slots = [data.draw(st.sampled_from([slot, slot, slot, -1])) for slot in order]
    key, value = (3 * torch.randn(tokens, heads, d, device=device, dtype=source) for _ in range(2))
    if dtype == torch.int8:
        k_scale = v_scale = None
        scales = scale_caches(scale_layout, pages, page_size, heads, device=device)
        key[:1, -1] = 0
    else:
        k_scale = torch.rand(heads if per_head else 1, device=device) + 0.01
        v_scale = data.draw(st.sampled_from([None, torch.tensor(0.3, device=device)]))
        scales = None, None
    whole = [quantised(key, dtype, k_scale), quantised(value, dtype, v_scale)]
    expected = [looped(cache, q, slots) for cache, (q, _) in zip(stored, whole, strict=True)]
    rows = [None if scales[0] is None else looped(c, s, slots) for c, (_, s) in zip(scales, whole, strict=True)]
    octavo.write_kv(
        key,
        value,
        *stored,
        torch.tensor(slots, dtype=torch.int32, device=device),
        k_scale=k_scale,
        v_scale=v_scale,
        key_scale_cache=scales[0],
        value_scale_cache=scales[1],
    )
    for cache, e, scale, row in zip(stored, expected, scales, rows, strict=True):
        assert same_bits(cache, e)
        assert scale is None or same_bits(scale, row)


@pytest.mark.parametrize("cache_dtype", FLOAT8, ids=str)
def test_float8_is_rounded_as_torch_does(device, cache_dtype):
    """All half-precision numbers, all ties between two results and their neighbours, infinities, NaNs, random bits."""
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(torch.float16)
    numbers = torch.arange(256, device=device).to(torch.uint8).view(cache_dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [ties.nextafter(torch.full_like(ties, end)) for end in (-torch.inf, torch.inf)]
    any_bits = torch.randint(-(2**31), 2**31, (2**15,), device=device).to(torch.int32).view(torch.float32)
    for x in (every, torch.cat([ties, *beside, any_bits])):
        x = torch.cat([x, x.new_zeros(-len(x) % 64)]).view(-1, 1, 64)
        k_cache, v_cache = caches("two", len(x), 1, 1, 64, dtype=cache_dtype, device=device)
        octavo.write_kv(x, x, k_cache, v_cache, torch.arange(len(x), device=device))
        expected, _ = quantised(x, cache_dtype, None)
        assert same_bits(k_cache[:, 0], expected) and same_bits(v_cache[:, 0], expected)
        assert torch.equal(k_cache[:, 0].float().isnan(), x.isnan()), "no number may become NaN, and no NaN a number"


def test_a_bad_head_harms_no_other(device):
    """int8: the scale of a head that holds NaN or an infinity says so; zeros have the scale 0."""
    key = torch.randn(3, 3, 8, device=device)
    key[1] = torch.tensor([[torch.nan], [-torch.inf], [0.0]], device=device).where(
        torch.arange(8, device=device) == 5, key[1]
    )
    key[1, 2] = 0
    stored = caches("two", 1, 4, 3, 8, dtype=torch.int8, device=device)
    scales = scale_caches("two", 1, 4, 3, device=device)
    slots = torch.tensor([2, 0, 1], device=device)
    octavo.write_kv(key, key, *stored, slots, key_scale_cache=scales[0], value_scale_cache=scales[1])
    for cache, scale in zip(stored, scales, strict=True):
        assert scale[0, 0].isnan().tolist() == [True, False, False]
        assert scale[0, 0, 1:].tolist() == [torch.inf, 0.0]
        assert cache[0, 0].eq(0).all()
        for token, slot in ((0, 2), (2, 1)):
            read = cache[0, slot].float() * scale[0, slot, :, None]
            assert ((read - key[token]).abs() <= 0.501 * scale[0, slot, :, None]).all()


@pytest.mark.parametrize("slot", [-2, 6, 2**31 - 1, -(2**31)])
def test_slots_out_of_range_are_skipped_by_the_kernel(device, slot):
    buffer = torch.zeros(9, 2, 3, 1, 8, device=device)  # room on both sides for a wrong address
    k_cache, v_cache = buffer[3:5].unbind(1)
    key = torch.ones(2, 1, 8, device=device)
    octavo.write_kv(key, key, k_cache, v_cache, torch.tensor([slot, 4], dtype=torch.int32, device=device))
    assert k_cache[1, 1].eq(1).all() and v_cache[1, 1].eq(1).all()
    assert buffer.sum() == 16


def test_reference_against_the_loop():
    k_cache, v_cache = caches("halves", 4, 3, 2, 8)
    key, value = torch.randn(2, 4, 2, 8)
    slots = [7, -1, 0, 11]
    expected = looped(k_cache, key, slots), looped(v_cache, value, slots)
    reference.attention.write_kv(key, value, k_cache, v_cache, torch.tensor(slots), *ABSENT)
    assert same_bits(k_cache, expected[0]) and same_bits(v_cache, expected[1])


@pytest.mark.parametrize("slot", [-2, 12])
def test_reference_names_a_slot_out_of_range(slot):
    k_cache, v_cache = caches("two", 4, 3, 2, 8)
    key = torch.randn(2, 2, 8)
    with pytest.raises(ValueError, match=f"slot_mapping: slot {slot} of token 1; expected .* 0 to 11"):
        reference.attention.write_kv(key, key, k_cache, v_cache, torch.tensor([0, slot]), *ABSENT)
    assert k_cache.isnan().all(), "nothing may be written before the check"


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_reference_of_quantised_formats(dtype):
    stored = caches("halves", 4, 3, 2, 8, dtype=dtype)
    key, value = 3 * torch.randn(2, 4, 2, 8)
    slots, scale = [7, -1, 0, 11], torch.tensor([0.5, 0.01])
    scales = scale_caches("heads_first", 4, 3, 2) if dtype == torch.int8 else (None, None)
    scale = None if dtype == torch.int8 else scale
    whole = quantised(key, dtype, scale), quantised(value, dtype, scale)
    expected = [looped(cache, q, slots) for cache, (q, _) in zip(stored, whole, strict=True)]
    reference.attention.write_kv(key, value, *stored, torch.tensor(slots), scale, scale, *scales)
    for cache, e, s, (_, rows) in zip(stored, expected, scales, whole, strict=True):
        assert same_bits(cache, e)
        assert s is None or same_bits(s[2, 1], rows[0])


def test_opcheck_and_compile(device):
    key, value = torch.randn(2, 3, 2, 8, device=device)
    slots = torch.tensor([6, -1, 3], device=device)
    for dtype in (torch.float32, *QUANTISED):
        k_cache, v_cache = (torch.zeros(2, 4, 2, 8, device=device, dtype=dtype) for _ in range(2))
        scales = [torch.full((2,), 0.5, device=device) if dtype in FLOAT8 else None for _ in range(2)]
        scales += [torch.zeros(2, 4, 2, device=device) if dtype == torch.int8 else None for _ in range(2)]

        def call(key, value, key_cache, value_cache, slot_mapping, *scales):
            names = "k_scale", "v_scale", "key_scale_cache", "value_scale_cache"
            octavo.write_kv(key, value, key_cache, value_cache, slot_mapping, **dict(zip(names, scales, strict=True)))

        args = key, value, k_cache, v_cache, slots, *scales
        check_op("write_kv", call, args, *args)


@pytest.mark.gpu
def test_graph_capture_and_replay():
    key, value = torch.randn(2, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    k_cache, v_cache = caches("halves", 4, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.full((8,), -1, device="cuda")
    octavo.write_kv(key, value, k_cache, v_cache, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        octavo.write_kv(key, value, k_cache, v_cache, slots)
    graph.replay()
    assert k_cache.isnan().all() and v_cache.isnan().all()
    slots.copy_(torch.tensor([60, 3, -1, 17, 0, 40, 41, 42]))
    expected = looped(k_cache, key, slots.tolist()), looped(v_cache, value, slots.tolist())
    graph.replay()
    assert same_bits(k_cache, expected[0]) and same_bits(v_cache, expected[1])


@pytest.mark.gpu
def test_caches_beyond_int32():
    k_cache = torch.zeros(2**20 + 2, 16, 1, 128, device="cuda", dtype=torch.float16)  # 2³¹ + 4096 elements
    v_cache = torch.zeros_like(k_cache)
    key, value = torch.randn(2, 2, 1, 128, device="cuda", dtype=torch.float16)
    octavo.write_kv(key, value, k_cache, v_cache, torch.tensor([5, 16 * (2**20 + 1) + 3], device="cuda"))
    assert torch.equal(k_cache[0, 5], key[0]) and torch.equal(k_cache[2**20 + 1, 3], key[1])
    assert torch.equal(v_cache[0, 5], value[0]) and torch.equal(v_cache[2**20 + 1, 3], value[1])
    assert k_cache.count_nonzero() == key.count_nonzero()


IN_FLOAT8 = {name: torch.zeros(4, 4, 2, 8, dtype=torch.float8_e4m3fn) for name in ("key_cache", "value_cache")}
IN_INT8 = {name: torch.zeros(4, 4, 2, 8, dtype=torch.int8) for name in ("key_cache", "value_cache")}
IN_INT8 |= {name: torch.zeros(4, 4, 2) for name in ("key_scale_cache", "value_scale_cache")}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(key=torch.zeros(3, 2, 8, dtype=torch.int8)), TypeError, "key: dtype int8 is not accepted"),
        (dict(key=torch.zeros(3, 16)), ValueError, r"key: shape \(3, 16\); expected \[tokens, kv_heads, head_size\]"),
        (dict(key=torch.zeros(3, 8, 2).mT), ValueError, "key: the last dimension has stride 2"),
        (dict(value=torch.zeros(3, 2, 8).half()), TypeError, "value: dtype float16"),
        (dict(value=torch.zeros(2, 2, 8)), ValueError, r"value: shape \(2, 2, 8\); expected \(3, 2, 8\)"),
        (
            dict(key_cache=torch.zeros(4, 4, 2, 8).half()),
            TypeError,
            "key_cache: dtype float16 is not accepted; expected float32, float8_e4m3fn, float8_e5m2, int8",
        ),
        (
            dict(key_cache=torch.zeros(4, 4, 3, 8)),
            ValueError,
            r"key_cache: shape .* expected \[pages, page_size, 2, 8\]",
        ),
        (dict(key_cache=torch.zeros(4, 0, 2, 8)), ValueError, "key_cache: shape .* page_size at least 1"),
        (dict(key_cache=torch.zeros(4, 4, 8, 2).mT), ValueError, "key_cache: the last dimension has stride 2"),
        (dict(value_cache=torch.zeros(5, 4, 2, 8)), ValueError, r"value_cache: shape .* expected \(4, 4, 2, 8\)"),
        (
            dict(value_cache=torch.zeros(4, 4, 2, 8, device="meta")),
            ValueError,
            "value_cache: on meta, but key is on cpu",
        ),
        (dict(slot_mapping=torch.zeros(3)), TypeError, "slot_mapping: dtype float32"),
        (
            dict(slot_mapping=torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"slot_mapping: shape \(2,\); expected \(3,\)",
        ),
        (dict(slot_mapping=torch.zeros(6, dtype=torch.int64)[::2]), ValueError, "slot_mapping: the last dimension"),
        (dict(k_scale=torch.ones(1)), ValueError, "k_scale: given with a cache of float32; expected None"),
        (IN_FLOAT8 | dict(k_scale=torch.ones(1).half()), TypeError, "k_scale: dtype float16"),
        (
            IN_FLOAT8 | dict(v_scale=torch.ones(3)),
            ValueError,
            r"v_scale: shape \(3,\); expected one element or \[2\], one a KV head",
        ),
        (IN_FLOAT8 | dict(v_scale=torch.ones(1, 2)), ValueError, r"v_scale: shape \(1, 2\); expected one element"),
        (IN_FLOAT8 | dict(k_scale=torch.ones(4)[::2]), ValueError, "k_scale: the last dimension has stride 2"),
        (IN_FLOAT8 | dict(k_scale=torch.ones(1, device="meta")), ValueError, "k_scale: on meta, but key is on cpu"),
        (
            IN_FLOAT8 | dict(value_cache=torch.zeros(4, 4, 2, 8, dtype=torch.float8_e5m2)),
            TypeError,
            "value_cache: dtype float8_e5m2",
        ),
        (
            IN_FLOAT8 | dict(key_scale_cache=torch.ones(4, 4, 2)),
            ValueError,
            "key_scale_cache: given with a cache of float8_e4m3fn; expected None",
        ),
        (IN_INT8 | dict(k_scale=torch.ones(1)), ValueError, "k_scale: given with a cache of int8; expected None"),
        (
            IN_INT8 | dict(value_scale_cache=None),
            ValueError,
            "value_scale_cache: missing with a cache of int8; expected a tensor",
        ),
        (
            IN_INT8 | dict(key_scale_cache=torch.ones(4, 4, 2).half()),
            TypeError,
            "key_scale_cache: dtype float16",
        ),
        (
            IN_INT8 | dict(key_scale_cache=torch.ones(4, 4)),
            ValueError,
            r"key_scale_cache: shape \(4, 4\); expected \(4, 4, 2\)",
        ),
        (
            IN_INT8 | dict(value_scale_cache=torch.ones(4, 4, 2, device="meta")),
            ValueError,
            "value_scale_cache: on meta",
        ),
    ],
)
def test_errors(change, error, message):
    args = dict(
        key=torch.zeros(3, 2, 8),
        value=torch.zeros(3, 2, 8),
        key_cache=torch.zeros(4, 4, 2, 8),
        value_cache=torch.zeros(4, 4, 2, 8),
        slot_mapping=torch.zeros(3, dtype=torch.int64),
    )
    with pytest.raises(error, match=message):
        octavo.write_kv(**args | change)


def test_float8_e4m3fn_before_sm_89(monkeypatch):
    cache = torch.empty(4, 4, 2, 8, device="meta", dtype=torch.float8_e4m3fn)
    monkeypatch.setattr(kv_cache, "INTERPRET", False)
    with record_launches(KNOWN_DEVICES[89]):
        assert not kv_cache.native_fp8(cache)
    with (
        record_launches(KNOWN_DEVICES[80]),
        pytest.raises(ValueError, match="key_cache: dtype float8_e4m3fn needs .* 8.9 or later, this one has 8.0: use"),
    ):
        kv_cache.native_fp8(cache)


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    old = device_properties(torch.device("meta")).capability < (8, 9)
    for cache_dtype in (dtype, torch.float8_e5m2, torch.int8, *([] if old else [torch.float8_e4m3fn])):
        for d in (64, 80, 128, 256):
            key = torch.empty(9, 8, d, device="meta", dtype=dtype)
            cache = torch.empty(4, 16, 8, d, device="meta", dtype=cache_dtype)
            scale = torch.empty(8, device="meta") if cache_dtype in FLOAT8 else None
            scales = torch.empty(4, 16, 8, device="meta") if cache_dtype == torch.int8 else None
            slots = torch.empty(9, device="meta", dtype=torch.int64)
            module._write_kv_cuda(key, key, cache, cache, slots, scale, None, scales, scales)
