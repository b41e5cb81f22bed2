"""One self-contained HTML page of all figures and tables of a results folder: no scripts, no network, no fonts."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.bench.floors import READERS, Ceilings, providers, runs
from octavo.bench.store import Row

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --page: #fff; --line: #d9d9d9; --soft: #666; --best: #e6f2ea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --page: #16181b; --line: #3a3d42; --soft: #a0a0a0; --best: #1f3a2a; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1140px;
  margin: 2em auto; padding: 0 1em; }
img { display: block; max-width: 100%; background: #fff; border-radius: 6px; margin: 1em 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 0.6em 0; }
th, td { padding: 2px 9px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
small { color: var(--soft); }
td.best { background: var(--best); }
li { font-size: 13px; }
"""

_CEILINGS = (
    ("copy_bytes_per_s", "copy, bytes read + written", 1e12, "TB/s"),
    ("read_bytes_per_s", "read only", 1e12, "TB/s"),
    ("gemm_bf16_flops_per_s", "GEMM bf16", 1e12, "TFLOP/s"),
    ("gemm_fp8_flops_per_s", "GEMM fp8 (e4m3)", 1e12, "TFLOP/s"),
    ("gemm_int8_ops_per_s", "GEMM int8", 1e12, "TOP/s"),
    ("gemm_fp32_flops_per_s", "GEMM fp32", 1e12, "TFLOP/s"),
)


_COSTS = (
    ("repeated_us", "idle"),
    ("behind_work_us", "behind work"),
    ("dispatcher_us", "dispatcher"),
    ("new_shape_us", "new shape"),
)


@dataclass(frozen=True)
class Section:
    """One op on the page."""

    op: str
    rows: Sequence[Row]
    figures: Mapping[str, bytes]
    """What a figure shows → its PNG."""


def _e(text: object) -> str:
    return html.escape(str(text))


