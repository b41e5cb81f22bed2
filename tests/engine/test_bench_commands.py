"""`octavo bench throughput`, `latency`, `sweep` and `python -m bench.engine_table`, with a tiny model on the CPU."""

import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import save_tiny_llama

from octavo.bench import engine_bench, engine_idle, engine_start, engine_table, sweep_figure
from octavo.bench.engine_bench import Bench, Setup
from octavo.bench.floors import Ceilings
from octavo.bench.workload import Lengths, Workload
from octavo.engine import cli

PEAKS = Ceilings({"read_bytes_per_s": 2e10, "gemm_fp32_flops_per_s": 1e11, "gemm_int8_ops_per_s": 1e11})
SMALL = ["--device", "cpu", "--max-model-len", "64", "--cache-tokens", "2048"]
find_ceilings = engine_bench.find_ceilings
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")


@pytest.fixture(autouse=True)
def _peaks(monkeypatch):
    """Those of this machine would be whatever was measured on it."""
    monkeypatch.setattr(engine_bench, "find_ceilings", lambda device, measure=False: PEAKS)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs `octavo bench …` in this process: status, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["octavo", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        seen = capfd.readouterr()
        return stopped.value.code or 0, seen.out, seen.err

    return call


def check_figures(result):
    """Figures that hold of every run."""
    assert result["completed"] and result["failed"] == 0 and result["seconds"] > 0
    assert result["output_tokens_per_s"] * result["seconds"] == pytest.approx(result["output_tokens"])
    assert result["total_tokens_per_s"] * result["seconds"] == pytest.approx(
        result["output_tokens"] + result["input_tokens"]
    )
    assert result["requests_per_s"] * result["seconds"] == pytest.approx(result["completed"])
    for name in LATENCIES:
        assert list(result[name]) == ["mean", "median", "p95", "p99"]
        assert 0 < result[name]["median"] <= result[name]["p95"] <= result[name]["p99"] <= result["seconds"] * 1e3
    peaks = result["peaks"]
    assert result["mfu"] == pytest.approx(result["model_flops_per_s"] / peaks["flops_per_s"])
    assert result["bandwidth_utilisation"] == pytest.approx(result["model_bytes_per_s"] / peaks["bytes_per_s"])
    assert 0 < result["mfu"] < 1 and 0 < result["bandwidth_utilisation"] < 1 and not peaks["note"]
    assert result["peak_memory_bytes"] > result["weight_bytes"] + result["cache_bytes"] > 0
    assert {"gpu", "torch", "triton", "commit", "date", "options", "start_seconds", "steps"} <= result.keys()


def test_throughput_of_random_weights(run):
    code, out, err = run(
        *("throughput", "--random-weights", "TINY", "--scheme", "int8", "--num-prompts", 5, "--request-rate", 200),
        *("--input-len", 20, "--output-len", 6, "--lengths", "uniform:0.5", "--seed", 3, "--warmup", 2, *SMALL),
    )
    assert code == 0, err
    result = json.loads(out)
    check_figures(result)
    assert (result["model"], result["weights"], result["scheme"], result["layers"]) == ("tiny", "random", "int8", 2)
    assert (result["lengths"], result["request_rate"], result["num_prompts"]) == ("uniform:0.5", 200, 5)
    requests = Workload(Lengths.parse("uniform:0.5", 20, 6), 5, 200.0, seed=3).requests(1, 512)  # 0 was the warm-up
    assert result["input_tokens"] == sum(len(r.prompt) for r in requests)
    assert result["output_tokens"] == sum(r.output for r in requests)
    assert result["prefix_cache_hit_rate"] == 0
    assert result["options"] == dict(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=64,
        cache_tokens=2048,
        page_size=16,
        enable_prefix_caching=True,
        enforce_eager=False,
        gpu_memory_utilization=0.9,
    )
    assert "TPOT" in err and "output and" in err and "MFU" in err


def test_latency_of_a_model_in_a_file(run, tmp_path):
    save_tiny_llama(tmp_path / "model")
    out_file = tmp_path / "made" / "latency.json"
    code, out, err = run(
        *("latency", "--model", tmp_path / "model", "--batch-size", 2, "--iterations", 3, "--warmup", 1),
        *("--input-len", 9, "--output-len", 5, "--out", out_file, *SMALL),
    )
    assert code == 0 and out == "", err
    result = json.loads(out_file.read_text())
    check_figures(result)
    assert (result["completed"], result["input_tokens"], result["output_tokens"]) == (6, 6 * 9, 6 * 5)
    assert result["weights"] == "the model's" and result["scheme"] is None and result["iterations"] == 3
    assert result["batch_ms"]["mean"] * 3 == pytest.approx(result["seconds"] * 1e3)
    assert result["e2el_ms"]["mean"] <= result["batch_ms"]["mean"] * (1 + 1e-6)


def test_sweep_writes_json_a_figure_and_a_page(run, tmp_path):
    code, out, err = run(
        *("sweep", "--random-weights", "tiny-mixture", "--batch-sizes", "1,3", "--rounds", 2),
        *("--input-len", 8, "--output-len", 4, "--out", tmp_path, *SMALL),
    )
    assert code == 0 and out == "", err
    at = tmp_path / "sweep_tiny-mixture_bf16.json"
    result = json.loads(at.read_text())
    assert [row["batch_size"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        count = 2 * row["batch_size"]
        assert (row["completed"], row["input_tokens"], row["output_tokens"]) == (count, count * 8, count * 4)
        assert row["floor_tpot_ms"] > 0
        check_figures(row | {k: v for k, v in result.items() if k != "rows"})
    assert result["b_star"] > 1 and result["reading_tpot_ms"] == pytest.approx(180) and "batch    3:" in err
    image = np.asarray(Image.open(at.with_suffix(".png")).convert("RGB")).astype(int)
    for colour in ("#0072B2", "#D55E00", "#009E73", "#8c8c8c"):  # measured, reading speed, B*, floor
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(image - wanted).max(-1) <= 30).sum() > 40, colour
    page = at.with_suffix(".html").read_text()
    assert "250 words a minute, at 1.33 tokens a word 5.6 tokens/s" in page
    assert f"B* = {result['b_star']:.0f}" in page and "data:image/png;base64," in page
    assert not re.search(r"<script|https?://|<link", page)
    assert sweep_figure.plane(result) == at.with_suffix(".png").read_bytes(), "the same result, the same bytes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput"], "model, random_weights: give one of them"),
        (["throughput", "--random-weights", "tiny", "--model", "smollm2"], "model, random_weights: give one of them"),
        (["latency", "--random-weights", "gpt-5"], "random weights: 'gpt-5'; there are shapes of Llama-3-8B"),
        (["latency", "--random-weights", "tiny", "--layers", "7"], "layers: 7; tiny has 1 to 2"),
        (["latency", "--model", "smollm2", "--scheme", "int4"], "scheme, layers: are for random weights"),
        (["throughput", "--random-weights", "tiny", "--lengths", "zipf"], "lengths: 'zipf'; expected fixed"),
        (["throughput", "--random-weights", "tiny", "--request-rate", "0"], "request_rate: 0.0; expected more"),
        (["throughput", "--random-weights", "tiny", "--num-prompts", "0"], "num_prompts: 0; expected at least 1"),
        (["throughput", "--random-weights", "tiny", "--max-num-seqs", "0"], "max_num_seqs: 0"),
        (["latency", "--random-weights", "tiny", "--iterations", "0", *SMALL, "--input-len", "9"], "iterations: 0"),
        (["latency", "--random-weights", "tiny", *SMALL], "1024 tokens and 128 more, but the context holds 64"),
        (["sweep", "--random-weights", "tiny", "--batch-sizes", "1,x"], "batch_sizes: '1,x'; expected numbers"),
        (["sweep", "--random-weights", "tiny", "--batch-sizes", "0", *SMALL], "batch_sizes: 0; expected at least 1"),
        (["sweep", "--random-weights", "tiny", "--batch-sizes", "300", *SMALL], "the engine takes 256 at once"),
        (["sweep", "--random-weights", "tiny", "--output-len", "1", *SMALL], "output_len: 1; expected at least 2"),
    ],
)
def test_mistakes_are_one_readable_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    assert message in err.strip().splitlines()[-1]


