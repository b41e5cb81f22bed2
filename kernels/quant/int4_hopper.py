"""The int4 linear layer on Hopper (sm_90), in Gluon; elsewhere, and in fp32, `int4.py`'s kernel does it.

A program on each multiprocessor: two warps load, by TMA (`int4_loads.py`), two or four warpgroups compute
(`int4_compute.py`). What a program computes is told by `int4_shares.py`; tiles that programs share are added up by a
second kernel (`int4_parts.py`), which is launched only where there are some.

What bounds few tokens. A step of 64 outputs by 128 inputs is 4 KiB, which come from memory in 310 cycles of an H100's
multiprocessor (3.05 TB/s for 132 of them, at 1.75 GHz). To unpack it takes each warp of a warpgroup, one on each of the
four schedulers, 32 LOP3, 24 shifts and 32 HFMA2, of the 185 instructions of its loop (SASS; it was 200 before scales
were loaded behind their use): 185 cycles to issue them, 112 of the pipe of LOP3 and shifts. So instructions leave room;
what does not is latency. A step is two products, the second of which adds to the first's sums, with a wait for each and
four barriers of the warpgroup, and two warpgroups took 1077 cycles a step each, as measured. So up to 32 tokens there
are four. With turns at the same 64 outputs they make tiles so small that 8192 outputs are 128 of them, and nothing is
shared; with outputs of their own they take 300 cycles a tile (`CUTS`), as long as it takes to come from memory, with
turns 340 to 450, for those add up in shared memory. On an H100, one token, Marlin's or Machete's best of another day
beside it: 8192 × 8192 19.0 µs (18.2), 28672 × 4096 25.3 (30.9), 4096 × 14336 17.4 (23.6), 6144 × 4096 11.0 (11.6).

What bounds many tokens. A packed tile takes the tensor cores 512 cycles by 128 tokens, 1024 by 256; to unpack it takes
each warp some 200 instructions. They slow the products down even beside them: with 128 tokens the tensor cores are busy
70 % of the time, with nothing unpacked 85 to 90 %. With 256 tokens they are so 90 to 94 %, and what bounds is the GPU's
power: 1.38 to 1.5 GHz at 700 W. With half the tokens read from the cache a product of 1024 tokens took 124 mJ in place
of 137; but it takes clusters with multicast, which Triton 3.6 has not. (`linear_tiles.txt`, 3 and 5, has what was
timed.)
"""

from dataclasses import dataclass
from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import INTERPRET, empty, launch
from octavo.kernels.quant.epilogue import outputs_of
from octavo.kernels.quant.int4_compute import compute
from octavo.kernels.quant.int4_loads import load_tokens, load_weights
from octavo.kernels.quant.int4_parts import _int4_parts_kernel
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    device_properties,
    next_power_of_2,
    row_strides,
)

TILE_BYTES = 4096
"""Of a packed tile: 64 outputs by 128 inputs."""
OTHER_BYTES = 2048
"""Of shared memory, for barriers, and as much for each warpgroup that writes results: their way from lane to lane."""


# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit(
    do_not_specialize=[
        "M", "k_tiles", "last_group", "group_planes", "tiles", "shared", "row_tiles", "token_tiles", "width",
        "stride_scale_group", "stride_minimum_group",
    ]
)
def _int4_hopper_kernel(
    # Few tokens: bound by reading the weights, half a byte each. Many: by the tensor cores.
    packed_desc, x_desc, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, M, N, k_tiles,
    last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group, stride_minimum_group,
    GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, TOKENS: gl.constexpr,
    SIDES: gl.constexpr, TURNS: gl.constexpr, STAGES: gl.constexpr, ACTIVATED: gl.constexpr, CHAINED:
    gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    TILES: gl.constexpr = SIDES * BLOCKS
    x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, 128], x_desc.layout)
    x_read = x._reinterpret(dtype, [2 * STAGES, TOKENS, 64], x_desc.layout)
    tiles_read = gl.allocate_shared_memory(gl.int16, [STAGES * TILES, 32, 64], packed_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    words = tiles_read._reinterpret(gl.int32, [SIDES * STAGES, 32 * BLOCKS, 32], pairs)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    # The sums of the warpgroups that take turns with the first of their side, if any.
    OTHERS: gl.constexpr = TURNS - 1 if TURNS > 1 else 1
    ROWS: gl.constexpr = 64 * BLOCKS if TURNS > 1 else 1
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    turns = gl.allocate_shared_memory(gl.float32, [OTHERS * SIDES, ROWS, TOKENS], plain)
    left = gl.allocate_shared_memory(gl.int64, [SIDES, 1], barrier)
    taken = gl.allocate_shared_memory(gl.int64, [SIDES, 1], barrier)
    for side in gl.static_range(SIDES):
        mbarrier.init(left.index(side), count=OTHERS)
        mbarrier.init(taken.index(side), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=SIDES)
    fence_async_shared()
    if SIDES * TURNS == 4:
        gl.warp_specialize([
            (compute, (
                0, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
                left, taken, M, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
                stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
                STAGES, ACTIVATED, CHAINED)),
            (compute, (
                1, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
                left, taken, M, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
                stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
                STAGES, ACTIVATED, CHAINED)),
            (compute, (
                2, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
                left, taken, M, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
                stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
                STAGES, ACTIVATED, CHAINED)),
            (compute, (
                3, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
                left, taken, M, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
                stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
                STAGES, ACTIVATED, CHAINED)),
            (load_weights, (
                packed_desc, tiles_read, full, empty, scale_ptr, minimum_ptr, N, k_tiles, last_group, group_planes,
                tiles, shared, row_tiles, token_tiles, width, stride_scale_group, stride_minimum_group, GROUPS, TILES,
                TOKENS, STAGES)),
            (load_tokens, (
                x_desc, x_read, full, empty, k_tiles, tiles, shared, row_tiles, token_tiles, width, TOKENS, STAGES,
                CHAINED)),
        ], [4, 4, 4, 1, 1], [112, 112, 112, 24, 24])
    else:
        gl.warp_specialize([
            (compute, (
                0, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
                left, taken, M, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
                stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
                STAGES, ACTIVATED, CHAINED)),
            (compute, (
                1, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
                left, taken, M, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
                stride_scale_group, stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
                STAGES, ACTIVATED, CHAINED)),
            (load_weights, (
                packed_desc, tiles_read, full, empty, scale_ptr, minimum_ptr, N, k_tiles, last_group, group_planes,
                tiles, shared, row_tiles, token_tiles, width, stride_scale_group, stride_minimum_group, GROUPS, TILES,
                TOKENS, STAGES)),
            (load_tokens, (
                x_desc, x_read, full, empty, k_tiles, tiles, shared, row_tiles, token_tiles, width, TOKENS, STAGES,
                CHAINED)),
        ], [4, 1, 1], [240, 24, 24])
# fmt: on


@dataclass(frozen=True)
class Tiles:
    """How the product is cut, and which programs have what part of it."""

    sides: int
    """Warpgroups with outputs of their own, side by side."""
    turns: int
    """Warpgroups that take turns at the steps of the same outputs."""
    blocks: int
    """A warpgroup has 64 times as many outputs."""
    tokens: int
    stages: int
    scale_sums: bool
    """Whether sums are scaled, instead of weights."""
    programs: int
    shared: int
    """Tiles that programs share; the others are computed whole."""
    width: int
    """Tiles of tokens side by side: with 4, what runs at a time reads least (4096 tokens: 772 µs, with 16 777)."""

    @property
    def outputs(self) -> int:
        return 64 * self.sides * self.blocks

    @property
    def parts_block(self) -> int:
        """Results that a program of the second kernel adds up."""
        return 512 if self.tokens <= 32 else 2048


Cut = tuple[tuple[int, int, int], int, bool]
"""What `cut` takes from `warpgroups` to `sharing`."""
Cuts = dict[int, dict[tuple[int, int, int], float]]


def groups_of_step(group_size: int) -> int:
    """How many groups the kernel looks up for 128 inputs: those of other sizes for each plane of 32 inputs."""
    return 1 if group_size % 128 == 0 else 2 if group_size == 64 else 4


CUTS: Cuts = {
    16: {(1, 4, 1): 0.26, (2, 2, 1): 0.195, (4, 1, 1): 0.17},
    32: {(1, 4, 1): 0.27, (2, 2, 1): 0.2, (4, 1, 1): 0.18},
    64: {(2, 1, 1): 0.26, (2, 1, 2): 0.245},
    128: {(2, 1, 1): 0.4, (2, 1, 2): 0.38},
    256: {(2, 1, 1): 0.71},
}
"""By tokens: sides, turns and blocks, and the microseconds that a packed tile takes a multiprocessor (measured, but for
32 tokens)."""
STAGE_BYTES = 160 * 1024
"""Of stages, up to 64 tokens: of more, or of more than 8 stages, a program's first tokens come late (1 µs of 26)."""
MEMORY_BYTES_A_US, CACHE_BYTES_A_US = 3.25e6, 7.4e6
"""What comes from memory, which is the weights, and from the cache, with the tokens that each program reads again."""
PARTS_US, PART_BYTES_A_US = 4.2, 2.2e6
"""What adding up the parts of shared tiles takes, and how fast they are written and read."""


def share_tiles(tiles: int, k: int, sharing: bool, properties: DeviceProperties) -> tuple[int, int]:
    """How many programs there are, and how many tiles they share."""
    if not sharing:
        return min(properties.num_sms, tiles), 0
    programs = min(properties.num_sms, max(tiles, tiles * cdiv(k, 128) // 2))
    return programs, tiles % programs + (programs if tiles > programs else 0)


def cut(
    m: int,
    n: int,
    k: int,
    warpgroups: tuple[int, int, int],
    tokens: int,
    sharing: bool,
    properties: DeviceProperties,
    scale_sums: bool,
    stages: int | None = None,
) -> Tiles:
    """Tiles of so many `sides`, `turns` and `blocks`, and of so many tokens; fewer stages where memory is short."""
    sides, turns, blocks = warpgroups
    token_tiles = cdiv(m, tokens)
    programs, shared = share_tiles(cdiv(n, 64 * sides * blocks) * token_tiles, k, sharing, properties)
    room = properties.shared_memory - (sides + 1) * OTHER_BYTES - (turns - 1) * sides * blocks * tokens * 256
    stage_bytes = sides * blocks * TILE_BYTES + tokens * 256
    if stages is None:
        stages = min(STAGE_BYTES // stage_bytes, 8) if tokens <= 64 else 5
    stages = min(room // stage_bytes, stages) // turns * turns
    return Tiles(sides, turns, blocks, tokens, stages, scale_sums, programs, shared, min(token_tiles, 4))


def time_of(tiles: Tiles, m: int, n: int, k: int, cuts: Cuts, tile_bytes: int) -> float:
    """Microseconds that tiles take, but for what all of them do."""
    k_tiles, step_tiles = cdiv(k, 128), tiles.sides * tiles.blocks
    count = cdiv(n, tiles.outputs) * cdiv(m, tiles.tokens)

    own = step_tiles * cuts[tiles.tokens][tiles.sides, tiles.turns, tiles.blocks]
    weights = step_tiles * 1.03 * tile_bytes  # and scales
    from_cache = weights + min(m, tiles.tokens) * 256

    def of_steps(steps: float, programs: int) -> float:
        memory = weights * programs / MEMORY_BYTES_A_US if tiles.tokens <= 64 else 0  # else it is read several times
        return steps * max(own, memory, from_cache * programs / CACHE_BYTES_A_US)

    if tiles.shared:
        parts = tiles.programs + (tiles.shared if tiles.programs % tiles.shared else 0)
        parts *= tiles.outputs * min(m, tiles.tokens) * 4
        return of_steps(count * k_tiles / tiles.programs, tiles.programs) + PARTS_US + parts / PART_BYTES_A_US
    waves, rest = divmod(count, tiles.programs)
    return of_steps(waves * k_tiles, tiles.programs) + of_steps(k_tiles if rest else 0, rest)


@cache
def _fastest(m: int, n: int, k: int, per_step: int, scale_sums: bool, properties: DeviceProperties) -> Cut:
    """The fastest by `time_of`, for m a power of two."""
    widths = [min(max(m, 16), 128)] + [256] * (m > 128 and per_step == 1)
    possible = [(groups, tokens) for tokens in widths for groups in CUTS[tokens]]
    # Scales of several groups a step take registers.
    too_many = {1: [], 2: [((2, 1, 2), 128)], 4: [((2, 1, 2), 128), ((2, 2, 1), 32)]}[per_step]
    possible = [of for of in possible if of not in too_many]

    def time(choice: Cut) -> float:
        return time_of(cut(m, n, k, *choice, properties, scale_sums), m, n, k, CUTS, TILE_BYTES)

    def may_share(groups: tuple[int, int, int], tokens: int) -> bool:
        # Shares of tiles of four blocks, which are few steps, end unevenly (4096 × 14336: 19.4 µs, two by two 17.4). Of
        # many tiles a part is all that the last wave wastes (8192 × 8192, 4096 tokens: 898 µs shared, 785 whole).
        tiles = cdiv(n, 64 * groups[0] * groups[2]) * cdiv(m, tokens)
        return groups != (4, 1, 1) and tiles <= 5 * properties.num_sms

    choices = [(*of, False) for of in possible] + [(*of, True) for of in possible if may_share(*of)]
    return min(choices, key=time)


def choose_tiles(m: int, n: int, k: int, group_size: int, with_minimum: bool, properties: DeviceProperties) -> Tiles:
    """Tiles as wide as the tokens, and of those the ones that `time_of` says are fastest.

    Choices change at powers of two tokens alone, so that a warm-up meets all of them.
    """
    scale_sums = not with_minimum and group_size % 128 == 0 and m <= 64
    choice = _fastest(next_power_of_2(m), n, k, groups_of_step(group_size), scale_sums, properties)
    return cut(m, n, k, *choice, properties, scale_sums)


def takes(x: torch.Tensor, packed: torch.Tensor, properties: DeviceProperties) -> bool:
    """Whether this kernel can do a call: there are tokens, and the copy engine can read them as they lie."""
    return (
        properties.capability[0] == 9
        and torch.version.hip is None
        and not INTERPRET
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.numel() > 0
        and x.data_ptr() % 16 == packed.data_ptr() % 16 == 0
        and token_stride(x) is not None
    )


def token_stride(x: torch.Tensor) -> int | None:
    """Elements from token to token, or None where they are not a multiple of 16 bytes, or differ."""
    if x.numel() == x.shape[-1]:
        return x.shape[-1]
    inner, stride, _ = row_strides("x", x)
    return stride if inner == 1 and stride > 0 and stride * x.element_size() % 16 == 0 else None


def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    residual: torch.Tensor | None,
    activation: str | None,
    tiles: Tiles | None = None,
) -> None:
    """Launches it; `tiles` in place of those that would be chosen are for measurements."""
    (groups, n), k, device = scale.shape, x.shape[-1], x.device
    m, k_tiles = x.numel() // k, packed.shape[1]
    if tiles is None:
        tiles = choose_tiles(m, n, k, group_size, minimum is not None, device_properties(device))
    outputs, activated, chained = tiles.outputs, activation is not None, chains(device)
    row_tiles, token_tiles = cdiv(n, outputs), cdiv(m, tiles.tokens)
    # Never None, or the kernel would be compiled twice.
    parts = 2 * tiles.programs if tiles.shared else 0
    workspace = empty((max(parts * outputs * tiles.tokens, 1),), torch.float32, device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    per_step = groups_of_step(group_size)
    launch(
        _int4_hopper_kernel,
        (tiles.programs,),
        TensorDescriptor(packed, [packed.numel() // 64, 64], [64, 1], [32, 64], layout),
        TensorDescriptor(x, [m, k], [token_stride(x), 1], [tiles.tokens, 64], layout),
        out,
        scale,
        minimum,
        bias,
        residual,
        workspace,
        m,
        n,
        k_tiles,
        groups - 1,
        group_size // 32,
        row_tiles * token_tiles,
        tiles.shared,
        row_tiles,
        token_tiles,
        tiles.width,
        scale.stride(0),
        0 if minimum is None else minimum.stride(0),
        device=device,
        num_warps=4,
        GROUPS=per_step,
        EVEN=per_step == 1 or per_step * group_size == 128,
        SCALE_SUMS=tiles.scale_sums,
        BLOCKS=tiles.blocks,
        TOKENS=tiles.tokens,
        SIDES=tiles.sides,
        TURNS=tiles.turns,
        STAGES=tiles.stages,
        ACTIVATED=activated,
        CHAINED=chained,
    )
    if tiles.shared:
        launch(
            _int4_parts_kernel,
            (tiles.shared, cdiv(min(m, tiles.tokens) * outputs_of(outputs, activation), tiles.parts_block)),
            out,
            bias,
            residual,
            workspace,
            m,
            n,
            k_tiles,
            tiles.shared,
            tiles.programs,
            row_tiles,
            token_tiles,
            tiles.width,
            device=device,
            num_warps=4,
            OUTPUTS=outputs,
            TOKENS=tiles.tokens,
            BLOCK=tiles.parts_block,
            ACTIVATED=activated,
            CHAINED=chained,
        )
