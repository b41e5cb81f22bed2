"""The product of `linear.py` for few tokens on Hopper (sm_90), in Gluon; elsewhere torch's does it.

The time is that of reading the weights, and what a decode step loses is lost at the seams of its kernels. So a warp
loads weights by TMA, as many as shared memory has room for, while the kernel ahead still runs; tokens wait for its end,
as does all that is written. Programs walk tiles of 64 outputs, and weights are on their way beyond the tile that is
being multiplied. Weights are the first operand, which has 64 rows at least. Where tiles are too few, programs have a
part of a tile's inputs each; the one that comes last adds the parts up, in their order. With SiLU × gate the copy
engine puts eight rows of gate and the same eight of up below each other, so that a thread has both of an output.

On an H100 (bf16, 32 tokens, µs in a graph of such products, and cuBLAS's beside them): 28672 × 4096 with SiLU × gate
81.7 (87.5), 4096 × 14336 42.6 (45.6), 6144 × 4096 19.2 (21.7), 4096 × 4096 14.6 (14.6); reading them takes 78.3, 39.1,
16.8 and 11.2. In a chain of Llama-3-8B's layers, whose first weights come while what is ahead of them runs, these four
and three norms take 161.3 (178.1); of one token 155.5 (with `linear_one.py` 160.8), of 64 169.6 (181.7). Tiles of 128
outputs took 2 to 10 % longer, and two programs a multiprocessor up to 10 %. Alone, cuBLAS's is up to 3 % faster for
4096 × 4096 with 32 and 64 tokens, and for 10240 × 8192 with 64.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import INTERPRET, empty, launch
from octavo.kernels.quant.epilogue import silu_and_mul
from octavo.kernels.quant.int4_epilogue import out_layout
from octavo.kernels.quant.stream_k import arrive
from octavo.kernels.quant.w8a8_parts import steps_of
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    let_next_start,
    next_power_of_2,
    row_strides,
    wait_for_previous,
)

MOST_TOKENS = 64
OUTPUTS = 64
"""Of a tile; of gate and of up together, where both become one."""
LEAST_OUTPUTS, LEAST_WEIGHTS = 4096, 2**24
"""The smallest layer whose time was compared with that of torch's product."""
WIDTH = 64
"""Inputs of a copy: as many bytes as the copy engine's widest swizzle takes."""
OTHER_BYTES = 5120
"""Of shared memory: barriers, results on their way from lane to lane, and what the GPU keeps for itself."""

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _prefetch(
    ptr, N, K, steps, part_steps, OUTPUTS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS:
    gl.constexpr, GATED: gl.constexpr,
):
    """Has the cache (L2) fetch the first weights; a hint, which may come before they are written."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tile = gl.program_id(0) // PARTS
    first, end = steps_of(gl.program_id(0) % PARTS, steps, part_steps)
    first_k = first * (CHUNKS * 64)
    size = (gl.minimum(gl.minimum(end, first + STAGES) * (CHUNKS * 64), K) - first_k) * 2
    for start in gl.static_range(0, OUTPUTS, 32):
        r = start + gl.arange(0, 32, layout=layout)
        if GATED:
            rows = gl.minimum(tile * (OUTPUTS // 2) + r // 16 * 8 + r % 8, N - 1) + r // 8 % 2 * N
        else:
            rows = gl.minimum(tile * OUTPUTS + r, N - 1)
        gl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r",
            [ptr + rows.to(gl.int64) * K + first_k, size], dtype=gl.int32, is_pure=False, pack=1,
        )


@gluon.jit
def _load_weights(
    desc, weight_ptr, weight, full, empty, N, K, units, steps, part_steps, TOKENS: gl.constexpr, OUTPUTS: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr, EARLY: gl.constexpr, CHAINED:
    gl.constexpr,
):
    """What the warp does that loads weights: of gate and of up eight in turns, if gated.

    EARLY: not behind the kernel ahead, which does not write them.
    """
    if not EARLY:
        if CHAINED:
            _prefetch(weight_ptr, N, K, steps, part_steps, OUTPUTS, CHUNKS, STAGES, PARTS, GATED)
        wait_for_previous(CHAINED)
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // PARTS
        first, end = steps_of(unit % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (TOKENS + OUTPUTS) * CHUNKS * 128)
            for j in gl.static_range(CHUNKS):
                at = (step * CHUNKS + j) * 64
                to = weight.index(stage * CHUNKS + j)
                if GATED:  # blocks of eight rows
                    place = [tile * (OUTPUTS // 16), 0, 0, at]
                    tma.async_copy_global_to_shared(desc, place, full.index(stage), to)
                else:
                    tma.async_copy_global_to_shared(desc, [tile * OUTPUTS, at], full.index(stage), to)
            i += 1


@gluon.jit
def _load_tokens(
    desc, x, full, empty, units, steps, part_steps, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """What the warp does that loads tokens, which the kernel ahead may be about to write."""
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        first, end = steps_of(unit % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            for j in gl.static_range(CHUNKS):
                at = [0, (step * CHUNKS + j) * 64]
                tma.async_copy_global_to_shared(desc, at, full.index(stage), x.index(stage * CHUNKS + j))
            i += 1


@gluon.jit
def _add_parts(acc, parts_ptr, counters_ptr, tile, part, PARTS: gl.constexpr):
    """Leaves a part of a tile's sums; whether that was the last, and then the sums of all, in their order."""
    OUTPUTS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    rows = gl.expand_dims(gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, layout)), 1)
    cols = gl.expand_dims(gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout)), 0)
    at = rows * TOKENS + cols
    parts_ptr += tile.to(gl.int64) * (PARTS * OUTPUTS * TOKENS)
    gl.store(parts_ptr + part * (OUTPUTS * TOKENS) + at, acc)
    last = arrive(counters_ptr + tile, gl.to_tensor(PARTS).to(gl.int64))
    if last:
        acc = gl.load(parts_ptr + at, cache_modifier=".cg")
        for other in gl.static_range(1, PARTS):
            acc += gl.load(parts_ptr + other * (OUTPUTS * TOKENS) + at, cache_modifier=".cg")
    return acc, last


