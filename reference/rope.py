"""Rotary position embedding in plain torch."""

import torch


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleaved: bool,
) -> None:
    rows, rotary_dim = cos_sin_cache.shape
    outside = positions[(positions < 0) | (positions >= rows)]
    if outside.numel():
        raise ValueError(
            f"positions: {outside[0].item()} has no row in cos_sin_cache; expected 0 to {rows - 1} (build a longer one)"
        )
    half = rotary_dim // 2
    cos, sin = cos_sin_cache[positions].float().unsqueeze(1).chunk(2, -1)
    for x in (query, key):
        if x is None:
            continue
        if interleaved:
            first, second = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
        else:
            first, second = x[..., :half], x[..., half:rotary_dim]
        a, b = first.float(), second.float()
        rotated_first, rotated_second = a * cos - b * sin, b * cos + a * sin
        first.copy_(rotated_first)
        second.copy_(rotated_second)
