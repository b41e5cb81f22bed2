"""The warps of the Hopper int8 kernel (`int8_hopper.py`) that load, by TMA: one weights, one tokens.

As in `int4_loads.py`; but weights come as they lie in memory, and a stage is a round or half of one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from octavo.kernels.quant.int4_loads import fetch_scales
from octavo.kernels.quant.int4_shares import after, place, round_at, share_of, stage_after
from octavo.kernels.tiles import let_next_start, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def load_bytes_of_weights(
    desc, weights, full, empty, scale_ptr, shares, early, N, last_group, plane_groups, stride_scale_group, GROUPS:
    gl.constexpr, TILES: gl.constexpr, TOKENS: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, INPUTS:
    gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads weights; early: not behind the kernel before, which does not write them."""
    if early == 0:
        wait_for_previous(CHAINED)
    ROUND: gl.constexpr = TURNS * STEPS
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    first, own, count = share_of(program, programs, shares)
    tile, k = round_at(0, first, own, program, programs, shares)
    row_tile, token_tile = place(tile, shares[4], shares[5], shares[6])
    stage = 0
    phase = 1
    for i in range(count):
        row = row_tile * (64 * TILES)
        for part in gl.static_range(128 // INPUTS):
            mbarrier.wait(empty.index(stage), phase)
            for turn in gl.static_range(TURNS):
                now = stage * TURNS + turn
                mbarrier.expect(full.index(now), (TILES * 64 + TOKENS * 2) * INPUTS * STEPS)
                for j in gl.static_range(TILES * STEPS):
                    at = [row + j // STEPS * 64, (k * ROUND + turn * STEPS + j % STEPS) * 128 + part * INPUTS]
                    tma.async_copy_global_to_shared(desc, at, full.index(now), weights.index(now * TILES * STEPS + j))
            stage, phase = stage_after(stage, phase, STAGES)
        if GROUPS > 0:
            fetch_scales(scale_ptr, stride_scale_group, row, N, k, plane_groups, last_group, GROUPS, TILES, ROUND)
        k, row_tile, token_tile = after(i, k, row_tile, token_tile, first, own, program, programs, shares)


@gluon.jit
def load_parts_of_tokens(
    desc, x, full, empty, shares, TOKENS: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, INPUTS: gl.constexpr,
    STAGES: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads tokens: the kernel before may be about to write them."""
    HALVES: gl.constexpr = INPUTS // 64
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    first, own, count = share_of(program, programs, shares)
    tile, k = round_at(0, first, own, program, programs, shares)
    row_tile, token_tile = place(tile, shares[4], shares[5], shares[6])
    stage = 0
    phase = 1
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    for i in range(count):
        for part in gl.static_range(128 // INPUTS):
            mbarrier.wait(empty.index(stage), phase)
            for turn in gl.static_range(TURNS):
                now = stage * TURNS + turn
                for half in gl.static_range(HALVES * STEPS):
                    at = [token_tile * TOKENS, (k * TURNS + turn) * (STEPS * 128) + part * INPUTS + half * 64]
                    tma.async_copy_global_to_shared(desc, at, full.index(now), x.index(HALVES * STEPS * now + half))
            stage, phase = stage_after(stage, phase, STAGES)
        k, row_tile, token_tile = after(i, k, row_tile, token_tile, first, own, program, programs, shares)
