"""Groups of peers: which packages share a process, what each needs in its environment, and whether it is there.

Peers conflict with each other (two want different versions of the same dependency), so each group has a process of its
own, with its folders of packages ("site") ahead of octavo on PYTHONPATH.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from octavo.bench.harness import Benchmark

_CACHE = Path(tempfile.gettempdir()) / "octavo-bench"  # what peers compile, kept from run to run

# What must be set before Python starts. A variable that is set already keeps its value.
ENVIRONMENT: dict[str, dict[str, str]] = {
    "vllm": {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "CUDA_CACHE_PATH": str(_CACHE / "cuda"),  # Marlin's PTX is compiled by the driver at first use
        "CUDA_CACHE_MAXSIZE": str(2**32),
        "VLLM_TUNED_CONFIG_FOLDER": str(_CACHE / "vllm-moe"),  # bench_fused_moe puts there what an H100 lacks
    },
    "flashinfer": {"FLASHINFER_WORKSPACE_BASE": str(_CACHE / "flashinfer"), "MAX_JOBS": str(os.cpu_count() or 1)},
    "triton-peers": {"TRITON_CACHE_DIR": str(_CACHE / "triton")},
}


def parse_sites(arguments: Iterable[str]) -> dict[str, list[str]]:
    """The folders of each group, from "NAME=PATH[:PATH]" arguments.

    Raises:
        ValueError: not of that form, or a path that is no folder.
    """
    sites: dict[str, list[str]] = {}
    for argument in arguments:
        name, equals, paths = argument.partition("=")
        folders = [path for path in paths.split(os.pathsep) if path]
        if not (name and equals and folders):
            raise ValueError(f"peer-site: {argument!r}; expected NAME=PATH[{os.pathsep}PATH]")
        missing = [path for path in folders if not Path(path).is_dir()]
        if missing:
            raise ValueError(f"peer-site: {missing[0]!r} is no folder")
        sites[name] = [os.path.abspath(path) for path in folders]
    return sites


def groups(benchmarks: Iterable[Benchmark]) -> list[str]:
    """The groups that benchmarks have providers of, in order of appearance."""
    return list(dict.fromkeys(p.peer for b in benchmarks for p in b.PROVIDERS.values() if p.peer is not None))


def importable(group: str, benchmarks: Iterable[Benchmark]) -> bool:
    """Whether this environment has a package of a group; a provider that names no package counts as present."""
    packages = {p.package for b in benchmarks for p in b.PROVIDERS.values() if p.peer == group}
    return any(package is None or _installed(package) for package in packages)


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return importlib.util.find_spec(package.replace("-", "_")) is not None
    return True


def environment(group: str | None, folders: Sequence[str], tree: Path) -> dict[str, str]:
    """The environment of a child process.

    Args:
        group: the group of peers, None for octavo and torch alone.
        folders: the group's site.
        tree: the folder that holds the package `octavo` to import.

    The interpreter of Triton is off: on a CPU octavo's own backend is what is measured.
    """
    wanted: Mapping[str, str] = ENVIRONMENT.get(group or "", {})
    child = {**wanted, **os.environ}
    child.pop("TRITON_INTERPRET", None)
    if group == "flashinfer" and "CUDA_HOME" not in child and (home := _cuda_home()):
        child["CUDA_HOME"] = home
    path = [*folders, str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    child["PYTHONPATH"] = os.pathsep.join(path)
    return child


def _cuda_home() -> str | None:
    nvcc = shutil.which("nvcc")
    if nvcc:
        return str(Path(nvcc).resolve().parent.parent)
    from torch.utils.cpp_extension import CUDA_HOME  # finds the usual places; slow to import

    return CUDA_HOME
