"""The `octavo` command."""

import platform
import sys
import time
from collections.abc import Iterable
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.table import Table
except ImportError as missing:
    raise SystemExit(f"octavo: {missing}; install the engine's extra: pip install 'octavo[engine]'") from None

import torch

import octavo
from octavo.engine import bench_commands
from octavo.engine.llm import LLM, Token
from octavo.engine.params import SamplingParams
from octavo.engine.quantize.command import quantize_command

app = typer.Typer(
    help="Run Llama, Mistral and Mixtral models on octavo's kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True, highlight=False)  # progress and figures; stdout carries the model's text alone


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[
    str, typer.Option("--model", "-m", help="A folder, a .gguf file, a Hugging Face id, or the alias smollm2.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<index>; by default the GPU where there is one.")]
DTypeOption = Annotated[DType, typer.Option(help="Activations and dense weights; auto fits the device.")]
MaxTokens = Annotated[int, typer.Option(help="The most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin where there are no safetensors; tensors alone.")
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]
KvCacheDType = Annotated[str | None, typer.Option(help="fp8, fp8_e5m2 or int8; by default that of activations.")]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="On a GPU, launch kernels without CUDA graphs.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="A question, or with --raw a text to continue.")],
    model: Model = "smollm2",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without a chat template.")] = False,
    device: Device = None,
    dtype: DTypeOption = DType.auto,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    allow_pickle: AllowPickle = False,
    kv_cache_dtype: KvCacheDType = None,
    enforce_eager: EnforceEager = False,
) -> None:
    """Answer one prompt, streaming."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    if not prompt:
        raise ValueError("prompt: empty; expected a text")
    llm = _load(model, device, dtype, allow_pickle, kv_cache_dtype=kv_cache_dtype, enforce_eager=enforce_eager)
    as_chat = llm.tokenizer.has_chat_template and not raw
    _print_stream(llm.stream([{"role": "user", "content": prompt}] if as_chat else prompt, params))


@app.command()
def chat(
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    device: Device = None,
    dtype: DTypeOption = DType.auto,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    allow_pickle: AllowPickle = False,
    kv_cache_dtype: KvCacheDType = None,
    enforce_eager: EnforceEager = False,
) -> None:
    """Talk with a model; an empty line, "exit" or end of input ends it."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    llm = _load(model, device, dtype, allow_pickle, kv_cache_dtype=kv_cache_dtype, enforce_eager=enforce_eager)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if line in ("", "exit", "quit"):
            return
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _print_stream(llm.stream(messages, params))})


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a folder with config.json and safetensors.")],
    target: Annotated[Path, typer.Argument(help="A folder, or a .gguf file, that is to be made of it.")],
) -> None:
    """Convert GGUF to safetensors or back, where every weight keeps its value; what has no equal is refused."""
    from octavo.engine.convert import convert

    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        convert(source, target, lambda done, total: progress.update(task, completed=done, total=total))


app.command("quantize")(quantize_command)

bench = typer.Typer(help="Measure octavo on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
for command in (bench_commands.throughput, bench_commands.latency, bench_commands.sweep):
    bench.command(command.__name__)(command)


@bench.command()
def kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="An op; repeat it for several. All, where none is named.")
    ] = None,
    shapes: Annotated[list[str] | None, typer.Option(help="T=64, or a part of a shape's name; repeatable.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="octavo, torch, torch.compile, a peer; repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float16, for one; instead of the op's own. Repeatable.")
    ] = None,
    peer_site: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: the folder a group of peers is installed in. Repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds a case.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Results; by default ./octavo-bench, in a checkout bench/results.")
    ] = None,
) -> None:
    """Time the ops beside torch and the peers that are installed; outputs are checked first."""
    from octavo.bench import harness, peers, run
    from octavo.bench.worker import Job

    ops = op or harness.benchmarks()
    job = Job(ops, names=provider or [], shapes=shapes or [], dtypes=dtype or [], rounds=rounds)
    raise typer.Exit(run.measure(job, out, peers.parse_sites(peer_site or [])))


@app.command()
def env() -> None:
    """Print versions, devices, and the backend that each op would use."""
    out = Console(highlight=False)
    out.print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("octavo", "torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "gguf"):
        out.print(f"{package} {_version(package)}")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        out.print(
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, {properties.multi_processor_count} multiprocessors"
        )
        devices.append(f"cuda:{index}")
    if len(devices) == 1:
        out.print("no GPU")
    table = Table("op", *devices)
    for row in zip(octavo.backends("cpu"), *(octavo.backends(d).values() for d in devices), strict=True):
        table.add_row(*row)
    out.print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _load(model: str, device: str | None, dtype: DType, allow_pickle: bool, **options: Any) -> LLM:
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden: dict[str, Any] = dict(console=console, transient=True)
    with Progress(*columns, **hidden) as progress:
        task = progress.add_task(escape(model), total=None)
        llm = LLM(
            model,
            device=device,
            dtype=None if dtype is DType.auto else getattr(torch, dtype.value),
            progress=lambda done, total: progress.update(task, completed=done, total=total),
            allow_pickle=allow_pickle,
            warmup=False,
            **options,
        )
    if console.is_terminal:  # as the bar that was there until now
        console.print(str(llm.load_report), style="dim")
    if llm.device.type == "cuda":
        with Progress(TextColumn("preparing kernels"), BarColumn(), MofNCompleteColumn(), **hidden) as progress:
            task = progress.add_task("", total=None)
            llm.warmup(lambda done, total: progress.update(task, completed=done, total=total))
    for note in llm.notes:
        console.print(escape(note), style="dim")
    return llm


def _print_stream(tokens: Iterable[Token]) -> str:
    """Prints a stream as it comes, then one line with its speed; returns the whole text."""
    start = first = time.perf_counter()
    text, count = "", 0
    for token in tokens:
        if count == 0:
            first = time.perf_counter()
        count += 1
        text += token.text
        print(token.text, end="", flush=True)
    print()
    decode = time.perf_counter() - first
    speed = f"{(count - 1) / decode:.1f} tokens/s" if count > 1 else "one token"
    console.print(f"{count} tokens, {speed}, first after {first - start:.2f} s", style="dim")
    return text


def main() -> None:
    """Entry point: what a user got wrong becomes one readable line and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        console.print(f"octavo: {escape(str(error))}", style="red", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
