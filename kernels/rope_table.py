"""The table of cosines and sines that `rotary_embedding` reads, for each kind of context extension.

    angle[p, i] = p · f_i      with f_i = base^(-2i / rotary_dim) before scaling
    table[p]    = attention_factor · [cos angle[p, :], sin angle[p, :]]

The scaling dictionaries are those of model configurations (`rope_scaling`, or `rope_parameters` in newer ones) and mean
what transformers makes of them: the frequencies come from the same fp32 operations in the same order, since a rounding
of 1e-7 in a frequency is an angle of 1e-2 at position 100 000.

- default: as above.
- linear: every frequency divided by factor (position interpolation, https://arxiv.org/abs/2306.15595).
- dynamic: the base grows with the context (NTK-aware): base · (factor · L / M − (factor − 1))^(d / (d − 2)).
- llama3: long wavelengths interpolated, short ones kept, a ramp between (https://arxiv.org/abs/2407.21783).
- yarn: the same idea with the ramp over dimensions, and cosines and sines scaled (https://arxiv.org/abs/2309.00071).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from octavo.kernels.checks import FLOATS

SCALING_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def _positive(scaling: Mapping[str, Any], kind: str, key: str, default: float | None = None) -> float:
    """The number under `key`; an absent one is `default`, or an error where there is none."""
    value = scaling.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"scaling: type {kind!r} needs the key {key!r}, a positive number; got {dict(scaling)}")
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"scaling[{key!r}]: {value!r}; expected a positive number")
    return value


def _original(scaling: Mapping[str, Any], kind: str, original_max_position: int | None) -> float:
    return _positive(scaling, kind, "original_max_position_embeddings", original_max_position)


def _plain(base: float, dim: int) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, device="cpu").float() / dim)


def _dynamic_base(
    scaling: Mapping[str, Any], base: float, dim: int, max_position: int, original_max_position: int | None
) -> float:
    factor = _positive(scaling, "dynamic", "factor")
    if original_max_position is None:
        raise ValueError(
            "original_max_position: None; scaling type 'dynamic' needs the model's max_position_embeddings, beyond "
            "which the base grows"
        )
    if dim == 2:
        raise ValueError("rotary_dim: 2; scaling type 'dynamic' needs at least 4")
    length = max(max_position, original_max_position)
    return base * ((factor * length / original_max_position) - (factor - 1)) ** (dim / (dim - 2))


def _llama3(
    scaling: Mapping[str, Any], base: float, dim: int, original_max_position: int | None
) -> tuple[torch.Tensor, float]:
    factor, low, high = (_positive(scaling, "llama3", f"{k}factor") for k in ("", "low_freq_", "high_freq_"))
    if high <= low:
        raise ValueError(f"scaling['high_freq_factor']: {high}; expected more than low_freq_factor ({low})")
    original = _original(scaling, "llama3", original_max_position)
    frequencies = _plain(base, dim)
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    ramp = (1 - smooth) * scaled / factor + smooth * scaled
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, ramp, scaled), 1.0


def _yarn(
    scaling: Mapping[str, Any], base: float, dim: int, original_max_position: int | None
) -> tuple[torch.Tensor, float]:
    factor = _positive(scaling, "yarn", "factor")
    original = _original(scaling, "yarn", original_max_position)

    def dimension(rotations: float) -> float:
        """The (fractional) frequency index that turns `rotations` times over the original context."""
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    # `or`: configurations write 0 for "the default" here, and transformers takes it so.
    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    powers = base ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    kept = 1 - torch.clamp((torch.arange(dim // 2, device="cpu").float() - low) / (high - low), 0, 1)
    frequencies = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        weight, weight_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = mscale(weight) / mscale(weight_all) if weight and weight_all else mscale(1)
    return frequencies, float(attention_factor)


def _frequencies(
    dim: int, max_position: int, base: float, scaling: Mapping[str, Any], original_max_position: int | None
) -> tuple[torch.Tensor, float]:
    """The frequencies `[dim / 2]`, fp32, and the factor on cosines and sines."""
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return _plain(base, dim), 1.0
    if kind == "linear":
        return _plain(base, dim) / _positive(scaling, kind, "factor"), 1.0
    if kind == "dynamic":
        return _plain(_dynamic_base(scaling, base, dim, max_position, original_max_position), dim), 1.0
    if kind == "llama3":
        return _llama3(scaling, base, dim, original_max_position)
    if kind == "yarn":
        return _yarn(scaling, base, dim, original_max_position)
    raise ValueError(f"scaling: type {kind!r} is not known; expected one of {', '.join(SCALING_TYPES)}")


def rotary_cos_sin_cache(
    rotary_dim: int,
    max_position: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    original_max_position: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Builds the table of cosines and sines for `rotary_embedding`.

    `table[p] = attention_factor · [cos(p · f), sin(p · f)]` with `f_i = base^(-2i / rotary_dim)`, scaled as asked

    Args:
        rotary_dim: elements of a head that are rotated, even; head_size, or less for partial rotary.
        max_position: rows; positions 0 to max_position − 1 can be looked up.
        base: rope_theta of the configuration. A `rope_theta` inside `scaling` goes before it, as in transformers.
        scaling: the configuration's `rope_scaling` or `rope_parameters` dictionary, or None for no scaling. Its
            `rope_type` (in older configurations `type`) is one of

            - "default";
            - "linear": `factor`;
            - "dynamic": `factor`;
            - "llama3": `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`;
            - "yarn": `factor`, `original_max_position_embeddings`; optional `beta_fast` (32), `beta_slow` (1),
              `truncate` (True), `attention_factor`, or `mscale` and `mscale_all_dim`, which it else follows from.

            Other keys are not looked at; `partial_rotary_factor` is already in rotary_dim.
        original_max_position: the configuration's max_position_embeddings, M. llama3 and yarn use it where the
            dictionary has no `original_max_position_embeddings`. dynamic requires it: transformers raises the base
            whenever a longer sequence than any before comes along, but a table has one base, that of a sequence of
            L = max(max_position, M) tokens. So up to M rows give the unscaled table, and more give what transformers
            computes for a sequence that fills the table.
        dtype: fp32, fp16 or bf16.
        device: where the table goes; it is computed on the CPU, so that its bits do not depend on the device.

    Returns:
        `[max_position, rotary_dim]`, contiguous: cosines in the first half of the columns, sines in the second.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a size, a scaling type or a key's value that is not accepted, or a key that is missing.

    Not for use inside a CUDA graph: build it once. https://arxiv.org/abs/2104.09864
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: {rotary_dim}; expected an even number of at least 2")
    if max_position < 1:
        raise ValueError(f"max_position: {max_position}; expected at least 1")
    if original_max_position is not None and original_max_position < 1:
        raise ValueError(f"original_max_position: {original_max_position}; expected at least 1")
    if dtype not in FLOATS:
        raise TypeError(f"dtype: {dtype} is not accepted; expected float16, bfloat16 or float32")
    scaling = scaling or {}
    theta = scaling.get("rope_theta")
    base = base if theta is None else theta
    if base <= 1:
        raise ValueError(f"base: {base}; expected a number above 1")
    frequencies, attention_factor = _frequencies(rotary_dim, max_position, base, scaling, original_max_position)
    angles = torch.arange(max_position, device="cpu").float()[:, None] * frequencies
    table = torch.cat((angles.cos() * attention_factor, angles.sin() * attention_factor), -1)
    return table.to(device=device, dtype=dtype)
