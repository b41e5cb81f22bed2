"""The product of `w8a8.py` for many tokens on Hopper (sm_90), in Gluon; elsewhere `w8a8.py`'s kernel does it.

A persistent program on each multiprocessor computes tiles of 128 tokens by 128 or 256 outputs: a warp loads by TMA for
two warpgroups, 64 tokens each. A warpgroup issues a step's products while those of the step before run, also with int32
sums, for which Triton's own pipeline waits at every step. Results of 16 bits are written while the first products of
the next tile run, and scales read ahead of a tile's steps: at 8192³, int8 takes 4 % less so on an H100, and fp8 2 %.

There, power limits fp8: with zeros for operands it takes 26 % less time, 12 % less than cuBLAS, which is 2 to 13 %
faster with random ones. It may be that cuBLAS moves less: programs of a cluster can share what they load (multicast),
which Triton 3.6 has no way to say. Neighbouring tiles on pairs of multiprocessors, instructions of 128 columns for fp8,
and one warpgroup some steps behind the other were no faster.

It is not chained to the kernel before it: a program fills its multiprocessor, so that none starts early. Chained, with
its first weights prefetched into the cache (L2), int8 took up to 21 % longer at 15 of 20 sizes on an H100, and at most
2 % less at the others.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from octavo.kernels.launch import launch
from octavo.kernels.quant.epilogue import halves
from octavo.kernels.quant.stream_k import tile_at
from octavo.kernels.quant.w8a8_epilogue import finish_halves, residual_of, results_of, scales_of, write
from octavo.kernels.quant.w8a8_loads import BLOCK_K, described, multiply
from octavo.kernels.quant.w8a8_parts import add_parts, leave_part, room_for_parts, steps_of
from octavo.kernels.quant.w8a8_promoted import compute_small, compute_wide
from octavo.kernels.tiles import cdiv, device_properties

BLOCK_M = 128
GROUPS = {torch.int8: 16, torch.float8_e4m3fn: 8}
"""Rows of tiles that programs walk together, so that those at work at a time read few rows and columns.

