"""How long the GPU waits between steps while the engine decodes a batch, without a profiler.

    python -m bench.engine_idle --model Llama-3-8B --scheme fp8 [--batch 256] [--out FOLDER]

CUDA events lie before and behind each step's graph, on its stream; those behind one step and before the next enclose
what is not the model's: the copy of the tokens, the copy of the next step's inputs, and waiting for the host. Counted
are pairs of steps that both decode the whole batch. Beside it stands what the host does in a step, and how long it
waits for one. On a CPU, where steps run as they are started, the figures are the host's own. The row goes to
<gpu>/engine_idle.json of --out, bench/results by default.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from octavo.bench.engine_bench import Bench, Setup
from octavo.bench.engine_table import merge
from octavo.bench.random_model import SCHEMES, SERVED
from octavo.bench.serving_metrics import spread
from octavo.bench.store import default_folder, folder_name
from octavo.bench.workload import Lengths, Workload
from octavo.engine.core import Pending
from octavo.engine.inputs import Shape
from octavo.engine.runner import ModelRunner
from octavo.engine.sampler import Mode
from octavo.engine.sequence import Sampled, Step
from octavo.engine.sequence import Sequence as TokenSequence


class Mark:
    """A moment in the runner's stream, or on a CPU of the clock."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.event = None if stream is None else torch.cuda.Event(enable_timing=True)
        if self.event is not None:
            self.event.record(stream)
        self.seconds = time.perf_counter()

    def until(self, later: "Mark") -> float:
        """Seconds to a later moment, when both are over."""
        if self.event is None or later.event is None:
            return later.seconds - self.seconds
        return self.event.elapsed_time(later.event) / 1e3


class WatchedRunner:
    """A runner that keeps when its steps began and ended, and how long the host waited for them."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.steps, self.waited = runner, list[tuple[Shape, Mark, Mark]](), list[float]()
        owner, name = (runner, "_compute") if runner.graphs is None else (runner.graphs, "replay")
        compute: Callable[[Shape, Mode], torch.Tensor] = getattr(owner, name)

        def watched(shape: Shape, mode: Mode) -> torch.Tensor:
            begin = Mark(runner.stream)
            result = compute(shape, mode)
            self.steps.append((shape, begin, Mark(runner.stream)))
            return result

        setattr(owner, name, watched)

    def start(self, step: Step) -> Pending:
        return _Waited(self.runner.start(step), self.waited)

    def forget(self, sequence: TokenSequence) -> None:
        self.runner.forget(sequence)


class _Waited:
    def __init__(self, pending: Pending, waited: list[float]) -> None:
        self.pending, self.waited = pending, waited

    def wait(self) -> list[Sampled]:
        began = time.perf_counter()
        try:
            return self.pending.wait()
        finally:
            self.waited.append(time.perf_counter() - began)


def gaps(steps: Sequence[tuple[Shape, Mark, Mark]], batch: int) -> tuple[list[float], float]:
    """Seconds between steps that both decode so many sequences, and in all from each begin to the next."""
    between, whole = [], 0.0
    for (shape, begin, end), (following, begins, _) in pairwise(steps):
        if shape == following and shape.decode and shape.sequences == batch:
            between.append(end.until(begins))
            whole += begin.until(begins)
    return between, whole


def measure(bench: Bench, batch: int, input_len: int, output_len: int) -> dict[str, Any]:
    """Serves one batch, all of it at once, after a warm-up."""
    workload = Workload(Lengths(input_len, output_len), batch)
    bench.warm_up(workload, batch)
    core, runner = bench.llm.core, bench.llm.runner
    core.runner = watched = WatchedRunner(runner)
    seconds = bench.results(bench.serve(workload, "decoding"))["seconds"]
    core.runner = runner
    sizes = [batch] if runner.sizes is None else runner.sizes.decodes
    padded = next(size for size in sizes if size >= batch)
    between, whole = gaps(watched.steps, padded)
    if not between:
        raise ValueError(f"batch: {batch}; no two steps in a row decoded all of it: raise max_num_seqs or output-len")
    waited = statistics.mean(watched.waited)
    return {
        "value": 100 * sum(between) / whole,
        "unit": "% of the time between steps",
        "gap_ms": {**(spread(between) or {}), "most": max(between) * 1e3},
        "pairs": len(between),
        "ms_per_step": whole / len(between) * 1e3,
        "host_ms_per_step": (seconds / len(watched.waited) - waited) * 1e3,
        "waited_ms_per_step": waited * 1e3,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3-8B", help=f"the shape: {', '.join(SERVED)}")
    parser.add_argument("--scheme", default="bf16", choices=SCHEMES)
    parser.add_argument("--layers", type=int, help="so many of them instead of all")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--device")
    parser.add_argument("--options", type=json.loads, default={}, help='the engine\'s, as JSON: {"max_num_seqs": 64}')
    parser.add_argument("--out", type=Path, default=default_folder(), help="where <gpu>/engine_idle.json goes")
    args = parser.parse_args(arguments)
    options = {"max_num_seqs": args.batch, "max_model_len": 2048} | args.options
    try:
        bench = Bench(Setup(None, args.model, args.scheme, args.layers, args.device, options))
        found = measure(bench, args.batch, args.input_len, args.output_len)
    except ValueError as error:
        print(f"engine_idle: {error}", file=sys.stderr)
        return 2
    lengths = {"input_len": args.input_len, "output_len": args.output_len}
    row = {"cell": f"batch {args.batch}"} | bench.describe() | lengths | found
    path = args.out / folder_name(row["gpu"]) / "engine_idle.json"
    merge(path, [row])
    gap, name = found["gap_ms"], f"{bench.setup.name}, {row['cell']}"
    print(
        f"{name}: {found['ms_per_step']:.3f} ms a step, {found['value']:.2f} % of it between steps (median "
        f"{gap['median']:.3f} ms, most {gap['most']:.3f}); the host works {found['host_ms_per_step']:.3f} ms a step "
        f"and waits {found['waited_ms_per_step']:.3f}\n{path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
