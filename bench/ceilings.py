"""The machine's own limits, which every plot and every floor is held against.

python -m bench.ceilings [--out FOLDER]

- copy bandwidth, bytes read + written: `torch.Tensor.copy_` and a Triton kernel, 1 GiB each way;
- read bandwidth: a Triton kernel that reads 1 GiB and writes one sum a program;
- GEMM peaks: `torch.mm` (bf16, fp32 without TF32), `torch._scaled_mm` (fp8), `torch._int_mm` (int8), random values;
- launches: the CPU's time of one call, and the GPU's of one empty kernel in a CUDA graph.

The best of what is tried counts, each by the median of its replays. Writes FOLDER/<gpu>/ceilings.json, FOLDER being
bench/results by default; what a machine has not is null there. Without a GPU torch measures the CPU's bandwidth, its
fp32 GEMM and its calls.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from octavo.bench.store import commit, default_folder, folder_name
from octavo.bench.timing import Call, interleave, make_timer, spin_up, summarize

GPU_BYTES = 2**30
CPU_BYTES = 2**28
GPU_GEMMS = ((8192, 8192, 8192), (4096, 8192, 8192), (4096, 28672, 4096), (4096, 6144, 4096))
CPU_GEMMS = ((1024, 1024, 1024), (2048, 2048, 2048))
TILES = ((2048, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16))
"""(elements a tile, warps) of the bandwidth kernels: 4 to 8 loads of 16 bytes in flight a thread."""


@triton.jit
def _copy_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _read_kernel(sums_ptr, x_ptr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * (BLOCK * TILES) + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + at)
    for tile in tl.static_range(1, TILES):
        total += tl.load(x_ptr + at + tile * BLOCK)
    tl.store(sums_ptr + program, tl.sum(total, 0))


@triton.jit
def _empty_kernel(out_ptr, x_ptr, N):
    pass


def best_seconds(calls: Mapping[str, Call], device: torch.device, rounds: int) -> float | None:
    """The least median time among some calls, None where none of them runs; those that raise are reported."""

    def failed(name: str, error: Exception) -> None:
        print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)

    timers = {}
    for name, call in calls.items():
        try:
            timers[name] = make_timer([call], device)
        except Exception as error:
            failed(name, error)
    times = interleave(timers, rounds, failed)
    medians = {name: summarize(runs).median_us for name, runs in times.items()}
    for name, us in medians.items():
        print(f"  {name}: {us:.1f} µs", file=sys.stderr)
    return min(medians.values()) * 1e-6 if medians else None


def _rate(work: float, seconds: float | None) -> float | None:
    return work / seconds if seconds else None


# ---------------------------------------------------------------------------------------------------------- bandwidth


def copy_calls(out: torch.Tensor, x: torch.Tensor) -> dict[str, Call]:
    """Ways of copying x to out."""
    calls: dict[str, Call] = {"copy, torch": lambda: out.copy_(x)}
    if x.is_cuda:
        for block, warps in TILES:
            grid = (x.numel() // block,)

            def call(grid: tuple[int] = grid, block: int = block, warps: int = warps) -> None:
                _copy_kernel[grid](out, x, BLOCK=block, num_warps=warps)

            calls[f"copy, triton {block} x {warps} warps"] = call
    return calls


def read_calls(x: torch.Tensor) -> dict[str, Call]:
    """Ways of reading x; each returns sums of parts of it."""
    if not x.is_cuda:
        # In rows, so that the reduction is parallel over them.
        return {"read, torch sum": lambda: x.view(64, -1).sum(1), "read, torch max": lambda: x.view(64, -1).amax(1)}
    calls: dict[str, Call] = {}
    for block, warps in TILES:
        for tiles in (1, 4):
            sums = torch.empty(x.numel() // (block * tiles), dtype=x.dtype, device=x.device)

            def call(
                sums: torch.Tensor = sums, block: int = block, tiles: int = tiles, warps: int = warps
            ) -> torch.Tensor:
                _read_kernel[(sums.numel(),)](sums, x, BLOCK=block, TILES=tiles, num_warps=warps)
                return sums

            calls[f"read, triton {tiles} x {block} x {warps} warps"] = call
    return calls


def check_bandwidths(x: torch.Tensor) -> None:
    """Holds every copy to x and every sum to x's, bit for bit (integers wrap alike in any order).

    Raises:
        RuntimeError: one of them is wrong, and its time would mean nothing.
    """
    out = torch.zeros_like(x)
    for name, call in copy_calls(out, x).items():
        out.zero_()
        call()
        if not torch.equal(out, x):
            raise RuntimeError(f"{name}: the copy differs from its source")
    if x.is_cuda:
        total = x.sum(dtype=torch.int64).item() % 2**32
        for name, call in read_calls(x).items():
            if call().sum(dtype=torch.int64).item() % 2**32 != total:
                raise RuntimeError(f"{name}: the sum is wrong")


def bandwidths(device: torch.device, size: int, rounds: int) -> dict[str, float | None]:
    """Bytes a second of copying (read + written) and of reading `size` bytes of random integers."""
    x = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    check_bandwidths(x)
    copied = best_seconds(copy_calls(torch.empty_like(x), x), device, rounds)
    # torch's integer sum does not vectorise on a CPU.
    read = best_seconds(read_calls(x if x.is_cuda else torch.rand(size // 4)), device, rounds)
    return {"copy_bytes_per_s": _rate(2 * size, copied), "read_bytes_per_s": _rate(size, read)}


# ---------------------------------------------------------------------------------------------------------------- GEMM


def _mm(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Call]:
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    out, transposed = torch.empty(m, n, device=device, dtype=dtype), b.t().contiguous()
    return {"mm": lambda: torch.mm(a, b.t(), out=out), "mm, B in rows of N": lambda: torch.mm(a, transposed, out=out)}


def _fp8(m: int, n: int, k: int, device: torch.device) -> dict[str, Call]:
    a, b = (torch.randn(rows, k, device=device).to(torch.float8_e4m3fn) for rows in (m, n))
    one = torch.ones((), device=device)

    def call(fast: bool) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return {"fp8 _scaled_mm": lambda: call(True), "fp8 _scaled_mm, precise sums": lambda: call(False)}


def _int8(m: int, n: int, k: int, device: torch.device) -> dict[str, Call]:
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    return {"int8 _int_mm": lambda: torch._int_mm(a, b.t())}


def gemms(device: torch.device, sizes: Sequence[tuple[int, int, int]], rounds: int) -> dict[str, float | None]:
    """Operations a second of the best GEMM of each dtype over `sizes` (M, N, K)."""
    kinds: dict[str, Callable[[int, int, int], dict[str, Call]]] = {
        "gemm_bf16_flops_per_s": lambda m, n, k: _mm(m, n, k, torch.bfloat16, device),
        "gemm_fp8_flops_per_s": lambda m, n, k: _fp8(m, n, k, device),
        "gemm_int8_ops_per_s": lambda m, n, k: _int8(m, n, k, device),
        "gemm_fp32_flops_per_s": lambda m, n, k: _mm(m, n, k, torch.float32, device),
    }
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    peaks: dict[str, float | None] = {}
    for name, make in kinds.items():
        only_gpu = name != "gemm_fp32_flops_per_s"
        if (only_gpu and device.type != "cuda") or ("fp8" in name and not has_fp8):
            peaks[name] = None
            continue
        rates = []
        for m, n, k in sizes:
            print(f"  {name} {m} x {n} x {k}", file=sys.stderr)
            rates.append(_rate(2 * m * n * k, best_seconds(make(m, n, k), device, rounds)))
        peaks[name] = max((rate for rate in rates if rate), default=None)
    return peaks


# ------------------------------------------------------------------------------------------------------------- launches


def cpu_us(call: Call, device: torch.device, count: int = 300, rounds: int = 15) -> float:
    """The CPU's microseconds of one call; few enough at a time that the launch queue never fills and makes it wait."""

    def once(n: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - start) / n * 1e6

    once(20)
    return statistics.median(once(count) for _ in range(rounds))


