"""Turns, percentiles, input sets and what a timer keeps alive."""

import gc
import weakref

import numpy as np
import pytest
import torch

from octavo.bench.timing import GraphTimer, interleave, quiet_times, sets_wanted, storage_bytes, summarize


def test_storage_is_counted_once():
    x = torch.empty(1000)
    assert storage_bytes({"x": x, "parts": [x[:10], (torch.empty(5, dtype=torch.int8),)], "scale": 1.0}) == 4005
    assert sets_wanted(1, 1, torch.device("cpu")) == 2


class FixedTimer:
    note = ""

    def __init__(self, log, name, fails_at=None):
        self.log, self.name, self.fails_at, self.runs = log, name, fails_at, 0

    def run(self):
        self.runs += 1
        if self.runs == self.fails_at:
            raise RuntimeError(self.name)
        self.log.append(self.name)
        return float(self.runs)


def test_providers_take_turns():
    log, errors = [], []
    timers = {name: FixedTimer(log, name, 2 if name == "b" else None) for name in "abc"}
    times = interleave(timers, 4, lambda name, error: errors.append((name, str(error))))
    assert errors == [("b", "b")] and set(times) == {"a", "c"}
    assert "".join(log) == "abc" + "ca" + "ac" + "ca"
    assert times["a"] == [1.0, 2.0, 3.0, 4.0]


class ScriptedTimer:
    note = ""

    def __init__(self, times):
        self.times = list(times)

    def run(self):
        return self.times.pop(0)


def test_a_noisy_pass_is_repeated_once_and_the_quieter_one_counts():
    quiet, disturbed, worse = [10.0] * 5, [10.0, 10.0, 10.0, 13.0, 14.0], [10.0, 10.0, 14.0, 20.0, 20.0]
    a, b = ScriptedTimer(quiet + disturbed), ScriptedTimer(disturbed + [11.0] * 5)
    times = quiet_times({"a": a, "b": b}, 5, pytest.fail)
    assert (times["a"].median_us, times["a"].spread) == (10.0, 1.0) and times["b"].median_us == 11.0
    assert not a.times and not b.times
    c = ScriptedTimer(disturbed + worse + quiet)
    assert quiet_times({"c": c}, 5, pytest.fail)["c"] == summarize(disturbed) and c.times == quiet
    d = ScriptedTimer(quiet + worse)
    assert quiet_times({"d": d}, 5, pytest.fail)["d"] == summarize(quiet) and d.times == worse


def test_statistics():
    times = summarize([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (times.median_us, times.p20_us, times.p80_us) == (3.5, 2.0, 5.0)
    assert times.median_us == np.median([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])


@pytest.mark.gpu
def test_what_a_call_made_for_itself_lives_as_long_as_its_graph():
    """A graph knows addresses alone; packed weights that were freed would be read from whatever came there since."""
    refs = []

    def make():
        own = torch.randn(2**20, device="cuda")
        refs.append(weakref.ref(own))
        return lambda: own * 2

    timer = GraphTimer([make() for _ in range(3)])
    gc.collect()
    assert timer.run() > 0 and all(ref() is not None for ref in refs)
    timer.result().zero_()
    timer.run()
    assert torch.equal(timer.result(), refs[0]() * 2), "what the first call's replay has written"
    del timer
    gc.collect()
    assert not any(ref() is not None for ref in refs), "and no longer"


@pytest.mark.gpu
def test_input_sets_are_larger_than_the_cache():
    cuda = torch.device("cuda")
    l2 = torch.cuda.get_device_properties(cuda).L2_cache_size
    assert sets_wanted(2**20, 2**20, cuda) * 2**20 >= 4 * l2
    assert sets_wanted(2**30, 2**30, cuda) == 2
    assert sets_wanted(1, 2**20, cuda) == 512
    assert sets_wanted(2**20, 2**50, cuda) == 1
