"""Selection, correctness before time, and time itself, on made-up benchmarks."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from octavo.bench import harness
from octavo.bench.check import Quantized
from octavo.bench.harness import LeftOut, Provider, Unsupported
from octavo.bench.measure import run_case

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


def test_a_wrong_quantised_output_gets_no_time():
    def quantised(inputs, off=0):
        def call():
            scale = inputs["x"].abs().amax(-1, keepdim=True) / 127
            return (inputs["x"] / scale).round().to(torch.int8) + off, scale

        return call

    benchmark = made_up(peer=quantised, wrong=lambda inputs: quantised(inputs, 1))
    benchmark.PROVIDERS["octavo"] = benchmark.PROVIDERS["peer"]
    benchmark.exact = lambda inputs: Quantized(inputs["x"].double(), torch.int8)
    out = outcomes(benchmark)
    assert out["octavo"].times and out["peer"].times
    assert out["wrong"].times is None and "elements differ" in out["wrong"].notes[0]


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


class CompilationError(Exception):
    """As Triton's compiler raises it."""


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
            slow=raising(LeftOut("takes minutes")),
            uncompiled=raising(CompilationError("at 48:34:\n    y = tanh(x)\n        ^\n(triton.language.int8)\n")),
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
        "slow": ["left out: takes minutes"],
        "uncompiled": ["failed: CompilationError: (triton.language.int8)"],
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
    benchmark = made_up(peer=in_place(-1), wrong=in_place(-1.05))
    benchmark.PROVIDERS["octavo"] = Provider(in_place(-1), devices=("cpu",))
    benchmark.exact = lambda inputs: (-inputs["x"].double(), 1 - inputs["x"].double())
    out = outcomes(benchmark)
    assert out["octavo"].times and out["peer"].times
    assert out["wrong"].times is None and "output 0" in out["wrong"].notes[0]


def test_in_place_ops_that_overflow_while_they_are_timed_lose_their_time():
    benchmark = made_up()
    benchmark.PROVIDERS["octavo"] = Provider(in_place(2), devices=("cpu",))
    benchmark.exact = lambda inputs: (inputs["x"].double() * 2, inputs["x"].double() * 2 + 1)
    out = outcomes(benchmark)["octavo"]
    assert out.times is None and out.notes == ["wrong after timing: 512 of 512 elements are not finite"]


def wrong_after(count):
    """A provider that is right for so many calls, and forgets an element afterwards."""

    def make(inputs):
        calls = []

        def call():
            calls.append(1)
            out = inputs["x"] * 2
            if len(calls) > count:
                one_element(out)
            return out

        return call

    return make


def test_what_was_timed_is_checked_again():
    out = outcomes(made_up(peer=wrong_after(10)))
    assert out["octavo"].times and out["octavo"].touched == 2 * 2 * 8 * 64 * 4
    assert out["peer"].times is None and out["peer"].notes[0].startswith("wrong after timing: largest error")


def test_a_providers_note_goes_with_its_times():
    benchmark = made_up()
    benchmark.PROVIDERS["peer"] = Provider(double, devices=("cpu",), note="packed before")
    benchmark.PROVIDERS["wrong"] = Provider(spoiled(nan), devices=("cpu",), note="packed before")
    out = outcomes(benchmark)
    assert out["peer"].times and out["peer"].notes == ["packed before"]
    assert "packed before" not in out["wrong"].notes


def test_a_crash_can_be_laid_at_somebodys_door():
    tried = []
    benchmark = made_up(torch=double)
    run_case(benchmark, SHAPE, torch.float32, CPU, benchmark.PROVIDERS, 2, tried.append)
    # making, two rounds, a second pass of them where the first was noisy, and the last check
    assert tried[:6] == ["octavo", "torch", "octavo", "torch", "torch", "octavo"]
    assert tried[6:] in (["octavo", "torch"], ["octavo", "torch", "torch", "octavo", "octavo", "torch"])


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
def test_what_the_timed_graphs_compute_is_checked():
    """This provider is right where it is checked, and in the timed graphs hands out what it computed before them."""
    makes = []

    def lazy(inputs):
        makes.append(inputs)
        kept = []

        def call():
            out = inputs["x"] * 2
            if len(makes) == 1:
                return out
            kept.append(out)
            return kept[0]

        return call

    out = outcomes(made_up(lazy=lazy), torch.device("cuda"))
    assert out["lazy"].times is None and out["lazy"].notes[0].startswith("wrong after timing: isnan")
    assert out["octavo"].times and not out["octavo"].notes


@pytest.mark.gpu
def test_in_place_ops_are_restored_before_the_graph_is_checked():
    benchmark = made_up(peer=in_place(-1))
    benchmark.PROVIDERS["octavo"] = Provider(in_place(-1))
    benchmark.exact = lambda inputs: (-inputs["x"].double(), 1 - inputs["x"].double())
    out = outcomes(benchmark, torch.device("cuda"))
    assert out["octavo"].times and out["peer"].times and not out["octavo"].notes
