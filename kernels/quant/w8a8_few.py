"""The product of `w8a8.py` for few tokens on Hopper (sm_90), in Gluon; elsewhere `w8a8.py`'s kernel does it.

The time is that of reading the weights. A program has one tile of outputs, or an equal part of its inputs: a warp loads
by TMA, one warpgroup multiplies. It mostly takes less than half of a multiprocessor, so that two run on each: where
there are more programs, the GPU deals them out as multiprocessors become free; where there are fewer, those of the next
kernel are there before the last ones of this have ended, and their first weights in the cache (L2).

Weights are the first operand, which has 64 rows at least; where 64 tokens would have too few tiles of so many outputs,
tokens are, and tiles have 32 outputs.
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

from octavo.kernels.launch import launch
from octavo.kernels.quant.w8a8_epilogue import finish_gluon, finish_halves, residual_of
from octavo.kernels.quant.w8a8_loads import BLOCK_K, described, prefetch, scale_ptrs
from octavo.kernels.quant.w8a8_parts import add_parts, leave_part, room_for_parts
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    let_next_start,
    next_power_of_2,
    wait_for_previous,
)

MOST_TOKENS = 128
REGISTERS = 128
"""A thread's, on average: with 256 threads, half of a multiprocessor's."""
OTHER_BYTES = 2048
"""Of shared memory: barriers, and what the GPU keeps for itself."""

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _load(
    x_desc, weight_desc, weight_ptr, x, weight, full, empty, first_n, first_k, steps, N, K, TOKENS: gl.constexpr,
    OUTPUTS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PREFETCHED: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """What the warp that loads does."""
    if CHAINED:
        prefetch(weight_ptr, first_n, first_k, N, K, OUTPUTS, PREFETCHED)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), (TOKENS + OUTPUTS) * BLOCK_K)
        at = first_k + i * BLOCK_K
        tma.async_copy_global_to_shared(weight_desc, [first_n, at], full.index(stage), weight.index(stage))
        tma.async_copy_global_to_shared(x_desc, [0, at], full.index(stage), x.index(stage))


@gluon.jit
def _compute(
    epilogue, parts_ptr, x, weight, full, empty, first_n, part, first_step, steps, TOKENS: gl.constexpr, OUTPUTS:
    gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, BLOCKS: gl.constexpr, ACTIVATED: gl.constexpr, CHAINED:
    gl.constexpr,
):
    """What the warpgroup does. Sums of fp8 products, of which tensor cores keep 14 bits, are taken out at each step."""
    TURNED: gl.constexpr = OUTPUTS >= 64
    INT: gl.constexpr = x.dtype == gl.int8
    SUM: gl.constexpr = gl.int32 if INT else gl.float32
    ROWS: gl.constexpr = OUTPUTS if TURNED else TOKENS
    COLS: gl.constexpr = TOKENS if TURNED else OUTPUTS
    zeros = gl.zeros([ROWS, COLS], SUM, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 32]))
    acc = zeros
    wait_for_previous(CHAINED)
    if PARTS == 1 and TOKENS < 128:  # else there are no registers for it
        residual = residual_of(0, first_n, epilogue, ROWS, COLS, TURNED, ACTIVATED)
    if BLOCKS:
        # Read three steps ahead, which is what the cache (L2) takes; where tokens are columns, once for all threads.
        TOKEN: gl.constexpr = gl.SliceLayout(0 if TURNED else 1, acc.type.layout)
        READ: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0]) if TURNED else TOKEN
        x_ptrs, w_ptr = scale_ptrs(epilogue, 0, first_n, first_step, TOKENS, READ)
        step_1, step_2 = gl.minimum(steps - 1, 1), gl.minimum(steps - 1, 2)
        x_scale, w_scale = gl.load(x_ptrs), gl.load(w_ptr)
        x_scale_1, w_scale_1 = gl.load(x_ptrs + step_1), gl.load(w_ptr + step_1)
        x_scale_2, w_scale_2 = gl.load(x_ptrs + step_2), gl.load(w_ptr + step_2)
    for i in range(steps):
        stage, before = i % STAGES, (i + STAGES - 1) % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        if TURNED:
            first, second = weight.index(stage), x.index(stage).permute((1, 0))
        else:
            first, second = x.index(stage), weight.index(stage).permute((1, 0))
        if INT:
            acc = warpgroup_mma(first, second, acc, use_acc=i > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
        else:
            sums = warpgroup_mma(first, second, zeros, use_acc=False, is_async=True)
            if BLOCKS:
                scale = gl.expand_dims(gl.convert_layout(x_scale * w_scale, TOKEN), 0 if TURNED else 1)
                ahead = gl.minimum(steps - 1, i + 3)
                x_scale, w_scale, x_scale_1, w_scale_1 = x_scale_1, w_scale_1, x_scale_2, w_scale_2
                x_scale_2, w_scale_2 = gl.load(x_ptrs + ahead), gl.load(w_ptr + ahead)
            sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(empty.index(stage), count=1)
            acc += sums * scale if BLOCKS else sums
    if INT:
        acc = warpgroup_mma_wait(0, deps=[acc])
    if PARTS > 1:
        leave_part(acc, parts_ptr, part, 0, first_n, epilogue[1], epilogue[2], TURNED)
    elif TOKENS < 128:
        finish_gluon(acc, residual, 0, first_n, epilogue, TURNED, BLOCKS, ACTIVATED)
    else:
        residual = residual_of(0, first_n, epilogue, ROWS, COLS // 2, TURNED, ACTIVATED)
        finish_halves(acc, residual, 0, first_n, epilogue, TURNED, BLOCKS, ACTIVATED)


@gluon.jit(do_not_specialize=["M", "stride_x_scale", "stride_x_zero", "part_steps"])
def _w8a8_few_kernel(
    # Bound by reading the weights. Two programs a multiprocessor, or one.
    x_desc, weight_desc, out_ptr, parts_ptr, weight_ptr, x_scale_ptr, weight_scale_ptr, x_zero_ptr, weight_sum_ptr,
    bias_ptr, residual_ptr, M, N, K, stride_x_scale, stride_weight_scale, stride_x_zero, part_steps, TOKENS:
    gl.constexpr, OUTPUTS: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, BLOCKS:
    gl.constexpr, ACTIVATED: gl.constexpr, PREFETCHED: gl.constexpr, REGISTERS: gl.constexpr, CHAINED: gl.constexpr,
):
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, BLOCK_K], x_desc.layout)
    weight = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, OUTPUTS, BLOCK_K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    first_n = gl.program_id(0) // PARTS * OUTPUTS
    part = gl.program_id(0) % PARTS
    first = part * part_steps
    steps = gl.minimum(gl.cdiv(K, BLOCK_K) - first, part_steps)
    epilogue = (
        out_ptr, M, N, x_scale_ptr, stride_x_scale, weight_scale_ptr, stride_weight_scale, x_zero_ptr, stride_x_zero,
        weight_sum_ptr, bias_ptr, residual_ptr,
    )
    gl.warp_specialize([
        (_compute, (
            epilogue, parts_ptr, x, weight, full, empty, first_n, part, first, steps, TOKENS, OUTPUTS, STAGES, PARTS,
            BLOCKS, ACTIVATED, CHAINED)),
        (_load, (
            x_desc, weight_desc, weight_ptr, x, weight, full, empty, first_n, first * BLOCK_K, steps, N, K, TOKENS,
            OUTPUTS, BLOCK_K, STAGES, PREFETCHED, CHAINED)),
    ], [1], [24])
# fmt: on


@dataclass(frozen=True)
class FewTiles:
    """The tile of a program."""

    tokens: int
    """All of them."""
    outputs: int
    stages: int
    parts: int
    """Programs that a tile's inputs are dealt out to."""


