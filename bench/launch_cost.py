"""What one call of each public op costs the CPU, in eager mode: Python, checks, allocation and launch.

python -m bench.launch_cost [--op NAME …] [--out FOLDER]

Kernels are small enough that the GPU never holds the CPU up: calls come in bursts that are shorter than the launch
queue, and the GPU is waited for between bursts, outside the time. Three costs an op, medians over the bursts:

- repeated: the call's tensors have shapes, strides and dtypes as in an earlier call;
- new shape: the first call with such tensors (another number of tokens each time), kernels already compiled;
- through `torch.ops.octavo`, as a compiled graph or another framework calls it: dispatcher and launcher, no checks.

`torch.add` and Triton's own launch, of octavo's RMSNorm kernel, stand beside them.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.bench.harness import Shape, benchmarks, label, load
from octavo.bench.store import ROOT, commit, folder_name
from octavo.bench.timing import spin_up
from octavo.kernels import norm

BURST, BURSTS = 200, 15
COLUMNS = ("op", "shape", "repeated_us", "new_shape_us", "dispatcher_us", "gpu", "torch", "triton", "commit")


class _Watch(TorchDispatchMode):
    """Notes which of octavo's ops are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "octavo":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def burst_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of CPU a call, for calls that are made one after the other."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / len(calls) * 1e6


def repeated_us(call: Callable[[], Any]) -> float:
    """The median cost of a call that is made over and over."""
    call()
    burst = [call] * BURST
    burst_us(burst)
    return statistics.median(burst_us(burst) for _ in range(BURSTS))


def measure(op: str, device: torch.device) -> dict[str, Any]:
    """One row: the op at the smallest of its benchmark's shapes, and at other numbers of tokens."""
    benchmark = load(op)
    dtype = benchmark.DTYPES[0]
    smallest = min(benchmark.shapes(), key=lambda s: benchmark.bytes_moved(s, dtype))
    counted = next(iter(smallest))  # T, M or B: tokens or sequences
    generator = torch.Generator(device).manual_seed(0)

    def call_of(shape: Shape) -> Callable[[], Any]:
        return benchmark.PROVIDERS["octavo"].make(benchmark.inputs(shape, dtype, device, generator))

    call = call_of(smallest)
    with _Watch() as watch:
        call()
    ((function, args),) = watch.calls
    others = [call_of(smallest | {counted: count}) for count in range(2, 14)]  # one tile choice in all ops
    others[0]()  # compiled from here on
    return {
        "op": op,
        "shape": label(smallest),
        "repeated_us": repeated_us(call),
        "new_shape_us": burst_us(others[1:]),
        "dispatcher_us": repeated_us(lambda: function(*args)),
    }


def yardsticks(device: torch.device) -> list[dict[str, Any]]:
    """What torch and Triton take for comparable work."""
    x, y = (torch.randn(1, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, out = torch.ones(4096, device=device, dtype=torch.bfloat16), torch.empty_like(x)
    args = out, x, None, weight, 4096, 1e-6, 0.0, 1, 4096, 0, 1, 0, 0
    tiles = dict(num_warps=8, num_stages=2, ADD=False, ONE_BLOCK=True, BLOCK=4096)
    calls = {
        "torch.add": lambda: torch.add(x, y),
        "torch.nn.functional.rms_norm": lambda: torch.nn.functional.rms_norm(x, (4096,), weight, 1e-6),
        "triton kernel[grid], no allocation": lambda: norm._rms_norm_kernel[(1,)](*args, **tiles),
    }
    return [{"op": name, "shape": "T=1,hidden=4096", "repeated_us": repeated_us(c)} for name, c in calls.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="an op; all, where none is named")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="where <gpu>/launch_cost.csv goes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("launch_cost: needs a GPU; on a CPU nothing is launched")
    device = torch.device("cuda")
    spin_up(device)
    rows = [measure(op, device) for op in options.op or benchmarks()] + yardsticks(device)
    gpu = torch.cuda.get_device_name(device)
    same = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    path = options.out / folder_name(gpu) / "launch_cost.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            times = {name: f"{value:.2f}" for name, value in row.items() if isinstance(value, float)}
            writer.writerow(row | times | same)
            print(f"{row['op']:36}" + "".join(f"{name} {value:>7}   " for name, value in times.items()))
    print(path)


if __name__ == "__main__":
    main()
