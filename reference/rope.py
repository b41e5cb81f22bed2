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
    lowest, highest = (int(p) for p in positions.aminmax()) if positions.numel() else (0, 0)
    if lowest < 0 or highest >= rows:
        raise ValueError(
            f"positions: {lowest if lowest < 0 else highest} has no row in cos_sin_cache; expected 0 to {rows - 1} "
            "(build a longer one)"
        )
    half = rotary_dim // 2
    cos, sin = cos_sin_cache.index_select(0, positions).float().unsqueeze(1).chunk(2, -1)
    for x in (query, key):
        if x is None:
            continue
        if interleaved:
            first, second = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
        else:
            first, second = x[..., :half], x[..., half:rotary_dim]
        a, b = first.float(), second.float()
        turned = a * cos - b * sin, b * cos + a * sin
        first.copy_(turned[0])
        second.copy_(turned[1])