@gluon.jit
def _finish(acc, out_ptr, bias_ptr, tile, M, N, GATED: gl.constexpr):
    """Writes what becomes of a tile's sums: 16 bytes of a token by a thread; N: outputs, half the weights' if gated."""
    OUTPUTS: gl.constexpr = acc.shape[0] // 2 if GATED else acc.shape[0]
    if bias_ptr is not None:
        r = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
        if GATED:
            n = tile * OUTPUTS + r // 16 * 8 + r % 8
            bias = gl.load(bias_ptr + r // 8 % 2 * N + n, mask=n < N, other=0.0)
        else:
            n = tile * OUTPUTS + r
            bias = gl.load(bias_ptr + n, mask=n < N, other=0.0)
        acc += gl.expand_dims(bias.to(gl.float32), 1)
    if GATED:
        acc = silu_and_mul(acc, True)
    layout: gl.constexpr = out_layout(OUTPUTS, acc.shape[1])
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), layout)
    n = gl.expand_dims(tile * OUTPUTS + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, layout)), 1)
    m = gl.expand_dims(gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout)), 0)
    gl.store(out_ptr + m.to(gl.int64) * N + n, out, mask=(n < N) & (m < M))


@gluon.jit
def _compute(
    out_ptr, bias_ptr, parts_ptr, counters_ptr, x, weight, full, empty, M, N, units, steps, part_steps, TOKENS:
    gl.constexpr, OUTPUTS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED:
    gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warpgroup does."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    acc = gl.zeros([OUTPUTS, TOKENS], gl.float32, layout)
    wait_for_previous(CHAINED)
    i = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        tile = unit // PARTS
        first, end = steps_of(unit % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            for j in gl.static_range(CHUNKS):
                second = x.index(stage * CHUNKS + j).permute((1, 0))
                add = True if j > 0 else step > first
                acc = warpgroup_mma(weight.index(stage * CHUNKS + j), second, acc, use_acc=add, is_async=True)
            acc = warpgroup_mma_wait(CHUNKS, deps=[acc])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=step > first)
            i += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        if PARTS > 1:
            total, last = _add_parts(acc, parts_ptr, counters_ptr, tile, unit % PARTS, PARTS)
            if last:
                _finish(total, out_ptr, bias_ptr, tile, M, N, GATED)
        else:
            _finish(acc, out_ptr, bias_ptr, tile, M, N, GATED)


@gluon.jit(do_not_specialize=["M", "units", "steps", "part_steps"])
def _linear_few_kernel(
    # Bound by reading the weights. One program a multiprocessor, or two.
    weight_desc, x_desc, weight_ptr, out_ptr, bias_ptr, parts_ptr, counters_ptr, M, N, K, units, steps, part_steps,
    TOKENS: gl.constexpr, OUTPUTS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GATED:
    gl.constexpr, EARLY: gl.constexpr, REGISTERS: gl.constexpr, CHAINED: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, TOKENS, 64], x_desc.layout)
    if GATED:
        loaded = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, OUTPUTS // 16, 2, 8, 64], weight_desc.layout)
    else:
        loaded = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, OUTPUTS, 64], weight_desc.layout)
    weight = loaded._reinterpret(dtype, [STAGES * CHUNKS, OUTPUTS, 64], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_compute, (
            out_ptr, bias_ptr, parts_ptr, counters_ptr, x, weight, full, empty, M, N, units, steps, part_steps, TOKENS,
            OUTPUTS, CHUNKS, STAGES, PARTS, GATED, CHAINED)),
        (_load_weights, (
            weight_desc, weight_ptr, loaded, full, empty, N, K, units, steps, part_steps, TOKENS, OUTPUTS, CHUNKS,
            STAGES, PARTS, GATED, EARLY, CHAINED)),
        (_load_tokens, (x_desc, x, full, empty, units, steps, part_steps, CHUNKS, STAGES, PARTS, CHAINED)),
    ], [1, 1], [24, 24])
# fmt: on


