"""The product of quantised activations and weights, a byte each: what the linear layers in int8 and fp8 share.

    y[t, n] = Σₖ x[t, k] · w[n, k] · x_scale[t] · weight_scale[n] + bias[n]

Sums are int32 or fp32, scaled once; or, with scales of 128 inputs, scaled and added up every 128;
`octavo.kernels.quant.w8a8_epilogue` has what follows. Both operands go from shared memory into the tensor cores, on
Hopper fetched by the copy engine (TMA). There, `octavo.kernels.quant.w8a8_few` and `octavo.kernels.quant.w8a8_hopper`
do what they can; the kernel here does the rest, and all on other GPUs. Few tokens have the weights as the first
operand, whose tile has at least 64 rows on Hopper; `octavo.kernels.quant.stream_k` says how programs share tiles where
there are too few.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.launch import INTERPRET, empty, launch
from octavo.kernels.quant.rounding import check_supported
from octavo.kernels.quant.stream_k import SCALE_BLOCK, is_last, share_out, store_part, sum_parts, tile_at
from octavo.kernels.quant.w8a8_epilogue import finish
from octavo.kernels.quant.w8a8_few import choose_few, w8a8_few
from octavo.kernels.quant.w8a8_hopper import w8a8_hopper
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    device_properties,
    let_next_start,
    next_power_of_2,
    row_offset,
    row_strides,
    wait_for_previous,
)
from octavo.reference.w8a8 import in_blocks

GROUP = tl.constexpr(8)
"""Rows of tiles that programs walk together, so that those at work at a time read few rows and columns."""


@dataclass(frozen=True)
class Tiles:
    """Tokens, outputs and inputs of a step, and the schedule of programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    turned: bool
    """Whether the weights are the first operand."""
    split: bool = False
    """Whether programs share tiles, of which there are too few."""
    gluon: bool = False
    """Whether `octavo.kernels.quant.w8a8_hopper` computes it, whose tile this is."""
    parts: int = 1
    """Programs that it deals a tile's inputs out to."""

    def count(self, tokens: int, outputs: int) -> int:
        """How many tiles there are."""
        return cdiv(tokens, self.block_m) * cdiv(outputs, self.block_n)


def choose_tiles(
    tokens: int, outputs: int, inputs: int, properties: DeviceProperties, *, copied: bool, narrow: bool, promoted: bool
) -> Tiles:
    """The tile for a number of tokens and outputs; it changes at powers of two tokens, so that a warm-up meets all.

    Args:
        copied: whether the copy engine loads, on Hopper.
        narrow: whether registers hold more than the sums, the corrections of zero points.
        promoted: whether sums are taken out of the tensor cores at each step.
    """
    tokens = next_power_of_2(tokens)
    if tokens > 64 and copied and not narrow:
        return _choose_gluon(tokens, outputs, inputs, properties, promoted)
    few = min(max(tokens, 16), 64)
    if tokens > 64:
        tiles = Tiles(128, 128, 128, 8, 5 if copied else 3, 1, turned=False)
    elif tokens <= 16:
        tiles = Tiles(16, 64, 128, 8, 3, 2, turned=True)
    else:
        # On sm_89 fp8 spills with 4 warps, on sm_80 int8 with 8.
        warps = 8 if few == 64 and properties.capability == (8, 9) else 4
        tiles = Tiles(few, 128, 128, warps, 3, 2, turned=True)
    # On an H100, 96 tiles take 1.4 to 2.2 times as long if they are shared. 64 take 1 to 4 % longer where reading the
    # weights is all there is to do, and 9 to 20 % less with 256 tokens.
    idle = 3 if tiles.turned else 2
    return replace(tiles, split=idle * tiles.count(tokens, outputs) <= properties.num_sms)


def _choose_gluon(tokens: int, outputs: int, inputs: int, properties: DeviceProperties, promoted: bool) -> Tiles:
    """For more than 64 tokens on Hopper: tiles of 256 outputs, or of 128 where those need less than twice the waves.

    A wave of the smaller ones takes 0.50 to 0.60 of one of the larger, the more the more tokens there are; with
    promoted sums 0.48 to 0.50 in up to 12 waves of up to 8192 inputs. For 128 tokens, which have one row of tiles, the
    smaller take up to 4 % less even so. Two parts of a tile take 8 to 20 % less than one where there are
    multiprocessors for both and 14336 inputs, and 13 to 17 % more where there are 8192.
    """
    wide = Tiles(128, 256, 128, 8, 4, 1, turned=False, gluon=True)
    small = Tiles(128, 128, 128, 8, 6, 1, turned=False, gluon=True)
    waves = {tiles: cdiv(tiles.count(tokens, outputs), properties.num_sms) for tiles in (wide, small)}
    part_of_wide = 0.49 if promoted and waves[wide] <= 6 and inputs <= 8192 else 0.56
    tiles = small if tokens <= 128 or part_of_wide * waves[small] < waves[wide] else wide
    two = inputs > 12288 and 2 * tiles.count(tokens, outputs) <= properties.num_sms
    return replace(tiles, parts=2 if two else 1)


