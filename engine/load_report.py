"""What loading a model took: time, and the most memory that it held."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class LoadReport:
    """Bytes read and seconds taken; `host_peak` is the most resident memory that the process ever had, in bytes.

    `device_peak` is the most that torch had allocated on the GPU while the weights were loaded; None on a CPU, whose
    weights are in the host's memory. All but `num_bytes` are 0 until the model is loaded.
    """

    num_bytes: int
    seconds: float = 0.0
    host_peak: int = 0
    device_peak: int | None = None

    def __str__(self) -> str:
        speed = self.num_bytes / max(self.seconds, 1e-9) / 1e9
        device = "" if self.device_peak is None else f", {self.device_peak / 1e9:.2f} GB of the GPU"
        return (
            f"loaded {self.num_bytes / 1e9:.2f} GB in {self.seconds:.2f} s ({speed:.2f} GB/s), with at most "
            f"{self.host_peak / 1e9:.2f} GB of the host's memory in all{device}"
        )


@contextmanager
def measure_load(device: torch.device, num_bytes: int) -> Iterator[LoadReport]:
    """Fills the report when the block ends, and gives back what loading left in torch's cache of GPU memory."""
    report = LoadReport(num_bytes)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield report
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        report.device_peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
    report.seconds = time.perf_counter() - start
    report.host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
