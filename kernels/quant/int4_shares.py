"""Which part of the product each program of the Hopper int4 kernel (`int4_hopper.py`) computes, and in what order.

The product is cut into tiles of outputs by tokens, a tile into rounds: a turn for each warpgroup of a side, of one step
of 128 inputs or two. Where whole tiles fill the GPU badly, the rounds of the first `shared` tiles stand in one row, of
which each program takes an equal share (stream-K: Osama et al. 2023, https://arxiv.org/abs/2301.03598); the other tiles
are computed whole, one program each, in turns. Of a tile that shares cut, each of its programs leaves its part in
memory, and a second kernel (`int4_parts.py`) adds them up in the order of their inputs.

Programs that run at the same time have neighbouring tiles, so that weights and tokens stay in the cache (L2).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def share_of(program, programs, shares):
    """The program's first shared round, how many it has, and how many rounds in all.

    shares: tiles, how many of them are shared, the rounds of those and of a tile, tiles of outputs and of tokens, and
    how many of the latter stand side by side. The product of the second and the fourth is given, since the compiler
    would compute it once for all warps, and keep it in a register of each.
    """
    tiles, shared, shared_rounds, rounds = shares[0], shares[1], shares[2], shares[3]
    first = program * shared_rounds // programs
    own = (program + 1) * shared_rounds // programs - first
    whole = gl.maximum(tiles - shared - program + programs - 1, 0) // programs
    return first, own, own + whole * rounds


@gluon.jit
def round_at(i, first, own, program, programs, shares):
    """The tile and the place in it of the program's round number i."""
    shared, rounds = shares[1], shares[3]
    tile = (first + i) // rounds
    k = (first + i) % rounds
    if i >= own:
        tile = shared + program + (i - own) // rounds * programs
        k = (i - own) % rounds
    return tile, k


@gluon.jit
def place(tile, row_tiles, token_tiles, width):
    """The tile's outputs and tokens; `width` tiles of tokens stand side by side before the next outputs come."""
    section = tile // (row_tiles * width)
    inside = tile % (row_tiles * width)
    columns = gl.maximum(gl.minimum(token_tiles - section * width, width), 1)  # past the last tile, for nothing, 1
    return inside // columns, section * width + inside % columns


@gluon.jit
def after(i, k, row_tile, token_tile, first, own, program, programs, shares):
    """The place and the tile of the round after number i, which are given."""
    k += 1
    if (k == shares[3]) | (i + 1 == own):
        tile, k = round_at(i + 1, first, own, program, programs, shares)
        row_tile, token_tile = place(tile, shares[4], shares[5], shares[6])
    return k, row_tile, token_tile


@gluon.jit
def stage_of(i, STAGES: gl.constexpr):
    """The stage of a program's round number i, and its phase."""
    return i % STAGES, i // STAGES & 1


@gluon.jit
def stage_after(stage, phase, STAGES: gl.constexpr):
    """The stage that comes next, and its phase."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), phase ^ wraps.to(gl.int32)


@gluon.jit
def program_of(i, programs, shared_rounds):
    """Which program has the shared round number i."""
    return ((i + 1) * programs - 1) // shared_rounds


@gluon.jit
def slot_of(program, tile, programs, rounds, shared_rounds):
    """Where a program leaves its part of a tile that it shares: it has at most one that it ends, one that it begins."""
    first = program * shared_rounds // programs
    return 2 * program + (first <= tile * rounds).to(gl.int32)
