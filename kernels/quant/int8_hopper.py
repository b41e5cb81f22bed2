"""The int8 linear layer on Hopper (sm_90), in Gluon; elsewhere, and in fp32, `int8.py`'s kernel does it.

It is `int4_hopper.py`'s kernel with weights of a byte, which are read as they lie in memory, `[outputs, inputs]`: the
same shares of the product, the same second kernel for the tiles that programs share.

What bounds few tokens. A step of 64 outputs by 128 inputs is 8 KiB, which come from memory in 620 cycles of an H100's
multiprocessor. To load and unpack it takes each warp of a warpgroup 32 loads and 96 instructions (`int8_unpack.py`),
half of what it has the time to issue, and the rest is as with int4: rounds of two turns of two steps.

What bounds many tokens: as with int4, the tensor cores and the GPU's power. A program of 128 outputs and 256 tokens
has room for not three steps of 128 inputs, so a stage is 64 of them.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import empty, launch
from octavo.kernels.quant.int4_hopper import REGISTERS, add_parts, token_stride
from octavo.kernels.quant.int4_tiles import Tiles, plane_groups
from octavo.kernels.quant.int8_compute import compute_bytes
from octavo.kernels.quant.int8_loads import load_bytes_of_weights, load_parts_of_tokens
from octavo.kernels.quant.int8_tiles import choose_tiles, inputs_of_stage, scales_of_step
from octavo.kernels.tiles import cdiv, chains, device_properties

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit(
    do_not_specialize=[
        "M", "rounds", "last_group", "plane_groups", "tiles", "shared", "shared_rounds", "row_tiles", "token_tiles",
        "width", "early", "stride_scale_group",
    ]
)
def _int8_hopper_kernel(
    # Few tokens: bound by reading the weights, a byte each. Many: by the tensor cores.
    weight_desc, x_desc, out_ptr, scale_ptr, bias_ptr, workspace_ptr, M, N, rounds, last_group, plane_groups, tiles,
    shared, shared_rounds, row_tiles, token_tiles, width, early, stride_scale_group, GROUPS: gl.constexpr, EVEN:
    gl.constexpr, SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, TOKENS: gl.constexpr, SIDES: gl.constexpr, TURNS:
    gl.constexpr, STEPS: gl.constexpr, INPUTS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, CHAINED:
    gl.constexpr,
):
    shares = (tiles, shared, shared_rounds, rounds, row_tiles, token_tiles, width)
    TILES: gl.constexpr = SIDES * BLOCKS
    PLACES: gl.constexpr = STAGES * TURNS
    x = gl.allocate_shared_memory(x_desc.dtype, [INPUTS // 64 * PLACES * STEPS, TOKENS, 64], x_desc.layout)
    read = gl.allocate_shared_memory(gl.int8, [PLACES * TILES * STEPS, 64, INPUTS], weight_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=INPUTS, element_bitwidth=16, rank=2)
    weights = read._reinterpret(gl.int16, [PLACES * SIDES * STEPS, 64 * BLOCKS, INPUTS // 2], pairs)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], barrier)
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
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=SIDES * TURNS)
    fence_async_shared()
    gl.warp_specialize([
        (compute_bytes, (
            0, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, shares, early,
            M, N, last_group, plane_groups, stride_scale_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
            STEPS, INPUTS, STAGES, CHAINED)),
        (compute_bytes, (
            1, out_ptr, scale_ptr, bias_ptr, workspace_ptr, weights, x, full, empty, turns, left, taken, shares, early,
            M, N, last_group, plane_groups, stride_scale_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS,
            STEPS, INPUTS, STAGES, CHAINED)),
        (load_bytes_of_weights, (
            weight_desc, read, full, empty, scale_ptr, shares, early, N, last_group, plane_groups, stride_scale_group,
            GROUPS, TILES, TOKENS, TURNS, STEPS, INPUTS, STAGES, CHAINED)),
        (load_parts_of_tokens, (
            x_desc, x, full, empty, shares, TOKENS, TURNS, STEPS, INPUTS, STAGES, CHAINED)),
    ], [4, 1, 1], [104 if REGISTERS else 240, 24, 24])
# fmt: on


def linear(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    early: bool,
    tiles: Tiles | None = None,
) -> None:
    """Launches it, for a call that `int4_hopper.takes`; early: the kernel before does not write weights or scales.

    `tiles` in place of those that would be chosen are for measurements.
    """
    (n, k), groups, device = weight.shape, scale.shape[0], x.device
    m = x.numel() // k
    if tiles is None:
        tiles = choose_tiles(m, n, k, group_size, device_properties(device))
    outputs, rounds = tiles.outputs, cdiv(k, 128 * tiles.turns * tiles.steps)
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
        rounds,
        groups - 1,
        plane_groups(group_size),
        row_tiles * token_tiles,
        tiles.shared,
        tiles.shared * rounds,
        row_tiles,
        token_tiles,
        tiles.width,
        int(early),
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
        STEPS=tiles.steps,
        INPUTS=inputs,
        STAGES=tiles.stages,
        REGISTERS=REGISTERS if tiles.at_once == 2 else 0,
        CHAINED=chains(device),
    )
    if tiles.shared:
        add_parts(out, bias, None, workspace, m, n, rounds, tiles, None)
