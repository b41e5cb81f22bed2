import base64
import io
import json
import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from octavo.bench import figures, launch_cost, plot
from octavo.bench.floors import Ceilings, latest, runs
from octavo.bench.harness import load
from octavo.bench.store import Row, write

CEILINGS = {
    "copy_bytes_per_s": 3.0e12,
    "read_bytes_per_s": 3.2e12,
    "gemm_bf16_flops_per_s": 8.0e14,
    "launch_us": {"torch.add": 6.6, "triton kernel[grid]": 16.0, "CUDA graph node (GPU time)": 1.5},
}
PEERS = {"octavo": 1.0, "torch": 4.0, "vllm": 1.25}


def row(op="rms_norm", provider="octavo", shape="T=64,hidden=4096", median=4.0, note="", **fields):
    values = dict(dtype="bfloat16", gpu="NVIDIA H100", torch="2.11.0", triton="3.6.0", provider_version="1.0")
    values |= dict(commit="0123456789ab", date="2026-11-23T10:00:00", flops=3_000_000, bytes=3_000_000)
    values |= dict(octavo_us=median and median / PEERS.get(provider, 1.0)) | fields
    spread = dict(p20_us=median and median * 0.9, p80_us=median and median * 1.1)
    return Row(op=op, provider=provider, shape=shape, median_us=median, note=note, **spread, **values)


def norm_rows():
    for hidden in (4096, 8192):
        for tokens in (1, 1024, 64):
            size = 4 * tokens * hidden
            for name, slower in PEERS.items():
                shape = f"T={tokens},hidden={hidden}"
                yield row(shape=shape, provider=name, median=slower * (2 + size / 3e6), flops=size, bytes=size)


def linear_rows():
    for n, k in ((6144, 4096), (4096, 14336)):
        for m in (1, 256, 4096):
            size, work = n * k // 2 + 2 * m * (n + k), 2 * m * n * k
            for name, slower in PEERS.items():
                us = slower * (2 + max(size / 3e6, work / 7e8))
                bad = name == "vllm" and m == 256
                yield row(
                    op="int4_linear",
                    shape=f"M={m},N={n},K={k},group=128",
                    provider=name,
                    median=None if bad else us,
                    note="wrong: largest error 3.00e+00, limit 1.00e-02" if bad else "",
                    flops=work,
                    bytes=size,
                )


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "NVIDIA_H100"
    write(folder / "rms_norm.csv", norm_rows())
    write(folder / "int4_linear.csv", linear_rows())
    (folder / "ceilings.json").write_text(json.dumps(CEILINGS))
    return folder


