import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import octavo
from octavo import reference
from octavo.kernels.attention import merge
from octavo.testing import assert_accurate, check_op


def parts(tokens, heads, d, *, device="cpu", dtype=torch.float32):
    """Two parts, views into wider buffers, each with rows that have no keys and hold NaN."""
    made = []
    for start in (0, 1):
        out = torch.randn(tokens, heads + 2, d, device=device).to(dtype)[:, 1 : heads + 1]
        lse = (
            (3 * torch.randn(heads, tokens, device=device)).t()
            if start
            else 3 * torch.randn(tokens, heads, device=device)
        )
        empty = torch.zeros(tokens, heads, dtype=torch.bool, device=device)
        empty.view(-1)[start::3] = True
        empty.view(-1)[::7] = True
        out[empty], lse[empty] = torch.nan, -torch.inf
        made += [out, lse]
    return made


def definition(out_a, lse_a, out_b, lse_b, dtype):
    lse = torch.stack([lse_a, lse_b]).to(dtype)
    weights = (lse - lse.amax(0)).exp().nan_to_num()
    out = torch.stack([out_a, out_b]).to(dtype).nan_to_num() * weights[..., None]
    return (out.sum(0) / weights.sum(0).clamp(min=1e-30)[..., None]).nan_to_num(), lse.logsumexp(0)


def check(tensors, function=octavo.merge_attention_states):
    out, lse = function(*tensors)
    assert out.is_contiguous() and out.dtype == tensors[0].dtype and lse.is_contiguous() and lse.dtype == torch.float32
    exact = definition(*tensors, torch.float64)
    assert_accurate(out, exact[0], definition(*tensors, out.dtype)[0])
    assert_accurate(lse, exact[1], definition(*tensors, torch.float32)[1])
    return out, lse


@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 256])
def test_head_sizes(device, dtype, d):
    check(parts(11, 3, d, device=device, dtype=dtype))


@given(tokens=st.integers(0, 40), heads=st.integers(1, 9), d=st.integers(1, 70), half=st.booleans())
def test_any_shape(tokens, heads, d, half):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = parts(tokens, heads, d, device=device, dtype=torch.float16 if half else torch.float32)
    check(tensors)
    check(tensors, reference.attention.merge_attention_states)


@pytest.mark.parametrize("function", [octavo.merge_attention_states, reference.attention.merge_attention_states])
def test_rows_without_keys(device, dtype, function):
    out_a, lse_a, out_b, lse_b = parts(7, 6, 16, device=device, dtype=dtype)
    out, lse = function(out_a, lse_a, out_b, lse_b)
    a, b = lse_a == -torch.inf, lse_b == -torch.inf
    assert (a & b).any() and (a & ~b).any() and (b & ~a).any()
    assert out[a & b].eq(0).all() and lse[a & b].eq(-torch.inf).all()
    assert torch.equal(out[a & ~b], out_b[a & ~b]) and torch.equal(lse[a & ~b], lse_b[a & ~b]), "a copy, to the bit"
    assert torch.equal(out[b & ~a], out_a[b & ~a]) and torch.equal(lse[b & ~a], lse_a[b & ~a])


def test_logarithms_of_any_size(device, dtype):
    tensors = parts(9, 4, 16, device=device, dtype=dtype)
    for shift in (-1e5, 1e5):
        check([x + shift if x.dim() == 2 else x for x in tensors])
    far = [x.clone() for x in tensors]
    far[1] += 1e6
    check(far)


