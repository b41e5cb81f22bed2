"""The Hopper kernels of products by experts: their source run in Python, and themselves on such a GPU."""

import random

import numpy as np
import pytest
import torch
from gluon_in_python import FP8 as FP8_IN_PYTHON
from gluon_in_python import Descriptor, Number, Pointer, namespace

from octavo.kernels.moe import schedule
from octavo.kernels.moe.grouped_tiles import Scales
from octavo.kernels.quant.int4_tiles import groups_of_step, plane_groups
from octavo.kernels.quant.int8_tiles import scales_of_step
from octavo.kernels.quant.packing import int4_pack
from octavo.kernels.tiles import cdiv
from octavo.reference import moe as reference
from octavo.testing import assert_accurate, quantization_unit

HALF, INT8, FP8 = torch.float16, torch.int8, torch.float8_e4m3fn
MODULES = (
    *("quant/epilogue", "quant/stream_k", "quant/w8a8_loads", "quant/w8a8_parts", "quant/w8a8_epilogue"),
    *("quant/w8a8_promoted", "moe/schedule", "moe/grouped_loads", "moe/grouped_results"),
)


def pointer(tensor):
    if tensor is None:
        return None
    values = tensor if tensor.dtype == torch.int32 else tensor.float()
    return Pointer(values.contiguous().view(-1).numpy(), str(tensor.dtype).removeprefix("torch."))


def descriptor(tensor, rows):
    tensor = tensor.flatten(0, -2)
    if tensor.dtype == INT8:
        return Descriptor(tensor.numpy(), "int8", (rows, 128))
    name, width = ("float16", 64) if tensor.dtype == HALF else (FP8_IN_PYTHON, 128)
    return Descriptor(tensor.float().numpy(), name, (rows, width))


