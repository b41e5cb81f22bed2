"""Results: one CSV file an op and a GPU, in which runs accumulate.

A row's key is all that a time depends on; a row that is written again replaces the one with its key, all others stay.
"""

import csv
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import octavo

ROOT = Path(octavo.__file__).resolve().parent.parent  # the checkout, or the folder that octavo is installed in


@dataclass(frozen=True)
class Row:
    """One line of a results file; the times are None where a provider was skipped or wrong, and `note` says why.

    `octavo_us` is octavo's median beside this provider, in the same process; None where octavo has none there.
    """

    op: str
    provider: str
    shape: str
    dtype: str
    gpu: str
    torch: str
    triton: str
    provider_version: str
    commit: str
    date: str
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    octavo_us: float | None
    flops: int
    bytes: int
    note: str

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as this provider octavo was beside it."""
        return self.median_us / self.octavo_us if self.median_us and self.octavo_us else None

    @property
    def key(self) -> tuple[str, ...]:
        """What a later row must equal to replace this one."""
        return (
            self.op,
            self.provider,
            self.shape,
            self.dtype,
            self.gpu,
            self.torch,
            self.triton,
            self.provider_version,
            self.commit,
        )


COLUMNS = tuple(field.name for field in fields(Row))
_TIMES = ("median_us", "p20_us", "p80_us", "octavo_us")


def folder_name(gpu: str) -> str:
    """The folder of a GPU's results: its name with "_" for what a path should not hold."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in gpu)


def read(path: Path) -> list[Row]:
    """The rows of a results file, none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: columns {reader.fieldnames}; expected {list(COLUMNS)}")
        return [_parse(line) for line in reader]


def _parse(line: dict[str, str]) -> Row:
    times = {name: float(line[name]) if line[name] else None for name in _TIMES}
    counts = {name: int(line[name]) for name in ("flops", "bytes")}
    texts = {name: text for name, text in line.items() if name not in times and name not in counts}
    return Row(**texts, **times, **counts)  # type: ignore[arg-type]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Merges rows into a results file. The file is replaced as a whole, so that an interruption leaves the old one."""
    merged = {row.key: row for row in read(path)}
    merged.update({row.key: row for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    with beside.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in merged.values():
            writer.writerow([_text(value) for value in asdict(row).values()])
    os.replace(beside, path)


def _text(value: str | float | int | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def commit(root: Path = ROOT) -> str:
    """What names the octavo that was measured: the commit, "-dirty" where tracked files differ from it.

    `OCTAVO_COMMIT` from the environment goes before what git says, for a copy of a checkout that git would misjudge.
    Results do not count as a difference: a run writes them. Without git, the version.
    """
    if named := os.environ.get("OCTAVO_COMMIT"):
        return named
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return f"v{octavo.__version__}"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return f"{_git(root, 'rev-parse', '--short=12', 'HEAD')}{'-dirty' if changed else ''}"


def _git(root: Path, *args: str) -> str | None:
    command: Sequence[str] = ("git", "-C", str(root), *args)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def default_folder() -> Path:
    """`bench/results` of a checkout, `octavo-bench` in the working directory for an installed octavo."""
    checkout = (ROOT / "pyproject.toml").exists() and (ROOT / "bench/harness.py").exists()
    return ROOT / "bench/results" if checkout else Path("octavo-bench")
