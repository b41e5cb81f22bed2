"""The tile choice of `paged_attention`."""

import math
from dataclasses import dataclass

import torch

from octavo.kernels.tiles import DeviceProperties, next_power_of_2


@dataclass(frozen=True)
class Tiles:
    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    workers: int = 0
    """Programs of the decode kernel on a multiprocessor; 0 for the other kernel."""
    least: int = 1
    """Tiles of keys that a worker has at least."""
    heads: int = 1
    """KV heads of a tile."""
    by_warps: bool = False
    """Whether every warp has a head, or keys, of its own."""


def choose_tiles(
    head_size: int,
    kv_heads: int,
    group: int,
    tokens: int,
    max_seqlen_q: int,
    dtype: torch.dtype,
    properties: DeviceProperties,
    quantised: bool = False,
    plain: bool = True,
    batch_invariant: bool = False,
) -> Tiles:
    """Rows (tokens × query heads of a group) and keys of a tile; as many stages as shared memory holds, up to five.

    A decode token has one tile of 16 rows, a longer chunk 64 or 128. What bounds a tile is registers: before Hopper the
    queries live in them too, so the tile has fewer keys, and is smaller yet where they are converted from a quantised
    cache; above head size 128 a row needs twice the warps. Where one tile holds a sequence's queries, the keys are
    shared out to workers, without ALiBi four heads at a time: 1 KB of each token in a plain cache.
    (But one for fp16 queries beside a quantised cache, where int8 needs units of the values' scales: `attend`.)

    Batch-invariant, there is one choice for any batch, between that for decode and that for prefill, and no workers.
    """
    block_d = max(next_power_of_2(head_size), 16)
    rows = 64 if batch_invariant else group * max_seqlen_q
    # Each row has units of its own where the cache is int8 (`attend`), and takes more registers.
    own_units = batch_invariant and quantised and dtype == torch.float16
    if (
        rows <= 16
        and block_d <= 128
        and dtype != torch.float32
        and plain
        and not (quantised and dtype == torch.float16)
    ):
        heads = math.gcd(kv_heads, 4)
        # Of few sequences one program a multiprocessor, since then there are half as many parts to merge; else two, so
        # that one reads while the other begins with a sequence or ends with it. Together they have four tiles in flight
        # (on an H100; an odd number is slower).
        workers = 1 if tokens <= (2 if quantised else 8) else 2
        held = (properties.shared_memory // workers - 1024 - 128 * block_d) // (256 * block_d)
        stages = 5 if workers == 1 and held >= 4 and not quantised else 3 if held >= 2 else 2
        return Tiles(16, 64 // heads, block_d, 4, stages, workers, 2, heads, by_warps=True)
    if dtype == torch.float32:
        # No tensor cores: a thread holds whole rows of both operands.
        block_m, block_n, num_warps = 16, 16, 8
    else:
        hopper = properties.capability >= (9, 0)
        small = quantised and not hopper
        block_m = 16 if rows <= 16 else 64 if rows <= 64 or block_d > 128 or small else 128
        if block_m == 16:
            block_n, num_warps = 64 if block_d <= 128 else 32, 2 if block_d <= 64 else 4
        else:
            block_n = 64 if (block_d <= 64 and not small) or (block_d == 128 and hopper) else 32
            num_warps = 8 if block_m == 128 or block_d > 128 else 4
            if own_units:
                block_m, block_n, num_warps = 16, 32 if block_d <= 128 else 16, 4
            elif batch_invariant and (quantised or not hopper):
                block_n //= 2  # the bounds of what is in sight take registers too
    free = properties.shared_memory - block_m * block_d * dtype.itemsize - 8192
    # Triton keeps one tile fewer than stages, except where wgmma may still be reading the last one.
    wgmma = properties.capability >= (9, 0) and block_m >= 64
    stages = free // (2 * block_n * block_d * dtype.itemsize) + (not wgmma)
    # Before Hopper, the decode kernel has no registers for more rows than 16.
    shared_out = not batch_invariant and rows <= block_m and (block_m == 16 or wgmma)
    workers = (2 if block_m == 16 and dtype != torch.float32 else 1) if shared_out else 0
    if workers == 1 and block_m == 128 and block_d <= 64 and tokens > 32 and not quantised:
        # Many rows of a narrow head, as of Falcon-7B's one KV head: two programs, of which one multiplies while the
        # other is at its softmax. 64 sequences of 2048 take 29.0 µs on an H100, not 32.4, of 8192 85 and not 110; but
        # 16 of 2048, which have more parts to merge then, 17.1 and not 14.6.
        num_warps, stages, workers = 4, min(stages, 3), 2
    return Tiles(block_m, block_n, block_d, num_warps, min(max(stages, 1), 3 if own_units else 4), workers)
