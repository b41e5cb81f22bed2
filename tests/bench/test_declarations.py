"""The benchmarks' declarations: shapes and sizes against numbers worked out by hand, providers against `exact`."""

import functools
import inspect
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import octavo
from octavo.bench import bench_write_kv, experts, paged_inputs, providers, quantized_experts, shapes, weight_only
from octavo.bench.check import difference, tensors
from octavo.bench.harness import LeftOut, Provider, Unsupported, benchmarks, label, load, parse_label
from octavo.testing import OPS, without_interpreter

CPU = torch.device("cpu")


def quantized(dimension):
    variants = ((0, 256), (1, 256), (0, 128), (0, 0), (1, 0))
    return [{"T": 3, dimension: 256, "int8": int8, "group": group} for int8, group in variants]


MIXED = {"chunks": 2, "chunk_q": 5, "chunk_ctx": 21}

# Small enough for a CPU, with odd sizes where the op allows them.
TINY = {
    "rms_norm": [{"T": 3, "hidden": 71}],
    "add_rms_norm": [{"T": 3, "hidden": 71}],
    "layer_norm": [{"T": 3, "hidden": 71}],
    "silu_and_mul": [{"T": 3, "intermediate": 45}],
    "gelu_and_mul": [{"T": 3, "intermediate": 45, "tanh": 0}, {"T": 3, "intermediate": 45, "tanh": 1}],
    "quantize_fp8": [{"T": 3, "hidden": 256, "group": group} for group in (256, 128, 0)],
    "quantize_int8": [{"T": 3, "hidden": 256, "group": group} for group in (256, 128, 0)],
    "rms_norm_quantize": quantized("hidden"),
    "add_rms_norm_quantize": quantized("hidden"),
    "silu_and_mul_quantize": quantized("intermediate"),
    "gelu_and_mul_quantize": quantized("intermediate"),
    "relu2": [{"T": 3, "intermediate": 45}],
    "rotary_embedding": [{"T": 5, "heads": 6, "kv_heads": 2, "D": 16}],
    "write_kv": [{"T": 7, "kv_heads": 2, "D": 8, "page": 4}],
    "rotary_embedding_write_kv": [
        {"T": 5, "heads": 6, "kv_heads": 2, "D": 16, "page": 4, "norm": norm, "fp8": fp8}
        for norm, fp8 in ((0, 0), (0, 1), (1, 0), (1, 1))
    ],
    "paged_attention": [
        {"B": b, "q": q, "ctx": ctx, "heads": 6, "kv_heads": 2, "D": 16, "page": page, "window": window}
        for b, q, ctx, page, window in (
            (3, 1, 37, 16, 0),
            (3, 1, 37, 16, 9),
            (1, 1, 5, 16, 9),
            (2, 21, 21, 4, 0),
            (2, 5, 21, 4, 0),
            (2, 5, 21, 4, 7),
        )
    ]
    + [
        {"B": 3, "q": 1, "ctx": 37, "heads": 6, "kv_heads": 2, "D": 16, "page": 16, "window": 0} | more
        for more in ({"fp8": 1}, {"int8": 1}, {"long": 61}, MIXED)
    ],
    "merge_attention_states": [{"T": 5, "heads": 3, "D": 16}],
    "cascade_attention": [
        {"B": b, "q": q, "prefix": prefix, "own": own, "heads": 6, "kv_heads": 2, "D": 16, "page": 4}
        for b, q, prefix, own in ((3, 1, 20, 9), (2, 5, 12, 7), (1, 1, 4, 1))
    ],
    "linear": [{"M": 3, "N": 48, "K": 256, "gated": gated} for gated in (0, 1)],
    "gemv": [{"M": 3, "N": 40, "K": 256, "gated": gated} for gated in (0, 1)],
    "int4_linear": [{"M": 3, "N": 40, "K": 256, "group": 128}],
    "int8_linear": [{"M": 3, "N": 40, "K": 256, "group": 128}, {"M": 3, "N": 40, "K": 256, "group": 256}],
    "int8_int8_linear": [{"M": 3, "N": 40, "K": 256}],
    "int4_int8_linear": [{"M": 3, "N": 40, "K": 256, "group": 128}],
    "fp8_linear": [{"M": 3, "N": 140, "K": 256, "block": block} for block in (0, 128)],
    "moe_route": [{"T": 5, "E": 12, "top_k": 3, "groups": 0}, {"T": 5, "E": 24, "top_k": 3, "groups": 4}],
    "moe_permute": [{"T": 7, "E": 5, "top_k": 2, "hidden": 12}],
    "moe_unpermute": [{"T": 7, "E": 5, "top_k": 3, "hidden": 13}],
    "grouped_linear": [{"T": 7, "E": 5, "busy": 5, "top_k": 2, "hidden": 32, "intermediate": 24}],
    "fused_moe": [
        {"T": t, "E": 5, "busy": busy, "top_k": 2, "hidden": 32, "intermediate": 24}
        for t, busy in ((7, 5), (7, 2), (3, 4))
    ]
    + [
        {"T": 7, "E": 3, "busy": 3, "top_k": 2, "hidden": 256, "intermediate": 128} | scheme
        for scheme in (*quantized_experts.SCHEMES, {"bits": 4, "group": 32})
    ],
    "sample": [
        {"B": 3, "vocab": 100, "k": k, "p": p, "flat": flat}
        for k, p, flat in ((5, 90, 0), (0, 50, 1), (7, 100, 1), (0, 100, 0))
    ],
}

