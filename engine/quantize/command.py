"""`octavo quantize`: options, progress and the report on a terminal."""

import re
from collections import defaultdict
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from octavo.engine.quantize.mixture import FEW
from octavo.engine.quantize.run import Report, quantize
from octavo.engine.quantize.settings import Settings

Scheme = StrEnum("Scheme", {"int4": "int4", "int8": "int8", "fp8": "fp8", "fp8_block": "fp8-block"})
Method = StrEnum("Method", {"gptq": "gptq", "rtn": "rtn"})
NONE = "none"


def quantize_command(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, a Hugging Face id, or smollm2.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; an interrupted run goes on in it.")],
    scheme: Annotated[Scheme, typer.Option(help="int4: weights; int8, fp8, fp8-block: activations too.")],
    method: Annotated[
        Method, typer.Option(help="gptq calibrates the rounding, rtn rounds to nearest, fast.")
    ] = Method.gptq,
    group_size: Annotated[int, typer.Option(help="Of int4: inputs that share a scale, 32, 64 or 128.")] = 128,
    act_order: Annotated[bool, typer.Option(help="Of gptq: large inputs first, in groups as they lie.")] = True,
    damp: Annotated[float, typer.Option(help="Of gptq: added to the Hessian's diagonal, in parts of its mean.")] = 0.1,
    smooth: Annotated[float, typer.Option(help="Of int8: SmoothQuant's alpha, to begin with; 0 does without.")] = 0.5,
    calibration: Annotated[Path | None, typer.Option(help="A text file; octavo's own by default.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Of the calibration text at most.")] = 128 * 2048,
    sequence_length: Annotated[int, typer.Option(help="Tokens of it that see each other.")] = 128,
    keep: Annotated[
        list[str] | None, typer.Option(help="Layers not to quantise, by part of their names: down_proj, layers.0, ….")
    ] = None,
    weights_only: Annotated[
        list[str] | None, typer.Option(help="Of int8: layers whose inputs are not quantised, named like --keep's.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help='A text file for perplexity, or "none"; by default bench/text/founding.txt.')
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<index>.")] = None,
) -> None:
    """Quantise a model into a compressed-tensors checkpoint, layer by layer."""
    settings = Settings(
        scheme.value,
        method.value,
        group_size,
        act_order,
        damp,
        smooth,
        calibration_tokens,
        sequence_length,
        tuple(keep or ()),
        tuple(weights_only or ()),
    )
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        report = quantize(
            source,
            target,
            settings,
            calibration=None if calibration is None else _text("calibration", calibration),
            evaluation=_evaluation(evaluation),
            device=device,
            progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    print_report(report, Console(highlight=False))
    console.print(f"written to {target}", style="dim", soft_wrap=True)


def print_report(report: Report, console: Console) -> None:
    """Weights' errors by module over all layers, then perplexity and size."""
    rows = defaultdict(list)
    for row in report.layers:
        if "kept" in row:
            continue
        module = row["name"].removesuffix(".weight").split(".", 3)[-1]
        rows[re.sub(r"block_sparse_moe\.experts\.\d+", "experts.*", module)].append(row)
    with_outputs = any("output_error" in row for row in report.layers)
    table = Table("module", "weight error", "worst layer", *(["output error"] if with_outputs else []))
    for module, of in rows.items():
        worst = max(of, key=lambda row: row["error"])
        cells = [module, f"{mean(row['error'] for row in of):.2%}", f"{worst['error']:.2%} in {_layer(worst['name'])}"]
        outputs = [row["output_error"] for row in of if "output_error" in row]
        table.add_row(*cells, *([f"{mean(outputs):.2%}" if outputs else ""] if with_outputs else []))
    console.print(table)
    if kept := sum("kept" in row for row in report.layers):
        console.print(f"{kept} of {len(report.layers)} kept as they were")
    if rounded := sum("rounded" in row for row in report.layers):
        console.print(f"{rounded} weights of experts that saw fewer than {FEW} tokens rounded to nearest")
    if report.perplexity_before is not None and report.perplexity_after is not None:
        change = report.perplexity_after / report.perplexity_before - 1
        console.print(
            f"perplexity of {report.evaluation_tokens} tokens: {report.perplexity_before:.4f} before, "
            f"{report.perplexity_after:.4f} after ({change:+.2%})"
        )
    before, after = (f"{size / 1e6:.1f} MB" for size in (report.bytes_before, report.bytes_after))
    console.print(f"{before} before, {after} after; {report.seconds:.0f} s on {report.device}")


def _layer(name: str) -> str:
    return f"layer {name.split('.')[2]}"


def _evaluation(path: str | None) -> str | None:
    if path == NONE:
        return None
    if path is None:
        return (files("octavo.bench") / "text/founding.txt").read_text(encoding="utf-8")
    return _text("evaluation", Path(path))


def _text(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{name}: {path}: {error.strerror}; expected a text file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}: {path}: not UTF-8; expected a text file") from None
