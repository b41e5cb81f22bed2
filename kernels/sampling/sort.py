"""Sorting a block of numbers in a kernel that has few registers to spare."""

import triton
import triton.language as tl


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.constexpr_function
def _along(dims, axis):
    return [2 if i == axis else 1 for i in range(dims)]


@triton.constexpr_function
def _cube(dims):
    return [2] * dims


@triton.jit
def _second(DIMS: tl.constexpr, AXIS: tl.constexpr):
    """Which elements of a cube are second along an axis."""
    return tl.reshape(tl.arange(0, 2), _along(DIMS, AXIS)) != 0


@triton.jit
def _exchange(x, DIMS: tl.constexpr, AXIS: tl.constexpr):
    """The lesser of each two along an axis first."""
    bits = x.to(tl.int32, bitcast=True)
    other = (bits ^ tl.xor_sum(bits, AXIS, keep_dims=True)).to(tl.float32, bitcast=True)
    return tl.where((x > other) != _second(DIMS, AXIS), other, x)


@triton.jit
def ascending(x):
    """fp32 `[n]` in ascending order; n is a power of two.

    A bitonic network, as tl.sort is. That one has a mask of directions for each of its log²(n) / 2 steps, which the
    compiler computes once, ahead of the loop around it, and keeps in registers (100 of them). Here what is to be sorted
    the other way is negated meanwhile, so that there is one mask a dimension.
    """
    DIMS: tl.constexpr = _log2(x.numel)
    if DIMS > 0:
        cube = tl.reshape(x, _cube(DIMS))
        for stage in tl.static_range(1, DIMS + 1):
            if stage < DIMS:
                backwards = _second(DIMS, DIMS - 1 - stage)
                cube = tl.where(backwards, -cube, cube)
            for i in tl.static_range(stage):
                cube = _exchange(cube, DIMS, DIMS - stage + i)
            if stage < DIMS:
                cube = tl.where(backwards, -cube, cube)
        x = tl.reshape(cube, x.shape)
    return x