# One shape of each benchmark: its label, flops, and bytes in bfloat16, from the op's definition.
BY_HAND = {
    "rms_norm": ("T=64,hidden=4096", 4 * 262144, 2 * (262144 + 262144 + 4096)),
    "add_rms_norm": ("T=64,hidden=4096", 5 * 262144, 2 * (4 * 262144 + 4096)),
    "layer_norm": ("T=64,hidden=4544", 7 * 290816, 2 * 2 * (290816 + 4544)),
    "silu_and_mul": ("T=16,intermediate=14336", 5 * 229376, 2 * (2 * 229376 + 229376)),
    "gelu_and_mul": ("T=1,intermediate=14336,tanh=0", 6 * 14336, 2 * (2 * 14336 + 14336)),
    # A byte an element, and 64 or 64·32 fp32 scales, or one.
    "quantize_fp8": ("T=1024,hidden=4096,group=128", 3 * 4194304, 3 * 4194304 + 4 * 32768),
    "quantize_int8": ("T=64,hidden=4096,group=4096", 3 * 262144, 3 * 262144 + 4 * 64),
    "rms_norm_quantize": ("T=64,hidden=4096,int8=0,group=4096", 6 * 262144, 3 * 262144 + 8192 + 4 * 64),
    "add_rms_norm_quantize": ("T=1,hidden=4096,int8=0,group=128", 7 * 4096, 7 * 4096 + 8192 + 4 * 32),
    "silu_and_mul_quantize": ("T=16,intermediate=14336,int8=0,group=14336", 7 * 229376, 5 * 229376 + 4 * 16),
    "gelu_and_mul_quantize": ("T=1,intermediate=14336,int8=0,group=0", 12 * 14336, 5 * 14336 + 4),
    "relu2": ("T=1,intermediate=18176", 36352, 72704),
    # 40 heads of 64 pairs, 6 operations a pair; 5,120 elements in and out, an 8-byte position, 128 fp32 of the table.
    "rotary_embedding": ("T=1,heads=32,kv_heads=8,D=128", 40 * 64 * 6, 2 * 2 * 5120 + 8 + 512),
    "write_kv": ("T=16,kv_heads=8,D=128,page=16", 0, 16 * (2 * 2 * 2 * 1024 + 8)),
    # As rotary_embedding, and 4 operations an element for the norm, 1 for the scale of a key's or value's; 4,096
    # elements in and out, 2,048 in, as many bytes out, position, slot and the table's row; two weights and two scales.
    "rotary_embedding_write_kv": (
        "T=1,heads=32,kv_heads=8,D=128,page=16,norm=1,fp8=1",
        40 * 64 * 6 + 4 * 5120 + 2048,
        2 * 2 * 4096 + 2 * 2048 + 2048 + 16 + 512 + 2 * 2 * 128 + 2 * 4,
    ),
    # 65,536 pairs of 32 heads; as many keys and values, query and output of 16; 4,096 pages, 16 lengths, 17 starts.
    "paged_attention": (
        "B=16,q=1,ctx=4096,heads=32,kv_heads=8,D=128,page=16,window=0",
        65536 * 32 * 2 * 256,
        2 * 65536 * 8 * 128 * 2 + 2 * 16 * 4096 * 2 + 4 * (4096 + 16 + 17),
    ),
    # 262,144 elements, and 2,048 rows with three logarithms each.
    "merge_attention_states": ("T=64,heads=32,D=128", 3 * 262144, 2 * 3 * 262144 + 4 * 3 * 2048),
    # 64 sequences of 4,352 visible keys, of which 4,096 are read once and 256 of each; 256 pages and 64 times 16, 1
    # length and 64, 65 starts.
    "cascade_attention": (
        "B=64,q=1,prefix=4096,own=256,heads=32,kv_heads=8,D=128,page=16",
        64 * 4352 * 32 * 2 * 256,
        2 * (4096 + 64 * 256) * 8 * 128 * 2 + 2 * 64 * 4096 * 2 + 4 * (256 + 64 * 16 + 1 + 64 + 65),
    ),
    # A nibble a weight; 32 groups of 4096 inputs.
    "int4_linear": ("M=1,N=6144,K=4096,group=128", 50331648, 12582912 + 2 * (4096 + 32 * 6144 + 6144)),
    # 16 bytes of logits a token, and 16 of weights and ids.
    "moe_route": ("T=64,E=8,top_k=2,groups=0", 64 * 8 * 2, 64 * (16 + 16)),
    # A row in, two out; an id and a position a pair, nine offsets.
    "moe_permute": ("T=16,E=8,top_k=2,hidden=4096", 32, 2 * 16 * 3 * 4096 + 4 * (32 + 32 + 9)),
    "moe_unpermute": ("T=16,E=8,top_k=2,hidden=4096", 4 * 65536, 2 * 16 * 3 * 4096 + 8 * 32),
    # A token goes to 2 of 8 experts, each with 117,440,512 weights of gate and up; 2 rows in and out, nine offsets.
    "grouped_linear": (
        "T=1,E=8,busy=8,top_k=2,hidden=4096,intermediate=14336",
        2 * 2 * 117440512,
        2 * (2 * 117440512 + 2 * (4096 + 28672)) + 4 * 9,
    ),
    # 16 tokens that all have the same 2 of 8 experts, each with 176,160,768 weights; tokens in and out, 8 logits each.
    "fused_moe": (
        "T=16,E=8,busy=2,top_k=2,hidden=4096,intermediate=14336",
        16 * 2 * 2 * 176160768,
        2 * (2 * 176160768 + 16 * (2 * 4096 + 8)),
    ),
    # 36 bytes of settings, seed, position and token a row.
    "sample": ("B=64,vocab=32000,k=50,p=90,flat=0", 4 * 2048000, 2 * 2048000 + 64 * 36),
    # Two bytes a weight, an input, and an output, of which there are half as many as rows of weights.
    "linear": ("M=16,N=28672,K=4096,gated=1", 16 * 234881024, 2 * (117440512 + 16 * (4096 + 14336))),
    "gemv": ("M=1,N=28672,K=4096,gated=1", 234881024, 2 * (117440512 + 4096 + 14336)),
    # A byte a weight and an activation, two an output; a scale a token and an output, or 64 a token and 64·64.
    "int8_int8_linear": ("M=16,N=8192,K=8192", 2147483648, 67108864 + 131072 + 2 * 131072 + 4 * (16 + 8192)),
    # A nibble a weight, a byte an activation, two an output and a weight's scale; fp32 scales of tokens.
    "int4_int8_linear": (
        "M=16,N=6144,K=4096,group=128",
        805306368,
        12582912 + 65536 + 4 * 16 + 2 * (32 * 6144 + 16 * 6144),
    ),
    "fp8_linear": (
        "M=16,N=8192,K=8192,block=128",
        2147483648,
        67108864 + 131072 + 2 * 131072 + 4 * (16 * 64 + 64 * 64),
    ),
    "int8_linear": ("M=16,N=8192,K=8192,group=8192", 2147483648, 67108864 + 2 * (131072 + 8192 + 131072)),
}

