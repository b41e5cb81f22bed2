import json
import time

import pytest
import torch

from octavo.bench import ceilings

PEAKS = ("gemm_bf16_flops_per_s", "gemm_fp8_flops_per_s", "gemm_int8_ops_per_s", "gemm_fp32_flops_per_s")
ON_GPU = {
    "triton kernel[grid]",
    "triton CompiledKernel[grid]",
    "triton CompiledKernel.run",
    "CUDA graph node (GPU time)",
}
GEMM = [(64, 64, 64)]


def test_the_command_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["--out", str(tmp_path), "--mib", "8", "--gemm", "128", "128", "128", "--rounds", "3"]
    assert ceilings.main(command) == 0
    found = json.loads((tmp_path / "cpu/ceilings.json").read_text())
    assert found["gpu"] == "cpu" and found["torch"] == torch.__version__ and found["triton"] and found["commit"]
    for name in ("copy_bytes_per_s", "read_bytes_per_s"):
        assert 1e8 < found[name] < 1e13, name
    assert 1e8 < found["gemm_fp32_flops_per_s"] < 1e14
    assert all(found[name] is None for name in PEAKS[:3])
    for name, us in found["launch_us"].items():
        assert us is None if name in ON_GPU else 0.01 < us < 1000, name
    assert set(found["launch_us"]) > ON_GPU
    printed = capsys.readouterr().out
    assert "copy, read + written" in printed and "one call: torch.add" in printed and str(tmp_path) in printed


def test_bandwidth_kernels(device):
    x = torch.randint(-(2**20), 2**20, (4096,), dtype=torch.int32, device=device)  # the interpreter's sums do not wrap
    out = torch.zeros_like(x)
    ceilings._copy_kernel[(16,)](out, x, BLOCK=256)
    assert torch.equal(out, x)
    for tiles in (1, 4):
        sums = torch.empty(4096 // (256 * tiles), dtype=torch.int32, device=device)
        ceilings._read_kernel[(sums.numel(),)](sums, x, BLOCK=256, TILES=tiles)
        assert torch.equal(sums, x.view(sums.numel(), -1).sum(1, dtype=torch.int32))


def test_a_copy_that_does_not_copy_is_not_timed(monkeypatch):
    monkeypatch.setattr(ceilings, "copy_calls", lambda out, x: {"lazy": lambda: out[1:].copy_(x[1:])})
    with pytest.raises(RuntimeError, match="lazy: the copy differs"):
        ceilings.bandwidths(torch.device("cpu"), 2**18, 1)


def test_the_best_call_counts_and_one_that_fails_is_left_out(capsys, monkeypatch):
    now = 0.0  # of a clock that the calls alone move: on a busy machine one may take three times as long

    def wait(us):
        nonlocal now
        now += us * 1e-6

    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def fail():
        raise ValueError("no such kernel\nand more")

    device = torch.device("cpu")
    best = ceilings.best_seconds({"slow": lambda: wait(1000), "fast": lambda: wait(200), "no": fail}, device, 5)
    assert best == pytest.approx(200e-6)
    assert "no: ValueError: no such kernel\n" in capsys.readouterr().err
    assert ceilings.best_seconds({"no": fail}, device, 5) is None
    assert ceilings.cpu_us(lambda: wait(200), device, count=5, rounds=5) == pytest.approx(200)


def test_a_size_that_the_tiles_do_not_divide():
    with pytest.raises(ValueError, match="size: 1000; expected a multiple of 256 KiB"):
        ceilings.measure(torch.device("cpu"), size=1000, sizes=GEMM)


@pytest.mark.gpu
def test_all_ceilings_of_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    found = ceilings.measure(device, size=2**28, sizes=[(2048, 2048, 2048)], rounds=5)
    assert 1e10 < found["copy_bytes_per_s"] < 1e14 and 1e10 < found["read_bytes_per_s"] < 1e14
    for name in PEAKS:
        missing = "fp8" in name and torch.cuda.get_device_capability(device) < (8, 9)
        assert missing == (found[name] is None), name
    assert found["gemm_bf16_flops_per_s"] > found["gemm_fp32_flops_per_s"]
    costs = found["launch_us"]
    assert all(0.1 < us < 1000 for us in costs.values()), costs
    assert costs["triton CompiledKernel.run"] < costs["triton kernel[grid]"]
