"""Correctness before time: one rule for what a provider's output may differ from the exact result.

With the error taken against `exact` and eps that of the output's dtype,

    rms(error) ≤ 2 eps rms(exact)    and    max |error| ≤ 8 eps max |exact|

and 16 eps for both in fp32, which admits another order of summation and not TF32. NaN and infinities must stand in the
same places. An exact tensor that is not fp32 or fp64 (indices, packed words, values that are only copied) is held bit
for bit.
"""

from typing import Any

import torch


def tensors(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a result, which is one tensor or a sequence of them."""
    found = (result,) if isinstance(result, torch.Tensor) else tuple(result) if isinstance(result, tuple | list) else ()
    if not found or not all(isinstance(t, torch.Tensor) for t in found):
        raise TypeError(f"result: got {type(result).__name__}; expected a tensor or a tuple of tensors")
    return found


def difference(actual: Any, exact: Any) -> str | None:
    """What is wrong with a provider's result, in a few words; None where it is right."""
    got, want = tensors(actual), tensors(exact)
    if len(got) != len(want):
        return f"{len(got)} tensors, expected {len(want)}"
    for index, (a, e) in enumerate(zip(got, want, strict=True)):
        wrong = _difference(a, e)
        if wrong:
            return wrong if len(got) == 1 else f"output {index}: {wrong}"
    return None


def not_finite(result: Any) -> str | None:
    """Whether a result holds NaN or infinities, in a few words; None where it does not."""
    for tensor in tensors(result):
        count = 0 if not tensor.is_floating_point() else int((~torch.isfinite(tensor.float())).sum())
        if count:
            return f"{count} of {tensor.numel()} elements are not finite"
    return None


def _difference(actual: torch.Tensor, exact: torch.Tensor) -> str | None:
    if actual.shape != exact.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if actual.numel() == 0:
        return None
    if exact.dtype not in (torch.float32, torch.float64):
        return _bits(actual, exact)
    if not actual.dtype.is_floating_point:
        return f"dtype {actual.dtype}, expected a floating-point one"
    return _tolerance(actual, exact)


def _bits(actual: torch.Tensor, exact: torch.Tensor) -> str | None:
    if actual.dtype != exact.dtype:
        return f"dtype {actual.dtype}, expected {exact.dtype}"
    size = exact.element_size()
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    count = int((actual.contiguous().view(word) != exact.contiguous().view(word)).sum())
    return f"{count} of {exact.numel()} elements differ" if count else None


def _tolerance(actual: torch.Tensor, exact: torch.Tensor) -> str | None:
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
    largest, limit = error.max().item(), max_factor * eps * e.abs().max().item()
    if not largest <= limit:
        return f"largest error {largest:.2e}, limit {limit:.2e}"
    rms, rms_limit = _rms(error), rms_factor * eps * _rms(e)
    if not rms <= rms_limit:
        return f"rms error {rms:.2e}, limit {rms_limit:.2e}"
    return None


def _rms(x: torch.Tensor) -> float:
    return (torch.linalg.vector_norm(x) / x.numel() ** 0.5).item()
