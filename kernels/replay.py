"""Repeating a call of a public op for what its launches cost.

Checking arguments, going through PyTorch's dispatcher, choosing tiles and computing grids takes 20 to 40 µs of Python,
and comes to the same thing each time that an op is called with tensors of the same shapes, strides and dtypes: in an
eager model, in every layer but the first. So `replayed`, the decorator of every public op, keeps a plan of the first
call with such arguments: which outputs were allocated, and which kernels were started on which of the tensors. The next
call checks that its arguments are of the same kind (one C++ function, PyTorch's own guard of compiled code), allocates,
and starts the kernels. That does the same because a launcher depends on nothing but its arguments' metadata: it calls
`empty` and `launch` and no other tensor operation (`octavo.testing.check_op` enforces it), and no grid depends on what
is in device memory.

No plan is made, and the ordinary path taken, where something must see the op itself: under `torch.compile`, under
dispatch and function modes, inside functorch's transforms, with a tensor that requires a gradient, while torch's
profiler or a launch hook of Triton is active, and on every device but CUDA. Nor for addresses that are not aligned to
16 bytes, while a graph is being captured, or for one tensor given twice; a plan that was made before serves a capture.
"""

import inspect
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import profiler
from torch.utils._device import DeviceContext

from octavo.kernels.launch import DEVICES, Launch, Recorder, current_stream, hooked, is_current, recording, start

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # another PyTorch: every call takes the ordinary path
    TensorGuards = None  # type: ignore[assignment, misc]

P = ParamSpec("P")
R = TypeVar("R")

MISS = object()
"""What a plan returns when it can't serve a call after all."""
_MAX_KEYS, _MAX_PLANS = 1024, 8  # at either limit what was kept is dropped; a plan holds 2 KB
_templates: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}


