"""The Hopper kernels of the W8A8 product: their source run in Python, their tiles, and themselves on such a GPU."""

import random

import numpy as np
import pytest
import torch
from gluon_in_python import FP8 as FP8_IN_PYTHON
from gluon_in_python import Descriptor, Number, Pointer, namespace
from test_w8a8_linear import FP8, HALF, INT8, case, check, function

from octavo.kernels.launch import Recorder, recording
from octavo.kernels.quant.w8a8_few import FewTiles, choose_few, stages_for_two
from octavo.kernels.quant.w8a8_parts import add_parts
from octavo.kernels.tiles import KNOWN_DEVICES, cdiv, next_power_of_2
from octavo.reference.w8a8 import in_blocks

H100 = KNOWN_DEVICES[90]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")]
MODULES = "epilogue", "stream_k", "w8a8_epilogue", "w8a8_loads", "w8a8_parts", "w8a8_promoted"


def arguments(m, n, k, operand, kind, bias, with_residual, activation, out_dtype):
    args = case(operand, m, n, k, kind, bias=bias)
    width = n // 2 if activation else n
    args["residual"] = torch.randn(m, width).to(out_dtype) if with_residual else None
    return args | dict(activation=activation), width


def pointer(tensor):
    if tensor is not None:
        values = tensor if tensor.dtype == torch.int32 else tensor.float()
        return Pointer(values.contiguous().view(-1).numpy(), str(tensor.dtype).removeprefix("torch."))


def descriptor(tensor, rows):
    if tensor.dtype == INT8:
        return Descriptor(tensor.numpy(), "int8", (rows, 128))
    return Descriptor(tensor.float().numpy(), FP8_IN_PYTHON, (rows, 128))


def strides(args):
    if in_blocks(args["weight"], args["weight_scale"]):
        return [args["weight_scale"].shape[1]] * 2 + [0]
    scales = args["x_scale"], args["weight_scale"], args.get("x_zero")
    return [0 if scale is None or scale.numel() == 1 else 1 for scale in scales]


def names_of(args, *more):
    return [args.get(name) for name in ("x_scale", "weight_scale", *more, "bias", "residual")]


def after(args):
    """BLOCKS and ACTIVATED."""
    return in_blocks(args["weight"], args["weight_scale"]), args["activation"] is not None


def in_python(module, args, parts, programs, out_dtype, width, call):
    """Calls a module's kernel for programs in any order, and adds up the parts that it leaves of the inputs."""
    modules = [f"quant/{name}.py" for name in (*MODULES, module)]
    m, n = args["x"].shape[0], args["weight"].shape[0]
    part_steps = cdiv(cdiv(args["x"].shape[1], 128), parts)
    count = cdiv(cdiv(args["x"].shape[1], 128), part_steps)
    out = Pointer(np.full(m * width, np.nan, np.float32), str(out_dtype).removeprefix("torch."))
    sums = torch.full((count, m, n), -(2**20), dtype=torch.int32)
    sums = sums if args["x"].dtype == INT8 else sums.float()
    left = pointer(sums) if count > 1 else None
    programs = programs(count)
    for program in random.sample(range(programs), programs):
        call(namespace(modules, (program,), programs)[f"_{module}_kernel"], out, left, count, part_steps)
    if count == 1:
        return torch.from_numpy(out.memory).view(m, width).to(out_dtype)
    result = torch.full((m, width), torch.nan, dtype=out_dtype)
    add_parts(result, sums, *names_of(args, "x_zero", "weight_sum"), *after(args), strides(args))
    return result


def few_in_python(args, tiles, out_dtype, width):
    """As `w8a8_few.w8a8_few` launches it."""
    (m, k), n = args["x"].shape, args["weight"].shape[0]

    def call(kernel, out, parts, count, part_steps):
        kernel(
            descriptor(args["x"], tiles.tokens),
            descriptor(args["weight"], tiles.outputs),
            out,
            parts,
            None,
            *map(pointer, names_of(args, "x_zero", "weight_sum")),
            *map(Number, (m, n, k, *strides(args), part_steps)),
            *(tiles.tokens, tiles.outputs, 128, tiles.stages, count, *after(args), 128, 128, False),
        )

    programs = cdiv(n, tiles.outputs)
    return in_python("w8a8_few", args, tiles.parts, lambda count: programs * count, out_dtype, width, call)


