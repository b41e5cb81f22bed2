"""The int8 linear layer on Hopper (sm_90), in Gluon; elsewhere, and in fp32, `int8.py`'s kernel does it.

It is `int4_hopper.py`'s kernel with weights of a byte, which are read as they lie in memory, `[outputs, inputs]`: the
same shares of the product, the same second kernel for the tiles that programs share.

What bounds few tokens. A step of 64 outputs by 128 inputs is 8 KiB, which come from memory in 620 cycles of an H100's
multiprocessor. To load and unpack it takes each warp of a warpgroup 32 loads and 96 instructions (`int8_unpack.py`),
half of what it has the time to issue, and the rest of a step is int4's.

What bounds many tokens: as with int4, the tensor cores and the GPU's power. A program of 128 outputs and 256 tokens
has room for not three steps of 128 inputs, so a stage is 64 of them.
"""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import empty, launch
from octavo.kernels.quant.int4_hopper import add_parts, token_stride
from octavo.kernels.quant.int4_tiles import (
    Cut,
    Cuts,
    Tiles,
    cut_into,
    fastest_of,
    groups_of_step,
    time_of,
)
from octavo.kernels.quant.int8_compute import compute_bytes
from octavo.kernels.quant.int8_loads import load_bytes_of_weights, load_parts_of_tokens
from octavo.kernels.tiles import DeviceProperties, cdiv, chains, device_properties, next_power_of_2

TILE_BYTES = 8192
"""Of 64 outputs by 128 inputs."""


# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit(
    do_not_specialize=[
        "M", "k_tiles", "last_group", "group_planes", "tiles", "shared", "row_tiles", "token_tiles", "width",
        "stride_scale_group",
    ]
)
def _int8_hopper_kernel(
    # Few tokens: bound by reading the weights, a byte each. Many: by the tensor cores.
    weight_desc, x_desc, out_ptr, scale_ptr, bias_ptr, workspace_ptr, M, N, k_tiles, last_group, group_planes, tiles,
    shared, row_tiles, token_tiles, width, stride_scale_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS:
    gl.constexpr, BLOCKS: gl.constexpr, TOKENS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, INPUTS:
    gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):
    TILES: gl.constexpr = SIDES * BLOCKS
    x = gl.allocate_shared_memory(x_desc.dtype, [INPUTS // 64 * STAGES, TOKENS, 64], x_desc.layout)
    read = gl.allocate_shared_memory(gl.int8, [STAGES * TILES, 64, INPUTS], weight_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=INPUTS, element_bitwidth=16, rank=2)
    weights = read._reinterpret(gl.int16, [SIDES * STAGES, 64 * BLOCKS, INPUTS // 2], pairs)
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
            (compute_bytes, (
                0, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, M, N,
                k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
                GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, INPUTS, STAGES, CHAINED)),
            (compute_bytes, (
                1, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, M, N,
                k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
                GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, INPUTS, STAGES, CHAINED)),
            (compute_bytes, (
                2, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, M, N,
                k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
                GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, INPUTS, STAGES, CHAINED)),
            (compute_bytes, (
                3, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, M, N,
                k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
                GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, INPUTS, STAGES, CHAINED)),
            (load_bytes_of_weights, (
                weight_desc, read, full, empty, scale_ptr, N, k_tiles, last_group, group_planes, tiles, shared,
                row_tiles, token_tiles, width, stride_scale_group, GROUPS, TILES, TOKENS, INPUTS, STAGES)),
            (load_parts_of_tokens, (
                x_desc, x, full, empty, k_tiles, tiles, shared, row_tiles, token_tiles, width, TOKENS, INPUTS, STAGES,
                CHAINED)),
        ], [4, 4, 4, 1, 1], [112, 112, 112, 24, 24])
    else:
        gl.warp_specialize([
            (compute_bytes, (
                0, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, M, N,
                k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
                GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, INPUTS, STAGES, CHAINED)),
            (compute_bytes, (
                1, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, M, N,
                k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
                GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, INPUTS, STAGES, CHAINED)),
            (load_bytes_of_weights, (
                weight_desc, read, full, empty, scale_ptr, N, k_tiles, last_group, group_planes, tiles, shared,
                row_tiles, token_tiles, width, stride_scale_group, GROUPS, TILES, TOKENS, INPUTS, STAGES)),
            (load_parts_of_tokens, (
                x_desc, x, full, empty, k_tiles, tiles, shared, row_tiles, token_tiles, width, TOKENS, INPUTS, STAGES,
                CHAINED)),
        ], [4, 1, 1], [240, 24, 24])
# fmt: on


def scales_of_step(k: int, group_size: int) -> int:
    """GROUPS of the kernel: how many scales it looks up for 128 inputs; 0 where an output has one."""
    return 0 if group_size == k else groups_of_step(group_size)


def inputs_of_stage(tokens: int) -> int:
    return 128 if tokens <= 64 else 64


CUTS: Cuts = {
    16: {(1, 4, 1): 0.28, (2, 2, 1): 0.22, (4, 1, 1): 0.2},
    32: {(1, 4, 1): 0.29, (2, 2, 1): 0.23, (4, 1, 1): 0.21},
    64: {(1, 2, 1): 0.3, (2, 1, 1): 0.28, (2, 1, 2): 0.26},
    128: {(2, 1, 1): 0.4, (2, 1, 2): 0.38},
    256: {(2, 1, 1): 0.71},
}
"""As int4's, of a tile of 64 outputs by 128 inputs. Up to 64 tokens its 8 KiB take longer to come: 0.33 µs."""


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
    stage_bytes = (warpgroups[0] * warpgroups[2] * 64 + tokens * 2) * inputs_of_stage(tokens)
    if stages is None and tokens > 64:
        stages = 10
    return cut_into(stage_bytes, m, n, k, warpgroups, tokens, sharing, properties, scale_sums, stages)


@cache
def _fastest(m: int, n: int, k: int, per_step: int, scale_sums: bool, properties: DeviceProperties) -> Cut:
    """The fastest by `time_of`, for m a power of two."""
    widths = [min(max(m, 16), 128)] + [256] * (m > 128 and per_step <= 1)
    possible = [(groups, tokens) for tokens in widths for groups in CUTS[tokens]]
    # Scales of several groups a step take registers.
    too_many = [((2, 1, 2), 128), ((2, 2, 1), 32)] if per_step > 1 else []
    possible = [of for of in possible if of not in too_many]

    def time(choice: Cut) -> float:
        return time_of(cut(m, n, k, *choice, properties, scale_sums), m, n, k, CUTS, TILE_BYTES)

    return fastest_of(possible, m, n, properties, time)


def choose_tiles(m: int, n: int, k: int, group_size: int, properties: DeviceProperties) -> Tiles:
    """Tiles as wide as the tokens, and of those the ones that `time_of` says are fastest.

    Choices change at powers of two tokens alone, so that a warm-up meets all of them.
    """
    scale_sums = group_size != k and group_size % 128 == 0 and m <= 64
    choice = _fastest(next_power_of_2(m), n, k, scales_of_step(k, group_size), scale_sums, properties)
    return cut(m, n, k, *choice, properties, scale_sums)


def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    tiles: Tiles | None = None,
) -> None:
    """Launches it, for a call that `int4_hopper.takes`; `tiles` in place of those chosen are for measurements."""
    (n, k), groups, device = weight.shape, scale.shape[0], x.device
    m, k_tiles = x.numel() // k, cdiv(k, 128)
    if tiles is None:
        tiles = choose_tiles(m, n, k, group_size, device_properties(device))
    outputs = tiles.outputs
    row_tiles, token_tiles = cdiv(n, outputs), cdiv(m, tiles.tokens)
    # Never None, or the kernel would be compiled twice.
    parts = 2 * tiles.programs if tiles.shared else 0
    workspace = empty((max(parts * outputs * tiles.tokens, 1),), torch.float32, device)
    inputs = inputs_of_stage(tiles.tokens)
    weight_layout = gl.NVMMASharedLayout(swizzle_byte_width=inputs, element_bitwidth=8, rank=2)
    x_layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    per_step = scales_of_step(k, group_size)
    launch(
        _int8_hopper_kernel,
        (tiles.programs,),
        TensorDescriptor(weight, [n, k], [k, 1], [64, inputs], weight_layout),
        TensorDescriptor(x, [m, k], [token_stride(x), 1], [tiles.tokens, 64], x_layout),
        out,
        scale,
        bias,
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
        device=device,
        num_warps=4,
        GROUPS=per_step,
        EVEN=per_step <= 1 or per_step * group_size == 128,
        SCALE_SUMS=tiles.scale_sums,
        BLOCKS=tiles.blocks,
        TOKENS=tiles.tokens,
        SIDES=tiles.sides,
        TURNS=tiles.turns,
        INPUTS=inputs,
        STAGES=tiles.stages,
        CHAINED=chains(device),
    )
    if tiles.shared:
        add_parts(out, bias, None, workspace, m, n, k_tiles, tiles, None)
