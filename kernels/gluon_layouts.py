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


@gluon.constexpr_function
def bytes_layout(rows, columns):
    """The same of numbers of 8 bits: 16 bytes are sixteen of them."""
    more = [[0, 64 << i] for i in range((columns // 64).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 8], *more, [8, 0]],
        lane_bases=[[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[rows, columns],
    )


@gluon.constexpr_function
def joined_layout(rows, columns):
    """Of 16-bit numbers as copies leave them that bring 8 rows by 64 columns, 1 KB, after the other: all columns of
    eight rows, then the next eight rows. Within a KB it is the widest swizzle.
    """
    parts = [[0, 64 << i] for i in range((columns // 64).bit_length() - 1)]
    groups = [[8 << i, 0] for i in range((rows // 8).bit_length() - 1)]
    bases = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16], [0, 32], [1, 8], [2, 16], [4, 32], *parts, *groups]
    return gl.SharedLinearLayout(offset_bases=bases, block_bases=[], alignment=1024)
