"""Sampling the next token from logits, in plain torch: every filter by a sort, every draw by the Gumbel trick.

argmax(log p + Gumbel noise) draws from p, and the noise of a row depends on nothing else in the batch. It would take
long for a whole vocabulary, so first a tile of the vocabulary is drawn, then a token in it; one that the filters leave
out is drawn again, with other noise. Where filters keep little, all that they keep gets noise.
"""

import torch

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy, as vLLM has it."""

SHARE = 0.12
"""Of the mass: rows that keep as much draw tiles first. No rounder number, lest a top_p decide by rounding."""

_MASK = 0xFFFFFFFF


def tile_of(vocab: int) -> int:
    """Neighbouring tokens of a tile: 128, or the power of two that makes 1024 tiles at most."""
    return max(128, 1 << ((vocab + 1023) // 1024 - 1).bit_length())


def _times(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the product of two unsigned 32-bit numbers, which int64 has no room for."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK


def philox(
    seeds: torch.Tensor, positions: torch.Tensor, use: int, count: int, first: torch.Tensor | int = 0
) -> torch.Tensor:
    """Unsigned 32-bit numbers, as int64, of `count` indices a row from `first` (a multiple of 4): Philox 4x32-10.

    The seed is the key, and (index / 4, low and high word of the position, use) the counter, whose four words serve
    four indices. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    seeds, positions = seeds[:, None], positions[:, None]
    quad = torch.arange(-(-count // 4), device=seeds.device)[None] + torch.as_tensor(first).view(-1, 1) // 4
    c0, c1, c2, c3 = torch.broadcast_tensors(
        quad, positions & _MASK, (positions >> 32) & _MASK, torch.full_like(quad, use)
    )
    k0, k1 = seeds & _MASK, (seeds >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _times(0xD2511F53, c0)
        high2, low2 = _times(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], -1).flatten(1)[:, :count]


def gumbel(
    seeds: torch.Tensor, positions: torch.Tensor, use: int, count: int, first: torch.Tensor | int = 0
) -> torch.Tensor:
    """`[rows, count]` of Gumbel noise: -log E with E = -log(1 - u), by its series where 1 - u would lose digits."""
    u = ((philox(seeds, positions, use, count, first).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    return -torch.where(u < 1 / 64, series, -(1 - u).log()).log()


def _bits(words: torch.Tensor, count: int) -> torch.Tensor:
    """Bitmasks of 32 tokens a word as `[rows, count]` booleans."""
    return ((words[:, :, None] >> torch.arange(32, device=words.device)) & 1).bool().flatten(1)[:, :count]


def _processed(
    x: torch.Tensor,
    repetition_penalty: torch.Tensor | None,
    presence_penalty: torch.Tensor | None,
    frequency_penalty: torch.Tensor | None,
    output_counts: torch.Tensor | None,
    prompt_mask: torch.Tensor | None,
    bias_ids: torch.Tensor | None,
    bias_values: torch.Tensor | None,
    allowed_mask: torch.Tensor | None,
) -> torch.Tensor:
    vocab = x.shape[1]
    if bias_ids is not None and bias_values is not None:
        used = (bias_ids >= 0) & (bias_ids < vocab)
        x = x.scatter_add(1, bias_ids.long().where(used, 0), bias_values.float().where(used, 0.0))
    if output_counts is not None:
        counts = output_counts.float()
        if repetition_penalty is not None:
            seen = counts > 0 if prompt_mask is None else (counts > 0) | _bits(prompt_mask, vocab)
            r = repetition_penalty[:, None]
            x = torch.where(seen, torch.where(x > 0, x * (1 / r), x * r), x)
        if frequency_penalty is not None:
            x = x - frequency_penalty[:, None] * counts
        if presence_penalty is not None:
            x = x - torch.where(counts > 0, presence_penalty[:, None], 0.0)
    if allowed_mask is not None:
        x = x.masked_fill(~_bits(allowed_mask, vocab) & ~x.isnan(), -torch.inf)
    return x


def _threshold(
    x: torch.Tensor,
    scale: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
) -> torch.Tensor:
    """The smallest logit `[rows, 1]` that the filters keep."""
    vocab, top = x.shape[1], x.max(-1, keepdim=True).values
    threshold = torch.full_like(top, -torch.inf)
    if min_p is not None:
        p = min_p[:, None]
        threshold = torch.where(p > 0, top + p.clamp(max=1.0).log() / scale, threshold)
    ordered = x.sort(-1, descending=True).values
    if top_k is not None:
        k = top_k[:, None].long()
        kth = ordered.gather(1, (k - 1).clamp(0, vocab - 1))
        threshold = torch.where((k > 0) & (k < vocab), torch.maximum(threshold, kth), threshold)
    if top_p is not None:
        p = top_p[:, None]
        kept = ordered >= threshold
        mass = torch.where(kept, ((ordered.double() - top) * scale).exp(), 0.0).cumsum(-1)
        last = (mass < p * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=vocab - 1)
        threshold = torch.where(p < 1, torch.maximum(threshold, ordered.gather(1, last)), threshold)
    return threshold


def _draw(z: torch.Tensor, kept: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A token of each row, drawn from softmax(z) over the `kept`; the largest z is 0."""
    rows, vocab = z.shape
    tile = tile_of(vocab)
    mass = z.double().exp()
    fair = (mass * kept).sum(-1) >= SHARE * mass.sum(-1)
    tokens = torch.empty(rows, dtype=torch.int64, device=z.device)
    few = (~fair).nonzero()[:, 0]
    tokens[few] = (z[few] + gumbel(seeds[few], positions[few], 1, vocab)).masked_fill(~kept[few], -torch.inf).argmax(-1)
    pad = (0, -vocab % tile)
    tile_mass = torch.nn.functional.pad(mass, pad).view(rows, -1, tile).sum(-1)
    z = torch.nn.functional.pad(z, pad, value=-torch.inf)
    waiting, use = fair.nonzero()[:, 0], 0
    while len(waiting):
        seed, position = seeds[waiting], positions[waiting]
        tile_score = tile_mass[waiting].log() + gumbel(seed, position, use, tile_mass.shape[1])
        first = tile_score.argmax(-1) * tile
        token = first[:, None] + torch.arange(tile, device=z.device)
        score = z[waiting].gather(1, token) + gumbel(seed, position, use + 1, tile, first)
        drawn = first + score.argmax(-1)
        taken = kept[waiting, drawn]
        tokens[waiting[taken]] = drawn[taken]
        waiting = waiting[~taken]
        use += 2
    return tokens


def sample(
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
    raw = logits.float()
    rows = raw.shape[0]
    x = _processed(
        raw,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        output_counts,
        prompt_mask,
        bias_ids,
        bias_values,
        allowed_mask,
    )
    t = torch.ones(rows, device=x.device) if temperature is None else temperature
    greedy = ((t < GREEDY_BELOW) if seeds is not None else torch.ones_like(t, dtype=torch.bool))[:, None]
    top = x.max(-1).values
    wrong = ~(t >= 0) | x.isnan().any(-1) | ~top.isfinite()
    x = x.masked_fill(wrong[:, None], 0.0)  # anything to compute on: these rows' results are replaced below
    scale = torch.where(greedy, 1.0, 1 / t[:, None])
    tokens = x.argmax(-1)
    kept = x
    if seeds is not None and positions is not None and rows:
        threshold = _threshold(x, scale, top_k, top_p, min_p)
        kept = torch.where(greedy, x, x.masked_fill(x < threshold, -torch.inf))
        drawn = _draw((x - x.max(-1, keepdim=True).values) * scale, kept > -torch.inf, seeds, positions)
        tokens = torch.where(greedy[:, 0], tokens, drawn)
    tokens = tokens.masked_fill(wrong, -1)
    if num_logprobs is None:
        empty = raw.new_empty(0)
        return tokens, empty, tokens.new_empty(0), empty.clone()
    top_x = x - x.max(-1, keepdim=True).values
    logprobs = ((top_x * scale).masked_fill(kept == -torch.inf, -torch.inf) if processed_logprobs else raw).log_softmax(
        -1
    )
    # The most probable first, and of equals the lower id; what is filtered out comes last, in the logits' order.
    order = torch.sort(x if processed_logprobs else raw, dim=-1, descending=True, stable=True)
    top_ids = order.indices[:, :num_logprobs].masked_fill(order.values[:, :num_logprobs] == -torch.inf, -1)
    picked = torch.cat([tokens[:, None], top_ids], 1)
    values = logprobs.gather(1, picked.clamp(min=0)).masked_fill(picked < 0, -torch.inf)
    values = values.masked_fill(wrong[:, None], torch.nan)
    return tokens, values[:, 0].clone(), top_ids.masked_fill(wrong[:, None], -1), values[:, 1:].clone()
