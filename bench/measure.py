"""One case (an op, a shape, a dtype): every provider is checked, the right ones are timed in turns."""

import importlib
import importlib.metadata
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import octavo
from octavo.bench.check import difference, tensors
from octavo.bench.harness import Benchmark, Inputs, Provider, Result, Shape, Unsupported, dtype_name, label
from octavo.bench.timing import (
    Timer,
    Times,
    capture_one,
    flatten,
    interleave,
    make_timer,
    sets_wanted,
    storage_bytes,
    summarize,
)
from octavo.testing import poisoned_memory


@dataclass
class Outcome:
    """What became of one provider: its times, or none and a note that says why."""

    provider: str
    version: str
    times: Times | None = None
    notes: list[str] = field(default_factory=list)


class Lost(Exception):
    """The CUDA context is gone (an illegal access, say): the process can measure nothing more."""

    def __init__(self, provider: str, note: str) -> None:
        super().__init__(note)
        self.provider, self.note = provider, note


class Wrong(Exception):
    """A provider's output is not right."""


@dataclass
class _Case:
    """What all providers of a case share: fresh inputs from one seed, the exact result, the rotated sets."""

    benchmark: Benchmark
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.seed = zlib.crc32(f"{self.benchmark.OP} {label(self.shape)} {dtype_name(self.dtype)}".encode())
        self.exact: Result = self.benchmark.exact(self.fresh())
        generator = self._generator(self.seed + 1)
        first = self._inputs(generator)
        touched = self.benchmark.bytes_moved(self.shape, self.dtype)
        count = sets_wanted(touched, storage_bytes(first), self.device)
        self.sets = [first] + [self._inputs(generator) for _ in range(count - 1)]

    def fresh(self) -> Inputs:
        """The inputs that outputs are checked on, the same values at every call and in every process."""
        return self._inputs(self._generator(self.seed))

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def _inputs(self, generator: torch.Generator) -> Inputs:
        return self.benchmark.inputs(self.shape, self.dtype, self.device, generator)


@torch.no_grad()
def run_case(
    benchmark: Benchmark,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    chosen: Mapping[str, Provider],
    rounds: int = 20,
    trying: Callable[[str], None] = lambda name: None,
) -> list[Outcome]:
    """Checks and times the chosen providers on one case.

    Args:
        trying: told a provider's name each time before it is touched, so that a parent knows whom a crash is due to.

    Returns:
        One outcome a provider, in their order. No exception of a provider gets out.

    Raises:
        Lost: the CUDA context was lost.
    """
    outcomes = {name: Outcome(name, version(name, provider)) for name, provider in chosen.items()}

    def failed(name: str, error: Exception) -> None:
        outcomes[name].notes.append(_note(error))
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except Exception as fatal:
                raise Lost(name, _note(fatal)) from error

    try:
        case = _Case(benchmark, shape, dtype, device)
    except Exception as error:
        for outcome in outcomes.values():
            outcome.notes.append("the benchmark itself " + _note(error))
        return list(outcomes.values())
    timers: dict[str, Timer] = {}
    for name, provider in chosen.items():
        trying(name)
        try:
            timers[name] = _checked_timer(case, name, provider)
        except Exception as error:
            failed(name, error)
    for name, times in interleave(timers, rounds, failed, trying).items():
        outcomes[name].times = summarize(times)
        if timers[name].note:
            outcomes[name].notes.append(timers[name].note)
    return list(outcomes.values())


def _checked_timer(case: _Case, name: str, provider: Provider) -> Timer:
    """A timer of a provider whose output has been found right."""
    inputs = case.fresh()
    call = provider.make(inputs)
    # Poison shows what a kernel leaves unwritten. torch's own kernels are spared: the switch that poisons also selects
    # their deterministic versions, and has torch.compile compile twice.
    with nullcontext() if name.startswith("torch") else _poison():
        result = call()
    _require_right(result, case.exact, "wrong")
    captured = case.device.type == "cuda" and _right_in_a_graph(case, inputs, call)
    return make_timer([provider.make(s) for s in case.sets], case.device, captured)


def _right_in_a_graph(case: _Case, inputs: Inputs, call: Callable[[], Any]) -> bool:
    """Whether a call can be captured; its replay must give the right result too."""
    try:
        graph, result = capture_one(call)
    except Exception:
        torch.cuda.synchronize()
        return False
    own = {t.untyped_storage().data_ptr() for t in flatten(inputs)}
    for tensor, value in zip(flatten(inputs), flatten(case.fresh()), strict=True):
        if not _equal(tensor, value):  # in-place ops have changed it
            tensor.copy_(value)
    for tensor in tensors(result):
        if tensor.untyped_storage().data_ptr() not in own:
            _fill_with_poison(tensor)
    graph.replay()
    torch.cuda.synchronize()
    _require_right(result, case.exact, "wrong in a graph")
    return True


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:  # not implemented for every fp8 type
        return False


def _fill_with_poison(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor.view(torch.uint8).fill_(0x7F)  # NaN in both kinds of fp8
    elif tensor.is_floating_point():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@contextmanager
def _poison() -> Iterator[None]:
    with warnings.catch_warnings(), poisoned_memory():
        warnings.simplefilter("ignore")
        yield


def _require_right(result: Any, exact: Result, prefix: str) -> None:
    wrong = difference(result, exact)
    if wrong:
        raise Wrong(f"{prefix}: {wrong}")


def _note(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    match error:
        case Wrong():
            return text
        case Unsupported():
            return f"unsupported: {text}"
        case ModuleNotFoundError():
            return f"not installed: {text}"
        case torch.cuda.OutOfMemoryError():
            return "out of memory"
    return f"failed: {type(error).__name__}: {text}"


def version(name: str, provider: Provider) -> str:
    """The version of what a provider measures; empty where its package is not installed."""
    if provider.package is None:
        return octavo.__version__ if name == "octavo" else torch.__version__ if name.startswith("torch") else ""
    try:
        return importlib.metadata.version(provider.package)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(provider.package.replace("-", "_")), "__version__", ""))
    except ImportError:
        return ""
