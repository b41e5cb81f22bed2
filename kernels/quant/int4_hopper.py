"""The int4 linear layer on Hopper (sm_90), in Gluon; elsewhere, and in fp32, `int4.py`'s kernel does it.

A program on each multiprocessor, or two: two warps load, by TMA (`int4_loads.py`), two warpgroups compute
(`int4_compute.py`). What a program computes is told by `int4_shares.py`; tiles that programs share are added up by a
second kernel (`int4_parts.py`), which is launched only where there are some; `int4_tiles.py` chooses them.

What bounds few tokens. A step of 64 outputs by 128 inputs is 4 KiB, which come from memory in 310 cycles of an H100's
multiprocessor (3.05 TB/s for 132 of them, at 1.75 GHz). To unpack it takes each warp of a warpgroup, one on each of the
four schedulers, 32 LOP3, 24 shifts and 32 HFMA2, of the 168 instructions of its loop (SASS): there is room for them;
what there is not is time for anything else, one after the other. So the warps that load go round their loop once for
four steps, for it takes 450 cycles with a step a stage; a turn is of two steps, whose products are on their way while
others are unpacked, between one wait for the copy engine and the next; two warpgroups take turns at the same 64
outputs, so that 8192 outputs are 128 tiles and nothing is shared; and tiles have 8 tokens where there are no more, for
the copy engine takes longer over rows that are not there (16 rows for one token: 3 µs of 18). At 8192 × 8192 loading
alone takes 13.0 µs, and all of it 14.4 (four warpgroups with a step a turn took 19.3, or with a round a stage 15.3).
Programs of half a multiprocessor's registers and memory are for where there are more tiles than multiprocessors: one
goes on while the other ends. With fewer tiles they are dealt out unevenly, for those of the next kernel start where the
last kernel's have ended. On an H100, one token, the best of Marlin and Machete of another day beside it: 8192 × 8192
14.4 µs (17.7), 4096 × 4096 7.0 (9.1), 28672 × 4096 24.0 (29.9), 4096 × 14336 16.0 (23.6), 10240 × 8192 20.3 (22.1).

What bounds many tokens. A packed tile takes the tensor cores 512 cycles by 128 tokens, 1024 by 256; to unpack it takes
each warp some 200 instructions. They slow the products down even beside them: with 128 tokens the tensor cores are busy
70 % of the time, with nothing unpacked 85 to 90 %. With 256 tokens they are so 90 to 94 %, and what bounds is the GPU's
power: 1.38 to 1.5 GHz at 700 W. With half the tokens read from the cache a product of 1024 tokens took 124 mJ in place
of 137; but it takes clusters with multicast, which Triton 3.6 has not. (`linear_tiles.txt`, 3 and 5, has what was
timed.)
"""

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
from octavo.kernels.quant.int4_tiles import MOST_INPUTS, Tiles, choose_tiles, groups_of_step, plane_groups
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    device_properties,
    row_strides,
)

REGISTERS = 80
"""A thread's, on average, where two programs run on a multiprocessor, of 384 threads each."""

# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@gluon.jit(
    do_not_specialize=[
        "M", "k_tiles", "rounds", "last_group", "plane_groups", "tiles", "shared", "shared_rounds", "row_tiles",
        "token_tiles", "width", "early", "stride_scale_group", "stride_minimum_group",
    ]
)
def _int4_hopper_kernel(
    # Few tokens: bound by reading the weights, half a byte each. Many: by the tensor cores.
    packed_desc, x_desc, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, M, N, k_tiles, rounds,
    last_group, plane_groups, tiles, shared, shared_rounds, row_tiles, token_tiles, width, early, stride_scale_group,
    stride_minimum_group, GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr,
    TOKENS: gl.constexpr, SIDES: gl.constexpr, TURNS: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    ACTIVATED: gl.constexpr, REGISTERS: gl.constexpr, CHAINED: gl.constexpr,
):
    shares = (tiles, shared, shared_rounds, rounds, row_tiles, token_tiles, width)
    dtype: gl.constexpr = x_desc.dtype
    TILES: gl.constexpr = SIDES * BLOCKS
    PLACES: gl.constexpr = STAGES * TURNS
    x = gl.allocate_shared_memory(dtype, [PLACES * STEPS, TOKENS, 128], x_desc.layout)
    x_read = x._reinterpret(dtype, [2 * PLACES * STEPS, TOKENS, 64], x_desc.layout)
    tiles_read = gl.allocate_shared_memory(gl.int16, [PLACES * TILES, 32 * STEPS, 64], packed_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    words = tiles_read._reinterpret(gl.int32, [PLACES * SIDES * STEPS, 32 * BLOCKS, 32], pairs)
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
        (compute, (
            0, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
            left, taken, shares, early, M, N, last_group, plane_groups, stride_scale_group, stride_minimum_group,
            GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, STEPS, STAGES, ACTIVATED, CHAINED)),
        (compute, (
            1, out_ptr, scale_ptr, minimum_ptr, bias_ptr, residual_ptr, workspace_ptr, words, x, full, empty, turns,
            left, taken, shares, early, M, N, last_group, plane_groups, stride_scale_group, stride_minimum_group,
            GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, SIDES, TURNS, STEPS, STAGES, ACTIVATED, CHAINED)),
        (load_weights, (
            packed_desc, tiles_read, full, empty, scale_ptr, minimum_ptr, shares, early, N, k_tiles, last_group,
            plane_groups, stride_scale_group, stride_minimum_group, GROUPS, TILES, TOKENS, TURNS, STEPS, STAGES,
            CHAINED)),
        (load_tokens, (x_desc, x_read, full, empty, shares, TOKENS, TURNS, STEPS, STAGES, CHAINED)),
    ], [4, 1, 1], [104 if REGISTERS else 240, 24, 24])
# fmt: on


def takes(x: torch.Tensor, packed: torch.Tensor, properties: DeviceProperties) -> bool:
    """Whether this kernel can do a call: there are tokens, and the copy engine can read them as they lie."""
    return (
        properties.capability[0] == 9
        and torch.version.hip is None
        and not INTERPRET
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.numel() > 0
        and x.shape[-1] <= MOST_INPUTS
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
    early: bool,
    tiles: Tiles | None = None,
) -> None:
    """Launches it; early: the kernel before does not write weights or scales.

    `tiles` in place of those that would be chosen are for measurements.
    """
    (groups, n), k, device = scale.shape, x.shape[-1], x.device
    m, k_tiles = x.numel() // k, packed.shape[1]
    if tiles is None:
        tiles = choose_tiles(m, n, k, group_size, minimum is not None, device_properties(device))
    outputs, rounds = tiles.outputs, cdiv(k_tiles, tiles.turns * tiles.steps)
    row_tiles, token_tiles = cdiv(n, outputs), cdiv(m, tiles.tokens)
    # Never None, or the kernel would be compiled twice.
    parts = 2 * tiles.programs if tiles.shared else 0
    workspace = empty((max(parts * outputs * tiles.tokens, 1),), torch.float32, device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    per_step = groups_of_step(group_size)
    launch(
        _int4_hopper_kernel,
        (tiles.programs,),
        TensorDescriptor(packed, [packed.numel() // 64, 64], [64, 1], [32 * tiles.steps, 64], layout),
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
        0 if minimum is None else minimum.stride(0),
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
        STAGES=tiles.stages,
        ACTIVATED=activation is not None,
        REGISTERS=REGISTERS if tiles.at_once == 2 else 0,
        CHAINED=chains(device),
    )
    if tiles.shared:
        add_parts(out, bias, residual, workspace, m, n, rounds, tiles, activation)


def add_parts(
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    workspace: torch.Tensor,
    m: int,
    n: int,
    rounds: int,
    tiles: Tiles,
    activation: str | None,
) -> None:
    """Launches the kernel that makes results of the parts of shared tiles."""
    launch(
        _int4_parts_kernel,
        (tiles.shared, cdiv(min(m, tiles.tokens) * outputs_of(tiles.outputs, activation), tiles.parts_block)),
        out,
        bias,
        residual,
        workspace,
        m,
        n,
        rounds,
        tiles.shared,
        tiles.programs,
        cdiv(n, tiles.outputs),
        cdiv(m, tiles.tokens),
        tiles.width,
        device=out.device,
        num_warps=4,
        OUTPUTS=tiles.outputs,
        TOKENS=tiles.tokens,
        BLOCK=tiles.parts_block,
        ACTIVATED=activation is not None,
        CHAINED=chains(out.device),
    )
