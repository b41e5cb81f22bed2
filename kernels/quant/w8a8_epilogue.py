"""What becomes of the sums of a W8A8 product before they are written: scales, zero points, bias, SiLU × gate, residual.

    y = sums · x_scale · weight_scale + bias;  silu_and_mul: y = silu(gate) · up;  y + residual

in fp32, rounded once; `octavo.kernels.quant.epilogue` has the order of gate and up.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.gluon_layouts import wide_layout
from octavo.kernels.quant.epilogue import halves, silu_and_mul


@triton.jit
def finish(
    acc, first_m, first_n, epilogue, TURNED: tl.constexpr, BLOCKS: tl.constexpr, ACTIVATED: tl.constexpr
):  # fmt: skip
    """Writes what becomes of the sums of tokens and outputs from the first ones on; rows are outputs if TURNED."""
    out_ptr, M, N = epilogue[0], epilogue[1], epilogue[2]
    x_scale_ptr, stride_x_scale, weight_scale_ptr, stride_weight_scale = epilogue[3:7]
    x_zero_ptr, stride_x_zero, weight_sum_ptr, bias_ptr, residual_ptr = epilogue[7:]
    if TURNED:
        m = first_m + tl.arange(0, acc.shape[1])[None, :]
        n = first_n + tl.arange(0, acc.shape[0])[:, None]
    else:
        m = first_m + tl.arange(0, acc.shape[0])[:, None]
        n = first_n + tl.arange(0, acc.shape[1])[None, :]
    present_m, present_n = m < M, n < N
    if x_zero_ptr is not None:
        zero = tl.load(x_zero_ptr + m * stride_x_zero, mask=present_m, other=0)
        acc -= zero * tl.load(weight_sum_ptr + n, mask=present_n, other=0)
    y = acc.to(tl.float32)
    if not BLOCKS:
        y *= tl.load(x_scale_ptr + m * stride_x_scale, mask=present_m, other=0.0)
        y *= tl.load(weight_scale_ptr + n * stride_weight_scale, mask=present_n, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=present_n, other=0.0).to(tl.float32)
    if ACTIVATED:
        y = silu_and_mul(y, TURNED)
        N = N // 2
        if TURNED:
            n = first_n // 2 + tl.arange(0, y.shape[0])[:, None]
        else:
            n = first_n // 2 + tl.arange(0, y.shape[1])[None, :]
    at = m.to(tl.int64) * N + n
    mask = present_m & (n < N)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.constexpr_function
def results_layout(rows, columns, turned):
    """That of a warpgroup's results as they are written."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32]) if turned else wide_layout(rows, columns)


@gluon.jit
def _places(first_m, first_n, N, ROWS: gl.constexpr, COLS: gl.constexpr, layout: gl.constexpr, TURNED: gl.constexpr):
    """Tokens, outputs and where they are in memory, of a tile of results with N outputs a token."""
    rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    cols = gl.expand_dims(gl.arange(0, COLS, layout=gl.SliceLayout(0, layout)), 0)
    if TURNED:
        m, n = first_m + cols, first_n + rows
    else:
        m, n = first_m + rows, first_n + cols
    return m, n, m.to(gl.int64) * N + n