def eight_by_eight(weight, outputs):
    """As `grouped_loads.gate_beside_up` describes it."""
    experts, rows, k = weight.shape
    n, flat = rows // 2, weight.flatten(0, 1)
    values = (flat if weight.dtype == INT8 else flat.float()).contiguous()
    values = values.as_strided(((2 * experts - 1) * n // 8, 2, 8, k), (8 * k, n * k, k, 1)).numpy()
    name = {HALF: "float16", INT8: "int8", FP8: FP8_IN_PYTHON}[weight.dtype]
    return Descriptor(values, name, (outputs // 16, 2, 8, 128 // weight.element_size()))


def in_python(
    module,
    x,
    weight,
    bias,
    offsets,
    scales,
    tile,
    outputs,
    stages,
    parts,
    gated,
    programs,
    more,
    chunks=None,
    box=0,
    out_scale=None,
):
    """Calls a module's kernel for programs in any order; results of rows that are no expert's stay NaN."""
    s, n = x.shape[0], weight.shape[1] // (2 if gated else 1)
    plan = schedule.plan_and_clear(torch.empty(s, 1), offsets, tile)
    step = 128 // x.element_size() * (chunks or 1)
    steps = cdiv(x.shape[1], step)
    part_steps = cdiv(steps, parts)
    blocks = [Scales(*scales).blocks] if chunks or module == "grouped_hopper" else []
    assert cdiv(steps, part_steps) == parts
    sizes = (tile, outputs, step, stages)
    if chunks:
        sizes = (tile, outputs, box or tile, step, chunks, stages)
    out = torch.full((parts, s, n), torch.nan)
    if parts == 1 and out_scale is None:
        out = out.half()
    out = pointer(out if out_scale is None else out.to(FP8))
    if chunks:
        weights = eight_by_eight(weight, outputs) if gated else descriptor(weight, outputs)
    else:
        weights = descriptor(weight, outputs // 2)
    for program in random.sample(range(programs), programs):
        names = namespace([f"{name}.py" for name in (*MODULES, f"moe/{module}")], (program,), programs)
        names[f"_{module}_kernel"](
            descriptor(x, box or tile),
            weights,
            out,
            *([] if chunks else [out_scale]),
            pointer(bias),
            pointer(plan),
            *map(pointer, scales),
            *map(Number, (s, n, *Scales(*scales).strides, *(blocks if chunks else []))),
            *map(Number, (cdiv(n, outputs // 2 if gated else outputs), steps, part_steps)),
            *map(Number, [] if chunks else blocks),
            *(*sizes, parts, gated, *more),
        )
    return torch.from_numpy(out.memory).view(parts, s, n).sum(0).to(HALF)


def case(counts, k, n, gated, bias, operand):
    """Rows of each expert, and some of none behind them; scales of operands of 8 bits."""
    experts, rows = len(counts), sum(counts) + 3
    outputs = n * (2 if gated else 1)
    x, weight = torch.randn(rows, k), torch.randn(experts, outputs, k) / k**0.5
    offsets = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    scales = None, None
    if operand == HALF:
        x, weight = x.to(HALF), weight.to(HALF)
    else:
        x, weight = (x * 30).round().clamp(-127, 127).to(operand), (weight * 90).clamp(-127, 127).to(operand)
        scales = torch.rand(rows) / 30, torch.rand((experts, outputs) if random.random() < 0.5 else experts) / 60
    return x, weight, torch.randn(experts, n) if bias else None, offsets, scales


def check(out, x, weight, bias, offsets, scales, gated):
    end = int(offsets[-1])
    assert out[end:].isnan().all()  # they are not written
    x, weight = x.double(), weight.double()
    if scales[0] is not None:
        x *= scales[0][:, None]
        weight *= scales[1][:, :, None] if scales[1].dim() == 2 else scales[1][:, None, None]

    def products(dtype):
        y = reference._products(x.to(dtype), weight.to(dtype), offsets, bias)
        if gated:
            gate, up = y.chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
        return y[:end]

    exact = products(torch.float64).double()
    assert_accurate(out[:end], exact, exact.to(HALF))


COUNTS = ([5, 0, 16, 17, 0, 1], [0, 40], [33, 1, 2])


@pytest.mark.parametrize("operand", [HALF, INT8, FP8], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "tile", "chunks", "stages", "parts", "bias"),
    [
        (COUNTS[0], 136, 72, 16, 1, 3, 1, False),
        (COUNTS[0], 320, 200, 16, 2, 2, 2, True),
        (COUNTS[1], 256, 128, 32, 1, 4, 4, True),
        (COUNTS[1], 520, 128, 32, 4, 2, 3, True),
        (COUNTS[2], 64, 136, 64, 2, 3, 1, True),
        (COUNTS[2], 200, 304, 128, 1, 2, 1, False),
    ],
)
@pytest.mark.parametrize("outputs", [64, 128])
def test_source_of_few(outputs, counts, k, n, tile, chunks, stages, parts, bias, gated, operand):
    """Experts without rows and of several tiles, outputs and inputs that end within a tile, parts, an early start."""
    parts, bias = (1, False) if gated else (parts, bias)
    k = k if operand == HALF else 2 * k  # as many steps
    args = case(counts, k, n, gated, bias, operand)
    more = operand == FP8 and tile < 128, False, random.random() < 0.5, 128, False
    box = random.choice([0, 8])
    out = in_python("grouped_few", *args, tile, outputs, stages, parts, gated, 3, more, chunks, box)
    check(out, *args, gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "tile", "chunks", "stages", "parts"),
    [(COUNTS[0], 640, 328, 16, 2, 2, 1), (COUNTS[1], 512, 128, 32, 1, 3, 2), (COUNTS[2], 128, 72, 64, 2, 3, 1)],
)
@pytest.mark.parametrize("outputs", [64, 128])
def test_source_of_few_in_blocks(outputs, counts, k, n, tile, chunks, stages, parts, gated):
    """Scales of 128 × 128 weights, which end within a tile, and of 128 inputs of a row."""
    parts = 1 if gated else parts
    x, weight, _, offsets, _ = case(counts, k, n, gated, False, FP8)
    experts, rows, _ = weight.shape
    scales = torch.rand(len(x), k // 128) / 30, torch.rand(experts, cdiv(rows, 128), k // 128) / 60
    more = True, True, random.random() < 0.5, 128, False
    args = x, weight, None, offsets, scales, tile, outputs, stages, parts, gated, 3, more, chunks
    out = in_python("grouped_few", *args)
    x = x.double() * scales[0].repeat_interleave(128, 1)
    scale = scales[1].repeat_interleave(128, 1)[:, :rows].repeat_interleave(128, 2)
    check(out, x, weight.double() * scale, None, offsets, (None, None), gated)


@pytest.mark.parametrize("operand", [HALF, INT8, FP8], ids=str)
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
def test_source_of_many(counts, k, n, outputs, stages, parts, bias, gated, operand):
    """The same, and tiles of which one warpgroup has no rows."""
    parts, bias = (1, False) if gated else (parts, bias)
    k = k if operand == HALF else 2 * k  # as many steps
    args = case(counts, k, n, gated, bias, operand)
    out = in_python("grouped_hopper", *args, 128, outputs, stages, parts, gated, 3, (False,))
    check(out, *args, gated)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "stages", "parts"),
    [([5, 0, 130, 1], 256, 384, 2, 1), ([0, 300], 640, 128, 3, 2), ([64, 65], 128, 256, 2, 1)],
)
def test_source_of_many_in_blocks(counts, k, n, stages, parts, gated):
    """Scales of 128 × 128 weights, of which the last tile may have half as many, and of 128 inputs of a row."""
    parts = 1 if gated else parts
    x, weight, _, offsets, _ = case(counts, k, n, gated, False, FP8)
    experts, outputs, _ = weight.shape
    scales = torch.rand(len(x), k // 128) / 30, torch.rand(experts, outputs // 128, k // 128) / 60
    args = x, weight, None, offsets, scales, 128, 256, stages, parts, gated, 3, (True,)
    out = in_python("grouped_hopper", *args)
    x = x.double() * scales[0].repeat_interleave(128, 1)
    scale = scales[1].repeat_interleave(128, 1).repeat_interleave(128, 2)
    check(out, x, weight.double() * scale, None, offsets, (None, None), gated)
    if gated:
        out_scale = torch.full((len(x), n // 128), torch.nan)
        quantized = in_python("grouped_hopper", *args, out_scale=pointer(out_scale))
        end, out_scale = int(offsets[-1]), out_scale.repeat_interleave(128, 1)
        assert quantized[:end].unflatten(1, (-1, 128)).abs().amax(2).eq(448).all()
        assert quantized[end:].isnan().all() and out_scale[end:].isnan().all()
        unit, out = quantization_unit(quantized.double(), FP8) * out_scale, out.double()
        close = (quantized * out_scale - out).abs() <= 0.5 * unit + out.abs() / 512 + 2**-24  # out is of 16 bits
        assert close[:end].all()


@pytest.mark.parametrize("operand", [HALF, INT8, FP8], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "rows", "tail", "tails", "chunks", "stages", "parts", "bias"),
    [
        ([5, 0, 33, 49], 136, 72, 32, 16, 1, 1, 3, 1, True),
        ([0, 97, 160, 64], 320, 200, 64, 32, 1, 2, 2, 1, False),
        ([128, 129, 193, 50], 64, 144, 128, 64, 1, 1, 2, 1, False),
        ([20, 48, 96], 520, 128, 32, 16, 1, 2, 4, 3, True),
        ([33, 48, 49, 64, 65], 136, 72, 32, 32, 2, 1, 3, 1, True),
    ],
)
def test_source_of_tall(counts, k, n, rows, tail, tails, chunks, stages, parts, bias, gated, operand):
    """Tiles of half as many rows, of as many, with a tail and with more; outputs that end within a tile."""
    parts, bias = (1, False) if gated else (parts, bias)
    k = k if operand == HALF else 2 * k  # as many steps
    box = tail // random.choice([1, tails])
    x, weight, bias, offsets, scales = args = case(counts, k, n, gated, bias, operand)
    plan = schedule.plan_and_clear(torch.empty(len(x), 1), offsets, rows, tail)
    step = 128 // x.element_size() * chunks
    steps = cdiv(k, step)
    assert cdiv(steps, cdiv(steps, parts)) == parts
    out = torch.full((parts, len(x), n), torch.nan)
    out = pointer(out if parts > 1 else out.half())
    for program in random.sample(range(3), 3):
        names = namespace([f"{name}.py" for name in (*MODULES, "moe/grouped_tall")], (program,), 3)
        names["_grouped_tall_kernel"](
            descriptor(x, box),
            eight_by_eight(weight, 128) if gated else descriptor(weight, 128),
            out,
            pointer(bias),
            pointer(plan),
            *map(pointer, scales),
            *map(Number, (len(x), n, *Scales(*scales).strides, cdiv(n, 64 if gated else 128), steps)),
            Number(cdiv(steps, parts)),
            *(rows, tail, tails, box, step, chunks, stages, parts, gated, random.random() < 0.5, False),
        )
    check(torch.from_numpy(out.memory).view(parts, len(x), n).sum(0).to(HALF), *args, gated)


INT4 = "shares", "loads", "unpack", "compute"


def int4_in_python(x, packed, scale, minimum, offsets, tile, stages, parts, gated, programs, early):
    """As `grouped_int4.grouped_int4` launches it."""
    s, (_, groups, outputs) = x.shape[0], scale.shape
    n, k_tiles = outputs // 2 if gated else outputs, packed.shape[2]
    group, part_steps = x.shape[1] // groups, cdiv(k_tiles, parts)
    assert cdiv(k_tiles, part_steps) == parts
    plan = schedule.plan_and_clear(torch.empty(s, 1), offsets, tile)
    out = torch.full((parts, s, n), torch.nan)
    out = pointer(out if parts > 1 else out.half())
    modules = [f"quant/int4_{name}" for name in INT4]
    modules = [*MODULES[:1], *modules, *MODULES[2:], "moe/grouped_int4"]
    per_step = groups_of_step(group)
    for program in random.sample(range(programs), programs):
        namespace([f"{name}.py" for name in modules], (program,), programs)["_grouped_int4_kernel"](
            Descriptor(packed.view(-1, 64).numpy(), "int16", (32, 64)),
            descriptor(x, tile),
            out,
            pointer(plan),
            pointer(scale),
            pointer(minimum),
            *map(Number, (s, n, packed.shape[1], cdiv(n, 128 if gated else 256), k_tiles, part_steps, groups - 1)),
            *map(Number, (plane_groups(group), *scale.stride()[:2])),
            *(per_step, per_step == 1 or per_step * group == 128, minimum is None and group % 128 == 0 and tile <= 32),
            *(tile, stages, parts, gated, early, False),
        )
    return torch.from_numpy(out.memory).view(parts, s, n).sum(0).to(HALF)


GROUPED = [
    (COUNTS[0], 256, 192, 2, 16, 3, 1),
    (COUNTS[0], 512, 320, 2, 16, 2, 2),
    (COUNTS[1], 320, 64, 5, 32, 4, 3),
    (COUNTS[1], 480, 128, 15, 32, 2, 1),
    (COUNTS[2], 384, 256, 1, 64, 2, 1),
]
"""Rows of each expert, inputs, outputs, groups, rows of a tile, stages and parts."""


def grouped_case(counts, k, n, groups, gated):
    """Rows, where experts' begin, and scales of a size that makes the weights 0 to 15 small."""
    offsets = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    x = torch.randn(sum(counts) + 3, k).to(HALF)
    scale = ((torch.rand(len(counts), groups, n * (2 if gated else 1)) + 0.5) / (5 * k**0.5)).to(HALF)
    return x, offsets, scale


def wide(of_groups, k):
    return of_groups.double().transpose(1, 2).repeat_interleave(k // of_groups.shape[1], 2)


def check_grouped(out, x, weight, offsets, gated, bias=None):
    end = int(offsets[-1])
    assert out[end:].isnan().all()  # they are not written

    def products(weight):
        gate, *up = reference._products(x, weight, offsets, bias)[:end].chunk(2 if gated else 1, -1)
        return torch.nn.functional.silu(gate) * up[0] if gated else gate

    assert_accurate(out[:end], products(weight).double(), products(weight.to(HALF)).to(HALF))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("counts", "k", "n", "groups", "tile", "stages", "parts"), GROUPED)
def test_source_of_int4(counts, k, n, groups, tile, stages, parts, gated, zeros):
    """Groups of a step, of several and of all, outputs and inputs that end within a tile, parts, an early start."""
    parts = 1 if gated else parts
    x, offsets, scale = grouped_case(counts, k, n, groups, gated)
    q = torch.randint(0, 16, (len(counts), scale.shape[2], k), dtype=torch.uint8)
    packed = torch.stack([int4_pack(of_expert) for of_expert in q])
    minimum = -torch.randint(0, 16, scale.shape) * scale.float() if zeros else None
    weight = (q.double() - 8) * wide(scale, k) if minimum is None else q.double() * wide(scale, k) + wide(minimum, k)
    args = x, packed, scale, minimum, offsets, tile, stages, parts, gated, 3, random.random() < 0.5
    check_grouped(int4_in_python(*args), x, weight, offsets, gated)


def int4_tall_in_python(x, packed, scale, minimum, offsets, rows, stages, parts, gated, programs, early):
    """As `grouped_int4_tall.grouped_int4_tall` launches it."""
    s, (_, groups, outputs) = x.shape[0], scale.shape
    n, k_tiles = outputs // 2 if gated else outputs, packed.shape[2]
    group, part_steps = x.shape[1] // groups, cdiv(k_tiles, parts)
    assert cdiv(k_tiles, part_steps) == parts
    plan = schedule.plan_and_clear(torch.empty(s, 1), offsets, rows)
    out = torch.full((parts, s, n), torch.nan)
    out = pointer(out if parts > 1 else out.half())
    modules = [f"quant/int4_{name}" for name in INT4]
    modules = [*MODULES[:1], *modules, *MODULES[2:]]
    modules += ["moe/grouped_tall", "moe/grouped_int4_tall"]
    lines, per_step = packed.view(-1, 64), groups_of_step(group)
    described = Descriptor(lines.numpy(), "int16", (32, 64))
    if gated:
        up = packed.stride(0) // 2
        shape = (2 * packed.shape[0] - 1) * up // 256, 2, 4, 64
        described = Descriptor(packed.as_strided(shape, (256, up, 64, 1)).numpy(), "int16", (4, 2, 4, 64))
    for program in random.sample(range(programs), programs):
        names = namespace([f"{name}.py" for name in modules], (program,), programs)
        names["_grouped_int4_tall_kernel"](
            described,
            descriptor(x, rows // 4),
            out,
            pointer(plan),
            pointer(scale),
            pointer(minimum),
            *map(Number, (s, n, packed.shape[1], cdiv(n, 64 if gated else 128), k_tiles, part_steps, groups - 1)),
            *map(Number, (plane_groups(group), *scale.stride()[:2])),
            *(per_step, per_step == 1 or per_step * group == 128, rows, stages, parts, gated, early, False),
        )
    return torch.from_numpy(out.memory).view(parts, s, n).sum(0).to(HALF)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "groups", "rows", "stages", "parts"),
    [
        ([5, 0, 33, 49], 256, 192, 2, 32, 3, 1),
        ([0, 97, 160, 64], 512, 320, 2, 64, 2, 2),
        ([130, 64], 320, 64, 5, 128, 4, 3),
        ([17, 16], 480, 128, 15, 32, 2, 1),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_source_of_int4_tall(zeros, counts, k, n, groups, rows, stages, parts, gated):
    """The same, tiles of a quarter as many rows, of half as many and of as many."""
    parts = 1 if gated else parts
    x, offsets, scale = grouped_case(counts, k, n, groups, gated)
    q = torch.randint(0, 16, (len(counts), scale.shape[2], k), dtype=torch.uint8)
    packed = torch.stack([int4_pack(of_expert) for of_expert in q])
    minimum = -torch.randint(0, 16, scale.shape) * scale.float() if zeros else None
    weight = (q.double() - 8) * wide(scale, k) if minimum is None else q.double() * wide(scale, k) + wide(minimum, k)
    args = x, packed, scale, minimum, offsets, rows, stages, parts, gated, 3, random.random() < 0.5
    check_grouped(int4_tall_in_python(*args), x, weight, offsets, gated)


def int8_in_python(x, weight, bias, scale, offsets, tile, stages, parts, gated, programs, early):
    """As `grouped_int8.grouped_int8` launches it."""
    (s, k), (_, groups, outputs) = x.shape, scale.shape
    n, k_tiles, group = outputs // 2 if gated else outputs, cdiv(k, 128), k // groups
    part_steps = cdiv(k_tiles, parts)
    assert cdiv(k_tiles, part_steps) == parts
    plan = schedule.plan_and_clear(torch.empty(s, 1), offsets, tile)
    out = torch.full((parts, s, n), torch.nan)
    out = pointer(out if parts > 1 else out.half())
    modules = [*MODULES[:1], *(f"quant/int4_{name}" for name in INT4), "quant/int8_unpack", "quant/int8_compute"]
    modules += [*MODULES[2:], "moe/grouped_int8"]
    per_step = scales_of_step(k, group)
    for program in random.sample(range(programs), programs):
        namespace([f"{name}.py" for name in modules], (program,), programs)["_grouped_int8_kernel"](
            Descriptor(weight.flatten(0, 1).numpy(), "int8", (64, 128)),
            descriptor(x, tile),
            out,
            pointer(bias),
            pointer(plan),
            pointer(scale),
            *map(Number, (s, n, cdiv(n, 128 if gated else 256), k_tiles, part_steps, groups - 1, plane_groups(group))),
            *map(Number, scale.stride()[:2]),
            *(per_step, per_step <= 1 or per_step * group == 128, per_step == 1 and tile <= 32),
            *(tile, stages, parts, gated, early, False),
        )
    return torch.from_numpy(out.memory).view(parts, s, n).sum(0).to(HALF)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("counts", "k", "n", "groups", "tile", "stages", "parts"),
    [*GROUPED, (COUNTS[2], 512, 200, 4, 64, 2, 2), (COUNTS[0], 352, 76, 1, 16, 3, 3)],
)
def test_source_of_int8_alone(counts, k, n, groups, tile, stages, parts, gated):
    """The same, and one scale an output; an expert's outputs end within a tile, where another's begin."""
    parts = 1 if gated else parts
    x, offsets, scale = grouped_case(counts, k, n, groups, gated)
    weight = torch.randint(-128, 128, (len(counts), scale.shape[2], k), dtype=torch.int8)
    scale = scale.float() / 16
    bias = None if gated or random.random() < 0.5 else torch.randn(len(counts), n)
    args = x, weight, bias, scale, offsets, tile, stages, parts, gated, 3, random.random() < 0.5
    check_grouped(int8_in_python(*args), x, weight.double() * wide(scale, k), offsets, gated, bias)
