"""What a benchmark is: the names that a module `bench/bench_<op>.py` declares, and how they are found and selected.

A benchmark module has, at module level:

- `OP`: the public octavo function's name;
- `DTYPES`: the dtypes that a GPU is measured with;
- `shapes()`: the shapes, each a dict of dimension → size in reading order;
- `inputs(shape, dtype, device, generator)`: one fresh set of random inputs;
- `exact(inputs)`: the right result without octavo, a tensor or a tuple of them. A tensor in fp64 (or fp32) is held to
  the tolerance of `octavo.bench.check`; one in another dtype (integers, copied half-precision values) bit for bit; a
  `Quantized` from there stands for a quantised tensor and its computed scales;
- `flops(shape)` and `bytes_moved(shape, dtype)`: the floor, each input read once and each output written once;
- `PROVIDERS`: name → `Provider`, in the order octavo, torch, torch.compile, then peers.

It may also have `observe(result, inputs)`: what of a provider's result is compared with `exact`, where results that
differ can be equally right.

The harness owns the rest: selection here, correctness in `check`, time in `timing`, one case in `measure`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

Shape = dict[str, int]
Inputs = dict[str, Any]
Result = Any  # a tensor, a `check.Quantized`, or a tuple of them

CPU_BYTES = 64 * 2**20
CPU_FLOPS = 10**9


class Unsupported(Exception):
    """Raised by `Provider.make` for a case that a provider cannot compute; its text becomes the row's note."""


class LeftOut(Unsupported):
    """Raised by `Provider.make` for a case that a provider could compute and that is not measured, to save time."""


@dataclass(frozen=True)
class Provider:
    """One implementation of an op.

    Attributes:
        make: from one input set, does all set-up (plans, packing, preallocated outputs) and returns the zero-argument
            call that is timed; the call returns what `exact` returns (in-place ops: the mutated tensors). Raises
            ImportError where a peer is not installed and `Unsupported` where it cannot compute the case.
        peer: the group of packages it belongs to ("flashinfer", "vllm", "triton-peers"); groups run in processes of
            their own. None runs beside octavo.
        devices: the kinds of device it runs on.
        package: the distribution whose version is recorded.
        note: what a reader of its times must know; it goes with every one of them.
    """

    make: Callable[[Inputs], Callable[[], Any]]
    peer: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    package: str | None = None
    note: str = ""


class Benchmark(Protocol):
    """The names of a benchmark module, for the type checker."""

    OP: str
    DTYPES: tuple[torch.dtype, ...]
    PROVIDERS: Mapping[str, Provider]

    @staticmethod
    def shapes() -> list[Shape]: ...
    @staticmethod
    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs: ...
    @staticmethod
    def exact(inputs: Inputs) -> Result: ...
    @staticmethod
    def flops(shape: Shape) -> int: ...
    @staticmethod
    def bytes_moved(shape: Shape, dtype: torch.dtype) -> int: ...


def label(shape: Mapping[str, int]) -> str:
    """A shape's name in files and tables: "T=64,hidden=4096"."""
    return ",".join(f"{name}={size}" for name, size in shape.items())


def parse_label(text: str) -> Shape:
    """The shape that `label` made `text` of; ValueError where it is not of that form."""
    shape: Shape = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        if not (name.isidentifier() and equals and size.isdecimal()) or name in shape:
            raise ValueError(f"shape: {text!r}; expected a form like 'T=64,hidden=4096'")
        shape[name] = int(size)
    return shape


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def benchmarks() -> list[str]:
    """The names of the benchmarks that lie beside this module, in alphabetical order."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def load(name: str) -> Benchmark:
    """Imports one benchmark.

    Args:
        name: one of `benchmarks()`, or the path of a module that declares the same names ("my/bench_norm.py").

    Raises:
        ValueError: there is no such benchmark.
    """
    if name.endswith(".py"):
        path = Path(name)
        module_name = f"octavo_bench_file_{path.stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None or not path.exists():
            raise ValueError(f"op: no file {name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
        return cast(Benchmark, module)
    if name not in benchmarks():
        raise ValueError(f"op: {name!r} has no benchmark; expected one of {', '.join(benchmarks())}")
    return cast(Benchmark, importlib.import_module(f"octavo.bench.bench_{name}"))


def wanted_shapes(listed: Sequence[Shape], filters: Sequence[str]) -> list[Shape]:
    """The shapes that any filter selects, all without a filter.

    A filter with "=" selects the shapes whose named dimensions have exactly these sizes ("T=64" is not T=640); another
    one selects by substring of the label. A filter that names every dimension adds that shape where it is not listed.
    """
    if not filters:
        return list(listed)
    chosen = [s for s in listed if any(_matches(s, f) for f in filters)]
    for text in filters:
        if "=" in text and not any(_matches(s, text) for s in chosen):
            asked = parse_label(text)
            template = next((s for s in listed if set(s) == set(asked)), None)
            if template is not None:
                chosen.append({name: asked[name] for name in template})
    return chosen


def _matches(shape: Shape, text: str) -> bool:
    if "=" not in text:
        return text in label(shape)
    return parse_label(text).items() <= shape.items()


def cases(
    benchmark: Benchmark, device: torch.device, filters: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> list[tuple[Shape, torch.dtype]]:
    """What is measured on a device.

    On a CPU, shapes of more than 64 MB or 10⁹ operations are left out unless a filter asks for them: they say nothing
    about the reference and would take minutes.
    """
    chosen = [getattr(torch, name) for name in dtypes] or list(benchmark.DTYPES)
    pairs = [(shape, dtype) for shape in wanted_shapes(benchmark.shapes(), filters) for dtype in chosen]
    if device.type != "cpu" or filters:
        return pairs
    return [
        (shape, dtype)
        for shape, dtype in pairs
        if benchmark.bytes_moved(shape, dtype) <= CPU_BYTES and benchmark.flops(shape) <= CPU_FLOPS
    ]


def providers(
    benchmark: Benchmark, device: torch.device, group: str | None, names: Sequence[str] = ()
) -> dict[str, Provider]:
    """The providers of one group that run on a device; `names` are providers' or groups' names, none means all."""
    return {
        name: provider
        for name, provider in benchmark.PROVIDERS.items()
        if provider.peer == group and device.type in provider.devices and (not names or name in names or group in names)
    }
