"""The int4 linear layer on Hopper (sm_90), in Gluon; elsewhere, and in fp32, `int4.py`'s kernel does it.

A program on each multiprocessor: a warp loads packed weights and tokens by TMA (`int4_loads.py`), two warpgroups
compute (`int4_compute.py`). What a program computes is told by `int4_shares.py`. For few tokens the time is that of
reading the weights, of which as many steps as shared memory holds are on their way.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.launch import INTERPRET, empty, launch
from octavo.kernels.quant.int4_compute import compute
from octavo.kernels.quant.int4_loads import fetch, load
from octavo.kernels.tiles import (
    DeviceProperties,
    cdiv,
    chains,
    device_properties,
    let_next_start,
    next_power_of_2,
    row_strides,
    wait_for_previous,
)

TILE_BYTES = 4096
"""Of a packed tile: 64 outputs by 128 inputs."""
OTHER_BYTES = 6144
"""Of shared memory: barriers, and the results' way from lane to lane."""


# Lists of arguments, one a line, would be longer than the code between them.
# fmt: off


@triton.jit(do_not_specialize=["count"])
def _zero_kernel(counters_ptr, count, BLOCK: tl.constexpr, CHAINED: tl.constexpr):
    # Bound by its launch. The kernel that counts may start, and read weights, while this one waits.
    let_next_start(CHAINED)
    wait_for_previous(CHAINED)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(counters_ptr + i, 0, mask=i < count)


@gluon.jit(
    do_not_specialize=[
        "M", "k_tiles", "last_group", "group_planes", "tiles", "shared", "row_tiles", "token_tiles", "width",
        "stride_scale_group", "stride_minimum_group",
    ]
)
def _int4_hopper_kernel(
    # Few tokens: bound by reading the weights, half a byte each. Many: by the tensor cores.
    packed_desc, x_desc, out_ptr, scale_ptr, minimum_ptr, bias_ptr, workspace_ptr, counters_ptr, M, N, k_tiles,
    last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group, stride_minimum_group,
    GROUPS: gl.constexpr, EVEN: gl.constexpr, SCALE_SUMS: gl.constexpr, BLOCKS: gl.constexpr, TOKENS: gl.constexpr,
    STAGES: gl.constexpr, CHAINED: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, 128], x_desc.layout)
    x_read = x._reinterpret(dtype, [2 * STAGES, TOKENS, 64], x_desc.layout)
    tiles_read = gl.allocate_shared_memory(gl.int16, [2 * STAGES * BLOCKS, 32, 64], packed_desc.layout)
    pairs: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    words = tiles_read._reinterpret(gl.int32, [2 * STAGES, 32 * BLOCKS, 32], pairs)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (compute, (
            0, out_ptr, scale_ptr, minimum_ptr, bias_ptr, workspace_ptr, counters_ptr, words, x, full, empty, M, N,
            k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
            stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, STAGES)),
        (compute, (
            1, out_ptr, scale_ptr, minimum_ptr, bias_ptr, workspace_ptr, counters_ptr, words, x, full, empty, M, N,
            k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width, stride_scale_group,
            stride_minimum_group, GROUPS, EVEN, SCALE_SUMS, BLOCKS, TOKENS, STAGES)),
        (load, (
            packed_desc, x_desc, tiles_read, x_read, full, empty, k_tiles, tiles, shared, row_tiles, token_tiles,
            width, BLOCKS, TOKENS, STAGES, CHAINED)),
        (fetch, (
            scale_ptr, minimum_ptr, N, k_tiles, last_group, group_planes, tiles, shared, row_tiles, token_tiles, width,
            stride_scale_group, stride_minimum_group, GROUPS, BLOCKS)),
    ], [4, 1, 1], [240, 24, 24])
# fmt: on


@dataclass(frozen=True)
class Tiles:
    """How the product is cut, and which programs have what part of it."""

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
    """Tiles of tokens side by side."""


def groups_of_step(group_size: int) -> int:
    """How many groups the kernel looks up for 128 inputs: those of other sizes for each plane of 32 inputs."""
    return 1 if group_size % 128 == 0 else 2 if group_size == 64 else 4


def _time(tiles: int, blocks: int, k: int, shared: bool, num_sms: int) -> float:
    """Microseconds of so many tiles of 128 tokens, by what an H100 takes; adding up shared ones takes 15 a block."""
    one = (0.0065, 0.0118)[blocks - 1] * k
    return 1.05 * tiles / num_sms * one + 15 * blocks if shared else cdiv(tiles, num_sms) * one


