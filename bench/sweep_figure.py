"""What a sweep over batch sizes found: latency over throughput as a figure, and a page with the figures in numbers.

Both axes are logarithmic. While a batch only decodes, batch = throughput · time per token, so that all points of one
batch size lie on a falling diagonal; B* is one of them. Below the reading line text comes faster than it is read.
"""

import base64
import html
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from octavo.bench.figures import SETTINGS, to_png
from octavo.bench.page import STYLE
from octavo.bench.serving_metrics import READING_WORDS_PER_MINUTE, TOKENS_PER_WORD, reading_seconds_per_token

Result = dict[str, Any]
_COLUMNS = (
    ("batch", "batch_size", "", ".0f"),
    ("output tokens/s", "output_tokens_per_s", "", ",.0f"),
    ("total tokens/s", "total_tokens_per_s", "", ",.0f"),
    ("requests/s", "requests_per_s", "", ".2f"),
    *(
        (f"{of.upper()} {which}, ms", f"{of}_ms", which, ",.2f")
        for of in ("ttft", "tpot", "itl")
        for which in ("median", "p95", "p99")
    ),
    ("floor of a step, ms", "floor_tpot_ms", "", ".2f"),
    ("MFU", "mfu", "", ".1%"),
    ("bandwidth used", "bandwidth_utilisation", "", ".1%"),
    ("prefix hits", "prefix_cache_hit_rate", "", ".1%"),
)


def drawable(rows: Sequence[Result]) -> list[Result]:
    """The rows that have a time per token: those of requests with more than one."""
    return [row for row in rows if row["tpot_ms"]]


def reading_line() -> str:
    """The reading speed in words."""
    tokens = 1 / reading_seconds_per_token()
    return (
        f"reading speed: {READING_WORDS_PER_MINUTE} words a minute, at {TOKENS_PER_WORD:.2f} tokens a word "
        f"{tokens:.1f} tokens/s"
    )


def b_star_line(result: Result) -> str:
    """What B* is, or why it is not known."""
    peaks = result["rows"][0]["peaks"]
    if result["b_star"] is None:
        return f"No B*: {peaks['note']}"
    return (
        f"B* = {result['b_star']:.0f}: from so many tokens a step the products take longer than reading the weights "
        f"(peak {peaks['flops_per_s'] / 1e12:.0f} TFLOP/s {peaks['dtype']} / bandwidth "
        f"{peaks['bytes_per_s'] / 1e12:.2f} TB/s, times bytes a weight / 2)"
    )


def title(result: Result) -> str:
    scheme = f" {result['scheme']}" if result["scheme"] else ""
    tokens = (
        f"{result['lengths']} lengths"
        if result["lengths"] == "file"
        else (
            f"{result['input_len']} tokens in, {result['output_len']} out"
            + ("" if result["lengths"] == "fixed" else f" ({result['lengths']})")
        )
    )
    return f"{result['model']}{scheme}, {tokens}\n{result['gpu']}"


def plane(result: Result) -> bytes:
    """The figure as PNG; the same result gives the same bytes.

    Raises:
        ValueError: no batch size has a time per token.
    """
    rows = drawable(result["rows"])
    if not rows:
        raise ValueError("lengths: outputs of one token; expected at least 2, for a time per token")
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        ax = figure.add_subplot()
        x, y = _limits(rows, result["reading_tpot_ms"])
        ax.set(xscale="log", yscale="log", xlim=x, ylim=y)
        ax.set(xlabel="output tokens/s", ylabel="time per output token, median and p95 (ms)")
        _measured(ax, rows)
        _floor(ax, rows)
        ax.axhline(result["reading_tpot_ms"], color="#D55E00", lw=1.8, label=reading_line())
        if b_star := result["b_star"]:
            diagonal = [b_star / milliseconds * 1e3 for milliseconds in y]
            ax.plot(diagonal, y, color="#009E73", ls="--", lw=1.4, label=f"B* = {b_star:.0f}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.set_minor_formatter(NullFormatter())
        figure.suptitle(title(result), x=0.01, ha="left", fontsize=10)
        figure.legend(loc="outside lower left", fontsize=8.5)
        return to_png(figure)


def _floor_rate(row: Result) -> float:
    return row["batch_size"] / row["floor_tpot_ms"] * 1e3


def _limits(rows: Sequence[Result], reading: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ends of both axes, with room around all that is drawn."""
    known = [row for row in rows if row["floor_tpot_ms"]]
    rates = [row["output_tokens_per_s"] for row in rows] + [_floor_rate(row) for row in known]
    times = [row["tpot_ms"][which] for row in rows for which in ("median", "p95")]
    times += [row["floor_tpot_ms"] for row in known] + [reading]
    return (min(rates) / 1.5, max(rates) * 1.5), (min(times) / 1.4, max(times) * 1.4)


def _measured(ax: Axes, rows: Sequence[Result]) -> None:
    x = [row["output_tokens_per_s"] for row in rows]
    y = [row["tpot_ms"]["median"] for row in rows]
    above = [row["tpot_ms"]["p95"] - row["tpot_ms"]["median"] for row in rows]
    ax.errorbar(
        x, y, yerr=[[0.0] * len(rows), above], color="#0072B2", marker="o", ms=5, lw=1.4, capsize=2, label="measured"
    )
    for row, at in zip(rows, zip(x, y, strict=True), strict=True):
        ax.annotate(f"{row['batch_size']}", at, xytext=(-4, 8), ha="right", textcoords="offset points", fontsize=8)


def _floor(ax: Axes, rows: Sequence[Result]) -> None:
    """Where decoding would be if it took no more than the machine's peaks allow."""
    known = [row for row in rows if row["floor_tpot_ms"]]
    if known:
        x, y = [_floor_rate(row) for row in known], [row["floor_tpot_ms"] for row in known]
        ax.plot(x, y, color="#8c8c8c", marker=".", lw=1, label="floor of decoding, by the measured peaks")


def page(result: Result, png: bytes) -> str:
    """One HTML page that needs nothing else: the figure, and the numbers in it."""
    data = base64.b64encode(png).decode()
    heads = "".join(f"<th>{html.escape(name)}</th>" for name, *_ in _COLUMNS)
    lines = [
        "<tr>" + "".join(f"<td>{_cell(row, *where)}</td>" for _, *where in _COLUMNS) + "</tr>" for row in result["rows"]
    ]
    what = html.escape(title(result).replace("\n", ", "))
    made = ", ".join(f"{name} {result[name]}" for name in ("commit", "torch", "triton", "date"))
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>octavo: {what}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{what}</h1>",
        f'<img alt="time per output token over throughput" src="data:image/png;base64,{data}">',
        f"<p>{html.escape(b_star_line(result))}.<br>{html.escape(reading_line())}.</p>",
        f'<div class="wide"><table><tr>{heads}</tr>\n' + "\n".join(lines) + "</table></div>",
        f"<p><small>Weights: {html.escape(result['weights'])}. octavo {html.escape(made)}.</small></p>",
    ]
    return "\n".join([*parts, "</body></html>\n"])


def _cell(row: Result, key: str, which: str, form: str) -> str:
    value = row[key]
    if which and value is not None:
        value = value[which]
    return "" if value is None else format(value, form)
