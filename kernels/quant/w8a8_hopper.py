"""The product of `w8a8.py` for many tokens on Hopper (sm_90), in Gluon; elsewhere `w8a8.py`'s kernel does it.

A persistent program on each multiprocessor computes tiles of 128 tokens by 128 or 256 outputs: a warp loads by TMA, and
goes on to the next tile's operands while two warpgroups, 64 tokens each, write theirs. A warpgroup issues a step's
products while those of the step before run, also with int32 sums, for which Triton's own pipeline waits at every step.

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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from octavo.kernels.launch import launch
from octavo.kernels.quant.epilogue import halves
from octavo.kernels.quant.stream_k import tile_at
from octavo.kernels.quant.w8a8_epilogue import finish_gluon, residual_of
from octavo.kernels.quant.w8a8_loads import BLOCK_K, described
from octavo.kernels.tiles import cdiv, device_properties

BLOCK_M = 128
GROUPS = {torch.int8: 16, torch.float8_e4m3fn: 8}
"""Rows of tiles that programs walk together, so that those at work at a time read few rows and columns.

With 16, int8 takes up to 9 % less for 1024 tokens and more than with 8, and fp8 up to 8 % more.
"""

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def _load(
    x_desc, weight_desc, x, weight, full, empty, m_tiles, n_tiles, steps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):
    """What the warp that loads does."""
    i = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = tile_at(tile, m_tiles, n_tiles, GROUP)
        for step in range(steps):
            stage = i % STAGES
            mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K)
            at = step * BLOCK_K
            tma.async_copy_global_to_shared(x_desc, [m * BLOCK_M, at], full.index(stage), x.index(stage))
            tma.async_copy_global_to_shared(weight_desc, [n * BLOCK_N, at], full.index(stage), weight.index(stage))
            i += 1


@gluon.jit
def _finish(acc, residual, first_m, first_n, epilogue, ACTIVATED: gl.constexpr):
    """Finishes both halves of sums, one after the other, so that nothing spills; residual: of the left half."""
    HALF: gl.constexpr = acc.shape[1] // 2
    left, right = halves(acc)
    finish_gluon(left, residual, first_m, first_n, epilogue, False, ACTIVATED)
    residual = residual_of(first_m, first_n + HALF, epilogue, acc.shape[0], HALF, False, ACTIVATED)
    finish_gluon(right, residual, first_m, first_n + HALF, epilogue, False, ACTIVATED)


@gluon.jit
def _compute(
    group: gl.constexpr, epilogue, x, weight, full, empty, m_tiles, n_tiles, steps, BLOCK_M: gl.constexpr, BLOCK_N:
    gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, ACTIVATED: gl.constexpr,
):
    """What warpgroup number `group` does."""
    ROWS: gl.constexpr = BLOCK_M // 2
    ADDED: gl.constexpr = epilogue[11] is not None  # a residual, of which registers have room for 64 columns at a time
    SUM: gl.constexpr = gl.int32 if x.dtype == gl.int8 else gl.float32
    WIDTH: gl.constexpr = 128 if x.dtype == gl.int8 else BLOCK_N  # of an instruction: Triton has no wider one for int8
    acc = gl.zeros([ROWS, BLOCK_N], SUM, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32]))
    i = 0
    for tile in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        residual = None
        if ADDED:
            m, n = tile_at(tile, m_tiles, n_tiles, GROUP)
            residual = residual_of(m * BLOCK_M + group * ROWS, n * BLOCK_N, epilogue, ROWS, 64, False, ACTIVATED)
        for step in range(steps):
            stage, before = i % STAGES, (i + STAGES - 1) % STAGES
            mbarrier.wait(full.index(stage), i // STAGES & 1)
            rows = x.index(stage).slice(group * ROWS, ROWS)
            acc = warpgroup_mma(rows, weight.index(stage).permute((1, 0)), acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
            i += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1)
        m, n = tile_at(tile, m_tiles, n_tiles, GROUP)
        first_m, first_n = m * BLOCK_M + group * ROWS, n * BLOCK_N
        if not ADDED or BLOCK_N == 128:
            _finish(acc, residual, first_m, first_n, epilogue, ACTIVATED)
        else:
            left, right = halves(acc)
            _finish(left, residual, first_m, first_n, epilogue, ACTIVATED)
            residual = residual_of(first_m, first_n + BLOCK_N // 2, epilogue, ROWS, 64, False, ACTIVATED)
            _finish(right, residual, first_m, first_n + BLOCK_N // 2, epilogue, ACTIVATED)


@gluon.jit(do_not_specialize=["M", "stride_x_scale", "m_tiles"])
def _w8a8_hopper_kernel(
    # Bound by the tensor cores. One program a multiprocessor.
    x_desc, weight_desc, out_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, residual_ptr, M, N, stride_x_scale,
    stride_weight_scale, m_tiles, n_tiles, steps, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, ACTIVATED: gl.constexpr,
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
            0, epilogue, x, weight, full, empty, m_tiles, n_tiles, steps, BLOCK_M, BLOCK_N, STAGES, GROUP, ACTIVATED)),
        (_compute, (
            1, epilogue, x, weight, full, empty, m_tiles, n_tiles, steps, BLOCK_M, BLOCK_N, STAGES, GROUP, ACTIVATED)),
        (_load, (
            x_desc, weight_desc, x, weight, full, empty, m_tiles, n_tiles, steps, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
            GROUP)),
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
    activated: bool,
    stride_row: int,
    stride_x_scale: int,
    stride_weight_scale: int,
    block_n: int,
    stages: int,
) -> None:
    """Launches it; `stride_row` is from a token of x to the next."""
    n, k = weight.shape
    m = x.numel() // k
    m_tiles, n_tiles = cdiv(m, BLOCK_M), cdiv(n, block_n)
    launch(
        _w8a8_hopper_kernel,
        (min(device_properties(x.device).num_sms, m_tiles * n_tiles),),
        described(x, [m, k], stride_row, BLOCK_M),
        described(weight, [n, k], k, block_n),
        out,
        x_scale,
        weight_scale,
        bias,
        residual,
        m,
        n,
        stride_x_scale,
        stride_weight_scale,
        m_tiles,
        n_tiles,
        cdiv(k, BLOCK_K),
        device=x.device,
        num_warps=4,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        STAGES=stages,
        GROUP=GROUPS[weight.dtype],
        ACTIVATED=activated,
    )
