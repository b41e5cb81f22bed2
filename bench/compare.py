"""Two versions of octavo on the same benchmarks: is the newer one slower?

The versions are measured in turns, each time in a new process, by the same (the present) benchmark code. A case is a
regression where the newer one is slower by more than the threshold, in the median over its processes, and the
difference is larger than what processes differ by: the newer one's fastest process is slower than the older one's
slowest.
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
REPEATS = 3  # processes a version

CaseKey = tuple[str, str, str]  # op, shape, dtype


@dataclass(frozen=True)
class Sample:
    """One case in one process; no times where the result was wrong or the call failed."""

    case: CaseKey
    times: Times | None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """One case in both versions: the median time of each process, none where one of them had no time.

    `ratio` is the median of new over that of old, None where one of them has none.
    """

    case: CaseKey
    old: list[float]
    new: list[float]
    ratio: float | None
    regression: bool
    note: str


def compare(old: Iterable[Sample], new: Iterable[Sample], threshold: float = THRESHOLD) -> list[Comparison]:
    """Holds the new samples against the old ones, case by case.

    A case that had a time and has none any more is a regression too; one that had none before is not.
    """
    medians_old, medians_new = _medians(old), _medians(new)
    compared: list[Comparison] = []
    missing: tuple[list[float], str] = [], "not measured"
    for case in dict.fromkeys([*medians_old, *medians_new]):
        a, why_a = medians_old.get(case, missing)
        b, why_b = medians_new.get(case, missing)
        if not a or not b:
            note = "; ".join(f"{side}: {why}" for side, m, why in (("old", a, why_a), ("new", b, why_b)) if not m)
            compared.append(Comparison(case, a, b, None, bool(a), note))
            continue
        ratio = statistics.median(b) / statistics.median(a)
        slower, apart = ratio > 1 + threshold, min(b) > max(a)
        note = "slower" if slower and apart else "within the noise" if slower else ""
        compared.append(Comparison(case, a, b, ratio, slower and apart, note))
    return compared


def _medians(samples: Iterable[Sample]) -> dict[CaseKey, tuple[list[float], str]]:
    """The median of each process; none, and why, where one of them had no time: wrong once is wrong."""
    medians: dict[CaseKey, tuple[list[float], str]] = {}
    failed: dict[CaseKey, str] = {}
    for sample in samples:
        so_far, _ = medians.setdefault(sample.case, ([], ""))
        if sample.times:
            so_far.append(sample.times.median_us)
        else:
            failed.setdefault(sample.case, sample.note)
    return medians | {case: ([], why) for case, why in failed.items()}


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
    compared = compare(old, new, THRESHOLD)
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
    def us(medians: Sequence[float]) -> str:
        return f"{statistics.median(medians):.2f} ({min(medians):.2f} to {max(medians):.2f})" if medians else ""

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