def stages_for_two(tokens: int, outputs: int, properties: DeviceProperties) -> int:
    """As many as two programs a multiprocessor have room for."""
    return (properties.shared_memory // 2 - OTHER_BYTES) // ((tokens + outputs) * BLOCK_K)


def choose_few(
    tokens: int, outputs: int, inputs: int, properties: DeviceProperties, *, blocks: bool, activated: bool
) -> FewTiles | None:
    """The tile for a number of tokens, which changes at powers of two; None where larger tiles are better.

    Measured on an H100. Two programs a multiprocessor take up to 6 % less than one with all of its memory, but up to
    11 % more where rows of weights are a multiple of 8192 bytes apart, for a reason that is not known, and 10 to 30 %
    more with 128 tokens. Two parts of a tile take up to 5 % more than whole ones, except with 128 tokens: those take up
    to 18 % less. Where a second wave of tiles would be mostly empty, three parts take 1 to 15 % less.
    """
    tokens, sms = max(next_power_of_2(tokens), 16), properties.num_sms
    tiles = cdiv(outputs, 64)
    if tokens > MOST_TOKENS or (tokens == MOST_TOKENS and (blocks or tiles > sms)):
        return None
    uneven = sms < tiles < 1.25 * sms
    size = 32 if tokens == 64 and (tiles <= sms or (uneven and not blocks)) and not activated else 64
    # Parts take a second kernel, which is not worth its time where a program has little to read: 256 KB, at least.
    parts = min(sms // cdiv(outputs, size), size * inputs // 2**18)
    if uneven and tokens < 64 and inputs >= 8192:
        parts = 3
    elif parts < (2 if tokens == MOST_TOKENS else 3):
        parts = 1
    stages = stages_for_two(tokens, size, properties)
    if size == 64 and (tokens == MOST_TOKENS or (inputs % 8192 == 0 and not uneven)):
        stages *= 2
    return FewTiles(tokens, size, stages, parts)


def w8a8_few(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    blocks: bool,
    activated: bool,
    stride_row: int,
    strides: tuple[int, int, int],
    tiles: FewTiles,
) -> None:
    """Launches it; `stride_row` is from a token of x to the next, `strides` those of the scales and zero points."""
    (n, k), device = weight.shape, x.device
    m, steps = x.numel() // k, cdiv(k, BLOCK_K)
    part_steps = cdiv(steps, tiles.parts)
    count = cdiv(steps, part_steps)
    chained = chains(device)
    parts = room_for_parts(count, m, n, weight)
    more = x_scale, weight_scale, x_zero, weight_sum, bias, residual
    launch(
        _w8a8_few_kernel,
        (cdiv(n, tiles.outputs) * count,),
        described(x, [m, k], stride_row, tiles.tokens),
        described(weight, [n, k], k, tiles.outputs),
        out,
        parts,
        weight,
        *more,
        m,
        n,
        k,
        *strides,
        part_steps,
        device=device,
        num_warps=4,
        TOKENS=tiles.tokens,
        OUTPUTS=tiles.outputs,
        BLOCK_K=BLOCK_K,
        STAGES=tiles.stages,
        PARTS=count,
        BLOCKS=blocks,
        ACTIVATED=activated,
        PREFETCHED=min(tiles.stages * BLOCK_K, k),
        REGISTERS=REGISTERS,
        CHAINED=chained,
    )
    if parts is not None:
        add_parts(out, parts, *more, blocks, activated, strides)
