"""Which part of the product each program of the Hopper int4 kernel (`int4_hopper.py`) computes, and in what order.

The product is cut into tiles of outputs by tokens, a tile into steps of 128 inputs. Where whole tiles fill the GPU
badly, the steps of the first `shared` tiles stand in one row, of which each program takes an equal share (stream-K:
Osama et al. 2023, https://arxiv.org/abs/2301.03598); the other tiles are computed whole, one program each, in turns. Of
a tile that shares cut, each of its programs leaves its part in memory, and a second kernel (`int4_parts.py`) adds them
up in the order of their inputs.

Programs that run at the same time have neighbouring tiles, so that weights and tokens stay in the cache (L2).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def share_of(program, programs, tiles, shared, k_tiles):
    """The program's first shared step, how many it has, and how many steps in all."""
    first = program * (shared * k_tiles) // programs
    own = (program + 1) * (shared * k_tiles) // programs - first
    whole = gl.maximum(tiles - shared - program + programs - 1, 0) // programs
    return first, own, own + whole * k_tiles


@gluon.jit
def step_at(i, first, own, program, programs, shared, k_tiles):
    """The tile and the place in it of the program's step number i."""
    tile = (first + i) // k_tiles
    k = (first + i) % k_tiles
    if i >= own:
        tile = shared + program + (i - own) // k_tiles * programs
        k = (i - own) % k_tiles
    return tile, k


@gluon.jit
def place(tile, row_tiles, token_tiles, width):
    """The tile's outputs and tokens; `width` tiles of tokens stand side by side before the next outputs come."""
    section = tile // (row_tiles * width)
    inside = tile % (row_tiles * width)
    columns = gl.maximum(gl.minimum(token_tiles - section * width, width), 1)  # past the last tile, for nothing, 1
    return inside // columns, section * width + inside % columns


@gluon.jit
def after(i, k, row_tile, token_tile, first, own, program, programs, shared, k_tiles, row_tiles, token_tiles, width):
    """The place and the tile of the step after number i, which are given."""
    k += 1
    if (k == k_tiles) | (i + 1 == own):
        tile, k = step_at(i + 1, first, own, program, programs, shared, k_tiles)
        row_tile, token_tile = place(tile, row_tiles, token_tiles, width)
    return k, row_tile, token_tile


@gluon.jit
def stage_of(i, STAGES: gl.constexpr):
    """The stage of a program's step number i, and its phase."""
    return i % STAGES, i // STAGES & 1


@gluon.jit
def after_turns(stage, phase, TURNS: gl.constexpr, STAGES: gl.constexpr):
    """The stage of the step that comes TURNS later, and its phase."""
    wraps = stage >= STAGES - TURNS
    return gl.where(wraps, stage + TURNS - STAGES, stage + TURNS), phase ^ wraps.to(gl.int32)


@gluon.jit
def program_of(step, programs, shared, k_tiles):
    """Which program has a shared step."""
    return ((step + 1) * programs - 1) // (shared * k_tiles)


@gluon.jit
def slot_of(program, tile, programs, shared, k_tiles):
    """Where a program leaves its part of a tile that it shares: it has at most one that it ends, one that it begins."""
    first = program * (shared * k_tiles) // programs
    return 2 * program + (first <= tile * k_tiles).to(gl.int32)
