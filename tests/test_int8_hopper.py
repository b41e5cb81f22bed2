"""The int8 kernel of Hopper: its source run in Python, which tiles it takes, and on such a GPU itself."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from gluon_in_python import Descriptor, Number, Pointer, namespace
from test_int4_hopper import MODULES as INT4_MODULES
from test_int4_hopper import on_hopper
from test_int8_linear import case, check

import octavo
from octavo.kernels.launch import Recorder, record_launches, recording
from octavo.kernels.quant import int4_hopper, int4_tiles, int8, int8_tiles
from octavo.kernels.tiles import KNOWN_DEVICES, cdiv, next_power_of_2

H100 = KNOWN_DEVICES[90]
NAMES = ("unpack", "loads", "compute", "hopper")
MODULES = [*INT4_MODULES, *(f"quant/int8_{name}.py" for name in NAMES)]


def run_in_python(x, weight, scale, bias, group_size, tiles):
    """As `int8_hopper.linear` launches it; programs in any order."""

    def pointer(tensor):
        if tensor is not None:
            return Pointer(tensor.float().contiguous().view(-1).numpy(), str(tensor.dtype).removeprefix("torch."))

    (m, k), (groups, n), dtype = x.shape, scale.shape, str(x.dtype).removeprefix("torch.")
    out = Pointer(np.full(m * n, np.nan, np.float32), dtype)
    size = 2 * tiles.programs * tiles.outputs * tiles.tokens if tiles.shared else 1
    workspace = Pointer(np.full(size, np.nan, np.float32), "float32")
    row_tiles, token_tiles = cdiv(n, tiles.outputs), cdiv(m, tiles.tokens)
    rounds = cdiv(k, 128 * tiles.turns * tiles.steps)
    per_step = int8_tiles.scales_of_step(k, group_size)
    inputs = int8_tiles.inputs_of_stage(tiles.tokens)
    numbers = (m, n, rounds, groups - 1, int4_tiles.plane_groups(group_size), row_tiles * token_tiles, tiles.shared,
               tiles.shared * rounds, row_tiles, token_tiles, tiles.width, 0, n)  # fmt: skip
    for program in random.sample(range(tiles.programs), tiles.programs):
        namespace(MODULES, (program,), tiles.programs)["_int8_hopper_kernel"](
            Descriptor(weight.numpy(), "int8", (64, inputs)),
            Descriptor(x.float().numpy(), dtype, (tiles.tokens, 64)),
            out,
            *map(pointer, (scale, bias)),
            workspace,
            *map(Number, numbers),
            per_step,
            per_step <= 1 or per_step * group_size == 128,
            tiles.scale_sums,
            tiles.blocks,
            tiles.tokens,
            tiles.sides,
            tiles.turns,
            tiles.steps,
            inputs,
            tiles.stages,
            0,
            False,
        )
    numbers = m, n, rounds, tiles.shared, tiles.programs, row_tiles, token_tiles, tiles.width
    for tile in range(tiles.shared):
        for chunk in range(cdiv(min(m, tiles.tokens) * tiles.outputs, tiles.parts_block)):
            namespace(INT4_MODULES, (tile, chunk), tiles.shared)["_int4_parts_kernel"](
                out,
                pointer(bias),
                None,
                workspace,
                *map(Number, numbers),
                tiles.outputs,
                tiles.tokens,
                tiles.parts_block,
                False,
                False,
            )
    return torch.from_numpy(out.memory).view(m, n).to(x.dtype)


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "bias", "programs", "changes"),
    [
        (1, 300, 512, 512, False, 5, {}),
        (16, 300, 256, 128, True, 7, {}),
        (20, 200, 512, 64, True, 3, {}),
        (5, 130, 480, 32, False, 3, {}),
        (7, 520, 480, 96, True, 4, {}),
        (3, 5, 32, 32, True, 3, {}),
        (60, 300, 1024, 256, False, 3, {"stages": 4}),
        (60, 300, 384, 384, True, 2, {}),
        (130, 520, 384, 128, True, 5, {"stages": 2}),
        (300, 260, 256, 64, False, 2, {"width": 2}),
        (300, 260, 416, 416, True, 2, {"stages": 3}),
        (40, 300, 2048, 2048, False, 13, {}),
    ],
)
def test_source(m, n, k, group, bias, programs, changes):
    """Tiles whole and shared by two programs and more, inputs and outputs that end within a tile, few stages."""
    dtype = random.choice((torch.float16, torch.bfloat16))
    args = case(n, k, group, "cpu", dtype, bias)
    x = torch.randn(m, k).to(dtype)
    tiles = int8_tiles.choose_tiles(m, n, k, group, replace(H100, num_sms=programs))
    tiles = replace(tiles, **changes)
    out = run_in_python(x, *args, group, tiles)
    check(out, x, *args)
    assert torch.equal(out, run_in_python(x, *args, group, tiles))


@pytest.mark.parametrize("group", [128, None])
@pytest.mark.parametrize(
    ("m", "n", "k", "warpgroups", "tokens", "sharing", "stages", "programs"),
    [
        (1, 300, 1024, (1, 2, 1), 16, True, 2, 3),
        (1, 300, 1280, (1, 2, 1, 2), 8, True, 2, 3),
        (8, 300, 1152, (1, 2, 1, 2, 2), 8, True, 2, 3),
        (30, 200, 1024, (1, 2, 1, 1, 2), 32, False, 3, 3),
        (9, 300, 1152, (1, 2, 1, 2, 2), 16, True, 2, 4),
        (20, 200, 1280, (1, 2, 1, 2), 32, True, 2, 2),
        (33, 70, 256, (1, 2, 1, 2), 32, False, 2, 2),  # fewer steps than a round has
        (5, 600, 512, (2, 1, 1), 64, True, 3, 4),
        (60, 600, 512, (2, 1, 2), 64, True, 3, 5),
        (130, 520, 384, (2, 1, 1), 128, True, 9, 7),
        (130, 520, 384, (2, 1, 2), 128, False, 5, 2),
        (260, 300, 384, (2, 1, 1), 256, True, 5, 5),
    ],
)
def test_source_of_every_cut(m, n, k, group, warpgroups, tokens, sharing, stages, programs):
    """Warpgroups side by side and in turns, which a choice may not take yet."""
    dtype = random.choice((torch.float16, torch.bfloat16))
    group = group or k
    args = case(n, k, group, "cpu", dtype, True)
    x = torch.randn(m, k).to(dtype)
    scale_sums = group < k and tokens <= 64
    tiles = int8_tiles.cut(
        m,
        n,
        k,
        int4_tiles.Warpgroups(*warpgroups),
        tokens,
        sharing,
        replace(H100, num_sms=programs),
        scale_sums,
        stages,
    )
    assert (tiles.shared > 0) == sharing and tiles.stages == stages
    check(run_in_python(x, *args, group, tiles), x, *args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_every_weight_is_exact(dtype, group):
    weight = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(256, 256).contiguous()
    x = torch.zeros(1, 256, dtype=dtype)
    x[0, 7] = 1.0
    tiles = int8_tiles.choose_tiles(1, 256, 256, group, replace(H100, num_sms=2))
    out = run_in_python(x, weight, torch.ones(256 // group, 256), None, group, tiles)
    assert torch.equal(out[0], weight[:, 7].to(dtype))


def test_rounded_scales_of_another_dtype():
    args = case(130, 256, 32, "cpu", torch.float32)
    x = torch.randn(4, 256).bfloat16()
    tiles = int8_tiles.choose_tiles(4, 130, 256, 32, replace(H100, num_sms=2))
    check(run_in_python(x, *args, 32, tiles), x, *args)


@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (28672, 4096), (4096, 14336), (6144, 4096), (32, 32)])
@pytest.mark.parametrize("group", [32, 64, 128, None])
@pytest.mark.parametrize("programs", [78, 132])
def test_there_are_stages_for_two_rounds(n, k, group, programs):
    """A warpgroup releases a stage when it has the next; where a step has two, it holds both."""
    for m in (1, 17, 33, 65, 4096):
        if group is None or k % group == 0:
            tiles = int8_tiles.choose_tiles(m, n, k, group or k, replace(H100, num_sms=programs))
            assert tiles.stages >= (2 if tiles.turns > 1 else 3)
            assert tiles.sides * tiles.turns == 2


@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (28672, 4096), (4096, 14336), (6144, 4096)])
@pytest.mark.parametrize("group", [128, None])
def test_a_warm_up_at_powers_of_two_meets_every_kernel(n, k, group):
    def kernel(m):
        tiles = int8_tiles.choose_tiles(m, n, k, group or k, H100)
        return replace(tiles, programs=0, shared=tiles.shared > 0, width=0)

    for m in range(1, 5000, 37):
        assert kernel(m) == kernel(next_power_of_2(m))


def test_which_calls_it_takes(monkeypatch):
    monkeypatch.setattr(int4_hopper, "INTERPRET", False)
    weight = torch.empty(40, 256, dtype=torch.int8, device="meta")
    x = torch.empty(6, 256, dtype=torch.float16, device="meta")
    two_strides = torch.empty(6, 3, 256, dtype=torch.float16, device="meta")[:, :2]
    unaligned = torch.empty(6, 258, dtype=torch.float16, device="meta")[:, :256]
    for arch in (80, 89, 90):
        taken = [x, x.bfloat16(), x[0], x[:, None]] if arch == 90 else []
        others = [x.float(), two_strides, unaligned, *([] if taken else [x, x.bfloat16()])]
        for tokens in taken + others:
            with record_launches(KNOWN_DEVICES[arch]) as launches:
                int8._int8_linear_cuda(tokens, weight, torch.empty(1, 40, device="meta"), None, 256)
            hopper = launches[0].kernel.__name__ == "_int8_hopper_kernel"
            assert hopper == any(tokens is t for t in taken)


@pytest.mark.parametrize("m", [1, 16, 40, 64, 128, 200, 1000])
@pytest.mark.parametrize(
    ("n", "k", "group", "bias"),
    [
        (300, 4096, 128, True),
        (6144, 4096, 4096, False),
        (4544, 4544, 64, False),
        (131, 480, 32, True),
        (49155, 576, 576, False),
        (520, 672, 96, True),
        (8192, 8192, 8192, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_on_a_gpu(m, n, k, group, bias, dtype, marked):
    args = case(n, k, group, "cuda", dtype, bias)
    x = torch.randn(m, k, device="cuda").to(dtype)
    with recording(Recorder()) as recorder:
        out = octavo.int8_linear(x, *args, group_size=group)
    assert recorder.launches[0].kernel.__name__ == "_int8_hopper_kernel"
    check(out, x, *args)
    for _ in range(10):
        assert torch.equal(out, octavo.int8_linear(x, *args, group_size=group))


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_weights_of_the_kernel_before_are_not_read_too_soon(marked):
    """What quantises weights lets the next kernel start; the product waits for its end, unless it is told not to."""
    x, weight = (torch.randn(s, 4096, device="cuda", dtype=torch.bfloat16) for s in (8, 8192))
    q, scale = octavo.quantize_int8(weight)
    expected = octavo.int8_linear(x, q, scale.view(1, -1), group_size=4096)
    torch.cuda.synchronize()
    for _ in range(20):
        q, scale = octavo.quantize_int8(weight)
        out = octavo.int8_linear(x, q, scale.view(1, -1), group_size=4096)
        q.zero_()
        assert torch.equal(out, expected)
    early = octavo.int8_linear(x, *quantised_by_now(weight), group_size=4096, prefetch_weight=True)
    assert torch.equal(early, expected)


def quantised_by_now(weight):
    q, scale = octavo.quantize_int8(weight)
    torch.cuda.synchronize()
    return q, scale.view(1, -1)


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_streams_do_not_share_parts(marked):
    """Calls that run at the same time, each of which sums up parts of its tiles."""
    args = case(1024, 8192, 8192, "cuda", torch.bfloat16)
    xs = [torch.randn(8, 8192, device="cuda").bfloat16() for _ in range(4)]
    expected = [octavo.int8_linear(x, *args, group_size=8192) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(octavo.int8_linear(x, *args, group_size=8192))
        torch.cuda.synchronize()
        assert all(map(torch.equal, outs, expected))
