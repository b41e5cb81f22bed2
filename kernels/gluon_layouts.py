"""Layouts that Gluon kernels of several ops write their results in."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def wide_layout(rows, columns):
    """Of that many rows in four warps, a thread having eight numbers of a row side by side: 16 bytes.

    A product's result is in the same warps, in other lanes of each four.
    """
    more = [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *more, [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[rows, columns],
    )
