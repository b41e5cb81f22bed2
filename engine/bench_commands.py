"""`octavo bench throughput`, `latency` and `sweep`: options, progress, and results in JSON on stdout or in a file.

`octavo.bench` is imported when a command runs, not before.
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from octavo.bench.engine_bench import Bench, Setup
    from octavo.bench.workload import Workload

Scheme = StrEnum("Scheme", {"bf16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "int4"})
_REFRESH_SECONDS = 1.0  # drawing takes time from the engine, which runs in the same process

console = Console(stderr=True, highlight=False)


def _setup(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A folder, a .gguf file, a Hugging Face id, or smollm2.")
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(metavar="SHAPE", help="Instead of a model: Llama-3-8B, Mixtral-8x7B, …, made on the device."),
    ] = None,
    scheme: Annotated[
        Scheme, typer.Option(help="Of random weights; with fp8 and int8 inputs have 8 bits too.")
    ] = Scheme.bf16,
    layers: Annotated[int | None, typer.Option(help="Of random weights: so many layers instead of all.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:<index>; by default the GPU where there is one.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests in a step at most.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens in a step at most.")] = 8192,
    max_model_len: Annotated[int | None, typer.Option(help="The longest context; by default the model's.")] = None,
    cache_tokens: Annotated[int | None, typer.Option(help="Tokens the cache holds; by default what fits.")] = None,
    page_size: Annotated[int, typer.Option(help="Tokens a page of the cache.")] = 16,
    prefix_caching: Annotated[bool, typer.Option(help="Keep what prompts begin with for later ones.")] = True,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="fp8, fp8_e5m2 or int8; by default the model's.")] = None,
    enforce_eager: Annotated[bool, typer.Option(help="Without CUDA graphs.")] = False,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Of the GPU's memory, for everything.")] = 0.9,
) -> "Setup":
    from octavo.bench.engine_bench import Setup

    options: dict[str, Any] = dict(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        cache_tokens=cache_tokens,
        page_size=page_size,
        enable_prefix_caching=prefix_caching,
        kv_cache_dtype=kv_cache_dtype,
        enforce_eager=enforce_eager,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    given = {name: value for name, value in options.items() if value is not None}
    return Setup(model, random_weights, scheme.value, layers, device, given)


def _workload(
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    output_len: Annotated[int, typer.Option(help="Tokens to generate, whatever they are.")] = 128,
    lengths: Annotated[
        str,
        typer.Option(
            help="fixed; uniform:0.5 or normal:0.25 around these lengths; or a file: a request's two lengths a line."
        ),
    ] = "fixed",
    prefix_len: Annotated[
        int, typer.Option(help="Tokens in front of every prompt that are the same in all of a run.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts and arrivals.")] = 0,
) -> "Workload":
    from octavo.bench.workload import Lengths, Workload

    return Workload(Lengths.parse(lengths, input_len, output_len), prefix_len=prefix_len, seed=seed)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command of a `setup` and a `workload` the options that these are made of, before its own."""
    makers: dict[str, Callable[..., Any]] = {"setup": _setup, "workload": _workload}
    taken = {name: inspect.signature(maker).parameters for name, maker in makers.items()}

    def run(**values: Any) -> None:
        made = {name: maker(**{of: values.pop(of) for of in taken[name]}) for name, maker in makers.items()}
        command(**made, **values)

    own = [p for name, p in inspect.signature(command).parameters.items() if name not in makers]
    every = [p for parameters in taken.values() for p in parameters.values()] + own
    run.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in every])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in every}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


MeasurePeaks = Annotated[bool, typer.Option("--measure-peaks", help="Measure the machine's peaks if they are unknown.")]
Out = Annotated[Path | None, typer.Option(help="A JSON file; by default stdout.")]


@_with_options
def throughput(
    setup: "Setup",
    workload: "Workload",
    num_prompts: Annotated[int, typer.Option(help="Requests.")] = 512,
    request_rate: Annotated[
        float | None, typer.Option(help="A Poisson process of so many requests a second; by default all come at once.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Requests that are served before, for a few tokens each.")] = 16,
    measure_peaks: MeasurePeaks = False,
    out: Out = None,
) -> None:
    """Serve many requests: tokens and requests a second, and every latency."""
    from octavo.bench import engine_bench

    load = workload.of(num_prompts, request_rate)
    with _bench(setup, measure_peaks) as bench:
        result = engine_bench.throughput(bench, load, warmup)
    _write(result, out)


