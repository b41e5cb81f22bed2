"""The direct launch, its repetition, and warming up, on a machine without a GPU: what would reach CUDA is compared.

python tests/launch_worker.py CHECK          # one of the functions named check_*, in a process of its own

Triton's driver is replaced by one that compiles for sm_90 and keeps what its launcher would hand to the C function,
which is where Triton's own launch, octavo's direct one and a repeated call must agree. CPU tensors stand for CUDA's.
Runs under whichever Triton is first on the path: tests/test_launch.py runs it with every supported version.
"""

import ctypes
import gc
import struct
import sys
import threading
import warnings
import weakref
from contextlib import contextmanager

import torch
import triton
from op_cases import cases, serve
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler.compiler import LazyDict

import octavo
from octavo.kernels import launch as launching
from octavo.kernels import linear_few, registry, replay, starts, tiles
from octavo.kernels.registry import OPS

STREAM = 7
calls: list[tuple] = []
"""What reached CUDA: how a kernel was started, the values of its parameters, and what else Triton's function got."""
types_of: list[list[str]] = []
"""Of each kernel that was loaded, the types of its parameters; a kernel's number is its place here, plus one."""


class Launcher(CudaLauncher):
    """Triton's launcher for CUDA, with a C function that notes its arguments."""

    def __init__(self, src, metadata):
        self.num_ctas = 1
        self.global_scratch_size = self.profile_scratch_size = 0
        self.global_scratch_align = self.profile_scratch_align = 1
        self.launch_cooperative_grid = metadata.launch_cooperative_grid
        self.launch_pdl = metadata.launch_pdl
        self.arg_annotations, self.kernel_signature = "annotations", tuple(src.signature.values())
        described = getattr(metadata, "tensordesc_meta", None)
        types = []
        for kind in src.signature.values():
            rank = kind.split("]")[0].count(",") + 1 if kind.startswith("tensordesc") else 0
            types += ["map", *["i32"] * rank, *["i64"] * rank] if rank else [kind]
        types_of.append([kind for kind in types if kind != "constexpr"])
        self.launch = wrap_handle_tensordesc(lambda *args: calls.append(normal(args, types)), src.signature, described)


def normal(args: tuple, types: list[str]) -> tuple:
    """How Triton's C function was told to start a kernel, in the same form as `started`'s."""
    if isinstance(args[-1], tuple | list):  # Triton 3.7: the kernel's arguments are a sequence at the end
        head, kernel_args = args[:-1], args[-1]
    else:
        head, kernel_args = args[: -len(types)], args[-len(types) :]
    assert len(kernel_args) == len(types), (len(kernel_args), types)
    *grid, stream, function, cooperative, chained = head[:7]
    ((warps, programs_of_cluster, shared),) = (v for v in head[7:] if isinstance(v, tuple) and type(v[0]) is int)
    assert not cooperative and programs_of_cluster == 1
    # Triton's own launch also passes its hooks, and what it would tell them, where none is set.
    rest = [v for v in head[7:] if not isinstance(v, LazyDict | tuple) and getattr(v, "calls", 1) != []]
    values = []
    for value, kind in zip(kernel_args, types, strict=True):
        if kind == "map":
            values += value.values()
        elif kind.startswith("*"):
            values.append((value.data_ptr() if isinstance(value, torch.Tensor) else value) or 0)
        elif kind == "fp32":
            values += struct.unpack("f", struct.pack("f", value))
        elif kind != "constexpr":
            values.append(int(value))
    return (*grid, stream, function, warps, shared, bool(chained)), tuple(values), rest


class Map:
    """Stands for the driver's encoding of a descriptor: Triton's object ends in 128 bytes, which are 16 slots here."""

    __slots__ = [f"value{i:02}" for i in range(16)]

    def __init__(self, address: int, *what):
        for name, value in zip(self.__slots__, (address, *what, *[None] * (15 - len(what))), strict=True):
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    def values(self) -> list:
        return [getattr(self, name) for name in self.__slots__]


