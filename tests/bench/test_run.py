"""The command from end to end on a CPU: processes, crashes, files, tables, two versions of octavo."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from octavo.bench import children, peers, run, store, worker
from octavo.bench.report import PlainView, Table, result_tables, show
from octavo.bench.worker import Case, Job

ROOT = Path(__file__).parents[2]

BENCHMARK = """
import os
import torch
import octavo
from octavo.bench.harness import Provider

OP, DTYPES = "half", (torch.float32,)
BOTH = ("cpu", "cuda")

def shapes():
    return [{"T": 4}, {"T": 8}]

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
    assert {shape for _, shape in rows} == {"T=4", "T=8"}
    for shape in ("T=4", "T=8"):
        assert float(rows["octavo", shape]["median_us"]) > 0
        assert rows["torch", shape]["median_us"] == "" and rows["torch", shape]["note"].startswith("wrong: largest")
        assert rows["ghost", shape]["note"] == "not installed" and rows["ghost", shape]["median_us"] == ""
        assert float(rows["here", shape]["p80_us"]) > 0
        assert rows["here", shape]["provider_version"] == __import__("numpy").__version__
        assert rows["octavo", shape]["octavo_us"] == rows["octavo", shape]["median_us"]
        assert float(rows["here", shape]["octavo_us"]) > 0 and rows["torch", shape]["octavo_us"] == ""
    assert float(rows["crash", "T=4"]["median_us"]) > 0
    assert rows["crash", "T=8"]["note"] == "the process died: SIGABRT"
    assert ("gpu only", "T=4") not in rows
    assert rows["octavo", "T=8"]["bytes"] == "64" and rows["crash", "T=8"]["flops"] == "8"
    assert "half on cpu" in printed.out and "SIGABRT" in printed.err
    assert re.search(r"^octavo, torch: start-up \d+ s, half \d+ s$", printed.err, re.M)
    assert re.search(r"^present: start-up \d+ s, half \d+ s$", printed.err, re.M)


def test_a_selection_and_a_shape_that_is_not_listed(benchmark, tmp_path):
    """octavo is timed beside what is asked for, so that there is something to compare with, and gets no row."""
    selection = ["--shapes", "T=4", "T=5", "--provider", "crash", "--dtype", "float16", "--rounds", "2"]
    assert run.main(["--op", benchmark, *selection, "--out", str(tmp_path)]) == 0
    rows = lines(tmp_path / "cpu/half.csv")
    assert set(rows) == {("crash", "T=4"), ("crash", "T=5")}
    assert {row["dtype"] for row in rows.values()} == {"float16"}
    assert all(float(row["octavo_us"]) > 0 for row in rows.values())


def test_inputs_that_crash_lose_their_case_alone(tmp_path, capsys):
    path = tmp_path / "bench_bad.py"
    path.write_text(
        BENCHMARK
        + "PROVIDERS = {'octavo': Provider(half, devices=BOTH), 'torch': Provider(third, devices=BOTH)}\n"
        + "def exact(inputs):\n    return os.abort() if len(inputs['x']) == 4 else inputs['x'].double() / 2\n"
    )
    assert run.main(["--op", str(path), "--out", str(tmp_path), "--rounds", "2"]) == 1
    assert {shape for _, shape in lines(tmp_path / "cpu/half.csv")} == {"T=8"}
    assert "half T=4 float32: the process died: SIGABRT" in capsys.readouterr().err


def test_who_crashes_twice_is_left_out_of_the_op(monkeypatch):
    def crash(provider, shape):
        return {"op": "half", "dtype": "float32", "shape": shape, "provider": provider, "note": "", "finished": []}

    deaths, jobs, events = [crash("a", "T=1"), crash("b", "T=2"), crash("a", "T=2"), None], [], []
    monkeypatch.setattr(children, "_one_process", lambda job, *_: (jobs.append(job), deaths.pop(0))[1])
    children.follow(Job(["half"], names=["a", "b"]), [], ROOT, events.append)
    first, second = ("half", "a", "T=1", "float32"), ("half", "b", "T=2", "float32")
    third = ("half", "a", "T=2", "float32")
    assert [job.skip for job in jobs] == [[], [first], [first, second], [first, second, third, ("half", "a", "", "")]]
    assert [event["event"] for event in events] == ["begin", "row"] * 3 + ["begin"]


def test_a_child_that_cannot_start(benchmark, tmp_path):
    (tmp_path / "octavo").mkdir()
    (tmp_path / "octavo/__init__.py").write_text("raise ImportError('broken here')")
    with pytest.raises(children.ChildFailed, match="exit status 1:\\n(.*\\n)*ImportError: broken here"):
        children.follow(Job([benchmark]), [str(tmp_path)], tmp_path, lambda event: None)


HELLO = {"event": "hello", "gpu": "cpu", "torch": "1", "triton": "2", "cache": 0}
EVENT = {"event": "row", "op": "half", "shape": "T=4", "dtype": "float32", "version": "", "note": "", "anchor": False}


