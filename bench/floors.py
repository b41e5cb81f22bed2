"""What was measured, as the plots read it: the latest rows of each op, the machine's ceilings, and the floor of a row.

The floor is the least time that the machine's own measured limits allow: `max(bytes / bandwidth, flops / peak)`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.bench.harness import parse_label
from octavo.bench.store import Row, read

_LINEARS = {"int4_linear", "int8_linear", "int8_int8_linear", "int4_int8_linear", "fp8_linear"}
_LINEARS |= {"linear", "grouped_linear", "fused_moe"}
READERS = frozenset({"paged_attention", "cascade_attention"} | _LINEARS)
"""Ops that read far more than they write: their roof is the bandwidth of reading, the others' that of copying."""

_PEAKS = {
    "bfloat16": "gemm_bf16_flops_per_s",
    "float16": "gemm_bf16_flops_per_s",
    "float32": "gemm_fp32_flops_per_s",
    "float8_e4m3fn": "gemm_fp8_flops_per_s",
    "int8": "gemm_int8_ops_per_s",
}


@dataclass(frozen=True)
class Ceilings:
    """What `bench/ceilings.py` measured on the machine; empty where it never ran."""

    values: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Ceilings":
        """The ceilings of a results folder; empty without a `ceilings.json`."""
        path = folder / "ceilings.json"
        return cls(json.loads(path.read_text()) if path.exists() else {})

    def bandwidth(self, op: str) -> float | None:
        """Bytes a second that bound `op`."""
        return self.values.get("read_bytes_per_s" if op in READERS else "copy_bytes_per_s")

    def peak(self, dtype: str) -> float | None:
        """The GEMM peak of a dtype, in operations a second."""
        return self.values.get(_PEAKS.get(dtype, ""))

    def node_us(self) -> float | None:
        """GPU time of an empty kernel in a CUDA graph: no launch takes less."""
        return (self.values.get("launch_us") or {}).get("CUDA graph node (GPU time)")

    def floor_us(self, row: Row) -> float | None:
        """The least time that bandwidth and peak allow a row; None where the bandwidth is unknown."""
        bandwidth, peak = self.bandwidth(row.op), self.peak(row.dtype)
        if not bandwidth:
            return None
        return 1e6 * max(row.bytes / bandwidth, row.flops / peak if peak else 0.0)

    def beyond_memory(self, row: Row) -> bool:
        """Whether a time is more than 15 % under what reading the row's bytes from memory takes."""
        bandwidth = self.values.get("read_bytes_per_s")
        return bool(bandwidth and row.median_us and row.median_us * 1.15 < 1e6 * row.bytes / bandwidth)

    def percent_of_floor(self, row: Row) -> float | None:
        """How near a row's median comes to its floor: 100 is the machine's limit."""
        floor = self.floor_us(row)
        return 100 * floor / row.median_us if floor and row.median_us else None


def read_launch_cost(folder: Path) -> dict[str, Any]:
    """What `bench/launch_cost.py` measured; empty where it never ran."""
    path = folder / "launch_cost.json"
    return json.loads(path.read_text()) if path.exists() else {}


def read_rows(folder: Path) -> list[Row]:
    """All rows of a results folder's CSV files.

    Raises:
        ValueError: a file is not one of results; names it.
    """
    rows = []
    for path in sorted(folder.glob("*.csv")):
        try:
            found = read(path)
            for row in found:
                parse_label(row.shape)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of results: {error}") from error
        rows += found
    return rows


def intensity(row: Row) -> float:
    """Floating-point operations a byte."""
    return row.flops / row.bytes


def is_wrong(row: Row) -> bool:
    """Whether the provider ran and gave a wrong result."""
    return row.note.startswith("wrong")


def is_absent(row: Row) -> bool:
    """Whether the provider was not there, or was not asked: nothing is said about its time."""
    return row.median_us is None and row.note.startswith(("not installed", "left out"))


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each (op, provider, shape, dtype), in the order in which the keys first appear.

    A provider that was not there in a later run keeps its earlier row; a failure replaces it.
    """
    newest: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        key = (row.op, row.provider, row.shape, row.dtype)
        newest[key] = max(row, newest.get(key, row), key=lambda r: (not is_absent(r), r.date))
    return list(newest.values())


def runs(rows: Iterable[Row]) -> list[tuple[str, str, str, str]]:
    """The runs that the times of some rows come from: (day, commit, torch, triton), oldest first."""
    return sorted({(row.date[:10], row.commit, row.torch, row.triton) for row in rows if row.median_us is not None})


def providers(rows: Iterable[Row]) -> list[str]:
    """The providers of some rows: octavo, torch, torch.compile, then the peers by name."""
    first = {"octavo": 0, "torch": 1, "torch.compile": 2}

    def order(name: str) -> tuple[int, str]:
        return first.get(name, 2 if name.startswith("torch") else 3), name

    return sorted({row.provider for row in rows}, key=order)