With 16, int8 took up to 9 % less for 1024 tokens and more than with 8, and fp8 up to 8 % more.
"""

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _load(
    x_desc, weight_desc, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M: gl.constexpr, BLOCK_N:
    gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr,
):
    """What the warp that loads does."""
    i = 0
    for work in range(gl.program_id(0), m_tiles * n_tiles * PARTS, gl.num_programs(0)):
        m, n = tile_at(work // PARTS, m_tiles, n_tiles, GROUP)
        first, end = steps_of(work % PARTS, steps, part_steps)
        for step in range(first, end):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K)
            at = step * BLOCK_K
            tma.async_copy_global_to_shared(x_desc, [m * BLOCK_M, at], full.index(stage), x.index(stage))
            tma.async_copy_global_to_shared(weight_desc, [n * BLOCK_N, at], full.index(stage), weight.index(stage))
            i += 1


@gluon.jit
def _write_halves(left, right, first_m, first_n, epilogue, BLOCK_N: gl.constexpr, ACTIVATED: gl.constexpr):
    write(left, None, first_m, first_n, epilogue, False, ACTIVATED)
    write(right, None, first_m, first_n + BLOCK_N // 2, epilogue, False, ACTIVATED)


@gluon.jit
def _compute_plain(
    group: gl.constexpr, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M:
    gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr, ACTIVATED:
    gl.constexpr,
):
    ROWS: gl.constexpr = BLOCK_M // 2
    HALF: gl.constexpr = BLOCK_N // 2
    # A residual, of which registers have room for 64 columns at a time.
    ADDED: gl.constexpr = epilogue[11] is not None and PARTS == 1
    # Whether results, 16 bits each, are kept until the next tile's first products run.
    DTYPE: gl.constexpr = epilogue[0].dtype.element_ty
    LATE: gl.constexpr = PARTS == 1 and not ADDED and DTYPE.primitive_bitwidth == 16
    SUM: gl.constexpr = gl.int32 if x.dtype == gl.int8 else gl.float32
    WIDTH: gl.constexpr = 128 if x.dtype == gl.int8 else BLOCK_N  # of an instruction: Triton has no wider one for int8
    acc = gl.zeros([ROWS, BLOCK_N], SUM, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32]))
    if LATE:
        left, right = halves(acc)
        last_m, last_n = epilogue[1], epilogue[2]  # past the end: there are none yet
        left_y = results_of(left, None, last_m, last_n, epilogue, False, True, ACTIVATED).to(DTYPE)
        right_y = results_of(right, None, last_m, last_n, epilogue, False, True, ACTIVATED).to(DTYPE)
    i = 0
    for work in range(gl.program_id(0), m_tiles * n_tiles * PARTS, gl.num_programs(0)):
        m, n = tile_at(work // PARTS, m_tiles, n_tiles, GROUP)
        first_m, first_n = m * BLOCK_M + group * ROWS, n * BLOCK_N
        first, end = steps_of(work % PARTS, steps, part_steps)
        residual = None
        if LATE:
            of_left = scales_of(first_m, first_n, epilogue, ROWS, HALF)
            of_right = scales_of(first_m, first_n + HALF, epilogue, ROWS, HALF)
        elif ADDED:
            residual = residual_of(first_m, first_n, epilogue, ROWS, 64, False, ACTIVATED)
        acc = multiply(x, weight, full, acc, i, group, ROWS, STAGES, True)
        if LATE:
            _write_halves(left_y, right_y, last_m, last_n, epilogue, BLOCK_N, ACTIVATED)
        acc = warpgroup_mma_wait(1, deps=[acc])
        i += 1
        for _ in range(first + 1, end):
            acc = multiply(x, weight, full, acc, i, group, ROWS, STAGES, False)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
            i += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        if PARTS > 1:
            leave_part(acc, parts_ptr, work % PARTS, first_m, first_n, epilogue[1], epilogue[2], False)
        elif LATE:
            left, right = halves(acc)
            left_y = results_of(left, of_left, first_m, first_n, epilogue, False, False, ACTIVATED).to(DTYPE)
            right_y = results_of(right, of_right, first_m, first_n + HALF, epilogue, False, False, ACTIVATED).to(DTYPE)
            last_m, last_n = first_m, first_n
        elif not ADDED or BLOCK_N == 128:
            finish_halves(acc, residual, first_m, first_n, epilogue, False, False, ACTIVATED)
        else:
            left, right = halves(acc)
            finish_halves(left, residual, first_m, first_n, epilogue, False, False, ACTIVATED)
            residual = residual_of(first_m, first_n + HALF, epilogue, ROWS, 64, False, ACTIVATED)
            finish_halves(right, residual, first_m, first_n + HALF, epilogue, False, False, ACTIVATED)
    if LATE:
        _write_halves(left_y, right_y, last_m, last_n, epilogue, BLOCK_N, ACTIVATED)


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M:
    gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr, PROMOTED:
    gl.constexpr, BLOCKS: gl.constexpr, ACTIVATED: gl.constexpr,
):
    """What warpgroup number `group` does."""
    if PROMOTED and BLOCK_N == 256:
        compute_wide(
            group, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M, BLOCK_N,
            STAGES, PARTS, GROUP, BLOCKS, ACTIVATED)
    elif PROMOTED:
        compute_small(
            group, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M, BLOCK_N,
            STAGES, PARTS, GROUP, BLOCKS, ACTIVATED)
    else:
        _compute_plain(
            group, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M, BLOCK_N,
            STAGES, PARTS, GROUP, ACTIVATED)


@gluon.jit(do_not_specialize=["M", "stride_x_scale", "m_tiles", "part_steps"])
def _w8a8_hopper_kernel(
    # Bound by the tensor cores. One program a multiprocessor.
    x_desc, weight_desc, out_ptr, parts_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, M, N,
    stride_x_scale, stride_weight_scale, m_tiles, n_tiles, steps, part_steps, BLOCK_M: gl.constexpr, BLOCK_N:
    gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, GROUP: gl.constexpr, PROMOTED:
    gl.constexpr, BLOCKS: gl.constexpr, ACTIVATED: gl.constexpr,
):
    x = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    weight = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    epilogue = (
        out_ptr, M, N, x_scale_ptr, stride_x_scale, weight_scale_ptr, stride_weight_scale, None, 0, None, bias_ptr,
        residual_ptr,
    )
    gl.warp_specialize([
        (_compute, (
            0, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M, BLOCK_N,
            STAGES, PARTS, GROUP, PROMOTED, BLOCKS, ACTIVATED)),
        (_compute, (
            1, epilogue, parts_ptr, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M, BLOCK_N,
            STAGES, PARTS, GROUP, PROMOTED, BLOCKS, ACTIVATED)),
        (_load, (
            x_desc, weight_desc, x, weight, full, empty, m_tiles, n_tiles, steps, part_steps, BLOCK_M, BLOCK_N, BLOCK_K,
            STAGES, PARTS, GROUP)),
    ], [4, 1], [240, 24])
# fmt: on


def w8a8_hopper(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    promoted: bool,
    blocks: bool,
    activated: bool,
    stride_row: int,
    strides: tuple[int, int, int],
    block_n: int,
    stages: int,
    parts: int,
) -> None:
    """Launches it; `stride_row` is from a token of x to the next, `strides` those of the scales and zero points."""
    n, k = weight.shape
    m = x.numel() // k
    m_tiles, n_tiles, steps = cdiv(m, BLOCK_M), cdiv(n, block_n), cdiv(k, BLOCK_K)
    part_steps = cdiv(steps, parts)
    count = cdiv(steps, part_steps)
    sums = room_for_parts(count, m, n, weight)
    launch(
        _w8a8_hopper_kernel,
        (min(device_properties(x.device).num_sms, m_tiles * n_tiles * count),),
        described(x, [m, k], stride_row, BLOCK_M),
        described(weight, [n, k], k, block_n),
        out,
        sums,
        x_scale,
        weight_scale,
        bias,
        residual,
        m,
        n,
        *strides[:2],
        m_tiles,
        n_tiles,
        steps,
        part_steps,
        device=x.device,
        num_warps=4,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        STAGES=stages,
        PARTS=count,
        GROUP=GROUPS[weight.dtype],
        PROMOTED=promoted,
        BLOCKS=blocks,
        ACTIVATED=activated,
    )
    if sums is not None:
        add_parts(out, sums, x_scale, weight_scale, None, None, bias, residual, blocks, activated, strides)