@_with_options
def latency(
    setup: "Setup",
    workload: "Workload",
    batch_size: Annotated[int, typer.Option(help="Requests that come at once.")] = 1,
    iterations: Annotated[int, typer.Option(help="Batches, one after another.")] = 5,
    warmup: Annotated[int, typer.Option(help="Batches that are served before, for a few tokens each.")] = 2,
    measure_peaks: MeasurePeaks = False,
    out: Out = None,
) -> None:
    """Serve one batch again and again: how long it takes, and each of its tokens."""
    from octavo.bench import engine_bench

    load = workload.of(batch_size)
    with _bench(setup, measure_peaks) as bench:
        result = engine_bench.latency(bench, load, iterations, warmup)
    _write(result, out)


@_with_options
def sweep(
    setup: "Setup",
    workload: "Workload",
    batch_sizes: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "1,2,4,8,16,32,64,128,256",
    rounds: Annotated[int, typer.Option(help="Requests a place in the batch, one after another.")] = 1,
    measure_peaks: MeasurePeaks = False,
    out: Annotated[
        Path | None, typer.Option(help="A folder; by default ./octavo-bench/<gpu>, in a checkout bench/results/<gpu>.")
    ] = None,
) -> None:
    """Serve batches of many sizes and draw latency over throughput: JSON, a PNG and a page."""
    from octavo.bench import engine_bench

    try:
        from octavo.bench import sweep_figure
    except ImportError as missing:
        raise ValueError(f"{missing}; a sweep is drawn: pip install 'octavo[bench]'") from None
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        raise ValueError(f"batch_sizes: {batch_sizes!r}; expected numbers with commas, as in 1,8,64") from None
    with _bench(setup, measure_peaks) as bench:
        result = engine_bench.sweep(bench, workload, sizes, rounds, _show)
        folder = out or engine_bench.results_folder(bench.device)
    png = sweep_figure.plane(result)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (
        (".json", (json.dumps(result, indent=1) + "\n").encode()),
        (".png", png),
        (".html", sweep_figure.page(result, png).encode()),
    ):
        path = folder / f"sweep_{setup.file_name}{suffix}"
        path.write_bytes(content)
        console.print(f"{path}  {len(content) / 1000:.0f} kB", style="dim", soft_wrap=True)


@contextmanager
def _bench(setup: "Setup", measure_peaks: bool) -> Iterator["Bench"]:
    """A bench with a progress bar."""
    from octavo.bench.engine_bench import Bench

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task, last = progress.add_task(setup.name, total=None), 0.0

        def show(what: str, done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= _REFRESH_SECONDS:
                progress.update(task, description=what, completed=done, total=total, refresh=True)
                last = now

        yield Bench(setup, measure_peaks=measure_peaks, progress=show)


def _write(result: dict[str, Any], out: Path | None) -> None:
    """The result as JSON, and a table of it on the terminal."""
    text = json.dumps(result, indent=1) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    table = Table("ms", "mean", "median", "p95", "p99", box=None)
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "batch_ms"):
        if result.get(name):
            table.add_row(name.removesuffix("_ms").upper(), *(f"{value:.2f}" for value in result[name].values()))
    console.print(table)
    console.print(_line(result), soft_wrap=True)
    if result["peaks"]["note"]:
        console.print(result["peaks"]["note"], style="dim", soft_wrap=True)


def _show(row: dict[str, Any]) -> None:
    tpot = row["tpot_ms"]["median"] if row["tpot_ms"] else float("nan")
    console.print(f"batch {row['batch_size']:4}: {tpot:7.2f} ms a token, {_line(row)}", soft_wrap=True)


def _line(result: dict[str, Any]) -> str:
    """Rates, shares of the peaks and memory in one line."""
    shares = [("MFU", result["mfu"]), ("bandwidth", result["bandwidth_utilisation"])]
    used = "".join(f", {name} {share:.1%}" for name, share in shares if share is not None)
    return (
        f"{result['output_tokens_per_s']:,.1f} output and {result['total_tokens_per_s']:,.1f} total tokens/s, "
        f"{result['requests_per_s']:.2f} requests/s{used}, {result['prefix_cache_hit_rate']:.0%} prefix hits, "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
