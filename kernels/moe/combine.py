"""Adding up what belongs to one row of the result: the parts of a product, times weights where there are several.

Sums are fp32, in the order of the parts and of a token's experts, so that results have the same bits each time.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.launch import launch
from octavo.kernels.tiles import cdiv, chains, let_next_start, next_power_of_2, wait_for_previous


@triton.jit(do_not_specialize=["S", "E", "blocks"])
def _combine_kernel(
    # Bound by memory: each part read once, the result written once; one program a block of a row.
    out_ptr,
    parts_ptr,
    positions_ptr,
    weights_ptr,
    offsets_ptr,
    S,
    E,
    N,
    blocks,
    stride_weights,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    row = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < N
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    y = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        if positions_ptr is not None:
            at = tl.load(positions_ptr + row * TOP_K + j)
            here = at >= 0
            weight = tl.load(weights_ptr + row.to(tl.int64) * stride_weights + j, mask=here, other=0.0)
        else:
            at = row
            here = (row >= tl.load(offsets_ptr)) & (row < tl.load(offsets_ptr + E))
            weight = 1.0
        total = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(PARTS):
            ptrs = parts_ptr + (part * S + at).to(tl.int64) * N + cols
            total += tl.load(ptrs, mask=mask & here, other=0.0).to(tl.float32)
        y += weight * total
    tl.store(out_ptr + row.to(tl.int64) * N + cols, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    out: torch.Tensor,
    parts: torch.Tensor,
    positions: torch.Tensor | None,
    weights: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> None:
    (rows, n), (count, s, _) = out.shape, parts.shape
    block = min(next_power_of_2(n), 256 if rows <= 64 else 1024)
    blocks = cdiv(n, block)
    launch(
        _combine_kernel,
        (rows * blocks,),
        out,
        parts,
        positions,
        weights,
        offsets,
        s,
        0 if offsets is None else offsets.shape[0] - 1,
        n,
        blocks,
        0 if weights is None else weights.stride(0),
        device=out.device,
        num_warps=max(block // 128, 1),
        TOP_K=1 if positions is None else positions.shape[1],
        PARTS=count,
        BLOCK=block,
        CHAINED=chains(out.device),
    )


def combine(out: torch.Tensor, parts: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> None:
    """`out[t] = Σⱼ weights[t, j] · Σₚ parts[p, positions[t, j]]`, without those whose position is -1."""
    _launch(out, parts, positions, weights, None)


def add_parts(out: torch.Tensor, parts: torch.Tensor, offsets: torch.Tensor) -> None:
    """`out[s] = Σₚ parts[p, s]`, and 0 for rows that are no expert's."""
    _launch(out, parts, None, None, offsets)
