"""Runs the source of a Gluon kernel on a CPU: tensors are NumPy's, the partitions of a program are threads.

What is tested so is all that a kernel computes, and that its barriers let each partition read what is there and none
wait for ever. Layouts, proxies and the order of memory are not modelled: programs run one after the other.
"""

import __future__

import builtins
import functools
import random
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from octavo.reference.epilogue import PAIRED

KERNELS = Path(__file__).parent.parent / "kernels"
NUMPY = {name: np.dtype(name) for name in ("int8", "int16", "int32", "int64", "uint16", "uint32", "float32")}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # whose values are kept as float32
FP8 = "float8e4nv"  # and its, too


def rounded(values, dtype):
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(HALVES[dtype]).float().numpy()


def bits_of(values, dtype):
    """The halves' bits, as int16."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(HALVES[dtype]).view(torch.int16).numpy()


def from_bits(bits, dtype):
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(HALVES[dtype]).float().numpy()


class Dtype(str):
    """The name of one; it is equal to the plain string."""

    primitive_bitwidth = property(lambda self: 16 if self in HALVES else 8 * NUMPY[self].itemsize)


class Number(int):
    """A scalar of a kernel."""

    def to(self, dtype):
        return self


class Tensor:
    def __init__(self, values, dtype):
        self.values, self.dtype = np.asarray(values), dtype

    shape = property(lambda self: self.values.shape)
    type = property(lambda self: SimpleNamespace(layout=None))

    def reshape(self, shape):
        return Tensor(self.values.reshape([int(size) for size in shape]), self.dtype)

    def permute(self, order):
        return Tensor(self.values.transpose(order), self.dtype)

    def split(self):
        return tuple(Tensor(self.values[..., i], self.dtype) for i in range(2))

    def to(self, dtype, bitcast=False):
        if bitcast and dtype in HALVES:
            return Tensor(from_bits(self.values, dtype), dtype)
        if bitcast:
            source = bits_of(self.values, self.dtype) if self.dtype in HALVES else self.values
            return Tensor(source.view(NUMPY[dtype]), dtype)
        return Tensor(rounded(self.values, dtype) if dtype in HALVES else self.values.astype(NUMPY[dtype]), dtype)


class Pointer:
    def __init__(self, memory, dtype, offset=0):
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=Dtype(dtype))

    def __add__(self, offset):
        return Pointer(self.memory, self.dtype.element_ty, np.add(self.offset, raw(offset)))

    def where(self, mask):
        """The offsets that a mask leaves, and the mask in full."""
        offset = np.asarray(self.offset)
        mask = np.broadcast_to(True if mask is None else raw(mask), offset.shape).astype(bool)
        assert ((offset >= 0) & (offset < self.memory.size))[mask].all(), "out of bounds"
        return offset[mask], mask


def raw(value):
    if isinstance(value, Tensor):
        return value.values
    return int(value) if isinstance(value, int) else value


def _operator(function):
    def operate(self, other):
        if isinstance(self, Tensor):
            result = function(self.values, raw(other))
            return Tensor(result, self.dtype if result.dtype == self.values.dtype else str(result.dtype))
        if isinstance(other, (Tensor, Pointer)):
            return NotImplemented
        return Number(function(int(self), int(other)))

    return operate


_OPERATORS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "lshift": np.left_shift,
    "rshift": np.right_shift,
}
_COMPARISONS = {"lt": np.less, "gt": np.greater, "le": np.less_equal, "ge": np.greater_equal, "eq": np.equal}
for _class in (Number, Tensor):
    for _name, _function in (_OPERATORS | _COMPARISONS).items():
        setattr(_class, f"__{_name}__", _operator(_function))
    for _name, _function in _OPERATORS.items():
        setattr(_class, f"__r{_name}__", _operator(lambda a, b, function=_function: function(b, a)))


class Shared:
    """Shared memory: the array is what lies there, whatever is made of its shape."""

    def __init__(self, values, dtype, half_by_half=False):
        self.values, self.dtype, self.half_by_half = values, dtype, half_by_half

    @property
    def shape(self):
        return self.values.shape

    def index(self, i):
        if self.half_by_half and self.values.shape[-1] == 128:  # 64 of them, the swizzle's width, lie before the rest
            return Shared(self.values.reshape(len(self.values), 2, -1, 64)[int(i)], self.dtype)
        return Shared(self.values[int(i)], self.dtype)

    def slice(self, start, length, dim=0):
        start, length = int(start), int(length)
        if dim == 0:
            return Shared(self.values[start : start + length], self.dtype)
        assert (length, dim) == (64, 1)
        return Shared(self.values[start // 64], self.dtype)

    def permute(self, order):
        return Shared(self.values.transpose(order), self.dtype)

    def load(self, layout):
        return Tensor(self.values.copy(), self.dtype)

    def store(self, value):
        self.values[...] = value.values

    def _reinterpret(self, dtype, shape, layout):
        values = self.values.reshape(-1)
        return Shared((values.view(NUMPY[dtype]) if dtype in NUMPY else values).reshape(shape), dtype)


def _instruction(line, registers):
    """Executes one of PTX that `int4_unpack.py` and `int8_unpack.py` are made of."""
    op, _, rest = line.partition(" ")
    out, *names = (name.strip() for name in rest.split(","))
    operands = [registers[n] if n in registers else np.uint32(int(n, 0)) for n in names]
    if op == "mov.b32":
        registers[out] = operands[0]
    elif op == "cvt.u32.u16":
        registers[out] = operands[0].astype(np.uint32)
    elif op == "prmt.b32":
        assert operands[1:] == [0, 0x4140]
        registers[out] = operands[0] & 0xFF | (operands[0] & 0xFF00) << 8
    elif op == "xor.b32":
        registers[out] = operands[0] ^ operands[1]
    elif op == "shr.u32":
        registers[out] = operands[0] >> operands[1]
    elif op == "lop3.b32":
        assert operands[3] == 0xEA
        registers[out] = operands[0] & operands[1] | operands[2]
    else:
        dtype = "bfloat16" if op.endswith("bf16x2") else "float16"
        shape = np.broadcast_shapes(*(np.shape(o) for o in operands))
        pairs = [np.broadcast_to(o, shape).astype(np.uint32)[..., None].view(np.int16) for o in operands]
        a, b, *c = (from_bits(p, dtype).astype(np.float64) for p in pairs)
        assert op.startswith(("fma.rn.", "mul."))
        registers[out] = bits_of(a * b + sum(c), dtype).view(np.uint32)[..., 0]


def _assembly(code, constraints, args, dtype, is_pure, pack):
    if code.startswith("prefetch"):
        return args[0].where(None)
    if code.startswith("ld.global"):
        values = _load(args[0])
        assert int(code[len("ld.global.nc.u") :][:2]) == values.dtype.primitive_bitwidth
        if values.dtype in HALVES:
            return Tensor(bits_of(values.values, values.dtype).view(np.uint16).astype(np.int32), "int32")
        return Tensor(values.values.view(np.int32), "int32")
    if code.startswith(("fma.rn.f32", "add.f32")):  # $1 + $2, or $2 · $3 + $1
        acc, sums, scale = (*args, 1)[:3]
        return acc + sums * scale
    if code == "mov.b32 $0, 0;":
        return Tensor(np.zeros_like(args[0].values), args[0].dtype)
    if code.startswith("mov.b32 {"):
        return tuple(Tensor(args[0].values.astype(np.uint32) >> s & 0xFFFF, "int16").to("int16") for s in (0, 16))
    results = len(dtype) if isinstance(dtype, tuple) else 1
    registers = {f"${i + results}": a.values.view(f"u{a.values.dtype.itemsize}") for i, a in enumerate(args)}
    for line in code.strip("{} ").split(";"):
        if line.strip() and ".reg" not in line:
            _instruction(line.strip(), registers)
    out = tuple(Tensor(registers[f"${i}"].view(np.int32), "int32") for i in range(results))
    return out if results > 1 else out[0]


class _Barrier:
    def __init__(self):
        self.changed = threading.Condition()

    def init(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def change(self, arrivals, expected):
        with self.changed:
            self.pending -= arrivals
            self.bytes += expected
            assert self.pending >= 0
            if self.pending == self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, phase):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != phase, timeout=20), "waits for ever"


class Descriptor:
    def __init__(self, values, dtype, block):
        self.values, self.dtype, self.block, self.layout = values, dtype, block, None

    def copy(self, at, barrier, result):
        tile = np.zeros(self.block, self.values.dtype)
        part = self.values[tuple(slice(a, a + size) for a, size in zip(map(int, at), self.block, strict=True))]
        tile[tuple(map(slice, part.shape))] = part
        if random.random() < 0.02:
            time.sleep(0.001)
        result.values[...] = tile
        barrier.values.change(0, -tile.size * (1 if self.dtype in ("int8", FP8) else 2))


def _warp_specialize(partitions, warps, registers):
    errors = []

    def run(function, args):
        try:
            function(*args)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _allocate(dtype, shape, layout):
    if dtype == "int64":
        barriers = np.empty(shape[0], object)
        barriers[:] = [_Barrier() for _ in range(shape[0])]
        return Shared(barriers, dtype)
    if dtype in HALVES:
        return Shared(np.full(shape, np.nan, np.float32), dtype, half_by_half=shape[-1] == 128)
    if dtype == FP8:
        return Shared(np.full(shape, np.nan, np.float32), dtype)
    return Shared(np.full(shape, np.nan if dtype == "float32" else -1, NUMPY[dtype]), dtype)


def _load(pointer, mask=None, other=0, cache_modifier=None):
    offset, mask = pointer.where(mask)
    out = np.full(mask.shape, other, pointer.memory.dtype)
    out[mask] = pointer.memory[offset]
    if not mask.shape and out.dtype.kind == "i":
        return Number(out)
    return Tensor(out, pointer.dtype.element_ty)


def _store(pointer, value, mask=None):
    offset, mask = pointer.where(mask)
    pointer.memory[offset] = np.broadcast_to(raw(value), mask.shape)[mask]


def _extremum(function):
    def of(a, b):
        return Tensor(function(a.values, raw(b)), a.dtype) if isinstance(a, Tensor) else Number(function(a, b))

    return of


def _where(condition, a, b):
    if isinstance(condition, Tensor):
        return Tensor(np.where(condition.values, a.values, b), a.dtype)
    if isinstance(a, Tensor):
        return a if condition else Tensor(np.full_like(a.values, b), a.dtype)
    return Number(a if condition else b)


def _rounded_to_fp8(x, dtype, limit, native):
    assert dtype == "float8_e4m3fn"
    values = torch.from_numpy(x.values).clamp(-limit, limit).to(torch.float8_e4m3fn)
    return Tensor(values.float().numpy(), dtype)


def _mma(a, b, acc, use_acc=True, is_async=False):
    product = a.values.astype(NUMPY[acc.dtype]) @ b.values.astype(NUMPY[acc.dtype])
    return Tensor(product + acc.values if use_acc else product, acc.dtype)


def _language(place, programs):
    def nothing(*args, **kwargs):
        return None

    names = {name: name for name in (*NUMPY, *HALVES, FP8)}
    layouts = (
        "BlockedLayout",
        "DistributedLinearLayout",
        "DotOperandLayout",
        "NVMMADistributedLayout",
        "NVMMASharedLayout",
        "SliceLayout",
        "SwizzledSharedLayout",
    )
    return SimpleNamespace(
        **names,
        **dict.fromkeys(layouts, nothing),
        constexpr=lambda value: value,
        program_id=lambda axis: Number(place[axis]),
        num_programs=lambda axis: Number(programs),
        maximum=_extremum(np.maximum),
        minimum=_extremum(np.minimum),
        where=_where,
        static_range=builtins.range,
        arange=lambda start, end, layout: Tensor(np.arange(start, end), "int64"),
        zeros=lambda shape, dtype, layout: Tensor(np.zeros(shape, NUMPY.get(dtype, np.float32)), dtype),
        cdiv=lambda a, b: Number(-(-a // b)),
        to_tensor=Number,
        max=lambda x, dim: Tensor(x.values.max(dim), x.dtype),
        zeros_like=lambda x: Tensor(np.zeros_like(x.values), x.dtype),
        expand_dims=lambda x, dim: Tensor(np.expand_dims(x.values, dim), x.dtype),
        join=lambda a, b: Tensor(np.stack([a.values, b.values], -1), a.dtype),
        permute=lambda x, order: Tensor(x.values.transpose(order), x.dtype),
        reshape=lambda x, shape: Tensor(x.values.reshape(shape), x.dtype),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        inline_asm_elementwise=_assembly,
        allocate_shared_memory=_allocate,
        warp_specialize=_warp_specialize,
        load=_load,
        store=_store,
    )


def _decorator(function=None, **options):
    return function or (lambda decorated: decorated)


def namespace(modules, place, programs):
    """What the modules of `kernels/` define up to a dataclass or a cached function, for one program of a grid."""
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.values.init(count),
        expect=lambda barrier, size, pred=True: barrier.values.change(1, size) if pred else None,
        arrive=lambda barrier, count, pred=True: barrier.values.change(count, 0) if pred else None,
        wait=lambda barrier, phase, pred=True: barrier.values.wait(phase) if pred else None,
    )
    names = dict(
        __name__="in_python",
        Number=Number,
        range=lambda *bounds: map(Number, builtins.range(*map(int, bounds))),
        gl=_language(place, programs),
        gluon=SimpleNamespace(jit=_decorator, constexpr_function=_decorator),
        triton=SimpleNamespace(jit=_decorator),
        tl=SimpleNamespace(
            constexpr=lambda value: value,
            debug_barrier=lambda: None,
            exp2=lambda x: Tensor(np.exp2(x.values), x.dtype),
            load=_load,
            minimum=_extremum(np.minimum),
            num_programs=lambda axis: Number(programs),
        ),
        torch=torch,
        wide_layout=lambda rows, columns: None,
        bytes_layout=lambda rows, columns: None,
        magnitude=lambda x: Tensor(np.abs(x.values), x.dtype),
        scale_of=lambda largest, limit: Tensor(
            np.maximum(largest.values / np.float32(limit), 2.0**-126), largest.dtype
        ),
        rounded=_rounded_to_fp8,
        _PAIRED=PAIRED,
        mbarrier=mbarrier,
        tma=SimpleNamespace(
            async_copy_global_to_shared=lambda desc, at, barrier, result, pred=True: (
                desc.copy(at, barrier, result) if pred else None
            )
        ),
        warpgroup_mma=_mma,
        warpgroup_mma_wait=lambda outstanding, deps: tuple(deps) if len(deps) > 1 else deps[0],
        fence_async_shared=lambda: None,
        wait_for_previous=lambda chained: None,
        let_next_start=lambda chained: None,
    )
    for module in modules:
        exec(_code(module), names)
    return names


@functools.cache
def _code(module):
    """The part of a module that `namespace` runs, which takes longer to compile than a program of it to run."""
    source = re.split(r"\n@(?:dataclass|cache)\b", (KERNELS / module).read_text())[0]
    source = re.sub(r"^(from|import) [^(]*?(\([^)]*\))?$", "", source, flags=re.M)
    source = re.sub(r"^( +)(i|stage|phase) = 0$", r"\1\2 = Number(0)", source, flags=re.M)  # a literal has no `to`
    return compile(source, module, "exec", __future__.annotations.compiler_flag)