def _figure(op: str, what: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return f'<img id="{_e(op)}-{_e(what)}" alt="{_e(op)}: {_e(what)}" src="data:image/png;base64,{data}">'


def _time(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _cell(row: Row | None, best: float | None, ceilings: Ceilings) -> str:
    if row is None:
        return "<td></td>"
    if row.median_us is None:
        return "<td><small>see notes</small></td>"
    spread = f" <small>{_time(row.p20_us)}&ndash;{_time(row.p80_us)}</small>" if row.p20_us and row.p80_us else ""
    percent = ceilings.percent_of_floor(row)
    reached = "" if percent is None else f" · {percent:.0f} %" if percent >= 1 else " · &lt;1 %"
    mark = ' class="best"' if row.median_us == best else ""
    return f"<td{mark}>{_time(row.median_us)}{spread}{reached}</td>"


def _table(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """Medians with p20–p80 and percent of the floor, a line for each shape, a column for each provider."""
    names = [name for name in providers(rows) if any(r.median_us is not None for r in rows if r.provider == name)]
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.shape, row.dtype), {})[row.provider] = row
    several = len({row.dtype for row in rows}) > 1
    heads = "".join(f"<th>{_e(name)}</th>" for name in ["shape", "floor, µs", *names])
    body = []
    for (shape, dtype), mine in lines.items():
        if not any(row.median_us for row in mine.values()):
            continue
        floor = ceilings.floor_us(next(iter(mine.values())))
        best = min(row.median_us for row in mine.values() if row.median_us)
        cells = "".join(_cell(mine.get(name), best, ceilings) for name in names)
        label = f"{shape} {dtype}" if several else shape
        body.append(f"<tr><td>{_e(label)}</td><td>{'' if floor is None else _time(floor)}</td>{cells}</tr>")
    if not body:
        return "<p>Nothing was timed.</p>"
    return f'<div class="wide"><table><tr>{heads}</tr>\n' + "\n".join(body) + "</table></div>"


def _notes(rows: Sequence[Row]) -> str:
    """What the harness noted, each remark once, with the shapes that it holds for."""
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault((row.provider, row.note), []).append(row.shape)
    items = []
    for (provider, note), shapes in notes.items():
        where = "; ".join(shapes) if len(shapes) <= 4 else f"{len(shapes)} shapes, from {shapes[0]} to {shapes[-1]}"
        items.append(f"<li><b>{_e(provider)}</b>: {_e(note)} <small>({_e(where)})</small></li>")
    if not items:
        return ""
    return f"<details{' open' if len(items) <= 12 else ''}><summary>Notes</summary><ul>{''.join(items)}</ul></details>"


def _origin(rows: Sequence[Row]) -> str:
    """Versions, commits and days of what is shown; several runs are said to be several."""
    measured = runs(rows)
    versions = sorted({f"{row.provider} {row.provider_version}" for row in rows if row.provider_version})
    said = "; ".join(
        f"{date}, octavo {commit}, torch {torch}, triton {triton}" for date, commit, torch, triton in measured
    )
    several = " (several runs: compare across them with care)" if len(measured) > 1 else ""
    return f"<p><small>Measured {_e(said)}{several}. {_e(', '.join(versions))}</small></p>"


def _ceilings(ceilings: Ceilings) -> str:
    if not ceilings.values:
        return "<p>No ceilings measured: run <code>python -m bench.ceilings</code> on this machine.</p>"
    lines = []
    for key, name, factor, unit in _CEILINGS:
        value = ceilings.values.get(key)
        if value is not None:
            lines.append(f"<tr><td>{_e(name)}</td><td>{value / factor:.4g} {unit}</td></tr>")
    for name, value in (ceilings.values.get("launch_us") or {}).items():
        if value is not None:
            lines.append(f"<tr><td>one call: {_e(name)}</td><td>{value:.2f} µs</td></tr>")
    return "<table><tr><th>ceiling</th><th>measured</th></tr>\n" + "\n".join(lines) + "</table>"


def _launch_cost(found: Mapping[str, Any]) -> str:
    """The CPU's time of a call of each op; nothing where it was not measured."""
    if not found:
        return ""
    lines = []
    for row in found["rows"]:
        cells = "".join(f"<td>{row[key]:.1f}</td>" if key in row else "<td></td>" for key, _ in _COSTS)
        lines.append(f"<tr><td>{_e(row['op'])} <small>{_e(row['shape'])}</small></td>{cells}</tr>")
    heads = "".join(f"<th>{name}</th>" for _, name in _COSTS)
    return (
        '<h2 id="launch-cost">What a call costs the CPU, µs</h2>\n<p>With the GPU idle, with the GPU busy so that '
        "launches queue up, through PyTorch's dispatcher, and for the first call with a new shape.</p>\n"
        f'<div class="wide"><table><tr><th>call</th>{heads}</tr>\n' + "\n".join(lines) + "</table></div>\n"
        f"<p><small>Measured {_e(found['date'][:10])}, octavo {_e(found['commit'])}, torch {_e(found['torch'])}, "
        f"triton {_e(found['triton'])}.</small></p>"
    )


def page(gpu: str, sections: Sequence[Section], ceilings: Ceilings, launch_cost: Mapping[str, Any]) -> str:
    """The page of one results folder."""
    links = " · ".join(f'<a href="#{_e(s.op)}">{_e(s.op)}</a>' for s in sections)
    parts = [
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>octavo on {_e(gpu)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>octavo on {_e(gpu)}</h1>\n<p>{links}</p>",
        "<p>Times are medians in µs with p20 to p80 behind them, and the percentage of the floor that they reach. The "
        "floor is max(bytes / bandwidth, flops / peak) of this machine's own ceilings; the bandwidth is that of "
        f"reading for {_e(', '.join(sorted(READERS)))}, and of copying for the others. A kernel that reads more than "
        "it writes can pass the copy's roof by a few per cent: reads are faster. The fastest is shaded.</p>",
        f"<h2>Ceilings of the machine</h2>\n{_ceilings(ceilings)}",
        _launch_cost(launch_cost),
    ]
    for s in sections:
        parts.append(f'<h2 id="{_e(s.op)}">{_e(s.op)}</h2>')
        parts += [_figure(s.op, what, png) for what, png in s.figures.items()]
        parts += [_table(s.rows, ceilings), _notes(s.rows), _origin(s.rows)]
    return "\n".join([*parts, "</body></html>\n"])
