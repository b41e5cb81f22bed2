import numpy as np
import pytest

from octavo.bench.workload import Lengths, Workload


def test_runs_differ_and_a_seed_repeats_them():
    workload = Workload(Lengths.parse("uniform:0.5", 100, 20), 50, request_rate=4.0, seed=3)
    first = workload.requests(0, 64)
    assert first == workload.requests(0, 64)
    other = workload.requests(1, 64)
    assert not {r.prompt[:8] for r in first} & {r.prompt[:8] for r in other}
    assert {t for r in first for t in r.prompt} == set(range(64))
    assert {50 <= len(r.prompt) <= 150 and 10 <= r.output <= 30 for r in first} == {True}
    assert len({len(r.prompt) for r in first}) > 20


def test_fixed_lengths_come_at_once():
    requests = Workload(Lengths(7, 3), 4).requests(0, 10)
    assert [(len(r.prompt), r.output, r.arrival) for r in requests] == [(7, 3, 0.0)] * 4


def test_normal_lengths_have_their_mean_and_spread_and_at_least_a_token():
    sizes = np.array(Lengths.parse("normal:0.25", 400, 1).draw(4000, np.random.default_rng(0)))
    assert sizes[:, 0].mean() == pytest.approx(400, rel=0.02) and sizes[:, 0].std() == pytest.approx(100, rel=0.05)
    assert set(sizes[:, 1]) <= {1, 2} and sizes.min() >= 1


def test_a_file_of_lengths_is_taken_line_by_line_and_again(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("5, 2\n\n9 4\n")
    workload = Workload(Lengths.parse(str(path), 1, 1), 3)
    assert [(len(r.prompt), r.output) for r in workload.requests(0, 10)] == [(5, 2), (9, 4), (5, 2)]
    assert [r.output for r in workload.shortened(3).requests(0, 10)] == [2, 3, 2]
    assert workload.describe()["input_len"] is None and workload.describe()["lengths"] == "file"


def test_arrivals_are_a_poisson_process():
    arrivals = np.array([r.arrival for r in Workload(Lengths(1, 1), 4000, request_rate=8.0).requests(0, 10)])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0 and gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05) and gaps.std() == pytest.approx(1 / 8, rel=0.08)
    assert not any(r.arrival for r in Workload(Lengths(1, 1), 5, request_rate=8.0).shortened(1).requests(0, 10))


def test_a_prefix_is_shared_within_a_run_only():
    workload = Workload(Lengths(4, 1), 5, prefix_len=6)
    first, second = (workload.requests(run, 1000) for run in (0, 1))
    assert len({r.prompt[:6] for r in first}) == 1 and len({r.prompt[6:] for r in first}) == 5
    assert all(len(r.prompt) == 10 for r in first)
    assert first[0].prompt[:6] != second[0].prompt[:6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zipf:2", "lengths: 'zipf:2'; expected fixed, uniform:SHARE, normal:SHARE, or a file"),
        ("uniform", "lengths: 'uniform'; expected a share of the length between 0 and 1, as in uniform:0.25"),
        ("normal:1.5", "lengths: 'normal:1.5'; expected a share"),
        ("normal:x", "lengths: 'normal:x'; expected a share"),
        ("fixed:0.5", "lengths: 'fixed:0.5'; expected no share"),
    ],
)
def test_lengths_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        Lengths.parse(text, 10, 10)


@pytest.mark.parametrize("content", ["", "12\n", "3 x\n", "0 5\n", "1 2 3\n"])
def test_files_that_hold_no_lengths(content, tmp_path):
    path = tmp_path / "lengths"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"lengths: .*expected a prompt's and an output's length"):
        Lengths.parse(str(path), 10, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_prompts=0), "num_prompts: 0; expected at least 1"),
        (dict(prefix_len=-1), "prefix_len: -1; expected at least 0"),
        (dict(request_rate=0.0), "request_rate: 0.0; expected more than 0"),
        (dict(request_rate=float("inf")), "request_rate: inf"),
        (dict(seed=-1), "seed: -1"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Workload(Lengths(1, 1), **fields)


def test_lengths_of_nothing():
    with pytest.raises(ValueError, match="output_len: 0; expected at least 1"):
        Lengths(5, 0)
