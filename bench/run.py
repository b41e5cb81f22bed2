"""Measures octavo's ops beside torch and the peers that are there.

    python -m bench.run                                # every op and shape; rows in bench/results/<gpu>/<op>.csv
    python -m bench.run --op rms_norm --shapes T=64    # some
    python -m bench.run --peer-site vllm=path/to/site  # peers that are installed in a folder of their own
    python -m bench.run --base main                    # this checkout against a commit: fails where it is 5 % slower

bench/README.md says what is measured, and how.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from octavo.bench import compare, peers, store
from octavo.bench.children import ChildFailed, Event, follow
from octavo.bench.floors import Ceilings
from octavo.bench.harness import Benchmark, benchmarks, dtype_name, label, load, parse_label
from octavo.bench.report import Clock, View, make_view, result_tables, show
from octavo.bench.worker import Job

DRIFT = 0.03  # how far octavo in a peers' process may be from octavo in its own without a note
BASE_GROUP = "octavo, torch"
CACHED = "faster than memory allows: part of it came from the cache"


@dataclass
class Run:
    """One run over the groups; `rows` is what it has measured.

    `budget` is how many seconds after its beginning no case is begun any more.
    """

    job: Job
    out: Path
    sites: dict[str, list[str]]
    view: View
    budget: float = math.inf
    rows: list[store.Row] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        self._commit = store.commit()
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._hello: Event = {}
        self._ceilings = Ceilings({})
        self._group = ""
        self._clock = Clock()
        self._late: dict[str, Counter[str]] = {}
        self._case_rows: list[store.Row] = []
        self._octavo_us: dict[tuple[str, str, str], float] = {}
        self._drift = 1.0

    def go(self) -> None:
        """Measures group after group; what is measured is saved after every case.

        Each group gets a fair part of the budget, and what earlier ones have left over.
        """
        deadline = time.time() + self.budget
        loaded = [load(name) for name in self.job.ops]
        found = [g for g in peers.groups(loaded) if _selected(loaded, g, self.job.names)]
        present = [g for g in found if g in self.sites or peers.importable(g, loaded)]
        absent = [g for g in found if g not in present]
        jobs: list[tuple[str | None, list[str]]] = [(group, []) for group in present]
        if absent or _selected(loaded, None, self.job.names):
            jobs.insert(0, (None, absent))
        for index, (group, missing) in enumerate(jobs):
            self._group = group or BASE_GROUP
            self._clock = Clock()
            now = time.time()
            part = now + (deadline - now) / (len(jobs) - index)
            job = replace(self.job, group=group, absent=missing, deadline=part)
            try:
                follow(job, self.sites.get(group or "", []), store.ROOT, self._on_event)
            except ChildFailed as error:
                self.failed = True
                self.view.say(f"{self._group}: {error}")
            self.view.say(f"{self._group}: {self._clock.text()}")

    def not_run(self) -> str:
        """The cases that there was no time for, in one line."""
        parts = (f"{g}: " + ", ".join(f"{n} of {op}" for op, n in ops.items()) for g, ops in self._late.items())
        return "; ".join(parts)

    def _on_event(self, event: Event) -> None:
        match event["event"]:
            case "begin":
                self._clock.turn("start-up")
            case "hello":
                self._hello = event
                self._ceilings = Ceilings.read(self._folder())
            case "plan":
                self.view.plan(self._group, event["cases"])
            case "start":
                self._clock.turn(event["op"])
                self._drift = 1.0
                self.view.case(f"{event['op']} {event['shape']} {event['dtype']}")
            case "row":
                self._on_row(event)
            case "crash":
                self.failed = True
                self.view.say(f"{event['op']} {event['shape']} {event['dtype']}: {event['note']}\n{event['log']}")
            case "late":
                self._late[self._group] = Counter(case["op"] for case in event["cases"])
            case "done":
                self.view.done()
        if event["event"] in ("done", "row") and self._case_rows:
            self._save()

    def _on_row(self, event: Event) -> None:
        case = event["op"], event["shape"], event["dtype"]
        times = event["times"] or {}
        if event["anchor"]:
            base = self._octavo_us.get(case)
            self._drift = times["median_us"] / base if base and times else 1.0
            if not times:
                self.view.say(f"octavo beside {self._group}: {event['note']}")
            return
        note = event["note"]
        amiss = not times and not note.startswith(("not installed", "left out"))
        if event["provider"] == "octavo":
            if times:
                self._octavo_us[case] = times["median_us"]
            amiss = not times or "no graph" in note.split("; ")
            self.failed |= amiss
        if self._group != BASE_GROUP and times and abs(self._drift - 1) > DRIFT:
            note = "; ".join(filter(None, [note, f"octavo took {self._drift:.2f}x here"]))
        if amiss:
            self.view.say(f"{event['op']} {event['shape']} {event['dtype']}, {event['provider']}: {note}")
        row = store.Row(
            op=event["op"],
            provider=event["provider"],
            shape=event["shape"],
            dtype=event["dtype"],
            gpu=self._hello["gpu"],
            torch=self._hello["torch"],
            triton=self._hello["triton"],
            provider_version=event["version"],
            commit=self._commit,
            date=self._date,
            median_us=times.get("median_us"),
            p20_us=times.get("p20_us"),
            p80_us=times.get("p80_us"),
            octavo_us=event.get("octavo_us"),
            flops=event.get("flops", 0),
            bytes=event.get("bytes", 0),
            note=note,
        )
        if event.get("touched", 0) > self._hello["cache"] > 0 and self._ceilings.beyond_memory(row):
            row = replace(row, note="; ".join(filter(None, [note, CACHED])))
        self._case_rows.append(row)

    def _folder(self) -> Path:
        return self.out / store.folder_name(self._hello["gpu"])

    def _save(self) -> None:
        for op in dict.fromkeys(row.op for row in self._case_rows):
            store.write(self._folder() / f"{op}.csv", [row for row in self._case_rows if row.op == op])
        self.rows += self._case_rows
        self._case_rows = []


def _selected(loaded: Sequence[Benchmark], group: str | None, names: Sequence[str]) -> bool:
    return any(
        p.peer == group and (not names or name in names or group in names)
        for benchmark in loaded
        for name, p in benchmark.PROVIDERS.items()
    )


def check_job(job: Job, sites: Iterable[str] = ()) -> None:
    """ValueError for a selection or a group's name that is not understood: here, once, and not in every process."""
    loaded = [load(name) for name in job.ops]
    for text in job.shapes:
        if "=" in text:
            parse_label(text)
    known = dict.fromkeys(name for b in loaded for n, p in b.PROVIDERS.items() for name in (n, p.peer) if name)
    for name in job.names:
        if name not in known:
            raise ValueError(f"provider: {name!r}; expected one of {', '.join(known)}")
    groups = peers.groups(load(name) for name in dict.fromkeys([*benchmarks(), *job.ops]))
    for name in sites:
        if name not in groups:
            raise ValueError(f"peer-site: {name!r}; expected one of {', '.join(groups)}")
    for name in job.dtypes:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"dtype: {name!r}; expected the name of a torch dtype, like float16")
    if job.rounds < 1:
        raise ValueError(f"rounds: {job.rounds}; expected at least 1")


