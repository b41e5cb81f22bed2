"""Compiles, without a GPU, every kernel that the `launches` function of a test module starts; a JSON line each.

    python tests/compile_worker.py tests/test_norm.py
    python tests/compile_worker.py tests/test_norm.py --whole sm_90 --every 8

The second line compiles for sm_90 all but what differs from another in nothing but fp16 for bf16, and every eighth of
the others: of each architecture and Triton its own ones, by a hash, so that every run has the same.

Runs in a process of its own because the tests' process has the interpreter in place of the compiler.
"""

import argparse
import importlib.util
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import torch
import triton

from octavo.kernels.compilation import compile_for
from octavo.kernels.launch import Launch, record_launches
from octavo.kernels.tiles import KNOWN_DEVICES, DeviceProperties

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def dumped(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack and local bytes as ptxas allotted them; stack or local bytes are spills."""
    text = dumped(cubin, "--dump-resource-usage")
    return {key.lower(): int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def serialised(cubin: bytes) -> bool:
    """Whether there is a wait behind each of Hopper's asynchronous products: ptxas does it where registers run out."""
    text = dumped(cubin, "-sass")
    return text.count("WARPGROUP.DEPBAR") >= len(re.findall(r"GMMA\.", text))


def described(launch: Launch) -> str:
    """What decides which kernel is compiled, short of how the numbers divide."""
    types = [str(getattr(getattr(a, "base", a), "dtype", type(a).__name__)) for a in launch.args]
    constexprs = sorted((name, str(value)) for name, value in launch.constexprs.items())
    return f"{launch.kernel.__name__} {constexprs} {launch.num_warps} {launch.num_stages} {types}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--whole", nargs="*", default=["sm_80", "sm_89", "sm_90"])
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    launches = []
    for path in options.paths:
        spec = importlib.util.spec_from_file_location("launching", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        launches.append(module.launches)
    for properties in KNOWN_DEVICES.values():
        # A process each: Triton keeps in one the fp8 conversions of the first architecture that it compiles for.
        args = properties, launches, options.whole, options.every
        process = multiprocessing.get_context("fork").Process(target=compile_all, args=args)
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"compiling for {properties.name} ended with {process.exitcode}")


def compile_all(properties: DeviceProperties, launches: list, whole_archs: list[str], every: int) -> None:
    arch = "sm_{}{}".format(*properties.capability)
    for of_module in launches:
        seen, in_bf16 = set(), set()
        for dtype in (torch.bfloat16, torch.float16):
            with record_launches(properties) as recorded:
                of_module(dtype)
            for launch in recorded:
                text = described(launch)
                alike = text.replace("bfloat16", "float16")
                if dtype == torch.bfloat16:
                    in_bf16.add(alike)
                whole = arch in whole_archs and (dtype == torch.bfloat16 or alike not in in_bf16)
                if not whole and zlib.crc32(f"{triton.__version__} {arch} {text}".encode()) % every:
                    continue
                try:
                    compiled = compile_for(launch, properties.capability)
                except Exception as error:
                    error.add_note(f"{arch}: {text}")
                    raise
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                row = {
                    "triton": triton.__version__,
                    "device": properties.name,
                    "kernel": launch.kernel.__name__,
                    "constexprs": {k: str(v) for k, v in launch.constexprs.items()},
                    "num_warps": launch.num_warps,
                    "num_stages": launch.num_stages,
                    "shared": compiled.metadata.shared,
                    "chained": compiled.metadata.launch_pdl,
                    "waits": compiled.asm["ptx"].count("griddepcontrol.wait"),
                    "shared_limit": properties.shared_memory,
                } | resources(compiled.asm["cubin"])
                gluon = type(launch.kernel).__name__ == "GluonJITFunction"
                row["serialised"] = gluon and "wgmma" in compiled.asm["ptx"] and serialised(compiled.asm["cubin"])
                print(json.dumps(row))


if __name__ == "__main__":
    main()
