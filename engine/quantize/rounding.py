"""Round to nearest: scales from the weights alone, codes, and both as compressed-tensors lays them out.

    scale = max(|w|) / limit,    q = round(w / scale)    limit = 7.5 (int4), 127 (int8), 448 (e4m3)

with int4 from -8 to 7; its scale is the best, by squared error, of that one and smaller ones that cut off the largest
weights; GPTQ weighs the errors by how large the inputs are. q is found with the scale as it is stored, so that its
rounding costs nothing. Without GPTQ, bits are the same everywhere.
"""

import torch

from octavo.engine.quantize.settings import BLOCK, Settings

LIMITS = {"int8": 127.0, "fp8": 448.0, "fp8-block": 448.0}
SHRINK = tuple(1 - step / 20 for step in range(7))
"""Parts of the scale that fits the largest weight which int4 tries: 1, 0.95, … 0.7."""


def int4_scale(weight: torch.Tensor, dtype: torch.dtype, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Scales `[N, …, 1]` in `dtype` of groups `[N, …, group_size]`, fp32.

    `importance`, `[…, group_size]`, not negative, says how much each input's squared error counts; it has no say in
    groups where it is 0 throughout.
    """
    if importance is not None:
        mean = importance.mean(-1, keepdim=True)
        importance = torch.where(mean > 0, importance / mean, 1.0)
    widest = _over(weight.abs().amax(-1, keepdim=True), 7.5).clamp(min=2 * torch.finfo(dtype).tiny)
    scales = torch.stack([(widest * part).to(dtype) for part in SHRINK])
    errors = []
    for scale in scales:
        error = int4_round(weight, scale).mul_(scale.float()).sub_(weight).square_()
        error = error if importance is None else error.mul_(importance)
        # In float64, so that the order in which a device adds does not decide between scales that are nearly as good.
        errors.append(error.sum(-1, keepdim=True, dtype=torch.float64))
    return scales.gather(0, torch.stack(errors).argmin(0, keepdim=True)).squeeze(0)


def int4_round(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes from -8 to 7, in fp32."""
    return (weight / scale.float()).round_().clamp_(-8, 7)


def round_to_nearest(weight: torch.Tensor, settings: Settings, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a weight.

    Args:
        weight: `[N, K]`, fp32.
        settings: the scheme.
        dtype: of int4's scales; those of the other schemes are fp32.

    Returns:
        codes `[N, K]`, int8 or float8_e4m3fn, and scales: `[N, K / group_size]`, `[N, 1]`, or by blocks
        `[N / 128, K / 128]`.
    """
    if settings.scheme == "int4":
        groups = weight.unflatten(1, (-1, settings.group_size))
        scale = int4_scale(groups, dtype)
        return int4_round(groups, scale).flatten(1).to(torch.int8), scale.squeeze(-1)
    limit = LIMITS[settings.scheme]
    if settings.scheme == "fp8-block":
        tiles = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [N / 128, 128, K / 128, 128]
        scale = _positive(_over(tiles.abs().amax((1, 3)), limit))
        wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    else:
        wide = scale = _positive(_over(weight.abs().amax(1, keepdim=True), limit))
    return as_codes(codes_of(weight, wide, settings.scheme), settings.scheme), scale


def codes_of(weight: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    """The codes nearest to `weight / scale`, in fp32."""
    if scheme == "int4":
        return int4_round(weight, scale)
    limit = LIMITS[scheme]
    q = (weight / scale).clamp_(-limit, limit)
    return q.round_() if scheme == "int8" else q.to(torch.float8_e4m3fn).float()


def as_codes(values: torch.Tensor, scheme: str) -> torch.Tensor:
    """Codes in fp32 as int8 or float8_e4m3fn, exactly."""
    return values.to(torch.float8_e4m3fn if scheme.startswith("fp8") else torch.int8)


def _over(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """The quotient, rounded once: on a GPU torch multiplies by a number's reciprocal, which may be a unit off."""
    return largest / largest.new_full((), limit)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def stored(q: torch.Tensor, scale: torch.Tensor, settings: Settings, packed: bool) -> dict[str, torch.Tensor]:
    """The tensors of a layer by suffix, on the CPU.

    int4 has eight codes, plus 8, a word, from the lowest bits; int8, where it is `packed`, four, plus 128.
    """
    scale = scale.cpu().contiguous()
    if not packed:
        return {"weight": q.cpu().contiguous(), "weight_scale": scale}
    bits = 4 if settings.scheme == "int4" else 8
    codes = (q.to(torch.int32) + 2 ** (bits - 1)).unflatten(1, (-1, 32 // bits))
    words = torch.zeros_like(codes[..., 0])
    for i in range(32 // bits):
        words |= codes[..., i] << bits * i
    return {"weight_packed": words.cpu(), "weight_scale": scale, "weight_shape": torch.tensor(q.shape)}
