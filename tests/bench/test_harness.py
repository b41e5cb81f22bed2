"""Selection, correctness before time, and time itself, on made-up benchmarks."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from octavo.bench import harness, peers
from octavo.bench.check import difference
from octavo.bench.harness import Provider, Unsupported
from octavo.bench.measure import run_case
from octavo.bench.timing import GraphTimer, interleave, sets_wanted, storage_bytes, summarize

CPU = torch.device("cpu")
SHAPE = {"T": 8, "hidden": 64}


def double(inputs):
    return lambda: inputs["x"] * 2


def made_up(**others):
    """A benchmark of y = 2x with a right provider and the given ones."""

    def inputs(shape, dtype, device, generator):
        return {"x": torch.randn(shape["T"], shape["hidden"], dtype=dtype, device=device, generator=generator)}

    providers = {"octavo": Provider(double, devices=("cpu", "cuda"))}
    providers |= {name: Provider(make, devices=("cpu", "cuda")) for name, make in others.items()}
    return SimpleNamespace(
        OP="double",
        DTYPES=(torch.float32,),
        PROVIDERS=providers,
        shapes=lambda: [SHAPE],
        inputs=inputs,
        exact=lambda inputs: inputs["x"].double() * 2,
        flops=lambda shape: shape["T"] * shape["hidden"],
        bytes_moved=lambda shape, dtype: 2 * shape["T"] * shape["hidden"] * dtype.itemsize,
    )


def outcomes(benchmark, device=CPU, rounds=3, dtype=torch.float32):
    return {o.provider: o for o in run_case(benchmark, SHAPE, dtype, device, benchmark.PROVIDERS, rounds)}


def spoiled(change):
    """A provider that is right but for `change`."""

    def make(inputs):
        def call():
            out = inputs["x"] * 2
            change(out)
            return out

        return call

    return make


def one_element(out):
    out[3, 5] += 0.01


def one_row(out):
    out[4] = out[5].clone()


def nan(out):
    out[0, 0] = float("nan")


def infinity(out):
    out[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("change", "note"),
    [(one_element, "largest error"), (one_row, "largest error"), (nan, "isnan"), (infinity, "isposinf")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_output_gets_no_time(change, note, dtype):
    out = outcomes(made_up(peer=spoiled(change)), dtype=dtype)
    assert out["octavo"].times is not None and out["octavo"].times.median_us > 0
    assert out["peer"].times is None
    assert out["peer"].notes[0].startswith("wrong: ") and note in out["peer"].notes[0]


def test_an_unwritten_element_gets_no_time():
    torch.use_deterministic_algorithms(False)  # the tests' own poison; the harness brings its own

    def forgetful(inputs):
        def call():
            x = inputs["x"]
            out = torch.empty_like(x)
            out[:-1] = x[:-1] * 2
            out[-1, :-1] = x[-1, :-1] * 2
            return out

        return call

    out = outcomes(made_up(peer=forgetful))
    assert out["peer"].times is None and "isnan differs in 1 of" in out["peer"].notes[0]
    assert not torch.are_deterministic_algorithms_enabled()


def raising(error):
    def make(inputs):
        raise error

    return make


def raising_when_called(inputs):
    def call():
        raise RuntimeError("no kernel image\nsecond line")

    return call


def raising_later(inputs):
    calls = []

    def call():
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("worn out")
        return inputs["x"] * 2

    return call


def test_a_provider_that_fails_is_noted_and_the_others_go_on():
    out = outcomes(
        made_up(
            absent=raising(ModuleNotFoundError("No module named 'absent'")),
            narrow=raising(Unsupported("hidden above 32")),
            broken=raising_when_called,
            tired=raising_later,
            number=lambda inputs: lambda: 3.0,
            torch=double,
        ),
    )
    assert {name: o.notes for name, o in out.items()} == {
        "octavo": [],
        "absent": ["not installed: No module named 'absent'"],
        "narrow": ["unsupported: hidden above 32"],
        "broken": ["failed: RuntimeError: no kernel image"],
        "tired": ["failed: RuntimeError: worn out"],
        "number": ["failed: TypeError: result: got float; expected a tensor or a tuple of tensors"],
        "torch": [],
    }
    assert {name for name, o in out.items() if o.times} == {"octavo", "torch"}


def test_a_benchmark_that_fails_is_noted():
    benchmark = made_up()
    benchmark.exact = lambda inputs: inputs["y"]
    assert outcomes(benchmark)["octavo"].notes == ["the benchmark itself failed: KeyError: 'y'"]


def in_place(factor):
    def make(inputs):
        def call():
            inputs["x"].mul_(factor)
            return inputs["x"], inputs["x"] + 1

        return call

    return make


def test_in_place_ops_are_checked_on_inputs_of_their_own():
    benchmark = made_up(peer=in_place(2), wrong=in_place(2.1))
    benchmark.PROVIDERS["octavo"] = Provider(in_place(2), devices=("cpu",))
    benchmark.exact = lambda inputs: (inputs["x"].double() * 2, inputs["x"].double() * 2 + 1)
    out = outcomes(benchmark)
    assert out["octavo"].times and out["peer"].times
    assert out["wrong"].times is None and "output 0" in out["wrong"].notes[0]


def test_a_crash_can_be_laid_at_somebodys_door():
    tried = []
    benchmark = made_up(torch=double)
    run_case(benchmark, SHAPE, torch.float32, CPU, benchmark.PROVIDERS, 2, tried.append)
    assert tried == ["octavo", "torch", "octavo", "torch", "torch", "octavo"]


def test_tolerance_of_half_precision():
    exact = torch.randn(64, 512, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert difference(exact.to(dtype), exact) is None
        eps = torch.finfo(dtype).eps
        if dtype != torch.float32:
            assert "rms error" in difference((exact * (1 + 4 * eps)).to(dtype), exact)
        assert "error" in difference((exact * (1 + 20 * eps)).to(dtype), exact)
    tf32 = (exact.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert difference(tf32, exact) is not None


def test_copies_and_integers_are_held_bit_for_bit():
    words = torch.randint(0, 2**31 - 1, (8, 8), dtype=torch.int32)
    copied = torch.randn(8, 8).bfloat16()
    assert difference((words, copied), (words.clone(), copied.clone())) is None
    other = words.clone()
    other[1, 1] += 1
    assert difference(other, words) == "1 of 64 elements differ"
    assert "elements differ" in difference(torch.nextafter(copied, copied + 1), copied)
    assert "dtype" in difference(words.long(), words)
    assert "shape" in difference(words[:4], words)
    assert difference(words, (words, words)) == "1 tensors, expected 2"


def test_labels():
    assert harness.label(SHAPE) == "T=8,hidden=64"
    assert harness.parse_label("T=8,hidden=64") == SHAPE
    for wrong in ("T", "T=", "T=x", "=3", "T=1,T=2", "T=-1", ""):
        with pytest.raises(ValueError, match="expected a form like"):
            harness.parse_label(wrong)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([], ["T=64,N=8", "T=640,N=8", "T=1,N=16"]),
        (["T=64"], ["T=64,N=8"]),
        (["64"], ["T=64,N=8", "T=640,N=8"]),
        (["N=8,T=640"], ["T=640,N=8"]),
        (["T=1", "T=64"], ["T=64,N=8", "T=1,N=16"]),
        (["N=4,T=3"], ["T=3,N=4"]),
        (["T=3"], []),
    ],
)
def test_shape_filters(filters, expected):
    listed = [{"T": 64, "N": 8}, {"T": 640, "N": 8}, {"T": 1, "N": 16}]
    assert [harness.label(s) for s in harness.wanted_shapes(listed, filters)] == expected


def test_a_cpu_is_spared_large_shapes_unless_they_are_asked_for():
    benchmark = made_up()
    large = {"T": 2**20, "hidden": 64}
    benchmark.shapes = lambda: [SHAPE, large]
    assert harness.cases(benchmark, CPU) == [(SHAPE, torch.float32)]
    assert harness.cases(benchmark, CPU, ["T=1048576"], ["float16"]) == [(large, torch.float16)]
    assert len(harness.cases(benchmark, torch.device("cuda"))) == 2


def test_providers_are_chosen_by_group_device_and_name():
    benchmark = made_up(torch=double)
    benchmark.PROVIDERS["fast"] = Provider(double, peer="vllm")
    cuda = torch.device("cuda")
    assert list(harness.providers(benchmark, cuda, None)) == ["octavo", "torch"]
    assert list(harness.providers(benchmark, cuda, None, ["torch"])) == ["torch"]
    assert list(harness.providers(benchmark, cuda, "vllm", ["vllm"])) == ["fast"]
    assert list(harness.providers(benchmark, CPU, "vllm")) == []


def test_peer_sites(tmp_path):
    (tmp_path / "nvidia_cutlass_dsl/dsl_packages").mkdir(parents=True)
    inner = str(tmp_path / "nvidia_cutlass_dsl/dsl_packages")
    assert peers.parse_sites([f"vllm={tmp_path}:{tmp_path}"]) == {"vllm": [str(tmp_path)] * 2}
    assert peers.parse_sites([f"fa4={tmp_path}"]) == {"fa4": [str(tmp_path), inner]}
    for wrong in ("vllm", "vllm=", f"={tmp_path}", "vllm=/no/such/folder"):
        with pytest.raises(ValueError, match="peer-site"):
            peers.parse_sites([wrong])


def test_environment_of_a_child(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")
    monkeypatch.setenv("PYTHONPATH", "mine")
    child = peers.environment("vllm", ["site"], tmp_path)
    assert "TRITON_INTERPRET" not in child
    assert child["VLLM_NO_USAGE_STATS"] == "1" and child["VLLM_USE_DEEP_GEMM"] == "1"
    assert child["PYTHONPATH"].split(":") == ["site", str(tmp_path), "mine"]


def test_storage_is_counted_once():
    x = torch.empty(1000)
    assert storage_bytes({"x": x, "parts": [x[:10], (torch.empty(5, dtype=torch.int8),)], "scale": 1.0}) == 4005
    assert sets_wanted(1, 1, CPU) == 2


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


def test_statistics():
    times = summarize([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (times.median_us, times.p20_us, times.p80_us) == (3.5, 2.0, 5.0)
    assert times.median_us == np.median([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])


@triton.jit
def _spin_kernel(out_ptr, ns):
    start = globaltimer()
    now = start
    while now - start < ns:
        now = globaltimer()
    tl.store(out_ptr, ns)


def spinning(ns):
    def make(inputs):
        def call():
            out = torch.empty(1, dtype=torch.int32, device="cuda")
            _spin_kernel[(1,)](out, ns, num_warps=1)
            return out

        return call

    return make


@pytest.mark.gpu
def test_a_kernel_of_known_duration_is_timed_right():
    """The kernel spins until the GPU's own clock has advanced; starting a graph's next kernel is inside the 3 %."""
    benchmark = made_up()
    benchmark.exact = lambda inputs: torch.tensor([int(inputs["ns"])], dtype=torch.int32, device="cuda")
    cuda, medians = torch.device("cuda"), {}
    for ns in (5_000, 20_000, 100_000, 400_000):
        benchmark.inputs = lambda *args, ns=ns: {"ns": ns, "x": torch.zeros(1, device="cuda")}
        benchmark.PROVIDERS = {"octavo": Provider(spinning(ns)), "twice": Provider(spinning(ns))}
        out = outcomes(benchmark, cuda, rounds=10)
        assert not out["octavo"].notes and not out["twice"].notes
        medians[ns] = out["octavo"].times.median_us
        assert out["twice"].times.median_us == pytest.approx(medians[ns], rel=0.01)
    print(medians)
    assert medians[100_000] == pytest.approx(100, rel=0.03)
    assert medians[400_000] == pytest.approx(400, rel=0.03)
    assert medians[400_000] - medians[100_000] == pytest.approx(300, rel=0.01)
    assert 5 <= medians[5_000] < 9 and 20 <= medians[20_000] < 24


@pytest.mark.gpu
def test_what_a_graph_would_not_compute_again_gets_no_time():
    kept = {}

    def remembering(inputs):
        def call():
            if "out" not in kept:
                kept["out"] = inputs["x"] * 2
            return kept["out"]

        return call

    def synchronising(inputs):
        def call():
            float(inputs["x"][0, 0])
            return inputs["x"] * 2

        return call

    out = outcomes(made_up(remembering=remembering, synchronising=synchronising, torch=double), torch.device("cuda"))
    assert out["remembering"].times is None and out["remembering"].notes[0].startswith("wrong in a graph: isnan")
    assert out["synchronising"].notes == ["no graph"]
    assert out["synchronising"].times.median_us > out["octavo"].times.median_us
    assert out["torch"].times and not out["torch"].notes


@pytest.mark.gpu
def test_in_place_ops_are_restored_before_the_graph_is_checked():
    benchmark = made_up(peer=in_place(2))
    benchmark.PROVIDERS["octavo"] = Provider(in_place(2))
    benchmark.exact = lambda inputs: (inputs["x"].double() * 2, inputs["x"].double() * 2 + 1)
    out = outcomes(benchmark, torch.device("cuda"))
    assert out["octavo"].times and out["peer"].times and not out["octavo"].notes


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
    del timer
    gc.collect()
    assert not any(ref() is not None for ref in refs), "and no longer"


@pytest.mark.gpu
def test_input_sets_are_larger_than_the_cache():
    cuda = torch.device("cuda")
    l2 = torch.cuda.get_device_properties(cuda).L2_cache_size
    assert sets_wanted(2**20, 2**20, cuda) * 2**20 >= 2 * l2
    assert sets_wanted(2**30, 2**30, cuda) == 2
    assert sets_wanted(1, 2**20, cuda) == 512
    assert sets_wanted(2**20, 2**50, cuda) == 1
