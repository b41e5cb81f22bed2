"""The command from end to end on a CPU: processes, crashes, files, tables, two versions of octavo."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.bench import children, compare, peers, run, store
from octavo.bench.compare import Sample
from octavo.bench.report import PlainView, Table, result_tables, show
from octavo.bench.timing import Times
from octavo.bench.worker import Job

ROOT = Path(__file__).parents[2]

BENCHMARK = """
import os
import torch
import octavo
from octavo.bench.harness import Provider

OP, DTYPES = "half", (torch.float32,)
BOTH = ("cpu", "cuda")

def shapes():
    return [{"T": 4}, {"T": 8}, {"T": 16}]

def inputs(shape, dtype, device, generator):
    return {"x": torch.randn(shape["T"], dtype=dtype, device=device, generator=generator)}

def exact(inputs):
    return inputs["x"].double() / 2

def flops(shape):
    return shape["T"]

def bytes_moved(shape, dtype):
    return 2 * shape["T"] * dtype.itemsize

def half(inputs):
    return lambda: inputs["x"] / 2

def third(inputs):
    return lambda: inputs["x"] / 3

def crash(inputs):
    return (lambda: os.abort()) if len(inputs["x"]) >= 8 else half(inputs)

PROVIDERS = {
    "octavo": Provider(half, devices=BOTH),
    "torch": Provider(third, devices=BOTH),
    "crash": Provider(crash, devices=BOTH),
    "ghost": Provider(half, peer="ghosts", devices=BOTH, package="no-such-package-here"),
    "here": Provider(half, peer="present", devices=BOTH, package="numpy"),
    "gpu only": Provider(half, peer="ghosts", package="no-such-package-here"),
}
"""


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """The children measure the CPU, whatever this machine has; octavo's own backend serves it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def benchmark(tmp_path):
    path = tmp_path / "bench_half.py"
    path.write_text(BENCHMARK)
    return str(path)


def lines(path):
    with path.open(newline="") as file:
        return {(row["provider"], row["shape"]): row for row in csv.DictReader(file)}