@dataclass(frozen=True)
class Tiles:
    """The tile of a program."""

    tokens: int
    """All of them."""
    chunks: int
    """Copies of 64 inputs that make a step."""
    stages: int
    parts: int
    """Units of work that a tile's inputs are dealt out to; none is without a step."""
    programs: int
    registers: int
    """A thread's, on average."""


def choose_tiles(tokens: int, outputs: int, inputs: int, properties: DeviceProperties, *, gated: bool) -> Tiles:
    """The tile for a number of tokens, which changes at powers of two. Measured on an H100.

    With half as many tiles as multiprocessors, or less, parts of them take up to 4 % less than whole ones, unless a
    part is so short that adding it up takes longer: 4096 × 4096 as 64 tiles took 14.6 µs for 32 tokens, as 128 parts
    15.2. With somewhat more tiles than multiprocessors two programs on each take 4 % less than one for 64 tokens, but
    not for fewer.
    """
    tokens, sms = max(next_power_of_2(tokens), 8), properties.num_sms
    tiles = cdiv(outputs, OUTPUTS)
    two = tokens == 64 and sms < tiles < 1.5 * sms
    # Where a program has one unit, the first step is to be multiplied soon; else fewer turns are better.
    chunks = 4 if tiles > sms and tokens < 64 else 2
    steps = cdiv(inputs, WIDTH * chunks)
    parts = max(min(sms // tiles, OUTPUTS * inputs * 2 // (tokens * 14336), steps // 2), 1)
    parts = cdiv(steps, cdiv(steps, parts))
    room = properties.shared_memory // (2 if two else 1) - OTHER_BYTES
    stages = room // ((tokens + OUTPUTS) * chunks * WIDTH * 2)
    programs = min(tiles * parts, 2 * sms if two else sms)
    return Tiles(tokens, chunks, stages, parts, programs, 96 if two else 128)


def token_stride(x: torch.Tensor) -> int | None:
    """Elements from token to token, or None where they differ, or the copy engine can't take them."""
    if x.numel() == x.shape[-1]:
        return x.shape[-1]
    try:
        inner, stride, _ = row_strides("x", x)
    except ValueError:
        return None
    return stride if inner == 1 and stride > 0 and stride % 8 == 0 else None


def fits(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> bool:
    """Whether this kernel can do a call, as far as it is known before there is memory."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[-1] % 8 == 0
        and (not gated or weight.shape[0] % 16 == 0)
        and token_stride(x) is not None
    )


def pays(weight: torch.Tensor) -> bool:
    """Whether this kernel has been found to be faster for weights of this shape."""
    return weight.shape[0] >= LEAST_OUTPUTS and weight.numel() >= LEAST_WEIGHTS


def takes(x: torch.Tensor, weight: torch.Tensor, gated: bool, properties: DeviceProperties) -> bool:
    """Whether it does a call: the copy engine can read operands as they lie."""
    return (
        properties.capability[0] == 9
        and torch.version.hip is None
        and not INTERPRET
        and fits(x, weight, gated)
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def _described(x: torch.Tensor, rows: int, stride: int, size: int) -> TensorDescriptor:
    """`x` as a matrix of so many rows, `stride` apart, for copies of `size` of them; a single row's is never used."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k = x.shape[-1]
    return TensorDescriptor(x, [rows, k], [stride if rows > 1 else k, 1], [size, WIDTH], layout)


def _gate_beside_up(weight: torch.Tensor) -> TensorDescriptor:
    """`[2 · N, K]`, N a multiple of eight, for copies of eight rows of gate, the same of up, and so on."""
    rows, k = weight.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape, strides = [rows // 16, 2, 8, k], [8 * k, rows // 2 * k, k, 1]
    return TensorDescriptor(weight, shape, strides, [OUTPUTS // 16, 2, 8, WIDTH], layout)


def linear_few(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gated: bool,
    early: bool,
    tiles: Tiles,
) -> None:
    """Launches it, for a call that it takes; early: the kernel ahead does not write the weights."""
    (n, k), device = weight.shape, x.device
    m, steps, count = x.numel() // k, cdiv(k, WIDTH * tiles.chunks), cdiv(n, OUTPUTS)
    parts = counters = None
    if tiles.parts > 1:
        parts = empty((count, tiles.parts, OUTPUTS, tiles.tokens), torch.float32, device)
        counters = empty((count,), torch.int64, device)
    launch(
        _linear_few_kernel,
        (tiles.programs,),
        _gate_beside_up(weight) if gated else _described(weight, n, k, OUTPUTS),
        _described(x, m, token_stride(x) or k, tiles.tokens),
        weight,
        out,
        bias,
        parts,
        counters,
        m,
        n // 2 if gated else n,
        k,
        count * tiles.parts,
        steps,
        cdiv(steps, tiles.parts),
        device=device,
        num_warps=4,
        TOKENS=tiles.tokens,
        OUTPUTS=OUTPUTS,
        CHUNKS=tiles.chunks,
        STAGES=tiles.stages,
        PARTS=tiles.parts,
        GATED=gated,
        EARLY=early,
        REGISTERS=tiles.registers,
        CHAINED=chains(device),
    )
