"""Repeating a call of a public op for what its launches cost.

Checking arguments, going through PyTorch's dispatcher, choosing tiles and computing grids takes 20 to 40 µs of Python,
and comes to the same thing each time that an op is called with tensors of the same shapes, strides and dtypes: in an
eager model, in every layer but the first. So `replayed`, the decorator of every public op, keeps a plan of the second
call with such arguments: which outputs were allocated, and which kernels were started on which of the tensors. The next
call checks that its arguments are of the same kind (one C++ function, PyTorch's own guard of compiled code), allocates,
and starts the kernels, in C (`plan.c`): where torch.add takes 9.3 µs, an op of one kernel takes 8, one of two 15, and
with the same in Python, generated for each structure of a call, they took 10 and 20. That does the same because a
launcher depends on nothing but its arguments' metadata: it calls `empty` and `launch` and no other tensor operation
(`octavo.testing.check_op` enforces it), and no grid depends on what is in device memory.

No plan is made, and the ordinary path taken, where something must see the op itself: under `torch.compile`, under
dispatch and function modes, inside functorch's transforms, with a tensor that requires a gradient in grad mode, while
torch's profiler or a launch hook of Triton is active, under `OCTAVO_DEBUG=1`, and on every device but CUDA. Nor for
addresses that are not aligned to 16 bytes, while a graph is being captured, or for one tensor given twice; a plan that
was made before serves a capture.
"""

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import profiler
from torch.utils._device import DeviceContext

from octavo.kernels.debug import DEBUG
from octavo.kernels.launch import (
    DEVICES,
    Recorder,
    current_device,
    current_recorder,
    current_stream,
    hooked,
    recording,
    starter,
    tensor_of,
)
from octavo.kernels.starts import plan_type, start_of

try:
    # The guard and the allocation of Inductor's compiled code.
    from torch._C._dynamo.guards import TensorGuards, _empty_strided_cuda  # type: ignore[attr-defined]
except ImportError:  # another PyTorch: every call takes the ordinary path
    TensorGuards = None  # type: ignore[assignment, misc]

P = ParamSpec("P")
R = TypeVar("R")

_MAX_KEYS, _MAX_PLANS = 1024, 16  # at either limit the oldest goes; a plan holds 2 KB
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.Size}
deterministic = torch._C._get_deterministic_algorithms
_allocate = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)
_release = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", None)


Plan = Callable[..., Any]
"""Does a call again, given its tensors (None for an absent one); MISS, and nothing done, where they are of another
kind than those that it was made of, or not aligned to 16 bytes."""
MISS = object()


def make_plan(given: tuple[torch.Tensor | None, ...], recorder: Recorder, result: Any) -> Plan | None:
    """The plan of a call with these tensors, of which all that it did was recorded; None where there can be none."""
    tensors = [t for t in given if t is not None]
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],  # type: ignore[misc]
        dynamic_dims_strides=[list(t.stride()) for t in tensors],  # type: ignore[misc]
    )
    outputs = [out for out in recorder.outputs if out.numel() or _is_in(out, result)]
    where = {id(t): i for i, t in enumerate([*tensors, *outputs]) if t.numel()}
    starts = tuple(start_of(launch, where) for launch in recorder.launches)
    if None in starts:
        return None
    at = {id(out): i for i, out in enumerate(outputs)}
    returned = tuple(at[id(r)] for r in result) if isinstance(result, tuple) else at.get(id(result))
    details = (
        guards.check,
        MISS,
        current_stream,
        tensors[0].get_device(),
        current_device if torch.cuda.device_count() > 1 else None,
        _on_its_device(tensors[0].device),
        deterministic,
        len(given),
        len(tensors),
        _allocate,
        _release,
        tuple(_allocation(out, _is_in(out, result)) for out in outputs),
        tuple(map(_configured, outputs)),
        returned,
        starts,
    )
    try:
        return plan_type()(*details)  # type: ignore[misc]
    except ValueError:  # the kernel has other parameters than it would be given: another Triton's
        return None


def _is_in(tensor: torch.Tensor, result: Any) -> bool:
    return any(tensor is r for r in (result if isinstance(result, tuple) else (result,)))


