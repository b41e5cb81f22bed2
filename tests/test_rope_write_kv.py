import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

import octavo
from octavo import reference
from octavo.kernels.attention import rope_write_kv as module
from octavo.kernels.tiles import device_properties
from octavo.testing import assert_accurate, check_op, without_interpreter

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NaNs are meant
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SCALES = "k_scale", "v_scale", "key_scale_cache", "value_scale_cache"


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


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def turned(x, weight, positions, table, dtype, eps=1e-6, weight_offset=0.0, interleaved=False):
    """Norm, then rotation by complex multiplication in float64; else, as models write them, each rounded to `dtype`."""
    x = x.to(dtype)
    if weight is not None:
        wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.to(wide.dtype) + weight_offset)
        x = wide.to(dtype)
    half = table.shape[1] // 2
    inside = (positions >= 0) & (positions < len(table))
    cos, sin = (t[:, None] for t in table.to(dtype)[positions.long().clamp(0, len(table) - 1)].split(half, -1))
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).transpose(-1, -2)
    if dtype == torch.float64:
        pairs = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos, sin))
    else:
        other = torch.stack((-pairs[..., 1], pairs[..., 0]), -1)
        pairs = pairs * cos[..., None] + other * sin[..., None]
    out = torch.cat((pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2), rest), -1)
    return torch.where(inside[:, None, None], out, x)


def quantised(x, dtype, scale):
    """x as a cache of that dtype holds it, and the scales of its heads."""
    x = x if x.dtype == torch.float64 or x.dtype == dtype else x.float()
    if dtype == torch.int8:
        scale = (x.abs().amax(-1) / 127).float()
        return (x / scale[..., None]).clamp(-127, 127).round().nan_to_num(0).to(dtype), scale
    if dtype in FLOAT8:
        most = torch.finfo(dtype).max
        x = (x if scale is None else x / scale[..., None]).clamp(-most, most)
    return x.to(dtype), scale


def check_quantised(stored, exact, scale):
    """Equal to quantising the exact result, but for a unit where that lies within rounding of a tie."""
    q, _ = quantised(exact, stored.dtype, scale)
    if stored.dtype == torch.int8:
        steps = (stored.int() - q.int()).abs()
    else:  # the bits of float8 magnitudes are in order
        a, b = (bits(t).int() for t in (stored, q))
        steps = ((a & 127) * (1 - 2 * (a >> 7)) - (b & 127) * (1 - 2 * (b >> 7))).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() <= 0.001 + 1 / steps.numel(), steps.sum()


def check(query, key, value, positions, table, slots, stored, **options):
    """Calls the op, and holds what it wrote, and what it must not touch, to the exact result."""
    scales = {name: options.get(name) for name in SCALES}
    norm = {name: options[name] for name in ("eps", "weight_offset", "interleaved") if name in options}
    before = [x.clone() for x in (query, key, value)]
    old = [cache.clone() for cache in stored]
    octavo.rotary_embedding_write_kv(query, key, value, positions, table, *stored, slots, **options)
    assert torch.equal(bits(key), bits(before[1])) and torch.equal(bits(value), bits(before[2]))
    sides = []
    for x, name in ((before[0], "q_norm_weight"), (before[1], "k_norm_weight")):
        args = options.get(name), positions, table
        sides.append([turned(x, *args, dtype, **norm) for dtype in (torch.float64, x.dtype)])
    assert_accurate(query, *sides[0])
    page_size = stored[0].shape[1]
    kept = (slots >= 0) & (slots < stored[0].shape[0] * page_size)
    at = slots[kept].long() // page_size, slots[kept].long() % page_size
    for cache, was, x, exact, plain, letter, whole in (
        (stored[0], old[0], before[1], *sides[1], "k", "key"),
        (stored[1], old[1], before[2], before[2], None, "v", "value"),
    ):
        scale = scales[f"{letter}_scale"]
        if cache.dtype == torch.int8:
            scale_cache = scales[f"{whole}_scale_cache"]
            scale = scale_cache[at]
            plain32 = x.float() if plain is None else turned(x, *args, torch.float32, **norm)
            assert_accurate(scale, *(t[kept].abs().amax(-1) / 127 for t in (exact.double(), plain32)))
            untouched = torch.ones_like(scale_cache, dtype=torch.bool)
            untouched[at] = False
            assert scale_cache[untouched].isnan().all()
        if plain is None:
            assert torch.equal(bits(cache[at]), bits(quantised(x[kept], cache.dtype, scale)[0]))
        elif cache.dtype == key.dtype:
            assert_accurate(cache[at], exact[kept], plain[kept])
        elif kept.any():
            check_quantised(cache[at], exact[kept], scale)
        untouched = torch.ones(cache.shape[:2], dtype=torch.bool, device=cache.device)
        untouched[at] = False
        assert torch.equal(bits(cache[untouched]), bits(was[untouched]))