PAIRS = [(name, shape) for name, tiny in TINY.items() for shape in tiny]
IDS = [f"{name}-{label(shape)}" for name, shape in PAIRS]


@pytest.fixture(autouse=True)
def _reference():
    with without_interpreter():
        yield


def draw(name, shape, dtype=torch.float32, seed=0):
    return load(name).inputs(shape, dtype, CPU, torch.Generator().manual_seed(seed))


def observed(name, result, inputs):
    return getattr(load(name), "observe", lambda result, inputs: result)(result, inputs)


def same(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a.keys() | b.keys())


def copy(inputs):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def test_every_op_has_a_benchmark():
    """plan_attention has none: its peers plan on the host, and what it is for shows in paged_attention's."""
    assert set(benchmarks()) == set(OPS) - {"plan_attention"} | {"cascade_attention"} == set(TINY) == set(BY_HAND)


@pytest.mark.parametrize("name", benchmarks())
def test_contract(name):
    module = load(name)
    assert name == module.OP and hasattr(octavo, name)
    assert module.DTYPES and all(isinstance(dtype, torch.dtype) for dtype in module.DTYPES)
    expected = {
        "shapes": [],
        "inputs": ["shape", "dtype", "device", "generator"],
        "exact": ["inputs"],
        "flops": ["shape"],
        "bytes_moved": ["shape", "dtype"],
    }
    for function, parameters in expected.items():
        assert list(inspect.signature(getattr(module, function)).parameters) == parameters, function
    providers = module.PROVIDERS
    assert all(isinstance(p, Provider) and p.package for p in providers.values())
    first, second = list(providers)[:2]
    assert first == "octavo" and second.split(" ")[0] == "torch"
    peers = [p.peer for p in providers.values()]
    assert peers == sorted(peers, key=lambda peer: peer is not None), "what runs beside octavo comes first"
    assert set(peers) <= {None, "flashinfer", "vllm", "triton-peers"} and any(peers)
    assert "vllm" in peers or name in ("layer_norm", "grouped_linear", "gemv"), "it has none"
    on_cpu = [n for n, p in providers.items() if "cpu" in p.devices]
    assert on_cpu == [*list(providers)[:2], *(n for n in providers if n in ("octavo, separate", "octavo, plain"))]
    assert all("cuda" in p.devices for p in providers.values())


