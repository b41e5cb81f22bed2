"""What one call of each public op costs the CPU, in eager mode: Python, checks, allocation and launch.

python -m bench.launch_cost [--op NAME …] [--out FOLDER]

Calls come in bursts that do not fill the launch queue, and the GPU is waited for between bursts, outside the time. Ops
take turns for many rounds, because the speed of a shared host drifts; `torch.add` and Triton's own launch (of octavo's
RMSNorm, its output allocated before) are among them. Medians of these costs:

- repeated: the call's tensors have shapes, strides and dtypes as in an earlier call, and the GPU keeps up;
- behind work: the same while the GPU is busy with something else, so that launches queue up;
- dispatcher: through `torch.ops.octavo`, as a compiled graph or another framework calls it: no checks, no repetition;
- new shape: the first call with such tensors (another number of tokens each time), kernels already compiled.

Writes <gpu>/launch_cost.json to FOLDER, by default bench/results, where `bench.plot` finds it. Rows take the place of
their ops' older ones; each has its commit, and what `torch.add` took in the same run, since no two hosts are alike.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from octavo.bench.bench_paged_attention import TABLES
from octavo.bench.harness import Inputs, Shape, benchmarks, label, load
from octavo.bench.store import commit, default_folder, folder_name
from octavo.bench.timing import SPIN_HZ, spin_up
from octavo.kernels import norm
from octavo.kernels.registry import OPS

BURST, ROUNDS = 200, 40
WORK_US = 40.0
COSTS = ("repeated_us", "behind_work_us", "dispatcher_us", "new_shape_us")


class _Watch(TorchDispatchMode):
    """Notes which of octavo's ops are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "octavo":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def burst_us(calls: Sequence[Callable[[], Any]], work_us: float = 0.0) -> float:
    """Microseconds of CPU a call, for calls one after the other, while the GPU has `work_us` of other work for each."""
    torch.cuda.synchronize()
    if work_us:
        torch.cuda._sleep(int(len(calls) * work_us * 1e-6 * SPIN_HZ))
    start = time.perf_counter()
    for call in calls:
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / len(calls) * 1e6


@dataclass
class Subject:
    """What is timed: in every round one burst of each kind; the column's name → the times so far."""

    name: str
    shape: str
    bursts: dict[str, Callable[[], float]]
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self) -> None:
        for column, burst in self.bursts.items():
            self.times[column].append(burst())

    def row(self) -> dict[str, str | float]:
        costs = {column: round(statistics.median(times), 2) for column, times in self.times.items()}
        return {"op": self.name, "shape": self.shape, **costs}


def planning(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """`plan_attention` of paged_attention's inputs."""
    given = [inputs[name] for name in ("query", "key_cache", *TABLES)]
    options = {"max_seqlen_q": inputs["max_seqlen_q"], "window_size": inputs["window"]}
    return lambda: octavo.plan_attention(*given, **options)


def routed(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """`fused_moe` alone, which octavo's provider calls after the router."""
    return load("fused_moe").PROVIDERS["octavo, routed"].make(inputs)


BORROWED = {"plan_attention": ("paged_attention", planning), "fused_moe": ("fused_moe", routed)}
"""Ops that no provider calls alone: whose inputs they are given, and how they are called with them."""


def op(name: str, device: torch.device, kind: str = "", change: Shape | None = None) -> Subject:
    """An op at the smallest of its benchmark's shapes, with a `change` of it, and at other numbers of tokens."""
    module, caller = BORROWED.get(name, (name, None))
    benchmark = load(module)
    make = caller or benchmark.PROVIDERS["octavo"].make
    dtype = benchmark.DTYPES[0]
    smallest = min(benchmark.shapes(), key=lambda s: benchmark.bytes_moved(s, dtype))
    if "ctx" in smallest:
        smallest = smallest | {"ctx": 64}  # else the GPU takes longer than the CPU
    smallest = smallest | (change or {})
    counted = next(iter(smallest))  # T, M or B: tokens or sequences
    generator = torch.Generator(device).manual_seed(0)

    def call_of(shape: Shape) -> Callable[[], Any]:
        return make(benchmark.inputs(shape, dtype, device, generator))

    call = call_of(smallest)
    with _Watch() as watch:
        call()
    ((function, args),) = watch.calls
    # So few tokens that all of them have one tile choice.
    others = [call_of(smallest | {counted: count}) for count in range(2, 14)]
    for other in others:
        other()  # compiled from here on

    def anew() -> float:
        getattr(octavo, name).plans.clear()
        elapsed = burst_us(others)
        for _ in range(3):
            call()  # until it is repeated again
        return elapsed

    bursts = {
        "repeated_us": lambda: burst_us([call] * BURST),
        "behind_work_us": lambda: burst_us([call] * BURST, WORK_US),
        "dispatcher_us": lambda: burst_us([lambda: function(*args)] * BURST),
        "new_shape_us": anew,
    }
    return Subject(name + kind, label(smallest), bursts)


def yardsticks(device: torch.device) -> list[Subject]:
    """What torch and Triton take for comparable work."""
    x, y = (torch.randn(1, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, out = torch.ones(4096, device=device, dtype=torch.bfloat16), torch.empty_like(x)
    args = out, x, None, weight, 1, 4096, 1e-6, 0.0, 1, 4096, 0, 1, 0, 0
    tiles = dict(num_warps=4, num_stages=2, ADD=False, ONE_BLOCK=True, ROWS=1, BLOCK=4096, CHAINED=False)
    calls = {
        "torch.add": lambda: torch.add(x, y),
        "torch.nn.functional.rms_norm": lambda: torch.nn.functional.rms_norm(x, (4096,), weight, 1e-6),
        "triton kernel[grid], no allocation": lambda: norm._rms_norm_kernel[(1,)](*args, **tiles),
    }
    return [
        Subject(
            name,
            "T=1,hidden=4096",
            {
                "repeated_us": partial(burst_us, [call] * BURST),
                "behind_work_us": partial(burst_us, [call] * BURST, WORK_US),
            },
        )
        for name, call in calls.items()
    ]


def save(subjects: Sequence[Subject], gpu: str, folder: Path) -> Path:
    """Writes the medians of some subjects, of which `torch.add` is the first, into `launch_cost.json`."""
    made = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    made["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "launch_cost.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [subject.row() for subject in subjects]
    beside = {"torch_add_us": rows[0]["behind_work_us"], "commit": made["commit"]}
    merged = {row["op"]: row for row in [*found, *(row | beside for row in rows)]}
    path.write_text(json.dumps(made | {"rows": list(merged.values())}, indent=2) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", help="ops, not what is composed of several; all, where none is named")
    parser.add_argument("--out", type=Path, default=default_folder(), help="where <gpu>/launch_cost.json goes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("launch_cost: needs a GPU; on a CPU nothing is launched")
    device = torch.device("cuda")
    names = options.op or [*benchmarks(), *BORROWED]
    subjects = yardsticks(device) + [op(name, device) for name in names if name in OPS]
    if "paged_attention" in (options.op or OPS):
        subjects.append(op("paged_attention", device, " of chunks", {"q": 64}))  # other kernels
    spin_up(device)
    for _ in range(ROUNDS):
        for subject in subjects:
            subject.run()
    for row in (subject.row() for subject in subjects):
        print("  ".join(f"{row.get(name, ''):>7}" for name in COSTS), row["op"])
    gpu = torch.cuda.get_device_name(device)
    print(save(subjects, gpu, options.out / folder_name(gpu)))


if __name__ == "__main__":
    main()
