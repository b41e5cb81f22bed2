"""What `octavo bench throughput`, `latency` and `sweep` do: open a model, warm it up, serve requests, say how it went.

The engine is warm before anything is timed: its kernels are compiled, and some requests of the same lengths have been
served. All prompts are drawn anew for each run, so that a prefix cache has nothing but what `--prefix-len` makes alike.
Results are dictionaries of what JSON holds.
"""

import contextlib
import datetime
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import triton

from octavo.bench import ceilings
from octavo.bench.floors import Ceilings
from octavo.bench.model_costs import Costs, costs_of
from octavo.bench.random_model import find, random_checkpoint, random_decoder
from octavo.bench.serving import Recording, serve
from octavo.bench.serving_metrics import Timeline, reading_seconds_per_token, spread, summarize
from octavo.bench.store import commit, default_folder, folder_name
from octavo.bench.workload import Request, Workload
from octavo.engine.devices import choose_device
from octavo.engine.llm import LLM
from octavo.engine.load_report import measure_load

Result = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much of it is done, and how much it is in all."""
WARMUP_TOKENS = 16


@dataclass(frozen=True)
class Setup:
    """Which model, and how the engine is to serve it.

    `model` is what `LLM` takes, or `random_weights` names a shape that is filled in `scheme`, with `layers` layers of
    it. `options` go to `LLM` as they are.
    """

    model: str | None = None
    random_weights: str | None = None
    scheme: str = "bf16"
    layers: int | None = None
    device: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.random_weights is None):
            raise ValueError("model, random_weights: give one of them, a model or a shape for random weights")
        if self.random_weights is not None:
            random_checkpoint(self.random_weights, self.scheme, self.layers)  # what is wrong is found here
        elif self.scheme != "bf16" or self.layers is not None:
            raise ValueError("scheme, layers: are for random weights; a model has its own")

    @property
    def name(self) -> str:
        if self.random_weights is None:
            return str(self.model)
        cut = "" if self.layers is None else f" {self.layers} layers"
        return f"{find(self.random_weights).model.name} {self.scheme}{cut}"

    @property
    def file_name(self) -> str:
        """The name as a part of a file's."""
        return folder_name(Path(self.name).name).lower()


