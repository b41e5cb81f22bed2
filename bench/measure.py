"""One case (an op, a shape, a dtype): every provider is checked, the right ones are timed in turns."""

import importlib
import importlib.metadata
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import octavo
from octavo.bench.check import difference, not_finite, tensors
from octavo.bench.harness import (
    Benchmark,
    Inputs,
    LeftOut,
    Provider,
    Result,
    Shape,
    Unsupported,
    dtype_name,
    label,
)
from octavo.bench.timing import (
    Timer,
    Times,
    capture_one,
    flatten,
    make_timer,
    quiet_times,
    sets_wanted,
    spin_up,
    storage_bytes,
)
from octavo.testing import poisoned_memory


@dataclass
class Outcome:
    """What became of one provider: its times, or none and a note that says why.

    `touched` is how many bytes its calls touched before they came back to the same inputs.
    """

    provider: str
    version: str
    times: Times | None = None
    notes: list[str] = field(default_factory=list)
    touched: int = 0


class Lost(Exception):
    """The CUDA context is gone (an illegal access, say): the process can measure nothing more."""

    def __init__(self, provider: str, note: str) -> None:
        super().__init__(note)
        self.provider, self.note = provider, note


class Wrong(Exception):
    """A provider's output is not right."""


@dataclass
class _Case:
    """What all providers of a case share: fresh inputs from one seed, the exact result, the rotated sets.

    The first set is what outputs are checked on, so that what was timed can be checked too.
    """

    benchmark: Benchmark
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.seed = zlib.crc32(f"{self.benchmark.OP} {label(self.shape)} {dtype_name(self.dtype)}".encode())
        first = self.fresh()
        self.exact: Result = self.benchmark.exact(first)
        generator = self._generator(self.seed + 1)
        touched = self.benchmark.bytes_moved(self.shape, self.dtype)
        count = sets_wanted(touched, storage_bytes(first), self.device)
        self.sets = [first] + [self._inputs(generator) for _ in range(count - 1)]
        self.touched = count * touched
        self.in_place = False  # whether a provider's call has changed its inputs

    def fresh(self) -> Inputs:
        """The inputs that outputs are checked on, the same values at every call and in every process."""
        return self._inputs(self._generator(self.seed))

    def observed(self, result: Any, inputs: Inputs) -> Any:
        """What is compared with `exact`: the result, or what the benchmark wants to see of it."""
        observe = getattr(self.benchmark, "observe", None)
        return result if observe is None else observe(result, inputs)

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
    spin_up(device, 0.05)
    timed = quiet_times(timers, rounds, failed, trying)
    for name, times in timed.items():
        trying(name)
        try:
            result = case.observed(timers[name].result(), case.sets[0])
            _require_right_still(result, None if case.in_place else case.exact)
        except Exception as error:
            failed(name, error)
            continue
        outcomes[name].times, outcomes[name].touched = times, case.touched
        outcomes[name].notes += filter(None, [timers[name].note, chosen[name].note])
    return list(outcomes.values())


def _checked_timer(case: _Case, name: str, provider: Provider) -> Timer:
    """A timer of a provider whose output has been found right."""
    inputs = case.fresh()
    call = provider.make(inputs)
    # Poison shows what a kernel leaves unwritten. torch's own kernels are spared: the switch that poisons also selects
    # their deterministic versions, and has torch.compile compile twice.
    with nullcontext() if name.startswith("torch") else _poison():
        result = call()
    _require_right(case.observed(result, inputs), case.exact, "wrong")
    case.in_place |= _restore(inputs, case.fresh())
    captured = case.device.type == "cuda" and _right_in_a_graph(case, inputs, call)
    timer = make_timer([provider.make(s) for s in case.sets], case.device, captured)
    if captured:
        _poison_outputs(timer.result(), case.sets[0])
    return timer


def _right_in_a_graph(case: _Case, inputs: Inputs, call: Callable[[], Any]) -> bool:
    """Whether a call can be captured; its replay must give the right result too."""
    try:
        graph, result = capture_one(call)
    except Exception:
        torch.cuda.synchronize()
        return False
    if case.in_place:
        _restore(inputs, case.fresh())
    _poison_outputs(result, inputs)
    graph.replay()
    torch.cuda.synchronize()
    _require_right(case.observed(result, inputs), case.exact, "wrong in a graph")
    return True


def _restore(inputs: Inputs, fresh: Inputs) -> bool:
    """Gives inputs their values again; whether a call had changed them in place."""
    changed = [(t, v) for t, v in zip(flatten(inputs), flatten(fresh), strict=True) if not _equal(t, v)]
    for tensor, value in changed:
        tensor.copy_(value)
    return bool(changed)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    try:
        return torch.equal(a, b)
    except RuntimeError:  # not implemented for every fp8 type
        return False


def _poison_outputs(result: Any, inputs: Inputs) -> None:
    """Overwrites what a replay has to write again; inputs that were changed in place are spared."""
    own = {t.untyped_storage().data_ptr() for t in flatten(inputs)}
    for tensor in tensors(result):
        if tensor.untyped_storage().data_ptr() not in own:
            _fill_with_poison(tensor)


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


def _require_right_still(result: Any, exact: Result | None) -> None:
    """Checks what the timed calls left; without `exact`, where they changed their inputs, only that it is finite."""
    wrong = not_finite(result) if exact is None else difference(result, exact)
    if wrong:
        raise Wrong(f"wrong after timing: {wrong}")


def _note(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    if type(error).__name__ == "CompilationError":  # Triton's quotes the source and says last what is wrong with it
        lines = [line.strip() for line in lines if any(c.isalpha() for c in line)][-1:] or lines
    text = lines[0]
    for folder in filter(None, sys.path):  # where a peer is installed is this machine's affair
        text = text.replace(folder + os.sep, "")
    text = text[:200]
    match error:
        case Wrong():
            return text
        case LeftOut():
            return f"left out: {text}"
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