@gluon.jit
def residual_of(
    first_m, first_n, epilogue, ROWS: gl.constexpr, COLS: gl.constexpr, TURNED: gl.constexpr, ACTIVATED: gl.constexpr
):  # fmt: skip
    """What is added to the results of a warpgroup's `ROWS × COLS` sums; None where nothing is.

    Kernels begin to read it ahead of the steps, so that nobody waits for it after the last.
    """
    _, M, N = epilogue[:3]
    residual_ptr = epilogue[11]
    HALF: gl.constexpr = 2 if ACTIVATED else 1
    ROWS_LEFT: gl.constexpr = ROWS // HALF if TURNED else ROWS
    COLS_LEFT: gl.constexpr = COLS if TURNED else COLS // HALF
    layout: gl.constexpr = results_layout(ROWS_LEFT, COLS_LEFT, TURNED)
    residual = None
    if residual_ptr is not None:
        N = N // HALF
        m, n, at = _places(first_m, first_n // HALF, N, ROWS_LEFT, COLS_LEFT, layout, TURNED)
        residual = gl.load(residual_ptr + at, mask=(m < M) & (n < N), other=0.0)
    return residual


@gluon.jit
def scales_of(first_m, first_n, epilogue, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Scales of tokens and of outputs, one or two a thread, for `results_of`.

    Kernels begin to read them ahead of the steps; `results_of` gives each thread what it needs.
    """
    _, M, N, x_scale_ptr, stride_x_scale, weight_scale_ptr, stride_weight_scale = epilogue[:7]
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    m = first_m + gl.arange(0, ROWS, layout=flat)
    n = first_n + gl.arange(0, COLS, layout=flat)
    x_scale = gl.load(x_scale_ptr + m * stride_x_scale, mask=m < M, other=0.0)
    weight_scale = gl.load(weight_scale_ptr + n * stride_weight_scale, mask=n < N, other=0.0)
    return x_scale, weight_scale


@gluon.jit
def results_of(
    acc, scales, first_m, first_n, epilogue, TURNED: gl.constexpr, BLOCKS: gl.constexpr, ACTIVATED: gl.constexpr
):  # fmt: skip
    """What is made of sums in the layout of Hopper's tensor cores, before a residual; scales: None, or read before."""
    M, N = epilogue[1], epilogue[2]
    x_scale_ptr, stride_x_scale, weight_scale_ptr, stride_weight_scale = epilogue[3:7]
    x_zero_ptr, stride_x_zero, weight_sum_ptr, bias_ptr = epilogue[7:11]
    TOKENS: gl.constexpr = 1 if TURNED else 0  # dimensions of the tile
    OUTPUTS: gl.constexpr = 0 if TURNED else 1
    OF_TOKENS: gl.constexpr = gl.SliceLayout(OUTPUTS, acc.type.layout)
    OF_OUTPUTS: gl.constexpr = gl.SliceLayout(TOKENS, acc.type.layout)
    m = first_m + gl.arange(0, acc.shape[TOKENS], layout=OF_TOKENS)
    n = first_n + gl.arange(0, acc.shape[OUTPUTS], layout=OF_OUTPUTS)
    if x_zero_ptr is not None:
        zero = gl.load(x_zero_ptr + m * stride_x_zero, mask=m < M, other=0)
        weight_sum = gl.load(weight_sum_ptr + n, mask=n < N, other=0)
        acc -= gl.expand_dims(zero, OUTPUTS) * gl.expand_dims(weight_sum, TOKENS)
    y = acc.to(gl.float32)
    if not BLOCKS:
        if scales is None:
            x_scale = gl.load(x_scale_ptr + m * stride_x_scale, mask=m < M, other=0.0)
            weight_scale = gl.load(weight_scale_ptr + n * stride_weight_scale, mask=n < N, other=0.0)
        else:
            x_scale, weight_scale = gl.convert_layout(scales[0], OF_TOKENS), gl.convert_layout(scales[1], OF_OUTPUTS)
        y *= gl.expand_dims(x_scale, OUTPUTS)
        y *= gl.expand_dims(weight_scale, TOKENS)
    if bias_ptr is not None:
        y += gl.expand_dims(gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32), TOKENS)
    if ACTIVATED:
        y = silu_and_mul(y, TURNED)
    return y


@gluon.jit
def write(y, residual, first_m, first_n, epilogue, TURNED: gl.constexpr, ACTIVATED: gl.constexpr):
    """Writes results, and the residual added; they are of sums from the given token and output on.

    Tokens as rows are written 64 bytes of one by four lanes; outputs as rows from where they are, 16 bytes of a token
    by eight lanes: those are few, and would have to go through shared memory for more.
    """
    out_ptr, M, N = epilogue[:3]
    if ACTIVATED:
        first_n = first_n // 2
        N = N // 2
    if residual is None:
        y = y.to(out_ptr.dtype.element_ty)  # half as much to move from lane to lane
    last: gl.constexpr = results_layout(y.shape[0], y.shape[1], TURNED)
    y = gl.convert_layout(y, last)
    if residual is not None:
        y += residual.to(gl.float32)
    m, n, at = _places(first_m, first_n, N, y.shape[0], y.shape[1], last, TURNED)
    gl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@gluon.jit
def finish_gluon(
    acc, residual, first_m, first_n, epilogue, TURNED: gl.constexpr, BLOCKS: gl.constexpr, ACTIVATED: gl.constexpr
):  # fmt: skip
    """`finish` for sums in the layout of Hopper's tensor cores, of one warpgroup; residual: from `residual_of`."""
    y = results_of(acc, None, first_m, first_n, epilogue, TURNED, BLOCKS, ACTIVATED)
    write(y, residual, first_m, first_n, epilogue, TURNED, ACTIVATED)


@gluon.jit
def finish_halves(
    acc, residual, first_m, first_n, epilogue, TURNED: gl.constexpr, BLOCKS: gl.constexpr, ACTIVATED: gl.constexpr
):  # fmt: skip
    """Finishes both halves of the columns, one after the other, so that nothing spills; residual: of the left half."""
    ROWS: gl.constexpr = acc.shape[0]
    HALF: gl.constexpr = acc.shape[1] // 2
    left, right = halves(acc)
    finish_gluon(left, residual, first_m, first_n, epilogue, TURNED, BLOCKS, ACTIVATED)
    if TURNED:
        first_m += HALF
    else:
        first_n += HALF
    residual = residual_of(first_m, first_n, epilogue, ROWS, HALF, TURNED, ACTIVATED)
    finish_gluon(right, residual, first_m, first_n, epilogue, TURNED, BLOCKS, ACTIVATED)