def times(us):
    return {"median_us": us, "p20_us": us, "p80_us": us}


@pytest.mark.parametrize(("provider", "failed"), [("octavo", True), ("torch", False)])
def test_octavo_without_a_time_fails_the_run(provider, failed, tmp_path, capsys):
    recorded = run.Run(Job([]), tmp_path, {}, PlainView())
    recorded._on_event(HELLO)
    recorded._on_event({**EVENT, "provider": provider, "times": None, "note": "wrong: isnan"})
    assert recorded.failed is failed
    assert f"half T=4 float32, {provider}: wrong: isnan" in capsys.readouterr().err


@pytest.mark.parametrize(("provider", "failed"), [("octavo", True), ("torch", False)])
def test_octavo_without_a_graph_fails_the_run(provider, failed, tmp_path, capsys):
    recorded = run.Run(Job([]), tmp_path, {}, PlainView())
    recorded._on_event(HELLO)
    recorded._on_event({**EVENT, "provider": provider, "times": times(5.0), "note": "no graph"})
    assert recorded.failed is failed
    assert ("half T=4 float32, octavo: no graph" in capsys.readouterr().err) is failed
    assert recorded.rows[0].median_us == 5.0


@pytest.mark.parametrize(
    ("us", "touched", "noted"),
    [(0.86, 200, True), (0.88, 200, False), (0.86, 100, False)],
    ids=["from the cache", "15 % are allowed", "tiny"],
)
def test_a_time_that_memory_does_not_allow_is_noted(us, touched, noted, tmp_path):
    """3 MB at 3 TB/s take 1 µs, 0.87 µs with the allowance; the cache holds 100 bytes."""
    recorded = run.Run(Job([]), tmp_path, {}, PlainView())
    (tmp_path / "H100").mkdir()
    (tmp_path / "H100/ceilings.json").write_text('{"read_bytes_per_s": 3e12}')
    recorded._on_event({**HELLO, "gpu": "H100", "cache": 100})
    row = {**EVENT, "provider": "torch", "times": times(us), "bytes": 3_000_000, "touched": touched}
    recorded._on_event({**row, "note": "packed before"})
    (saved,) = store.read(tmp_path / "H100/half.csv")
    assert saved.median_us == us
    assert saved.note == "packed before" + ("; " + run.CACHED if noted else "")


def test_octavo_is_timed_beside_its_peers_and_drift_is_noted(benchmark, tmp_path):
    recorded = run.Run(Job([benchmark]), tmp_path, {}, PlainView())
    for group, octavo_us, note in (("first", 10.2, ""), ("second", 12.0, "octavo took 1.20x here")):
        recorded._group = run.BASE_GROUP
        recorded._on_event(HELLO)
        recorded._on_event({**EVENT, "provider": "octavo", "times": times(10.0)})
        recorded._group = group
        recorded._on_event({**EVENT, "provider": "octavo", "anchor": True, "times": times(octavo_us)})
        recorded._on_event({**EVENT, "provider": group, "times": times(7.0), "octavo_us": octavo_us})
        saved = {r.provider: r for r in store.read(tmp_path / "cpu/half.csv")}
        assert saved[group].note == note and saved[group].octavo_us == octavo_us
        assert saved["octavo"].median_us == 10.0
    # where octavo has no time beside a peer, nothing is known about this case's drift
    recorded._on_event({**EVENT, "event": "start"})
    recorded._on_event({**EVENT, "provider": "third", "times": times(7.0)})
    (third,) = (r for r in store.read(tmp_path / "cpu/half.csv") if r.provider == "third")
    assert third.note == "" and third.speed_up is None


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
    assert run.main(["--op", "rms_norm", "--budget", "0"]) == 2
    assert run.main(["--op", "rms_norm", "--budget", "9", "--base", "HEAD"]) == 2
    capsys.readouterr()
    assert run.main(["--op", "relu2", "--peer-site", "vlm=."]) == 2
    assert "peer-site: 'vlm'; expected one of flashinfer, vllm, triton-peers" in capsys.readouterr().err
    run.check_job(Job(["relu2"]), ["flashinfer"])  # a group that another op has peers of


def cases_of(**counts):
    return [Case(SimpleNamespace(OP=op), {"T": t}, torch.float32, {}, {}) for op, n in counts.items() for t in range(n)]


@pytest.mark.parametrize(
    ("budget", "ran", "late"),
    [
        (float("inf"), ["a0", "a1", "a2", "a3", "b0", "b1"], []),
        (60, ["a0", "a1", "a2", "a3", "b0", "b1"], []),
        (40, ["a0", "a1", "b0", "b1"], ["a2", "a3"]),
        (50, ["a0", "a1", "a2", "b0", "b1"], ["a3"]),
        (15, ["a0", "b0"], ["a1", "a2", "a3", "b1"]),
        (-1, [], ["a0", "a1", "a2", "a3", "b0", "b1"]),
    ],
)
def test_a_budget_is_shared_among_ops(budget, ran, late, monkeypatch):
    """Cases of ten seconds each."""
    clock = [1000.0]
    monkeypatch.setattr(worker.time, "time", lambda: clock[0])
    done, left = [], []
    for case in worker.in_time(cases_of(a=4, b=2), 1000.0 + budget, left.extend):
        done.append(f"{case.name['op']}{case.shape['T']}")
        clock[0] += 10
    assert sorted(done) == ran and [f"{c['op']}{c['shape'][2:]}" for c in left] == late