def test_a_run_with_wrong_missing_and_crashing_providers(benchmark, tmp_path, capsys):
    status = run.main(["--op", benchmark, "--rounds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    rows = lines(tmp_path / "cpu/half.csv")
    assert status == 0, printed
    assert {shape for _, shape in rows} == {"T=4", "T=8", "T=16"}
    for shape in ("T=4", "T=8", "T=16"):
        assert float(rows["octavo", shape]["median_us"]) > 0
        assert rows["torch", shape]["median_us"] == "" and rows["torch", shape]["note"].startswith("wrong: largest")
        assert rows["ghost", shape]["note"] == "not installed" and rows["ghost", shape]["median_us"] == ""
        assert float(rows["here", shape]["p80_us"]) > 0
        assert rows["here", shape]["provider_version"] == __import__("numpy").__version__
    assert float(rows["crash", "T=4"]["median_us"]) > 0
    assert rows["crash", "T=8"]["note"] == rows["crash", "T=16"]["note"] == "the process died: SIGABRT"
    assert ("gpu only", "T=4") not in rows
    assert rows["octavo", "T=8"]["bytes"] == "64" and rows["crash", "T=8"]["flops"] == "8"
    assert "half on cpu" in printed.out and "SIGABRT" in printed.err


def test_a_selection_and_a_shape_that_is_not_listed(benchmark, tmp_path):
    selection = ["--shapes", "T=8", "T=5", "--provider", "octavo", "--dtype", "float16"]
    assert run.main(["--op", benchmark, *selection, "--out", str(tmp_path)]) == 0
    rows = lines(tmp_path / "cpu/half.csv")
    assert set(rows) == {("octavo", "T=8"), ("octavo", "T=5")}
    assert {row["dtype"] for row in rows.values()} == {"float16"}


def test_inputs_that_crash_lose_their_case_alone(tmp_path, capsys):
    path = tmp_path / "bench_bad.py"
    path.write_text(
        BENCHMARK
        + "PROVIDERS = {'octavo': Provider(half, devices=BOTH), 'torch': Provider(third, devices=BOTH)}\n"
        + "def exact(inputs):\n    return os.abort() if len(inputs['x']) == 8 else inputs['x'].double() / 2\n"
    )
    assert run.main(["--op", str(path), "--out", str(tmp_path), "--rounds", "2"]) == 1
    assert {shape for _, shape in lines(tmp_path / "cpu/half.csv")} == {"T=4", "T=16"}
    assert "half T=8 float32: the process died: SIGABRT" in capsys.readouterr().err


def test_a_child_that_cannot_start(benchmark, tmp_path):
    (tmp_path / "octavo").mkdir()
    (tmp_path / "octavo/__init__.py").write_text("raise ImportError('broken here')")
    with pytest.raises(children.ChildFailed, match="exit status 1:\\n(.*\\n)*ImportError: broken here"):
        children.follow(Job([benchmark]), [str(tmp_path)], tmp_path, lambda event: None)


@pytest.mark.parametrize(("provider", "failed"), [("octavo", True), ("torch", False)])
def test_octavo_without_a_time_fails_the_run(provider, failed, tmp_path, capsys):
    recorded = run.Run(Job([]), tmp_path, {}, PlainView())
    recorded._on_event({"event": "hello", "gpu": "cpu", "torch": "1", "triton": "2"})
    row = {"op": "half", "shape": "T=4", "dtype": "float32", "version": "", "anchor": False, "times": None}
    recorded._on_event({**row, "event": "row", "provider": provider, "note": "wrong: isnan"})
    assert recorded.failed is failed
    assert f"half T=4 float32, {provider}: wrong: isnan" in capsys.readouterr().err


def test_octavo_is_timed_beside_its_peers_and_drift_is_noted(benchmark, tmp_path):
    recorded = run.Run(Job([benchmark]), tmp_path, {}, PlainView())
    hello = {"event": "hello", "gpu": "cpu", "torch": "1", "triton": "2"}
    row = {"event": "row", "op": "half", "shape": "T=4", "dtype": "float32", "version": "", "note": "", "anchor": False}

    def times(us):
        return {"median_us": us, "p20_us": us, "p80_us": us}

    for group, octavo_us, note in (("first", 10.2, ""), ("second", 12.0, "octavo took 1.20x here")):
        recorded._group = run.BASE_GROUP
        recorded._on_event(hello)
        recorded._on_event({**row, "provider": "octavo", "times": times(10.0)})
        recorded._group = group
        recorded._on_event({**row, "provider": "octavo", "anchor": True, "times": times(octavo_us)})
        recorded._on_event({**row, "provider": group, "times": times(7.0)})
        saved = {r.provider: r for r in store.read(tmp_path / "cpu/half.csv")}
        assert saved[group].note == note
        assert saved["octavo"].median_us == 10.0


def test_an_ordinary_run_in_a_process_of_its_own(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.run", "--op", "rms_norm", "--shapes", "T=3,hidden=64", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path / "cpu/rms_norm.csv")
    assert float(rows["octavo", "T=3,hidden=64"]["median_us"]) > 0
    assert float(rows["torch", "T=3,hidden=64"]["median_us"]) > 0
    assert rows["octavo", "T=3,hidden=64"]["commit"] == store.commit()
    assert "rms_norm on cpu" in done.stdout and "octavo is" in done.stdout


def test_list_and_mistakes(capsys):
    assert run.main(["--op", "rms_norm", "--list"]) == 0
    assert "T=1,hidden=4096" in capsys.readouterr().out
    assert run.main(["--op", "no_such_op"]) == 2
    assert "'no_such_op' has no benchmark" in capsys.readouterr().err
    assert run.main(["--op", "rms_norm", "--peer-site", "vllm"]) == 2
    assert run.main(["--op", "rms_norm", "--shapes", "T=64,"]) == 2
    assert "'T=64,'" in capsys.readouterr().err
    assert run.main(["--op", "rms_norm", "--provider", "numpy"]) == 2
    assert "provider: 'numpy'; expected one of octavo, torch" in capsys.readouterr().err
    assert run.main(["--op", "rms_norm", "--dtype", "randn"]) == 2
    assert run.main(["--op", "rms_norm", "--rounds", "0"]) == 2


ROW = store.Row(
    *("rms_norm", "octavo", "T=1,hidden=64", "bfloat16", "NVIDIA H100", "2.11", "3.6", "0.1", "abc", "2026-01-01"),
    *(1.5, 1.25, 1.75, 64, 256, ""),
)


def test_results_accumulate_and_are_replaced(tmp_path):
    path = tmp_path / store.folder_name("NVIDIA H100") / "rms_norm.csv"
    wrong = replace(ROW, provider="torch", median_us=None, p20_us=None, p80_us=None, note='wrong: "x", y')
    store.write(path, [ROW, wrong])
    assert path.read_text().splitlines()[0] == (
        "op,provider,shape,dtype,gpu,torch,triton,provider_version,commit,date,median_us,p20_us,p80_us,flops,bytes,note"
    )
    assert store.read(path) == [ROW, wrong]
    faster, other = replace(ROW, median_us=1.0, date="2026-01-02"), replace(ROW, commit="def")
    store.write(path, [faster, other])
    assert store.read(path) == [faster, wrong, other]
    path.write_text("op,provider\n")
    with pytest.raises(ValueError, match="columns"):
        store.write(path, [ROW])
    assert list(path.parent.iterdir()) == [path]


def test_what_names_the_measured_octavo(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a", *args], check=True)

    monkeypatch.delenv("OCTAVO_COMMIT", raising=False)
    assert store.commit(tmp_path).startswith("v")
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/a.csv").write_text("1")
    (tmp_path / "kernel.py").write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    clean = store.commit(tmp_path)
    assert len(clean) == 12
    assert store.commit(tmp_path / "bench").startswith("v"), "a folder of another project's checkout"
    (tmp_path / "bench/results/a.csv").write_text("2")
    assert store.commit(tmp_path) == clean
    (tmp_path / "kernel.py").write_text("2")
    assert store.commit(tmp_path) == clean + "-dirty"
    monkeypatch.setenv("OCTAVO_COMMIT", "0123")
    assert store.commit(tmp_path) == "0123"


def test_tables(capsys):
    slow = replace(ROW, provider="torch", median_us=3.0)
    computing = replace(ROW, op="int4_linear", flops=10**9, bytes=10**6, median_us=10.0)
    absent = replace(slow, provider="peer", median_us=None, note="not installed")
    tables = {t.title: t.rows for t in result_tables([slow, ROW, absent, computing])}
    assert tables["rms_norm on NVIDIA H100"] == [
        ["T=1,hidden=64 bfloat16", "torch", "3.00", "1.25", "1.75", "0.0853 GB/s", "2.00x", ""],
        ["T=1,hidden=64 bfloat16", "octavo", "1.50", "1.25", "1.75", "0.171 GB/s", "", ""],
        ["T=1,hidden=64 bfloat16", "peer", "", "", "", "", "", "not installed"],
    ]
    assert tables["int4_linear on NVIDIA H100"][0][5] == "100 TFLOP/s"
    show(Table("title", ("shape", "provider", "µs"), [("T=1", "octavo", "1.5")]))
    assert capsys.readouterr().out == "title\n  shape  provider  µs\n  T=1    octavo    1.5\n"


CASE = ("rms_norm", "T=1", "bfloat16")


def sample(median, spread=0.01, case=CASE):
    return Sample(case, Times(median, median * (1 - spread), median * (1 + spread)))


@pytest.mark.parametrize(
    ("old", "new", "regression", "note"),
    [
        ([10.0, 10.1], [11.0, 11.1], True, "slower"),
        ([10.0, 10.1], [10.3, 10.4], False, ""),
        ([10.0, 10.1], [10.0, 9.0], False, ""),
        ([11.0, 11.1], [10.0, 10.1], False, ""),
    ],
)
def test_a_regression_of_ten_percent_is_caught_and_three_are_not(old, new, regression, note):
    (found,) = compare.compare(map(sample, old), map(sample, new))
    assert (found.regression, found.note) == (regression, note)
    assert found.ratio == pytest.approx(sum(new) / sum(old))


def test_a_difference_within_the_noise_is_no_regression():
    (found,) = compare.compare([sample(10.0, 0.08)], [sample(11.0, 0.08)])
    assert not found.regression and found.note == "within the noise"
    (found,) = compare.compare([sample(10.0)], [sample(10.3)], threshold=0.02)
    assert found.regression


def test_a_case_that_has_lost_its_time_is_a_regression():
    wrong = Sample(CASE, None, "wrong: isnan")
    (found,) = compare.compare([sample(1.0)], [sample(1.0), wrong])
    assert found.regression and found.note == "new: wrong: isnan"
    (found,) = compare.compare([wrong], [sample(1.0)])
    assert not found.regression and found.note == "old: wrong: isnan"
    (found,) = compare.compare([], [sample(1.0)])
    assert not found.regression and found.note == "old: not measured"


@pytest.fixture
def slow_copy(tmp_path):
    """A checkout whose rms_norm waits for 2 ms."""
    for name in ("octavo", "kernels", "reference"):
        shutil.copytree(ROOT / name, tmp_path / "slow" / name, symlinks=True)
    path = tmp_path / "slow/reference/norm.py"
    text = path.read_text()
    start = text.index("    ", text.index("def rms_norm("))
    body = text.index('"""', text.index('"""', start) + 3) + 3 if '"""' in text[start:] else start
    path.write_text(text[:body] + "\n    __import__('time').sleep(2e-3)\n" + text[body:])
    return tmp_path / "slow"


def test_two_versions_are_compared(slow_copy, tmp_path, capsys, monkeypatch):
    assert compare.REPEATS >= 2
    monkeypatch.setattr(compare, "REPEATS", 1)
    job = Job(["rms_norm"], shapes=["T=3,hidden=64"], rounds=5)
    before = sorted(slow_copy.rglob("*"))
    slow = compare.shadow(slow_copy, tmp_path / "links")
    old, new = compare.measure_trees(store.ROOT, slow, job, PlainView())
    assert len(old) == len(new) == 1
    (found,) = compare.compare(old, new)
    assert found.regression and found.ratio > 5 and found.new.median_us > 2000
    assert [p for p in sorted(slow_copy.rglob("*")) if "__pycache__" not in p.parts] == before
    capsys.readouterr()


def test_a_commit_is_compared_with_the_working_tree(capsys, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    monkeypatch.setattr(compare, "REPEATS", 1)
    status = run.main(["--base", "HEAD", "--op", "rms_norm", "--shapes", "T=3,hidden=64", "--rounds", "30"])
    printed = capsys.readouterr().out
    assert status in (0, 1) and "octavo now against HEAD" in printed and "T=3,hidden=64 bfloat16" in printed
    trees = subprocess.run(["git", "-C", ROOT, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert "octavo-base-" not in trees
    assert run.main(["--base", "no-such-commit", "--op", "rms_norm"]) == 2


def test_the_octavo_command(tmp_path):
    CliRunner = pytest.importorskip("typer.testing").CliRunner
    from octavo.engine.cli import app

    command = ["bench", "kernels", "--op", "relu2", "--shapes", "T=2,intermediate=64", "--rounds", "2"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "relu2 on cpu" in done.output
    assert float(lines(tmp_path / "cpu/relu2.csv")["octavo", "T=2,intermediate=64"]["median_us"]) > 0
    assert CliRunner().invoke(app, ["bench", "--help"]).exit_code == 0


@pytest.mark.gpu
def test_a_lost_gpu_is_noticed(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    path = tmp_path / "bench_half.py"
    path.write_text(
        BENCHMARK
        + "def out_of_range(inputs):\n    return lambda: inputs['x'][torch.tensor([10**9], device='cuda')]\n"
        + "PROVIDERS = {'octavo': Provider(half), 'lost': Provider(out_of_range), 'torch': Provider(half)}\n"
    )
    assert run.main(["--op", str(path), "--rounds", "2", "--out", str(tmp_path), "--shapes", "T=4"]) == 0
    rows = lines(tmp_path / store.folder_name(torch.cuda.get_device_name()) / "half.csv")
    assert float(rows["octavo", "T=4"]["median_us"]) > 0 and float(rows["torch", "T=4"]["median_us"]) > 0
    assert "CUDA error" in rows["lost", "T=4"]["note"]


def test_a_job_survives_its_file():
    job = Job(["a"], "g", ["n"], skip=[("a", "p", "", "")], finished=[("a", "T=1", "float32")])
    assert Job.from_json(json.dumps(json.loads(job.to_json()))) == job


def test_a_group_counts_as_present_when_one_of_its_packages_is(benchmark):
    loaded = [run.load(benchmark)]
    assert peers.groups(loaded) == ["ghosts", "present"]
    assert peers.importable("present", loaded)
