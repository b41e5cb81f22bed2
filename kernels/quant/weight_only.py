"""What the weight-only linear layers share: tile choice, jit helpers and argument checks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import FLOATS, check_device, check_dtype, check_last_dim_contiguous, check_ndim, check_shape
from octavo.kernels.quant.epilogue import silu_and_mul
from octavo.kernels.quant.packing import PLANE
from octavo.kernels.tiles import DeviceProperties, row_offset


@dataclass(frozen=True)
class Tiles:
    """Outputs and tokens of one program, and its schedule."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


def choose_tiles(tokens: int, dtype: torch.dtype, weight_bits: int, properties: DeviceProperties) -> Tiles:
    """Few tokens: small tiles, so that many programs read the weights. Many: large ones, so that each read serves long.

    As many pipeline stages, up to four, as shared memory holds. In fp32 there are no tensor cores to feed: a program's
    products, unrolled, must fit its registers.
    """
    if dtype == torch.float32:
        block_n, block_m, num_warps = 64, 16, 8
    elif tokens <= 16:
        block_n, block_m, num_warps = 64, 16, 4
    elif tokens <= 64:
        block_n, block_m, num_warps = 64, 64, 4
    else:
        block_n, block_m, num_warps = 128, 64, 8  # 128 × 128 spills where there is a minimum
    stage = 128 * (block_m * dtype.itemsize + block_n * weight_bits // 8)
    return Tiles(block_n, block_m, num_warps, max(2, min(4, properties.shared_memory // stage)))


@triton.jit
def token_offsets(m, M, x_inner, stride_x_outer, stride_x_inner):
    """Where the rows m of x start; those past the last repeat it, and their results are never stored."""
    return row_offset(tl.minimum(m, M - 1).to(tl.int32), x_inner, stride_x_outer, stride_x_inner)


@triton.jit
def store_outputs(out_ptr, bias_ptr, residual_ptr, acc, first_n, m, N, M, ACTIVATED: tl.constexpr):
    """Adds the bias to acc `[BLOCK_N, BLOCK_M]`, makes of it what follows, and writes it, turned, to out `[M, ...]`."""
    n = first_n + tl.arange(0, acc.shape[0])
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATED:
        acc = silu_and_mul(acc, True)
        n = first_n // 2 + tl.arange(0, acc.shape[0])
        N = N // 2
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m[None, :] * N + n[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def check_linear(
    x: torch.Tensor,
    groups: dict[str, torch.Tensor],
    bias: torch.Tensor | None,
    group_size: int,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Checks what linear layers have in common whose weights have groups.

    Args:
        groups: the tensors of one value a group, by name, the scale among them.
        dtypes: those that are accepted for x.
    """
    check_dtype("x", x, dtypes)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected a last dimension of at least {PLANE} inputs")
    check_last_dim_contiguous("x", x)
    k = x.shape[-1]
    if group_size <= 0 or group_size % PLANE or k % group_size:
        raise ValueError(f"group_size: {group_size}; expected a multiple of {PLANE} that divides x's {k} inputs")
    check_ndim("scale", groups["scale"], 2, "[inputs / group_size, outputs]")
    n = groups["scale"].shape[1]
    for name, values in groups.items():
        check_dtype(name, values, FLOATS)
        check_shape(name, values, (k // group_size, n), "[inputs / group_size, outputs]")
        check_last_dim_contiguous(name, values)
        check_device(name, values, "x", x)
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, (n,), "[outputs]")
        check_last_dim_contiguous("bias", bias)
        check_device("bias", bias, "x", x)