class Plan:
    """What one call did, to be done again with other tensors of the same kind."""

    __slots__ = ("_allocations", "_device", "_launches", "_result", "matches")

    def __init__(self, tensors: tuple[torch.Tensor, ...], recorder: Recorder, device: int, result: Any) -> None:
        self.matches: Callable[..., bool] = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],  # type: ignore[misc]
            dynamic_dims_strides=[list(t.stride()) for t in tensors],  # type: ignore[misc]
        ).check
        self._device = device
        outputs = [out for out in recorder.outputs if out.numel() or _is_in(out, result)]
        known = [*tensors, *outputs]
        self._allocations = [_template(out) for out in outputs]
        self._launches = [_relocatable(launch, known) for launch in recorder.launches]
        at = {id(out): i for i, out in enumerate(outputs)}
        self._result: Any = tuple(at[id(r)] for r in result) if isinstance(result, tuple) else at.get(id(result))

    def run(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        """Does the call again; MISS where an address or the state of the process is not what it was."""
        if hooked() or not is_current(self._device):
            return MISS
        addresses = []
        bits = 0
        for tensor in tensors:
            address = tensor.data_ptr()
            bits |= address
            addresses.append(address)
        if bits & 15:
            return MISS
        outputs = []
        for template in self._allocations:
            out = torch.empty_like(template, memory_format=torch.contiguous_format)
            outputs.append(out)
            addresses.append(out.data_ptr())
        stream = current_stream(self._device)  # type: ignore[misc]
        for ready, grid, plain, places in self._launches:
            args = plain.copy()  # other threads may run this plan
            for place, which in places:
                args[place] = addresses[which]
            start(ready, grid, stream, args)  # type: ignore[misc, arg-type]
        if type(self._result) is int:
            return outputs[self._result]
        return None if self._result is None else tuple([outputs[i] for i in self._result])


def _is_in(tensor: torch.Tensor, result: Any) -> bool:
    return any(tensor is r for r in (result if isinstance(result, tuple) else (result,)))


def _template(out: torch.Tensor) -> torch.Tensor:
    """One element seen as a tensor of out's shape: `empty_like` of it is the cheapest way to say what to allocate."""
    key = out.dtype, out.device
    if key not in _templates:
        _templates[key] = torch.empty(1, dtype=out.dtype, device=out.device)
    return _templates[key].expand(out.shape)


def _relocatable(launch: Launch, known: list[torch.Tensor]) -> tuple[Any, tuple[int, ...], list[Any], list[Any]]:
    """A launch as (ready, grid, arguments, [(place among the arguments, which of the known tensors stands there)])."""
    where = {id(t): i for i, t in enumerate(known)}
    args = [0 if isinstance(a, torch.Tensor) and a.numel() == 0 else a for a in launch.args]
    places = [(i, where[id(a)]) for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    args = [None if isinstance(a, torch.Tensor) else a for a in args] + [None] * len(launch.constexprs)
    return launch.ready, (*launch.grid, 1, 1)[:3], args, places


def _is_watched() -> bool:
    """Whether a function mode is active, other than that of `torch.set_default_device`, which makes no difference here."""
    if not torch._C._is_torch_function_mode_enabled():
        return False
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return any(type(mode) is not DeviceContext for mode in modes)


def _may_plan(tensors: tuple[Any, ...]) -> bool:
    """Whether nothing but the op's launcher has a say in what this call does."""
    return (
        tensors[0].device.type in DEVICES
        and TensorGuards is not None
        and start is not None
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not hooked()
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
    used = {id(a) for launch in recorder.launches for a in launch.args if isinstance(a, torch.Tensor) and a.numel()}
    if not recorder.launched or not used <= known or not {id(r) for r in results} <= allocated:
        return None
    if any(launch.ready is None for launch in recorder.launches) or not is_current(tensors[0].get_device()):
        return None
    return Plan(tensors, recorder, tensors[0].get_device(), result)


_CALL = """
def make(function, is_compiling, is_watched, profiler, table, first, MISS, absent):
    def {name}{signature}:
        if is_compiling():
            return function({arguments})
        if not (profiler._is_profiler_enabled or is_watched()):
            given = ({tensors},)
            try:
                plans = table[{key}]
            except (KeyError, AttributeError, TypeError):
                plans = ()
            for plan in plans:
                if plan.matches(*given):
                    result = plan.run(given)
                    if result is not MISS:
                        return result
            return first(lambda: ({key}), given, lambda: function({arguments}))
        return function({arguments})
    return {name}
"""


def replayed(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a public op, whose first parameter is a tensor: calls like an earlier one repeat what that one did.

    Annotations say which parameters are tensors; all others are compared by value. The function around `function` is
    generated from its signature, because sorting `*args` and `**kwargs` at each call would cost as much as a launch.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    tensors = {p.name for p in parameters if p.annotation in (torch.Tensor, torch.Tensor | None)}
    optional = {p.name for p in parameters if p.annotation == torch.Tensor | None}
    # An absent tensor has a stand-in among those that a plan is matched with, and its absence is part of the key.
    absent = {name: torch.empty(0) for name in optional}
    table: dict[Any, list[Plan]] = {}

    def first(key: Callable[[], Any], given: tuple[Any, ...], call: Callable[[], R]) -> R:
        """Calls the function itself, and keeps a plan of it where one can be made."""
        try:
            planned = _may_plan(given)
        except (AttributeError, RuntimeError, TypeError):  # something is not a tensor: the function says it better
            planned = False
        if not planned:
            return call()
        with recording(Recorder()) as recorder:
            result = call()
        plan = _plan(given, recorder, result)
        if plan is not None:
            if len(table) >= _MAX_KEYS:
                table.clear()
            plans = table.setdefault(key(), [])
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            plans.append(plan)
        return result

    key = [f"{parameters[0].name}.shape"]
    key += [
        f"{p.name} is None" if p.name in optional else p.name for p in parameters if p.name not in tensors - optional
    ]
    source = _CALL.format(
        name=function.__name__,
        signature=signature.replace(
            parameters=[p.replace(annotation=p.empty) for p in parameters], return_annotation=signature.empty
        ),
        arguments=", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters),
        tensors=", ".join(
            f"absent[{p.name!r}] if {p.name} is None else {p.name}" if p.name in optional else p.name
            for p in parameters
            if p.name in tensors
        ),
        key=", ".join(key) + ",",
    )
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(source, namespace)
    call = namespace["make"](
        function,
        torch.compiler.is_compiling,
        _is_watched,
        profiler,
        table,
        first,
        MISS,
        absent,
    )
    call.plans = table
    return update_wrapper(call, function)