@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "kind", "bias", "with_residual", "activation", "tiles"),
    [
        (1, 80, 144, "token", False, False, None, FewTiles(64, 32, 3, 1)),
        (16, 100, 1024, "token", True, True, None, FewTiles(64, 32, 4, 2)),
        (7, 200, 640, "zero", True, False, None, FewTiles(16, 64, 2, 1)),
        (30, 96, 528, "zero", False, True, "silu_and_mul", FewTiles(32, 64, 3, 1)),
        (64, 208, 1024, "tensor", True, False, "silu_and_mul", FewTiles(64, 64, 2, 1)),
        (60, 112, 1168, "zero", True, True, "silu_and_mul", FewTiles(64, 64, 3, 3)),
        (100, 70, 256, "token", True, True, None, FewTiles(128, 64, 4, 2)),
        (120, 112, 272, "zero", True, True, "silu_and_mul", FewTiles(128, 64, 3, 1)),
        (5, 200, 640, "blocks", True, True, None, FewTiles(16, 64, 3, 1)),
        (50, 300, 384, "blocks", False, False, None, FewTiles(64, 32, 2, 1)),
        (100, 140, 512, "blocks", True, True, None, FewTiles(128, 64, 2, 2)),
    ],
)
def test_source_of_few(m, n, k, kind, bias, with_residual, activation, tiles, operand):
    """Outputs and inputs that end within a tile, fewer steps than stages, parts of tiles, and all that follows."""
    kind = "token" if kind == ("zero" if operand == FP8 else "blocks") else kind
    out_dtype = random.choice((HALF, torch.float32))
    args, width = arguments(m, n, k, operand, kind, bias, with_residual, activation, out_dtype)
    out = few_in_python(args, tiles, out_dtype, width)
    check(out, args)
    assert torch.equal(out, few_in_python(args, tiles, out_dtype, width))


@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "kind", "bias", "with_residual", "activation", "block_n", "parts"),
    [
        (300, 300, 144, "token", True, False, None, 128, 1),
        (130, 544, 640, "precise", False, True, "silu_and_mul", 256, 1),
        (200, 272, 384, "token", True, True, "silu_and_mul", 128, 1),
        (200, 640, 384, "blocks", True, True, None, 256, 1),
        (140, 300, 512, "blocks", False, False, None, 128, 1),
        (150, 272, 400, "precise", True, False, None, 128, 2),
        (100, 272, 656, "token", False, True, "silu_and_mul", 256, 3),
        (130, 300, 640, "blocks", True, True, None, 128, 4),
    ],
)
def test_source_of_many(m, n, k, kind, bias, with_residual, activation, block_n, parts, operand):
    """`precise`: sums are taken out of the tensor cores at each step, as they always are beside scales by blocks."""
    promoted = kind in ("blocks", "precise") and operand == FP8
    kind = "blocks" if kind == "blocks" and promoted else "token"
    args, width = arguments(m, n, k, operand, kind, bias, with_residual, activation, HALF)
    m_tiles, n_tiles = cdiv(m, 128), cdiv(n, block_n)

    def call(kernel, out, parts, count, part_steps):
        kernel(
            descriptor(args["x"], 128),
            descriptor(args["weight"], block_n),
            out,
            parts,
            *map(pointer, names_of(args)),
            *map(Number, (m, n, *strides(args)[:2], m_tiles, n_tiles, cdiv(k, 128), part_steps)),
            *(128, block_n, 128, 3, count, 8, promoted, *after(args)),
        )

    out = in_python("w8a8_hopper", args, parts, lambda count: 2, HALF, width, call)
    check(out, args)


