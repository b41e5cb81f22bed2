"""Compiles, without a GPU, every kernel that the `launches` function of a test module starts; a JSON line each.

python tests/compile_worker.py tests/test_norm.py

Runs in a process of its own because the tests' process has the interpreter in place of the compiler.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from octavo.kernels.compilation import compile_for
from octavo.kernels.launch import record_launches
from octavo.kernels.tiles import KNOWN_DEVICES

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack and local bytes as ptxas allotted them; stack or local bytes are spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {key.lower(): int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("launching", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for properties in KNOWN_DEVICES.values():
        seen = set()
        for dtype in (torch.float16, torch.bfloat16):
            with record_launches(properties) as recorded:
                module.launches(dtype)
            for launch in recorded:
                compiled = compile_for(launch, properties.capability)
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                row = {
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
                print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1])