def pixels(png, colour):
    """How many pixels of a PNG have a colour; the palette may move it by a little."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(image - wanted).max(-1) <= 8).sum())


def test_figures_and_one_page_that_needs_nothing_else(results, tmp_path, capsys):
    out = tmp_path / "out"
    assert plot.main(["--results", str(results), "--out", str(out)]) == 0
    names = {f"{op}_{what}.png" for op in ("rms_norm", "int4_linear") for what in ("roofline", "speedup")}
    assert {path.name for path in out.iterdir()} == names | {"index.html"}
    printed, text = capsys.readouterr().out, (out / "index.html").read_text()
    for name in names:
        assert name in printed
        png = (out / name).read_bytes()
        assert len(png) < 300_000 and Image.open(io.BytesIO(png)).width <= 1200
        assert base64.b64encode(png).decode() in text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert set(re.findall(r'src="([a-z:/]+)', text)) == {"data:image/png"}
    assert len(text) < 2**20
    for said in ("wrong: largest error", "3.2 TB/s", "800 TFLOP/s", "16.00 µs", "0123456789ab", "M=4096,N=6144"):
        assert said in text, said


def test_the_same_rows_give_the_same_bytes(results, tmp_path):
    first, second = (plot.plot(results, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_figures_show_what_was_measured():
    looks = figures.styles(["octavo", "torch", "vllm"])
    rows = list(norm_rows())
    drawn = figures.roofline(rows, Ceilings(CEILINGS), looks)
    silent = figures.roofline([r for r in rows if r.provider != "octavo"], Ceilings(CEILINGS), looks)
    assert pixels(drawn, looks["octavo"].colour) > pixels(silent, looks["octavo"].colour) + 100
    bars = figures.speedup(rows, looks)
    # torch's bars are at 4 ×, vllm's at 1.25 ×: log2(4) / log2(1.25) = 6.2 times as long
    ratio = pixels(bars, looks["torch"].colour) / pixels(bars, looks["vllm"].colour)
    assert 4.5 < ratio < 8
    assert figures.speedup([r for r in rows if r.provider == "octavo"], looks) is None


def test_percent_of_the_floor():
    c = Ceilings(CEILINGS)
    # 3 MB at 3 TB/s take 1 µs, of the 4 that were measured
    assert c.floor_us(row()) == pytest.approx(1.0) and c.percent_of_floor(row()) == pytest.approx(25.0)
    # 8e9 operations at 800 TFLOP/s take 10 µs
    assert c.percent_of_floor(row(flops=8_000_000_000, median=20.0)) == pytest.approx(50.0)
    # a linear layer reads: 32 MB at 3.2 TB/s take 10 µs
    assert c.percent_of_floor(row(op="int4_linear", bytes=32_000_000, median=12.5)) == pytest.approx(80.0)
    # no peak of this dtype: the bytes alone
    assert c.floor_us(row(dtype="float32", flops=8_000_000_000)) == pytest.approx(1.0)
    assert c.percent_of_floor(row(median=None)) is None and Ceilings({}).percent_of_floor(row()) is None


def test_the_page_shows_the_percentage(tmp_path):
    write(tmp_path / "in/rms_norm.csv", [row(), row(provider="torch", median=8.0)])
    (tmp_path / "in/ceilings.json").write_text(json.dumps(CEILINGS))
    plot.plot(tmp_path / "in", tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    cells = re.findall(r"<td[^>]*>.*?</td>", text)
    assert "<td>1.00</td>" in cells  # the floor
    assert '<td class="best">4.00 <small>3.60&ndash;4.40</small> · 25 %</td>' in cells
    assert "<td>8.00 <small>7.20&ndash;8.80</small> · 12 %</td>" in cells


def test_the_latest_row_counts():
    old, new = row(date="2026-11-01T00:00:00", commit="a"), row(date="2026-11-02T00:00:00", commit="b", median=3.0)
    assert latest([old, new]) == latest([new, old]) == [new]
    other = row(date="2026-10-01T00:00:00", dtype="float16")
    assert latest([old, other, new]) == [new, other]
    # a peer that was not there later on keeps its time; one that turned out wrong does not
    absent = row(date="2026-11-03T00:00:00", median=None, note="not installed")
    assert latest([new, absent]) == [new]
    left_out = row(date="2026-11-03T00:00:00", median=None, note="left out: it crashed before")
    assert latest([new, left_out]) == [new]
    for note in (
        "wrong: NaN",
        "wrong after timing: NaN",
        "failed: ValueError",
        "unsupported: no",
        "the process died: 9",
    ):
        failed = row(date="2026-11-03T00:00:00", median=None, note=note)
        assert latest([new, failed]) == latest([failed, new]) == [failed]
    assert latest([failed, row(date="2026-11-04T00:00:00", median=None, note="not installed")]) == [failed]
    again = row(date=new.date, commit="c")
    assert latest([new, again]) == [again]


def test_rows_of_several_runs_are_said_to_be(results, tmp_path):
    write(results / "rms_norm.csv", [row(shape="T=1,hidden=4096", commit="ffff00000000", date="2026-12-01T00:00:00")])
    plot.plot(results, tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    assert text.count("several runs") == 1 and "octavo ffff00000000" in text
    assert runs(linear_rows()) == [("2026-11-23", "0123456789ab", "2.11.0", "3.6.0")]


def test_without_ceilings_it_says_so_and_draws(results, tmp_path, capsys):
    (results / "ceilings.json").unlink()
    assert plot.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 0
    assert "no ceilings.json" in capsys.readouterr().err
    text = (tmp_path / "out/index.html").read_text()
    assert "No ceilings measured" in text and " %</td>" not in text
    assert (tmp_path / "out/rms_norm_roofline.png").stat().st_size > 1000


def test_no_rows_and_bad_rows(tmp_path, capsys, monkeypatch):
    assert plot.main(["--results", str(tmp_path)]) == 1
    assert f"{tmp_path}: no rows of results there; run `python -m bench.run` first" in capsys.readouterr().err
    (tmp_path / "broken.csv").write_text("op,provider\nrms_norm,octavo\n")
    assert plot.main(["--results", str(tmp_path)]) == 1
    assert "broken.csv" in capsys.readouterr().err
    monkeypatch.setattr(plot, "default_folder", lambda: tmp_path / "none")
    assert plot.main([]) == 1
    assert "none: no rows" in capsys.readouterr().err


def test_every_folder_of_results_is_drawn_by_default(results, tmp_path, monkeypatch):
    write(tmp_path / "cpu/rms_norm.csv", [row(gpu="cpu"), row(gpu="cpu", provider="torch")])
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(plot, "default_folder", lambda: tmp_path)
    assert plot.main([]) == 0
    assert "octavo on cpu" in (tmp_path / "cpu/plots/index.html").read_text()
    assert (results / "plots/int4_linear_speedup.png").exists() and not (tmp_path / "empty/plots").exists()
    assert plot.main(["--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cpu", "NVIDIA_H100"}


def test_panels_split_by_layer_and_sort_by_tokens():
    first, second = figures.panels(list(linear_rows()))
    assert (first.title, second.title) == ("N=4096, K=14336, group=128", "N=6144, K=4096, group=128")
    assert first.axis == "M" and first.ticks == ["1", "256", "4k"] and first.peers == ["torch", "vllm"]
    assert first.ratios["torch", 0] == pytest.approx(4.0) and first.ratios["vllm", 2] == pytest.approx(1.25)
    assert first.wrong == {("vllm", 1)} and ("vllm", 1) not in first.ratios


def test_speed_ups_are_those_of_one_process():
    """Not of the row that octavo has from another run."""
    ours, theirs = row(median=4.0), row(provider="vllm", median=6.0, octavo_us=3.0)
    alone = row(provider="torch", median=6.0, octavo_us=None)
    (panel,) = figures.panels([ours, theirs, alone])
    assert panel.ratios == {("vllm", 0): 2.0}
    assert ours.speed_up == 1.0 and alone.speed_up is None


@pytest.mark.parametrize("ratios", [(0.08, 3.24), (26.0, 1.5), (0.13, 0.2), (1.02, 0.98)])
def test_numbers_of_bars_stay_inside_the_axes(ratios):
    rows = [
        row(provider=name, median=4.0 * r, octavo_us=4.0) for name, r in zip(("torch", "vllm"), ratios, strict=True)
    ]
    figure = Figure(figsize=(5.5, 2.2), layout="constrained")  # as small as a panel gets
    ax = figure.add_subplot()
    (panel,) = figures.panels(rows)
    with matplotlib.rc_context(figures.SETTINGS):
        figures._bars(ax, panel, figures.styles(["torch", "vllm"]), figures._limits(ratios))
        FigureCanvasAgg(figure).draw()
    inside = ax.get_window_extent()
    for text in ax.texts:
        box = text.get_window_extent()
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1 + 2, text.get_text()


def test_what_calls_cost_is_on_the_page(results, tmp_path):
    """Both files of the machine lie beside the rows, and neither is taken for rows."""
    every = {"repeated_us": [8.0, 9.0, 30.0], "behind_work_us": [7.0], "dispatcher_us": [5.5], "new_shape_us": [21.25]}
    subjects = [
        launch_cost.Subject("torch.add", "T=1,hidden=4096", {}, {"repeated_us": [4.0], "behind_work_us": [3.5]}),
        launch_cost.Subject("rms_norm", "T=1,hidden=4544", {}, every),
    ]
    path = launch_cost.save(subjects, "NVIDIA H100", results)
    assert path.parent == results and (results / "ceilings.json").exists()
    saved = json.loads(path.read_text())
    assert saved["gpu"] == "NVIDIA H100" and {"torch", "triton", "commit", "date"} < set(saved)
    assert [(r["torch_add_us"], r["commit"]) for r in saved["rows"]] == [(3.5, saved["commit"])] * 2
    again = launch_cost.Subject("rms_norm", "T=1,hidden=4096", {}, {"behind_work_us": [3.25]})
    launch_cost.save([again], "NVIDIA H100", tmp_path)
    launch_cost.save(subjects, "NVIDIA H100", tmp_path)
    assert json.loads((tmp_path / "launch_cost.json").read_text())["rows"] == saved["rows"][::-1]
    plot.plot(results, tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    assert "<th>idle</th><th>behind work</th><th>dispatcher</th><th>new shape</th>" in text
    assert "<td>4.0</td><td>3.5</td><td></td><td></td>" in text
    assert "T=1,hidden=4544</small></td><td>9.0</td><td>7.0</td><td>5.5</td><td>21.2</td>" in text
    assert f"octavo {saved['commit']}, torch {torch.__version__}" in text and "3.2 TB/s" in text
    path.unlink()
    plot.plot(results, tmp_path / "out")
    assert "What a call costs" not in (tmp_path / "out/index.html").read_text()


def test_panels_keep_decoding_and_prefill_apart():
    shapes = ("B=16,q=1,ctx=4096", "B=1,q=1,ctx=32768", "B=8,q=2048,ctx=2048", "B=1,q=1,ctx=1000")
    rows = [row(shape=f"{s},heads=32,window=0", provider=p) for s in shapes for p in ("octavo", "flashinfer")]
    decode, prefill = figures.panels(rows)
    assert (decode.axis, decode.ticks) == ("B x ctx", ["1x1000", "1x32k", "16x4k"])
    assert decode.title == "heads=32, q=1" and prefill.title == "heads=32, q=2048, ctx=2048"
    assert (prefill.axis, prefill.ticks) == ("B", ["8"])


def test_which_roofline():
    assert figures.over_bytes(list(norm_rows()))
    assert not figures.over_bytes(list(linear_rows()))
    assert figures.over_bytes([row(flops=0), row(flops=9)])  # nothing to place on a logarithmic axis


def test_looks_are_distinct_and_do_not_depend_on_the_op():
    names = ["octavo", "torch", "torch.compile", *(f"peer {i}" for i in range(10))]
    looks = figures.styles(names)
    assert len({(look.colour, look.hatch) for look in looks.values()}) == len(names)
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(names)
    assert figures.styles(["torch (bf16 weights)"])["torch (bf16 weights)"] == looks["torch"]
    attention = figures.styles(list(load("paged_attention").PROVIDERS))
    assert all(name.split(" (")[0] in figures._FIXED for name in attention)
