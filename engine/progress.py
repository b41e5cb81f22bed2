"""How far loading and generation are."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_progress(texts: int, shown: bool | None) -> Iterator[Callable[[int, int, int], None]]:
    """Yields a function of (texts done, tokens of prompts read, tokens made), all that there are by now.

    Args:
        texts: that prompts are continued to, in all.
        shown: whether to draw at all; None for where stderr is a terminal.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield lambda done, read, made: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = time.monotonic()
    columns = (TextColumn("texts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    speed = TextColumn("{task.fields[read]:.0f} tokens/s in, {task.fields[made]:.0f} out")
    with Progress(*columns, speed, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=texts, read=0.0, made=0.0)

        def update(done: int, read: int, made: int) -> None:
            seconds = max(time.monotonic() - start, 1e-6)
            bar.update(task, completed=done, read=read / seconds, made=made / seconds)

        yield update


def running_total(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    """A function of the bytes of each piece that tells `progress` those of all so far, and of all in all."""
    if progress is None:
        return None
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(min(done, total), total)

    return advance
