"""The warps of the Hopper int8 kernel (`int8_hopper.py`) that load, by TMA: one weights, one tokens.

As in `int4_loads.py`; but weights come as they lie in memory, and a stage is a step of 128 inputs or half of one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from octavo.kernels.quant.int4_loads import fetch_scales
from octavo.kernels.quant.int4_shares import after, after_turns, place, share_of, step_at
from octavo.kernels.tiles import let_next_start, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def load_bytes_of_weights(
    desc, weights, full, empty, scale_ptr, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles,
    width, stride_scale_group, GROUPS: gl.constexpr, TILES: gl.constexpr, TOKENS: gl.constexpr, INPUTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What the warp does that loads weights: it does not wait for the kernel before, which does not write them."""
    STAGE_BYTES: gl.constexpr = (TILES * 64 + TOKENS * 2) * INPUTS
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    first, own, steps = share_of(program, programs, tiles, shared, k_tiles)
    tile, k = step_at(0, first, own, program, programs, shared, k_tiles)
    row_tile, token_tile = place(tile, row_tiles, token_tiles, width)
    stage = 0
    phase = 1
    for i in range(steps):
        row = row_tile * (64 * TILES)
        for part in gl.static_range(128 // INPUTS):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), STAGE_BYTES)
            for j in gl.static_range(TILES):
                at = [row + 64 * j, k * 128 + part * INPUTS]
                tma.async_copy_global_to_shared(desc, at, full.index(stage), weights.index(stage * TILES + j))
            stage, phase = after_turns(stage, phase, 1, STAGES)
        if GROUPS > 0:
            fetch_scales(scale_ptr, stride_scale_group, row, N, k, group_planes, last_group, GROUPS, TILES)
        k, row_tile, token_tile = after(
            i, k, row_tile, token_tile, first, own, program, programs, shared, k_tiles, row_tiles, token_tiles, width
        )


@gluon.jit
def load_parts_of_tokens(
    desc, x, full, empty, k_tiles, tiles, shared, row_tiles, token_tiles, width, TOKENS: gl.constexpr, INPUTS:
    gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads tokens: the kernel before may be about to write them."""
    HALVES: gl.constexpr = INPUTS // 64
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    first, own, steps = share_of(program, programs, tiles, shared, k_tiles)
    tile, k = step_at(0, first, own, program, programs, shared, k_tiles)
    row_tile, token_tile = place(tile, row_tiles, token_tiles, width)
    stage = 0
    phase = 1
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    for i in range(steps):
        for part in gl.static_range(128 // INPUTS):
            mbarrier.wait(empty.index(stage), phase)
            for half in gl.static_range(HALVES):
                at = [token_tile * TOKENS, k * 128 + part * INPUTS + half * 64]
                tma.async_copy_global_to_shared(desc, at, full.index(stage), x.index(HALVES * stage + half))
            stage, phase = after_turns(stage, phase, 1, STAGES)
        k, row_tile, token_tile = after(
            i, k, row_tile, token_tile, first, own, program, programs, shared, k_tiles, row_tiles, token_tiles, width
        )
