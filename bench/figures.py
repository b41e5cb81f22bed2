"""The two figures of an op: its roofline and its speed-up over each peer, as PNG bytes that are the same every time.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; a provider keeps its colour and marker in
every figure. The background is white, so that a figure reads on a light and on a dark page.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from octavo.bench.floors import READERS, Ceilings, intensity, is_wrong, providers
from octavo.bench.harness import parse_label
from octavo.bench.store import Row

RUN_TIME_DIMS = ("T", "M", "B", "q", "ctx")
"""What a request decides; the other dimensions are the model's and make the panels."""

_DPI = 100
SETTINGS: Any = {
    **{key: matplotlib.rcParamsDefault[key] for key in ("font.family", "font.sans-serif", "axes.prop_cycle")},
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
_FIXED = {
    "octavo": ("#0072B2", "o"),
    "octavo, planned": ("#74ADD1", "p"),
    "torch": ("#8c8c8c", "s"),
    "torch.compile": ("#000000", "D"),
    "torch cuDNN": ("#56B4E9", "<"),
    "flashinfer": ("#009E73", "^"),
    "flashinfer fa3": ("#9AD8C2", "v"),
    "flashinfer, two calls": ("#009E73", "h", "////"),
    "flashinfer fa3, two calls": ("#9AD8C2", "8", "////"),
    "vllm": ("#D55E00", "P"),
    "vllm fa3": ("#A63A00", "X"),
    "vllm fa3, two calls": ("#A63A00", "H", "////"),
    "vllm triton": ("#F2A56F", ">"),
    "marlin": ("#8C6510", "P"),
    "machete": ("#E69F00", "X"),
    "liger": ("#CC79A7", "*"),
    "conch": ("#7B4FA3", "d"),
}
_COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6510", "#7B4FA3", "#B5B000")
"""For providers that are not listed above."""
_MARKERS = ("^", "v", "P", "X", "<", ">", "*", "d")


@dataclass(frozen=True)
class Style:
    """How a provider looks."""

    colour: str
    marker: str
    hatch: str = ""


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A look for each provider; give all providers of all ops, so that every figure agrees."""
    known = {name: name.split(" (")[0] for name in names}  # "torch (bf16 weights)" looks like torch
    looks = {name: Style(*_FIXED[base]) for name, base in known.items() if base in _FIXED}
    free = [c for c in _COLOURS if c not in {look.colour for look in looks.values()}] or list(_COLOURS)
    for count, name in enumerate(name for name in names if name not in looks):
        again, index = divmod(count, len(free))
        looks[name] = Style(free[index], _MARKERS[(index + again) % len(_MARKERS)], "////" if again else "")
    return looks


def short(number: float) -> str:
    """A size or a count as an axis shows it: 4096 → "4k", 14336 → "14k", 4544 stays."""
    if number >= 1024 and number % 1024 == 0:
        return f"{number // 1024:g}k"
    return f"{number:g}"


def _scaled(number: float, unit: str) -> str:
    """1.5e12, "B/s" → "1.5 TB/s"."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def to_png(figure: Figure) -> bytes:
    """The figure with 128 colours: a third of the size, and nothing in it that changes from run to run."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI, metadata={"Software": None})
    small = io.BytesIO()
    image = Image.open(raw).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(small, format="PNG", optimize=True)
    return small.getvalue()


def _heading(rows: Sequence[Row], what: str) -> str:
    return f"{rows[0].op}: {what}\n{rows[0].gpu}"


# ----------------------------------------------------------------------------------------------------------- roofline


def over_bytes(rows: Sequence[Row]) -> bool:
    """Whether to draw bandwidth over bytes: intensity that varies less than 2 × makes a roofline one column of dots."""
    values = [intensity(row) for row in rows]
    return max(values) < 2 * min(values) or min(values) <= 0


def _roof(ax: Axes, x: list[float], rows: Sequence[Row], ceilings: Ceilings, by_bytes: bool) -> None:
    """Draws the machine's limits over the range of x; nothing where they were not measured."""
    bandwidth, peak, node = ceilings.bandwidth(rows[0].op), ceilings.peak(rows[0].dtype), ceilings.node_us()
    if not bandwidth:
        ax.text(0.02, 0.96, "no ceilings measured", transform=ax.transAxes, va="top", color="#a00000")
        return
    name = "read" if rows[0].op in READERS else "copy"
    low, high = x
    line: dict[str, Any] = dict(color="#444444", lw=1.3, zorder=1)
    text = f"{name} {_scaled(bandwidth, 'B/s')}"
    if not by_bytes:
        flat = peak or math.inf
        knee = min(max(flat / bandwidth, low), high)
        ax.plot([low, knee, high], [min(bandwidth * i, flat) for i in (low, knee, high)], **line)
        text += f", {rows[0].dtype} GEMM {_scaled(peak, 'FLOP/s')}" if peak else ""
    else:
        knee = min(max(bandwidth * node * 1e-6, low), high) if node else low
        start = min(bandwidth, low / (node * 1e-6)) if node else bandwidth
        ax.plot([low, knee, high], [start, bandwidth, bandwidth], **line)
        text += f", {node:.2g} µs a kernel" if node and start < bandwidth else ""
    ax.text(0.98, 0.02, f"roof: {text}", transform=ax.transAxes, ha="right", va="bottom", color="#444444", fontsize=8)


def _roofline_axes(ax: Axes, rows: Sequence[Row], ceilings: Ceilings, looks: dict[str, Style]) -> None:
    timed = [row for row in rows if row.median_us]
    by_bytes = over_bytes(rows)
    across = [float(row.bytes) if by_bytes else intensity(row) for row in rows]
    limits = [min(across) / 1.6, max(across) * 1.6]
    _roof(ax, limits, rows, ceilings, by_bytes)
    for name in reversed(providers(timed)):  # octavo last, on top
        mine = [row for row in timed if row.provider == name]
        x = [float(row.bytes) if by_bytes else intensity(row) for row in mine]
        y = [(row.bytes if by_bytes else row.flops) / row.median_us * 1e6 for row in mine if row.median_us]
        ours = name == "octavo"
        ax.scatter(
            x,
            y,
            s=30 if ours else 22,
            marker=looks[name].marker,
            facecolor=looks[name].colour if ours else "none",
            edgecolor="white" if ours else looks[name].colour,
            linewidth=0.5 if ours else 1.0,
            label=name,
            zorder=3 if ours else 2,
        )
    ax.set(xscale="log", yscale="log", xlim=limits)
    unit_x, unit_y = ("B", "B/s") if by_bytes else ("", "FLOP/s")
    ax.set_xlabel("bytes moved" if by_bytes else "arithmetic intensity (FLOP a byte)")
    ax.set_ylabel("achieved bandwidth" if by_bytes else "achieved FLOP/s")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _scaled(v, unit_x).rstrip()))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _scaled(v, unit_y)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
    ax.set_title(rows[0].dtype)


