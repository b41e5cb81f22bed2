"""The second of sampling's two kernels: one program a row finds the few tiles that matter, and chooses the token.

Filters' code is in functions that are called, not inlined. As one function it took 12 to 17 s to compile, 8 to 12 of
them in a pass of Triton's (TritonGPUCoalesce) that follows every load's and store's relations through all of it; so it
takes 4. ptxas allots registers to all functions together: a call is a jump and a few moves, and nothing is spilled.
"""

import triton
import triton.language as tl

from octavo.kernels.sampling.draw import (
    SHARE,
    draw_by_tiles,
    draw_by_tiles_apart,
    draw_from_candidates,
    draw_from_tiles,
    mass_of_candidates,
)
from octavo.kernels.sampling.gather import first_of_largest
from octavo.kernels.sampling.logits import LOWEST, edit, load_raw, setting, temperature_setting, top_k_setting
from octavo.kernels.sampling.threshold import find_threshold, list_possible_tiles
from octavo.kernels.sampling.tile_stats import MAX, PLANES, RAW_MAX, RAW_SUM, SUM
from octavo.kernels.tiles import let_next_start, wait_for_previous


@triton.jit(do_not_specialize=["biases", "stride_bias_ids_row", "stride_bias_values_row", "num_logprobs"])
def choose_kernel(
    # Bound by latency: of a row, the tiles' numbers and, as a rule, a few tiles are read. One program a row.
    tokens_ptr,
    logprobs_ptr,
    top_ids_ptr,
    top_logprobs_ptr,
    stats_ptr,
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
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
    width,
    biases,
    num_logprobs,
    stride_logits_row,
    stride_counts_row,
    stride_prompt_row,
    stride_bias_ids_row,
    stride_bias_values_row,
    stride_allowed_row,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    MANY: tl.constexpr,
    ALL_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SORTED: tl.constexpr,
    FILTERS: tl.constexpr,
    RAW: tl.constexpr,
    REGISTERS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    row = tl.program_id(0)
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
    tile = tl.arange(0, ALL_TILES)
    row_stats_ptr = stats_ptr + row.to(tl.int64) * width
    tile_max = tl.load(row_stats_ptr + MAX * tiles + tile, mask=tile < tiles, other=-float("inf"))
    tile_sum = tl.load(row_stats_ptr + SUM * tiles + tile, mask=tile < tiles, other=0.0)
    temperature, greedy, scale = temperature_setting(temperature_ptr, seeds_ptr, row)
    top = tl.minimum(tl.maximum(tl.max(tile_max, 0), LOWEST), -LOWEST)
    total = tl.sum(tile_sum * tl.exp((tile_max - top) * scale), 0)
    # Neither for NaN (the sum is NaN), nor for +inf (it is inf), nor where nothing is allowed (0) is there a softmax.
    usable = (total > 0.0) & (total < float("inf")) & (temperature >= 0.0)
    token = tl.full([], -1, tl.int32)
    threshold = tl.full([], LOWEST, tl.float32)
    kept_mass = total
    # Top-p alone takes no threshold to draw, unless it may keep too little to draw by tiles, or its mass is wanted.
    MEASURED: tl.constexpr = FILTERS and top_p_ptr is not None and (logprobs_ptr is None or RAW)
    whole = (row_stats_ptr, logits_ptr, row, V, tiles, stride_logits_row, edits, top, scale)
    if usable:
        searched = row < 0  # no
        inside, outside = tl.full([], LOWEST, tl.float32), tl.full([], float("inf"), tl.float32)
        goal = total
        if FILTERS:
            k = top_k_setting(top_k_ptr, row, V)
            if top_k_ptr is None:
                # A zero that the compiler can't see: with a known one, under min-p alone, a loop is left that Triton
                # 3.6 does not compile.
                k = tl.minimum(row, 0)
            p = setting(top_p_ptr, row, 1.0)
            p = tl.where(p < 0.0, 0.0, p)
            min_p = setting(min_p_ptr, row, 0.0)
            searched = (greedy == 0) & ((k > 0) | (p < 1.0) | (min_p > 0.0))
            if MEASURED:
                # Of the tokens' logits no more is known than that the largest is kept.
                measured = searched & (k == 0) & (min_p <= 0.0) & (p > SHARE)
                searched = searched & (measured == 0)
                inside, outside = tl.where(measured, top, inside), tl.where(measured, -float("inf"), outside)
                goal = p * total
        if searched:
            if FILTERS:
                log_min_p = tl.log(tl.minimum(tl.where(min_p > 0.0, min_p, 1.0), 1.0))
                floor = tl.where(min_p > 0.0, top + log_min_p / scale, LOWEST)
                # Past the tiles' numbers: a list of tiles, the candidates, their places, and those that are sorted.
                list_ptr = (row_stats_ptr + PLANES * tiles).to(tl.pointer_type(tl.int32))
                candidates_ptr = (list_ptr + tiles + MANY).to(tl.pointer_type(tl.float32))
                low, listed, listed_mass = list_possible_tiles(
                    list_ptr, row_stats_ptr, tiles, top, total, scale, floor, k, p, V, ALL_TILES, TILES
                )
                threshold, found, others, kept_mass = find_threshold(
                    list_ptr,
                    candidates_ptr,
                    logits_ptr,
                    row,
                    listed,
                    listed_mass,
                    low,
                    top,
                    total,
                    scale,
                    floor,
                    k,
                    p,
                    V,
                    stride_logits_row,
                    edits,
                    CANDIDATES,
                    SORTED,
                    TILES,
                    TILE,
                )
                if (kept_mass < total * SHARE) | (logprobs_ptr is not None and not RAW):
                    kept_mass += mass_of_candidates(candidates_ptr, found, threshold, top, scale, SORTED)
                seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
                if kept_mass < total * SHARE:
                    if others == 0:
                        token = draw_from_candidates(
                            list_ptr,
                            candidates_ptr,
                            found,
                            threshold,
                            top,
                            scale,
                            seed,
                            position,
                            CANDIDATES,
                            SORTED,
                            TILE,
                        )
                    else:
                        token = draw_from_tiles(
                            list_ptr,
                            listed,
                            logits_ptr,
                            row,
                            V,
                            stride_logits_row,
                            edits,
                            threshold,
                            top,
                            scale,
                            seed,
                            position,
                            TILE,
                        )
                else:
                    token = draw_by_tiles_apart(
                        whole,
                        greedy,
                        threshold,
                        outside,
                        total,
                        seeds_ptr,
                        positions_ptr,
                        MEASURED,
                        ALL_TILES,
                        MANY,
                        TILE,
                    )
        else:
            DRAW: tl.constexpr = draw_by_tiles_apart if FILTERS else draw_by_tiles
            token = DRAW(
                whole,
                greedy,
                inside,
                outside,
                goal,
                seeds_ptr,
                positions_ptr,
                MEASURED,
                ALL_TILES,
                MANY,
                TILE,
            )
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if logprobs_ptr is not None:
        nothing = float("nan")
        # Loaded again: kept all along, it would take registers that the search has better use for.
        tile_max = tl.load(
            row_stats_ptr + (RAW_MAX if RAW else MAX) * tiles + tile, mask=tile < tiles, other=-float("inf")
        )
        if RAW:
            # Of the model's own distribution, before anything was done to it.
            threshold = tl.full([], LOWEST, tl.float32)
            scale = tl.full([], 1.0, tl.float32)
            tile_sum = tl.load(row_stats_ptr + RAW_SUM * tiles + tile, mask=tile < tiles, other=0.0)
            top = tl.minimum(tl.maximum(tl.max(tile_max, 0), LOWEST), -LOWEST)
            kept_mass = tl.sum(tile_sum * tl.exp(tile_max - top), 0)
        log_mass = tl.log(kept_mass)
        chosen = tl.maximum(token, 0)
        value = load_raw(logits_ptr, row, chosen, V, stride_logits_row)
        if not RAW:
            value = edit(value, row, chosen, 0, V, V, edits)
        logprob = tl.where(value >= threshold, (value - top) * scale - log_mass, -float("inf"))
        tl.store(logprobs_ptr + row, tl.where(usable, logprob, nothing))
        # The n most probable, one after the other: the tile of the largest that is left, then its place in there.
        last, last_token = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
        for i in range(num_logprobs):
            winner = tl.argmax(tile_max, 0) + tl.arange(0, 1)
            tokens = winner[:, None] * TILE + tl.arange(0, TILE)[None, :]
            x = load_raw(logits_ptr, row, tokens, V, stride_logits_row)
            if not RAW:
                x = edit(x, row, tokens, 0, V, V, edits)
            x = tl.where((x < last) | ((x == last) & (tokens > last_token)), x, -float("inf"))
            last, last_token = first_of_largest(x, tokens)
            left = tl.where((x < last) | (tokens > last_token), x, -float("inf"))
            tile_max = tl.where(tile == winner, tl.max(tl.max(left, 1), 0), tile_max)
            logprob = tl.where(last >= threshold, (last - top) * scale - log_mass, -float("inf"))
            there = usable & (last > -float("inf"))
            out = row.to(tl.int64) * num_logprobs + i
            tl.store(top_ids_ptr + out, tl.where(there, last_token, -1).to(tl.int64))
            tl.store(top_logprobs_ptr + out, tl.where(usable, logprob, nothing))
