"""Every kernel × shipped tile choice compiles for sm_80, sm_89 and sm_90: shared memory within the limit, no spills."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULES = sorted(p.name for p in TESTS.glob("test_*.py") if "\ndef launches(" in p.read_text())
SPILLED = {"_prefill_kernel": 40, "_int4_hopper_kernel": 32}
"""Bytes of the stack that a Gluon kernel may use: the warps that load have few registers, and those that compute may
keep numbers of a tile in memory. They spill nothing in their innermost loop, but for up to five numbers
of int4's four warpgroups with 64 tokens."""


@pytest.mark.parametrize("module", MODULES)
def test_compiles_everywhere(module):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, TESTS / "compile_worker.py", TESTS / module],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {row["device"] for row in rows} == {"A100", "L40S", "H100"}
    for row in rows:
        assert row["shared"] <= row["shared_limit"], row
        assert row["stack"] <= SPILLED.get(row["kernel"], 0) and row["local"] == 0, row
        chained = "CHAINED" in row["constexprs"] and row["device"] == "H100"
        # The compiler may write a wait down twice, on either side of a branch.
        assert row["chained"] == chained and bool(row["waits"]) == chained, "a chained kernel waits for the one before"


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
