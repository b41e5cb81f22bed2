"""The launch path on a GPU: threads and streams, several GPUs, profilers, graphs, and serving without compiling."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton

import octavo
from octavo.kernels import launch as launching
from octavo.kernels.launch import Recorder, recording, starter
from octavo.kernels.replay import make_plan

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent


def operands(rows: int, device="cuda"):
    x = torch.randn(rows, 4096, device=device, dtype=torch.bfloat16)
    return x, torch.randn(4096, device=device, dtype=torch.bfloat16)


def expected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6) * weight.float()).to(x.dtype)


def test_this_triton_is_started_directly():
    assert starter is not None, triton.__version__
    launching._ready.clear()
    octavo.rms_norm.plans.clear()
    for _ in range(4):
        octavo.rms_norm(*operands(3))
    (plans,) = octavo.rms_norm.plans.values()
    assert len(plans) == 1 and len(launching._ready) == 1


def test_eight_threads_on_two_streams_each():
    """Every thread alternates between two streams of its own, and between ops and shapes that others use too."""
    failures, finished = [], []
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16, generator=generator)
        torch.cuda.synchronize()
        barrier.wait()
        results = []
        for i in range(300):
            with torch.cuda.stream(streams[i % 2]):
                x = torch.randn(1 + (i + seed) % 7, 4096, device="cuda", dtype=torch.bfloat16, generator=generator)
                residual = torch.ones_like(x)
                y = octavo.rms_norm(x, weight)
                z = octavo.add_rms_norm(y, residual, weight)
                a = octavo.silu_and_mul(z)
                results.append((x, y, residual, z, a))
        torch.cuda.synchronize()
        for x, y, residual, z, a in results:
            gate, up = z.float().chunk(2, -1)
            pairs = (
                (y, expected(x, weight)),
                (residual, y + 1),
                (z, expected(y + 1, weight)),
                (a, gate / (1 + (-gate).exp()) * up),
            )
            for actual, right in pairs:
                if not torch.allclose(actual.float(), right.float(), rtol=2e-2, atol=2e-2):
                    failures.append((seed, (actual.float() - right.float()).abs().max().item()))
                    return
        finished.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(finished) == 8, failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one():
    for _ in range(3):
        for device in ("cuda:1", "cuda:0"):
            x, weight = operands(5, device)
            out = octavo.rms_norm(x, weight)
            assert out.device == x.device
            torch.testing.assert_close(out, expected(x, weight), rtol=2e-2, atol=2e-2)
    with torch.cuda.device(1):
        x, weight = operands(5, "cuda:1")
        for _ in range(2):
            torch.testing.assert_close(octavo.rms_norm(x, weight), expected(x, weight), rtol=2e-2, atol=2e-2)


def test_torch_profiler_sees_op_and_kernel():
    x, weight = operands(4)
    for _ in range(3):
        octavo.rms_norm(x, weight)
    with torch.profiler.profile() as profile:
        octavo.rms_norm(x, weight)
        torch.cuda.synchronize()
    names = {event.name for event in profile.events()}
    assert "octavo::rms_norm" in names and "_rms_norm_kernel" in names


PROTON = """
import sys, torch, octavo, triton.profiler as proton
from octavo.kernels.launch import hooked
x, weight = torch.ones(4, 4096, device="cuda"), torch.ones(4096, device="cuda")
for _ in range(3):
    octavo.rms_norm(x, weight)
proton.start(sys.argv[1], hook="triton")
assert hooked()
for _ in range(3):
    octavo.rms_norm(x, weight)
torch.cuda.synchronize()
proton.finalize()
assert not hooked()
"""


def test_proton_sees_the_kernels(tmp_path):
    # In a process of its own: CUPTI serves one profiler, and torch's has been there.
    run = subprocess.run(
        [sys.executable, "-c", PROTON, tmp_path / "profile"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "_rms_norm_kernel" in (tmp_path / "profile.hatchet").read_text()


def test_a_repeated_call_is_captured_and_replayed():
    x, weight = operands(4)
    for _ in range(3):
        octavo.rms_norm(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = octavo.rms_norm(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, octavo.rms_norm(x, weight))


@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_chained_kernels_read_what_the_one_before_wrote(rows):
    """Kernels that start while the one before runs must see what it writes, and write over nothing that it reads."""

    def step(x, residual, weight, pause) -> torch.Tensor:
        """A layer's worth: every output is the next op's input, and memory is given back and taken again."""
        y = octavo.add_rms_norm(x, residual, weight)
        pause()
        y = octavo.silu_and_mul(torch.cat([y, x], -1))
        pause()
        y = octavo.relu2(y)
        pause()
        return octavo.rms_norm(y, weight)

    def chain(pause=lambda: None) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = start.clone(), scale
        residual = torch.zeros_like(x)
        for _ in range(50):
            x = step(x, residual, weight, pause)
        return x, residual

    start, scale = operands(rows)
    expected = chain(torch.cuda.synchronize)
    chain(), chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(5):
        graph.replay()
        for actual in (chain(), captured):
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a, e)


def test_memory_is_poisoned_for_repeated_calls_too():
    """Else the tests of unwritten elements would see first calls alone."""
    x = torch.empty(64, 4096, device="cuda", dtype=torch.bfloat16).fill_(1.0)
    octavo.relu2.plans.clear()
    for _ in range(3):
        octavo.relu2(x)
    with recording(Recorder()) as recorder:
        out = torch.ops.octavo.relu2(x)
    recorder.launches.clear()  # a kernel that writes nothing
    (plans,) = octavo.relu2.plans.values()
    plans[-1] = make_plan((x,), recorder, out)
    assert octavo.relu2(x).isnan().all()
    octavo.relu2.plans.clear()
    assert torch.equal(octavo.relu2(x), x)


SERVE = """
import sys; sys.path.insert(0, "tests")
import torch, octavo
from op_cases import serve
config = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
report = octavo.warmup(octavo.model_calls(config, weights="int4", max_num_batched_tokens=128))
compiled, ready = octavo.compile_count(), len(octavo.kernels.launch._ready)
assert compiled <= 1, "this process compiled what its workers should have"
with torch.device("cuda"):
    for tokens in (1, 3, 16, 33, 64, 100, 128, 2, 127):
        serve(tokens)
torch.cuda.synchronize()
assert octavo.compile_count() == compiled and len(octavo.kernels.launch._ready) == ready, "compiled while serving"
print(len(report.kernels), sum(k.compiled for k in report.kernels))
"""


def test_a_warmed_process_compiles_nothing_while_serving(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    counts = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", SERVE], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert run.returncode == 0, run.stderr[-4000:]
        counts.append(tuple(map(int, run.stdout.split()[-2:])))
    (first, compiled), (second, compiled_again) = counts
    assert first == second >= 8 and compiled == first, counts
    assert compiled_again == 0, "a second process finds everything in Triton's cache"
