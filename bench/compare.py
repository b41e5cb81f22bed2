"""Two versions of octavo on the same benchmarks: is the newer one slower?

The versions are measured in turns, each time in a new process, by the same (the present) benchmark code. A case is a
regression where the newer one's median is slower by more than the threshold and the difference is larger than the
noise: the newer one's 20th percentile lies above the older one's 80th. Of several processes, the median of each figure
counts.
"""

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from octavo.bench import store
from octavo.bench.children import ChildFailed, Event, follow
from octavo.bench.report import Table, View, make_view, show
from octavo.bench.timing import Times
from octavo.bench.worker import ANCHOR, Job

THRESHOLD = 0.05
REPEATS = 2  # processes a version

CaseKey = tuple[str, str, str]  # op, shape, dtype


@dataclass(frozen=True)
class Sample:
    """One case in one process; no times where the result was wrong or the call failed."""

    case: CaseKey
    times: Times | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """One case in both versions. `ratio` is new over old, None where one of them has no time."""

    case: CaseKey
    old: Times | None
    new: Times | None
    ratio: float | None
    regression: bool
    note: str


def compare(old: Iterable[Sample], new: Iterable[Sample], threshold: float = THRESHOLD) -> list[Comparison]:
    """Holds the new samples against the old ones, case by case.

    A case that had a time and has none any more is a regression too; one that had none before is not.
    """
    pooled_old, pooled_new = _pool(old), _pool(new)
    compared, missing = [], (None, "not measured")
    for case in dict.fromkeys([*pooled_old, *pooled_new]):
        a, why_a = pooled_old.get(case, missing)
        b, why_b = pooled_new.get(case, missing)
        if a is None or b is None:
            note = "; ".join(f"{side}: {why}" for side, t, why in (("old", a, why_a), ("new", b, why_b)) if t is None)
            compared.append(Comparison(case, a, b, None, a is not None, note))
            continue
        ratio = b.median_us / a.median_us
        slower, apart = ratio > 1 + threshold, b.p20_us > a.p80_us
        note = "slower" if slower and apart else "within the noise" if slower else ""
        compared.append(Comparison(case, a, b, ratio, slower and apart, note))
    return compared


def _pool(samples: Iterable[Sample]) -> dict[CaseKey, tuple[Times | None, str]]:
    by_case: dict[CaseKey, list[Sample]] = {}
    for sample in samples:
        by_case.setdefault(sample.case, []).append(sample)
    pooled: dict[CaseKey, tuple[Times | None, str]] = {}
    for case, of_case in by_case.items():
        times = [s.times for s in of_case if s.times]
        if len(times) < len(of_case):  # wrong or failed once is wrong
            pooled[case] = None, next(s.note for s in of_case if not s.times)
        else:
            columns = zip(*((t.median_us, t.p20_us, t.p80_us) for t in times), strict=True)
            pooled[case] = Times(*map(statistics.median, columns)), ""
    return pooled


def against(base: str, job: Job) -> int:
    """Measures octavo at `base` (a commit or a folder) and as it is now; prints the ratios; 1 where one is slower.

    Raises:
        ValueError: `base` is neither a folder with octavo nor a commit.
    """
    with _tree(base) as old_tree:
        view = make_view()
        try:
            old, new = measure_trees(old_tree, store.ROOT, job, view)
        except ChildFailed as error:
            view.say(str(error))
            return 1
        finally:
            view.close()
    compared = compare(old, new)
    show(_table(base, compared))
    slower = sum(c.regression for c in compared)
    print(f"{slower} of {len(compared)} cases slower by more than {THRESHOLD:.0%}, or without a time")
    return 1 if slower or not compared else 0


def measure_trees(old: Path, new: Path, job: Job, view: View) -> tuple[list[Sample], list[Sample]]:
    """Samples of octavo from two trees, measured in alternating processes."""
    job = replace(job, names=[ANCHOR], group=None, absent=[])
    samples: dict[str, list[Sample]] = {"old": [], "new": []}
    for _ in range(REPEATS):
        for name, tree in (("old", old), ("new", new)):
            follow(job, [], tree, partial(_collect, samples[name], name, tree, view))
    return samples["old"], samples["new"]


def _collect(samples: list[Sample], name: str, tree: Path, view: View, event: Event) -> None:
    match event["event"]:
        case "hello":
            found = Path(event["octavo"]).parent.parent
            if found != tree:
                raise ChildFailed(f"the process imported octavo from {found}, not from {tree}")
        case "plan":
            view.plan(name, event["cases"])
        case "start":
            view.case(f"{event['op']} {event['shape']} {event['dtype']}")
        case "row":
            times = Times(**event["times"]) if event["times"] else None
            samples.append(Sample((event["op"], event["shape"], event["dtype"]), times, event["note"]))
        case "done":
            view.done()


def _table(base: str, compared: Sequence[Comparison]) -> Table:
    def us(times: Times | None) -> str:
        return f"{times.median_us:.2f} ({times.p20_us:.2f} to {times.p80_us:.2f})" if times else ""

    rows = [
        [c.case[0], " ".join(c.case[1:]), us(c.old), us(c.new), "" if c.ratio is None else f"{c.ratio:.3f}", c.note]
        for c in compared
    ]
    return Table(f"octavo now against {base}", ("op", "shape", f"{base}, µs", "now, µs", "ratio", "note"), rows)


@contextmanager
def _tree(base: str) -> Iterator[Path]:
    """A folder to import octavo at `base` from, with the present benchmark code in place of its own.

    It holds links alone, so a folder of the user's is never changed. A commit is checked out into a worktree for it.
    """
    with tempfile.TemporaryDirectory(prefix="octavo-base-") as temporary:
        folder = Path(temporary).resolve()
        if Path(base).is_dir():
            yield shadow(Path(base).resolve(), folder / "links")
            return
        worktree = folder / "checkout"
        done = _git("worktree", "add", "--detach", str(worktree), base)
        if done.returncode:
            raise ValueError(f"base: {base!r} is neither a folder nor a commit: {done.stderr.strip()}")
        try:
            yield shadow(worktree, folder / "links")
        finally:
            shutil.rmtree(worktree, ignore_errors=True)
            _git("worktree", "prune")


def _git(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(store.ROOT), *args], capture_output=True, text=True, check=False)


def shadow(source: Path, target: Path) -> Path:
    """A folder of links to `source`'s octavo, with `octavo/bench` pointing here.

    Raises:
        ValueError: `source` holds no octavo.
    """
    if not (source / "octavo/__init__.py").exists():
        raise ValueError(f"base: {source} holds no octavo/__init__.py")
    (target / "octavo").mkdir(parents=True)
    for entry in (source / "octavo").iterdir():
        if entry.name not in ("bench", "__pycache__"):
            (target / "octavo" / entry.name).symlink_to(entry)
    (target / "octavo/bench").symlink_to(Path(__file__).resolve().parent)
    return target
