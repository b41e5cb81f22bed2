"""Two versions of octavo, held against each other."""

import shutil
import statistics
import subprocess
from functools import partial
from pathlib import Path

import pytest

from octavo.bench import compare, run, store
from octavo.bench.children import ChildFailed, follow
from octavo.bench.compare import Sample
from octavo.bench.report import PlainView
from octavo.bench.timing import Times
from octavo.bench.worker import Job

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    """The children measure the CPU, whatever this machine has."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


CASE = ("rms_norm", "T=1", "bfloat16")


def sample(median):
    return Sample(CASE, Times(median, median * 0.99, median * 1.01))


@pytest.mark.parametrize(
    ("old", "new", "regression", "note"),
    [
        ([10.0, 10.1], [11.0, 11.1], True, "slower"),
        ([10.0, 10.1], [10.3, 10.4], False, ""),
        ([10.0, 10.1], [10.0, 9.0], False, ""),
        ([11.0, 11.1], [10.0, 10.1], False, ""),
        ([10.0, 10.1, 11.2], [11.0, 11.1, 11.3], False, "within the noise"),
        ([10.0, 10.1, 10.2], [10.1, 11.1, 11.3], False, "within the noise"),
    ],
)
def test_a_regression_of_ten_percent_is_caught_and_three_are_not(old, new, regression, note):
    (found,) = compare.compare(map(sample, old), map(sample, new))
    assert (found.regression, found.note) == (regression, note)
    assert found.ratio == pytest.approx(statistics.median(new) / statistics.median(old))
    assert found.old == old and found.new == new


def test_another_threshold():
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


def test_the_other_tree_is_what_is_measured(slow_copy, tmp_path):
    before = sorted(p for p in slow_copy.rglob("*") if "__pycache__" not in p.parts)
    slow, samples = compare.shadow(slow_copy, tmp_path / "links"), []
    job = Job(["rms_norm"], names=["octavo"], shapes=["T=3,hidden=64"], rounds=5)
    follow(job, [], slow, partial(compare._collect, samples, "old", slow, PlainView()))
    (found,) = samples
    assert found.case == ("rms_norm", "T=3,hidden=64", "bfloat16") and 2000 < found.times.median_us < 20_000
    assert [p for p in sorted(slow_copy.rglob("*")) if "__pycache__" not in p.parts] == before
    with pytest.raises(ChildFailed, match="imported octavo from"):
        compare._collect([], "new", ROOT, PlainView(), {"event": "hello", "octavo": str(slow / "octavo/__init__.py")})


@pytest.mark.parametrize(
    ("now", "status", "said"),
    [
        ((10.2, 10.1, 10.3), 0, "0 of 2 cases slower"),
        ((10.8, 11.0, 10.9), 1, "1 of 2 cases slower"),
        ((10.8, None, 10.9), 1, "1 of 2 cases slower"),
    ],
)
def test_the_status_of_a_comparison(now, status, said, tmp_path, monkeypatch, capsys):
    """The children's times are made up: one case is as given, the other the same in both versions."""
    before, started = (10.0, 10.4, 10.1), {"old": 0, "new": 0}

    def follow(job, folders, tree, on_event):
        name = "new" if tree == store.ROOT else "old"
        us = (now if name == "new" else before)[started[name]]
        started[name] += 1
        on_event({"event": "hello", "octavo": str(tree / "octavo/__init__.py")})
        on_event({"event": "plan", "cases": 2})
        row = {"event": "row", "op": "half", "dtype": "float32", "note": "" if us else "wrong: isnan"}
        on_event({**row, "shape": "T=4", "times": us and dict(median_us=us, p20_us=us, p80_us=us)})
        us = 5.0 + started[name]
        on_event({**row, "shape": "T=8", "times": dict(median_us=us, p20_us=us, p80_us=us)})

    monkeypatch.setattr(compare, "follow", follow)
    assert run.main(["--base", str(store.ROOT), "--op", "rms_norm"]) == status
    printed = capsys.readouterr().out
    assert started == {"old": 3, "new": 3} and said in printed
    assert "10.10 (10.00 to 10.40)" in printed and "7.00 (6.00 to 8.00)" in printed
    assert ("new: wrong: isnan" in printed) is (None in now)


def test_a_commit_is_compared_with_the_working_tree(capsys, monkeypatch):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    monkeypatch.setattr(compare, "REPEATS", 1)  # three of them are in the test above
    monkeypatch.setattr(compare, "THRESHOLD", 10)  # both are the same op; a busy machine may take a while longer
    assert run.main(["--base", "HEAD", "--op", "rms_norm", "--shapes", "T=3,hidden=64", "--rounds", "30"]) == 0
    printed = capsys.readouterr().out
    assert "octavo now against HEAD" in printed and "T=3,hidden=64 bfloat16" in printed and "0 of 1 cases" in printed
    trees = subprocess.run(["git", "-C", ROOT, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert "octavo-base-" not in trees
    assert run.main(["--base", "no-such-commit", "--op", "rms_norm"]) == 2
