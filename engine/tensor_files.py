"""Files of tensors, and how their bytes reach a device: in pieces, through little host memory.

safetensors: the header's length (u64), a JSON object, then the data without gaps, all little-endian:

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …, "__metadata__": {…}}

https://huggingface.co/docs/safetensors/index#format. The header is parsed here because the library says neither which
tensor a cut-off file ends in nor gives back the memory that it maps, which makes a second copy of a model that is on a
CPU. torch's pickles are read where they are asked for, and then by `torch.load(weights_only=True)`, which runs no code.
"""

import json
import math
import mmap
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch

PIECE = 64 << 20
"""Bytes that are read at once; a device other than the CPU is fed through two host buffers of this size."""

THREADS = 8
"""That read parts of a piece at a time: one alone copies what the system has in memory slower than a GPU takes it."""

PART = 1 << 20
"""Bytes that are worth a thread."""

MAPPED = 1 << 20
"""Host tensors of so many bytes have pages of their own, which go back to the system when they are freed: malloc keeps
those that lie under other allocations, and a model that is stacked layer by layer leaves a third of itself there."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Reader:
    """Reads parts of files into tensors on a device.

    For a CPU they are read into the tensor itself. On their way to another device they pass through two pinned buffers:
    while one is copied the other is filled. Nothing is mapped, so that no page of a file stays in this process.

    Args:
        device: where the tensors go.
        progress: called with the number of bytes of each piece that was read.
    """

    def __init__(self, device: torch.device, progress: Callable[[int], None] | None = None) -> None:
        self.device = device
        self.progress = progress or (lambda num_bytes: None)
        self._threads = ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))))
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        if device.type != "cpu":
            on_cuda = device.type == "cuda"
            self._buffers = [
                (torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_cuda), torch.cuda.Event() if on_cuda else None)
                for _ in range(2)
            ]

    def read(self, path: Path, start: int, num_bytes: int) -> torch.Tensor:
        """Bytes `start` to `start + num_bytes` of a file, as uint8.

        Raises:
            ValueError: the file ends before.
        """
        out = self._empty(num_bytes)
        with path.open("rb", buffering=0) as file:
            for begin in range(0, num_bytes, PIECE):
                piece = out[begin : begin + PIECE]
                if self._buffers:
                    self._through_buffer(file, start + begin, piece)
                else:
                    self._fill(file, start + begin, piece)
                self.progress(len(piece))
        return out

    def _empty(self, num_bytes: int) -> torch.Tensor:
        if self.device.type != "cpu" or num_bytes < MAPPED:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _through_buffer(self, file: FileIO, start: int, piece: torch.Tensor) -> None:
        buffer, copied = self._buffers[0]
        if copied is not None:
            copied.synchronize()
        self._fill(file, start, buffer[: len(piece)])
        piece.copy_(buffer[: len(piece)], non_blocking=copied is not None)
        if copied is not None:
            copied.record(torch.cuda.current_stream(self.device))
        self._buffers.reverse()

    def _fill(self, file: FileIO, start: int, out: torch.Tensor) -> None:
        view = out.numpy().data
        step = max(-(-len(view) // THREADS), PART)
        parts = [(start + begin, view[begin : begin + step]) for begin in range(0, len(view), step)]
        missing = sum((map if len(parts) == 1 else self._threads.map)(lambda part: _read(file, *part), parts))
        if missing:
            raise ValueError(f"{file.name}: cut off while it was read: {missing} bytes are missing")


def _read(file: FileIO, start: int, out: memoryview) -> int:
    """Reads the bytes from `start` on; returns how many are not there."""
    while out and (count := os.preadv(file.fileno(), [out], start)):
        start, out = start + count, out[count:]
    return len(out)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `start` counts from the file's beginning."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    num_bytes: int


class TensorFile(Protocol):
    """A file whose tensors are known and not yet read."""

    path: Path
    tensors: dict[str, Stored]

    def read(self, name: str, reader: Reader) -> torch.Tensor:
        """One tensor, on the reader's device."""
        ...

    def close(self) -> None:
        """Lets go of what reading holds; the file can be read again."""
        ...


class SafetensorsFile:
    """A safetensors file.

    Raises:
        ValueError: it is cut off or broken, or of a dtype that is not known; names the file and, once the header is
            whole, the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors = _read_header(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def read(self, name: str, reader: Reader) -> torch.Tensor:
        at = self.tensors[name]
        return reader.read(self.path, at.start, at.num_bytes).view(at.dtype).view(at.shape)

    def close(self) -> None:
        pass


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"cut off or broken: its header is not all there, {size} bytes are: fetch it again")
        content = file.read(length)
    try:
        header = json.loads(content)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {
            name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for name, entry in entries.items()
        }
        shapes = {name: tuple(int(length) for length in entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError("cut off or broken: its header is not that of a safetensors file") from None
    tensors, end = {}, 0
    for name in sorted(spans, key=spans.__getitem__):
        start, stop = spans[name]
        if dtypes[name] not in DTYPES:
            raise ValueError(f"{name}: dtype {dtypes[name]}; supported: {', '.join(DTYPES)}")
        dtype = DTYPES[dtypes[name]]
        if start != end or stop - start != math.prod(shapes[name]) * dtype.itemsize or min(shapes[name], default=0) < 0:
            raise ValueError(f"{name}: cut off or broken: bytes {start} to {stop} are not its place, or not its size")
        end = stop
        if 8 + length + end > size:
            raise ValueError(
                f"{name}: cut off or broken: its data ends at byte {8 + length + end}, but the file has {size}: fetch "
                "it again"
            )
        tensors[name] = Stored(shapes[name], dtype, 8 + length + start, stop - start)
    if 8 + length + end != size:
        raise ValueError(f"cut off or broken: the tensors end at byte {8 + length + end}, the file at {size}")
    return tensors


class PickleFile:
    """A file that `torch.save` wrote of a dictionary of tensors; anything else in it is refused, and runs no code.

    Raises:
        ValueError: it is cut off or broken, or holds something else; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, torch.Tensor] | None = None
        self.tensors = {
            name: Stored(tuple(tensor.shape), tensor.dtype, 0, tensor.numel() * tensor.element_size())
            for name, tensor in self._load().items()
        }
        self.close()

    def read(self, name: str, reader: Reader) -> torch.Tensor:
        tensor = self._load()[name].to(reader.device, copy=True, memory_format=torch.contiguous_format)
        reader.progress(self.tensors[name].num_bytes)
        return tensor

    def close(self) -> None:
        self._state = None

    def _load(self) -> dict[str, torch.Tensor]:
        if self._state is None:
            try:
                state = torch.load(self.path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
            except Exception as error:  # what a broken pickle raises depends on where it is broken
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"{self.path}: cut off, broken, or holding more than tensors, which is not loaded ({reason})"
                ) from None
            if not isinstance(state, dict) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
            ):
                raise ValueError(f"{self.path}: expected a dictionary of tensors by name, got {type(state).__name__}")
            self._state = state
        return self._state
