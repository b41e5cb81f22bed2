"""The parent's side of `octavo.bench.worker`: starts it, follows its events, and survives its death."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.bench.peers import environment
from octavo.bench.worker import ANCHOR, LOST, Job, is_anchored

Event = dict[str, Any]
MAX_CRASHES = 2  # of one provider; then it is left out of the op

_POLL_S = 0.05


class ChildFailed(RuntimeError):
    """A child died before it measured anything (an import that fails, say); the text ends with its last output."""


def follow(job: Job, folders: Sequence[str], tree: Path, on_event: Callable[[Event], None]) -> None:
    """Runs a job to its end, in as many processes as it takes.

    Where a process dies, the provider that it was trying gets a row with a note, and another process goes on with the
    cases that are left: with the same case without that provider first.

    Args:
        folders: the site of the job's group.
        tree: the folder that holds the package `octavo` to measure.
        on_event: told each event, the row of a provider that crashed, and `begin` ahead of each process.
    """
    while True:
        on_event({"event": "begin"})
        crash = _one_process(job, folders, tree, on_event)
        if crash is None:
            return
        case = crash["op"], crash["shape"], crash["dtype"]
        if not crash["provider"]:  # the inputs or the exact result: nothing would be left of this case
            job = replace(job, finished=[*job.finished, *crash["finished"], case])
            on_event({**crash, "event": "crash"})
            continue
        anchor = is_anchored(job) and crash["provider"] == ANCHOR
        on_event({**crash, "event": "row", "version": "", "times": None, "anchor": anchor})
        skip = [(crash["op"], crash["provider"], *case[1:])]
        if sum(entry[:2] == skip[0][:2] for entry in job.skip) + 1 >= MAX_CRASHES:
            skip.append((*skip[0][:2], "", ""))
        job = replace(job, finished=[*job.finished, *crash["finished"]], skip=[*job.skip, *skip])


def _one_process(job: Job, folders: Sequence[str], tree: Path, on_event: Callable[[Event], None]) -> Event | None:
    """Runs one child; None where it came to its end, else the case and provider it died at, and what it finished."""
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as temporary:
        folder = Path(temporary)
        (folder / "job.json").write_text(job.to_json())
        at: Event = {"op": "", "shape": "", "dtype": "", "provider": "", "note": ""}
        finished: list[tuple[str, str, str]] = []
        ended = False
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-P", "-m", "octavo.bench.worker", str(folder / "job.json")]
            process = subprocess.Popen(
                [*command, str(folder / "events")],
                env=environment(job.group, folders, tree),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            for event in _events(process, folder / "events"):
                match event["event"]:
                    case "start":
                        at = {**event, "provider": "", "note": ""}
                    case "trying" | "lost":
                        at |= event
                    case "done":
                        finished.append((event["op"], event["shape"], event["dtype"]))
                    case "end":
                        ended = True
                if event["event"] not in ("trying", "lost"):
                    on_event(event)
        finally:
            _stop(process)
        if ended:
            return None
        if not at["op"] or (at["op"], at["shape"], at["dtype"]) in finished:
            raise ChildFailed(f"{_death(process.returncode)}:\n{_tail(folder / 'log')}")
        note = f"the process died: {at['note'] or _death(process.returncode)}"
        return {**at, "note": note, "finished": finished, "log": _tail(folder / "log")}


def _events(process: subprocess.Popen[bytes], path: Path) -> Iterator[Event]:
    """The events of a child until it has ended. A file, not a pipe: a pipe stays open with the child's own children."""
    offset, rest = 0, ""
    while True:
        alive = process.poll() is None
        if path.exists():
            with path.open() as file:
                file.seek(offset)
                text = file.read()
                offset = file.tell()
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                yield json.loads(line)
        if not alive:
            return
        time.sleep(_POLL_S)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    if process.poll() is None:
        process.kill()
        process.wait()


def _death(status: int) -> str:
    if status < 0:
        with suppress(ValueError):
            return signal.Signals(-status).name
    return "the CUDA context was lost" if status == LOST else f"exit status {status}"


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