def choose_tiles(m: int, n: int, k: int, group_size: int, with_minimum: bool, properties: DeviceProperties) -> Tiles:
    """Tiles as wide as the tokens. Few tokens: shared, unless whole ones keep 96 % of the multiprocessors busy.

    Measured on an H100 (`bench/results/NVIDIA_H100_80GB_HBM3/linear_tiles.txt`): with one block up to 16 tokens take 20
    µs at 8192 × 8192, and 23 where 16 stages are set up, not 8; two blocks are faster where there are more than 10⁸
    weights. Many tokens have the tiles that `_time` says are fastest, which is within 4 % of what 22 cuts took.
    """
    tokens, sms = next(size for size in (16, 32, 64, 128) if m <= size or size == 128), properties.num_sms
    # Choices change at powers of two alone, so that a warm-up meets all of them.
    number = {blocks: cdiv(n, 128 * blocks) * cdiv(next_power_of_2(m), tokens) for blocks in (1, 2)}
    if tokens <= 64:
        blocks = 2 if n * k > 10**8 else 1
        sharing = number[blocks] < 0.96 * cdiv(number[blocks], sms) * sms
    else:
        possible = (1,) if groups_of_step(group_size) == 4 else (1, 2)  # registers
        blocks, sharing = min(
            ((blocks, shared) for blocks in possible for shared in (False, True)),
            key=lambda cut: _time(number[cut[0]], cut[0], k, cut[1], sms),
        )
    most = 8 if blocks == 1 and tokens <= 32 else 11
    stages = min((properties.shared_memory - OTHER_BYTES) // (2 * blocks * TILE_BYTES + tokens * 256), most)
    scale_sums = not with_minimum and group_size % 128 == 0 and tokens <= 64
    token_tiles = cdiv(m, tokens)
    tiles = cdiv(n, 128 * blocks) * token_tiles
    programs, shared = min(sms, tiles), 0
    if sharing:
        programs = min(sms, max(tiles, tiles * cdiv(k, 128) // 2))
        shared = tiles % programs + (programs if tiles > programs else 0)
    return Tiles(blocks, tokens, stages, scale_sums, programs, shared, min(token_tiles, 16))


def takes(x: torch.Tensor, packed: torch.Tensor, properties: DeviceProperties) -> bool:
    """Whether this kernel can do a call: there are tokens, and the copy engine can read them as they lie."""
    return (
        properties.capability[0] == 9
        and torch.version.hip is None
        and not INTERPRET
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.numel() > 0
        and x.data_ptr() % 16 == packed.data_ptr() % 16 == 0
        and _token_stride(x) is not None
    )


def _token_stride(x: torch.Tensor) -> int | None:
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
    tiles: Tiles | None = None,
) -> None:
    """Launches it; `tiles` in place of those that would be chosen are for measurements."""
    (groups, n), k, device = scale.shape, x.shape[-1], x.device
    m, k_tiles = x.numel() // k, packed.shape[1]
    if tiles is None:
        tiles = choose_tiles(m, n, k, group_size, minimum is not None, device_properties(device))
    row_tiles, token_tiles = cdiv(n, 128 * tiles.blocks), cdiv(m, tiles.tokens)
    chained = chains(device)
    # Never None, or the kernel would be compiled twice.
    parts = 2 * tiles.programs if tiles.shared else 0
    workspace = empty((max(parts * 128 * tiles.blocks * tiles.tokens, 1),), torch.float32, device)
    counters = empty((max(2 * tiles.shared, 1),), torch.int32, device)
    if tiles.shared:
        launch(_zero_kernel, (1,), counters, 2 * tiles.shared, device=device, num_warps=1, BLOCK=128, CHAINED=chained)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    per_step = groups_of_step(group_size)
    launch(
        _int4_hopper_kernel,
        (tiles.programs,),
        TensorDescriptor(packed, [packed.numel() // 64, 64], [64, 1], [32, 64], layout),
        TensorDescriptor(x, [m, k], [_token_stride(x), 1], [tiles.tokens, 64], layout),
        out,
        scale,
        minimum,
        bias,
        workspace,
        counters,
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
        STAGES=tiles.stages,
        CHAINED=chained,
    )