def heads_of_a_projection(tokens, query_heads, kv_heads, head_size, **kw):
    """query, key and value as views into one `[tokens, qkv]` buffer."""
    fused = torch.randn(tokens, query_heads + 2 * kv_heads, head_size, **kw)
    return fused.split([query_heads, kv_heads, kv_heads], 1)


SHAPES = [  # tokens, query heads, KV heads, head size, rotary_dim
    (1, 32, 8, 128, 128),  # Llama 3 8B, Qwen 3 8B
    (3, 9, 3, 64, 64),  # SmolLM2
    (2, 5, 1, 80, 80),
    (2, 4, 4, 96, 96),
    (2, 8, 1, 256, 256),  # Gemma 3
    (2, 4, 2, 256, 64),  # Qwen 3 Next, partial
    (2, 4, 2, 80, 32),  # Phi-2, partial
    (3, 71, 1, 64, 10),
    (2, 1, 1, 2, 2),
    (0, 4, 2, 64, 64),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_views_of_a_fused_projection(device, dtype, shape, interleaved, normed):
    tokens, query_heads, kv_heads, head_size, rotary_dim = shape
    heads = heads_of_a_projection(tokens, query_heads, kv_heads, head_size, device=device, dtype=dtype)
    table = octavo.rotary_cos_sin_cache(rotary_dim, 50, device=device)
    positions = torch.randint(50, (tokens,), device=device)
    slots = torch.randperm(15, device=device)[:tokens]
    weights = {}
    if normed:
        weights = {n: torch.randn(head_size, device=device, dtype=dtype) for n in ("q_norm_weight", "k_norm_weight")}
        weights |= dict(weight_offset=1.0, eps=1e-5)
    stored = caches("halves", 3, 5, kv_heads, head_size, device=device, dtype=dtype)
    check(*heads, positions, table, slots, stored, interleaved=interleaved, **weights)


@given(
    tokens=st.integers(0, 5),
    query_heads=st.integers(1, 7),
    kv_heads=st.integers(1, 5),
    half=st.integers(1, 20),
    rest=st.integers(0, 7),
    page_size=st.integers(1, 9),
    index=st.sampled_from([torch.int32, torch.int64]),
    table_dtype=st.sampled_from([torch.float32, torch.float16]),
    source=st.sampled_from([torch.float32, torch.float16]),
    cache_dtype=st.sampled_from([None, *FLOAT8, torch.int8]),
    layout=st.sampled_from(["two", "halves", "heads_first"]),
    norms=st.sampled_from(["", "q", "k", "qk"]),
    interleaved=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40)
def test_any_shape_position_slot_and_format(
    tokens,
    query_heads,
    kv_heads,
    half,
    rest,
    page_size,
    index,
    table_dtype,
    source,
    cache_dtype,
    layout,
    norms,
    interleaved,
    data,
):
    """Positions outside the table, here -2 to 7 for 5 rows, turn nothing; slots outside the cache write nothing."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, pages = 2 * half + rest, tokens // page_size + 2
    heads = heads_of_a_projection(tokens, query_heads, kv_heads, size, device=device, dtype=source)
    memory = torch.full((9, 2 * half + 3), torch.nan, device=device, dtype=table_dtype)
    memory[2:7, : 2 * half] = torch.randn(5, 2 * half)
    chosen = data.draw(st.lists(st.integers(-2, 7), min_size=tokens, max_size=tokens))
    order = data.draw(st.permutations(range(pages * page_size)))[:tokens]
    outside = [-1, -2, pages * page_size, 2**31 - 1]
    slots = [data.draw(st.sampled_from([slot, slot, slot, *outside[:2], *outside[2:]])) for slot in order]
    stored = caches(layout, pages, page_size, kv_heads, size, device=device, dtype=cache_dtype or source)
    options = {f"{n}_norm_weight": torch.randn(size, device=device) for n in norms}
    if cache_dtype in FLOAT8:
        options["k_scale"] = torch.rand(data.draw(st.sampled_from([1, kv_heads])), device=device) + 0.01
        options["v_scale"] = data.draw(st.sampled_from([None, torch.tensor(0.3, device=device)]))
    elif cache_dtype == torch.int8:
        scales = (c[..., 1] for c in caches(layout, pages, page_size, kv_heads, 3, device=device))
        options |= dict(zip(("key_scale_cache", "value_scale_cache"), scales, strict=True))
    check(
        *heads,
        torch.tensor(chosen, device=device, dtype=index),
        memory[2:7, : 2 * half],
        torch.tensor(slots, device=device, dtype=index),
        stored,
        interleaved=interleaved,
        weight_offset=data.draw(st.sampled_from([0.0, 1.0])),
        **options,
    )


@pytest.mark.parametrize("outside", [-2, 2**40, -(2**40)])
def test_far_slots_and_positions_touch_nothing(device, outside):
    buffer = torch.zeros(9, 2, 3, 1, 8, device=device)  # room on both sides for a wrong address
    k_cache, v_cache = buffer[3:5].unbind(1)
    table = octavo.rotary_cos_sin_cache(8, 5, device=device)
    q, kv = torch.ones(2, 3, 8, device=device), torch.ones(2, 1, 8, device=device)
    positions = torch.tensor([outside, 0], device=device)
    slots = torch.tensor([outside, 4], device=device)
    octavo.rotary_embedding_write_kv(q, kv, kv, positions, table, k_cache, v_cache, slots)
    assert torch.equal(q, torch.ones_like(q)) and buffer.sum() == 16
    assert k_cache[1, 1].eq(1).all() and v_cache[1, 1].eq(1).all()


def test_like_qwen3(device):
    """Norm of the heads and rotation as transformers has them, and `rotary_embedding` and `write_kv` one by one."""
    q, k, v = heads_of_a_projection(4, 4, 2, 64, device=device)
    table = octavo.rotary_cos_sin_cache(64, 512, device=device)
    positions, slots = torch.tensor([0, 1, 77, 511], device=device), torch.arange(4, device=device)
    norms = [Qwen3RMSNorm(64).to(device) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    cos, sin = (t.repeat(1, 2)[None] for t in table[positions].chunk(2, -1))
    weights = [norm.weight.detach() for norm in norms]
    with torch.no_grad():
        theirs = apply_rotary_pos_emb(
            *(n(x).transpose(0, 1)[None] for n, x in zip(norms, (q, k), strict=True)), cos, sin
        )
    exact = [turned(x, w, positions, table, torch.float64) for x, w in zip((q, k), weights, strict=True)]
    alone = [octavo.rms_norm(x, w) for x, w in zip((q, k), weights, strict=True)]
    octavo.rotary_embedding(*alone, positions, table)
    stored = caches("two", 1, 4, 2, 64, device=device)
    octavo.rotary_embedding_write_kv(
        q, k, v, positions, table, *stored, slots, q_norm_weight=weights[0], k_norm_weight=weights[1]
    )
    for out, e, plain, separate in zip((q, stored[0][0]), exact, theirs, alone, strict=True):
        assert_accurate(out, e, plain[0].transpose(0, 1))
        assert_accurate(out, e, separate)
    assert torch.equal(stored[1][0], v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cache_dtype", [None, *FLOAT8, torch.int8], ids=str)
def test_reference(dtype, cache_dtype):
    for rotary_dim, interleaved in ((48, False), (40, False), (40, True)):
        heads = heads_of_a_projection(4, 3, 2, 48, dtype=dtype)
        table = octavo.rotary_cos_sin_cache(rotary_dim, 9)
        options = dict(q_norm_weight=torch.randn(48), k_norm_weight=torch.randn(48).to(dtype), interleaved=interleaved)
        stored = caches("heads_first", 4, 3, 2, 48, dtype=cache_dtype or dtype)
        if cache_dtype == torch.int8:
            scales = (c[..., 0] for c in caches("halves", 4, 3, 2, 2))
            options |= dict(zip(("key_scale_cache", "value_scale_cache"), scales, strict=True))
        elif cache_dtype is not None:
            options |= dict(k_scale=torch.tensor([0.5, 0.01]), v_scale=torch.tensor([0.1]))
        positions, slots = torch.tensor([8, 0, 3, 3], dtype=torch.int32), torch.tensor([7, -1, 0, 11])
        with without_interpreter():
            check(*heads, positions, table, slots, stored, **options)


@pytest.mark.parametrize(
    ("change", "message"), [(dict(position=5), "positions: 5 has no row"), (dict(slot=12), "slot 12")]
)
def test_reference_reports_before_it_writes(change, message):
    q, k, v = heads_of_a_projection(2, 3, 2, 8)
    before, stored = q.clone(), caches("two", 4, 3, 2, 8)
    positions, slots = torch.tensor([1, change.get("position", 4)]), torch.tensor([0, change.get("slot", 1)])
    table = octavo.rotary_cos_sin_cache(8, 5)
    with pytest.raises(ValueError, match=message):
        reference.attention.rotary_embedding_write_kv(
            q, k, v, positions, table, *stored, slots, None, None, 1e-6, 0.0, False, *[None] * 4
        )
    assert torch.equal(q, before) and all(cache.isnan().all() for cache in stored)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_opcheck_and_compile(device, cache_dtype, normed):
    heads = [x.clone() for x in heads_of_a_projection(4, 3, 2, 32, device=device)]
    table, positions = octavo.rotary_cos_sin_cache(24, 9, device=device), torch.arange(4, device=device)
    stored = [torch.zeros(2, 3, 2, 32, device=device).to(cache_dtype) for _ in range(2)]
    slots = torch.tensor([5, 0, -1, 3], device=device)
    weights = [torch.randn(32, device=device) if normed else None for _ in range(2)]
    scales = [torch.rand(2, device=device) + 0.1 if cache_dtype in FLOAT8 else None for _ in range(2)]
    scales += [torch.zeros(2, 3, 2, device=device) if cache_dtype == torch.int8 else None for _ in range(2)]

    def call(query, key, value, positions, table, key_cache, value_cache, slots, *rest):
        options = dict(zip(("q_norm_weight", "k_norm_weight", *SCALES), rest, strict=True))
        octavo.rotary_embedding_write_kv(
            query, key, value, positions, table, key_cache, value_cache, slots, interleaved=normed, **options
        )

    args = (*heads, positions, table, *stored, slots)
    op_args = (*args, *weights, 1e-6, 0.0, normed, *scales)
    check_op("rotary_embedding_write_kv", call, op_args, *args, *weights, *scales)


def test_compiled_with_query_and_key_in_one_buffer(device):
    table, index = octavo.rotary_cos_sin_cache(32, 9, device=device), torch.arange(3, device=device)

    def call(fused, key_cache, value_cache):
        q, k, v = (2 * fused).unflatten(-1, (-1, 32)).split([3, 1, 1], 1)
        octavo.rotary_embedding_write_kv(q, k, v, index, table, key_cache, value_cache, index)
        return q, k, v

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    fused = torch.randn(3, 160, device=device)
    sides = []
    for function in (compiled, call):
        stored = [torch.zeros(2, 4, 1, 32, device=device) for _ in range(2)]
        sides.append((*function(fused, *stored), *stored))
    for traced, eager in zip(*sides, strict=True):
        assert torch.equal(traced, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, *FLOAT8, torch.int8], ids=str)
def test_graph_capture_and_replay_with_other_positions_and_slots(cache_dtype):
    """A replayed graph does what a fresh call does; padding writes nothing."""
    q, k, v = heads_of_a_projection(4, 8, 2, 128, device="cuda", dtype=torch.bfloat16)
    table = octavo.rotary_cos_sin_cache(128, 64, device="cuda")
    positions, slots = torch.zeros(4, device="cuda", dtype=torch.int64), torch.full((4,), -1, device="cuda")
    stored = caches("halves", 4, 16, 2, 128, device="cuda", dtype=cache_dtype)
    options = dict(q_norm_weight=torch.rand(128, device="cuda"), k_norm_weight=torch.rand(128, device="cuda"))
    if cache_dtype == torch.int8:
        options |= {name: torch.full((4, 16, 2), torch.nan, device="cuda") for name in SCALES[2:]}
    old = [bits(cache).clone() for cache in stored]

    def call(query, stored):
        octavo.rotary_embedding_write_kv(query, k, v, positions, table, *stored, slots, **options)

    call(q, stored)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(q, stored)
    graph.replay()
    assert all(torch.equal(bits(cache), was) for cache, was in zip(stored, old, strict=True))
    for x in (q, k, v):
        x.normal_()
    positions.copy_(torch.tensor([7, -1, 63, 2]))
    slots.copy_(torch.tensor([60, 3, -1, 17]))
    expected, other = q.clone(), [cache.clone() for cache in stored]
    call(expected, other)
    graph.replay()
    assert torch.equal(q, expected)
    assert all(torch.equal(bits(cache), bits(e)) for cache, e in zip(stored, other, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_int32():
    """Tokens, table rows, pages and scales that lie further apart than int32 counts."""
    far = 2**31 + 64

    def two(*shape, dtype=torch.float16):
        """Two blocks of that shape, so far apart."""
        strides = torch.empty(shape, device="meta").stride()
        return torch.zeros(far + 64, device="cuda", dtype=dtype).as_strided((2, *shape), (far, *strides))

    q, k, v, table = (two(*shape).normal_() for shape in ((1, 64), (1, 64), (1, 64), (64,)))
    stored = [two(1, 1, 64, dtype=torch.int8) for _ in range(2)]
    scales = [two(1, 1, dtype=torch.float32) for _ in range(2)]
    near = [x.contiguous() for x in (q, k, v)]
    near_stored, near_scales = ([x.contiguous() for x in tensors] for tensors in (stored, scales))
    index = torch.tensor([0, 1], device="cuda")
    for heads, rows, kept, kept_scales in (
        (near, table.contiguous(), near_stored, near_scales),
        ((q, k, v), table, stored, scales),
    ):
        octavo.rotary_embedding_write_kv(
            *heads,
            index,
            rows,
            *kept,
            index,
            key_scale_cache=kept_scales[0],
            value_scale_cache=kept_scales[1],
        )
    assert torch.equal(q, near[0])
    for a, b in zip((*stored, *scales), (*near_stored, *near_scales), strict=True):
        assert torch.equal(a, b) and a[1].count_nonzero()


META = torch.zeros(2, 2, 8, device="meta")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(query=torch.zeros(2, 4, 8, dtype=torch.int32)), TypeError, "query: dtype int32 is not accepted"),
        (dict(query=torch.zeros(2, 32)), ValueError, r"query: shape \(2, 32\) has 2 dimensions; expected 3"),
        (dict(query=torch.zeros(2, 8, 4).mT), ValueError, "query: the last dimension has stride 4"),
        (dict(query=torch.zeros(2, 1, 8).expand(2, 4, 8)), ValueError, "query: strides .* are an expanded view"),
        (dict(key=torch.zeros(2, 16)), ValueError, r"key: shape \(2, 16\) has 2 dimensions; expected 3"),
        (dict(key=torch.zeros(2, 0, 8)), ValueError, r"key: shape \(2, 0, 8\); expected at least one head"),
        (dict(key=torch.zeros(2, 2, 8).half()), TypeError, "key: dtype float16 is not accepted; expected float32"),
        (dict(key=torch.zeros(2, 2, 6)), ValueError, r"key: shape \(2, 2, 6\); expected \(2, 2, 8\)"),
        (dict(key=torch.zeros(2, 8, 2).mT), ValueError, "key: the last dimension has stride 2"),
        (dict(key=META), ValueError, "key: on meta, but query is on cpu"),
        (dict(value=torch.zeros(2, 3, 8)), ValueError, r"value: shape \(2, 3, 8\); expected \(2, 2, 8\)"),
        (dict(value=torch.zeros(2, 2, 8).half()), TypeError, "value: dtype float16"),
        (dict(value=META), ValueError, "value: on meta, but query is on cpu"),
        (dict(positions=torch.zeros(2)), TypeError, "positions: dtype float32"),
        (dict(positions=torch.zeros(3, dtype=torch.int32)), ValueError, r"positions: shape \(3,\); expected \(2,\)"),
        (dict(cos_sin_cache=torch.zeros(9, 7)), ValueError, "has rotary_dim 7; expected an even number"),
        (dict(cos_sin_cache=torch.zeros(9, 10)), ValueError, r"has rotary_dim 10; expected .* head_size \(8\)"),
        (dict(slot_mapping=torch.zeros(2)), TypeError, "slot_mapping: dtype float32"),
        (dict(slot_mapping=torch.zeros(3, dtype=torch.int64)), ValueError, r"slot_mapping: shape \(3,\); expected"),
        (dict(slot_mapping=torch.arange(4)[::2]), ValueError, "slot_mapping: the last dimension has stride 2"),
        (dict(slot_mapping=META[:, 0, 0].long()), ValueError, "slot_mapping: on meta"),
        (dict(q_norm_weight=torch.zeros(4)), ValueError, r"q_norm_weight: shape \(4,\); expected \(8,\)"),
        (dict(k_norm_weight=torch.zeros(8).double()), TypeError, "k_norm_weight: dtype float64"),
        (dict(k_norm_weight=torch.zeros(16)[::2]), ValueError, "k_norm_weight: the last dimension has stride 2"),
        (dict(q_norm_weight=META[0, 0]), ValueError, "q_norm_weight: on meta"),
        (dict(eps=-1.0), ValueError, "eps: -1.0; expected a number of at least 0"),
        (dict(key_cache=torch.zeros(4, 4, 2, 8).half()), TypeError, "key_cache: dtype float16 is not accepted"),
        (dict(key_cache=torch.zeros(4, 4, 3, 8)), ValueError, r"key_cache: shape .* \[pages, page_size, 2, 8\]"),
        (dict(value_cache=torch.zeros(5, 4, 2, 8)), ValueError, "value_cache: shape"),
        (dict(v_scale=torch.ones(1)), ValueError, "v_scale: given with a cache of float32; expected None"),
        (dict(key_scale_cache=torch.ones(4, 4, 2)), ValueError, "key_scale_cache: given with a cache of float32"),
    ],
)
def test_errors(change, error, message):
    args = dict(
        query=torch.zeros(2, 4, 8),
        key=torch.zeros(2, 2, 8),
        value=torch.zeros(2, 2, 8),
        positions=torch.zeros(2, dtype=torch.int64),
        cos_sin_cache=torch.zeros(9, 8),
        key_cache=torch.zeros(4, 4, 2, 8),
        value_cache=torch.zeros(4, 4, 2, 8),
        slot_mapping=torch.tensor([-1, -1]),
    )
    with pytest.raises(error, match=message):
        octavo.rotary_embedding_write_kv(**(args | change))


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    def start(heads, kv_heads, d, rotary_dim, cache_dtype, normed, interleaved):
        q, k, v = new(8, heads + 2 * kv_heads, d, dtype=dtype).split([heads, kv_heads, kv_heads], 1)
        index, cache = new(8, dtype=torch.int64), new(4, 16, kv_heads, d, dtype=cache_dtype)
        weight = new(d, dtype=dtype) if normed else None
        scale = new(kv_heads) if cache_dtype in FLOAT8 else None
        scales = new(4, 16, kv_heads) if cache_dtype == torch.int8 else None
        norm = weight, weight, 1e-6, 0.0, interleaved
        table = new(64, rotary_dim)
        module._rotary_embedding_write_kv_cuda(
            q, k, v, index, table, cache, cache, index, *norm, scale, scale, scales, scales
        )

    for heads, kv_heads, d in ((1, 1, 10), (9, 3, 64), (32, 32, 80), (32, 8, 128), (8, 1, 256), (1, 1, 512)):
        for normed, interleaved in ((False, False), (True, True)):
            start(heads, kv_heads, d, d, dtype, normed, interleaved)
    old = device_properties(torch.device("meta")).capability < (8, 9)
    for cache_dtype in (torch.float8_e5m2, torch.int8, *([] if old else [torch.float8_e4m3fn])):
        for d, rotary_dim in ((80, 32), (128, 128), (256, 64)):
            start(32, 8, d, rotary_dim, cache_dtype, True, False)
