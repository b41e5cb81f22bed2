"""Repeating a call of a public op for what its launches cost.

Checking arguments, going through PyTorch's dispatcher, choosing tiles and computing grids takes 20 to 40 µs of Python,
and comes to the same thing each time that an op is called with tensors of the same shapes, strides and dtypes: in an
eager model, in every layer but the first. So `replayed`, the decorator of every public op, keeps a plan of the second
call with such arguments: which outputs were allocated, and which kernels were started on which of the tensors. The next
call checks that its arguments are of the same kind (one C++ function, PyTorch's own guard of compiled code), allocates,
and starts the kernels. That does the same because a launcher depends on nothing but its arguments' metadata: it calls
`empty` and `launch` and no other tensor operation (`octavo.testing.check_op` enforces it), and no grid depends on what
is in device memory.

No plan is made, and the ordinary path taken, where something must see the op itself: under `torch.compile`, under
dispatch and function modes, inside functorch's transforms, with a tensor that requires a gradient in grad mode, while
torch's profiler or a launch hook of Triton is active, and on every device but CUDA. Nor for addresses that are not
aligned to 16 bytes, while a graph is being captured, or for one tensor given twice; a plan that was made before serves
a capture.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial, update_wrapper
from threading import Lock
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.autograd import profiler
from torch.utils._device import DeviceContext

from octavo.kernels.launch import (
    DEVICES,
    Recorder,
    current_recorder,
    current_stream,
    hooked,
    in_three,
    is_current,
    recording,
    starter,
)

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


class Plan(NamedTuple):
    """What one call did, to be done again with other tensors of the same kind."""

    matches: Callable[..., bool]
    """Whether tensors are of the same kind."""
    run: Callable[..., Any]
    """Does the call again, given the addresses of such tensors, all aligned to 16 bytes; 0 for an absent one."""


def _make_plan(tensors: tuple[torch.Tensor, ...], recorder: Recorder, result: Any) -> Plan:
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],  # type: ignore[misc]
        dynamic_dims_strides=[list(t.stride()) for t in tensors],  # type: ignore[misc]
    )
    return Plan(guards.check, runner(tensors, recorder, result))


def runner(tensors: tuple[torch.Tensor, ...], recorder: Recorder, result: Any) -> Callable[..., Any]:
    """The function that does again what was recorded: `Plan.run`."""
    outputs = [out for out in recorder.outputs if out.numel() or _is_in(out, result)]
    where = {id(t): i for i, t in enumerate([*tensors, *outputs])}
    pointers, counts, bound = [], [], []
    for launch in recorder.launches:
        given = launch.args[: launch.pointers]
        pointers.append(tuple(where[id(a)] if a is not None and a.numel() else None for a in given))
        others = *launch.args[launch.pointers :], *[None] * len(launch.constexprs)
        assert launch.ready is not None
        counts.append((len(launch.ready.middle), len(others)))
        bound += [launch.ready.start, *in_three(launch.grid), *launch.ready.middle, *others]
    at = {id(out): i for i, out in enumerate(outputs)}
    returned = tuple(at[id(r)] for r in result) if isinstance(result, tuple) else at.get(id(result))
    make = _maker(len(tensors), len(outputs), tuple(pointers), tuple(counts), returned)
    device = tensors[0].get_device()
    allocators = [allocator for out in outputs for allocator in _allocators(out)]
    run = make(current_stream, device, deterministic, *allocators, *bound)
    return _on_its_device(run, device) if torch.cuda.device_count() > 1 else run


def _is_in(tensor: torch.Tensor, result: Any) -> bool:
    return any(tensor is r for r in (result if isinstance(result, tuple) else (result,)))


def _allocators(out: torch.Tensor) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """What allocates a tensor like `out`, which is contiguous: in the cheapest way, and as torch is configured to do.

    The cheapest, 1 µs where torch.empty takes 2.5 to 4, would not fill it in the deterministic mode.
    """
    configured = partial(torch.empty, out.shape, dtype=out.dtype, device=out.device)
    if not out.is_cuda:
        return configured, configured
    return partial(_empty_strided_cuda, tuple(out.shape), out.stride(), out.dtype), configured


def _on_its_device(run: Callable[..., Any], device: int) -> Callable[..., Any]:
    def switched(*addresses: int) -> Any:
        if is_current(device):
            return run(*addresses)
        with torch.cuda.device(device):
            return run(*addresses)

    return switched


_RUN = """
def make(stream_of, device, deterministic, {parameters}):
    def run({addresses}):
        {body}
    return run
