"""Every kernel × shipped tile choice compiles for sm_80, sm_89 and sm_90: shared memory within the limit, no spills.

`pytest -m slow tests/test_compile.py` proves it, with every Triton that is installed. The ordinary run compiles all for
sm_90 alone, and a sample of the rest (`WHOLE`).
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from test_launch import TRITONS

TESTS = Path(__file__).parent
LONGEST = [f"test_{name}.py" for name in ("int4_linear", "paged_attention", "paged_features", "w8a8_linear")]
"""The first to be compiled, so that they are not what a run waits for in the end."""
MODULES = [p.name for p in TESTS.glob("test_*.py") if "\ndef launches(" in p.read_text()]
MODULES.sort(key=lambda name: (name not in LONGEST, name))
WHOLE, EVERY, EVERY_OF_OTHERS = ["--whole", "sm_90", "--every"], "8", "24"
"""What the ordinary run compiles: all for sm_90 with the Triton that is installed beside torch, but for fp16 where bf16
has the same, and every eighth of the rest; with each other Triton every twenty-fourth kernel of any architecture."""
SPILLED = {
    "_prefill_kernel": 56,
    "_int4_hopper_kernel": 56,
    "_int8_hopper_kernel": 48,
    "_grouped_int4_kernel": 32,
    "_grouped_int8_kernel": 48,
    "_grouped_hopper_kernel": 24,
}
"""Bytes of the stack that a Gluon kernel may use: the warps that load have few registers, and those that compute may
keep numbers of a tile in memory (prefill with a window and a softcap, most: 56, else at most 48; int4 with two blocks
of outputs and 128 tokens: 56; int8 products by experts: results that wait for the next tile, with Triton 3.6).
They spill nothing in their innermost loop, but for up to five numbers of the four warpgroups of int4 by experts with 64
tokens, the scales of experts' weights in groups of 32, and two of prefill with a window."""


def compiled(version, modules, *options):
    """Runs the worker with a Triton; returns the devices that it compiled for, once their kernels are looked at."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [TRITONS[version], environment.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, TESTS / "compile_worker.py", *(TESTS / module for module in modules), *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        assert row["triton"] == version
        assert row["shared"] <= row["shared_limit"], row
        assert row["stack"] <= SPILLED.get(row["kernel"], 0) and row["local"] == 0, row
        assert not row["serialised"] or not row["kernel"].startswith(("_grouped", "_linear_few")), row
        chained = "CHAINED" in row["constexprs"] and row["device"] == "H100"
        # The compiler may write a wait down twice, on either side of a branch.
        assert row["chained"] == chained and bool(row["waits"]) == chained, "a chained kernel waits for the one before"
    return {row["device"] for row in rows}


@pytest.mark.parametrize("version", [version for version in TRITONS if version != triton.__version__])
def test_compiles_with_other_tritons(version):
    assert compiled(version, MODULES, "--whole", "--every", EVERY_OF_OTHERS) == {"A100", "L40S", "H100"}


@pytest.mark.parametrize("module", MODULES)
def test_compiles(module):
    assert "H100" in compiled(triton.__version__, [module], *WHOLE, EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITONS)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_everywhere(module, version):
    assert compiled(version, [module]) == {"A100", "L40S", "H100"}


def test_kernels_wait_before_they_touch_memory():
    """A chained kernel runs beside the one before it: all that it does ahead of the wait is arithmetic.

    An early return ahead of the wait would be as wrong: a kernel that has ended says that those before it have.
    """
    kernels = [
        node
        for path in (TESTS.parent / "kernels").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any("triton.jit" in ast.unparse(d) for d in node.decorator_list)  # Gluon's are long
    ]
    assert len(kernels) > 10
    for kernel in kernels:
        assert kernel.args.args[-1].arg == "CHAINED", kernel.name
        texts = [ast.unparse(statement) for statement in kernel.body]
        at = texts.index("wait_for_previous(CHAINED)")
        if kernel.name != "_zero_kernel":  # which is one program, for the next to start beside it
            assert texts[at + 1] == "let_next_start(CHAINED)", kernel.name
        early = "\n".join(texts[:at])
        assert not any(word in early for word in ("load(", "store(", "atomic", "return")), (kernel.name, early)


def test_every_launcher_is_compiled_here():
    """Each function that starts a kernel is called by the `launches` of some test module."""
    functions = [
        node
        for path in (TESTS.parent / "kernels").rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_cuda")
    ]
    launchers = {f.name for f in functions if any(getattr(n, "id", "") == "launch" for n in ast.walk(f))}
    assert len(launchers) > 5
    tested = "".join((TESTS / m).read_text().partition("\ndef launches(")[2] for m in MODULES)
    assert not {name for name in launchers if f".{name}(" not in tested}
