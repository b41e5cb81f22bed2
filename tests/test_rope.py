import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import octavo
from octavo import reference
from octavo.kernels import rope
from octavo.testing import assert_accurate, check_op, without_interpreter


def rotated(x, positions, table, interleaved, dtype):
    """Out of place, by complex multiplication in float64 and else by rotate-half as models write it in `dtype`."""
    half = table.shape[1] // 2
    cos, sin = (t[:, None] for t in table.to(dtype)[positions.long()].split(half, -1))
    head, rest = x[..., : 2 * half].to(dtype), x[..., 2 * half :].to(dtype)
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).transpose(-1, -2)
    if dtype == torch.float64:
        pairs = torch.view_as_real(torch.complex(pairs[..., 0], pairs[..., 1]) * torch.complex(cos, sin))
    else:
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1)
        pairs = pairs * cos[..., None] + turned * sin[..., None]
    head = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat((head, rest), -1)


def check(out, x, positions, table, interleaved):
    exact = rotated(x, positions, table, interleaved, torch.float64)
    assert_accurate(out, exact, rotated(x, positions, table, interleaved, x.dtype))
    assert torch.equal(out[..., table.shape[1] :], x[..., table.shape[1] :])


def heads_of_a_projection(tokens, query_heads, key_heads, head_size, **kw):
    """query and key as views into one `[tokens, qkv]` buffer, value behind them."""
    fused = torch.randn(tokens, (query_heads + 2 * key_heads) * head_size, **kw)
    sizes = [n * head_size for n in (query_heads, key_heads, key_heads)]
    return fused, *(part.unflatten(-1, (-1, head_size)) for part in fused.split(sizes, -1))


