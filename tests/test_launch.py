"""The launch path without a GPU, under every supported Triton: see tests/launch_worker.py for what is compared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import octavo
import octavo.testing
from octavo.kernels.tiles import row_strides

WORKER = Path(__file__).parent / "launch_worker.py"
CHECKS = [line.split()[1].split("(")[0] for line in WORKER.read_text().splitlines() if line.startswith("def check_")]
ROOT = WORKER.parent.parent
TRITONS = {triton.__version__: ""} | {
    p.name.removeprefix("triton-"): str(p) for p in sorted((ROOT / ".venv").glob("triton-*")) if p.is_dir()
}
"""Version -> where it lies, if not on the path: `make test` installs there what torch did not bring."""


@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize("check", CHECKS)
def test_launching(check, version, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if check == "check_warm":
        environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [TRITONS[version], environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, WORKER, check], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert f"{check} passed with Triton {version}" in run.stdout


@pytest.mark.skipif("OCTAVO_TRITONS" not in os.environ, reason="make test installs the versions beside torch's own")
def test_every_supported_triton_was_there():
    assert {".".join(v.split(".")[:2]) for v in TRITONS} >= {"3.6", "3.7"}


def test_one_token_is_walked_as_many_are():
    """What a launch is compiled for must not change with the number of tokens."""
    qkv = torch.empty(5, 12, 64)
    for x, inner in ((torch.empty(5, 4, 64), 1), (qkv[:, :8], 8), (qkv[:, 8:], 4), (qkv.view(5, -1)[:, :512], 1)):
        many, one = row_strides("x", x), row_strides("x", x[:1])
        assert many == one and many[0] == inner, (many, one)
    assert row_strides("x", torch.empty(4, 1, 3, 1, 8)[:, :, ::2, :, :]) == (2, 24, 16)
    assert row_strides("x", torch.empty(8)) == (1, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="names a device that is not there")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(device="cuda"), "device: 'cuda', but this machine has 0 GPUs; to compile without one, name"),
        (dict(device="sm_70"), "device: 'sm_70'; expected \"cuda\""),
        (dict(device="cpu"), "device: 'cpu'; expected"),
        (dict(device="sm_90", processes=0), "processes: 0; expected at least 1"),
    ],
)
def test_warmup_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        octavo.warmup([], **arguments)


@pytest.mark.skipif(not octavo.testing.INTERPRET, reason="is about the interpreter")
def test_the_interpreter_has_nothing_to_warm_up():
    x = torch.empty(1, 64, device="meta", dtype=torch.float16)
    assert octavo.warmup([lambda: octavo.relu2(x)], device="sm_90").kernels == ()


DYING = """
import os, sys
from octavo.kernels import warmup
import octavo, torch
real = warmup.subprocess.Popen
def popen(command, **options):
    code = command[2].partition("; from")[0] + sys.argv[1]
    return real([*command[:2], code if "exit" in sys.argv[1] else sys.argv[1] + command[2]], **options)
warmup.subprocess.Popen = popen
x = torch.empty(1, 64, device="meta", dtype=torch.float16)
print(octavo.warmup([lambda: octavo.relu2(x)], device="sm_90"))
"""


@pytest.mark.parametrize(
    ("trick", "expected"),
    [
        ("; sys.exit(3)", "RuntimeError: the process that compiled _activation_kernel died"),
        ("print('noise', flush=True); ", "1 kernels ready"),
    ],
)
def test_workers_that_die_or_print(trick, expected):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", DYING, trick], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert expected in run.stdout + run.stderr, run.stderr[-3000:]


EXPERTS = dict(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_local_experts=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(config=dict(hidden_size=64)), ValueError, "config: intermediate_size is missing"),
        (
            dict(weights="int3"),
            ValueError,
            "weights: 'int3'; expected one of dense, int4, int8, int8_int8, fp8, fp8_blocks",
        ),
        (dict(dtype=torch.int8), TypeError, "dtype: torch.int8; expected"),
        (dict(max_num_batched_tokens=0), ValueError, "max_num_batched_tokens: 0"),
        (
            dict(config=dict(hidden_size=64, intermediate_size=64, num_attention_heads=1, hidden_act="tanh")),
            ValueError,
            "hidden_act: 'tanh'; expected one of silu",
        ),
        (dict(config=EXPERTS), ValueError, "config: num_experts_per_tok is missing"),
        (
            dict(config=EXPERTS | dict(num_experts_per_tok=2, hidden_act="gelu")),
            ValueError,
            "hidden_act: 'gelu'; expected silu, which is that of octavo's experts",
        ),
    ],
)
def test_model_calls_errors(change, error, message):
    config = dict(hidden_size=64, intermediate_size=64, num_attention_heads=1)
    with pytest.raises(error, match=message):
        octavo.model_calls(**(dict(config=config) | change))


def test_token_counts():
    assert octavo.token_counts(1) == [1]
    assert octavo.token_counts(20) == [1, 2, 3, 4, 5, 8, 9, 16, 17, 20]
    with pytest.raises(ValueError, match="most: 0; expected at least 1"):
        octavo.token_counts(0)


def test_compile_count_says_when_it_can_not_know(monkeypatch):
    assert octavo.compile_count() >= 0
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **event: None)
    with pytest.raises(RuntimeError, match="listener was replaced"):
        octavo.compile_count()
