"""Figures of known timings, and what holds of any."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.bench.serving_metrics import Timeline, reading_seconds_per_token, spread, summarize

TIMES = st.lists(st.floats(0.001, 50, allow_nan=False), min_size=1, max_size=20)


@st.composite
def timelines(draw):
    arrival, moment, times = draw(st.floats(0, 100)), 0.0, []
    for gap in draw(TIMES):
        moment += gap
        times.append(arrival + moment)
    prompt = draw(st.integers(1, 500))
    return Timeline(prompt, arrival, tuple(times), draw(st.integers(0, prompt - 1)))


def test_known_timings():
    first = Timeline(10, 1.0, (1.5, 1.75, 2.25, 2.5), cached=5)
    second = Timeline(30, 2.0, (4.0,))
    lost = Timeline(99, 0.0, (9.0,), error="out of memory")
    found = summarize([first, second, lost])
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["seconds"] == 4.0 and found["requests_per_s"] == 0.5
    assert (found["input_tokens"], found["output_tokens"]) == (40, 5)
    assert found["output_tokens_per_s"] == 1.25 and found["total_tokens_per_s"] == 11.25
    assert found["ttft_ms"] == {"mean": 1250, "median": 1250, "p95": 1925, "p99": 1985}
    assert found["tpot_ms"]["mean"] == found["tpot_ms"]["p99"] == pytest.approx(1000 / 3), "of the first alone"
    assert found["itl_ms"]["median"] == 250 and found["itl_ms"]["p95"] == 475
    assert found["e2el_ms"]["mean"] == (1500 + 2000) / 2
    assert found["prefix_cache_hit_rate"] == 5 / 40


def test_requests_of_one_token_have_no_time_per_token():
    found = summarize([Timeline(1, 0.0, (1.0,))])
    assert found["tpot_ms"] is None and found["itl_ms"] is None and found["ttft_ms"]["p99"] == 1000


def test_a_run_without_a_completed_request_is_an_error():
    with pytest.raises(ValueError, match="no request was completed: out of memory"):
        summarize([Timeline(1, 0.0, (1.0,), error="out of memory")])


@given(TIMES)
def test_percentiles_interpolate_between_neighbours(values):
    ordered, found = sorted(values), spread(values, 1.0)
    for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99)):
        at = share * (len(ordered) - 1)
        low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
        assert found[name] == pytest.approx(low + (at - math.floor(at)) * (high - low))
    assert found["mean"] == pytest.approx(math.fsum(values) / len(values))


@given(st.lists(timelines(), min_size=1, max_size=6))
def test_figures_add_up(runs):
    found = summarize(runs)
    assert found["output_tokens"] == sum(len(t.token_times) for t in runs)
    assert found["output_tokens_per_s"] * found["seconds"] == pytest.approx(found["output_tokens"])
    assert found["total_tokens_per_s"] * found["seconds"] == pytest.approx(
        found["output_tokens"] + found["input_tokens"]
    )
    for t in runs:
        assert t.e2el == pytest.approx(t.ttft + sum(t.itl))
        if t.tpot is not None:
            assert t.e2el == pytest.approx(t.ttft + t.tpot * (len(t.token_times) - 1))
            assert min(t.itl) <= t.tpot * (1 + 1e-9) and t.tpot <= max(t.itl) * (1 + 1e-9)
    assert 0 <= found["prefix_cache_hit_rate"] < 1


def test_the_reading_speed_in_tokens():
    assert 1 / reading_seconds_per_token() == pytest.approx(250 * 4 / 3 / 60)
