"""Attention of many queries over a paged KV cache on Hopper (sm_90), in Gluon; elsewhere `paged.py`'s kernel does it.

A persistent program on each multiprocessor: a warp finds tiles of queries (`prefill_tiles.py`), two load by TMA
(`prefill_loads.py`), two warpgroups of 64 rows each compute (`prefill_compute.py`, `prefill_softmax.py`), and of a
float8 cache a third converts what comes (`prefill_convert.py`). Rows are PACK query heads of a KV head by 128 / PACK
tokens, so that the heads share a tile's keys.

Heads of 64 have three warpgroups that compute, of 160 registers each: a step's products take them half the time that
those of heads of 128 do, its exponentials as much. 0.91 of the time that two took for 4 × 4k, 0.87 for 2 × 8k. Of a
float8 cache two compute, since the one that converts has the registers of the third, and of rings, whose bounds would
spill.

Measured on an H100, and not kept (`bench/results/NVIDIA_H100_80GB_HBM3/prefill_tiles.txt`): sums rescaled only once the
next scores are under way (2 to 4 % slower); maxima and sums in two chains a row (the same instructions); two buffers
for the queries (no difference, and twice the code, since a product whose first operand's address varies gave wrong
results); two warps for the keys, and two for the values (no difference); values, or keys too, copied by a warp's lanes,
not by TMA (7 to 17 % slower); three warpgroups (heads of 128 with tiles of 64 keys: 7 to 14 % slower; heads of 96: 2 to
20 %); steps in pairs, which saves 10 % of the instructions (no gain); shares of the tiles fixed beforehand (1.3 times
the mean for the last program of 8 × 2k); half or a quarter of the programs beginning with the last tiles, so that
decode tokens are read beside products (no gain: the two slow each other); barriers that make the warpgroups take turns
(no difference; by products, beside what the softmax has saved since, 2 to 6 % slower with heads of 128, 2 to 3 % faster
with heads of 96; by exponentials 3 to 8 % slower). With heads of 64, beside two warpgroups as they were: three with no
product of their own under way during their softmax, 0.89 to 0.91 of the time; four of them, with tiles of 64 keys, 0.90
and 0.91; two, each with two blocks of rows in turn, 0.95; 256 keys a step, 1.05 to 1.09; three stages, 1.02.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.attention.kv_cache import FLOAT8, scale_stride
from octavo.kernels.attention.prefill_compute import compute
from octavo.kernels.attention.prefill_convert import convert
from octavo.kernels.attention.prefill_loads import load_queries_and_keys, load_values
from octavo.kernels.attention.prefill_tiles import FIELDS, SLOTS, hand_out
from octavo.kernels.gluon_layouts import joined_layout
from octavo.kernels.launch import INTERPRET, empty, launch
from octavo.kernels.tiles import (
    DeviceProperties,
    chains,
    device_properties,
    let_next_start,
    next_power_of_2,
    wait_for_previous,
)

ROWS = 64
"""Of a warpgroup."""
STAGES = 2
"""Of keys, and of values; with three there is no room for the results' way from lane to lane, and no gain; with heads
of 64, where there is room, 1.02 of the time."""
SECTION_BYTES = 16 * 2**20
"""Keys and values that are read at a time; an H100 has 50 MB of L2 cache, each half of it for half of the programs."""


@triton.jit
def _reset_kernel(counter_ptr, CHAINED: tl.constexpr):
    # Bound by its launch.
    wait_for_previous(CHAINED)
    let_next_start(CHAINED)
    tl.store(counter_ptr, 0)


@gluon.jit(do_not_specialize=["T", "B", "num_pages", "table_width", "window", "stride_table_sequence", "slots"])
def _prefill_kernel(
    # Bound by the tensor cores; of a float8 cache, by shared memory as well, which each tile passes through once more.
    # One program a multiprocessor.
    query_desc,
    key_desc,
    value_desc,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    counter_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    k_scale_ptr,
    v_scale_ptr,
    T,
    B,
    num_pages,
    table_width,
    window,
    score_scale,
    cap,
    stride_table_sequence,
    stride_k_scale,
    stride_v_scale,
    slots,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    D: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    ROLLING: gl.constexpr,
    SOFTCAP: gl.constexpr,
    RETURN_LSE: gl.constexpr,
    ROWS: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
    RAW_KEYS: gl.constexpr,
    RAW_VALUES: gl.constexpr,
    SECTION: gl.constexpr,
    JOINED: gl.constexpr,
):
    dtype: gl.constexpr = query_desc.dtype
    PARTS: gl.constexpr = BLOCK_D // 64
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    queries = gl.allocate_shared_memory(dtype, [GROUPS, ROWS, BLOCK_D], tile_layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], tile_layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], tile_layout)
    # The same memory, as the copy engine writes it: 64 numbers of each row together.
    query_boxes = queries._reinterpret(dtype, [GROUPS * PARTS, ROWS // PACK, PACK, 64], query_desc.layout)
    # Keys and values as they come: where the products read them, or, of a float8 cache, where they are converted.
    IN_FLOAT8: gl.constexpr = key_desc.dtype != dtype
    raw_keys = keys
    raw_values = values
    if IN_FLOAT8:
        raw_layout: gl.constexpr = gl.NVMMASharedLayout(min(BLOCK_D, 128), element_bitwidth=8, rank=2)
        raw_keys = gl.allocate_shared_memory(key_desc.dtype, [RAW_KEYS, BLOCK_N, BLOCK_D], raw_layout)
        raw_values = gl.allocate_shared_memory(key_desc.dtype, [RAW_VALUES, BLOCK_N, BLOCK_D], raw_layout)
    COUNT: gl.constexpr = BLOCK_N * BLOCK_D // key_desc.block_type.numel
    key_boxes_shape: gl.constexpr = [RAW_KEYS * COUNT] + key_desc.block_shape  # noqa: RUF005  (no star in a kernel)
    value_boxes_shape: gl.constexpr = [RAW_VALUES * COUNT] + key_desc.block_shape  # noqa: RUF005
    key_boxes = raw_keys._reinterpret(key_desc.dtype, key_boxes_shape, key_desc.layout)
    value_boxes = raw_values._reinterpret(key_desc.dtype, value_boxes_shape, value_desc.layout)
    if JOINED:
        joined: gl.constexpr = joined_layout(BLOCK_N, BLOCK_D)
        keys = keys._reinterpret(dtype, [STAGES, BLOCK_N, BLOCK_D], joined)
        values = values._reinterpret(dtype, [STAGES, BLOCK_N, BLOCK_D], joined)
    entries = gl.allocate_shared_memory(gl.int32, [SLOTS * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], barrier)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    keys_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    values_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    raw_keys_full = keys_full
    raw_values_full = values_full
    raw_keys_read = keys_read
    raw_values_read = values_read
    queries_read = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    cut_off = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    ring_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    ring_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], barrier)
    wanted = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    PARTITIONS: gl.constexpr = 6 if IN_FLOAT8 or GROUPS == 3 else 5
    for i in gl.static_range(GROUPS):
        mbarrier.init(queries_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(values_full.index(i), count=1)
        mbarrier.init(keys_read.index(i), count=GROUPS)
        mbarrier.init(values_read.index(i), count=GROUPS)
    if IN_FLOAT8:
        raw_keys_full = gl.allocate_shared_memory(gl.int64, [RAW_KEYS, 1], barrier)
        raw_values_full = gl.allocate_shared_memory(gl.int64, [RAW_VALUES, 1], barrier)
        raw_keys_read = gl.allocate_shared_memory(gl.int64, [RAW_KEYS, 1], barrier)
        raw_values_read = gl.allocate_shared_memory(gl.int64, [RAW_VALUES, 1], barrier)
        for i in gl.static_range(RAW_KEYS):
            mbarrier.init(raw_keys_full.index(i), count=1)
            mbarrier.init(raw_keys_read.index(i), count=1)
        for i in gl.static_range(RAW_VALUES):
            mbarrier.init(raw_values_full.index(i), count=1)
            mbarrier.init(raw_values_read.index(i), count=1)
    mbarrier.init(queries_read.index(0), count=1)
    mbarrier.init(cut_off.index(0), count=1)
    mbarrier.init(wanted.index(0), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(ring_full.index(i), count=1)
        mbarrier.init(ring_empty.index(i), count=PARTITIONS - 1)  # by all but the warp that fills it
    fence_async_shared()

    # A multiprocessor has 65,536: 128 threads of a warpgroup have so many each, and those of the warps that load. The
    # first partition has as many as the second.
    REGISTERS: gl.constexpr = (
        [216, 40, 40, 40, 40] if IN_FLOAT8 else [160, 32, 32, 32, 160] if GROUPS == 3 else [240, 24, 24, 24]
    )
    # fmt: off
    gl.warp_specialize([
        (compute, (
            0, out_ptr, lse_ptr, sinks_ptr, queries, keys, values, queries_full, keys_full, values_full, keys_read,
            values_read, entries, ring_full, ring_empty, k_scale_ptr, v_scale_ptr, stride_k_scale, stride_v_scale,
            window, score_scale, cap, KV_HEADS, GROUP, PACK, D, CAUSAL, WINDOW, ROLLING, SOFTCAP, RETURN_LSE, ROWS,
            BLOCK_N, BLOCK_D, STAGES, IN_FLOAT8, GROUPS)),
        (compute, (
            1, out_ptr, lse_ptr, sinks_ptr, queries, keys, values, queries_full, keys_full, values_full, keys_read,
            values_read, entries, ring_full, ring_empty, k_scale_ptr, v_scale_ptr, stride_k_scale, stride_v_scale,
            window, score_scale, cap, KV_HEADS, GROUP, PACK, D, CAUSAL, WINDOW, ROLLING, SOFTCAP, RETURN_LSE, ROWS,
            BLOCK_N, BLOCK_D, STAGES, IN_FLOAT8, GROUPS)),
        (hand_out, (
            entries, ring_full, ring_empty, wanted, counter_ptr, cu_seqlens_q_ptr, seq_lens_ptr, T, B, table_width,
            window, slots, KV_HEADS, GROUP, PACK, PAGE_SIZE, CAUSAL, WINDOW, ROLLING, ROWS, BLOCK_N, SECTION,
            GROUPS)),
        (load_queries_and_keys, (
            query_desc, key_desc, query_boxes, key_boxes, queries_full, raw_keys_full, queries_read, raw_keys_read,
            entries, ring_full, ring_empty, wanted, block_table_ptr, num_pages, table_width, stride_table_sequence,
            GROUP, PACK, PAGE_SIZE, BOX, ROLLING, ROWS, BLOCK_N, BLOCK_D, RAW_KEYS, IN_FLOAT8, GROUPS)),
        (load_values, (
            value_desc, value_boxes, values, raw_values_full, raw_values_read, cut_off, entries, ring_full, ring_empty,
            block_table_ptr, num_pages, table_width, stride_table_sequence, GROUP, PAGE_SIZE, BOX, ROLLING, BLOCK_N,
            BLOCK_D, RAW_VALUES, IN_FLOAT8)),
        (convert, (
            raw_keys, raw_values, keys, values, raw_keys_full, raw_values_full, raw_keys_read, raw_values_read,
            keys_full, values_full, queries_read, keys_read, values_read, entries, ring_full, ring_empty, k_scale_ptr,
            stride_k_scale, GROUP, BLOCK_N, STAGES, RAW_KEYS, RAW_VALUES)) if IN_FLOAT8 else
        (compute, (
            2, out_ptr, lse_ptr, sinks_ptr, queries, keys, values, queries_full, keys_full, values_full, keys_read,
            values_read, entries, ring_full, ring_empty, k_scale_ptr, v_scale_ptr, stride_k_scale, stride_v_scale,
            window, score_scale, cap, KV_HEADS, GROUP, PACK, D, CAUSAL, WINDOW, ROLLING, SOFTCAP, RETURN_LSE, ROWS,
            BLOCK_N, BLOCK_D, STAGES, IN_FLOAT8, GROUPS)),
    ][:PARTITIONS], [4, 1, 1, 1, 4][:PARTITIONS - 1], REGISTERS)
    # fmt: on


def _box(page_size: int, block_n: int) -> int:
    """Slots of a page that one copy brings: a power of two that divides it."""
    return min(page_size & -page_size, block_n)


def _for_copies(x: torch.Tensor) -> bool:
    """Whether the copy engine can read `x` as it lies; the stride of a dimension of size 1 is never used."""
    rows = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    fits = all(size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0) for size, stride in rows)
    return x.data_ptr() % 16 == 0 and fits


def _described(x: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """`x` seen with these dimensions, the last one contiguous, for copies of `block`."""
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=block[-1] * x.element_size(), element_bitwidth=8 * x.element_size(), rank=len(block)
    )
    # A dimension of size 1 may have any stride.
    strides = [stride if size > 1 else 16 // x.element_size() for size, stride in zip(shape, strides, strict=True)]
    return TensorDescriptor(x, shape, [*strides[:-1], 1], block, layout)


def _boxes(cache: torch.Tensor, box: int, width: int, joined: bool) -> TensorDescriptor:
    """A cache for copies of `box` slots of a head: `width` numbers of each, or, joined, all that the head has."""
    (pages, slots, heads, head_size), (page, slot, head, _) = cache.shape, cache.stride()
    if not joined:
        return _described(cache, [pages, heads, slots, head_size], [page, head, slot, 1], [1, 1, box, width])
    parts = head_size // width
    # Slots in eights, and a head's parts before the next head's.
    shape, strides = [pages, slots // 8, heads * parts, 8, width], [page, 8 * slot, width, slot, 1]
    return _described(cache, shape, strides, [1, box // 8, parts, 8, width])


def takes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    batch_invariant: bool,
    properties: DeviceProperties,
) -> bool:
    """Whether this kernel can do a call with so many queries that no keys are shared out."""
    return (
        properties.capability[0] == 9
        and torch.version.hip is None
        and not INTERPRET
        and query.dtype in (torch.float16, torch.bfloat16)
        and key_cache.dtype in (query.dtype, *FLOAT8)
        # A product over heads of 256 takes more registers at once than a program of four warpgroups may have.
        and 64 <= query.shape[2] <= (256 if key_cache.dtype == query.dtype else 128)
        and key_cache.shape[1] % 16 == 0
        and min(query.shape[0], key_cache.shape[0]) > 0
        and alibi_slopes is None
        and not batch_invariant
        and scale >= 1e-30  # smaller ones may be 0 in fp32
        and all(map(_for_copies, (query, key_cache, value_cache)))
    )


def prefill(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    sinks: torch.Tensor | None,
    numbers: tuple[int, float, float],
    options: dict[str, Any],
) -> None:
    """Launches it.

    Args:
        tables: block_table, seq_lens and cu_seqlens_q.
        scales: k_scale and v_scale, of a float8 cache.
        numbers: window, score_scale and cap, as `paged.py`'s kernel has them.
        options: that kernel's constexprs for the kind of mask and of output.
    """
    tokens, heads, head_size = query.shape
    pages, page_size, kv_heads, _ = key_cache.shape
    block_table, seq_lens, cu_seqlens_q = tables
    sequences, group = seq_lens.shape[0], heads // kv_heads
    pack = min(group & -group, 16)
    block_d = max(next_power_of_2(head_size), 64)
    block_n = 64 if block_d > 128 else 128
    float8 = key_cache.dtype != query.dtype
    groups = 2 if block_d > 64 or float8 or options["ROLLING"] else 3  # of rows, each a warpgroup's
    box = _box(page_size, block_n)
    width = min(block_d, 128) if float8 else 64
    # Where a page holds a tile of keys, a copy of all of it made 8 × 2k 2 % slower than a copy of each half.
    joined = not float8 and box < block_n and head_size == block_d > 64
    joined = joined and key_cache.stride(2) == value_cache.stride(2) == head_size

    # Σ ceil(query length / tokens of a tile) ≤ T // those + B over the sequences, and one more part for the padding.
    slots = tokens * pack // (groups * ROWS) + sequences + 1
    counter, chained = empty((1,), torch.int32, query.device), chains(query.device)
    launch(_reset_kernel, (1,), counter, device=query.device, num_warps=1, CHAINED=chained)
    launch(
        _prefill_kernel,
        (min(device_properties(query.device).num_sms, slots * heads // pack),),
        _described(query, [*query.shape], [*query.stride()], [ROWS // pack, pack, 64]),
        *(_boxes(cache, box, width, joined) for cache in (key_cache, value_cache)),
        out,
        lse,
        sinks,
        counter,
        block_table,
        seq_lens,
        cu_seqlens_q,
        *scales,
        tokens,
        sequences,
        pages,
        block_table.shape[1],
        *numbers,
        block_table.stride(0),
        *map(scale_stride, scales),
        slots,
        device=query.device,
        num_warps=4,
        **options,
        KV_HEADS=kv_heads,
        GROUP=group,
        PACK=pack,
        D=head_size,
        PAGE_SIZE=page_size,
        BOX=box,
        ROWS=ROWS,
        GROUPS=groups,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        STAGES=STAGES,
        RAW_KEYS=STAGES,
        RAW_VALUES=1 if float8 else STAGES,
        JOINED=joined,
        SECTION=max(SECTION_BYTES // (2 * kv_heads * head_size * key_cache.element_size()), 1),
    )