@pytest.mark.parametrize("name", benchmarks())
def test_shapes(name):
    module = load(name)
    labels = [label(shape) for shape in module.shapes()]
    assert len(set(labels)) == len(labels) > 1
    assert [parse_label(text) for text in labels] == module.shapes()
    first = tuple(module.shapes()[0])
    assert all(tuple(shape)[: len(first)] == first for shape in module.shapes()), "the same dimensions, in one order"
    assert name in ("paged_attention", "fused_moe") or all(len(shape) == len(first) for shape in module.shapes())
    for shape in module.shapes():
        assert shapes.models_of(shape), shape
        for dtype in module.DTYPES:
            assert type(module.flops(shape)) is int and type(module.bytes_moved(shape, dtype)) is int
            assert module.bytes_moved(shape, dtype) > 0
            assert module.flops(shape) > 0 or name == "write_kv"


@pytest.mark.parametrize("name", benchmarks())
def test_flops_and_bytes_by_hand(name):
    module = load(name)
    text, flops, size = BY_HAND[name]
    assert text in [label(shape) for shape in module.shapes()]
    assert module.flops(parse_label(text)) == flops
    assert module.bytes_moved(parse_label(text), torch.bfloat16) == size


def test_attention_counts_visible_pairs():
    module = load("paged_attention")
    for shape in TINY["paged_attention"]:
        pairs, read = 0, 0
        chunks = [(shape["chunk_q"], shape["chunk_ctx"])] * shape["chunks"] if "chunks" in shape else []
        alike = [(shape["q"], shape["ctx"])] * (shape["B"] - 1)
        both = [(shape["q"], shape.get("long", shape["ctx"])), *alike, *chunks]
        for new, length in both:
            at = torch.arange(length - new, length)[:, None]
            keys = torch.arange(length)
            seen = (keys <= at) & (keys > at - (shape["window"] or length))
            pairs += int(seen.sum())
            read += int(seen.any(0).sum())
        assert module.visible_pairs(shape) == pairs
        rows = sum(new for new, _ in both)
        of_head = shape["D"] if "fp8" in shape else shape["D"] + 4 if "int8" in shape else 2 * shape["D"]
        floor = 4 * rows * shape["heads"] * shape["D"] + 2 * read * shape["kv_heads"] * of_head
        assert 0 < module.bytes_moved(shape, torch.float16) - floor < 4 * (read + 2 * len(both) + 2)


