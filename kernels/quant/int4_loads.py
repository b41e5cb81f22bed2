"""The warps of the Hopper int4 kernel (`int4_hopper.py`) that load, by TMA: one packed weights, one tokens.

A stage is a round: the steps of each of the TURNS warpgroups that take turns, with a barrier for each of these that
tells what is full, and one that tells that all is empty. To go round its loop takes a warp that loads 450 cycles, of
some 200 instructions that wait for one another; a step may take 310.

Scales are read by those that compute, from the cache, where the warp that loads weights has had them brought: the time
from memory is that of several steps. Two rows of a packed tile's words stand side by side here, since the copy
engine's widest swizzle takes 128 bytes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from octavo.kernels.quant.int4_shares import after, place, round_at, share_of
from octavo.kernels.quant.int4_unpack import group_of
from octavo.kernels.tiles import let_next_start, wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def fetch_scales(
    ptr, stride, row, N, k, plane_groups, last_group, GROUPS: gl.constexpr, TILES: gl.constexpr, ROUND: gl.constexpr = 1
):
    """Has the scales, or minima, of a round brought into the cache (L2): by the time of its steps they are there.

    A lane looks up what a sector of 32 bytes has, or half of one.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout=layout)
    rows = gl.minimum(row + 2 * TILES * ROUND * (lane % (32 // ROUND)), N - 1)
    step = k * ROUND + lane // (32 // ROUND)
    for j in gl.static_range(GROUPS):
        group = gl.minimum(group_of(step * 4 + j * (4 // GROUPS), plane_groups), last_group).to(gl.int64)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", (ptr + group * stride + rows,), dtype=gl.int32,
            is_pure=False, pack=1,
        )


@gluon.jit
def _load_packed(
    desc, words, full, stage, row_tile, k, k_tiles, TILES: gl.constexpr, TOKENS: gl.constexpr, TURNS: gl.constexpr,
    STEPS: gl.constexpr,
):
    """Begins a round, by loading its weights: of each turn TILES times the packed tiles of its steps."""
    for turn in gl.static_range(TURNS):
        now = stage * TURNS + turn
        mbarrier.expect(full.index(now), STEPS * (TILES * 4096 + TOKENS * 256))
        for j in gl.static_range(TILES):
            at = ((row_tile * TILES + j) * k_tiles + (k * TURNS + turn) * STEPS) * 32
            tma.async_copy_global_to_shared(desc, [at, 0], full.index(now), words.index(now * TILES + j))


@gluon.jit
def _load_tokens(
    desc, x, full, stage, token_tile, k, TOKENS: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr,
):
    for turn in gl.static_range(TURNS):
        now = stage * TURNS + turn
        for half in gl.static_range(2 * STEPS):
            at = [token_tile * TOKENS, (k * TURNS + turn) * (STEPS * 128) + half * 64]
            tma.async_copy_global_to_shared(desc, at, full.index(now), x.index(2 * STEPS * now + half))


@gluon.jit
def load_weights(
    desc, words, full, empty, scale_ptr, minimum_ptr, shares, early, N, k_tiles, last_group, plane_groups,
    stride_scale_group, stride_minimum_group, GROUPS: gl.constexpr, TILES: gl.constexpr, TOKENS: gl.constexpr, TURNS:
    gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
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
        mbarrier.wait(empty.index(stage), phase)
        _load_packed(desc, words, full, stage, row_tile, k, k_tiles, TILES, TOKENS, TURNS, STEPS)
        row = row_tile * (64 * TILES)
        fetch_scales(scale_ptr, stride_scale_group, row, N, k, plane_groups, last_group, GROUPS, TILES, ROUND)
        if minimum_ptr is not None:
            fetch_scales(minimum_ptr, stride_minimum_group, row, N, k, plane_groups, last_group, GROUPS, TILES, ROUND)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        k, row_tile, token_tile = after(i, k, row_tile, token_tile, first, own, program, programs, shares)


@gluon.jit
def load_tokens(
    desc, x, full, empty, shares, TOKENS: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """What the warp does that loads tokens: the kernel before may be about to write them.

    It is another than the one that loads weights, so that the first tokens do not come behind as many weights as there
    is room for, and because a step of few tokens takes hardly longer than issuing its copies.
    """
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
        mbarrier.wait(empty.index(stage), phase)
        _load_tokens(desc, x, full, stage, token_tile, k, TOKENS, TURNS, STEPS)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        k, row_tile, token_tile = after(i, k, row_tile, token_tile, first, own, program, programs, shares)
