"""The layout, the layers and the names that the rest relies on."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREES = ("octavo", "kernels", "reference", "engine", "bench")
NO_TORCH = {f"engine/{name}.py" for name in ("options", "params", "garbage", "sequence", "block_manager", "scheduler")}
ENGINE_FRIENDS = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "gguf", "huggingface_hub", "jinja2"}
ENGINE_FRIENDS |= {"typer", "rich"}
# What bench/ may import when it is imported; peers are imported inside the functions that need them.
BENCH_FRIENDS = {"torch", "triton", "numpy", "octavo"}
BENCH_EXTRAS = {
    "bench/figures.py": {"matplotlib", "PIL"},
    "bench/sweep_figure.py": {"matplotlib"},
    "bench/cpu_decode.py": {"transformers"},
}
BENCH_COMMANDS = ("engine/bench_commands.py", "engine/cli.py")
MODULES = sorted(p for tree in TREES for p in (ROOT / tree).rglob("*.py"))
MODULES = [p for p in MODULES if not any(folder.is_symlink() for folder in p.parents)]


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "octavo" else ("octavo", *parts)
    return ".".join(parts).removesuffix(".__init__")


def outside_functions(tree):
    """What is done when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not for_types:
            yield node
            yield from outside_functions(node)


def imports(path, walk=ast.walk):
    """Full names of what a module imports; `from a import b` counts as a.b where that is a module."""
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in {name_of(p) for p in MODULES} else node.module


def allowed(path, name):
    relative, top = path.relative_to(ROOT).as_posix(), name.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if relative in NO_TORCH:
        return name in {name_of(ROOT / p) for p in NO_TORCH}
    tree = relative.split("/")[0]
    if tree == "reference":
        return top == "torch" or name.startswith("octavo.reference")
    if tree == "kernels":
        return top in ("torch", "triton", "numpy") or name.startswith(("octavo.kernels", "octavo.reference"))
    if tree == "octavo":
        return top == "torch" or name.startswith("octavo.kernels")
    if tree == "bench":
        return top in BENCH_FRIENDS | BENCH_EXTRAS.get(relative, set())
    if name.startswith("octavo.bench"):  # the command line starts it; inside a function: see below
        return relative in BENCH_COMMANDS
    return top in ENGINE_FRIENDS or name == "octavo" or name.startswith("octavo.engine")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_layers(path):
    walk = outside_functions if path.is_relative_to(ROOT / "bench") else ast.walk
    wrong = [name for name in imports(path, walk) if not allowed(path, name)]
    assert not wrong, f"{path.relative_to(ROOT)} must not import {wrong}"


@pytest.mark.parametrize("relative", BENCH_COMMANDS)
def test_the_command_line_imports_bench_only_when_asked(relative):
    path = ROOT / relative
    assert any(name.startswith("octavo.bench") for name in imports(path))
    assert not any(name.startswith("octavo.bench") for name in imports(path, outside_functions))


def test_nobody_imports_tests():
    for path in MODULES:
        assert not any(name.split(".")[0] == "tests" for name in imports(path)), path


def test_op_modules_share_jit_helpers_only():
    """No op module reaches into another one's launcher, fake or public function; `moe/` may compose."""
    ops = {name_of(p): p for p in MODULES if "= register(" in p.read_text()}
    assert ops
    for path in ops.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ops and "moe" not in path.parts:
                bodies = {n.name: n for n in ast.parse(ops[node.module].read_text()).body if hasattr(n, "name")}
                for alias in node.names:
                    decorators = [ast.unparse(d) for d in bodies[alias.name].decorator_list]
                    assert "triton.jit" in decorators, f"{path.name} imports {alias.name} from {node.module}"
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert not names & set(ops), f"{path.name} imports the op module {names}"


def test_packages_are_the_tree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name_of(p.parent / "__init__.py") for p in MODULES}
    assert set(settings["packages"]) == found
    assert settings["package-dir"] == {name: name.replace(".", "/").removeprefix("octavo/") for name in found}


def test_symlinks_are_relative_and_kernels_is_no_top_level_package():
    for tree in TREES[1:]:
        link = ROOT / "octavo" / tree
        assert link.is_symlink() and link.readlink() == Path("..") / tree
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "reference/__init__.py").exists()
    assert not (ROOT / "bench/__init__.py").exists()


def test_every_public_name_is_documented_and_registered():
    import octavo
    from octavo.testing import OPS

    assert len(set(octavo.__all__)) == len(octavo.__all__)
    for name in octavo.__all__:
        public = getattr(octavo, name)
        doc = public.__doc__
        assert doc and (isinstance(public, type) or "Raises:" in doc), name
        assert "Args:" in doc or isinstance(public, type) or not inspect.signature(public).parameters, name
    assert set(OPS) <= set(octavo.__all__), "an op without a public function of its name"


def test_import_touches_no_driver_and_no_heavy_library():
    code = (
        "import sys, torch\n"
        "torch.cuda.init = torch._C._cuda_init = lambda *a: sys.exit('CUDA was initialised')\n"
        "import octavo, octavo.engine, octavo.bench.run\n"
        "from octavo.bench.harness import benchmarks, load\n"
        "assert len([load(name) for name in benchmarks()]) > 5\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'transformers', 'gguf', 'safetensors', 'huggingface_hub', 'typer', 'matplotlib', 'rich'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