class Bench:
    """An engine that is ready to be measured, and what must be known of it to judge the figures."""

    def __init__(self, setup: Setup, *, measure_peaks: bool = False, progress: Progress | None = None) -> None:
        self.setup, self.progress = setup, progress or (lambda what, done, total: None)
        self.device = choose_device(setup.device)
        self.ceilings = find_ceilings(self.device, measure_peaks)
        start = time.perf_counter()
        self.llm = self._open()
        self.start_seconds = time.perf_counter() - start
        blocks = self.llm.blocks
        self.cache_bytes = self.llm.runner.cache.nbytes
        self.costs: Costs = costs_of(self.llm.model, self.cache_bytes // (blocks.num_pages * blocks.page_size))
        self._runs = count()

    def _open(self) -> LLM:
        s = self.setup
        if s.random_weights is None:

            def read(done: int, total: int) -> None:
                self.progress("loading", done, total)

            return LLM(str(s.model), device=self.device, progress=read, **s.options)
        total, done = random_checkpoint(s.random_weights, s.scheme, s.layers).num_bytes, 0
        if self.device.type == "cuda" and total > (free := torch.cuda.mem_get_info(self.device)[0]):
            raise ValueError(
                f"random weights: {s.name} has {total / 1e9:.0f} GB, but of the GPU's memory {free / 1e9:.0f} GB are "
                "free: choose another scheme, or fewer layers"
            )

        def made(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self.progress("drawing weights", done, total)

        with measure_load(self.device, total):
            model = random_decoder(
                s.random_weights,
                s.scheme,
                self.device,
                layers=s.layers,
                max_model_len=s.options.get("max_model_len"),
                progress=made,
            )
        llm = LLM.from_decoder(model, **s.options)
        if self.device.type == "cuda":
            llm.warmup(lambda done, total: self.progress("preparing kernels", done, total))
        return llm

    def serve(self, workload: Workload, what: str, concurrency: int | None = None) -> Recording:
        """Serves one run of a workload.

        Raises:
            ValueError: a request that does not fit into the context.
        """
        requests = workload.requests(next(self._runs), self.llm.config.vocab_size)
        self._check(requests)
        total, done = sum(request.output for request in requests), 0

        def came(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.progress(what, done, total)

        return serve(self.llm.core, requests, concurrency=concurrency, progress=came)

    def _check(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if len(request.prompt) + request.output > self.llm.max_model_len:
                raise ValueError(
                    f"lengths: a prompt of {len(request.prompt)} tokens and {request.output} more, but the context "
                    f"holds {self.llm.max_model_len}"
                )

    def warm_up(self, workload: Workload, num_prompts: int) -> None:
        """Serves so many requests of a workload's prompts, all at once, for a few tokens each."""
        self._check(workload.requests(0, self.llm.config.vocab_size))
        if num_prompts:
            self.serve(workload.of(num_prompts).shortened(WARMUP_TOKENS), "warming up")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def describe(self) -> Result:
        """What was measured, on what."""
        random = self.setup.random_weights
        return {
            "model": self.setup.model if random is None else find(random).model.name,
            "weights": "the model's" if random is None else "random",
            "scheme": None if random is None else self.setup.scheme,
            "layers": self.llm.config.num_hidden_layers,
            **describe_machine(self.device),
            "options": self.setup.options,
            "start_seconds": self.start_seconds,
        }

    def results(self, recording: Recording) -> Result:
        """Every figure of a run."""
        found = summarize(recording.timelines)
        found["steps"] = len(recording.step_tokens)
        return found | self.utilisation(recording, found["seconds"]) | self.memory()

    def utilisation(self, recording: Recording, seconds: float) -> Result:
        """How much of the machine's measured peaks was used; None, and which is missing, where one is unknown."""
        peak, bandwidth = self.ceilings.peak(self.costs.dtype), self.ceilings.values.get("read_bytes_per_s")
        flops = self.costs.flops(recording.loads) / seconds
        moved = self.costs.bytes_moved(recording.loads, recording.step_tokens) / seconds
        unknown = {f"GEMM peak in {self.costs.dtype}": peak, "bandwidth of reading": bandwidth}
        missing = [name for name, value in unknown.items() if not value]
        advice = (
            "" if not missing else f"unknown: {', '.join(missing)}; run python -m bench.ceilings, or --measure-peaks"
        )
        return {
            "model_flops_per_s": flops,
            "model_bytes_per_s": moved,
            "mfu": flops / peak if peak else None,
            "bandwidth_utilisation": moved / bandwidth if bandwidth else None,
            "peaks": {"dtype": self.costs.dtype, "flops_per_s": peak, "bytes_per_s": bandwidth, "note": advice},
        }

    def memory(self) -> Result:
        """Bytes of weights and cache, and the most that was taken since the warm-up."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "weight_bytes": self.costs.weight_bytes + self.costs.expert_bytes,
            "cache_bytes": self.cache_bytes,
            "peak_memory_bytes": peak,
        }


def describe_machine(device: torch.device) -> Result:
    """What measures now, on what."""
    return {
        "gpu": gpu_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def results_folder(device: torch.device) -> Path:
    """Where a machine's results lie."""
    return default_folder() / folder_name(gpu_name(device))


def find_ceilings(device: torch.device, measure: bool = False) -> Ceilings:
    """The machine's peaks as `bench.ceilings` has found them; `measure` does that now where it never did."""
    folder = results_folder(device)
    found = Ceilings.read(folder)
    if found.values or not measure:
        return found
    with contextlib.redirect_stdout(sys.stderr):
        ceilings.main(["--out", str(folder.parent), "--rounds", "5"])
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Ceilings.read(folder)


def throughput(bench: Bench, workload: Workload, warmup: int = 16) -> Result:
    """Serves a workload once; see `octavo bench throughput`."""
    bench.warm_up(workload, min(warmup, workload.num_prompts))
    recording = bench.serve(workload, "serving")
    return bench.describe() | workload.describe() | bench.results(recording)


def latency(bench: Bench, workload: Workload, iterations: int = 5, warmup: int = 2) -> Result:
    """Serves a batch many times, each time with other prompts; figures are over all of them.

    `batch_ms` is the time of a batch, from its arrival to its last token.
    """
    if iterations < 1:
        raise ValueError(f"iterations: {iterations}; expected at least 1")
    for _ in range(warmup):
        bench.warm_up(workload, workload.num_prompts)
    recordings = [bench.serve(workload, f"batch {i + 1} of {iterations}") for i in range(iterations)]
    times = [summarize(recording.timelines)["seconds"] for recording in recordings]
    whole = _joined(recordings, times)
    found = bench.results(whole) | {"iterations": iterations, "batch_ms": spread(times)}
    return bench.describe() | workload.describe() | found


def _joined(recordings: Sequence[Recording], seconds: Sequence[float]) -> Recording:
    """Runs one after another as one run."""
    timelines: list[Timeline] = []
    steps: list[int] = []
    start = 0.0
    for recording, took in zip(recordings, seconds, strict=True):
        for t in recording.timelines:
            later = tuple(time + start for time in t.token_times)
            timelines.append(replace(t, arrival=t.arrival + start, token_times=later))
        steps += recording.step_tokens
        start += took
    return Recording(tuple(timelines), tuple(steps))


def sweep(
    bench: Bench,
    workload: Workload,
    batch_sizes: Sequence[int],
    rounds: int = 1,
    done: Callable[[Result], None] = lambda row: None,
) -> Result:
    """Serves batches of many sizes: of each size `rounds` times as many requests, no more than the size at once.

    Args:
        bench, workload: what to serve; `num_prompts` and `request_rate` do not matter.
        batch_sizes: how many requests are with the engine at once.
        rounds: requests a place in the batch.
        done: called with the figures of each size.

    Raises:
        ValueError: a size or a number of rounds below 1, outputs of one token, or a size that the engine does not take
            at once.
    """
    for name, value in (("batch_sizes", min(batch_sizes, default=0)), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}: {value}; expected at least 1")
    if workload.lengths.kind != "file" and workload.lengths.output_len < 2:
        raise ValueError(f"output_len: {workload.lengths.output_len}; expected at least 2, for a time per token")
    most = bench.llm.scheduler.max_num_seqs
    if max(batch_sizes) > most:
        raise ValueError(f"batch_sizes: {max(batch_sizes)}; the engine takes {most} at once: raise max_num_seqs")
    bench.warm_up(workload, max(batch_sizes))
    rows = []
    for size in batch_sizes:
        recording = bench.serve(workload.of(size * rounds), f"batch of {size}", concurrency=size)
        found = bench.results(recording)
        context = sum(load.prompt + load.output / 2 for load in recording.loads) / len(recording.loads)
        floor = bench.costs.decode_seconds(size, context, bench.ceilings)
        row = {"batch_size": size, "floor_tpot_ms": floor and floor * 1e3} | found
        rows.append(row)
        done(row)
    b_star = bench.costs.critical_batch(bench.ceilings)
    return (
        bench.describe()
        | workload.describe()
        | {
            "rounds": rounds,
            "b_star": b_star,
            "reading_tpot_ms": reading_seconds_per_token() * 1e3,
            "rows": rows,
        }
    )
