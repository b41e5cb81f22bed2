"""Where there is no GPU, the op tests run the kernels under Triton's interpreter; the GPU tests are deselected."""

import os
import platform

# OpenBLAS has kernels for each processor, and of some of them a row of a product depends on where in its matrix it is:
# then the interpreter's tl.dot, unlike a GPU's, is not batch-invariant. This one is, and runs on all. Read by numpy.
if platform.machine() in ("x86_64", "AMD64"):
    os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"
if "PYTEST_XDIST_WORKER" in os.environ:  # which are as many as there are cores; numpy's and torch's threads would spin
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before octavo is

from octavo.testing import poisoned_memory, without_interpreter  # noqa: E402

settings.register_profile(
    "octavo",
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("octavo")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("-m") or ""
    skipped = {m for m, unwanted in (("gpu", not HAS_GPU), ("slow", "slow" not in wanted)) if unwanted}
    dropped = [item for item in items if any(item.get_closest_marker(m) for m in skipped) or _is_interpreted(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]
    items.sort(key=lambda item: item.path.name != "test_compile.py")  # what takes longest starts first


def _is_interpreted(item: pytest.Item) -> bool:
    """Whether an op test wants the interpreter on a machine whose GPU runs the kernels natively."""
    return HAS_GPU and "device" in item.fixturenames and item.callspec.params.get("device") == "cpu"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the op under test runs its Triton kernel: natively on a GPU, else under the interpreter."""
    return torch.device(request.param)


HALF = [
    torch.float16,
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter's bfloat16 is wrong
]


@pytest.fixture(params=HALF, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """fp16 and fp32 everywhere, bf16 on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest):
    """What a kernel forgets to write is NaN. Engine tests run on the CPU backend and are spared."""
    torch.manual_seed(0)
    if "engine" in request.node.path.parts:
        with without_interpreter():
            yield
    else:
        with poisoned_memory():
            yield


@pytest.fixture(autouse=True)
def _memory_given_back():
    """GPU memory that torch would keep for this process's next test, which the other processes' tests want."""
    yield
    if torch.cuda.is_initialized():  # asking for anything else would initialise CUDA
        torch.cuda.empty_cache()