def test_unknown_peaks_are_named(monkeypatch):
    monkeypatch.setattr(engine_bench, "find_ceilings", lambda device, measure=False: Ceilings({}))
    bench = Bench(Setup(random_weights="tiny", layers=1, device="cpu", options=dict(cache_tokens=256)))
    result = engine_bench.sweep(bench, Workload(Lengths(4, 3)), [1])
    (row,) = result["rows"]
    assert row["mfu"] is row["bandwidth_utilisation"] is row["floor_tpot_ms"] is result["b_star"] is None
    assert row["model_flops_per_s"] > 0
    assert row["peaks"]["note"].startswith("unknown: GEMM peak in float32, bandwidth of reading; run python -m")
    page = sweep_figure.page(result, sweep_figure.plane(result))
    assert "No B*: unknown: GEMM peak in float32" in page


def test_peaks_are_measured_where_they_are_unknown_and_wanted(monkeypatch, tmp_path, capsys):
    def measure(arguments):
        assert arguments[:2] == ["--out", str(tmp_path)]
        print("a table")
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "ceilings.json").write_text(json.dumps(PEAKS.values))

    monkeypatch.setattr(engine_bench, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(engine_bench.ceilings, "main", measure)
    cpu = torch.device("cpu")
    assert find_ceilings(cpu).values == {}
    assert find_ceilings(cpu, measure=True) == PEAKS == find_ceilings(cpu)
    monkeypatch.delattr(engine_bench.ceilings, "main")
    assert find_ceilings(cpu, measure=True) == PEAKS, "not again"
    assert capsys.readouterr().out == "", "stdout is for JSON"


def test_prompts_that_begin_alike_are_found_in_the_cache(run):
    code, out, err = run(
        *("throughput", "--random-weights", "tiny", "--num-prompts", 4, "--warmup", 0, "--prefix-len", 40),
        *("--input-len", 8, "--output-len", 4, "--request-rate", 1, "--page-size", 8, *SMALL),
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["input_tokens"] == 4 * 48
    assert result["prefix_cache_hit_rate"] == 3 * 40 / (4 * 48)


# -------------------------------------------------------------------------------------------------------------- table


@pytest.fixture
def cells(monkeypatch):
    small = {
        "single": engine_table.Cell(1, 5, 4, "ms a token"),
        "b32": engine_table.Cell(3, 6, 4, "output tokens/s"),
        "1024/128": engine_table.Cell(512, 2, 2, "total tokens/s"),
    }
    monkeypatch.setattr(engine_table, "CELLS", small)
    monkeypatch.setattr(engine_table, "VLLM", {("tiny", "bf16"): ("cpu", {"single": 1.0, "b32": 50.0})})
    return small


def table(tmp_path, *arguments):
    code = engine_table.main(["--model", "tiny", *SMALL, "--out", str(tmp_path), *arguments])
    path = tmp_path / "cpu" / "engine.json"
    return code, json.loads(path.read_text())["rows"] if path.exists() else []


def test_the_table_has_a_row_a_cell_beside_vllms(cells, tmp_path, capsys):
    code, rows = table(tmp_path, "--cells", "single", "b32", "--repeats", "2")
    assert code == 0 and [row["cell"] for row in rows] == ["single", "b32"]
    single, batch = rows
    assert (single["unit"], single["vllm"], len(single["values"])) == ("ms a token", 1.0, 2)
    assert single["value"] == pytest.approx(sum(single["values"]) / 2)
    assert single["times_vllm"] == pytest.approx(1.0 / single["value"])
    assert batch["times_vllm"] == pytest.approx(batch["value"] / 50)
    assert (batch["num_prompts"], batch["output_tokens"], batch["model"], batch["scheme"]) == (3, 12, "tiny", "bf16")
    for row in rows:
        check_figures(row)
    assert capsys.readouterr().out.count("times vLLM's") == 4


def test_the_table_is_shown_as_markdown(cells, tmp_path, capsys):
    _, rows = table(tmp_path, "--cells", "single", "b32", "--repeats", "1")
    newer = rows[0] | {"commit": "later", "date": "9999", "value": 0.25, "times_vllm": 4.0}
    fewer = rows[1] | {"layers": 1, "value": 12345.6, "vllm": None}
    float8 = rows[0] | {"options": {"kv_cache_dtype": "fp8"}, "value": 0.5, "times_vllm": None}
    start = newer | {"cell": "first start", "model": "another", "value": 9.0}
    engine_table.merge(tmp_path / "cpu" / "engine.json", [newer, fewer, float8, start])
    capsys.readouterr()
    assert engine_table.main(["--show", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model, weights, GPU | single | b32 | 1024/128 |"
    assert lines[2].startswith("| tiny bf16, cpu | 0.25 (4.00x) | ") and lines[2].endswith("x) |  |")
    others = sorted(lines[3:])
    assert len(others) == 2 and others[0].startswith("| tiny bf16, 1 layers, cpu |  | 12,346")
    assert others[1].startswith("| tiny bf16, fp8 cache, cpu | 0.50 |")


def test_rows_of_other_keys_stay(cells, tmp_path):
    path = tmp_path / "cpu" / "engine.json"
    table(tmp_path, "--cells", "single", "--repeats", "1")
    (first,) = json.loads(path.read_text())["rows"]
    engine_table.merge(path, [first | {"commit": "before", "value": 7.0}, first | {"scheme": "fp8"}])
    _, rows = table(tmp_path, "--cells", "single", "--repeats", "1")
    assert [(row["commit"], row["scheme"]) for row in rows] == [
        (first["commit"], "bf16"),
        ("before", "bf16"),
        (first["commit"], "fp8"),
    ]
    assert rows[0]["date"] >= first["date"] and rows[1]["value"] == 7.0
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"engine\.json: not a file of the engine's results"):
        engine_table.merge(path, [first])


def test_a_cell_that_the_budget_has_no_time_for_is_left_out(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(engine_table.VLLM, ("tiny", "bf16"), ("cpu", {"b32": 12 / 4000}))  # 4000 s at vLLM's speed
    code, rows = table(tmp_path, "--cells", "b32", "single", "--repeats", "1", "--budget", "1000")
    assert code == 0 and [row["cell"] for row in rows] == ["single"]
    assert "b32: left out, needs about 4000 s" in capsys.readouterr().err
    assert table(tmp_path / "other", "--repeats", "2", "--budget", "0") == (0, [])


def test_loads_and_figures_of_the_cells():
    assert engine_table.CELLS["1024/128"].workload("Llama-3-8B").num_prompts == 512
    assert engine_table.CELLS["1024/128"].workload("Llama-2-70B").num_prompts == 384
    result = dict(seconds=2.0, output_tokens=256, output_tokens_per_s=128.0, total_tokens_per_s=192.0)
    values = {name: cell.value(result) for name, cell in engine_table.CELLS.items()}
    assert values == {"single": 7.8125, "b32": 128, "128/256": 128, "1024/128": 192}
    for name, cell in engine_table.CELLS.items():
        workload = cell.workload("Llama-3-8B")
        tokens = workload.num_prompts * cell.output_len
        tokens += workload.num_prompts * cell.input_len if name == "1024/128" else 0
        assert cell.seconds(workload, 4.0) == pytest.approx(256 * 0.004 if name == "single" else tokens / 4)


def test_vllms_figures_are_for_whole_models_on_the_gpu_that_they_were_taken_on():
    assert engine_table.vllm_value("Llama-3-8B", "bf16", 32, "single", "NVIDIA H100 80GB HBM3") == 6.46
    assert engine_table.vllm_value("Llama-2-70B", "int8", 80, "b32", "NVIDIA H200") == 1026
    for other in (
        ("Llama-3-8B", "bf16", 31, "single", "NVIDIA H100"),
        ("Llama-3-8B", "bf16", 32, "single", "NVIDIA H200"),
    ):
        assert engine_table.vllm_value(*other) is None
    assert engine_table.vllm_value("Mixtral-8x7B", "int4", 32, "b32", "NVIDIA H100") is None


def test_the_table_says_what_is_wrong(cells, tmp_path, capsys):
    assert table(tmp_path, "--repeats", "0") == (2, [])
    assert "engine_table: repeats: 0; expected at least 1" in capsys.readouterr().err


def test_the_figure_needs_a_time_per_token():
    with pytest.raises(ValueError, match="lengths: outputs of one token; expected at least 2"):
        sweep_figure.plane({"rows": [{"tpot_ms": None}]})


def test_the_figure_is_a_png_of_its_size(cells):
    bench = Bench(Setup(random_weights="tiny", layers=1, device="cpu", options=dict(cache_tokens=256)))
    png = sweep_figure.plane(engine_bench.sweep(bench, Workload(Lengths(3, 2)), [1]))
    assert Image.open(io.BytesIO(png)).size == (900, 560)


def test_a_run_of_which_nothing_was_completed_says_why(monkeypatch):
    bench = Bench(Setup(random_weights="tiny", layers=1, device="cpu", options=dict(cache_tokens=256)))

    def broken(step):
        raise MemoryError("out of memory")

    monkeypatch.setattr(bench.llm.runner, "start", broken)
    for command in (engine_bench.latency, lambda *load: engine_bench.sweep(*load, [1])):
        with pytest.raises(ValueError, match="no request was completed: request bench-0: MemoryError: out of memory"):
            command(bench, Workload(Lengths(3, 2)))


# -------------------------------------------------------------------------------------------------------------- start


def test_starts_are_processes_of_their_own_whose_phases_are_kept(tmp_path, capsys):
    arguments = [str(tmp_path / "model"), "--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
    options = ["--options", '{"cache_tokens": 256, "max_model_len": 64}']
    assert engine_start.main([*arguments, *options, "--starts", "2"]) == 0
    rows = engine_table.read(tmp_path / "out" / "cpu" / "engine.json")
    assert [(row["cell"], row["model"], row["layers"], row["unit"]) for row in rows] == [
        ("first start", "tiny", 2, "s"),
        ("second start", "tiny", 2, "s"),
    ]
    for row in rows:
        phases = [row[f"{name}_s"] for name in ("import", "open", "load", "kernels", "graphs")]
        assert min(phases) >= 0 and sum(phases) == pytest.approx(row["value"], abs=0.01)
        assert row["options"] == {"cache_tokens": 256, "max_model_len": 64} and row["first_token_s"] > 0
    printed = capsys.readouterr().out
    assert "written in" in printed and "second start: ready after" in printed and "loaded 0.00 GB" in printed
    assert engine_table.table(rows).count("\n") == 1, "starts are no cells"
    with pytest.raises(RuntimeError, match="a start failed with status 1"):
        engine_start.main([*arguments, "--options", '{"max_num_seqs": 0}', "--starts", "1"])


# --------------------------------------------------------------------------------------------------------------- idle


def test_the_time_between_steps(tmp_path, capsys):
    arguments = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    options = ["--options", '{"cache_tokens": 2048}', "--input-len", "5", "--output-len", "12"]
    assert engine_idle.main([*arguments, *options, "--batch", "6"]) == 0
    (row,) = engine_table.read(tmp_path / "cpu" / "engine_idle.json")
    assert (row["cell"], row["model"], row["pairs"]) == ("batch 6", "tiny", 10)
    assert 0 < row["value"] < 100 and 0 < row["gap_ms"]["median"] <= row["gap_ms"]["most"]
    assert 0 <= row["waited_ms_per_step"] < row["host_ms_per_step"], "on a CPU a step is over when it has started"
    assert "% of it between steps" in capsys.readouterr().out
    assert engine_idle.main([*arguments, *options[:-1], "2", "--batch", "6"]) == 2
    assert "no two steps in a row" in capsys.readouterr().err


def test_gaps_are_between_steps_of_the_whole_batch():
    class At:
        def __init__(self, seconds):
            self.seconds = seconds

        def until(self, later):
            return later.seconds - self.seconds

    whole, half, prompt = (engine_idle.Shape(n, n, decode) for n, decode in ((4, True), (2, True), (4, False)))
    steps = [(prompt, 0, 9), (whole, 10, 19), (whole, 20, 28), (whole, 30, 39), (half, 40, 45), (half, 50, 51)]
    between, seconds = engine_idle.gaps([(shape, At(begin), At(end)) for shape, begin, end in steps], 4)
    assert between == [1, 2] and seconds == 20
