"""The int4 kernel of Hopper: its source run in Python, which calls it takes, and on such a GPU itself."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from gluon_in_python import Descriptor, Number, Pointer, Tensor, namespace
from test_int4_linear import case, check

import octavo
from octavo.kernels.launch import Recorder, recording
from octavo.kernels.quant import int4_hopper, int4_tiles
from octavo.kernels.quant.epilogue import outputs_of
from octavo.kernels.tiles import KNOWN_DEVICES, cdiv, next_power_of_2
from octavo.testing import without_interpreter

H100 = KNOWN_DEVICES[90]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")]
NAMES = ("shares", "loads", "epilogue", "unpack", "compute", "parts", "hopper")
MODULES = ["quant/epilogue.py", *(f"quant/int4_{name}.py" for name in NAMES)]


def run_in_python(x, packed, scale, minimum, bias, group_size, tiles, residual=None, activation=None):
    """As `int4_hopper.linear` launches it; programs in any order."""

    def pointer(tensor):
        if tensor is not None:
            return Pointer(tensor.float().contiguous().view(-1).numpy(), str(tensor.dtype).removeprefix("torch."))

    m, (groups, n), dtype = len(x), scale.shape, str(x.dtype).removeprefix("torch.")
    outputs = outputs_of(n, activation)
    out = Pointer(np.full(m * outputs, np.nan, np.float32), dtype)
    size = 2 * tiles.programs * tiles.outputs * tiles.tokens if tiles.shared else 1
    workspace = Pointer(np.full(size, np.nan, np.float32), "float32")
    row_tiles, token_tiles = cdiv(n, tiles.outputs), cdiv(m, tiles.tokens)
    per_step = int4_tiles.groups_of_step(group_size)
    k_tiles, rounds = packed.shape[1], cdiv(packed.shape[1], tiles.turns * tiles.steps)
    numbers = (m, n, k_tiles, rounds, groups - 1, int4_tiles.plane_groups(group_size), row_tiles * token_tiles,
               tiles.shared, tiles.shared * rounds, row_tiles, token_tiles, tiles.width, 0, n, n)  # fmt: skip
    for program in random.sample(range(tiles.programs), tiles.programs):
        namespace(MODULES, (program,), tiles.programs)["_int4_hopper_kernel"](
            Descriptor(packed.view(-1, 64).numpy(), "int16", (32 * tiles.steps, 64)),
            Descriptor(x.float().numpy(), dtype, (tiles.tokens, 64)),
            out,
            *map(pointer, (scale, minimum, bias, residual)),
            workspace,
            *map(Number, numbers),
            per_step,
            per_step == 1 or per_step * group_size == 128,
            tiles.scale_sums,
            tiles.blocks,
            tiles.tokens,
            tiles.sides,
            tiles.turns,
            tiles.steps,
            tiles.stages,
            activation is not None,
            0,
            False,
        )
    numbers = m, n, rounds, tiles.shared, tiles.programs, row_tiles, token_tiles, tiles.width
    for tile in range(tiles.shared):
        for chunk in range(cdiv(min(m, tiles.tokens) * outputs_of(tiles.outputs, activation), tiles.parts_block)):
            namespace((*MODULES[:2], MODULES[6]), (tile, chunk), tiles.shared)["_int4_parts_kernel"](
                out,
                pointer(bias),
                pointer(residual),
                workspace,
                *map(Number, numbers),
                tiles.outputs,
                tiles.tokens,
                tiles.parts_block,
                activation is not None,
                False,
            )
    return torch.from_numpy(out.memory).view(m, outputs).to(x.dtype)


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "minimum", "bias", "programs", "changes"),
    [
        (1, 300, 512, 128, False, False, 5, {}),
        (16, 300, 256, 128, True, True, 7, {}),
        (20, 200, 512, 64, True, True, 3, {}),
        (5, 130, 480, 32, True, False, 3, {}),
        (7, 520, 480, 96, False, True, 4, {}),
        (3, 5, 32, 32, False, True, 3, {}),
        (60, 300, 1024, 256, False, False, 3, {"stages": 4}),
        (60, 300, 384, 384, True, True, 2, {}),
        (130, 520, 384, 128, True, True, 5, {"stages": 2}),
        (300, 260, 256, 64, False, False, 2, {"width": 2}),
        (40, 300, 2048, 128, False, False, 13, {}),
    ],
)
def test_source(m, n, k, group, minimum, bias, programs, changes):
    """Tiles whole and shared by two programs and more, inputs and outputs that end within a tile, few stages."""
    dtype = random.choice((torch.float16, torch.bfloat16))
    with without_interpreter():
        q, args = case(n, k, group, "cpu", dtype, minimum, bias)
    x = torch.randn(m, k).to(dtype)
    tiles = int4_tiles.choose_tiles(m, n, k, group, minimum, replace(H100, num_sms=programs))
    tiles = replace(tiles, **changes)
    out = run_in_python(x, *args, group, tiles)
    check(out, x, q, args)
    assert torch.equal(out, run_in_python(x, *args, group, tiles))


@pytest.mark.parametrize(
    ("m", "n", "k", "group", "minimum", "warpgroups", "tokens", "sharing", "stages", "programs"),
    [
        (1, 300, 1024, 128, False, (1, 2, 1), 16, True, 2, 3),
        (1, 300, 1536, 384, False, (1, 2, 1, 2), 8, True, 2, 3),
        (8, 300, 1280, 256, True, (1, 2, 1, 2, 2), 8, True, 2, 3),
        (13, 300, 1056, 32, True, (1, 2, 1, 2, 1), 16, False, 3, 3),
        (30, 200, 1024, 64, True, (1, 2, 1, 1, 2), 32, True, 3, 3),
        (9, 300, 1152, 384, False, (1, 2, 1, 2, 2), 16, True, 2, 4),
        (20, 200, 1280, 256, True, (1, 2, 1, 2), 32, True, 3, 2),
        (33, 70, 256, 64, True, (1, 2, 1, 2), 32, False, 4, 2),  # fewer steps than a round has
        (5, 600, 512, 128, False, (2, 1, 1), 64, True, 4, 4),
        (60, 600, 512, 128, False, (2, 1, 2), 64, True, 4, 5),
        (130, 520, 384, 32, True, (2, 1, 1), 128, True, 2, 7),
        (260, 300, 384, 128, True, (2, 1, 1), 256, True, 2, 5),
    ],
)
def test_source_of_every_cut(m, n, k, group, minimum, warpgroups, tokens, sharing, stages, programs):
    """Warpgroups side by side and in turns, which a choice may not take yet."""
    dtype = random.choice((torch.float16, torch.bfloat16))
    with without_interpreter():
        q, args = case(n, k, group, "cpu", dtype, minimum, True)
    x = torch.randn(m, k).to(dtype)
    device = replace(H100, num_sms=programs)
    scale_sums = not minimum and tokens <= 64
    tiles = int4_tiles.cut(m, n, k, int4_tiles.Warpgroups(*warpgroups), tokens, sharing, device, scale_sums, stages)
    assert (tiles.shared > 0) == sharing
    check(run_in_python(x, *args, group, tiles), x, q, args)


@pytest.mark.parametrize(
    ("m", "n", "k", "minimum", "warpgroups", "tokens", "sharing", "stages", "programs"),
    [
        (3, 304, 1024, False, (1, 2, 1, 2, 2), 8, True, 2, 3),
        (9, 528, 256, False, (1, 2, 1, 2), 16, False, 4, 5),
        (20, 208, 512, True, (1, 2, 1, 1, 2), 32, True, 2, 3),
        (60, 592, 384, False, (2, 1, 2), 64, True, 4, 5),
        (130, 528, 256, True, (2, 1, 1), 128, True, 2, 7),
        (150, 272, 256, False, (2, 1, 2), 128, False, 2, 3),
        (270, 304, 256, True, (2, 1, 1), 256, True, 2, 5),
    ],
)
@pytest.mark.parametrize(
    ("with_residual", "activation"), [(True, None), (False, "silu_and_mul"), (True, "silu_and_mul")]
)
def test_source_of_what_follows(
    m, n, k, minimum, warpgroups, tokens, sharing, stages, programs, with_residual, activation
):
    """Residual and SiLU × gate, of whole tiles and of shared ones, outputs and tokens ending within a tile."""
    dtype = random.choice((torch.float16, torch.bfloat16))
    with without_interpreter():
        q, args = case(n, k, 128, "cpu", dtype, minimum, True)
    x = torch.randn(m, k).to(dtype)
    residual = torch.randn(m, outputs_of(n, activation)).to(dtype) if with_residual else None
    device = replace(H100, num_sms=programs)
    tiles = int4_tiles.cut(
        m, n, k, int4_tiles.Warpgroups(*warpgroups), tokens, sharing, device, not minimum and tokens <= 64, stages
    )
    assert (tiles.shared > 0) == sharing
    with without_interpreter():
        check(run_in_python(x, *args, 128, tiles, residual, activation), x, q, args, residual, activation)


def test_rounded_scales_of_another_dtype():
    q, args = case(130, 256, 32, "cpu", torch.float32)
    x = torch.randn(4, 256).bfloat16()
    tiles = int4_tiles.choose_tiles(4, 130, 256, 32, True, replace(H100, num_sms=2))
    check(run_in_python(x, *args, 32, tiles), x, q, args)


@pytest.mark.parametrize("m", [1, 16, 17, 64, 100, 256, 1000, 4096])
@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (28672, 4096), (4096, 14336), (6144, 4096), (32, 32), (49155, 576)])
@pytest.mark.parametrize("programs", [1, 78, 132])
def test_every_step_is_computed_once(m, n, k, programs):
    tiles = int4_tiles.choose_tiles(m, n, k, 32, False, replace(H100, num_sms=programs))
    count, rounds = cdiv(n, tiles.outputs) * cdiv(m, tiles.tokens), cdiv(k, 128 * tiles.turns * tiles.steps)
    names = namespace(MODULES[1:2], (0,), 1)
    shape = map(Number, (tiles.programs, count, tiles.shared, rounds))
    of, count, shared, rounds = shape
    shares = count, shared, shared * rounds, rounds
    longest, steps = 0, np.zeros((count, rounds), int)
    for program in map(Number, range(of)):
        first, own, total = names["share_of"](program, of, shares)
        longest = max(longest, total)
        for i in {0, own - 1, own, total - 1} & set(range(total)) if total > 300 else range(total):
            tile, at = names["round_at"](Number(i), first, own, program, of, shares)
            steps[tile, at] += 1
            if i < own:
                assert names["program_of"](tile * rounds + at, of, shared * rounds) == program
    assert steps.max() == 1
    assert longest > 300 or steps.min() == 1
    assert tiles.programs <= programs * tiles.at_once
    if tiles.shared:  # no program has more than its part; else no more tiles than it must have
        assert longest <= max(1.05 * count * rounds / of, count * rounds / of + 1)
    else:
        assert longest == cdiv(count, tiles.programs) * rounds


@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (28672, 4096), (4096, 14336), (6144, 4096), (32, 32)])
@pytest.mark.parametrize(("group", "minimum"), [(128, False), (32, True)])
@pytest.mark.parametrize("programs", [78, 132])
def test_there_are_stages_for_two_rounds(n, k, group, minimum, programs):
    """A warpgroup releases a step when it has the next."""
    for m in (1, 17, 33, 65, 4096):
        device = replace(H100, num_sms=programs)
        tiles = int4_tiles.choose_tiles(m, n, k, group, minimum, device)
        assert tiles.stages >= 2
        assert tiles.sides * tiles.turns == 2


@pytest.mark.parametrize(("n", "k"), [(8192, 8192), (28672, 4096), (4096, 14336), (6144, 4096)])
def test_a_warm_up_at_powers_of_two_meets_every_kernel(n, k):
    def kernel(m):
        tiles = int4_tiles.choose_tiles(m, n, k, 128, False, H100)
        return replace(tiles, programs=0, shared=tiles.shared > 0, width=0)

    for m in range(1, 5000, 37):
        assert kernel(m) == kernel(next_power_of_2(m))


@pytest.mark.parametrize("planes", [1, 2, 3, 4, 7, 12, 112, 142, 1023, 32767])
def test_groups_by_a_product(planes):
    """The division of a plane's number by how many of them a group has, up to the most inputs that are taken."""
    group_of = namespace(MODULES[4:5], (0,), 1)["group_of"]
    numbers = np.arange(int4_tiles.MOST_INPUTS // 32)
    groups = group_of(Tensor(numbers, "int64"), Number(int4_tiles.plane_groups(32 * planes)))
    assert np.array_equal(groups.values, numbers // planes)


def test_which_calls_it_takes(monkeypatch):
    x = torch.empty(6, 256, dtype=torch.float16, device="meta")
    packed = torch.empty(1, 2, 64, 32, dtype=torch.int16, device="meta")
    assert not int4_hopper.takes(x, packed, H100)  # under the interpreter
    monkeypatch.setattr(int4_hopper, "INTERPRET", False)
    wide = torch.empty(6, 2, 264, dtype=torch.float16, device="meta")
    taken = [x, x.bfloat16(), x[:1], x[0], x[None], x[:, :224], wide[:, 0], wide[:, 1, :256], wide]
    assert all(int4_hopper.takes(x, packed, H100) for x in taken)
    two_strides = torch.empty(6, 3, 264, dtype=torch.float16, device="meta")[:, :2]
    unaligned = torch.empty(6, 250, dtype=torch.float16, device="meta")[:, :224]
    long = torch.empty(1, 2**20 + 32, dtype=torch.float16, device="meta")
    assert not any(int4_hopper.takes(x, packed, H100) for x in (x.float(), x[:0], two_strides, unaligned, long))
    assert not any(int4_hopper.takes(x, packed, KNOWN_DEVICES[arch]) for arch in (80, 89))


@pytest.mark.parametrize("m", [1, 40, 64, 200, 1000])
@pytest.mark.parametrize(
    ("n", "k", "group", "minimum", "bias"),
    [
        (300, 4096, 128, False, True),
        (6144, 4096, 128, False, False),
        (4544, 4544, 64, True, False),
        (131, 480, 32, True, True),
        (49155, 576, 576, False, False),
        (520, 672, 96, True, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_on_a_gpu(m, n, k, group, minimum, bias, dtype, marked):
    q, args = case(n, k, group, "cuda", dtype, minimum, bias)
    x = torch.randn(m, k, device="cuda").to(dtype)
    with recording(Recorder()) as recorder:
        out = octavo.int4_linear(x, *args, group_size=group)
    assert recorder.launches[0].kernel.__name__ == "_int4_hopper_kernel"
    check(out, x, q, args)
    for _ in range(10):
        assert torch.equal(out, octavo.int4_linear(x, *args, group_size=group))


@pytest.mark.parametrize("m", [1, 16, 40, 64, 200, 1000])
@pytest.mark.parametrize(
    ("n", "k", "group", "minimum", "bias"),
    [(6144, 4096, 128, False, True), (4544, 4544, 64, True, False), (336, 480, 32, True, True)],
)
@pytest.mark.parametrize(
    ("with_residual", "activation"), [(True, None), (False, "silu_and_mul"), (True, "silu_and_mul")]
)
@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_what_follows_on_a_gpu(m, n, k, group, minimum, bias, with_residual, activation, marked):
    q, args = case(n, k, group, "cuda", torch.bfloat16, minimum, bias)
    x = torch.randn(m, k, device="cuda").bfloat16()
    residual = torch.randn(m, outputs_of(n, activation), device="cuda").bfloat16() if with_residual else None
    options = dict(group_size=group, residual=residual, activation=activation)
    out = octavo.int4_linear(x, *args, **options)
    check(out, x, q, args, residual, activation)
    for _ in range(10):
        assert torch.equal(out, octavo.int4_linear(x, *args, **options))


@pytest.mark.parametrize("marked", [pytest.param(None, marks=on_hopper)])
def test_streams_do_not_share_parts(marked):
    """Calls that run at the same time, each of which sums up parts of its tiles."""
    _, args = case(1024, 8192, 128, "cuda", torch.bfloat16, minimum=False)
    xs = [torch.randn(8, 8192, device="cuda").bfloat16() for _ in range(4)]
    expected = [octavo.int4_linear(x, *args, group_size=128) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        outs = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(octavo.int4_linear(x, *args, group_size=128))
        torch.cuda.synchronize()
        assert all(map(torch.equal, outs, expected))