@pytest.mark.parametrize(("name", "shape"), PAIRS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_runs_without_peers_is_right(name, shape, dtype):
    module = load(name)
    inputs = draw(name, shape, dtype)
    exact = module.exact(inputs)
    assert same(inputs, draw(name, shape, dtype)), "exact changes its inputs"
    for provider in [p for p in module.PROVIDERS.values() if "cpu" in p.devices]:
        if unsupported(name, shape, provider):
            continue
        call = provider.make(copy(inputs))
        assert difference(observed(name, call(), inputs), exact) is None
    if module.OP.startswith("quantize") or module.OP.endswith("quantize"):
        q, *others = call()
        word = q.view(torch.uint8)
        assert difference((torch.where(word % 8 == 0, word + 1, word).view(q.dtype), *others), exact)
        return
    nudged = tuple(t + torch.where(t == 0, 0, 0.1 * t) if t.is_floating_point() else t for t in tensors(exact))
    assert difference(tuple(t.to(dtype) for t in nudged), exact), "the rule cannot fail on these inputs"


def unsupported(name, shape, provider):
    """torch's dense attention has one length and number of queries, with a window one query, no quantised cache; of
    layers of experts only the first provider has quantised ones."""
    if name == "fused_moe":
        return "bits" in shape and provider is not load(name).PROVIDERS["octavo"]
    if name != "paged_attention":
        return False
    if not {"fp8", "int8", "long", "chunks"} & set(shape) and (not shape["window"] or shape["q"] == 1):
        return False
    return provider is load(name).PROVIDERS["torch (dense K/V)"]


def test_what_torch_cannot_compute_it_says():
    for shape in TINY["paged_attention"]:
        for name in ("torch (dense K/V)", "torch cuDNN (dense K/V)"):
            provider = load("paged_attention").PROVIDERS[name]
            inputs = draw("paged_attention", shape, torch.bfloat16)
            prefill = shape["q"] == shape["ctx"] and not shape["window"]
            fits = prefill if "cuDNN" in name else not unsupported("paged_attention", shape, provider)
            with nullcontext() if fits else pytest.raises(Unsupported):
                provider.make(inputs)


def test_a_mixed_batch_in_two_calls():
    """The decode tokens and the chunks, each computed alone, are the batch; other batches are not divided."""
    module = load("paged_attention")
    shape = {**TINY["paged_attention"][0], "long": 61, **MIXED}
    inputs = draw("paged_attention", shape)
    assert inputs["cu_seqlens_q"].tolist() == [0, 1, 2, 3, 8, 13] and inputs["cu_seqlens_q"].dtype == torch.int32
    assert inputs["seq_lens"].tolist() == [61, 37, 37, 21, 21]
    assert (inputs["max_seqlen_q"], inputs["max_seqlen_k"]) == (5, 61)
    decodes, chunks = paged_inputs.apart(inputs)
    assert (decodes["max_seqlen_q"], decodes["max_seqlen_k"], decodes["cu_seqlens_q"].tolist()) == (1, 61, [0, 1, 2, 3])
    assert (chunks["max_seqlen_q"], chunks["max_seqlen_k"], chunks["cu_seqlens_q"].tolist()) == (5, 21, [0, 5, 10])
    for part in (decodes, chunks):
        assert difference(module.PROVIDERS["octavo"].make(part)(), module.exact(part)) is None
    torch.testing.assert_close(torch.cat([module.exact(decodes), module.exact(chunks)]), module.exact(inputs))
    for part in (decodes, draw("paged_attention", TINY["paged_attention"][4])):
        with pytest.raises(Unsupported, match="mixed batches only"):
            paged_inputs.apart(part)


@pytest.mark.parametrize(("name", "shape"), PAIRS, ids=IDS)
def test_compiled_formulas_are_right_and_whole(name, shape, monkeypatch):
    """As one graph, without the backend that needs a compiler."""
    provider = load(name).PROVIDERS.get("torch.compile")
    if provider is None:
        assert name.endswith(("paged_attention", "cascade_attention", "_linear", "_moe")), "bound by memory"
        return
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    inputs = draw(name, shape)
    exact = load(name).exact(inputs)
    call = provider.make(inputs)
    assert difference(observed(name, call(), inputs), exact) is None


def test_many_shapes_compile_past_the_recompile_limit(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in range(1, 8):
            x = torch.arange(float(size))
            assert torch.equal(providers.compiled(square, x)(), x * x)


def square(x):
    return x * x


def test_not_every_number_of_tokens_is_compiled_for():
    for tokens in shapes.TOKENS:
        x = torch.ones(tokens, 1)
        with nullcontext() if tokens in (1, 64, 1024, 8192) else pytest.raises(LeftOut, match="T = 1, 64, 1024, 8192"):
            providers.compiled(square, x)
    providers.compiled(square, torch.ones(17, 1))  # asked for by name
    counts = {tanh: [s["T"] for s in load("gelu_and_mul").shapes() if s["tanh"] == tanh] for tanh in (0, 1)}
    assert set(counts[0]) == {1, 1024, 8192} and set(counts[1]) == set(shapes.TOKENS)


@pytest.mark.parametrize(("name", "shape"), PAIRS, ids=IDS)
def test_inputs_follow_the_generator(name, shape):
    first, again, other = draw(name, shape), draw(name, shape), draw(name, shape, seed=1)
    assert same(first, again)
    tensors = {k: v for k, v in first.items() if isinstance(v, torch.Tensor)}
    drawn = [k for k, v in tensors.items() if v.is_floating_point() and v.numel() > 1]  # one number is a given scale
    if name.startswith("rotary_embedding"):
        drawn.remove("cos_sin_cache")
    for key in drawn:
        assert not torch.equal(first[key], other[key]), key
        assert (first[key] != 0).float().mean() > 0.9, f"{key} holds zeros"


def test_what_filters_leave_out_is_seen():
    module = load("sample")
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4, -1)
    every = torch.arange(4)
    for k, p, kept in ((2, 1.0, [0, 0, 1, 1]), (0, 0.9, [0, 1, 1, 1]), (3, 0.7, [0, 0, 1, 1]), (3, 0.6, [0, 0, 0, 1])):
        assert module.observe(every, {"logits": logits, "k": k, "p": p}).tolist() == [bool(x) for x in kept]
    outside = torch.tensor([-1, 4, 3, 2**40])
    assert module.observe(outside, {"logits": logits, "k": 0, "p": 1.0}).tolist() == [False, False, True, False]


def test_scattered_indices():
    inputs = draw("write_kv", {"T": 64, "kv_heads": 1, "D": 8, "page": 16})
    slots, room = inputs["slots"], inputs["key_cache"].shape[0] * 16
    assert slots.unique().numel() == 64 and slots.min() >= 0 and slots.max() < room
    assert not torch.equal(slots.sort().values, slots)
    inputs = draw("paged_attention", {**TINY["paged_attention"][0], "B": 4, "ctx": 256})
    table = inputs["block_table"]
    assert torch.equal(table.flatten().sort().values, torch.arange(64, dtype=torch.int32))
    assert not torch.equal(table.flatten(), torch.arange(64, dtype=torch.int32))
    positions = draw("rotary_embedding", TINY["rotary_embedding"][0])["positions"]
    assert positions.unique().numel() == positions.numel()


def test_experts_that_tokens_go_to():
    shape = {"T": 4, "E": 8, "busy": 8, "top_k": 2, "hidden": 4, "intermediate": 4}
    module, generator = load("fused_moe"), torch.Generator().manual_seed(0)
    hit = [
        module.inputs(shape, torch.bfloat16, CPU, generator)["topk_ids"].unique().numel() / experts.hit(shape)
        for _ in range(300)
    ]
    assert abs(sum(hit) / len(hit) - 1) < 0.02
    assert experts.hit(shape | {"T": 1}) == experts.hit(shape | {"busy": 2}) == 2
    for busy in (2, 7):
        ids = module.inputs(shape | {"T": 300, "busy": busy}, torch.bfloat16, CPU, generator)["topk_ids"]
        assert ids.unique().tolist() == list(range(busy))


@pytest.mark.parametrize(
    ("name", "provider"),
    [("fused_moe", "torch (loop)"), ("fused_moe", "octavo, routed"), ("grouped_linear", "torch (loop)")],
)
def test_what_is_for_a_gpu_alone_is_right_too(name, provider):
    for shape in TINY[name]:
        if "bits" in shape and provider == "torch (loop)":
            continue
        inputs = draw(name, shape, torch.bfloat16)
        assert difference(load(name).PROVIDERS[provider].make(inputs)(), load(name).exact(inputs)) is None


def test_in_place_calls_stay_finite():
    for name in ("add_rms_norm", "rotary_embedding", "rotary_embedding_write_kv"):
        call = load(name).PROVIDERS["octavo"].make(draw(name, TINY[name][0], torch.bfloat16))
        for _ in range(3000):
            result = call()
        assert all(t.isfinite().all() and t.abs().max() < 1e5 for t in result), name


def test_writes_leave_other_slots_alone():
    inputs = draw("write_kv", TINY["write_kv"][0])
    before = inputs["key_cache"].clone().view(-1, 2, 8)
    after = bench_write_kv.exact(inputs)[0].view(-1, 2, 8)
    changed = (before != after).flatten(1).any(1).nonzero().flatten()
    assert torch.equal(changed, inputs["slots"].sort().values)


PEERS = [
    (name, shape, provider)
    for name, tiny in TINY.items()
    for shape in tiny
    for provider, declared in load(name).PROVIDERS.items()
    if declared.peer
]


@pytest.mark.parametrize(("name", "shape", "provider"), PEERS, ids=[f"{n}-{p}-{label(s)}" for n, s, p in PEERS])
def test_a_missing_peer_is_an_import_error(name, shape, provider, monkeypatch):
    for package in ("flashinfer", "vllm", "liger_kernel", "conch", "gemlite"):
        for loaded in [m for m in sys.modules if m.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError):
        load(name).PROVIDERS[provider].make(draw(name, shape, torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_words(bits):
    q = torch.randint(0, 1 << bits, (5, 64), dtype=torch.uint8)
    words = providers.pack_words(q, bits).numpy().view(np.uint32)
    factor = 32 // bits
    for row in range(5):
        for word in range(64 // factor):
            digits = [int(v) for v in q[row, word * factor : (word + 1) * factor]]
            assert words[row, word] == sum(v << (bits * i) for i, v in enumerate(digits))


def test_unsigned_weights_mean_the_same():
    for name, bits in (("int4_linear", 4), ("int8_linear", 8)):
        inputs = draw(name, TINY[name][0])
        stored = weight_only.unsigned(inputs, bits)
        assert stored.dtype == torch.uint8 and int(stored.max()) < 1 << bits
        assert torch.equal(stored.int() - (1 << (bits - 1)), inputs["q"].int() - inputs["zero"])


def test_page_tables():
    table = torch.tensor([[5, 2, 9], [7, 1, 9], [4, 9, 9]], dtype=torch.int32)
    starts, pages, last = providers.page_tables(table, torch.tensor([33, 32, 1], dtype=torch.int32), 16)
    assert starts.tolist() == [0, 3, 5, 6] and pages.tolist() == [5, 2, 9, 7, 1, 4] and last.tolist() == [1, 16, 1]
    assert {t.dtype for t in (starts, pages, last)} == {torch.int32}


def test_exact_in_pieces(monkeypatch):
    """The same result however small the pieces."""
    whole = {name: tensors(load(name).exact(draw(name, tiny[-1]))) for name, tiny in TINY.items()}
    monkeypatch.setattr(providers, "PIECE", 1)
    monkeypatch.setattr(weight_only, "PIECE", 600)
    monkeypatch.setattr(paged_inputs, "SCORES", 256)
    for name, tiny in TINY.items():
        for piecewise, once in zip(tensors(load(name).exact(draw(name, tiny[-1]))), whole[name], strict=True):
            torch.testing.assert_close(piecewise, once, rtol=1e-12, atol=1e-12)


# As the models' cards and weight files have them.
@pytest.mark.parametrize(
    ("model", "count"),
    [
        (shapes.LLAMA_3_8B, 8_030_261_248),
        (shapes.LLAMA_2_70B, 68_976_648_192),
        (shapes.MISTRAL_7B, 7_241_732_096),
        (shapes.MIXTRAL_8X7B, 46_702_792_704),
        (shapes.FALCON_7B, 6_921_720_704),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_parameters(model, count):
    assert shapes.parameters(model) == count


def test_linears_and_where_shapes_come_from():
    assert shapes.linears(shapes.LLAMA_3_8B) == {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    }
    assert shapes.linears(shapes.LLAMA_2_70B) == {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    }
    assert shapes.linears(shapes.FALCON_7B)["up"] == (18176, 4544)
    small = ["Llama-3-8B", "Mistral-7B", "Mixtral-8x7B"]
    assert shapes.models_of({"T": 1, "hidden": 4096}) == small
    assert shapes.models_of({"M": 1, "N": 10240, "K": 8192, "group": 128}) == ["Llama-2-70B"]
    heads = {"heads": 32, "kv_heads": 8, "D": 128}
    assert shapes.models_of({**heads, "window": 0}) == small
    assert shapes.models_of({**heads, "window": 4096}) == ["Mistral-7B"]
    assert shapes.models_of({"kv_heads": 1, "D": 64}) == ["Falcon-7B"]
    assert shapes.models_of({"hidden": 4095}) == shapes.models_of({"T": 1}) == shapes.models_of({"N": 1, "K": 1}) == []
    for model in shapes.MODELS:
        assert model.hidden == model.heads * model.head_dim and model.heads % model.kv_heads == 0
