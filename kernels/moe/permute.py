"""Bringing tokens into the order of their experts, and what the experts made of them back.

`moe_permute`, a layer of one's own on the sorted rows (`grouped_linear`, an activation, `grouped_linear`), and
`moe_unpermute` are together what `fused_moe` does without writing the rows down.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
)
from octavo.kernels.debug import assert_ids
from octavo.kernels.launch import empty, launch
from octavo.kernels.moe.arrange import MOST_PAIRS
from octavo.kernels.moe.sort import check_pairs, expert_of, place_of, sort_by_expert
from octavo.kernels.quant.rounding import check_supported
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous
from octavo.reference import moe as reference

MOVED = (*FLOATS, torch.int8, torch.float8_e4m3fn)
"""What moe_permute moves: rows of layers in half precision, and rows that are quantised already."""


@dataclass(frozen=True)
class _Tiles:
    block: int
    num_warps: int


def choose_tiles(width: int, itemsize: int) -> _Tiles:
    """How much of a row a program moves: 16 bytes a thread, so that even one token has some programs."""
    block = min(next_power_of_2(width), 2048 // itemsize)
    return _Tiles(block, 4)


@triton.jit
def _permute_kernel(
    # Bound by memory: x is read once, and written once for each expert of a token.
    out_ptr,
    x_ptr,
    positions_ptr,
    offsets_ptr,
    top_k,
    num_experts,
    H,
    stride_x_token,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < H
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    x = tl.load(x_ptr + token * stride_x_token + cols, mask=mask)
    used = tl.load(offsets_ptr + num_experts)
    nothing = tl.zeros([BLOCK], tl.float32).to(x.dtype)
    for j in range(top_k):
        row = token * top_k + j
        place = tl.load(positions_ptr + row).to(tl.int64)
        tl.store(out_ptr + place * H + cols, x, mask=mask & (place >= 0))
        # Rows past those of the experts are no pair's: the programs share them out among themselves.
        tl.store(out_ptr + row * H + cols, nothing, mask=mask & (row >= used))


@triton.jit(do_not_specialize=["pairs", "top_k"])
def _permute_few_kernel(
    # Bound by latency: each program reads all ids, and compares its pair's expert with those of all others.
    out_ptr,
    offsets_ptr,
    positions_ptr,
    x_ptr,
    topk_ids_ptr,
    expert_map_ptr,
    pairs,
    top_k,
    num_experts,
    map_size,
    H,
    stride_x_token,
    stride_ids_token,
    OTHERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    pair = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    other = tl.arange(0, OTHERS)
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    experts = expert_of(
        topk_ids_ptr, expert_map_ptr, other, other < pairs, top_k, num_experts, map_size, stride_ids_token, False
    )  # [OTHERS]
    mine, row = place_of(experts, other, pair)
    here = mine < num_experts  # the others' rows come behind those of the experts, and are zero
    x = tl.load(x_ptr + (pair // top_k).to(tl.int64) * stride_x_token + cols, mask=(cols < H) & here)
    nothing = tl.zeros([BLOCK], tl.float32).to(x.dtype)
    tl.store(out_ptr + row.to(tl.int64) * H + cols, tl.where(here, x, nothing), mask=cols < H)
    if tl.program_id(1) == 0:
        tl.store(positions_ptr + pair, tl.where(here, row, -1))
        if pair == 0:
            bins = tl.arange(0, EXPERTS)
            rows = tl.where(bins < num_experts, tl.histogram(experts, EXPERTS), 0)
            tl.store(offsets_ptr + bins, tl.cumsum(rows) - rows, mask=bins <= num_experts)


@triton.jit(do_not_specialize=["rows"])
def _unpermute_kernel(
    # Bound by memory: each row of y that a token wants is read once.
    out_ptr,
    y_ptr,
    positions_ptr,
    topk_weights_ptr,
    rows,
    top_k,
    H,
    stride_y_row,
    stride_positions_token,
    stride_weights_token,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < H
    positions_ptr += token * stride_positions_token
    topk_weights_ptr += token * stride_weights_token
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, top_k, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # their loads are under way together; they are added up one by one
            j = start + i
            row = tl.load(positions_ptr + j, mask=j < top_k, other=-1).to(tl.int64)
            weight = tl.load(topk_weights_ptr + j, mask=j < top_k, other=0.0)
            here = (row >= 0) & (row < rows)
            y = tl.load(y_ptr + row * stride_y_row + cols, mask=mask & here, other=0.0).to(tl.float32)
            total += tl.where(here, weight * y, 0.0)
    tl.store(out_ptr + token * H + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


def _moe_permute_cuda(
    x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_supported("x", x.dtype, x.device, "permute x.view(torch.int8)")
    tokens, width = x.shape
    top_k = topk_ids.shape[1]
    if 0 < tokens * top_k <= MOST_PAIRS:
        return _permute_few(x, topk_ids, num_experts, expert_map)
    _, offsets, positions = sort_by_expert(topk_ids, num_experts, expert_map)
    out = empty((tokens * top_k, width), x.dtype, x.device)
    tiles = choose_tiles(width, x.element_size())
    launch(
        _permute_kernel,
        (tokens, cdiv(width, tiles.block)),
        out,
        x,
        positions,
        offsets,
        top_k,
        num_experts,
        width,
        x.stride(0),
        device=x.device,
        num_warps=tiles.num_warps,
        BLOCK=tiles.block,
        CHAINED=chains(x.device),
    )
    return out, offsets, positions


def _permute_few(
    x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (tokens, top_k), device, width = topk_ids.shape, x.device, x.shape[1]
    pairs = tokens * top_k
    out = empty((pairs, width), x.dtype, device)
    offsets = empty((num_experts + 1,), torch.int32, device)
    positions = empty((tokens, top_k), torch.int32, device)
    tiles = choose_tiles(width, x.element_size())
    launch(
        _permute_few_kernel,
        (pairs, cdiv(width, tiles.block)),
        out,
        offsets,
        positions,
        x,
        topk_ids,
        expert_map,
        pairs,
        top_k,
        num_experts,
        0 if expert_map is None else expert_map.shape[0],
        width,
        x.stride(0),
        topk_ids.stride(0),
        device=device,
        num_warps=tiles.num_warps,
        OTHERS=64 if pairs <= 64 else MOST_PAIRS,
        EXPERTS=max(next_power_of_2(num_experts + 1), 32),  # as many as a warp has threads, at least
        BLOCK=tiles.block,
        CHAINED=chains(device),
    )
    return out, offsets, positions


def _moe_permute_fake(
    x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    permuted = x.new_empty(topk_ids.shape[0] * topk_ids.shape[1], x.shape[1])
    offsets = topk_ids.new_empty(num_experts + 1, dtype=torch.int32)
    return permuted, offsets, topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)


def _moe_unpermute_cuda(y: torch.Tensor, positions: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    tokens, top_k = positions.shape
    rows, width = y.shape
    out = empty((tokens, width), y.dtype, y.device)
    tiles = choose_tiles(width, y.element_size())
    launch(
        _unpermute_kernel,
        (tokens, cdiv(width, tiles.block)),
        out,
        y,
        positions,
        topk_weights,
        rows,
        top_k,
        width,
        y.stride(0),
        positions.stride(0),
        topk_weights.stride(0),
        device=y.device,
        num_warps=tiles.num_warps,
        AT_ONCE=min(next_power_of_2(top_k), 8),
        BLOCK=tiles.block,
        CHAINED=chains(y.device),
    )
    return out


def _moe_unpermute_fake(y: torch.Tensor, positions: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    return y.new_empty(positions.shape[0], y.shape[1])


_moe_permute = register(
    "moe_permute(Tensor x, Tensor topk_ids, int num_experts, Tensor? expert_map) -> (Tensor, Tensor, Tensor)",
    reference=reference.moe_permute,
    launcher=_moe_permute_cuda,
    fake=_moe_permute_fake,
)
_moe_unpermute = register(
    "moe_unpermute(Tensor y, Tensor positions, Tensor topk_weights) -> Tensor",
    reference=reference.moe_unpermute,
    launcher=_moe_unpermute_cuda,
    fake=_moe_unpermute_fake,
)


@replayed
def moe_permute(
    x: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies the row of each token once for each of its experts, sorted by expert.

    `permuted[positions[t, j]] = x[t]`, where rows `offsets[e]` to `offsets[e + 1]` are those of expert e

    Args:
        x: `[tokens, hidden]`, fp16, bf16, fp32, int8 or float8_e4m3fn (sm_89 or later); last dimension contiguous,
            rows of any stride.
        topk_ids: `[tokens, top_k]` int32 or int64, the experts of each token, or -1; last dimension contiguous.
        num_experts: how many there are on this device, up to 512.
        expert_map: `[all experts]` int32, contiguous, where the experts are on several devices: the number here of
            each, or -1. Without it the ids are those of this device.

    Returns:
        `permuted` `[tokens · top_k, hidden]`, contiguous, in x's dtype: a stable sort, an expert's rows by token, then
        by j; rows past `offsets[num_experts]` are zero. `offsets` `[num_experts + 1]` int32. `positions`
        `[tokens, top_k]` int32, or -1 where an id is no expert of this device, be it out of range, which is an error
        under `OCTAVO_DEBUG=1` alone (`octavo.kernels.debug`).

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit, or float8_e4m3fn on a GPU that has it not.

    One kernel for up to 512 pairs of a token and an expert, two for up to 4096, else four. Safe in a CUDA graph, with
    any routing; the same bits each time.
    """
    check_dtype("x", x, MOVED)
    check_ndim("x", x, 2, "[tokens, hidden]")
    check_last_dim_contiguous("x", x)
    check_pairs(topk_ids, x, num_experts, expert_map)
    return _moe_permute(x, topk_ids, num_experts, expert_map)


