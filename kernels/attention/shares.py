"""What the launchers of decoding and of its plan must agree on: how many workers there are, and what each holds."""

import torch

from octavo.kernels.attention.attention_tiles import Tiles
from octavo.kernels.attention.schedule import RECORD
from octavo.kernels.tiles import cdiv, device_properties, next_power_of_2


def share_out(tiles: Tiles, kv_heads: int, group: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """How many workers the keys of a pack of heads are shared out to, and how many packs there are."""
    packs = kv_heads // tiles.heads * cdiv(group, min(group, tiles.block_m))
    workers = max(device_properties(device).num_sms * tiles.workers // packs, 1)
    return (workers if tokens and tiles.workers else 0), packs


def keys_of_group(tiles: Tiles) -> int:
    """How many keys of a tile each of the groups of warps has that share a head."""
    return tiles.block_n // (tiles.num_warps // tiles.heads if tiles.by_warps else 1)


def plan_shape(
    tiles: Tiles, kv_heads: int, group: int, tokens: int, quantised: bool, device: torch.device
) -> tuple[int, int]:
    """A row a worker: its record, and a counter a pack; empty where there are no workers.

    So it is where a tile has 64 rows of a quantised cache: to merge them as well, there are not enough registers.
    """
    workers, packs = share_out(tiles, kv_heads, group, tokens, device)
    if not workers or (quantised and tiles.block_m > 16):
        return 0, 0
    return workers, RECORD.value + packs


def check_plan_shape(plan: torch.Tensor, expected: tuple[int, int]) -> None:
    """Raises ValueError unless `plan` has the shape that `plan_attention` gives it for this call."""
    if plan.shape != expected:
        raise ValueError(
            f"plan: shape {tuple(plan.shape)}; expected {expected}: make it with octavo.plan_attention from the query, "
            "the caches and the options of this call"
        )


def merge_step(tiles: Tiles, pack: int) -> tuple[int, int]:
    """How many rows of how many parts a worker that merges an item holds at once.

    16 KB of them: the rows of one token, if there is room for 8 parts of each.
    """
    held = 4096 // tiles.block_d
    rows = min(next_power_of_2(tiles.heads * pack), held // 8)
    return rows, held // rows


def registers_of(tiles: Tiles, planned: bool, device: torch.device) -> int:
    """How many registers a thread of the decode kernel has, where ptxas is to be told; else 0.

    Left to itself, it spills a few of these kernels' to save many, though more than `workers` programs never meet.
    """
    hopper = device_properties(device).capability >= (9, 0)
    told = (planned and (hopper or tiles.block_d <= 64)) or (not hopper and tiles.block_d > 128)
    return min(65536 // (32 * tiles.num_warps * tiles.workers), 255) if told else 0
