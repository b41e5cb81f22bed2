"""The kernel of few tokens on Hopper: its source run in Python, its tiles, and itself on such a GPU."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from gluon_in_python import Descriptor, Number, Pointer, namespace
from test_gemv import exact, formula
from test_int4_hopper import on_hopper

import octavo
from octavo.kernels.launch import Recorder, recording
from octavo.kernels.linear_few import MOST_TOKENS, OUTPUTS, WIDTH, Tiles, choose_tiles
from octavo.kernels.tiles import KNOWN_DEVICES, cdiv, next_power_of_2
from octavo.testing import assert_accurate

H100 = KNOWN_DEVICES[90]
MODULES = "quant/epilogue.py", "quant/int4_epilogue.py", "quant/w8a8_parts.py", "linear_few.py"


def case(m, n, k, dtype, bias=True, device="cpu"):
    x = torch.randn(m, k, device=device).to(dtype)
    weight = (torch.randn(n, k, device=device) * k**-0.5).to(dtype)
    return x, weight, torch.randn(n, device=device) if bias else None


def check(out, x, weight, bias, activation):
    plain = formula(x, weight, None if bias is None else bias.to(x.dtype), activation)
    assert_accurate(out, exact(x, weight, bias, activation), plain)


def arrivals(pointer, count):
    """As `arrive` counts them, of memory that is clear."""
    at = int(pointer.offset)
    pointer.memory[at] += 1
    return pointer.memory[at] == int(count)


def run_in_python(x, weight, bias, activation, tiles, early=True):
    """As `linear_few` launches it; programs in any order."""
    (m, k), n, gated = x.shape, weight.shape[0], activation is not None
    dtype = str(x.dtype).removeprefix("torch.")
    out = Pointer(np.full(m * (n // 2 if gated else n), np.nan, np.float32), dtype)
    steps, count = cdiv(k, WIDTH * tiles.chunks), cdiv(n, OUTPUTS)
    parts = Pointer(np.full(count * tiles.parts * OUTPUTS * tiles.tokens, np.nan, np.float32), "float32")
    counters = Pointer(np.zeros(count, np.int64), "int64")
    described = Descriptor(weight.float().numpy(), dtype, (OUTPUTS, WIDTH))
    if gated:
        turned = described.values.reshape(2, n // 16, 8, k).swapaxes(0, 1)
        described = Descriptor(turned, dtype, (OUTPUTS // 16, 2, 8, WIDTH))
    numbers = m, n // 2 if gated else n, k, count * tiles.parts, steps, cdiv(steps, tiles.parts)
    for program in random.sample(range(tiles.programs), tiles.programs):
        names = namespace(MODULES, (program,), tiles.programs)
        names["arrive"] = arrivals
        names["_linear_few_kernel"](
            described,
            Descriptor(x.float().numpy(), dtype, (tiles.tokens, WIDTH)),
            None,
            out,
            None if bias is None else Pointer(bias.numpy(), "float32"),
            parts,
            counters,
            *map(Number, numbers),
            *(tiles.tokens, OUTPUTS, tiles.chunks, tiles.stages, tiles.parts, gated, early, 128, False),
        )
    return torch.from_numpy(out.memory).view(m, -1).to(x.dtype)


@pytest.mark.parametrize(
    ("m", "n", "k", "bias", "activation", "tiles"),
    [
        (3, 100, 512, True, None, Tiles(16, 4, 3, 1, 2, 128)),
        (8, 300, 1000, False, None, Tiles(8, 2, 5, 1, 3, 96)),
        (20, 200, 648, True, None, Tiles(32, 2, 4, 3, 5, 128)),
        (33, 200, 1024, False, None, Tiles(64, 2, 2, 4, 16, 128)),
        (50, 304, 640, True, "silu_and_mul", Tiles(64, 2, 3, 1, 2, 128)),
        (7, 160, 328, True, "silu_and_mul", Tiles(8, 1, 3, 2, 4, 128)),
        (7, 160, 328, False, "silu_and_mul", Tiles(8, 4, 3, 2, 3, 96)),
        (2, 5, 24, True, None, Tiles(8, 4, 3, 1, 1, 128)),
    ],
)
def test_source(m, n, k, bias, activation, tiles):
    """Outputs and inputs that end within a tile, units that are more than programs, parts of tiles."""
    args = case(m, n, k, random.choice((torch.float16, torch.bfloat16)), bias)
    out = run_in_python(*args, activation, tiles)
    check(out, *args, activation)
    assert torch.equal(out, run_in_python(*args, activation, tiles, early=False))


SIZES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096), (8192, 28672), (40, 520), (8, 8)]


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("programs", [78, 132])
def test_tiles(n, k, gated, programs):
    for m in range(2, MOST_TOKENS + 1):
        tiles = choose_tiles(m, n, k, replace(H100, num_sms=programs), gated=gated)
        steps = cdiv(k, WIDTH * tiles.chunks)
        assert m <= tiles.tokens and tiles.stages >= 2
        assert (tiles.parts - 1) * cdiv(steps, tiles.parts) < steps, "a part without a step"
        units = cdiv(n, OUTPUTS) * tiles.parts
        assert tiles.programs <= units
        # A warm-up at powers of two meets every kernel.
        other = choose_tiles(next_power_of_2(m), n, k, replace(H100, num_sms=programs), gated=gated)
        assert tiles == other


@pytest.mark.parametrize("m", [2, 8, 16, 30, 64])
@pytest.mark.parametrize(
    ("n", "k", "bias", "activation"),
    [
        (6144, 4096, True, None),
        (28672, 4096, False, "silu_and_mul"),
        (4096, 14336, False, None),
        (4096, 4096, True, None),
        (4560, 1040, True, "silu_and_mul"),
        (49155, 584, False, None),
        (100, 8192, True, None),
        (8, 2048, False, None),
        (5, 40, True, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_on_a_gpu(m, n, k, bias, activation, dtype, marked):
    args = case(m, n, k, dtype, bias, "cuda")
    early = m % 3 == 2  # both
    with recording(Recorder()) as recorder:
        out = torch.ops.octavo.linear(*args, activation, early)
    assert recorder.launches[0].kernel.__name__ == "_linear_few_kernel"
    check(out, *args, activation)
    for _ in range(10):
        assert torch.equal(out, torch.ops.octavo.linear(*args, activation, early))


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_streams_do_not_share_parts(marked):
    """Calls that run at the same time, each of which adds up parts of its tiles."""
    _, weight, _ = case(8, 4096, 8192, torch.bfloat16, device="cuda")
    xs = [torch.randn(8, 8192, device="cuda").bfloat16() for _ in range(4)]
    expected = [octavo.linear(x, weight) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(octavo.linear(x, weight))
        torch.cuda.synchronize()
        assert all(map(torch.equal, outs, expected))


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_chain_in_a_graph(marked):
    """Products start while those ahead of them still run, and wait for what they read."""
    layers = [case(20, 4096, 4096, torch.bfloat16, device="cuda")[1] for _ in range(6)]

    def chain(x):
        for weight in layers:
            x = octavo.rms_norm(octavo.linear(x, weight, prefetch_weight=True), torch.ones(4096, device="cuda"))
        return x

    x = torch.randn(20, 4096, device="cuda").bfloat16()
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(20):
        x.copy_(torch.randn(20, 4096, device="cuda"))
        graph.replay()
        got = out.clone()
        plain = x
        for weight in layers:
            plain = octavo.rms_norm(octavo.linear(plain, weight, prefetch_weight=True), torch.ones(4096, device="cuda"))
            torch.cuda.synchronize()
        assert torch.equal(got, plain)


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_offsets_beyond_int32(marked):
    weight = torch.zeros(2**17 + 8, 2**14 + 64, device="cuda", dtype=torch.float16)
    weight[-1] = 1
    out = octavo.linear(torch.ones(3, weight.shape[1], device="cuda", dtype=torch.float16), weight)
    assert (out[:, -1] == weight.shape[1]).all() and not out[:, :-1].any()
