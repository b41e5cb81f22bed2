"""The warps of the Hopper int4 kernel (`int4_hopper.py`) that load, by TMA: one packed weights, one tokens.

Scales are read by those that compute, from the cache, where the warp that loads weights has had them brought: the time
from memory is that of several steps. Two rows of a packed tile's words stand side by side here, since the copy
engine's widest swizzle takes 128 bytes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from octavo.kernels.quant.int4_shares import after, place, share_of, step_at
from octavo.kernels.tiles import let_next_start, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def fetch(ptr, stride, row, N, k, group_planes, last_group, GROUPS: gl.constexpr, TILES: gl.constexpr):
    """Has a step's scales, or minima, brought into the cache (L2): by the time of their step they are there."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    rows = gl.minimum(row + 2 * TILES * gl.arange(0, 32, layout=layout), N - 1)
    for j in gl.static_range(GROUPS):
        group = gl.minimum((k * 4 + j * (4 // GROUPS)) // group_planes, last_group).to(gl.int64)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", (ptr + group * stride + rows,), dtype=gl.int32,
            is_pure=False, pack=1,
        )


@gluon.jit
def _load_packed(
    desc, words, full, stage, row_tile, k, k_tiles, STAGE_BYTES: gl.constexpr, TILES: gl.constexpr,
):
    """Begins a step, by loading its weights: TILES packed tiles."""
    mbarrier.expect(full.index(stage), STAGE_BYTES)
    for j in gl.static_range(TILES):
        at = ((row_tile * TILES + j) * k_tiles + k) * 32
        tma.async_copy_global_to_shared(desc, [at, 0], full.index(stage), words.index(stage * TILES + j))


@gluon.jit
def _load_tokens(desc, x, full, stage, token_tile, k, TOKENS: gl.constexpr):
    for half in gl.static_range(2):
        at = k * 128 + half * 64
        tma.async_copy_global_to_shared(desc, [token_tile * TOKENS, at], full.index(stage), x.index(2 * stage + half))


@gluon.jit
def load_weights(
    desc, words, full, empty, scale_ptr, minimum_ptr, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles,
    token_tiles, width, stride_scale_group, stride_minimum_group, GROUPS: gl.constexpr, TILES: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):
    """What the warp does that loads weights: it does not wait for the kernel before, which does not write them."""
    STAGE_BYTES: gl.constexpr = TILES * 4096 + TOKENS * 256
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    first, own, steps = share_of(program, programs, tiles, shared, k_tiles)
    tile, k = step_at(0, first, own, program, programs, shared, k_tiles)
    row_tile, token_tile = place(tile, row_tiles, token_tiles, width)
    stage = 0
    phase = 1
    for i in range(steps):
        mbarrier.wait(empty.index(stage), phase)
        _load_packed(desc, words, full, stage, row_tile, k, k_tiles, STAGE_BYTES, TILES)
        row = row_tile * (64 * TILES)
        fetch(scale_ptr, stride_scale_group, row, N, k, group_planes, last_group, GROUPS, TILES)
        if minimum_ptr is not None:
            fetch(minimum_ptr, stride_minimum_group, row, N, k, group_planes, last_group, GROUPS, TILES)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        k, row_tile, token_tile = after(
            i, k, row_tile, token_tile, first, own, program, programs, shared, k_tiles, row_tiles, token_tiles, width
        )


@gluon.jit
def load_tokens(
    desc, x, full, empty, k_tiles, tiles, shared, row_tiles, token_tiles, width, TOKENS: gl.constexpr, STAGES:
    gl.constexpr, CHAINED: gl.constexpr,
):
    """What the warp does that loads tokens: the kernel before may be about to write them.

    It is another than the one that loads weights, so that the first tokens do not come behind as many weights as there
    is room for, and because a step of few tokens takes hardly longer than issuing its copies.
    """
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
        mbarrier.wait(empty.index(stage), phase)
        _load_tokens(desc, x, full, stage, token_tile, k, TOKENS)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        k, row_tile, token_tile = after(
            i, k, row_tile, token_tile, first, own, program, programs, shared, k_tiles, row_tiles, token_tiles, width
        )