"""


@cache
def _maker(
    tensors: int,
    outputs: int,
    pointers: tuple[tuple[int | None, ...], ...],
    bound: tuple[tuple[int, int], ...],
    returned: int | tuple[int, ...] | None,
) -> Callable[..., Callable[..., Any]]:
    """Generates what makes a `Plan.run`: calls of one structure share it, and differ in the values bound to it.

    Generated, because sorting addresses and numbers into a call of 20 to 50 arguments would take a microsecond.

    Args:
        tensors, outputs: how many there are.
        pointers: of each launch, which of the tensors and outputs its pointers are; None is a null pointer.
        bound: of each launch, how many values come between the stream and the pointers, and how many after those.
        returned: which of the outputs.
    """
    addresses = [f"a{i}" for i in range(tensors + outputs)]
    parameters, body = [], []
    for i, address in enumerate(addresses[tensors:]):
        parameters += [f"plain{i}", f"filled{i}"]
        body += [f"o{i} = (filled{i} if deterministic() else plain{i})()", f"{address} = o{i}.data_ptr()"]
    if pointers:
        body.append("stream = stream_of(device)")
    for step, (which, (middle, others)) in enumerate(zip(pointers, bound, strict=True)):
        start, x, y, z, *values = [f"v{step}_{i}" for i in range(4 + middle + others)]
        parameters += [start, x, y, z, *values]
        given = [*("0" if i is None else addresses[i] for i in which), *values[middle:]]
        last = f"({', '.join(given)},)" if starter.one_sequence else ", ".join(given)  # type: ignore[union-attr]
        body.append(f"{start}({', '.join([x, y, z, 'stream', *values[:middle], last])})")
    several = isinstance(returned, tuple)
    results = [f"o{i}" for i in ((returned,) if isinstance(returned, int) else returned or ())]
    body.append(f"return ({', '.join(results)},)" if several else f"return {''.join(results)}")
    source = _RUN.format(
        parameters=", ".join(parameters), addresses=", ".join(addresses[:tensors]), body="\n        ".join(body)
    )
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(source, namespace)
    return namespace["make"]


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


def _may_plan(tensors: tuple[Any, ...], key: tuple[Any, ...]) -> bool:
    """Whether only the op's launcher has a say in what this call does, and the key says all about its numbers."""
    return (
        TensorGuards is not None
        and starter is not None
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


def _plan(tensors: tuple[torch.Tensor, ...], recorder: Recorder, result: Any) -> Plan | None:
    """A plan of what was recorded, or None where it is not all of what the call did."""
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    allocated = {id(t) for t in recorder.outputs}
    known = allocated | {id(t) for t in tensors}
    if not recorder.launched or not {id(r) for r in results} <= allocated:
        return None
    for launch in recorder.launches:
        if launch.ready is None or not all(a is None or id(a) in known for a in launch.args[: launch.pointers]):
            return None
    return _make_plan(tensors, recorder, result)


# Names begin with an underscore, as no parameter's does.
_CALL = """
def _make(_function, _is_compiling, _is_watched, _is_grad_enabled, _table, _first, _absent):
    def {name}{signature}:
        if _is_compiling() or _is_watched():
            return _function({arguments})
        try:
            _key = {key}
            _plans = _table.get(_key, ())
        except (AttributeError, TypeError):
            return _function({arguments})
        for _plan in _plans:
            if _plan.matches({tensors}):
                {addresses}
                if ({bits}) & 15:
                    break
                return _plan.run({names})
        return _first(_key, ({tensors},), {arguments})
    return {name}
"""


def replayed(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public op, whose first parameter is a tensor: calls like an earlier one repeat what that one did.

    Annotations say which parameters are tensors; all others are compared by value. The function around `function` is
    generated from its signature, because sorting `*args` and `**kwargs` at each call would cost as much as a launch.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    tensors = [p.name for p in parameters if p.annotation in (torch.Tensor, torch.Tensor | None)]
    optional = [p.name for p in parameters if p.annotation == torch.Tensor | None]
    # In place of an absent tensor another is matched, and its absence is part of the key.
    absent = {name: torch.empty(0, device="cpu") for name in optional}
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

    key = [f"{parameters[0].name}.shape", "_is_grad_enabled()"]
    for p in parameters:
        if p.name in optional:
            key.append(f"{p.name} is None")
        elif p.name not in tensors:
            key.append(p.name)
    given = [f"_absent[{n!r}] if {n} is None else {n}" if n in optional else n for n in tensors]
    names = [f"_address_{n}" for n in tensors]
    source = _CALL.format(
        name=function.__name__,
        signature=signature.replace(
            parameters=[p.replace(annotation=p.empty) for p in parameters], return_annotation=signature.empty
        ),
        arguments=", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters),
        key=", ".join(key) + ",",
        tensors=", ".join(given),
        addresses="; ".join(
            f"{name} = {f'0 if {n} is None else ' if n in optional else ''}{n}.data_ptr()"
            for name, n in zip(names, tensors, strict=True)
        ),
        bits=" | ".join(names),
        names=", ".join(names),
    )
    namespace: dict[str, Any] = {"__name__": __name__, "torch": torch}  # a default may be one of torch's dtypes
    exec(source, namespace)
    call = namespace["_make"](
        function, torch.compiler.is_compiling, is_watched, torch.is_grad_enabled, table, first, absent
    )
    call.plans = table
    return update_wrapper(call, function)