def roofline(rows: Sequence[Row], ceilings: Ceilings, looks: dict[str, Style]) -> bytes:
    """One op's achieved rate against the machine's roofs: a marker for each shape and provider, axes for each dtype."""
    dtypes = sorted({row.dtype for row in rows})
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 4.6 * len(dtypes) + 0.5), layout="constrained")
        for index, dtype in enumerate(dtypes):
            ax = figure.add_subplot(len(dtypes), 1, index + 1)
            _roofline_axes(ax, [row for row in rows if row.dtype == dtype], ceilings, looks)
        _legend(figure, [n for n in providers(rows) if any(r.median_us for r in rows if r.provider == n)])
        figure.suptitle(_heading(rows, "roofline"), x=0.01, ha="left", fontsize=10)
        return to_png(figure)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """One legend for all axes, under them, in the order of `names`."""
    found: dict[str, Any] = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    shown = [name for name in names if name in found]
    if shown:
        handles = [found[name] for name in shown]
        figure.legend(handles, shown, loc="outside lower left", ncols=min(len(shown), 7), fontsize=8.5)


# ----------------------------------------------------------------------------------------------------------- speed-up


@dataclass(frozen=True)
class Panel:
    """The shapes that differ in run-time dimensions alone, and what each peer took over what octavo took."""

    title: str
    axis: str
    ticks: list[str]
    peers: list[str]
    ratios: dict[tuple[str, int], float]
    """(peer, index of the tick) → peer's time / octavo's in the same process."""
    wrong: set[tuple[str, int]]


def _panel_key(row: Row) -> tuple[Any, ...]:
    dims = parse_label(row.shape)
    model = tuple((name, size) for name, size in dims.items() if name not in RUN_TIME_DIMS)
    # Decoding and prefill are different regimes with different peers, and together too many bars.
    return row.dtype, model, dims.get("q", 1) > 1


