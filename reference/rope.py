"""Rotary position embedding in plain torch."""

import torch


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleaved: bool,
) -> None:
    half = cos_sin_cache.shape[1] // 2
    cos, sin = cos_and_sin(positions, cos_sin_cache)
    for x in (query, key):
        if x is None:
            continue
        if interleaved:
            first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        else:
            first, second = x[..., :half], x[..., half : 2 * half]
        a, b = first.float(), second.float()
        turned = a * cos - b * sin, b * cos + a * sin
        first.copy_(turned[0])
        second.copy_(turned[1])


def cos_and_sin(positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of each token, fp32 `[tokens, 1, rotary_dim / 2]`."""
    rows = cos_sin_cache.shape[0]
    lowest, highest = (int(p) for p in positions.aminmax()) if positions.numel() else (0, 0)
    if lowest < 0 or highest >= rows:
        raise ValueError(
            f"positions: {lowest if lowest < 0 else highest} has no row in cos_sin_cache; expected 0 to {rows - 1} "
            "(build a longer one)"
        )
    cos, sin = cos_sin_cache.index_select(0, positions).float().unsqueeze(1).chunk(2, -1)
    return cos, sin


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x, fp32 `[tokens, heads, head_size]`, rotated into new memory."""
    end = 2 * cos.shape[-1]
    a, b = (x[..., 0:end:2], x[..., 1:end:2]) if interleaved else x[..., :end].chunk(2, -1)
    pairs = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    head = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return head if end == x.shape[-1] else torch.cat((head, x[..., end:]), -1)