def measure(
    job: Job, out: Path | None = None, sites: dict[str, list[str]] | None = None, budget: float = math.inf
) -> int:
    """Runs a job over octavo, torch and the peers; shows progress and a table; returns the exit status.

    The status is 1 where octavo was wrong, failed or could not be captured in a graph, or a process could not be
    started: peers may fail.

    Args:
        sites: the folders that groups of peers are installed in.
        budget: seconds after which no case is begun.

    Raises:
        ValueError: the job names an op, a provider, a shape, a dtype or a group of peers that does not exist.
    """
    check_job(job, sites or ())
    if not budget > 0:
        raise ValueError(f"budget: {budget:g}; expected more than 0 seconds")
    view = make_view()
    run = Run(job, out or store.default_folder(), sites or {}, view, budget)
    try:
        run.go()
    finally:
        view.close()
        for table in result_tables(run.rows):
            show(table)
        if run.rows:
            print(f"{len(run.rows)} rows in {run.out}")
        if left := run.not_run():
            print(f"no time for {left}")
    return 1 if run.failed else 0


def list_benchmarks(names: Sequence[str]) -> None:
    """Prints the ops, their shapes and providers."""
    for name in names:
        benchmark = load(name)
        print(f"{benchmark.OP} ({', '.join(map(dtype_name, benchmark.DTYPES))})")
        print("  providers: " + ", ".join(f"{n} [{p.peer}]" if p.peer else n for n, p in benchmark.PROVIDERS.items()))
        for shape in benchmark.shapes():
            print("  " + label(shape))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    several = partial(add, nargs="+", action="extend", default=[])
    several("--op", metavar="NAME", help="ops, or files like bench_<op>.py; else all")
    several("--provider", metavar="NAME", help="providers or groups of peers")
    several("--shapes", metavar="FILTER", help="T=64, T=64,hidden=4096, or a part of a shape's name")
    several("--dtype", metavar="NAME", help="bfloat16, float16, float32: instead of the benchmark's own")
    several("--peer-site", metavar="NAME=PATH", help="the folders that a group's packages are installed in")
    add("--rounds", type=int, default=20, help="timed rounds a case (20)")
    add("--out", type=Path, metavar="FOLDER", help="where results go (bench/results; ./octavo-bench if installed)")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no case after that time")
    add("--base", metavar="REV|FOLDER", help="compare octavo with that commit, or with the checkout in that folder")
    add("--list", action="store_true", help="print ops, shapes and providers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments().parse_args(arguments)
    names = [os.path.abspath(op) if op.endswith(".py") else op for op in args.op] or benchmarks()
    try:
        if args.list:
            list_benchmarks(names)
            return 0
        job = Job(names, names=args.provider, shapes=args.shapes, dtypes=args.dtype, rounds=args.rounds)
        if args.base:
            if args.budget < math.inf:
                raise ValueError("budget: not for a comparison")
            check_job(job)
            return compare.against(args.base, job)
        return measure(job, args.out, peers.parse_sites(args.peer_site), args.budget)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child too, and prints what there is
    sys.exit(main())
