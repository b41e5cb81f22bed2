"""The child process: measures one group of providers over all selected cases and reports line by line.

    python -m octavo.bench.worker JOB.json EVENTS.jsonl

It reports as it goes, so that a parent knows what was being tried when the process died. Events, one JSON object a
line: `hello` (device and versions), `plan` (number of cases), `start` (a case), `trying` (a provider), `row` (an
outcome), `done` (the case), `late` (cases that there was no time for), `lost` (a provider took the CUDA context with
it), `end`.
"""

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import triton

import octavo
from octavo.bench.harness import Benchmark, Provider, Shape, cases, dtype_name, label, load, providers
from octavo.bench.measure import Lost, Outcome, run_case
from octavo.bench.timing import spin_up

LOST = 3  # the exit status where the CUDA context is gone
ANCHOR = "octavo"


@dataclass
class Job:
    """What a child is to measure.

    Attributes:
        ops: benchmarks, as `harness.load` takes them.
        group: the group of peers; None for octavo and torch.
        names, shapes, dtypes: the selection, empty for all.
        rounds: timed rounds a case.
        absent: groups that are not installed; their providers get a row that says so.
        skip: (op, provider, shape, dtype) that crashed a process before; shape and dtype "" leave out the whole op.
        finished: (op, shape, dtype) that an earlier child has done.
        deadline: the time (`time.time()`) after which no case is begun.
    """

    ops: list[str]
    group: str | None = None
    names: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    rounds: int = 20
    absent: list[str] = field(default_factory=list)
    skip: list[tuple[str, str, str, str]] = field(default_factory=list)
    finished: list[tuple[str, str, str]] = field(default_factory=list)
    deadline: float = math.inf

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        values = json.loads(text)
        values["skip"] = [tuple(s) for s in values["skip"]]
        values["finished"] = [tuple(s) for s in values["finished"]]
        return cls(**values)


@dataclass(frozen=True)
class Case:
    """An op, a shape and a dtype, and who is measured there."""

    benchmark: Benchmark
    shape: Shape
    dtype: torch.dtype
    chosen: dict[str, Provider]
    absent: dict[str, Provider]

    @property
    def name(self) -> dict[str, str]:
        return {"op": self.benchmark.OP, "shape": label(self.shape), "dtype": dtype_name(self.dtype)}


class _Reporter:
    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __call__(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()


def device_and_versions() -> tuple[torch.device, dict[str, Any]]:
    """Where to measure, what a row says about the machine, and how large its last cache is (0 for a CPU's)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, cache = "cpu", 0
    if device.type == "cuda":
        gpu, cache = torch.cuda.get_device_name(), torch.cuda.get_device_properties(device).L2_cache_size
        major, minor = torch.cuda.get_device_capability()
        # FlashInfer compiles for what this names; the architecture-specific features begin with Hopper.
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")
    return device, {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "cache": cache}


def is_anchored(job: Job) -> bool:
    """Whether octavo is timed beside the providers that are asked for without being one of them."""
    return job.group is not None or (bool(job.names) and ANCHOR not in job.names)


def work(job: Job, report: _Reporter) -> None:
    """Measures everything that a job names."""
    device, versions = device_and_versions()
    report("hello", octavo=octavo.__file__, **versions)
    plan = _plan(job, device)
    report("plan", cases=len(plan))
    spin_up(device)
    for index, case in enumerate(in_time(plan, job.deadline, lambda late: report("late", cases=late))):
        _measure(job, report, device, case)
        _clean_up(device)
        if index == 0:
            gc.freeze()  # what importing has left is many times what a case leaves: later collections pass over it
    report("end")


def _plan(job: Job, device: torch.device) -> list[Case]:
    plan = []
    for name in job.ops:
        benchmark = load(name)
        chosen = providers(benchmark, device, job.group, job.names)
        absent = {n: p for g in job.absent for n, p in providers(benchmark, device, g, job.names).items()}
        if chosen or absent:
            plan += [
                Case(benchmark, shape, dtype, chosen, absent)
                for shape, dtype in cases(benchmark, device, job.shapes, job.dtypes)
                if (benchmark.OP, label(shape), dtype_name(dtype)) not in job.finished
            ]
    return plan


def in_time(plan: Sequence[Case], deadline: float, on_late: Callable[[list[dict[str, str]]], None]) -> Iterator[Case]:
    """The cases that can begin before the deadline, in their order; the others are told to `on_late`.

    Each op gets a fair part of the time. What the later ones leave over goes to the cases that were passed over.
    """
    ops, late = list(dict.fromkeys(case.benchmark.OP for case in plan)), []
    for index, op in enumerate(ops):
        now = time.time()
        end = now + (deadline - now) / (len(ops) - index)
        for case in (c for c in plan if op == c.benchmark.OP):
            if time.time() < end:
                yield case
            else:
                late.append(case)
    while late and time.time() < deadline:
        yield late.pop(0)
    if late:
        on_late([case.name for case in late])


def _measure(job: Job, report: _Reporter, device: torch.device, case: Case) -> None:
    benchmark, shape, dtype = case.benchmark, case.shape, case.dtype
    counts = {"flops": benchmark.flops(shape), "bytes": benchmark.bytes_moved(shape, dtype)}
    report("start", **case.name, **counts)
    crashed_here = {p for op, p, *where in job.skip if (op, *where) == tuple(case.name.values())}
    crashed = crashed_here | {p for op, p, *where in job.skip if (op, *where) == (benchmark.OP, "", "")}
    outcomes = [Outcome(name, "", None, ["not installed"]) for name in case.absent]
    outcomes += [
        Outcome(n, "", None, ["left out: it crashed before"]) for n in case.chosen if n in crashed - crashed_here
    ]
    chosen = {name: provider for name, provider in case.chosen.items() if name not in crashed}
    anchor = is_anchored(job) and ANCHOR in benchmark.PROVIDERS and bool(chosen) and ANCHOR not in crashed
    if anchor:
        chosen = {ANCHOR: benchmark.PROVIDERS[ANCHOR], **chosen}
    if chosen:
        outcomes += run_case(
            benchmark, shape, dtype, device, chosen, job.rounds, lambda n: report("trying", provider=n)
        )
    octavo_us = next((o.times.median_us for o in outcomes if o.provider == ANCHOR and o.times), None)
    for outcome in outcomes:
        report(
            "row",
            **case.name,
            **counts,
            provider=outcome.provider,
            version=outcome.version,
            times=asdict(outcome.times) if outcome.times else None,
            octavo_us=octavo_us if outcome.times else None,
            touched=outcome.touched,
            note="; ".join(outcome.notes),
            anchor=anchor and outcome.provider == ANCHOR,
        )
    report("done", **case.name)


def _clean_up(device: torch.device) -> None:
    """Drops what a case held, and torch.compile's memory of it: the next shape is compiled for itself.

    GPU memory goes back to the driver, which takes long, where little is left to take from it.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if torch.cuda.memory_reserved(device) > total // 2 or free < total // 4:
            torch.cuda.empty_cache()


def main() -> None:
    job_path, events_path = map(Path, sys.argv[1:3])
    with events_path.open("w") as file:
        report = _Reporter(file)
        try:
            work(Job.from_json(job_path.read_text()), report)
        except Lost as lost:
            report("lost", provider=lost.provider, note=lost.note)
            os._exit(LOST)  # what would clean up after itself on the GPU can only fail


if __name__ == "__main__":
    main()
