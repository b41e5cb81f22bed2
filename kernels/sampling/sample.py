"""Sampling the next token of each row of logits: penalties, filters, seeded draws, log-probabilities; two kernels.

    x = logits + bias, penalised, -inf where not allowed
    z = x / temperature
    kept = {v: p(v) ≥ min_p · max p}, of those the top_k largest, of those the most probable that hold top_p of the mass
    token = a draw from softmax(z over kept), by noise(seed, position)

The draw has probability softmax(z over kept); it takes noise for the tiles of the vocabulary and for one tile's tokens
(`draw.py`). Filters are thresholds on x (`threshold.py`). The first kernel (`tile_stats.py`) reads the vocabulary once
and keeps a few numbers of each tile of it; the second (`choose.py`) reads those numbers and the few tiles that they
leave in question. All that a row's result
rests on is computed in one order whatever the batch, so it is the same bits in any batch and row.
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch

from octavo.kernels.launch import empty, launch
from octavo.kernels.registry import register
from octavo.kernels.replay import replayed
from octavo.kernels.sampling.check import check_sample
from octavo.kernels.sampling.choose import choose_kernel
from octavo.kernels.sampling.tile_stats import PLANES, tile_stats_kernel
from octavo.kernels.tiles import cdiv, chains, device_properties, next_power_of_2
from octavo.reference import sampling as reference


@dataclass(frozen=True)
class _Tiles:
    tile: int
    """Tokens of one tile."""
    stats_tiles: int
    """Tiles of a program of the first kernel."""
    choose_tiles: int
    """Tiles that a program of the second kernel holds at once."""
    many_tiles: int
    """As many where it only sums them up: more are on their way at once, and what it sums takes few registers."""
    candidates: int
    """Tokens that it has room for."""
    sorted: int
    """Tokens that it sorts at once."""
    stats_warps: int
    choose_warps: int
    choose_registers: int = 0
    """Registers that a thread of the second kernel may use if there are filters, from Hopper on, where they suffice;
    before it all 255. 0 leaves it to ptxas, which spills some to save many."""


def choose_tiles(vocab: int, edited: bool) -> _Tiles:
    """Tiles as small as 1024 of them allow: the second kernel holds one number of each, and reads whole ones.

    Nothing but the time depends on how many a program holds; bias, penalties and masks take registers. Without them
    128 registers do, with which two programs of 8 warps fit on an SM: 256 rows then take one turn on an H100, not two.
    """
    tile = reference.tile_of(vocab)
    few = max(1024 // tile, 1)
    candidates = max(tile * next_power_of_2(cdiv(vocab, tile)) // 4, 1024)
    return _Tiles(
        tile,
        (2 if edited else 4) * few,
        few,
        few if edited else 2 * few,
        candidates,
        sorted=1024,
        stats_warps=8,
        choose_warps=8,
        choose_registers=255 if edited else 128,
    )


def _row_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _sample_cuda(
    logits: torch.Tensor,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
    repetition_penalty: torch.Tensor | None,
    presence_penalty: torch.Tensor | None,
    frequency_penalty: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    bias_ids: torch.Tensor | None,
    bias_values: torch.Tensor | None,
    allowed_mask: torch.Tensor | None,
    num_logprobs: int | None,
    processed_logprobs: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, vocab = logits.shape
    device = logits.device
    edited = bias_ids is not None or output_counts is not None or allowed_mask is not None
    choice = choose_tiles(vocab, edited)
    tiles = cdiv(vocab, choice.tile)
    chunks = cdiv(tiles, choice.stats_tiles)

    tokens, logprobs, top_ids, top_logprobs = _outputs(empty, rows, num_logprobs, device)
    wants_logprobs = num_logprobs is not None
    raw = wants_logprobs and not processed_logprobs
    # Without seeds every row is greedy, so that filters have no say.
    filters = seeds is not None and (top_k is not None or top_p is not None or min_p is not None)
    # One workspace, since every allocation takes a microsecond: the tiles' numbers, and for filters a list of tiles
    # with an end, the candidates, their places, and those that are sorted.
    width = PLANES.value * tiles
    if filters:
        width += tiles + choice.many_tiles + 2 * choice.candidates + choice.sorted
    workspace = empty((rows, width), torch.float32, device)
    edits = (
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        output_counts,
        prompt_mask,
        bias_ids,
        bias_values,
        allowed_mask,
    )
    biases = 0 if bias_ids is None else bias_ids.shape[1]
    strides = tuple(map(_row_stride, (logits, output_counts, prompt_mask, bias_ids, bias_values, allowed_mask)))
    launch(
        tile_stats_kernel,
        (rows * chunks,),
        workspace,
        logits,
        temperature,
        seeds,
        *edits,
        vocab,
        tiles,
        chunks,
        width,
        biases,
        *strides,
        device=device,
        num_warps=choice.stats_warps,
        TILES=choice.stats_tiles,
        TILE=choice.tile,
        RAW=raw,
        CHAINED=chains(device),
    )
    registers = 0
    if filters and choice.choose_registers:
        registers = choice.choose_registers if device_properties(device).capability >= (9, 0) else 255
    launch(
        choose_kernel,
        (rows,),
        tokens,
        *((logprobs, top_ids, top_logprobs) if wants_logprobs else (None, None, None)),
        workspace,
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        *edits,
        vocab,
        tiles,
        width,
        biases,
        num_logprobs or 0,
        *strides,
        device=device,
        num_warps=choice.choose_warps,
        TILES=choice.choose_tiles,
        TILE=choice.tile,
        MANY=choice.many_tiles,
        ALL_TILES=max(next_power_of_2(tiles), 4),
        CANDIDATES=choice.candidates,
        SORTED=choice.sorted,
        FILTERS=filters,
        RAW=raw,
        REGISTERS=registers,
        CHAINED=chains(device),
    )
    return tokens, logprobs, top_ids, top_logprobs


def _outputs(new: Any, rows: int, num_logprobs: int | None, device: torch.device) -> tuple[torch.Tensor, ...]:
    wide = (0,) if num_logprobs is None else (rows, num_logprobs)
    return (
        new((rows,), torch.int64, device),
        new(wide[:1], torch.float32, device),
        new(wide, torch.int64, device),
        new(wide, torch.float32, device),
    )


def _sample_fake(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    num_logprobs, _ = others[-2:]

    def new(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return logits.new_empty(shape, dtype=dtype)

    return _outputs(new, logits.shape[0], num_logprobs, logits.device)


_sample = register(
    "sample(Tensor logits, Tensor? temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? seeds, "
    "Tensor? positions, Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, "
    "Tensor? output_counts, Tensor? prompt_mask, Tensor? bias_ids, Tensor? bias_values, Tensor? allowed_mask, "
    "int? num_logprobs, bool processed_logprobs) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.sample,
    launcher=_sample_cuda,
    fake=_sample_fake,
)


@overload
def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias_values: torch.Tensor | None = None,
    allowed_mask: torch.Tensor | None = None,
    num_logprobs: Literal[None] = None,
    processed_logprobs: bool = False,
) -> torch.Tensor: ...
@overload
def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias_values: torch.Tensor | None = None,
    allowed_mask: torch.Tensor | None = None,
    num_logprobs: int,
    processed_logprobs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: ...
@replayed
def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    bias_ids: torch.Tensor | None = None,
    bias_values: torch.Tensor | None = None,
    allowed_mask: torch.Tensor | None = None,
    num_logprobs: int | None = None,
    processed_logprobs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws one token a row, each row by its own settings; what is None is off for all rows, and costs nothing.

    In this order: bias, penalties, allowed tokens; temperature; min_p, top_k, top_p (each of the distribution that the
    one before leaves, renormalised, as in vLLM and Hugging Face); the draw.

    Args:
        logits: `[rows, vocab]`, fp16, bf16 or fp32; last dimension contiguous, rows of any stride.
        temperature: `[rows]` fp32; logits are divided by it. Below 1e-5 (0, that is) the row is greedy: the largest
            logit after bias, penalties and mask, of equals the lowest id; filters do not matter then.
        top_k: `[rows]` int32; that many of the largest logits are kept, and what is tied with the last of them. Off
            where it is 0, negative, or at least vocab.
        top_p: `[rows]` fp32; a token is kept if the more probable ones hold less than top_p of the mass; so ties are
            kept or dropped together, and the most probable stays at 0 and below. Off at 1 and above.
        min_p: `[rows]` fp32; tokens are kept whose probability is at least min_p times the largest. Off at 0 and below.
        seeds: `[rows]` int64. Without seeds every row is greedy.
        positions: `[rows]` int64, how many tokens its request has drawn before: the draw is a function of the row's
            logits, settings, seed and position, and of nothing else in the batch.
        repetition_penalty: `[rows]` fp32; logits of tokens in the prompt or the output are divided by it where
            positive, multiplied where not (Keskar et al., CTRL). 1 is off.
        presence_penalty: `[rows]` fp32, taken from the logits of tokens in the output. 0 is off.
        frequency_penalty: `[rows]` fp32, taken from them once for each time they are there. 0 is off.
        output_counts: `[rows, vocab]` int32 or int16, how often the row's request has drawn each token. Rows whose
            penalties are off do not read it.
        prompt_mask: `[rows, ceil(vocab / 32)]` int32, the tokens of the prompt: bit `v % 32` of word `v // 32`.
        bias_ids: `[rows, biases]` int32 or int64, token ids; -1 (and any other id outside the vocabulary) is padding.
        bias_values: `[rows, biases]` fp32, added to their logits; an id that comes twice gets both.
        allowed_mask: `[rows, ceil(vocab / 32)]` int32 as xgrammar makes it, bits as in prompt_mask; the other tokens'
            logits become -inf.
        num_logprobs: also return log-probabilities, of the drawn token and of that many of the most probable.
        processed_logprobs: log-probabilities of the distribution that was drawn from (-inf where a filter removed the
            token) in place of the model's own, before bias, penalties, mask and temperature.

    Returns:
        Token ids `[rows]` int64. With num_logprobs also, in natural logarithm: those of the drawn tokens `[rows]` fp32,
        the ids `[rows, num_logprobs]` int64 of the most probable tokens in descending order (of equals the lower id
        first; -1 where fewer have a logit above -inf), and their log-probabilities, fp32.

        A row that has no distribution gives token -1, ids -1 and log-probabilities NaN: a logit that is NaN, or +inf
        after bias and penalties; no token allowed or above -inf; a temperature that is negative or NaN. Other rows are
        not affected. No rows give empty results.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, stride or device that does not fit, or arguments that need another one.

    Two kernels, no host synchronisation; safe in a CUDA graph, which may be replayed with other settings. Masses are
    fp32: a token whose place is within rounding of top_p may fall on either side. https://arxiv.org/abs/2411.13676
    (min_p: https://arxiv.org/abs/2407.01082, top_p: https://arxiv.org/abs/1904.09751)
    """
    check_sample(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        output_counts,
        prompt_mask,
        bias_ids,
        bias_values,
        allowed_mask,
        num_logprobs,
    )
    results = _sample(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        output_counts,
        prompt_mask,
        bias_ids,
        bias_values,
        allowed_mask,
        num_logprobs,
        processed_logprobs,
    )
    return results[0] if num_logprobs is None else results
