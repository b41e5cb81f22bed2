"""A wheel, an sdist and an editable install, each in an environment of its own that has nothing of the checkout."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import octavo

ROOT = Path(__file__).parent.parent
PROBE = """
import importlib.util, pathlib, octavo, octavo.engine, octavo.testing
import octavo.kernels.attention.paged, octavo.kernels.quant.int4, octavo.reference.norm, octavo.bench.run
import torch
assert all(importlib.util.find_spec(name) is None for name in ("kernels", "reference", "bench"))
assert "rms_norm" in octavo.bench.harness.benchmarks()
assert torch.equal(octavo.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0), torch.ones(1, 4))
assert (pathlib.Path(octavo.__file__).parent / "py.typed").exists()
from octavo.engine.quantize.run import default_calibration
assert len(default_calibration()) > 40_000
print(pathlib.Path(octavo.__file__).parent)
"""


def call(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what would be committed, so that building leaves nothing behind in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("octavo", "kernels", "reference", "engine", "bench"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """A folder with an sdist and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)
    return out


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_installs(kind, tree, built, tmp_path):
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env/bin/python"
    packages = Path(call(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # torch and triton from here; path files in there are not read, so this checkout's octavo does not come along
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    what = {
        "wheel": [next(built.glob("*.whl"))],
        "sdist": [next(built.glob("*.tar.gz"))],
        "editable": ["--editable", tree],
    }[kind]
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--ignore-installed")
    call(*pip, "--no-build-isolation", *what)
    where = Path(call(python, "-c", PROBE, cwd=tmp_path).strip())
    assert where == (tree / "octavo" if kind == "editable" else packages / "octavo")
    if kind == "wheel":
        command = ("bench", "kernels", "--op", "rms_norm", "--shapes", "T=3,hidden=64", "--rounds", "2")
        call(
            python,
            "-m",
            "octavo.engine.cli",
            *command,
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OCTAVO_COMMIT": ""},
        )
        rows = (tmp_path / "octavo-bench/cpu/rms_norm.csv").read_text()
        assert f'rms_norm,octavo,"T=3,hidden=64",bfloat16,cpu,{torch.__version__}' in rows
        assert f",{octavo.__version__},v{octavo.__version__}," in rows
