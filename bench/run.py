"""Measures octavo's ops beside torch and the peers that are there.

    python -m bench.run                                # every op and shape; rows in bench/results/<gpu>/<op>.csv
    python -m bench.run --op rms_norm --shapes T=64    # some
    python -m bench.run --peer-site vllm=path/to/site  # peers that are installed in a folder of their own
    python -m bench.run --base main                    # this checkout against a commit: fails where it is 5 % slower

bench/README.md says what is measured, and how.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from octavo.bench import compare, peers, store
from octavo.bench.children import ChildFailed, Event, follow
from octavo.bench.harness import Benchmark, benchmarks, dtype_name, label, load, parse_label
from octavo.bench.report import View, make_view, result_tables, show
from octavo.bench.worker import Job

DRIFT = 0.03  # how far octavo in a peers' process may be from octavo in its own without a note
BASE_GROUP = "octavo, torch"


@dataclass
class Run:
    """One run over the groups; `rows` is what it has measured."""

    job: Job
    out: Path
    sites: dict[str, list[str]]
    view: View
    rows: list[store.Row] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        self._commit = store.commit()
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self._hello: Event = {}
        self._group = ""
        self._case_rows: list[store.Row] = []
        self._octavo_us: dict[tuple[str, str, str], float] = {}
        self._drift = 1.0

    def go(self) -> None:
        """Measures group after group; what is measured is saved after every case."""
        loaded = [load(name) for name in self.job.ops]
        found = [g for g in peers.groups(loaded) if _selected(loaded, g, self.job.names)]
        present = [g for g in found if g in self.sites or peers.importable(g, loaded)]
        absent = [g for g in found if g not in present]
        jobs: list[tuple[str | None, list[str]]] = [(group, []) for group in present]
        if absent or _selected(loaded, None, self.job.names):
            jobs.insert(0, (None, absent))
        for group, missing in jobs:
            self._group = group or BASE_GROUP
            job = Job(**{**vars(self.job), "group": group, "absent": missing})
            try:
                follow(job, self.sites.get(group or "", []), store.ROOT, self._on_event)
            except ChildFailed as error:
                self.failed = True
                self.view.say(f"{self._group}: {error}")

    def _on_event(self, event: Event) -> None:
        match event["event"]:
            case "hello":
                self._hello = event
            case "plan":
                self.view.plan(self._group, event["cases"])
            case "start":
                self.view.case(f"{event['op']} {event['shape']} {event['dtype']}")
            case "row":
                self._on_row(event)
            case "crash":
                self.failed = True
                self.view.say(f"{event['op']} {event['shape']} {event['dtype']}: {event['note']}\n{event['log']}")
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
        if event["provider"] == "octavo":
            if times:
                self._octavo_us[case] = times["median_us"]
            else:
                self.failed = True
            self._drift = 1.0
        if self._group != BASE_GROUP and times and abs(self._drift - 1) > DRIFT:
            note = "; ".join(filter(None, [note, f"octavo took {self._drift:.2f}x here"]))
        if not times and note != "not installed":
            self.view.say(f"{event['op']} {event['shape']} {event['dtype']}, {event['provider']}: {note}")
        self._case_rows.append(
            store.Row(
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
                flops=event.get("flops", 0),
                bytes=event.get("bytes", 0),
                note=note,
            )
        )

    def _save(self) -> None:
        for op in dict.fromkeys(row.op for row in self._case_rows):
            path = self.out / store.folder_name(self._hello["gpu"]) / f"{op}.csv"
            store.write(path, [row for row in self._case_rows if row.op == op])
        self.rows += self._case_rows
        self._case_rows = []


def _selected(loaded: Sequence[Benchmark], group: str | None, names: Sequence[str]) -> bool:
    return any(
        p.peer == group and (not names or name in names or group in names)
        for benchmark in loaded
        for name, p in benchmark.PROVIDERS.items()
    )


def check_job(job: Job) -> None:
    """ValueError for a selection that is not understood: here, once, and not in every process."""
    loaded = [load(name) for name in job.ops]
    for text in job.shapes:
        if "=" in text:
            parse_label(text)
    known = dict.fromkeys(name for b in loaded for n, p in b.PROVIDERS.items() for name in (n, p.peer) if name)
    for name in job.names:
        if name not in known:
            raise ValueError(f"provider: {name!r}; expected one of {', '.join(known)}")
    for name in job.dtypes:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"dtype: {name!r}; expected the name of a torch dtype, like float16")
    if job.rounds < 1:
        raise ValueError(f"rounds: {job.rounds}; expected at least 1")


def measure(job: Job, out: Path | None = None, sites: dict[str, list[str]] | None = None) -> int:
    """Runs a job over octavo, torch and the peers; shows progress and a table; returns the exit status.

    The status is 1 where octavo was wrong or failed, or a process could not be started: peers may fail.

    Raises:
        ValueError: the job names an op, a provider, a shape or a dtype that does not exist.
    """
    check_job(job)
    view = make_view()
    run = Run(job, out or store.default_folder(), sites or {}, view)
    try:
        run.go()
    finally:
        view.close()
        for table in result_tables(run.rows):
            show(table)
        if run.rows:
            print(f"{len(run.rows)} rows in {run.out}")
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
            check_job(job)
            return compare.against(args.base, job)
        return measure(job, args.out, peers.parse_sites(args.peer_site))
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child too, and prints what there is
    sys.exit(main())
