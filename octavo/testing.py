"""How octavo tests its ops, for those who add one or embed one.

- `assert_accurate` is the one tolerance rule: no test has a tolerance of its own.
- `assert_quantized` is the same for results that are rounded to int8 or fp8.
- `poisoned_memory` fills what `torch.empty` returns with NaN (or the largest integer), so that an element that a kernel
  forgets shows.
- `check_op` runs `torch.library.opcheck` and `torch.compile(fullgraph=True)` on one call, and holds the launcher to
  what `octavo.kernels.replay` rests on.
- `without_interpreter` gives the CPU backend its say under `TRITON_INTERPRET=1`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.kernels.compilation import ToLaunchers
from octavo.kernels.launch import INTERPRET, Recorder, recording
from octavo.kernels.registry import OPS, without_interpreter
from octavo.kernels.tiles import KNOWN_DEVICES

__all__ = [
    "INTERPRET",
    "OPS",
    "assert_accurate",
    "assert_quantized",
    "check_op",
    "poisoned_memory",
    "without_interpreter",
]


_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


def assert_accurate(actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Holds a result to what its dtype allows.

    Args:
        actual: the result under test, in its own dtype.
        exact: the same computation in float64.
        plain: the same computation in plain torch at the precision of `actual`, every step rounded to it.

    The largest error may be twice `plain`'s plus the rounding of the largest element, the root mean square of the
    error twice `plain`'s plus half the rounding of the root mean square; infinities and NaNs must stand in the same
    places. The rounding is one unit of a half-precision dtype, whose sums are kept in fp32, and four of fp32, which has
    no wider one to keep them in and whose exponential is two units off on a GPU.
    """
    assert actual.shape == exact.shape == plain.shape, (actual.shape, exact.shape, plain.shape)
    if actual.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps * (4 if actual.dtype == torch.float32 else 1)
    a, e, p = actual.double(), exact.double(), plain.double()
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = (what(a) != what(e)).sum().item()
        assert wrong == 0, f"{what.__name__} differs in {wrong} of {a.numel()} elements"
    finite = torch.isfinite(e)
    a, e, p = a[finite], e[finite], p[finite]
    if a.numel() == 0:
        return
    error, plain_error = (a - e).abs(), (p - e).abs()
    limit = 2 * plain_error.max() + eps * e.abs().max()
    assert error.max() <= limit, f"largest error {error.max():.3e}, limit {limit:.3e}"
    rms_error, rms_limit = _rms(error), 2 * _rms(plain_error) + eps / 2 * _rms(e)
    assert rms_error <= rms_limit, f"root mean square error {rms_error:.3e}, limit {rms_limit:.3e}"


def quantization_unit(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far apart the numbers of int8 or an fp8 dtype are at float64 values within its range."""
    if dtype == torch.int8:
        return torch.ones_like(x)
    info = torch.finfo(dtype)
    return torch.exp2(x.abs().clamp(min=info.tiny).log2().floor()) * info.eps


def assert_quantized(q: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor, noise: torch.Tensor) -> None:
    """Holds a quantised result to what its dtype allows: every number is the nearest one, up to fp32's own error.

    Args:
        q: the result under test, int8 or fp8, contiguous.
        scale: fp32, one element, or one for each part of a row: `[..., parts]`. Computed scales are those of the
            largest magnitudes.
        exact: what is quantised, in float64.
        noise: the error, at each element, that fp32 arithmetic may have made before it was rounded; in units of exact.
    """
    info = torch.iinfo(q.dtype) if q.dtype == torch.int8 else torch.finfo(q.dtype)
    limit = float(info.max)
    assert q.is_contiguous() and scale.dtype == torch.float32 and q.shape == exact.shape
    parts = scale.shape[-1] if scale.dim() == q.dim() else 1
    s = scale.double()[..., None] if scale.dim() == q.dim() else scale.double()
    e, n, v = (t.double().unflatten(-1, (parts, -1)) for t in (exact, noise, q))
    if e.numel() and scale.dim() == q.dim():
        computed, open_ = e.abs().amax(-1, keepdim=True) / limit, n.amax(-1, keepdim=True) / limit
        assert ((s - computed).abs() <= open_ + 1e-6 * computed).all(), "a scale is not that of the largest magnitude"
    target = (e / s).clamp(-limit, limit)
    allowed = quantization_unit(target, q.dtype) / 2 + n / s + 1e-6 * target.abs()
    wrong = ((v - target).abs() > allowed).sum().item()
    assert wrong == 0, f"{wrong} of {q.numel()} elements are not the nearest ones"


class _TensorOperations(TorchDispatchMode):
    """Notes which tensor operations run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory from `torch.empty` and its kin is NaN or the dtype's largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _check_replayable(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Whether a call does nothing with tensors but octavo's `empty` and `launch`."""
    metas = [_meta(a) for a in args]
    named = {name: _meta(a) for name, a in kwargs.items()}
    with recording(Recorder(KNOWN_DEVICES[90])) as recorder, _TensorOperations() as seen, ToLaunchers():
        function(*metas, **named)
    expected = ["aten.empty.memory_format"] * len(recorder.outputs)
    assert seen.names == expected, f"{name}: beside {len(recorder.outputs)} times empty it calls {seen.names}"


def check_op(name: str, function: Callable[..., Any], op_args: tuple[Any, ...], *args: Any, **kwargs: Any) -> None:
    """`opcheck` of `torch.ops.octavo.<name>` on `op_args`, and the public `function` compiled as one graph.

    Function and launcher may do nothing with tensors but `empty` and `launch`, which is what later calls repeat.
    `args` and `kwargs` go to `function`, eagerly as often as it takes to be repeated and once compiled, on clones;
    results and mutated arguments must be the same bits.
    """
    op = getattr(torch.ops.octavo, name).default
    if any(isinstance(a, torch.Tensor) and a.dtype in _FLOAT8 for a in op_args):
        # torch.allclose, with which opcheck's test of the schema compares arguments, does not take float8.
        kept = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
        torch.library.opcheck(op, op_args, test_utils=kept)
    else:
        torch.library.opcheck(op, op_args)
    _check_replayable(name, OPS[name].launcher, op_args, {})
    _check_replayable(name, function, args, kwargs)
    torch.compiler.reset()
    on_gpu = any(isinstance(a, torch.Tensor) and a.is_cuda for a in (*args, *kwargs.values()))
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if on_gpu else "aot_eager")
    sides = []
    for call in (function, function, function, compiled):
        mine, named = tuple(map(_clone, args)), {name: _clone(a) for name, a in kwargs.items()}
        out = call(*mine, **named)
        seen = (*mine, *named.values(), *(out if isinstance(out, tuple) else (out,)))
        sides.append([x for x in seen if isinstance(x, torch.Tensor)])
    for side in sides[1:]:
        for first, later in zip(sides[0], side, strict=True):
            torch.testing.assert_close(later, first, rtol=0, atol=0, equal_nan=True)