SHAPES = [  # tokens, query heads, key heads, head size, rotary_dim
    (1, 32, 8, 128, 128),  # Llama 3 8B
    (3, 9, 3, 64, 64),  # SmolLM2
    (2, 5, 1, 80, 80),
    (2, 4, 4, 96, 96),
    (1, 8, 1, 256, 256),  # Gemma
    (2, 4, 2, 80, 32),  # Phi-2, partial
    (3, 2, 1, 64, 10),
    (2, 1, 1, 2, 2),
    (0, 4, 2, 64, 64),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_a_fused_projection(device, dtype, shape, interleaved):
    tokens, query_heads, key_heads, head_size, rotary_dim = shape
    _, q, k, v = heads_of_a_projection(tokens, query_heads, key_heads, head_size, device=device, dtype=dtype)
    before = q.clone(), k.clone(), v.clone()
    table = octavo.rotary_cos_sin_cache(rotary_dim, 50, device=device)
    positions = torch.randint(50, (tokens,), device=device)
    assert octavo.rotary_embedding(q, k, positions, table, interleaved=interleaved) is None
    check(q, before[0], positions, table, interleaved)
    check(k, before[1], positions, table, interleaved)
    assert torch.equal(v, before[2])


@given(
    tokens=st.integers(0, 4),
    query_heads=st.integers(1, 7),
    key_heads=st.integers(0, 5),
    half=st.integers(1, 20),
    rest=st.integers(0, 7),
    index=st.sampled_from([torch.int32, torch.int64]),
    table_dtype=st.sampled_from([torch.float32, torch.float16]),
    heads_first=st.booleans(),
    interleaved=st.booleans(),
    data=st.data(),
)
def test_any_shape_and_position(
    tokens, query_heads, key_heads, half, rest, index, table_dtype, heads_first, interleaved, data
):
    """key_heads 0 is key=None; positions outside the table, here -2 to 7 for 5 rows, leave their token as it is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2 * half + rest
    q, k = (torch.randn(tokens, n, size, device=device) for n in (query_heads, key_heads))
    if heads_first:
        q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    before = q.clone(), k.clone()
    memory = torch.full((9, 2 * half + 3), torch.nan, device=device, dtype=table_dtype)
    memory[2:7, : 2 * half] = torch.randn(5, 2 * half)
    table = memory[2:7, : 2 * half]
    chosen = data.draw(st.lists(st.integers(-2, 7), min_size=tokens, max_size=tokens))
    positions = torch.tensor(chosen, device=device, dtype=index)
    octavo.rotary_embedding(q, k if key_heads else None, positions, table, interleaved=interleaved)
    inside = (positions >= 0) & (positions < 5)
    for out, x in zip((q, k), before, strict=True):
        check(out[inside], x[inside], positions[inside], table, interleaved)
        assert torch.equal(out[~inside], x[~inside])


@pytest.mark.parametrize("outside", [-1, 5, 2**40, -(2**40)])
def test_a_token_with_a_position_outside_the_table_stays_unrotated(device, outside):
    memory = torch.full((7, 8), torch.nan, device=device)
    memory[1:6] = octavo.rotary_cos_sin_cache(8, 5)
    q = torch.randn(3, 2, 8, device=device)
    before = q.clone()
    positions = torch.tensor([4, outside, 3], device=device)
    octavo.rotary_embedding(q, None, positions, memory[1:6])
    assert torch.equal(q[1], before[1])
    check(q[::2], before[::2], positions[::2], memory[1:6], False)


def test_like_transformers(device):
    config = LlamaConfig(head_dim=64, hidden_size=256, num_attention_heads=4, max_position_embeddings=512)
    positions = torch.tensor([0, 1, 77, 511], device=device)
    q, k = torch.randn(4, 4, 64, device=device), torch.randn(4, 2, 64, device=device)
    cos, sin = LlamaRotaryEmbedding(config).to(device)(q, positions[None])
    expected = [
        x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in (q, k)), cos, sin)
    ]
    table = octavo.rotary_cos_sin_cache(64, 512, device=device)
    exact = [rotated(x, positions, table, False, torch.float64) for x in (q, k)]
    octavo.rotary_embedding(q, k, positions, table)
    for out, e, theirs in zip((q, k), exact, expected, strict=True):
        assert_accurate(out, e, theirs)


def test_gptj_pairing_against_a_numpy_loop(device):
    q, positions = torch.randn(3, 2, 16, device=device), torch.tensor([5, 0, 30], device=device)
    expected = q.cpu().numpy().astype(np.float64)
    for t, position in enumerate([5, 0, 30]):
        for head in expected[t]:
            for i in range(6):  # rotary_dim 12 of 16
                c, s = np.cos(position * 500.0 ** (-2 * i / 12)), np.sin(position * 500.0 ** (-2 * i / 12))
                head[2 * i], head[2 * i + 1] = (
                    head[2 * i] * c - head[2 * i + 1] * s,
                    head[2 * i + 1] * c + head[2 * i] * s,
                )
    table = octavo.rotary_cos_sin_cache(12, 31, base=500.0, device=device)
    plain = rotated(q, positions, table, True, torch.float32)
    octavo.rotary_embedding(q, None, positions, table, interleaved=True)
    assert_accurate(q, torch.from_numpy(expected).to(device), plain)


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference(interleaved):
    table = octavo.rotary_cos_sin_cache(40, 9)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        _, q, k, v = heads_of_a_projection(4, 3, 2, 48, dtype=dtype)
        before = q.clone(), k.clone(), v.clone()
        positions = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
        reference.rope.rotary_embedding(q, k, positions, table, interleaved)
        check(q, before[0], positions, table, interleaved)
        check(k, before[1], positions, table, interleaved)
        assert torch.equal(v, before[2])


@pytest.mark.parametrize("position", [-1, 5, 2**40])
def test_cpu_reports_positions_outside_the_table(position):
    q, table = torch.ones(2, 1, 8), octavo.rotary_cos_sin_cache(8, 5)
    with without_interpreter(), pytest.raises(ValueError, match=rf"positions: {position} has no row .* 0 to 4"):
        octavo.rotary_embedding(q, None, torch.tensor([1, position]), table)
    assert torch.equal(q, torch.ones(2, 1, 8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck_and_compile(device, interleaved):
    table = octavo.rotary_cos_sin_cache(24, 9, device=device)
    _, q, k, _ = heads_of_a_projection(4, 3, 2, 32, device=device)
    positions = torch.arange(4, device=device)

    def call(query, key, positions, table):
        octavo.rotary_embedding(query, key, positions, table, interleaved=interleaved)

    for key in (k, k.clone(), None):
        args = (q, key, positions, table)
        check_op("rotary_embedding", call, (*args, interleaved), *args)


def test_compiled_with_query_and_key_in_one_buffer(device):
    table = octavo.rotary_cos_sin_cache(32, 9, device=device)
    positions = torch.arange(3, device=device)

    def call(fused):
        q, k, v = (part.unflatten(-1, (-1, 32)) for part in (2 * fused).split([96, 32, 32], -1))
        octavo.rotary_embedding(q, k, positions, table)
        return q, k, v

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    fused = torch.randn(3, 160, device=device)
    for traced, eager in zip(compiled(fused), call(fused), strict=True):
        assert torch.equal(traced, eager)


@pytest.mark.gpu
def test_graph_capture_and_replay_with_other_positions():
    table = octavo.rotary_cos_sin_cache(128, 64, device="cuda")
    fused, q, k, _ = heads_of_a_projection(4, 8, 2, 128, device="cuda", dtype=torch.bfloat16)
    positions = torch.zeros(4, device="cuda", dtype=torch.int64)
    octavo.rotary_embedding(q, k, positions, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        octavo.rotary_embedding(q, k, positions, table)
    fused.normal_()
    positions.copy_(torch.tensor([7, -1, 63, 2]))
    expected_q, expected_k = q.clone(), k.clone()
    octavo.rotary_embedding(expected_q, expected_k, positions, table)
    graph.replay()
    assert torch.equal(q, expected_q) and torch.equal(k, expected_k)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_offsets_beyond_int32(interleaved):
    far = 2**31 + 64
    q, k = (torch.empty(2, far, device="cuda", dtype=torch.float16)[:, None, :64] for _ in range(2))
    table = torch.empty(2, far, device="cuda", dtype=torch.float16)[:, :64]
    for x in (q, k, table):
        x.normal_()
    near_q, near_k = q.contiguous(), k.contiguous()
    positions = torch.tensor([0, 1], device="cuda")
    octavo.rotary_embedding(near_q, near_k, positions, table.contiguous(), interleaved=interleaved)
    octavo.rotary_embedding(q, k, positions, table, interleaved=interleaved)
    assert torch.equal(q, near_q) and torch.equal(k, near_k)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(query=torch.zeros(2, 4, 8, dtype=torch.int32)), TypeError, "query: dtype int32 is not accepted"),
        (dict(query=torch.zeros(2, 32)), ValueError, r"query: shape \(2, 32\) has 2 dimensions; expected 3"),
        (dict(query=torch.zeros(2, 8, 4).mT), ValueError, "query: the last dimension has stride 4"),
        (dict(query=torch.zeros(2, 1, 8).expand(2, 4, 8)), ValueError, "query: strides .* are an expanded view"),
        (dict(key=torch.zeros(2, 2, 8).half()), TypeError, "key: dtype float16 is not accepted; expected float32"),
        (dict(key=torch.zeros(2, 2, 6)), ValueError, r"key: shape \(2, 2, 6\); expected \(2, 2, 8\)"),
        (dict(key=torch.zeros(1, 2, 8)), ValueError, r"key: shape \(1, 2, 8\); expected \(2, 2, 8\)"),
        (dict(key=torch.zeros(1, 2, 8).expand(2, 2, 8)), ValueError, "key: strides .* are an expanded view"),
        (dict(key=torch.zeros(2, 2, 8, device="meta")), ValueError, "key: on meta, but query is on cpu"),
        (dict(positions=torch.zeros(2)), TypeError, "positions: dtype float32"),
        (dict(positions=torch.zeros(3, dtype=torch.int32)), ValueError, r"positions: shape \(3,\); expected \(2,\)"),
        (dict(positions=torch.arange(4)[::2]), ValueError, "positions: the last dimension has stride 2"),
        (dict(positions=torch.zeros(2, dtype=torch.int32, device="meta")), ValueError, "positions: on meta"),
        (dict(cos_sin_cache=torch.zeros(9, 8).double()), TypeError, "cos_sin_cache: dtype float64"),
        (dict(cos_sin_cache=torch.zeros(9)), ValueError, r"cos_sin_cache: shape \(9,\) has 1 dimensions; expected 2"),
        (dict(cos_sin_cache=torch.zeros(8, 9).t()), ValueError, "cos_sin_cache: the last dimension has stride 9"),
        (dict(cos_sin_cache=torch.zeros(9, 8, device="meta")), ValueError, "cos_sin_cache: on meta"),
        (dict(cos_sin_cache=torch.zeros(9, 7)), ValueError, "has rotary_dim 7; expected an even number"),
        (dict(cos_sin_cache=torch.zeros(9, 10)), ValueError, r"has rotary_dim 10; expected .* head_size \(8\)"),
        (dict(cos_sin_cache=torch.zeros(9, 0)), ValueError, "has rotary_dim 0; expected"),
    ],
)
def test_errors(change, error, message):
    args = dict(
        query=torch.zeros(2, 4, 8),
        key=torch.zeros(2, 2, 8),
        positions=torch.zeros(2, dtype=torch.int64),
        cos_sin_cache=torch.zeros(9, 8),
    )
    with pytest.raises(error, match=message):
        octavo.rotary_embedding(**(args | change))


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for head_size, heads in ((10, 1), (64, 9), (80, 32), (128, 32), (256, 8), (512, 1)):
        q = torch.empty(8, heads, head_size, device="meta", dtype=dtype)
        positions = torch.empty(8, device="meta", dtype=torch.int64)
        table = torch.empty(64, head_size, device="meta")
        for interleaved in (False, True):
            rope._rotary_embedding_cuda(q, torch.empty_like(q), positions, table, interleaved)
    rope._rotary_embedding_cuda(q, None, positions, table, False)
