"""The first of sampling's two kernels: the vocabulary read once, and a few numbers kept of each tile of it.

A tile is 128 or more neighbouring tokens. Of each, the largest logit and the sum of exponentials suffice for the second
kernel to draw a tile, and to find the few that filters leave in question.
"""

import triton
import triton.language as tl

from octavo.kernels.sampling.logits import LOWEST, edit, load_raw, temperature_setting
from octavo.kernels.tiles import let_next_start, wait_for_previous

# What is kept of each tile: of each row so many times [tiles] fp32, one after the other.
MAX = tl.constexpr(0)
SUM = tl.constexpr(1)
RAW_MAX = tl.constexpr(2)  # of the model's own logits
RAW_SUM = tl.constexpr(3)
PLANES = tl.constexpr(4)


@triton.jit
def exp_sums(x, top, scale):
    """Σ exp((x - top) · scale) of each tile: NaN if it holds one, inf if it holds inf, 0 if all is -inf."""
    top = tl.minimum(tl.maximum(top, LOWEST), -LOWEST)
    return tl.sum(tl.exp((x - top[:, None]) * scale), 1)


@triton.jit(do_not_specialize=["biases", "stride_bias_ids_row", "stride_bias_values_row"])
def tile_stats_kernel(
    # Bound by memory: the logits read once, and 2 or 4 numbers written for each tile. One program some tiles of a row.
    stats_ptr,
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    counts_ptr,
    prompt_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    allowed_ptr,
    V,
    tiles,
    chunks,
    width,
    biases,
    stride_logits_row,
    stride_counts_row,
    stride_prompt_row,
    stride_bias_ids_row,
    stride_bias_values_row,
    stride_allowed_row,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    RAW: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    tile = chunk * TILES + tl.arange(0, TILES)  # [TILES]
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]  # [TILES, TILE]
    stats_ptr += row.to(tl.int64) * width
    written = tile < tiles
    x = load_raw(logits_ptr, row, token, V, stride_logits_row)
    if RAW:
        top = tl.max(x, 1)
        tl.store(stats_ptr + RAW_MAX * tiles + tile, top, mask=written)
        tl.store(stats_ptr + RAW_SUM * tiles + tile, exp_sums(x, top, 1.0), mask=written)
    edits = (
        repetition_ptr,
        presence_ptr,
        frequency_ptr,
        counts_ptr,
        prompt_ptr,
        bias_ids_ptr,
        bias_values_ptr,
        allowed_ptr,
        biases,
        stride_counts_row,
        stride_prompt_row,
        stride_bias_ids_row,
        stride_bias_values_row,
        stride_allowed_row,
    )
    x = edit(x, row, token, chunk * TILES * TILE, (chunk + 1) * TILES * TILE, V, edits)
    _, _, scale = temperature_setting(temperature_ptr, seeds_ptr, row)
    top = tl.max(x, 1)
    tl.store(stats_ptr + MAX * tiles + tile, top, mask=written)
    tl.store(stats_ptr + SUM * tiles + tile, exp_sums(x, top, scale), mask=written)
