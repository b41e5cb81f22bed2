"""What becomes of the sums of the Hopper kernels of products by experts.

An epilogue is a tuple: where results and bias are, the scales of rows and of outputs with the strides from one expert's
to the next's and from one output's, how many rows there are, and how many results a row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from octavo.kernels.quant.epilogue import silu_times

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit
def scaled(
    acc, epilogue, expert, first_row, rows, first_n, end_n, ROW_DIM: gl.constexpr,
):
    """Sums as fp32, times the scales of their rows and of the outputs from `first_n` to `end_n`, where there are any.

    ROW_DIM: which dimension is that of the rows of x.
    """
    x_scale_ptr, weight_scale_ptr, stride_expert, stride_output = epilogue[2:6]
    y = acc.to(gl.float32)
    if weight_scale_ptr is not None:
        OUTPUT_DIM: gl.constexpr = 1 - ROW_DIM
        m = gl.arange(0, y.shape[ROW_DIM], layout=gl.SliceLayout(OUTPUT_DIM, y.type.layout))
        n = first_n + gl.arange(0, y.shape[OUTPUT_DIM], layout=gl.SliceLayout(ROW_DIM, y.type.layout))
        x_scale = gl.load(x_scale_ptr + first_row + m, mask=m < rows, other=0.0)
        y *= gl.expand_dims(x_scale, OUTPUT_DIM)
        scale_ptrs = weight_scale_ptr + expert * stride_expert + n * stride_output
        y *= gl.expand_dims(gl.load(scale_ptrs, mask=n < end_n, other=0.0), ROW_DIM)
    return y


@gluon.jit
def gate_and_up(acc):
    """Of sums of outputs, which are rows, eight of gate above the same eight of up: those of gate, and those of up."""
    OUTPUTS: gl.constexpr = acc.shape[0]
    ROWS: gl.constexpr = acc.shape[1]
    gate, up = acc.reshape([OUTPUTS // 16, 2, 8, ROWS]).permute([0, 2, 3, 1]).split()
    return gate.reshape([OUTPUTS // 2, ROWS]), up.reshape([OUTPUTS // 2, ROWS])


@gluon.jit
def write_turned(y, epilogue, bias_ptr, expert, part, first_row, rows, first_n):
    """Results of outputs, which are rows of y, by rows of x."""
    out_ptr, S, N = epilogue[0], epilogue[6], epilogue[7]
    layout: gl.constexpr = y.type.layout
    n = first_n + gl.expand_dims(gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, layout)), 1)
    m = gl.expand_dims(gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, layout)), 0)
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + expert.to(gl.int64) * N + n, mask=(n < N) & (part == 0), other=0.0)
        y += bias.to(gl.float32)
    at = (part * S + first_row + m).to(gl.int64) * N + n
    gl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(m < rows) & (n < N))


@gluon.jit
def write(acc, epilogue, expert, part, first_row, rows, first_n, GATED: gl.constexpr):
    """Writes sums of outputs, which are rows of acc, or SiLU × gate where they are of gate and of up in turns."""
    N = epilogue[7]
    if GATED:
        gate, up = gate_and_up(acc)
        gate = scaled(gate, epilogue, expert, first_row, rows, first_n, N, 1)
        up = scaled(up, epilogue, expert, first_row, rows, N + first_n, 2 * N, 1)
        write_turned(silu_times(gate, up), epilogue, None, expert, 0, first_row, rows, first_n)
    else:
        y = scaled(acc, epilogue, expert, first_row, rows, first_n, N, 1)
        write_turned(y, epilogue, epilogue[1], expert, part, first_row, rows, first_n)


@gluon.jit
def write_of_pair(
    acc, epilogue, expert, part, first_row, rows, first_n, handed, left, taken, phase, IS_UP: gl.constexpr, GATED:
    gl.constexpr,
):
    """Writes sums; if gated, the warpgroup that has those of up hands them over to the one of gate."""
    if IS_UP:
        mbarrier.wait(taken, phase ^ 1)
        handed.store(acc)
        mbarrier.arrive(left, count=1)
    elif GATED:
        mbarrier.wait(left, phase)
        acc = silu_times(acc, handed.load(acc.type.layout))
        write_turned(acc, epilogue, None, expert, 0, first_row, rows, first_n)
        mbarrier.arrive(taken, count=1)  # behind the use of what was loaded, so that it has come
    else:
        write_turned(acc, epilogue, epilogue[1], expert, part, first_row, rows, first_n)
# fmt: on