def _configured(out: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What allocates a contiguous tensor like `out` as torch is configured to do."""
    return partial(torch.empty, out.shape, dtype=out.dtype, device=out.device)


def _allocation(out: torch.Tensor, returned: bool) -> Any:
    """How to allocate it in the cheapest way: a function and its arguments; of what no one sees, the number of bytes.

    torch.empty takes 2.5 to 4 µs of an H100's host, these 1.1 and 0.6. They do not fill the memory, as torch does in
    the deterministic mode.
    """
    if not out.is_cuda:
        return (_configured(out),)
    return (_empty_strided_cuda, tuple(out.shape), out.stride(), out.dtype) if returned else out.nbytes


def _on_its_device(device: torch.device) -> Callable[..., Any]:
    """Calls a plan while its device is the current one, which it was not."""

    def elsewhere(plan: Plan, *given: torch.Tensor | None) -> Any:
        with torch.cuda.device(device):
            return plan(*given)

    return elsewhere


def is_watched() -> bool:
    """Whether something must see the op or its launches: a profiler, a launch hook of Triton, a function mode.

    The function mode of `torch.set_default_device` is none of those: it changes nothing here.
    """
    if profiler._is_profiler_enabled or hooked():
        return True
    if not torch._C._is_torch_function_mode_enabled():
        return False
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def _may_plan(given: tuple[Any, ...], key: tuple[Any, ...]) -> bool:
    """Whether only the op's launcher has a say in what this call does, and the key says all about its numbers."""
    tensors = [t for t in given if t is not None]
    return (
        TensorGuards is not None
        and starter is not None
        and plan_type() is not None
        and all(type(value) in _PLAIN for value in key)  # a tensor in place of a number may change its value
        and current_recorder() is None
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        and len({id(t) for t in tensors}) == len(tensors)
        and not any(t.data_ptr() % 16 for t in tensors)
        and not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _plan(given: tuple[torch.Tensor | None, ...], recorder: Recorder, result: Any) -> Plan | None:
    """A plan of what was recorded, or None where it is not all of what the call did."""
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    allocated = {id(t) for t in recorder.outputs}
    known = allocated | {id(t) for t in given}
    if not recorder.launched or not {id(r) for r in results} <= allocated:
        return None
    for launch in recorder.launches:
        pointers = map(tensor_of, launch.args[: launch.pointers])
        if launch.ready is None or not all(a is None or id(a) in known for a in pointers):
            return None
    return make_plan(given, recorder, result)


# Names begin with an underscore, as no parameter's does.
_CALL = """
def _make(_function, _is_compiling, _is_watched, _is_grad_enabled, _table, _first, _miss):
    def {name}{signature}:
        if _is_compiling() or _is_watched():
            return _function({arguments})
        try:
            _key = {key}
            _plans = _table.get(_key, ())
        except (AttributeError, TypeError):
            return _function({arguments})
        for _plan in _plans:
            _result = _plan({tensors})
            if _result is not _miss:
                return _result
        return _first(_key, ({tensors},), {arguments})
    return {name}
"""


def replayed(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public op, whose first parameter is a tensor: calls like an earlier one repeat what that one did.

    Annotations say which parameters are tensors; all others are compared by value. The function around `function` is
    generated from its signature, because sorting `*args` and `**kwargs` at each call would cost as much as a launch.
    """
    if DEBUG:  # what a debug run looks at is no launch
        return function
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    tensors = [p.name for p in parameters if p.annotation in (torch.Tensor, torch.Tensor | None)]
    optional = [p.name for p in parameters if p.annotation == torch.Tensor | None]
    table: dict[Any, list[Plan]] = {}
    changing = Lock()

    def first(key: Any, given: tuple[Any, ...], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the function itself; at the second call of a kind, keeps a plan of it where one can be made."""
        try:
            if given[0].device.type not in DEVICES or not _may_plan(given, key):
                return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError):  # something is not a tensor: the function says it better
            return function(*args, **kwargs)
        with changing:
            plans = table.get(key)
            if plans is None:
                if len(table) >= _MAX_KEYS:
                    del table[next(iter(table))]
                table[key] = []
        if plans is None:
            return function(*args, **kwargs)
        with recording(Recorder()) as recorder:
            result = function(*args, **kwargs)
        plan = _plan(given, recorder, result)
        if plan is not None:
            with changing:
                plans.append(plan)
                del plans[:-_MAX_PLANS]
        return result

    # The number of elements tells numbers of tokens apart; that all shapes are the same, a plan itself finds out.
    key = [f"{parameters[0].name}.numel()", "_is_grad_enabled()"]
    for p in parameters:
        if p.name in optional:
            key.append(f"{p.name} is None")
        elif p.name not in tensors:
            key.append(p.name)
    source = _CALL.format(
        name=function.__name__,
        signature=signature.replace(
            parameters=[p.replace(annotation=p.empty) for p in parameters], return_annotation=signature.empty
        ),
        arguments=", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters),
        key=", ".join(key) + ",",
        tensors=", ".join(tensors),
    )
    namespace: dict[str, Any] = {"__name__": __name__, "torch": torch}  # a default may be one of torch's dtypes
    exec(source, namespace)
    call = namespace["_make"](
        function, torch.compiler.is_compiling, is_watched, torch.is_grad_enabled, table, first, MISS
    )
    call.plans = table
    return update_wrapper(call, function)
