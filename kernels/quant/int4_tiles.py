"""How the product of `int4_hopper.py` is cut into tiles, and which of its tiles programs share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from octavo.kernels.tiles import DeviceProperties, cdiv, next_power_of_2

TILE_BYTES = 4096
"""Of a packed tile: 64 outputs by 128 inputs."""
OTHER_BYTES = 2048
"""Of shared memory, for barriers, and as much for each warpgroup that writes results: their way from lane to lane."""


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
    stage_bytes = warpgroups[0] * warpgroups[2] * TILE_BYTES + tokens * 256
    if stages is None and tokens > 64:
        stages = 5
    return cut_into(stage_bytes, m, n, k, warpgroups, tokens, sharing, properties, scale_sums, stages)


def cut_into(
    stage_bytes: int,
    m: int,
    n: int,
    k: int,
    warpgroups: tuple[int, int, int],
    tokens: int,
    sharing: bool,
    properties: DeviceProperties,
    scale_sums: bool,
    stages: int | None,
) -> Tiles:
    """The same, of stages of so many bytes; None: as many as `STAGE_BYTES` has room for, up to 8."""
    sides, turns, blocks = warpgroups
    token_tiles = cdiv(m, tokens)
    programs, shared = share_tiles(cdiv(n, 64 * sides * blocks) * token_tiles, k, sharing, properties)
    room = properties.shared_memory - (sides + 1) * OTHER_BYTES - (turns - 1) * sides * blocks * tokens * 256
    wanted = min(STAGE_BYTES // stage_bytes, 8) if stages is None else stages
    stages = min(room // stage_bytes, wanted) // turns * turns
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


def fastest_of(
    possible: list[tuple[tuple[int, int, int], int]],
    m: int,
    n: int,
    properties: DeviceProperties,
    time: Callable[[Cut], float],
) -> Cut:
    """Of warpgroups and tokens that are possible, shared tiles or whole ones, the fastest by `time`."""

    def may_share(groups: tuple[int, int, int], tokens: int) -> bool:
        # Shares of tiles of four blocks, which are few steps, end unevenly (4096 × 14336: 19.4 µs, two by two 17.4). Of
        # many tiles a part is all that the last wave wastes (8192 × 8192, 4096 tokens: 898 µs shared, 785 whole).
        tiles = cdiv(n, 64 * groups[0] * groups[2]) * cdiv(m, tokens)
        return groups != (4, 1, 1) and tiles <= 5 * properties.num_sms

    return min([(*of, False) for of in possible] + [(*of, True) for of in possible if may_share(*of)], key=time)


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

    return fastest_of(possible, m, n, properties, time)


def choose_tiles(m: int, n: int, k: int, group_size: int, with_minimum: bool, properties: DeviceProperties) -> Tiles:
    """Tiles as wide as the tokens, and of those the ones that `time_of` says are fastest.

    Choices change at powers of two tokens alone, so that a warm-up meets all of them.
    """
    scale_sums = not with_minimum and group_size % 128 == 0 and m <= 64
    choice = _fastest(next_power_of_2(m), n, k, groups_of_step(group_size), scale_sums, properties)
    return cut(m, n, k, *choice, properties, scale_sums)