@triton.jit
def _load(
    ptr, desc, rows, first_row, k, K, inner, stride_outer, stride_inner, BLOCK_K: tl.constexpr, TAIL: tl.constexpr
):
    """A tile `[rows, BLOCK_K]` of x or of the weights, by the copy engine where there is a descriptor."""
    if desc is not None:
        return desc.load([first_row, k])
    else:
        c = k + tl.arange(0, BLOCK_K)[None, :]
        ptrs = ptr + row_offset(rows, inner, stride_outer, stride_inner)[:, None] + c
        if TAIL:
            return tl.load(ptrs, mask=c < K, other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit(do_not_specialize=["M", "tiles", "share", "x_inner", "stride_x_scale", "stride_x_zero"])
def _w8a8_kernel(
    # Few tokens: bound by reading the weights. Many: by the tensor cores. A program walks its tiles in one loop.
    x_desc,
    weight_desc,
    out_ptr,
    workspace_ptr,
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    x_zero_ptr,
    weight_sum_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    tiles,
    share,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_x_scale,
    stride_weight_scale,
    stride_x_zero,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PROMOTED: tl.constexpr,
    TAIL: tl.constexpr,
    CHAINED: tl.constexpr,
):
    SUM: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    ROWS: tl.constexpr = BLOCK_N if TURNED else BLOCK_M
    COLS: tl.constexpr = BLOCK_M if TURNED else BLOCK_N
    WIDTH: tl.constexpr = min(COLS, 32)  # of a sum of parts: more would spill
    steps = tl.cdiv(K, BLOCK_K)
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program, programs = tl.program_id(0), tl.num_programs(0)
    start = program * share if SPLIT else program * steps
    left = tl.minimum(share, tiles * steps - start) if SPLIT else tl.cdiv(tiles - program, programs) * steps
    end = start + left
    tile, step = start // steps, start % steps
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)

    epilogue = (
        out_ptr, M, N, x_scale_ptr, stride_x_scale, weight_scale_ptr, stride_weight_scale, x_zero_ptr, stride_x_zero,
        weight_sum_ptr, bias_ptr, residual_ptr,
    )  # fmt: skip
    acc = tl.zeros([ROWS, COLS], SUM)
    begin = step
    for _ in tl.range(0, left):
        m_tile, n_tile = tile_at(tile, m_tiles, n_tiles, GROUP)
        first_m, first_n, k = m_tile * BLOCK_M, n_tile * BLOCK_N, step * BLOCK_K
        m = tl.minimum(first_m + tl.arange(0, BLOCK_M), M - 1)  # what is past the last repeats it
        n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1)
        w = _load(weight_ptr, weight_desc, n, first_n, k, K, 1, K, 0, BLOCK_K, TAIL)
        x = _load(x_ptr, x_desc, m, first_m, k, K, x_inner, stride_x_outer, stride_x_inner, BLOCK_K, TAIL)
        first, second = (w, x.T) if TURNED else (x, w.T)
        if BLOCKS:
            x_scale = tl.load(x_scale_ptr + m.to(tl.int64) * stride_x_scale + step)
            w_scale = tl.load(weight_scale_ptr + first_n // SCALE_BLOCK * stride_weight_scale + step)
            scale = x_scale * w_scale
            acc += tl.dot(first, second) * (scale[None, :] if TURNED else scale[:, None])
        elif PROMOTED:
            acc += tl.dot(first, second)
        else:
            acc = tl.dot(first, second, acc, out_dtype=SUM)
        step += 1
        left -= 1
        done = (step == steps) | (left == 0) if SPLIT else step == steps
        if done:
            if SPLIT and ((begin > 0) | (step < steps)):
                store_part(acc, workspace_ptr, tl.where(begin == 0, 1, 0), tiles)
            else:
                finish(acc, first_m, first_n, epilogue, TURNED, BLOCKS, ACTIVATED)
            acc = tl.zeros([ROWS, COLS], SUM)
        tile = tl.where(done, tile + (1 if SPLIT else programs), tile)
        step = tl.where(done, 0, step)
        begin = tl.where(done, 0, begin)
    if SPLIT:
        # The tiles in which the share begins and ends, where others have parts of them.
        first, last = start // steps, (end - 1) // steps
        for tile in range(first, last + 1, tl.maximum(last - first, 1)):
            # Triton would ask both sides of an `and`.
            if (tile * steps < start) | (tile * steps + steps > end):  # noqa: SIM102
                if is_last(workspace_ptr, tile, steps, share):
                    m_tile, n_tile = tile_at(tile, m_tiles, n_tiles, GROUP)
                    for col in range(0, COLS, WIDTH):
                        y = sum_parts(workspace_ptr, tile, tiles, steps, share, col, SUM, ROWS, COLS, WIDTH)
                        first_m = m_tile * BLOCK_M + (col if TURNED else 0)
                        first_n = n_tile * BLOCK_N + (0 if TURNED else col)
                        finish(y, first_m, first_n, epilogue, TURNED, BLOCKS, ACTIVATED)


def _may_copy(x: torch.Tensor, weight: torch.Tensor, properties: DeviceProperties) -> bool:
    """Whether the copy engine can load both as they lie."""
    inner, outer_stride, _ = row_strides("x", x)
    return (
        properties.capability[0] == 9
        and torch.version.hip is None
        and not INTERPRET
        and x.numel() > 0
        and weight.shape[0] > 0
        and inner == 1
        and ((outer_stride % 16 == 0 and outer_stride > 0) or x.numel() == x.shape[-1])
        and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    )


def _described(x: torch.Tensor, weight: torch.Tensor, tiles: Tiles) -> tuple[TensorDescriptor, TensorDescriptor]:
    """x and the weights for the copy engine; the stride of a single row is never used."""
    n, k = weight.shape
    m, stride = x.numel() // k, row_strides("x", x)[1]
    return (
        TensorDescriptor(x, [m, k], [stride if m > 1 else k, 1], [tiles.block_m, tiles.block_k]),
        TensorDescriptor(weight, [n, k], [k, 1], [tiles.block_n, tiles.block_k]),
    )


def _scale_stride(scale: torch.Tensor | None) -> int:
    """From one of `[..., 1]` or `[N]` to the next; 0 where one number is for all."""
    return 0 if scale is None or scale.numel() == 1 else 1


def w8a8(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_zero: torch.Tensor | None,
    weight_sum: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    """Launches it; the arguments are those of `int8_int8_linear` and `fp8_linear`, all scales contiguous."""
    n, k = weight.shape
    m = x.numel() // k
    activated = activation is not None
    out = empty((*x.shape[:-1], n // 2 if activated else n), out_dtype, x.device)
    check_supported("weight", weight.dtype, x.device, "quantise to int8, for int8_int8_linear")
    properties = device_properties(x.device)
    copied, blocks = _may_copy(x, weight, properties), in_blocks(weight, weight_scale)
    precise = weight.dtype != torch.int8 and not fast_accum and not blocks
    inner, stride_outer, stride_inner = row_strides("x", x)
    strides = (
        weight_scale.shape[1] if blocks else _scale_stride(x_scale),
        weight_scale.shape[1] if blocks else _scale_stride(weight_scale),
        _scale_stride(x_zero),
    )
    if copied:
        few = choose_few(m, n, k, properties, blocks=blocks, activated=activated)
        if few is not None:
            scales = x_scale, weight_scale, x_zero, weight_sum
            w8a8_few(out, x, weight, *scales, bias, residual, blocks, activated, stride_outer, strides, few)
            return out
    promoted = precise or blocks
    t = choose_tiles(m, n, k, properties, copied=copied, narrow=x_zero is not None, promoted=promoted)
    if t.gluon:
        options = promoted, blocks, activated, stride_outer, strides, t.block_n, t.num_stages, t.parts
        w8a8_hopper(out, x, weight, x_scale, weight_scale, bias, residual, *options)
        return out
    tiles, steps = t.count(m, n), cdiv(k, t.block_k)
    slots = properties.num_sms * t.programs_per_sm
    programs, share, workspace = min(tiles, slots), 0, None
    if t.split:
        programs, share = share_out(tiles, steps, slots, cdiv(512, t.block_k))
        parts = programs * t.block_m * t.block_n  # two a program, of 4 bytes a sum
        workspace = empty((tiles + parts,), torch.int64, x.device)
    launch(
        _w8a8_kernel,
        (programs,),
        *(_described(x, weight, t) if copied else (None, None)),
        out,
        workspace,
        x,
        weight,
        x_scale,
        weight_scale,
        x_zero,
        weight_sum,
        bias,
        residual,
        m,
        n,
        k,
        tiles,
        share,
        inner,
        stride_outer,
        stride_inner,
        *strides,
        device=x.device,
        num_warps=t.num_warps,
        num_stages=t.num_stages,
        BLOCK_M=t.block_m,
        BLOCK_N=t.block_n,
        BLOCK_K=t.block_k,
        TURNED=t.turned,
        SPLIT=t.split,
        BLOCKS=blocks,
        ACTIVATED=activated,
        PROMOTED=precise or (t.turned and weight.dtype != torch.int8 and not blocks),  # costs few tokens nothing
        TAIL=not copied and k % t.block_k != 0,
        CHAINED=chains(x.device),
    )
    return out