@pytest.mark.parametrize("options", [{}, dict(softcap=3.0), dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))], ids=str)
def test_parts_of_paged_attention(device, dtype, options):
    """Attention over the first 20 keys and over the other 14 of them, merged, is that over all."""
    query = torch.randn(5, 4, 32, device=device, dtype=dtype)
    k_cache, v_cache = torch.randn(2, 10, 4, 2, 32, device=device, dtype=dtype)
    sinks = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}

    def attend(pages, keys, dtype=dtype, function=octavo.paged_attention, **options):
        return function(
            query.to(dtype),
            k_cache.to(dtype),
            v_cache.to(dtype),
            torch.tensor([pages], device=device, dtype=torch.int32),
            torch.tensor([keys], device=device, dtype=torch.int32),
            torch.tensor([0, 5], device=device, dtype=torch.int32),
            max_seqlen_q=5,
            causal=False,
            return_lse=True,
            **options,
        )

    whole = attend([3, 1, 9, 0, 5, 2, 8, 7, 6], 34, torch.float32, **sinks)
    first = attend([3, 1, 9, 0, 5], 20, **sinks)
    second = attend([2, 8, 7, 6], 14, **{name: o for name, o in sinks.items() if name != "sinks"})
    out, lse = octavo.merge_attention_states(*first, *second)
    assert_accurate(out, whole[0].double(), reference.attention.merge_attention_states(*first, *second)[0])
    assert_accurate(lse, whole[1].double(), reference.attention.merge_attention_states(*first, *second)[1])


def test_opcheck_and_compile(device):
    tensors = tuple(x.nan_to_num(neginf=0.0) for x in parts(4, 3, 16, device=device))
    check_op("merge_attention_states", octavo.merge_attention_states, tensors, *tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(out_a=torch.zeros(3, 2, 8).int()), TypeError, "out_a: dtype int32 is not accepted"),
        (dict(out_a=torch.zeros(3, 16)), ValueError, r"out_a: shape \(3, 16\); expected \[tokens, heads, head_size\]"),
        (dict(out_a=torch.zeros(3, 2, 0)), ValueError, r"out_a: shape \(3, 2, 0\)"),
        (dict(out_a=torch.zeros(3, 8, 2).mT), ValueError, "out_a: the last dimension has stride 2"),
        (dict(out_b=torch.zeros(3, 2, 8).half()), TypeError, "out_b: dtype float16"),
        (dict(out_b=torch.zeros(3, 1, 8)), ValueError, r"out_b: shape \(3, 1, 8\); expected \(3, 2, 8\)"),
        (dict(out_b=torch.zeros(3, 8, 2).mT), ValueError, "out_b: the last dimension has stride 2"),
        (dict(out_b=torch.zeros(3, 2, 8, device="meta")), ValueError, "out_b: on meta, but out_a is on cpu"),
        (dict(lse_a=torch.zeros(3, 2).half()), TypeError, "lse_a: dtype float16"),
        (dict(lse_b=torch.zeros(2, 3)), ValueError, r"lse_b: shape \(2, 3\); expected \(3, 2\): \[tokens, heads\]"),
        (dict(lse_b=torch.zeros(3, 2, device="meta")), ValueError, "lse_b: on meta, but out_a is on cpu"),
    ],
)
def test_errors(change, error, message):
    out, lse = torch.zeros(3, 2, 8), torch.zeros(3, 2)
    with pytest.raises(error, match=message):
        octavo.merge_attention_states(**dict(out_a=out, lse_a=lse, out_b=out, lse_b=lse) | change)


@pytest.mark.gpu
def test_graph_capture_and_replay(dtype):
    tensors = parts(20, 8, 128, device="cuda", dtype=dtype)
    octavo.merge_attention_states(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = octavo.merge_attention_states(*tensors)
    for held, fresh in zip(tensors, parts(20, 8, 128, device="cuda", dtype=dtype), strict=True):
        held.copy_(fresh)
    graph.replay()
    expected = octavo.merge_attention_states(*tensors)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.gpu
def test_rows_beyond_int32():
    out = torch.randn(2**17 + 1, 64, 256, device="cuda", dtype=torch.float16)  # past 2³¹ elements
    lse = torch.zeros(out.shape[:2], device="cuda")
    merged, sums = octavo.merge_attention_states(out, lse, out, lse)
    assert torch.equal(merged[-3:], out[-3:]) and sums[-3:].sub(0.6931472).abs().max() < 1e-6


def launches(dtype):
    """Every tile choice that ships, on meta tensors: tests/test_compile.py compiles them."""
    for d in (64, 80, 128, 256):
        out = torch.empty(9, 32, d, device="meta", dtype=dtype)
        lse = torch.empty(9, 32, device="meta")
        merge._merge_attention_states_cuda(out, lse, out, lse)