@replayed
def moe_unpermute(y: torch.Tensor, positions: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Adds up what the experts made of each token, by the weights of its routing.

    `out[t] = Σ_j topk_weights[t, j] · y[positions[t, j]]`, without those whose position is -1

    Args:
        y: `[rows, hidden]`, fp16, bf16 or fp32, sorted by expert; last dimension contiguous, rows of any stride.
        positions: `[tokens, top_k]` int32, as `moe_permute` returns them. Rows that are not in y are left out.
        topk_weights: `[tokens, top_k]` fp32; last dimension contiguous.

    Returns:
        `[tokens, hidden]`, contiguous, in y's dtype: an fp32 sum in the order of j, rounded once; zero where a token
        has no expert on this device.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit.

    Safe in a CUDA graph. A token's bits do not depend on the other tokens.
    """
    check_dtype("y", y, FLOATS)
    check_ndim("y", y, 2, "[rows, hidden]")
    check_last_dim_contiguous("y", y)
    check_dtype("positions", positions, (torch.int32,))
    check_ndim("positions", positions, 2, "[tokens, top_k]")
    check_last_dim_contiguous("positions", positions)
    check_device("positions", positions, "y", y)
    check_dtype("topk_weights", topk_weights, (torch.float32,))
    check_shape("topk_weights", topk_weights, positions.shape, "[tokens, top_k], as positions")
    check_last_dim_contiguous("topk_weights", topk_weights)
    check_device("topk_weights", topk_weights, "y", y)
    assert_ids("positions", positions, y.shape[0], "the rows of y")
    return _moe_unpermute(y, positions, topk_weights)
