"""Layer normalisation, with a bias or without.

    y = (x - mean(x)) / sqrt(var(x) + eps) · (weight + weight_offset) + bias

Ba, Kiros and Hinton, "Layer Normalization" (2016), https://arxiv.org/abs/1607.06450. Models with "1p" norms (Nemotron)
store weight − 1: give `weight_offset=1.0`.

The variance is the mean of squared deviations, never mean(x²) - mean(x)², which loses all its digits where the mean is
large beside the deviations. A row that fits into registers is summed twice there. A wider one is walked in blocks whose
means and squared deviations are merged (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", 1979), and once more for the output. Everything is fp32 and rounded once, at the store.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_norm, check_norm_parameter
from octavo.kernels.launch import empty, launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import (
    chains,
    device_properties,
    let_next_start,
    next_power_of_2,
    row_offset,
    row_strides,
    wait_for_previous,
)
from octavo.reference import norm as reference


@dataclass(frozen=True)
class _Tiles:
    block: int
    num_warps: int


def choose_tiles(width: int) -> _Tiles:
    """Elements of a row held at once, and the warps that hold them; wider rows are walked twice.

    A thread holds 16 elements and more; with 8, 8192 rows of 8192 take 119 µs, not 92.
    """
    held = next_power_of_2(width + 1) // 2  # the largest power of two up to the width
    return _Tiles(min(next_power_of_2(width), 16384), min(max(held // 512, 1), 16))


@triton.jit
def _parameters(weight_ptr, bias_ptr, cols, mask, BIAS: tl.constexpr):
    w = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    b = 0.0
    if BIAS:
        b = tl.load(bias_ptr + cols, mask=mask, other=0.0)
    return w, b


@triton.jit
def _normalized(deviation, inv, w, b, weight_offset, BIAS: tl.constexpr):
    y = deviation * inv * (w.to(tl.float32) + weight_offset)
    if BIAS:
        y += b.to(tl.float32)
    return y


@triton.jit(do_not_specialize=["x_inner"])
def _layer_norm_kernel(
    # Bound by memory: x read once and written once; one program a row.
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    N,
    eps,
    weight_offset,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0)
    x_ptr += row_offset(row, x_inner, stride_x_outer, stride_x_inner)
    out_ptr += row.to(tl.int64) * N
    cols = tl.arange(0, BLOCK)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    if ONE_BLOCK:
        mask = cols < N
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        if EARLY:
            w, b = _parameters(weight_ptr, bias_ptr, cols, mask, BIAS)
        # From the first element, which is as near to a mean far from zero as the others: the sum of x itself would be
        # rounded to units of N times that mean.
        from_first = tl.where(mask, x - tl.load(x_ptr).to(tl.float32), 0.0)
        deviation = tl.where(mask, from_first - tl.sum(from_first, 0) / N, 0.0)
        inv = tl.rsqrt(tl.sum(deviation * deviation, 0) / N + eps)
        if not EARLY:
            w, b = _parameters(weight_ptr, bias_ptr, cols, mask, BIAS)
        y = _normalized(deviation, inv, w, b, weight_offset, BIAS)
        tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mean = 0.0
        squares = 0.0
        for start in range(0, N, BLOCK):
            mask = start + cols < N
            count = tl.minimum(N - start, BLOCK).to(tl.float32)
            x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
            block_mean = tl.div_rn(tl.sum(x, 0), count)  # exactly, so that a row of one value has no deviation
            deviation = tl.where(mask, x - block_mean, 0.0)
            # Of `start` elements before and `count` now, each about its own mean, to all of them about the common one.
            apart, share = block_mean - mean, count / (start + count)
            mean += apart * share
            squares += tl.sum(deviation * deviation, 0) + apart * apart * share * start
        inv = tl.rsqrt(squares / N + eps)
        for start in range(0, N, BLOCK):
            at = start + cols
            mask = at < N
            deviation = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean
            w, b = _parameters(weight_ptr, bias_ptr, at, mask, BIAS)
            y = _normalized(deviation, inv, w, b, weight_offset, BIAS)
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def _layer_norm_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, weight_offset: float
) -> torch.Tensor:
    out = empty(x.shape, x.dtype, x.device)
    width = x.shape[-1]
    rows = x.numel() // width
    tiles = choose_tiles(width)
    # Weights that come beside x spare few rows a wait: 64 of 4096 take 2.2 µs, not 2.8. Of many rows wider than 4096
    # their registers take a third program's place on a multiprocessor: 109 µs, not 92, for 8192 rows of 8192.
    early = tiles.block <= 4096 or rows <= 2 * device_properties(x.device).num_sms
    launch(
        _layer_norm_kernel,
        (rows,),
        out,
        x,
        weight,
        bias,
        width,
        eps,
        weight_offset,
        *row_strides("x", x),
        device=x.device,
        num_warps=tiles.num_warps,
        BIAS=bias is not None,
        ONE_BLOCK=tiles.block >= width,
        EARLY=early,
        BLOCK=tiles.block,
        CHAINED=chains(x.device),
    )
    return out


def _layer_norm_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, weight_offset: float
) -> torch.Tensor:
    return x.new_empty(x.shape)


_layer_norm = register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, float weight_offset) -> Tensor",
    reference=reference.layer_norm,
    launcher=_layer_norm_cuda,
    fake=_layer_norm_fake,
)


@replayed
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """Layer normalisation over the last dimension.

    `y = (x - mean(x)) / sqrt(var(x) + eps) · (weight + weight_offset) + bias`, var the mean of squared deviations.

    Args:
        x: `[..., hidden]`, fp16, bf16 or fp32; last dimension contiguous, the others of any two strides.
        weight: `[hidden]`, fp16, bf16 or fp32, its dtype free of x's.
        bias: None, or as weight.
        eps: added to the variance.
        weight_offset: 0, or 1 for "1p" layer norms (Nemotron), whose weights are stored minus one.

    Returns:
        `[..., hidden]`, contiguous, in x's dtype. Computed in fp32 and rounded once; the variance is as accurate where
        the mean is large.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: weight's or bias's shape or device does not fit x, or a stride that is not supported.

    Safe in a CUDA graph. A row's bits do not depend on the other rows. https://arxiv.org/abs/1607.06450
    """
    check_norm(x, weight, eps)
    if bias is not None:
        check_norm_parameter("bias", bias, x)
    return _layer_norm(x, weight, bias, eps, weight_offset)