class Configuration(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [(name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "one", "another", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Configuration), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
def started(config, function, parameters):
    """Stands for cuLaunchKernelEx: notes what a plan hands to the driver."""
    c, values = config.contents, []
    types = types_of[function - 1]
    for kind, at in zip(types, parameters[: len(types)], strict=True):
        if kind == "map":
            values += [ctypes.cast(v, ctypes.py_object).value for v in (ctypes.c_void_p * 16).from_address(at)]
        elif kind == "fp32":
            values.append(ctypes.c_float.from_address(at).value)
        else:
            size = 64 if kind.startswith("*") else int(kind[1:])
            number = int.from_bytes(ctypes.string_at(at, max(size // 8, 1)), "little", signed=kind.startswith("i"))
            values.append(abs(number) if kind == "i1" else number)
    scratch = [ctypes.c_uint64.from_address(parameters[len(types) + i]).value for i in range(2)]
    assert (scratch, c.one, c.another, c.threads % 32) == ([0, 0], 1, 1, 0)
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, with a value that says yes.
    attributes = [ctypes.string_at(c.attributes, 12)] if c.count else []
    assert attributes in ([], [struct.pack("iii", 6, 0, 1)]) and c.count == len(attributes)
    head = c.x, c.y, c.z, c.stream, function, c.threads // 32, c.shared, bool(attributes)
    calls.append((head, tuple(values), []))
    return 0


class Driver:
    """A driver for a GPU that is not there."""

    launcher_cls = Launcher

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448}

        @staticmethod
        def load_binary(name, binary, shared, device):
            return 1, len(types_of), 32, 0, 1024

        fill_tma_descriptor = fill_tma_descriptor_tiled = staticmethod(Map)  # Triton 3.6's name, and 3.7's

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM


def pretend() -> None:
    """From here on, CPU tensors are launched on."""
    triton.runtime.driver.set_active(Driver())
    tiles._INTERPRETER = tiles.KNOWN_DEVICES[90]  # what tile choices for CPU tensors see
    launching.DEVICES.add("cpu")
    linear_few.LEAST_OUTPUTS = linear_few.LEAST_WEIGHTS = 0  # the layers of the cases are small
    driver = starts._module()
    driver.use(ctypes.cast(started, ctypes.c_void_p).value, 0)
    replay.plan_type = lambda: driver.Plan
    launching.is_current = lambda index: True
    for module in (launching, replay):
        module.current_stream = lambda index: STREAM
    for name, op in OPS.items():
        with warnings.catch_warnings(action="ignore"):  # the CPU backend is replaced on purpose
            registry._library.impl(name, op.launcher, "CPU", allow_override=op.cpu is not None)


@contextmanager
def ordinary():
    """Inside, kernels start by Triton's own launch, and nothing is repeated."""
    functions = [getattr(octavo, name) for name in OPS]
    plans = [dict(function.plans) for function in functions]
    for function in functions:
        function.plans.clear()
    starter, launching.starter, replay.starter = launching.starter, None, None
    try:
        yield
    finally:
        launching.starter = replay.starter = starter
        for function, before in zip(functions, plans, strict=True):
            function.plans.update(before)


def run(function, tensors: dict, others: dict) -> list:
    """Calls it, and returns what reached the C function, with names for the addresses of what it allocated."""
    calls.clear()
    result = function(**tensors, **others)
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    assert all(r.is_contiguous() for r in results)
    names = {t.data_ptr(): t.data_ptr() for t in tensors.values() if isinstance(t, torch.Tensor)}
    names |= {r.data_ptr(): f"out{i}" for i, r in enumerate(results) if r.numel()}
    for value in (v for _, values, _ in calls for v in values if type(v) is int and v > 2**40):  # no size is as large
        names.setdefault(value, f"workspace{len(names)}")
    assert {v for _, _, rest in calls for v in rest} <= {None, "annotations"}
    return [(head, tuple(names.get(v, v) if v else v for v in values)) for head, values, _ in calls]


@contextmanager
def kept():
    """Inside, what torch.empty returned is not let go, so that an address is one tensor's and no later one's too."""
    empty, tensors = torch.empty, []

    def keep(*args, **kwargs):
        tensors.append(empty(*args, **kwargs))
        return tensors[-1]

    torch.empty = keep
    try:
        yield
    finally:
        torch.empty = empty


def check_same_launches() -> None:
    """Triton's own launch, the direct launch and a repeated call hand the same things to CUDA."""
    pretend()
    assert {name.split()[0] for name in cases(1)} == set(OPS), "every op has a case"
    for tokens in (0, 1, 3, 16, 40):
        for name, (function, tensors, others) in cases(tokens).items():
            with ordinary(), kept():
                expected = run(function, tensors, others)
            # No tokens have a scale too.
            two = function in (octavo.sample, octavo.paged_attention) and not others.get("batch_invariant")
            two |= name == "int4_int8_linear with minimum"
            started = (1 + two) * (tokens > 0)
            if name.endswith("by tensor"):
                started = 1 if tokens == 1 else 2
            if name.startswith("moe_permute"):  # no pairs have offsets too
                few = tokens == 0 or (name == "moe_permute" and tokens <= 256)
                started = 1 if few else 4 if name.endswith("many pairs") else 2
            if function in (octavo.grouped_linear, octavo.fused_moe):  # fused_moe also sorts and adds up
                several = 2 if function is octavo.grouped_linear else 6 if name.endswith("int8") else 4
                started = several * (tokens > 0)
            assert len(expected) == started, (name, expected)
            before = sum(map(len, function.plans.values()))
            for _ in range(2):
                with kept():
                    direct = run(function, tensors, others)
                assert direct == expected, (name, tokens, direct, expected)
            assert sum(map(len, function.plans.values())) == before + 1, f"{name}: no plan"
            plan = next(reversed(function.plans.values()))[-1]
            repeated = run(function, tensors, others)
            assert repeated == expected, (name, tokens, repeated, expected)
            # Other tensors of the same kind, through the same plan.
            function, tensors, others = cases(tokens)[name]
            with ordinary():
                expected = run(function, tensors, others)
            runs = []

            def watched(*given, plan=plan, runs=runs):
                runs.append(plan(*given))
                return runs[-1]

            plans = next(reversed(function.plans.values()))
            plans[-1] = watched
            repeated = run(function, tensors, others)
            plans[-1] = plan
            assert len(runs) == 1 and runs[0] is not replay.MISS
            assert repeated == expected, (
                name,
                tokens,
                repeated,
                expected,
            )


def check_who_must_see_the_op() -> None:
    """Where something must see the op itself, its plan is not used, and none is made."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    pretend()
    x, weight = torch.zeros(4, 512, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
    seen = []

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    used = []
    real = replay.make_plan

    def make_plan(*recorded):
        plan = real(*recorded)

        def watched(*given):
            result = plan(*given)
            if result is not replay.MISS:
                used.append(plan)
            return result

        return watched

    replay.make_plan = make_plan

    def ran_plan(x=x, weight=weight) -> bool:
        used.clear()
        octavo.rms_norm(x, weight)
        return bool(used)

    for first in (True, False):  # without a plan, then with one
        plans = sum(map(len, octavo.rms_norm.plans.values()))
        for mode in (Function, Dispatch):
            seen.clear()
            with mode():
                assert not ran_plan()
            assert any("octavo" in name and "rms_norm" in name for name in seen), (mode, seen)
        with torch.profiler.profile() as profile:
            assert not ran_plan()
        assert "octavo::rms_norm" in {event.name for event in profile.events()}
        assert not ran_plan(x.clone().requires_grad_())
        assert not ran_plan(torch.zeros(2049, dtype=torch.bfloat16)[1:].view(4, 512))  # not aligned
        assert not ran_plan(weight, weight)
        entered = []
        triton.knobs.runtime.launch_enter_hook.add(entered.append)
        calls.clear()
        octavo.rms_norm(x, weight)
        assert not used and len(calls) == 1 and calls[0][2].count(triton.knobs.runtime.launch_enter_hook) == 1
        triton.knobs.runtime.launch_enter_hook.remove(entered.append)
        assert sum(map(len, octavo.rms_norm.plans.values())) == plans
        if first:
            assert not ran_plan() and not ran_plan() and ran_plan()
    with torch.inference_mode():
        assert not ran_plan() and not ran_plan() and ran_plan()  # another kind of call: a plan of its own
    parameter = torch.nn.Parameter(weight)
    with torch.no_grad():
        ran_plan(weight=parameter), ran_plan(weight=parameter)
        assert ran_plan(weight=parameter)
    assert not ran_plan(weight=parameter) and not ran_plan(weight=parameter) and not ran_plan(weight=parameter)
    eps = torch.tensor(1e-5)  # the dispatcher takes it for a number, which may change
    for _ in range(3):
        used.clear()
        octavo.rms_norm(x, weight, eps)
        assert not used
    with torch.device("cpu"):  # a function mode, but one that watches nothing
        assert ran_plan()
    assert ran_plan()
    used.clear()
    torch.compile(octavo.rms_norm, backend="eager", fullgraph=True)(x, weight)
    assert not used, "a compiled graph holds the op, not its plan"
    for bad, error in ((dict(x=[1.0], weight=weight), TypeError), (dict(x=x, weight=weight[:5]), ValueError)):
        try:
            octavo.rms_norm(**bad)
        except error:
            continue
        raise AssertionError(bad)


def check_plans_keep_nothing_alive() -> None:
    """A plan holds no tensor of the call that it was made from, and their number is bounded."""
    pretend()
    for name in cases(3):
        function, tensors, others = cases(3)[name]
        for _ in range(2):
            results = function(**tensors, **others)
        kept = [*tensors.values(), *(results if isinstance(results, tuple) else (results,))]
        refs = [weakref.ref(t) for t in kept if isinstance(t, torch.Tensor)]
        assert function.plans and refs
        del tensors, results, kept
        calls.clear()
        gc.collect()
        assert not any(ref() is not None for ref in refs), name
    weight = torch.zeros(64, dtype=torch.bfloat16)
    for tokens in range(3000):
        octavo.rms_norm(torch.zeros(tokens, 64, dtype=torch.bfloat16), weight)
    assert len(octavo.rms_norm.plans) == 1024
    for gap in range(40):  # the same shape with other strides
        x = torch.zeros(3000, 64 + 16 * gap, dtype=torch.bfloat16)[:, :64]
        octavo.rms_norm(x, weight)
        octavo.rms_norm(x, weight)
    assert max(map(len, octavo.rms_norm.plans.values())) == 16


def check_another_gpu_than_the_current_one() -> None:
    """With several GPUs a repeated call makes the tensors' own one current, where it is not."""
    pretend()
    current, entered = [False], []

    @contextmanager
    def device(index):
        entered.append(index)
        current[0] = True
        yield
        current[0] = False

    torch.cuda.device_count = lambda: 2
    launching.is_current = lambda index: current[0]
    replay.current_device = lambda: -1 if current[0] else 3
    torch.cuda.device = device
    started = []
    function, tensors, others = cases(3)["rms_norm"]
    with device(0):
        for _ in range(2):
            function(**tensors, **others)
    ((plan,),) = function.plans.values()
    entered.clear()
    for expected in ([torch.device("cpu")], []):  # CPU tensors stand for CUDA's, whose device has index -1
        started.append(run(function, tensors, others))
        assert entered == expected and len(started[-1]) == 1
        entered.clear()
        current[0] = True
    assert started[0] == started[1] and plan in next(iter(function.plans.values()))


def check_a_kernel_that_cannot_be_loaded() -> None:
    """It says so each time that it is called."""
    from triton.runtime.errors import OutOfResources

    pretend()
    Driver.utils.get_device_properties = staticmethod(lambda device: {"max_shared_mem": 16})
    function, tensors, others = cases(40)["int8_linear"]
    for _ in range(4):
        try:
            function(**tensors, **others)
        except OutOfResources as error:
            assert "shared memory" in str(error)
        else:
            raise AssertionError("it was launched")


def check_hooks_may_call_ops() -> None:
    """A hook of Triton's that runs while a kernel is compiled may need another kernel."""
    pretend()
    seen = []

    def hook(**event):
        if not seen:
            seen.append(event["fn"].name)
            octavo.relu2(torch.zeros(2, 64, dtype=torch.bfloat16))

    triton.knobs.runtime.jit_post_compile_hook = hook
    octavo.rms_norm(torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16))
    assert seen and len(calls) == 2


def check_token_counts() -> None:
    """A new number of tokens compiles nothing beyond the tile choices that depend on it."""
    pretend()
    # Tile choices for up to (8,) 16, (32,) up to 64, (128,), more tokens; two kernels; two, of which both or the second
    # differ for many sequences. Batch-invariant, there is one choice. One token by tensor is one by token.
    variants = {"int4_linear": 5, "int8_linear": 5, "sample": 2, "paged_attention": 4}
    variants |= {"int8_int8_linear": 5, "fp8_linear": 5, "fp8_linear in blocks": 4}
    variants["linear"] = 5  # one token beside four choices; with an activation, what follows torch's product
    variants |= {"int4_int8_linear": 4, "int4_int8_linear with minimum": 3}
    variants |= {f"paged_attention {kind}": 3 for kind in ("of float8", "of int8", "with alibi")}
    variants |= {"paged_attention batch-invariant": 1, "paged_attention of chunks": 2}
    variants |= {"moe_permute": 4, "moe_permute of many pairs": 4}
    # A plan and a product for each tile, two products with SiLU × gate; two ways of sorting, adding up, quantising.
    variants |= {"grouped_linear": 8, "fused_moe": 18, "fused_moe of int8": 20, "fused_moe of int4": 18}
    variants |= {"fused_moe of int4 with minima": 16, "fused_moe of int8 alone": 12, "grouped_linear of int8": 6}
    for name in cases(1):
        launching._ready.clear()
        before = octavo.compile_count()
        for tokens in (1, 2, 5, 16, 17, 32, 64, 65, 100, 128, 1000):
            function, tensors, others = cases(tokens)[name]
            function(**tensors, **others)
        expected = 3 if name.endswith("by tensor") else variants.get(name, variants.get(name.split()[0], 1))
        assert len(launching._ready) == expected, (name, list(launching._ready))
        assert octavo.compile_count() - before <= len(launching._ready)


def check_what_fails_in_a_plan() -> None:
    """What the driver refuses is raised, tensors are let go; a kernel with other parameters is never handed any."""
    pretend()
    driver = starts._module()
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
    for _ in range(3):
        octavo.rms_norm(x, weight)
    ((plan,),) = octavo.rms_norm.plans.values()
    for bad in ((), (x,), (x, weight, x)):
        try:
            plan(*bad)
        except TypeError as error:
            assert "2 tensors" in str(error)
        else:
            raise AssertionError("it was called")
    assert plan(x, None) is replay.MISS and plan(x[:1], weight) is replay.MISS

    refuse = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(lambda *_: 700)
    driver.use(ctypes.cast(refuse, ctypes.c_void_p).value, 0)
    before = sys.getrefcount(x), sys.getrefcount(replay.MISS)
    for _ in range(10):
        try:
            octavo.rms_norm(x, weight)
        except RuntimeError as error:
            assert "CUDA error 700" in str(error)
        else:
            raise AssertionError("it was started")
    assert (sys.getrefcount(x), sys.getrefcount(replay.MISS)) == before

    asked = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.POINTER(ctypes.c_size_t)] * 2)
    def parameter(function, index, offset, size):
        """Stands for cuFuncGetParamInfo: the right sizes, but of the one that is `wrong`."""
        sizes = [8 if kind.startswith("*") else int(kind.strip("fpiu")) // 8 for kind in types_of[function - 1]]
        sizes += [8, 8, *([8] if wrong == "more" else [])]
        if index >= len(sizes):
            return 1
        asked.append(index)
        size[0] = sizes[index] + (index == wrong)
        return 0

    for wrong, planned in ((None, 1), (0, 0), (4, 0), ("more", 0)):
        driver.use(ctypes.cast(started, ctypes.c_void_p).value, ctypes.cast(parameter, ctypes.c_void_p).value)
        octavo.rms_norm.plans.clear()
        asked.clear()
        for _ in range(3):
            octavo.rms_norm(x, weight)
        ((*plans,),) = octavo.rms_norm.plans.values()
        assert len(plans) == planned and asked, (wrong, asked)


def check_workspaces() -> None:
    """What no one sees is memory without a tensor, let go once, whatever becomes of the call; or one that is filled."""
    pretend()
    taken, released, real = {}, [], replay._allocation

    def allocate(size, stream):
        assert stream == STREAM
        buffer = ctypes.create_string_buffer(size)
        taken[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    replay._allocate, replay._release = allocate, released.append
    replay._allocation = lambda out, returned: real(out, True) if returned else out.nbytes
    for name in ("paged_attention", "sample"):
        function, tensors, others = cases(3)[name]
        for _ in range(2):
            function(**tensors, **others)
        assert len(next(iter(function.plans.values()))) == 1 and not taken
        with ordinary():
            expected = run(function, tensors, others)
        assert run(function, tensors, others) == expected
        (workspace,) = taken
        assert released == [workspace] and all(workspace in values for _, values, _ in calls)

        torch.use_deterministic_algorithms(True)
        assert run(function, tensors, others) == expected and released == [workspace]
        torch.use_deterministic_algorithms(False)

        refuse = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(lambda *_: 700)
        starts._module().use(ctypes.cast(refuse, ctypes.c_void_p).value, 0)
        try:
            function(**tensors, **others)
        except RuntimeError as error:
            assert "CUDA error 700" in str(error)
        else:
            raise AssertionError("it was started")
        starts._module().use(ctypes.cast(started, ctypes.c_void_p).value, 0)
        assert released == list(taken) and len(taken) == 2
        taken.clear(), released.clear()


def check_threads() -> None:
    """Threads that make and use plans at the same time start what each of them asked for."""
    pretend()
    mine = threading.local()
    finished, failures = [], []

    class PerThread:
        def append(self, item):
            mine.calls.append(item)

    globals()["calls"] = PerThread()

    def work(seed: int) -> None:
        mine.calls = []
        weight = torch.zeros(2048, dtype=torch.bfloat16)
        for i in range(200):
            x = torch.zeros(1 + (seed + i) % 5, 2048, dtype=torch.bfloat16)
            mine.calls.clear()
            out = octavo.rms_norm(x, weight)
            ((head, values, _),) = mine.calls
            if (head[0], *values[:3]) != (x.shape[0], out.data_ptr(), x.data_ptr(), weight.data_ptr()):
                failures.append((head, values))
        finished.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(finished) == 8, failures[:3]


def check_warm() -> None:
    """After `warmup` from a configuration, mixed batches of the model compile nothing."""
    config = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    options = dict(weights="int4", max_num_batched_tokens=128)
    steps = []
    work = octavo.model_calls(config, **options)
    report = octavo.warmup(work, device="sm_90", processes=2, progress=lambda *done: steps.append(done))
    total = len(report.kernels)
    assert total >= 8 and all(k.compiled for k in report.kernels), report
    assert steps == [(i + 1, total) for i in range(total)]
    assert octavo.compile_count() == 0  # the workers did it
    again = octavo.warmup(work, device="sm_90", processes=1)
    assert not any(k.compiled for k in again.kernels) and len(again.kernels) == total
    assert octavo.warmup([], device="sm_90").kernels == ()
    pretend()
    for tokens in (1, 2, 3, 5, 16, 17, 33, 64, 90, 100, 128):
        serve(tokens)
    assert octavo.compile_count() == 0
    ready = len(launching._ready)
    for tokens in (4, 6, 20, 34, 95, 127):
        serve(tokens)
    assert octavo.compile_count() == 0 and len(launching._ready) == ready
    octavo.relu2(torch.zeros(1, 64, dtype=torch.bfloat16))  # not part of that model
    assert octavo.compile_count() == 1


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(f"{sys.argv[1]} passed with Triton {triton.__version__}")
