"""What a run shows: its progress and a table at the end, with rich where it is installed and as plain lines else."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from octavo.bench.store import Row

COMPUTE_BOUND = 100  # floating-point operations a byte from which TFLOP/s say more than TB/s


class Clock:
    """How long the parts of a run took, in the order in which they first came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._since = "", time.monotonic()

    def turn(self, part: str) -> None:
        """From now on the time is `part`'s."""
        now = time.monotonic()
        if self._part:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def text(self) -> str:
        """ "start-up 9 s, rms_norm 31 s" """
        self.turn(self._part)
        return ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.seconds.items())


class View(Protocol):
    """Where a run reports to."""

    def plan(self, what: str, cases: int) -> None: ...
    def case(self, text: str) -> None: ...
    def done(self) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class PlainView:
    """A line a case, on stderr."""

    def __init__(self) -> None:
        self._what, self._cases, self._at = "", 0, 0
        self._start = time.monotonic()

    def plan(self, what: str, cases: int) -> None:
        self._what, self._cases, self._at = what, cases, 0

    def case(self, text: str) -> None:
        seconds = time.monotonic() - self._start
        self.say(f"[{seconds:.0f} s, {self._what} {self._at + 1}/{self._cases}] {text}")

    def done(self) -> None:
        self._at += 1

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class RichView:
    """A progress bar for each group of providers."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[case]}", markup=False),
        )
        self._progress = Progress(*columns, console=Console(stderr=True, highlight=False))
        self._progress.start()
        self._task: Any = None

    def plan(self, what: str, cases: int) -> None:
        self._task = self._progress.add_task(what, total=cases, case="")

    def case(self, text: str) -> None:
        self._progress.update(self._task, case=text)

    def done(self) -> None:
        self._progress.update(self._task, advance=1, case="")

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def close(self) -> None:
        self._progress.stop()


def make_view() -> View:
    """A progress bar on a terminal with rich, else lines."""
    if sys.stderr.isatty():
        try:
            return RichView()
        except ImportError:
            pass
    return PlainView()


@dataclass(frozen=True)
class Table:
    """Text in columns; the first `left` of them are aligned to the left."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 2


def show(table: Table, out: Callable[[str], None] = print) -> None:
    """Prints a table to stdout, with rich on a terminal."""
    if sys.stdout.isatty() and out is print:
        try:
            _show_rich(table)
            return
        except ImportError:
            pass
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    last = len(widths) - 1
    out(table.title)
    for line in lines:
        cells = [
            text if i == last else text.ljust(width) if i < table.left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        out("  " + "  ".join(cells).rstrip())


def _show_rich(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=table.title, title_justify="left")
    last = len(table.columns) - 1
    for i, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if i < table.left or i == last else "right")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(drawn)


def result_tables(rows: Iterable[Row]) -> list[Table]:
    """One table an op: every shape's providers with time, rate, and how much faster octavo is."""
    tables = []
    for (op, gpu), of_op in groupby(sorted(rows, key=lambda r: (r.op, r.gpu)), key=lambda r: (r.op, r.gpu)):
        lines: list[list[str]] = []
        by_case: dict[tuple[str, str], list[Row]] = {}
        for row in of_op:
            by_case.setdefault((row.shape, row.dtype), []).append(row)
        for (shape, dtype), of_case in by_case.items():
            lines += [[f"{shape} {dtype}", *_cells(row)] for row in of_case]
        columns = ("shape", "provider", "µs", "p20", "p80", "rate", "octavo is", "note")
        tables.append(Table(f"{op} on {gpu}", columns, lines))
    return tables


def _cells(row: Row) -> list[str]:
    if row.median_us is None or row.p20_us is None or row.p80_us is None:
        return [row.provider, "", "", "", "", "", row.note]
    times = [f"{t:.2f}" for t in (row.median_us, row.p20_us, row.p80_us)]
    speed_up = "" if row.speed_up is None or row.provider == "octavo" else f"{row.speed_up:.2f}x"
    return [row.provider, *times, _rate(row, row.median_us), speed_up, row.note]


def _rate(row: Row, median_us: float) -> str:
    if row.bytes and row.flops / row.bytes < COMPUTE_BOUND:
        return _scaled(row.bytes / median_us * 1e6, "B/s")
    return _scaled(row.flops / median_us * 1e6, "FLOP/s")


def _scaled(rate: float, unit: str) -> str:
    return f"{rate * 1e-12:.3g} T{unit}" if rate >= 0.1e12 else f"{rate * 1e-9:.3g} G{unit}"
