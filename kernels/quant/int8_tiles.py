"""How the product of `int8_hopper.py` is cut into tiles: as int4's (`int4_tiles.py`), of weights twice as large."""

from functools import cache

from octavo.kernels.quant.int4_tiles import (
    ONE,
    TWO,
    TWO_OF_FEW_REGISTERS,
    Cut,
    Cuts,
    Tiles,
    Warpgroups,
    cut_into,
    fastest_of,
    groups_of_step,
    time_of,
)
from octavo.kernels.tiles import DeviceProperties, next_power_of_2

TILE_BYTES = 8192
"""Of 64 outputs by 128 inputs."""


def scales_of_step(k: int, group_size: int) -> int:
    """GROUPS of the kernel: how many scales it looks up for 128 inputs; 0 where an output has one."""
    return 0 if group_size == k else groups_of_step(group_size)


def inputs_of_stage(tokens: int) -> int:
    return 128 if tokens <= 64 else 64


CUTS: Cuts = {
    8: {ONE: 0.26, TWO: 0.26, TWO_OF_FEW_REGISTERS: 0.28},
    16: {ONE: 0.26, TWO: 0.26, TWO_OF_FEW_REGISTERS: 0.28},
    32: {ONE: 0.28, TWO_OF_FEW_REGISTERS: 0.28},
    64: {Warpgroups(1, 2, 1): 0.3, Warpgroups(2, 1, 1): 0.28, Warpgroups(2, 1, 2): 0.26},
    128: {Warpgroups(2, 1, 1): 0.4, Warpgroups(2, 1, 2): 0.38},
    256: {Warpgroups(2, 1, 1): 0.71},
}
"""As int4's, of a tile of 64 outputs by 128 inputs. Up to 64 tokens its 8 KiB take longer to come: 0.33 µs."""


STAGE_BYTES = 200 * 1024
"""int4's are 150 KiB, with which 32 tokens by 8192² took 27.0 µs for 20.7, and 64 took 25.0 for 22.5."""


def cut(
    m: int,
    n: int,
    k: int,
    warpgroups: Warpgroups,
    tokens: int,
    sharing: bool,
    properties: DeviceProperties,
    scale_sums: bool,
    stages: int | None = None,
) -> Tiles:
    """Tiles of so many `sides`, `turns` and `blocks`, and of so many tokens; fewer stages where memory is short."""
    step_bytes = (warpgroups.sides * warpgroups.blocks * 64 + tokens * 2) * inputs_of_stage(tokens)
    if stages is None and tokens > 64:
        stages = 10
    return cut_into(step_bytes, m, n, k, warpgroups, tokens, sharing, properties, scale_sums, stages, STAGE_BYTES)


@cache
def _fastest(m: int, n: int, k: int, per_step: int, scale_sums: bool, properties: DeviceProperties) -> Cut:
    """The fastest by `time_of`, for m a power of two."""
    widths = [min(max(m, 8), 128)] + [256] * (m > 128 and per_step <= 1)
    possible = [(groups, tokens) for tokens in widths for groups in CUTS[tokens]]
    # Scales of several groups a step take registers.
    too_many = [(Warpgroups(2, 1, 2), 128), (TWO, 8), (TWO, 16)] if per_step > 1 else []
    possible = [of for of in possible if of not in too_many]

    def time(choice: Cut) -> float:
        return time_of(cut(m, n, k, *choice, properties, scale_sums), m, n, k, CUTS, TILE_BYTES, properties)

    return fastest_of(possible, m, n, properties, time)


def choose_tiles(m: int, n: int, k: int, group_size: int, properties: DeviceProperties) -> Tiles:
    """Tiles as wide as the tokens, and of those the ones that `time_of` says are fastest.

    Choices change at powers of two tokens alone, so that a warm-up meets all of them.
    """
    scale_sums = group_size != k and group_size % 128 == 0 and m <= 64
    choice = _fastest(next_power_of_2(m), n, k, scales_of_step(k, group_size), scale_sums, properties)
    return cut(m, n, k, *choice, properties, scale_sums)
