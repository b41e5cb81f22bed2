"""The second kernel of the Hopper int4 linear layer (`int4_hopper.py`), where tiles are shared: adds up their parts.

The parts of a tile are added in the order of their inputs, so that results have the same bits from run to run, and
nobody waits for the others in the first kernel. This one is on the GPU before that has ended, and takes little of it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.quant.epilogue import PAIRED, silu_times
from octavo.kernels.quant.int4_shares import place, program_of, slot_of
from octavo.kernels.tiles import let_next_start, wait_for_previous

# fmt: off


@gluon.jit(do_not_specialize=["M", "rounds", "shared", "programs", "row_tiles", "token_tiles", "width"])
def _int4_parts_kernel(
    # Bound by its launch for few tokens, by the cache for many. A program BLOCK results of a shared tile.
    out_ptr, bias_ptr, residual_ptr, workspace_ptr, M, N, rounds, shared, programs, row_tiles, token_tiles, width,
    OUTPUTS: gl.constexpr, TOKENS: gl.constexpr, BLOCK: gl.constexpr, ACTIVATED: gl.constexpr, CHAINED: gl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    SHARE: gl.constexpr = 2 if ACTIVATED else 1
    WIDTH: gl.constexpr = OUTPUTS // SHARE
    tile = gl.program_id(0)
    first = program_of(tile * rounds, programs, shared * rounds)
    last = program_of(tile * rounds + rounds - 1, programs, shared * rounds)
    row_tile, token_tile = place(tile, row_tiles, token_tiles, width)
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    inside = gl.program_id(1) * BLOCK + gl.arange(0, BLOCK, layout=layout)
    m = token_tile * TOKENS + inside // WIDTH
    n = row_tile * WIDTH + inside % WIDTH
    wanted = (m < M) & (n < N // SHARE) & (first < last)  # a tile that one program has is not in parts
    at = m.to(gl.int64) * (N // SHARE) + n
    if residual_ptr is not None:
        residual = gl.load(residual_ptr + at, mask=wanted, other=0.0)
    if ACTIVATED:  # the sums of gate; those of up are PAIRED behind them
        inside = inside // PAIRED * (2 * PAIRED) + inside % PAIRED
        n = n // PAIRED * (2 * PAIRED) + n % PAIRED
    total = gl.zeros([BLOCK], gl.float32, layout)
    up = gl.zeros([BLOCK], gl.float32, layout)
    AT_ONCE: gl.constexpr = 4  # each time takes a round trip to the cache
    for start in range(first, last + 1, AT_ONCE):
        parts = ()
        for j in gl.static_range(AT_ONCE):
            program = gl.minimum(start + j, last)
            slot = slot_of(program, tile, programs, rounds, shared * rounds)
            part_ptr = workspace_ptr + slot.to(gl.int64) * (OUTPUTS * TOKENS)
            mask = wanted & (start + j <= last)
            for half in gl.static_range(SHARE):
                parts = parts + (gl.load(part_ptr + inside + half * PAIRED, mask=mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        for j in gl.static_range(AT_ONCE):
            total += parts[j * SHARE]
            if ACTIVATED:
                up += parts[j * SHARE + 1]
    if bias_ptr is not None:
        total += gl.load(bias_ptr + n, mask=wanted, other=0.0).to(gl.float32)
        if ACTIVATED:
            up += gl.load(bias_ptr + n + PAIRED, mask=wanted, other=0.0).to(gl.float32)
    if ACTIVATED:
        total = silu_times(total, up)
    if residual_ptr is not None:
        total += residual.to(gl.float32)
    gl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=wanted)
