"""The product of int8 activations and int4 weights in groups, which `octavo.kernels.quant.w4a8_linear` is about.

Integers are multiplied, and scale and minimum applied to their sums, a group at a time:

    y = x_scale · Σ_g (scale_g · Σ_{k in g} (q_k - 8) · x_k  +  (minimum_g + 8 · scale_g) · Σ_{k in g} x_k)

The weights are the first operand of `tl.dot`, unpacked in registers, as 16 · (q - 8): the scale makes up for the 16.
Where there is a minimum, a kernel of its own makes the sums of x beforehand, which all programs want.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import INTERPRET, empty, launch
from octavo.kernels.quant.stream_k import is_last, store_part, sum_parts, tile_at
from octavo.kernels.quant.w4a8_weights import prefetch, unpacked
from octavo.kernels.quant.weight_only import token_offsets
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

MAX_EXACT = 65536
"""So many products of two int8 numbers are below 2³¹ in sum."""
GROUP = tl.constexpr(8)
"""Rows of tiles that programs walk together, so that those at work at a time read few rows and columns."""


@dataclass(frozen=True)
class Tiles:
    """Outputs and tokens of a tile, and the schedule of programs."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    """How many are at work at a time; where there are fewer tiles, several programs share one."""
    prefetched: bool = False
    """Whether a program has its first weights, and scales, fetched into the L2 cache while it waits."""

    def splits(self, tiles: int, steps: int, properties: DeviceProperties) -> int:
        """How many programs share a tile of `steps`; each has at least four of them, unless a tile has fewer."""
        slots = properties.num_sms * self.programs_per_sm
        return max(1, min(slots // max(tiles, 1), steps // 4))


def choose_tiles(tokens: int, unit: int, with_minimum: bool, properties: DeviceProperties) -> Tiles:
    """The tile for a number of tokens; it changes at powers of two, so that a warm-up meets all.

    Args:
        unit: inputs whose sums are scaled together.
        with_minimum: whether sums of x come beside them; what registers hold is smaller then.
    """
    tokens, hopper = next_power_of_2(max(tokens, 16)), properties.capability[0] == 9
    if tokens <= 32 or (with_minimum and unit < 128):
        least = 32 if unit == 64 and not hopper else 16  # of 16 tokens ptxas spills two registers on sm_89
        return Tiles(64, max(min(tokens, 32), least), 4, 5, 4, prefetched=hopper)
    if with_minimum:
        return Tiles(64, 64, 4, 4, 2)
    if tokens <= 64:
        return Tiles(128, 64, 8, 4, 2) if hopper else Tiles(64, 64, 4, 4, 2)
    return Tiles(128, 128, 8, 4 if hopper else 3, 1)


@triton.jit(do_not_specialize=["M", "x_inner"])
def _sums_kernel(
    # Bound by memory: x read once. One program sums UNIT inputs of BLOCK_M tokens; past the last input they are 0.
    sum_ptr,
    x_ptr,
    M,
    K,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    unit = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k = (unit * UNIT + tl.arange(0, UNIT))[None, :]
    x_ptrs = x_ptr + token_offsets(m, M, x_inner, stride_x_outer, stride_x_inner)[:, None] + k
    x = tl.load(x_ptrs, mask=k < K, other=0).to(tl.int32)  # [BLOCK_M, UNIT]
    tl.store(sum_ptr + unit * M + m, tl.sum(x, 1).to(tl.float32), mask=m < M)


@triton.jit
def _bits(ptrs, PTX: tl.constexpr):
    """Loads numbers of 16 or 32 bits as integers of 32, for a step that comes later.

    Two of 16 bits the compiler would pack into a register where they are loaded, and wait for them: of the assembly,
    which loading does by itself, it does not know that they have no more.
    """
    if ptrs.dtype.element_ty == tl.float32:
        return tl.load(ptrs).to(tl.uint32, bitcast=True)
    elif PTX:
        bits = tl.load(ptrs).to(tl.uint16, bitcast=True)
        return tl.inline_asm_elementwise("cvt.u32.u16 $0, $1;", "=r,h", [bits], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        return tl.load(ptrs).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _float(bits, ptr):
    """The fp32 numbers of what `_bits` loaded."""
    if ptr.dtype.element_ty == tl.float32:
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(ptr.dtype.element_ty, bitcast=True).to(tl.float32)


@triton.jit
def _of_unit(unit, n, m, M, units_of_group, last_unit, pointers, PTX: tl.constexpr):
    """The scale, the minimum `[outputs]` and the sum of x `[tokens]` of a unit of inputs; without a minimum the first.

    K may end before the last packed tile does: what is left of it adds zeros, by the last group's scale.
    """
    scale_ptr, stride_scale_group, minimum_ptr, stride_minimum_group, sum_ptr = pointers
    group = tl.cast(tl.minimum(unit, last_unit) // units_of_group, tl.int64)
    scale = _bits(scale_ptr + group * stride_scale_group + n, PTX)
    if minimum_ptr is None:
        return scale, scale, scale
    else:
        minimum = _bits(minimum_ptr + group * stride_minimum_group + n, PTX)
        return scale, minimum, _bits(sum_ptr + tl.cast(unit, tl.int64) * M + m, PTX)


@triton.jit
def _scaled(product, of_unit, pointers):
    """Sums of products `[outputs, tokens]` of 16 · (q - 8), scaled, and with what the minimum adds."""
    scale_ptr, _, minimum_ptr, _, sum_ptr = pointers
    scale = _float(of_unit[0], scale_ptr)
    y = product.to(tl.float32) * (scale * 0.0625)[:, None]
    if minimum_ptr is not None:
        minimum = _float(of_unit[1], minimum_ptr)
        y += (minimum + 8 * scale)[:, None] * _float(of_unit[2], sum_ptr)[None, :]
    return y


@triton.jit
def _finish(sums, first_n, first_m, epilogue):
    """Scales sums `[outputs, tokens]` from the first ones on by token, adds the bias and writes them, turned.

    A scale_ptr is given where the sums are those of one group, and are not scaled yet.
    """
    out_ptr, M, N, scale_ptr, x_scale_ptr, stride_x_scale, bias_ptr = epilogue
    n = first_n + tl.arange(0, sums.shape[0])
    m = first_m + tl.arange(0, sums.shape[1])
    present_n, present_m = (n < N)[:, None], (m < M)[None, :]
    y = sums.to(tl.float32)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n[:, None], mask=present_n, other=0.0).to(tl.float32) * 0.0625
    y *= tl.load(x_scale_ptr + m[None, :] * stride_x_scale, mask=present_m, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n[:, None], mask=present_n, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=present_n & present_m)


@triton.jit(do_not_specialize=["M", "tiles", "splits", "share", "x_inner", "stride_x_scale"])
def _int4_int8_linear_kernel(
    # Few tokens: bound by reading the weights, half a byte each. Many: by the tensor cores, and beside them by scaling
    # the sums of every group. A step is a packed tile of 128 inputs; a program walks `share` steps of a tile, and the
    # last of a tile's programs to be done adds up what they have, always in the same order.
    out_ptr,
    workspace_ptr,
    x_ptr,
    packed_ptr,
    x_scale_ptr,
    scale_ptr,
    minimum_ptr,
    sum_ptr,
    bias_ptr,
    M,
    N,
    K,
    units_of_group,
    tiles,
    splits,
    share,
    x_inner,
    stride_x_outer,
    stride_x_inner,
    stride_x_scale,
    stride_scale_group,
    stride_minimum_group,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,  # so many inputs lie in one group
    ONE_GROUP: tl.constexpr,  # all of K is one, whose sums are exact
    TAIL: tl.constexpr,  # K ends within a packed tile
    SPLIT: tl.constexpr,
    PTX: tl.constexpr,
    PREFETCHED: tl.constexpr,
    CHAINED: tl.constexpr,
):
    AHEAD: tl.constexpr = UNIT == 128 and not ONE_GROUP  # scales are
    SUM: tl.constexpr = tl.int32 if ONE_GROUP else tl.float32
    WIDTH: tl.constexpr = min(BLOCK_M, 32)  # of a sum of parts: more would spill
    pointers = scale_ptr, stride_scale_group, minimum_ptr, stride_minimum_group, sum_ptr
    epilogue = out_ptr, M, N, scale_ptr if ONE_GROUP else None, x_scale_ptr, stride_x_scale, bias_ptr
    steps = tl.cdiv(K, 128)
    tile, part = tl.program_id(0) // splits, tl.program_id(0) % splits
    m_tile, n_tile = tile_at(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first_n, first_m = n_tile * BLOCK_N, m_tile * BLOCK_M
    n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1)  # what is past the last repeats it
    m = tl.minimum(first_m + tl.arange(0, BLOCK_M), M - 1)
    first_step, last_step = part * share, tl.minimum(part * share + share, steps)
    if PREFETCHED:
        prefetch(
            packed_ptr, scale_ptr, stride_scale_group, first_n, first_step, last_step, steps, N, units_of_group,
            BLOCK_N, AHEAD,
        )  # fmt: skip
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)

    c = tl.arange(0, UNIT)
    last_unit = K // UNIT - 1
    packed_rows = (n // 64).to(tl.int64) * steps * 2048 + n % 64 * 32
    packed_ptrs = packed_ptr + packed_rows[:, None] + tl.arange(0, 32)[None, :]
    x_ptrs = x_ptr + row_offset(m, x_inner, stride_x_outer, stride_x_inner)[None, :] + c[:, None]
    if AHEAD:
        following = _of_unit(first_step, n, m, M, units_of_group, last_unit, pointers, PTX)
    acc = tl.zeros([BLOCK_N, BLOCK_M], SUM)
    for step in range(first_step, last_step):
        words = tl.load(packed_ptrs + step * 2048)  # [BLOCK_N, 32]
        if AHEAD:
            of_unit = following
            following = _of_unit(tl.minimum(step + 1, steps - 1), n, m, M, units_of_group, last_unit, pointers, PTX)
        for unit in tl.static_range(128 // UNIT):
            k = step * 128 + unit * UNIT
            if TAIL:
                x = tl.load(x_ptrs + k, mask=(k + c < K)[:, None], other=0)  # [UNIT, BLOCK_M]
            else:
                x = tl.load(x_ptrs + k)
            w = unpacked(words, unit * UNIT // 32, UNIT // 32, PTX)
            if ONE_GROUP:
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
            else:
                product = tl.dot(w, x, out_dtype=tl.int32)
                if not AHEAD:
                    at = step * (128 // UNIT) + unit
                    of_unit = _of_unit(at, n, m, M, units_of_group, last_unit, pointers, PTX)
                acc += _scaled(product, of_unit, pointers)
    if SPLIT:
        store_part(acc, workspace_ptr, tl.where(part == 0, 1, 0), tiles)
        if is_last(workspace_ptr, tile, splits, 1):
            for col in range(0, BLOCK_M, WIDTH):
                y = sum_parts(workspace_ptr, tile, tiles, splits, 1, col, SUM, BLOCK_N, BLOCK_M, WIDTH)
                _finish(y, first_n, first_m + col, epilogue)
    else:
        _finish(acc, first_n, first_m, epilogue)


def w4a8(
    x: torch.Tensor,
    packed: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    chosen: Tiles | None = None,
) -> torch.Tensor:
    """Launches it; `chosen` in place of the tiles that would be are for measurements."""
    k, n, device = x.shape[-1], scale.shape[1], x.device
    m = x.numel() // k
    out = empty((*x.shape[:-1], n), out_dtype, device)
    properties, chained = device_properties(device), chains(device)
    steps, strides = cdiv(k, 128), row_strides("x", x)
    one_group = group_size == k <= MAX_EXACT and minimum is None
    unit = 128 if one_group or group_size % 128 == 0 else 64 if group_size % 64 == 0 else 32
    t = chosen or choose_tiles(m, unit, minimum is not None, properties)
    sums = None
    if minimum is not None:
        units = steps * (128 // unit)
        sums = empty((units, m), torch.float32, device)
        launch(
            _sums_kernel,
            (units, cdiv(m, 16)),
            sums,
            x,
            m,
            k,
            *strides,
            device=device,
            num_warps=1,
            BLOCK_M=16,
            UNIT=unit,
            CHAINED=chained,
        )
    tiles = cdiv(m, t.block_m) * cdiv(n, t.block_n)
    # By as many tokens as a warm-up looks at.
    splits = t.splits(cdiv(next_power_of_2(max(m, 1)), t.block_m) * cdiv(n, t.block_n), steps, properties)
    share, workspace = cdiv(steps, splits), None
    splits = cdiv(steps, share)
    if splits > 1:
        parts = tiles * splits * t.block_m * t.block_n  # `store_part` has room for two a program, of 4 bytes a sum
        workspace = empty((tiles + parts,), torch.int64, device)
    launch(
        _int4_int8_linear_kernel,
        (tiles * splits,),
        out,
        workspace,
        x,
        packed,
        x_scale,
        scale,
        minimum,
        sums,
        bias,
        m,
        n,
        k,
        group_size // unit,
        tiles,
        splits,
        share,
        *strides,
        0 if x_scale.numel() == 1 else 1,
        scale.stride(0),
        0 if minimum is None else minimum.stride(0),
        device=device,
        num_warps=t.num_warps,
        num_stages=t.num_stages,
        BLOCK_N=t.block_n,
        BLOCK_M=t.block_m,
        UNIT=unit,
        ONE_GROUP=one_group,
        TAIL=k % 128 != 0,
        SPLIT=splits > 1,
        PTX=not INTERPRET and torch.version.hip is None,
        PREFETCHED=t.prefetched and packed.data_ptr() % 16 == 0,
        CHAINED=chained,
    )
    return out