@pytest.mark.parametrize("inputs", [128, 4096, 8192, 14336, 28672])
@pytest.mark.parametrize("outputs", [1, 1024, 4096, 6144, 8192, 10240, 28672, 57344])
def test_tiles_of_few(inputs, outputs):
    """All tokens and the barriers fit; parts have work and mostly a multiprocessor each; powers of two decide."""
    for blocks, activated in ((False, False), (False, True), (True, False)):
        options = dict(blocks=blocks, activated=activated)
        for tokens in range(1, 200):
            tiles = choose_few(tokens, outputs, inputs, H100, **options)
            assert tiles == choose_few(next_power_of_2(tokens), outputs, inputs, H100, **options)
            if tiles is None:
                assert tokens > 64
                continue
            assert tokens <= tiles.tokens and tiles.outputs in (32, 64)
            assert (tiles.outputs > 32) or (tiles.tokens == 64 and not activated)
            assert tiles.stages * (tiles.tokens + tiles.outputs) * 128 + 1024 < H100.shared_memory
            assert tiles.stages >= 4
            assert tiles.parts == 1 or tiles.parts * cdiv(outputs, tiles.outputs) <= 4 * H100.num_sms
            assert tiles.parts == 1 or inputs * tiles.outputs / tiles.parts >= 2**17
            assert tiles.parts != 2 or tokens > 64


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "expected"),
    [
        (1, 6144, 4096, FewTiles(16, 64, 11, 1)),
        (16, 4096, 14336, FewTiles(16, 64, 11, 1)),
        (16, 8192, 8192, FewTiles(16, 64, 22, 1)),
        (16, 8192, 28672, FewTiles(16, 64, 11, 1)),
        (16, 1024, 14336, FewTiles(16, 64, 11, 3)),
        (32, 28672, 4096, FewTiles(32, 64, 9, 1)),
        (32, 57344, 8192, FewTiles(32, 64, 18, 1)),
        (64, 4096, 14336, FewTiles(64, 32, 9, 1)),
        (64, 8192, 8192, FewTiles(64, 32, 9, 1)),
        (64, 28672, 4096, FewTiles(64, 64, 6, 1)),
        (64, 57344, 8192, FewTiles(64, 64, 12, 1)),
        (16, 10240, 8192, FewTiles(16, 64, 11, 3)),
        (64, 10240, 8192, FewTiles(64, 32, 9, 1)),
        (128, 4096, 4096, FewTiles(128, 64, 8, 1)),
        (128, 4096, 14336, FewTiles(128, 64, 8, 2)),
        (128, 8192, 28672, FewTiles(128, 64, 8, 1)),
        (128, 10240, 8192, None),
    ],
)
def test_tiles_that_were_fastest(tokens, outputs, inputs, expected):
    """On an H100, among those that w8a8_few.py says; three parts of few tiles are not measured."""
    assert choose_few(tokens, outputs, inputs, H100, blocks=False, activated=False) == expected


@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
@pytest.mark.parametrize("m", [1, 16, 30, 64, 128, 200])
@pytest.mark.parametrize(
    ("n", "k"), [(4096, 14336), (6144, 4096), (9008, 8192), (57344, 1024), (576, 1536), (1040, 144)]
)
@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_on_a_gpu(m, n, k, operand, marked):
    kinds = ("token", "zero", "tensor") if operand == INT8 else ("token", "tensor", "blocks")
    for kind in kinds:
        for with_residual, activation in ((False, None), (True, None), (True, "silu_and_mul")):
            if kind == "blocks" and (activation is not None or k % 128):
                continue
            args, _ = arguments(m, n, k, operand, kind, with_residual, with_residual, activation, torch.bfloat16)
            args = {name: a.cuda() if isinstance(a, torch.Tensor) else a for name, a in args.items()}
            with recording(Recorder()) as recorder:
                out = function(operand)(**args)
            names = {launched.kernel.__name__ for launched in recorder.launches}
            if m <= 64:
                assert "_w8a8_few_kernel" in names
            check(out, args)
            for _ in range(10):
                assert torch.equal(out, function(operand)(**args))


@pytest.mark.parametrize("operand", [INT8, FP8], ids=str)
@pytest.mark.parametrize(("tokens", "parts"), [(16, 1), (16, 3), (32, 1), (32, 3), (64, 1), (64, 3), (128, 3)])
@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_every_tile_on_a_gpu(operand, tokens, parts, marked, monkeypatch):
    sizes = (32, 64) if tokens == 64 else (64,)
    for size in sizes:
        stages = stages_for_two(tokens, size, H100) * (2 if parts == 1 and size == 64 else 1)
        tiles = FewTiles(tokens, size, stages, parts)
        monkeypatch.setattr("octavo.kernels.quant.w8a8.choose_few", lambda *a, tiles=tiles, **options: tiles)
        args = case(operand, tokens - 3, 1000, 4096, device="cuda", bias=True)
        check(getattr(torch.ops.octavo, function(operand).__name__)(*args.values(), *_rest(operand)), args)


def _rest(operand):
    return (None, None, HALF) if operand == INT8 else (HALF, True)
