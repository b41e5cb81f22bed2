"""Correctness before time: one rule for what a provider's output may differ from the exact result.

With the error taken against `exact` and eps that of the output's dtype,

    rms(error) ≤ 2 eps rms(exact)    and    max |error| ≤ 8 eps max |exact|

and 16 eps for both in fp32, which admits another order of summation and not TF32. NaN and infinities must stand in the
same places. An exact tensor that is not fp32 or fp64 (indices, packed words, values that are only copied) is held bit
for bit. What an op quantises has a rule of its own: `Quantized`; so has what it computes from numbers that it quantised
on the way: `Requantized`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from octavo.testing import quantization_unit


@dataclass(frozen=True)
class Quantized:
    """The exact result of an op that quantises to int8 or fp8: what it rounds, and to what.

    A provider returns q for it, and after q its scales where it computes them. It may have rounded its values to bf16
    before, as several do, up to three times: with eps that of bf16, each number of q · scale is to lie within half a
    unit of q's dtype and 1.5 eps |value| of its value, and each computed scale within 1.5 eps of the one that makes the
    largest value the dtype's limit.

    Attributes:
        values: fp64.
        dtype: q's.
        scale: the scale that is given, one element; None where there is one for each of `parts` of a row, or, where
            there are no parts, one for everything.
    """

    values: torch.Tensor
    dtype: torch.dtype
    scale: torch.Tensor | None = None
    parts: int = 1

    @property
    def outputs(self) -> int:
        return 1 if self.scale is not None else 2


@dataclass(frozen=True)
class Requantized:
    """The exact result of an op that quantises between two products, where providers may have rounded to bf16 before.

    Most numbers become the same ones of 8 bits, and some their neighbours, in no provider the same ones.

    Attributes:
        values: fp32 or fp64.
        noise: the root mean square of what the result changes by where such roundings are made up. A provider's errors
            may be twice as large, in root mean square, and twelve times, beside what the rule allows anyway.
    """

    values: torch.Tensor
    noise: float


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a result, which is one tensor or a sequence of them; of what is quantised, its values."""
    found = tuple(result) if isinstance(result, tuple | list) else (result,)
    found = tuple(r.values if isinstance(r, Quantized | Requantized) else r for r in found)
    if not found or not all(isinstance(t, torch.Tensor) for t in found):
        raise TypeError(f"result: got {type(result).__name__}; expected a tensor or a tuple of tensors")
    return found


def difference(actual: Any, exact: Any) -> str | None:
    """What is wrong with a provider's result, in a few words; None where it is right."""
    got, want = tensors(actual), exact if isinstance(exact, tuple | list) else (exact,)
    counts = [e.outputs if isinstance(e, Quantized) else 1 for e in want]
    if len(got) != sum(counts):
        return f"{len(got)} tensors, expected {sum(counts)}"
    at = 0
    for e, count in zip(want, counts, strict=True):
        wrong = _quantized(got[at : at + count], e) if isinstance(e, Quantized) else _difference(got[at], e)
        if wrong:
            return wrong if len(got) == 1 else f"output {at}: {wrong}"
        at += count
    return None


def not_finite(result: Any) -> str | None:
    """Whether a result holds NaN or infinities, in a few words; None where it does not."""
    for tensor in tensors(result):
        count = 0 if not tensor.is_floating_point() else int((~torch.isfinite(tensor.float())).sum())
        if count:
            return f"{count} of {tensor.numel()} elements are not finite"
    return None


def _difference(actual: torch.Tensor, exact: torch.Tensor | Requantized) -> str | None:
    noise = 0.0
    if isinstance(exact, Requantized):
        noise, exact = exact.noise, exact.values
    if actual.shape != exact.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return None
    if exact.dtype not in (torch.float32, torch.float64):
        return _bits(actual, exact)
    if not actual.dtype.is_floating_point:
        return f"dtype {actual.dtype}, expected a floating-point one"
    return _tolerance(actual, exact, noise)


def _bits(actual: torch.Tensor, exact: torch.Tensor) -> str | None:
    if actual.dtype != exact.dtype:
        return f"dtype {actual.dtype}, expected {exact.dtype}"
    size = exact.element_size()
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    count = int((actual.contiguous().view(word) != exact.contiguous().view(word)).sum())
    return f"{count} of {exact.numel()} elements differ" if count else None


def _tolerance(actual: torch.Tensor, exact: torch.Tensor, noise: float) -> str | None:
    eps = torch.finfo(actual.dtype).eps
    rms_factor, max_factor = (16, 16) if actual.dtype in (torch.float32, torch.float64) else (2, 8)
    a, e = actual.to(exact.dtype), exact
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        count = int((what(a) != what(e)).sum())
        if count:
            return f"{what.__name__} differs in {count} of {a.numel()} elements"
    finite = torch.isfinite(e)
    if not finite.all():
        a, e = a[finite], e[finite]
        if a.numel() == 0:
            return None
    error = (a - e).abs_()
    largest, limit = error.max().item(), max_factor * eps * e.abs().max().item() + 12 * noise
    if not largest <= limit:
        return f"largest error {largest:.2e}, limit {limit:.2e}"
    rms, rms_limit = _rms(error), rms_factor * eps * _rms(e) + 2 * noise
    if not rms <= rms_limit:
        return f"rms error {rms:.2e}, limit {rms_limit:.2e}"
    return None


def _quantized(got: tuple[torch.Tensor, ...], exact: Quantized) -> str | None:
    q, values, rounding = got[0], exact.values, 1.5 * torch.finfo(torch.bfloat16).eps
    if q.dtype != exact.dtype or q.shape != values.shape:
        return f"{q.dtype} of shape {tuple(q.shape)}, expected {exact.dtype} of shape {tuple(values.shape)}"
    limit = float((torch.iinfo if q.dtype == torch.int8 else torch.finfo)(q.dtype).max)
    if exact.parts:
        values, q = (t.unflatten(-1, (exact.parts, -1)) for t in (values, q))
    if exact.scale is not None:
        scale = exact.scale.double()
    else:
        largest = values.abs().amax(-1, keepdim=True) if exact.parts else values.abs().amax()
        if got[1].numel() != largest.numel():
            return f"{got[1].numel()} scales, expected {largest.numel()}"
        scale = got[1].double().view(largest.shape)
        count = int((~((scale * limit - largest).abs() <= rounding * largest)).sum())
        if count:
            return f"{count} of {scale.numel()} scales differ"
    target = (values / scale).clamp_(-limit, limit)
    error = q.to(values.dtype).sub_(target).abs_()
    allowed = quantization_unit(target, exact.dtype).mul_(0.5 + 1e-3).add_(target.abs_(), alpha=rounding)
    count = int((~(error <= allowed)).sum())
    return f"{count} of {q.numel()} elements differ" if count else None


def _rms(x: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(x) / x.numel() ** 0.5).item()