@cache
def _empty_op() -> tuple[Any, torch.library.Library]:
    """An op that does nothing, registered as octavo's ops are, and the library that it lives as long as."""
    library = torch.library.Library("octavo_ceilings", "DEF")
    library.define("nothing(Tensor x) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl("nothing", lambda x: None, key)
    return torch.ops.octavo_ceilings.nothing.default, library


def launches(device: torch.device, rounds: int) -> dict[str, float | None]:
    """Microseconds of the CPU for one call of each kind; of the GPU for an empty kernel in a graph."""
    a, b = torch.randn(256, device=device), torch.randn(256, device=device)
    empty_op, _ = _empty_op()
    costs: dict[str, float | None] = {
        "torch.empty": cpu_us(lambda: torch.empty(256, device=device), device),
        "empty op (define + impl)": cpu_us(lambda: empty_op(a), device),
        "torch.add": cpu_us(lambda: torch.add(a, b), device),
        "triton kernel[grid]": None,
        "triton CompiledKernel[grid]": None,
        "triton CompiledKernel.run": None,
        "CUDA graph node (GPU time)": None,
    }
    if device.type != "cuda":
        return costs
    compiled = _empty_kernel[(1,)](a, b, 256)
    stream = driver.active.get_current_stream(torch.cuda.current_device())
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)

    def run() -> None:
        compiled.run(1, 1, 1, stream, compiled.function, compiled.packed_metadata, None, *hooks, a, b, 256)

    costs["triton kernel[grid]"] = cpu_us(lambda: _empty_kernel[(1,)](a, b, 256), device)
    costs["triton CompiledKernel[grid]"] = cpu_us(lambda: compiled[(1, 1, 1)](a, b, 256), device)
    costs["triton CompiledKernel.run"] = cpu_us(run, device)
    node = best_seconds({"graph node": lambda: _empty_kernel[(1,)](a, b, 256)}, device, rounds)
    costs["CUDA graph node (GPU time)"] = node * 1e6 if node else None
    return costs


