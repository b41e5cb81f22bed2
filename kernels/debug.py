"""Looking at the values of index tensors, which no op does unless `OCTAVO_DEBUG=1` asks for it.

Ops leave out, on a GPU, what an id or an offset names that is not there; to read such a value on the host would be a
synchronisation at each call. With `OCTAVO_DEBUG=1` in the environment when octavo is imported, the ops of mixtures of
experts have the device look (`torch._assert_async`): a value out of range ends the process's work on that GPU with a
"device-side assert", and what was wrong is printed; on a CPU it raises RuntimeError. It costs some small kernels a call
and no synchronisation, may be captured, and calls are not repeated by `octavo.kernels.replay` then.
"""

import os

import torch

DEBUG = os.environ.get("OCTAVO_DEBUG", "0") not in ("", "0")


def assert_ids(name: str, ids: torch.Tensor, count: int, what: str) -> None:
    """Has the device look whether ids are of `count` of something, or -1 for none, if that was asked for."""
    if DEBUG:
        fine = ((ids >= -1) & (ids < count)).all()
        torch._assert_async(fine, f"{name}: has an id out of range; expected -1 (none) to {count - 1}, {what}")


def assert_offsets(name: str, offsets: torch.Tensor, rows: int) -> None:
    """The same of where groups of rows begin, and the last ends."""
    if DEBUG:
        fine = (offsets >= 0).all() & (offsets <= rows).all() & (offsets[1:] >= offsets[:-1]).all()
        torch._assert_async(fine, f"{name}: expected offsets that rise, from 0 to at most {rows}, the rows of x")
