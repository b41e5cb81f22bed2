"""What becomes of a tile's sums in the Hopper int4 kernel (`int4_hopper.py`): bias, SiLU × gate, residual, results.

Sums have outputs as rows, in the layout of tensor cores; results are written turned, 16 bytes of a token by a thread
and at least 64 side by side. A residual is read as they are written, not as sums lie, which would be two bytes at a
time; and the cache (L2) has been told of it before the tile's products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.quant.epilogue import halves, silu_and_mul
from octavo.kernels.tiles import wait_for_previous

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.constexpr_function
def out_layout(outputs, tokens):
    """Outputs by tokens, a thread having eight outputs of a token side by side: 16 bytes."""
    across = min(outputs, 64)
    threads = [[8 << i, 0] for i in range((across // 8).bit_length() - 1)]
    threads += [[0, 1 << i] for i in range(tokens.bit_length() - 1)]
    threads += [[0, 0]] * (7 - len(threads))  # there may be less to write than threads
    more = [[64 << i, 0] for i in range((outputs // across).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [4, 0], *more, *threads[7:]],
        lane_bases=threads[:5],
        warp_bases=threads[5:7],
        block_bases=[],
        shape=[outputs, tokens],
    )


@gluon.jit
def fetch_residual(ptr, row, token, M, N, OUTPUTS: gl.constexpr, TOKENS: gl.constexpr, ACTIVATED: gl.constexpr):
    """Has the residual of a tile brought into the cache (L2). A hint: it may come before the memory is written."""
    SHARE: gl.constexpr = 2 if ACTIVATED else 1
    WIDTH: gl.constexpr = OUTPUTS // SHARE
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    m = gl.minimum(token + gl.arange(0, TOKENS, layout=layout), M - 1).to(gl.int64)
    for j in gl.static_range((WIDTH + 63) // 64):  # of 128 bytes
        n = gl.minimum(row // SHARE + 64 * j, N // SHARE - 1)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", (ptr + m * (N // SHARE) + n,), dtype=gl.int32,
            is_pure=False, pack=1,
        )


@gluon.jit
def _places(row, token, M, N, OUTPUTS: gl.constexpr, TOKENS: gl.constexpr):
    """Where results stand in out, and which of them there are."""
    layout: gl.constexpr = out_layout(OUTPUTS, TOKENS)
    n = gl.expand_dims(row + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, layout)), 1)
    m = gl.expand_dims(token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, layout)), 0)
    return m.to(gl.int64) * N + n, (n < N) & (m < M)


@gluon.jit
def _halves_of_each(parts):
    halved = ()
    for j in gl.static_range(len(parts)):
        halved = halved + halves(parts[j])
    return halved


@gluon.jit
def finish(
    acc, out_ptr, bias_ptr, residual_ptr, row, token, M, N, ACTIVATED: gl.constexpr, CHAINED: gl.constexpr,
):
    """Writes what becomes of the sums `[outputs, tokens]` from `row` and `token` on."""
    if bias_ptr is not None:
        n = row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
        acc += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), 1)
    if ACTIVATED:
        acc = silu_and_mul(acc, True)
        row = row // 2
        N = N // 2
    OUTPUTS: gl.constexpr = acc.shape[0]
    if residual_ptr is None:
        out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), out_layout(OUTPUTS, acc.shape[1]))
        at, mask = _places(row, token, M, N, OUTPUTS, acc.shape[1])
        gl.store(out_ptr + at, out, mask=mask)
    else:
        wait_for_previous(CHAINED)  # the warp that loads tokens has, but these threads read what was written
        parts = (acc,)
        for _ in gl.static_range((acc.shape[1] // 64).bit_length() - 1):
            parts = _halves_of_each(parts)  # 64 tokens at a time, or there would be too few registers
        TOKENS: gl.constexpr = parts[0].shape[1]
        at, mask = _places(row, token, M, N, OUTPUTS, TOKENS)
        residual = gl.load(residual_ptr + at, mask=mask, other=0.0)
        for j in gl.static_range(len(parts)):
            y = parts[j] + gl.convert_layout(residual, parts[j].type.layout).to(gl.float32)
            here, wanted = at, mask
            if j + 1 < len(parts):  # the next is on its way while these go from lane to lane
                at, mask = _places(row, token + (j + 1) * TOKENS, M, N, OUTPUTS, TOKENS)
                residual = gl.load(residual_ptr + at, mask=mask, other=0.0)
            out = gl.convert_layout(y.to(out_ptr.dtype.element_ty), out_layout(OUTPUTS, TOKENS))
            gl.store(out_ptr + here, out, mask=wanted)
