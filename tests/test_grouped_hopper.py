"""The Hopper kernels of products by experts: their source run in Python, and themselves on such a GPU."""

import random

import numpy as np
import pytest
import torch
from gluon_in_python import Descriptor, Number, Pointer, namespace

from octavo.kernels.moe import schedule
from octavo.kernels.tiles import cdiv
from octavo.reference import moe as reference
from octavo.testing import assert_accurate

HALF = torch.float16
MODULES = "quant/epilogue", "quant/w8a8_loads", "quant/w8a8_parts", "moe/schedule", "moe/grouped_loads"


def pointer(tensor):
    if tensor is None:
        return None
    values = tensor if tensor.dtype == torch.int32 else tensor.float()
    return Pointer(values.contiguous().view(-1).numpy(), str(tensor.dtype).removeprefix("torch."))


def descriptor(tensor, rows):
    return Descriptor(tensor.flatten(0, -2).float().numpy(), "float16", (rows, 64))


def in_python(module, x, weight, bias, offsets, tile, outputs, stages, parts, gated, programs, more):
    """Calls a module's kernel for programs in any order; results of rows that are no expert's stay NaN."""
    s, n = x.shape[0], weight.shape[1] // (2 if gated else 1)
    plan = schedule.plan_and_clear(torch.empty(s, 1), offsets, tile)
    steps = cdiv(x.shape[1], 64)
    part_steps = cdiv(steps, parts)
    assert cdiv(steps, part_steps) == parts
    out = torch.full((parts, s, n), torch.nan)
    if parts == 1:
        out = out.half()
    out = pointer(out)
    for program in random.sample(range(programs), programs):
        names = namespace([f"{name}.py" for name in (*MODULES, f"moe/{module}")], (program,), programs)
        names[f"_{module}_kernel"](
            descriptor(x, tile),
            descriptor(weight, outputs // 2),
            out,
            pointer(bias),
            pointer(plan),
            *map(Number, (s, n, cdiv(n, outputs // 2 if gated else outputs), steps, part_steps)),
            *(tile, outputs, 64, stages, parts, gated, *more),
        )
    return torch.from_numpy(out.memory).view(parts, s, n).sum(0).to(HALF)


def case(counts, k, n, gated, bias):
    """Rows of each expert, and some of none behind them."""
    experts, rows = len(counts), sum(counts) + 3
    x = torch.randn(rows, k).to(HALF)
    weight = (torch.randn(experts, n * (2 if gated else 1), k) / k**0.5).to(HALF)
    offsets = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    return x, weight, torch.randn(experts, n) if bias else None, offsets


def check(out, x, weight, bias, offsets, gated):
    end = int(offsets[-1])
    assert out[end:].isnan().all()  # they are not written

    def products(dtype):
        y = reference._products(x.to(dtype), weight.to(dtype), offsets, bias)
        if gated:
            gate, up = y.chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
        return y[:end]

    exact = products(torch.float64).double()
    assert_accurate(out[:end], exact, exact.to(HALF))


COUNTS = ([5, 0, 16, 17, 0, 1], [0, 40], [33, 1, 2])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "tile", "stages", "parts", "bias"),
    [
        (COUNTS[0], 136, 72, 16, 3, 1, False),
        (COUNTS[0], 320, 200, 16, 2, 2, True),
        (COUNTS[1], 256, 128, 32, 4, 4, True),
        (COUNTS[2], 64, 140, 64, 3, 1, True),
        (COUNTS[2], 200, 300, 128, 2, 1, False),
    ],
)
def test_source_of_few(counts, k, n, tile, stages, parts, bias, gated):
    """Experts without rows and of several tiles, outputs and inputs that end within a tile, parts, an early start."""
    parts, bias = (1, False) if gated else (parts, bias)
    args = case(counts, k, n, gated, bias)
    more = random.random() < 0.5, 128, False
    out = in_python("grouped_few", *args, tile, 128, stages, parts, gated, 3, more)
    check(out, *args, gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "outputs", "stages", "parts", "bias"),
    [
        ([5, 0, 130, 1], 136, 300, 256, 2, 1, True),
        ([0, 300], 200, 200, 128, 3, 1, False),
        ([64, 65], 320, 260, 256, 2, 2, True),
        ([1100], 64, 72, 128, 2, 1, False),
    ],
)
def test_source_of_many(counts, k, n, outputs, stages, parts, bias, gated):
    """The same, and tiles of which one warpgroup has no rows."""
    parts, bias = (1, False) if gated else (parts, bias)
    args = case(counts, k, n, gated, bias)
    out = in_python("grouped_hopper", *args, 128, outputs, stages, parts, gated, 3, ())
    check(out, *args, gated)