def test_a_budget_is_shared_among_groups_and_what_is_left_is_listed(benchmark, tmp_path, monkeypatch, capsys):
    clock, parts = [1000.0], {}

    def follow(job, folders, tree, on_event):
        parts[job.group] = job.deadline - clock[0]
        on_event({"event": "late", "cases": [{"op": "half"}] * 2 + [{"op": "relu2"}]})
        clock[0] += 10

    monkeypatch.setattr(run, "follow", follow)
    monkeypatch.setattr(run.time, "time", lambda: clock[0])
    monkeypatch.setattr(peers, "importable", lambda group, loaded: True)
    assert run.main(["--op", benchmark, "--budget", "90", "--out", str(tmp_path)]) == 0
    assert parts == {None: 30, "ghosts": 40, "present": 70}
    late = "2 of half, 1 of relu2"
    assert f"no time for octavo, torch: {late}; ghosts: {late}; present: {late}\n" in capsys.readouterr().out


def test_a_child_begins_nothing_after_the_deadline(benchmark):
    events = []
    worker.work(Job([benchmark], deadline=1.0), lambda event, **values: events.append((event, values)))
    assert [event for event, _ in events] == ["hello", "plan", "late", "end"]
    assert [case["shape"] for case in events[2][1]["cases"]] == ["T=4", "T=8"]


ROW = store.Row(
    *("rms_norm", "octavo", "T=1,hidden=64", "bfloat16", "NVIDIA H100", "2.11", "3.6", "0.1", "abc", "2026-01-01"),
    *(1.5, 1.25, 1.75, 1.5, 64, 256, ""),
)


def test_results_accumulate_and_are_replaced(tmp_path):
    path = tmp_path / store.folder_name("NVIDIA H100") / "rms_norm.csv"
    no_times = dict(median_us=None, p20_us=None, p80_us=None, octavo_us=None)
    wrong = replace(ROW, provider="torch", **no_times, note='wrong: "x", y')
    store.write(path, [ROW, wrong])
    assert path.read_text().splitlines()[0] == (
        "op,provider,shape,dtype,gpu,torch,triton,provider_version,commit,date,"
        "median_us,p20_us,p80_us,octavo_us,flops,bytes,note"
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
    slow = replace(ROW, provider="torch", median_us=3.0, octavo_us=1.2)  # what octavo took in torch's process
    computing = replace(ROW, op="int4_linear", flops=10**9, bytes=10**6, median_us=10.0)
    absent = replace(slow, provider="peer", median_us=None, note="not installed")
    tables = {t.title: t.rows for t in result_tables([slow, ROW, absent, computing])}
    assert tables["rms_norm on NVIDIA H100"] == [
        ["T=1,hidden=64 bfloat16", "torch", "3.00", "1.25", "1.75", "0.0853 GB/s", "2.50x", ""],
        ["T=1,hidden=64 bfloat16", "octavo", "1.50", "1.25", "1.75", "0.171 GB/s", "", ""],
        ["T=1,hidden=64 bfloat16", "peer", "", "", "", "", "", "not installed"],
    ]
    assert tables["int4_linear on NVIDIA H100"][0][5] == "100 TFLOP/s"
    show(Table("title", ("shape", "provider", "µs"), [("T=1", "octavo", "1.5")]))
    assert capsys.readouterr().out == "title\n  shape  provider  µs\n  T=1    octavo    1.5\n"


def test_the_octavo_command(tmp_path):
    CliRunner = pytest.importorskip("typer.testing").CliRunner
    from octavo.engine.cli import app

    command = ["bench", "kernels", "--op", "relu2", "--shapes", "T=2,intermediate=64", "--rounds", "2"]
    command += ["--dtype", "float32", "--peer-site", f"flashinfer={tmp_path}"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "relu2 on cpu" in done.output
    row = lines(tmp_path / "cpu/relu2.csv")["octavo", "T=2,intermediate=64"]
    assert float(row["median_us"]) > 0 and row["dtype"] == "float32"
    wrong = CliRunner().invoke(app, [*command, "--peer-site", f"vlm={tmp_path}"])
    assert isinstance(wrong.exception, ValueError) and "'vlm'" in str(wrong.exception)
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
    job = replace(job, deadline=12.5)
    assert Job.from_json(json.dumps(json.loads(job.to_json()))) == job


def test_a_group_counts_as_present_when_one_of_its_packages_is(benchmark):
    loaded = [run.load(benchmark)]
    assert peers.groups(loaded) == ["ghosts", "present"]
    assert peers.importable("present", loaded)
