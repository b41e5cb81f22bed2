"""The engine's four loads for one model of random weights, beside what vLLM took for them.

    python -m bench.engine_table --model Llama-3-8B --scheme fp8 [--budget 300] [--cells single b32] [--out FOLDER]
    python -m bench.engine_table --show

| cell | requests | tokens in, out | figure |
| --- | --- | --- | --- |
| single | 1 | 128, 256 | ms a token: the whole time / 256 |
| b32 | 32 | 512, 256 | output tokens/s |
| 128/256 | 256 | 128, 256 | output tokens/s |
| 1024/128 | 512; of Llama-2-70B 384 | 1024, 128 | total tokens/s, in and out |

The short ones come first, then all again up to `--repeats` times, and no run is begun that is not likely to end within
`--budget` seconds, loading included. The figure is the median of the runs. FOLDER/<gpu>/engine.json, FOLDER being
bench/results by default, is written after each run; a row replaces the one of the same model, scheme, cell, GPU, commit
and options, all others stay. `--show` prints the latest rows of all models instead. vLLM's figures are recorded ones
(of 0.26.0, CUDA graphs, greedy, the same loads), not of this run.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.bench.engine_bench import Bench, Result, Setup
from octavo.bench.random_model import SCHEMES, SERVED, find
from octavo.bench.store import default_folder, folder_name
from octavo.bench.workload import Lengths, Workload


@dataclass(frozen=True)
class Cell:
    """A load and what is told of it."""

    num_prompts: int
    input_len: int
    output_len: int
    unit: str

    def workload(self, model: str, seed: int = 0) -> Workload:
        count = 384 if self.num_prompts == 512 and model == "Llama-2-70B" else self.num_prompts
        return Workload(Lengths(self.input_len, self.output_len), count, seed=seed)

    def value(self, result: Result) -> float:
        """The cell's figure of one run."""
        if self.unit == "ms a token":
            return result["seconds"] * 1e3 / result["output_tokens"]
        return result["output_tokens_per_s" if self.unit == "output tokens/s" else "total_tokens_per_s"]

    def seconds(self, workload: Workload, value: float) -> float:
        """How long a run takes that has this figure."""
        outputs = workload.num_prompts * self.output_len
        inputs = workload.num_prompts * self.input_len
        if self.unit == "ms a token":
            return outputs * value / 1e3
        return (outputs if self.unit == "output tokens/s" else inputs + outputs) / value


CELLS = {
    "single": Cell(1, 128, 256, "ms a token"),
    "b32": Cell(32, 512, 256, "output tokens/s"),
    "128/256": Cell(256, 128, 256, "output tokens/s"),
    "1024/128": Cell(512, 1024, 128, "total tokens/s"),
}
VLLM: dict[tuple[str, str], tuple[str, dict[str, float]]] = {
    ("Llama-3-8B", "bf16"): ("H100", {"single": 6.46, "1024/128": 33729, "128/256": 16781, "b32": 3523}),
    ("Llama-3-8B", "fp8"): ("H100", {"single": 4.33, "1024/128": 48487, "128/256": 22004, "b32": 4987}),
    ("Llama-3-8B", "int4"): ("H100", {"single": 4.08, "1024/128": 31915, "128/256": 17088, "b32": 4697}),
    ("Mixtral-8x7B", "fp8"): ("H100", {"single": 7.80, "1024/128": 20182, "128/256": 8498, "b32": 1470}),
    ("Mixtral-8x7B", "int4"): ("H100", {"single": 5.21}),
    ("Llama-2-70B", "int8"): ("H200", {"single": 21.5, "1024/128": 6906, "128/256": 4858, "b32": 1026}),
}
"""What vLLM 0.26.0 took, and on which GPU."""
KEY = ("model", "scheme", "layers", "cell", "gpu", "commit")


def vllm_value(model: str, scheme: str, layers: int, cell: str, gpu: str) -> float | None:
    """vLLM's figure, where it was taken of the whole model on such a GPU."""
    on, values = VLLM.get((model, scheme), ("", {}))
    whole = find(model).model.layers == layers
    return values.get(cell) if on and on in gpu and whole else None