# ------------------------------------------------------------------------------------------------------------- command


def measure(
    device: torch.device, *, size: int, sizes: Sequence[tuple[int, int, int]], rounds: int = 20
) -> dict[str, Any]:
    """All ceilings of a device.

    Args:
        device: a GPU, or the CPU.
        size: bytes that the bandwidths are measured over; a multiple of 256 KiB, and far more than the caches hold.
        sizes: (M, N, K) of the GEMMs.
        rounds: replays that each median is over.
    """
    if size % 2**18:
        raise ValueError(f"size: {size}; expected a multiple of 256 KiB")
    spin_up(device)
    bandwidth = bandwidths(device, size, rounds)
    peaks = gemms(device, sizes, rounds)
    return {**bandwidth, **peaks, "launch_us": launches(device, rounds)}


_TABLE = (
    ("copy_bytes_per_s", "copy, read + written", 1e9, "GB/s"),
    ("read_bytes_per_s", "read", 1e9, "GB/s"),
    ("gemm_bf16_flops_per_s", "GEMM bf16", 1e12, "TFLOP/s"),
    ("gemm_fp8_flops_per_s", "GEMM fp8", 1e12, "TFLOP/s"),
    ("gemm_int8_ops_per_s", "GEMM int8", 1e12, "TOP/s"),
    ("gemm_fp32_flops_per_s", "GEMM fp32", 1e12, "TFLOP/s"),
)


def table(found: Mapping[str, Any]) -> str:
    """The ceilings as lines of text."""
    lines = [(name, found[key], factor, unit) for key, name, factor, unit in _TABLE]
    lines += [(f"one call: {name}", us, 1.0, "µs") for name, us in found["launch_us"].items()]
    return "\n".join(f"{name:40}" + ("-" if v is None else f"{v / f:10.4g} {unit}") for name, v, f, unit in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=default_folder(), help="where <gpu>/ceilings.json goes (bench/results)"
    )
    parser.add_argument("--mib", type=int, help="MiB that the bandwidths are measured over")
    parser.add_argument("--gemm", type=int, nargs=3, metavar=("M", "N", "K"), help="one GEMM instead of the usual")
    parser.add_argument("--rounds", type=int, default=20, help="replays that each median is over")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    gpu = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    size = args.mib * 2**20 if args.mib else GPU_BYTES if on_gpu else CPU_BYTES
    sizes = [tuple(args.gemm)] if args.gemm else GPU_GEMMS if on_gpu else CPU_GEMMS
    made = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "commit": commit()}
    made["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    found = measure(device, size=size, sizes=sizes, rounds=args.rounds)
    print(table(found))
    path = args.out / folder_name(gpu) / "ceilings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made | found, indent=2) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
