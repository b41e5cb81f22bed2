"""What the launchers of decoding and of its plan must agree on: how many workers there are, and what each holds."""

import torch

from octavo.kernels.attention.attention_tiles import Tiles
from octavo.kernels.attention.schedule import RECORD
from octavo.kernels.tiles import cdiv, device_properties


def share_out(tiles: Tiles, kv_heads: int, group: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """How many workers the keys of a pack of heads are shared out to, and how many packs there are."""
    packs = kv_heads // tiles.heads * cdiv(group, min(group, tiles.block_m))
    workers = max(device_properties(device).num_sms * tiles.workers // packs, 1)
    return (workers if tokens and tiles.workers else 0), packs


def keys_of_group(tiles: Tiles) -> int:
    """How many keys of a tile each of the groups of warps has that share a head."""
    return tiles.block_n // (tiles.num_warps // tiles.heads if tiles.by_warps else 1)


def plan_shape(tiles: Tiles, kv_heads: int, group: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """A record a worker; empty where there are no workers."""
    workers, _ = share_out(tiles, kv_heads, group, tokens, device)
    return (workers, RECORD.value) if workers else (0, 0)


def check_plan_shape(plan: torch.Tensor, expected: tuple[int, int]) -> None:
    """Raises ValueError unless `plan` has the shape that `plan_attention` gives it for this call."""
    if plan.shape != expected:
        raise ValueError(
            f"plan: shape {tuple(plan.shape)}; expected {expected}: make it with octavo.plan_attention from the query, "
            "the caches and the options of this call"
        )


def registers_of(tiles: Tiles) -> int:
    """How many registers a thread of the decode kernel has.

    ptxas is told, because left to itself it spills a few of these kernels' to save many, though more than `workers`
    programs never meet.
    """
    return min(65536 // (32 * tiles.num_warps * tiles.workers), 255)
