import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.attention import write_kv as module
from octavo.testing import check_op


def caches(layout, pages, page_size, heads, d, **kwargs):
    """K and V caches full of NaN: two tensors, halves of one buffer, or heads before tokens in memory."""
    if layout == "halves":
        k, v = torch.full((pages, 2, page_size, heads, d), torch.nan, **kwargs).unbind(1)
    elif layout == "heads_first":
        k, v = torch.full((2, pages, heads, page_size, d), torch.nan, **kwargs).transpose(2, 3).unbind(0)
    else:
        k, v = torch.full((2, pages, page_size, heads, d), torch.nan, **kwargs).unbind(0)
    return k, v


def looped(cache, source, slots):
    """What the cache must hold after a write, one token after another."""
    cache = cache.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = source[token]
    return cache


def same_bits(a, b):
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
    reference.attention.write_kv(key, value, k_cache, v_cache, torch.tensor(slots))
    assert same_bits(k_cache, expected[0]) and same_bits(v_cache, expected[1])


@pytest.mark.parametrize("slot", [-2, 12])
def test_reference_names_a_slot_out_of_range(slot):
    k_cache, v_cache = caches("two", 4, 3, 2, 8)
    key = torch.randn(2, 2, 8)
    with pytest.raises(ValueError, match=f"slot_mapping: slot {slot} of token 1; expected .* 0 to 11"):
        reference.attention.write_kv(key, key, k_cache, v_cache, torch.tensor([0, slot]))
    assert k_cache.isnan().all(), "nothing may be written before the check"


def test_opcheck_and_compile(device):
    key, value = torch.randn(2, 3, 2, 8, device=device)
    k_cache, v_cache = (torch.zeros(2, 4, 2, 8, device=device) for _ in range(2))
    args = key, value, k_cache, v_cache, torch.tensor([6, -1, 3], device=device)
    check_op("write_kv", octavo.write_kv, args, *args)


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(key=torch.zeros(3, 2, 8, dtype=torch.int8)), TypeError, "key: dtype int8 is not accepted"),
        (dict(key=torch.zeros(3, 16)), ValueError, r"key: shape \(3, 16\); expected \[tokens, kv_heads, head_size\]"),
        (dict(key=torch.zeros(3, 8, 2).mT), ValueError, "key: the last dimension has stride 2"),
        (dict(value=torch.zeros(3, 2, 8).half()), TypeError, "value: dtype float16"),
        (dict(value=torch.zeros(2, 2, 8)), ValueError, r"value: shape \(2, 2, 8\); expected \(3, 2, 8\)"),
        (dict(key_cache=torch.zeros(4, 4, 2, 8).half()), TypeError, "key_cache: dtype float16"),
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


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for d in (64, 80, 128, 256):
        key = torch.empty(9, 8, d, device="meta", dtype=dtype)
        cache = torch.empty(4, 16, 8, d, device="meta", dtype=dtype)
        module._write_kv_cuda(key, key, cache, cache, torch.empty(9, device="meta", dtype=torch.int64))