def row(cell: str, runs: Sequence[Result]) -> Result:
    """A cell's row: the median of its figures, and everything of the run that has it (of two, the slower one)."""
    of = CELLS[cell]
    slower_first = sorted(runs, key=of.value, reverse=of.unit == "ms a token")
    middle = slower_first[(len(runs) - 1) // 2]
    value = statistics.median(of.value(run) for run in runs)
    theirs = vllm_value(middle["model"], middle["scheme"], middle["layers"], cell, middle["gpu"])
    ratio = None
    if theirs:
        ratio = theirs / value if of.unit == "ms a token" else value / theirs
    figures = {"cell": cell, "value": value, "unit": of.unit, "vllm": theirs, "times_vllm": ratio}
    return figures | {"values": [of.value(run) for run in runs]} | middle


def read(path: Path) -> list[Result]:
    """The rows of a file, none where there is no file.

    Raises:
        ValueError: it is not one of rows.
    """
    try:
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        whole = all(name in of for of in rows for name in (*KEY, "value", "unit", "date"))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not a file of the engine's results")
    return rows


def merge(path: Path, rows: Sequence[Result]) -> None:
    """Writes rows into a file of them, in place of those with the same key; an interruption leaves the old file.

    Raises:
        ValueError: see `read`.
    """
    merged = {(*(one[name] for name in KEY), json.dumps(one.get("options"))): one for one in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps({"rows": list(merged.values())}, indent=1) + "\n")
    os.replace(beside, path)


def measure(
    bench: Bench,
    cells: Sequence[str],
    repeats: int,
    left: Callable[[], float],
    done: Callable[[Result], None],
) -> None:
    """Runs cells in their order, again and again, while there is time.

    Args:
        bench: a model of random weights.
        cells: names of them.
        repeats: runs of each at most.
        left: how many seconds there are.
        done: called with a cell's row after each of its runs.
    """
    setup, runs = bench.setup, {cell: list[Result]() for cell in cells}
    assert setup.random_weights is not None
    model = find(setup.random_weights).model.name
    for _ in range(repeats):
        for cell in cells:
            of = CELLS[cell]
            workload = of.workload(model)
            theirs = VLLM.get((model, setup.scheme), ("", {}))[1].get(cell)
            known = statistics.median(of.value(run) for run in runs[cell]) if runs[cell] else theirs
            needed = of.seconds(workload, known) if known else 0.0
            if left() <= needed:
                print(f"{cell}: left out, needs about {needed:.0f} s of {max(left(), 0):.0f}", file=sys.stderr)
                continue
            if not runs[cell]:
                bench.warm_up(workload, min(workload.num_prompts, 16))
            recording = bench.serve(workload, cell)
            described = bench.describe() | workload.describe()
            runs[cell].append(described | bench.results(recording))
            done(row(cell, runs[cell]))


def line(of: Result) -> str:
    """A row for the eye."""
    beside = f", {of['times_vllm']:.2f} times vLLM's {of['vllm']:,g}" if of["vllm"] else ""
    tpot = f"{of['tpot_ms']['median']:.2f}" if of["tpot_ms"] else "-"
    return f"{of['cell']:>9}: {_number(of)} {of['unit']}{beside} (TPOT {tpot} ms, {len(of['values'])} runs)"


def table(rows: Sequence[Result]) -> str:
    """The latest row of each model and cell as a Markdown table: octavo's figure, and how many times vLLM's it is."""
    latest: dict[tuple[str, ...], dict[str, Result]] = {}
    for of in sorted((row for row in rows if row["cell"] in CELLS), key=lambda row: row["date"]):
        cut = "" if of["layers"] == find(of["model"]).model.layers else f", {of['layers']} layers"
        cut += f", {cache} cache" if (cache := of["options"].get("kv_cache_dtype")) else ""
        latest.setdefault((f"{of['model']} {of['scheme']}{cut}", of["gpu"]), {})[of["cell"]] = of
    lines = [f"| model, weights, GPU | {' | '.join(CELLS)} |", "| --- |" + " --- |" * len(CELLS)]
    for (name, gpu), cells in latest.items():
        texts = []
        for cell in CELLS:
            of = cells.get(cell, {})
            times = f" ({of['times_vllm']:.2f}x)" if of and of["times_vllm"] else ""
            texts.append(f"{_number(of)}{times}" if of else "")
        lines.append(f"| {name}, {gpu} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _number(of: Result) -> str:
    return f"{of['value']:.2f}" if of["unit"] == "ms a token" else f"{of['value']:,.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3-8B", help=f"the shape: {', '.join(SERVED)}")
    parser.add_argument("--scheme", default="bf16", choices=SCHEMES)
    parser.add_argument("--layers", type=int, help="so many of them instead of all")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), help="in their order")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, loading included")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cell at most")
    parser.add_argument("--device")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--cache-tokens", type=int)
    parser.add_argument("--options", type=json.loads, default={}, help='more, as JSON: {"kv_cache_dtype": "fp8"}')
    parser.add_argument("--measure-peaks", action="store_true", help="measure the machine's peaks if they are unknown")
    parser.add_argument("--out", type=Path, default=default_folder(), help="where <gpu>/engine.json goes")
    parser.add_argument("--show", action="store_true", help="measure nothing; print the rows of --out as a table")
    args = parser.parse_args(arguments)
    names = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "cache_tokens")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None} | args.options
    try:
        if args.show:
            print(table([row for path in sorted(args.out.glob("*/engine.json")) for row in read(path)]))
            return 0
        if args.repeats < 1:
            raise ValueError(f"repeats: {args.repeats}; expected at least 1")
        setup = Setup(None, args.model, args.scheme, args.layers, args.device, options)
        bench = Bench(setup, measure_peaks=args.measure_peaks)
        print(f"{setup.name}: ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
        path = args.out / folder_name(bench.describe()["gpu"]) / "engine.json"

        def done(of: Result) -> None:
            merge(path, [of])
            print(line(of), flush=True)

        measure(bench, args.cells, args.repeats, lambda: args.budget - (time.perf_counter() - began), done)
    except ValueError as error:
        print(f"engine_table: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