def panels(rows: Sequence[Row]) -> list[Panel]:
    """Splits an op's rows by model shape and sorts each part by its run-time dimensions."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_panel_key(row), []).append(row)
    several = len({row.dtype for row in rows}) > 1
    result = []
    for dtype, model, prefill in sorted(groups, key=lambda key: (key[0], _sizes(key[1]), key[2])):
        mine = groups[dtype, model, prefill]
        shapes = {
            tuple((d, n) for d, n in parse_label(row.shape).items() if d in RUN_TIME_DIMS): row.shape for row in mine
        }
        ordered = sorted(shapes, key=_sizes)
        shown = _varying(ordered)
        at = {shapes[dims]: index for index, dims in enumerate(ordered)}
        ratios, wrong = {}, set()
        for row in mine:
            if row.provider == "octavo":
                continue
            if row.speed_up:
                ratios[row.provider, at[row.shape]] = row.speed_up
            elif is_wrong(row):
                wrong.add((row.provider, at[row.shape]))
        peers = [name for name in providers(mine) if any(name == peer for peer, _ in ratios.keys() | wrong)]
        fixed = [f"{d}={n}" for d, n in (*model, *ordered[0]) if d not in shown and (d, n) not in (("window", 0),)]
        ticks = ["x".join(short(n) for d, n in dims if d in shown) for dims in ordered]
        title = ", ".join(([dtype] if several else []) + fixed)
        result.append(Panel(title, " x ".join(shown), ticks, peers, ratios, wrong))
    return [panel for panel in result if panel.peers]


def _sizes(dims: Sequence[tuple[str, int]]) -> tuple[int, ...]:
    """What shapes are sorted by: prefill by tokens a sequence first, everything else in reading order."""
    return tuple(size for _, size in dims)


def _varying(shapes: Sequence[tuple[tuple[str, int], ...]]) -> list[str]:
    """The run-time dimensions that differ between shapes; the first one where none does."""
    names = [name for name, _ in shapes[0]]
    varying = [name for i, name in enumerate(names) if len({shape[i][1] for shape in shapes if i < len(shape)}) > 1]
    return varying or names[:1]


def _bars(ax: Axes, panel: Panel, looks: dict[str, Style], limits: tuple[float, float]) -> None:
    width = 0.84 / len(panel.peers)
    size = 7.5 if len(panel.ticks) * len(panel.peers) <= 24 else 6.5
    for place, peer in enumerate(panel.peers):
        offset = (place - (len(panel.peers) - 1) / 2) * width
        at = [index for index in range(len(panel.ticks)) if (peer, index) in panel.ratios]
        ratios = [panel.ratios[peer, index] for index in at]
        # Bars start at 1 and the axis is logarithmic: twice as fast and half as fast are equally long.
        ax.bar(
            [index + offset for index in at],
            [ratio - 1 for ratio in ratios],
            width * 0.92,
            bottom=1,
            color=looks[peer].colour,
            hatch=looks[peer].hatch,
            edgecolor="white",
            linewidth=0,
            label=peer,
        )
        for index, ratio in zip(at, ratios, strict=True):
            up = ratio >= 1
            ax.annotate(
                f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}",
                (index + offset, ratio),
                xytext=(0, 2 if up else -2),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                rotation=90,
                fontsize=size,
                color="#333333",
            )
        for index in (index for name, index in panel.wrong if name == peer):
            ax.text(
                index + offset, 1.03, "wrong", rotation=90, ha="center", va="bottom", fontsize=size, color="#a00000"
            )
    ax.axhline(1, color="#222222", lw=1.1)
    ax.set_yscale("log", base=2)
    ax.set_ylim(*limits)
    ax.yaxis.set_major_locator(LogLocator(base=2))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(panel.ticks)), panel.ticks)
    ax.set_xlim(-0.6, max(len(panel.ticks), 4) - 0.4)
    ax.tick_params(axis="x", length=0)
    ax.grid(False, axis="x")
    ax.set_title(panel.title)
    ax.set_xlabel(panel.axis, labelpad=1)


def _limits(ratios: Sequence[float]) -> tuple[float, float]:
    """The ends of the axis that all panels share, with room for the numbers beyond the longest bars."""
    low, high = math.log2(min(*ratios, 0.95)), math.log2(max(*ratios, 1.5))
    room = 0.28 * (high - low)
    return 2 ** (low - (room if min(ratios) < 1 else 0)), 2 ** (high + room)


def speedup(rows: Sequence[Row], looks: dict[str, Style]) -> bytes | None:
    """Bars of peer time / octavo time, a panel for each model shape; None where octavo and a peer share no shape."""
    drawn = panels(rows)
    if not drawn:
        return None
    ratios = [ratio for panel in drawn for ratio in panel.ratios.values()] or [1.0]
    limits = _limits(ratios)
    most = max(len(panel.ticks) * len(panel.peers) for panel in drawn)
    columns = 2 if len(drawn) > 1 and most <= 36 else 1
    lines = math.ceil(len(drawn) / columns)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(11, (2.2 if lines > 1 else 3.2) * lines + 0.9), layout="constrained")
        for index, panel in enumerate(drawn):
            _bars(figure.add_subplot(lines, columns, index + 1), panel, looks, limits)
        _legend(figure, providers(rows))
        title = "time of each peer / time of octavo (above 1: octavo is faster)"
        figure.suptitle(_heading(rows, title), x=0.01, ha="left", fontsize=10)
        return to_png(figure)
