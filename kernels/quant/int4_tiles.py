"""How the product of `int4_hopper.py` is cut into tiles, and which of its tiles programs share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from octavo.kernels.tiles import DeviceProperties, cdiv, next_power_of_2

TILE_BYTES = 4096
"""Of a packed tile: 64 outputs by 128 inputs."""
OTHER_BYTES = 2048
"""Of shared memory, for barriers, and as much for each warpgroup that writes results: their way from lane to lane."""


class Warpgroups(NamedTuple):
    """How the two of a program that compute divide a tile among them."""

    sides: int
    """With outputs of their own, side by side."""
    turns: int
    """That take turns at the same outputs."""
    blocks: int
    """Each has 64 times as many outputs."""
    steps: int = 1
    """Of 128 inputs, in a turn."""
    at_once: int = 1
    """Programs that a multiprocessor has room for."""


@dataclass(frozen=True)
class Tiles:
    """How the product is cut, and which programs have what part of it."""

    sides: int
    turns: int
    blocks: int
    steps: int
    at_once: int
    """All as in `Warpgroups`."""
    tokens: int
    stages: int
    """Each a round: the steps of every turn."""
    scale_sums: bool
    """Whether sums are scaled, instead of weights."""
    programs: int
    shared: int
    """Tiles that programs share; the others are computed whole."""
    width: int
    """Tiles of tokens side by side: with 4, what runs at a time reads least (4096 tokens: 772 µs, with 16 777)."""

    @property
    def warpgroups(self) -> Warpgroups:
        return Warpgroups(self.sides, self.turns, self.blocks, self.steps, self.at_once)

    @property
    def outputs(self) -> int:
        return 64 * self.sides * self.blocks

    @property
    def parts_block(self) -> int:
        """Results that a program of the second kernel adds up."""
        return 512 if self.tokens <= 32 else 2048


Cut = tuple[Warpgroups, int, bool]
"""What `cut` takes from `warpgroups` to `sharing`."""
Cuts = dict[int, dict[Warpgroups, float]]


def groups_of_step(group_size: int) -> int:
    """How many groups the kernel looks up for 128 inputs: those of other sizes for each plane of 32 inputs."""
    return 1 if group_size % 128 == 0 else 2 if group_size == 64 else 4


MOST_INPUTS = 2**20


def plane_groups(group_size: int) -> int:
    """What a number of 32 inputs times 2**-30 is the number of their group with: exact up to `MOST_INPUTS`."""
    return cdiv(2**30, max(group_size // 32, 1))


ONE, TWO = Warpgroups(1, 2, 1, steps=2), Warpgroups(1, 2, 1, steps=2, at_once=2)
"""For few tokens: a program on each multiprocessor, or two."""
TWO_OF_FEW_REGISTERS = Warpgroups(1, 2, 1, at_once=2)
CUTS: Cuts = {
    8: {ONE: 0.135, TWO: 0.135, TWO_OF_FEW_REGISTERS: 0.15},
    16: {ONE: 0.135, TWO: 0.135, TWO_OF_FEW_REGISTERS: 0.15},
    32: {ONE: 0.17, TWO_OF_FEW_REGISTERS: 0.2},
    64: {Warpgroups(1, 2, 1): 0.27, Warpgroups(2, 1, 1): 0.26, Warpgroups(2, 1, 2): 0.245},
    128: {Warpgroups(2, 1, 1): 0.4, Warpgroups(2, 1, 2): 0.38},
    256: {Warpgroups(2, 1, 1): 0.71},
}
"""By tokens, and the microseconds that a packed tile takes a multiprocessor, but for its way from memory (measured, but
for 32 tokens)."""
STAGE_BYTES = 150 * 1024
"""Of stages, up to 64 tokens: of more, or of more steps than `cut_into` wants, a program's first tokens come late."""
MEMORY_BYTES_A_US, CACHE_BYTES_A_US = 3.25e6, 7.4e6
"""What comes from memory, which is the weights, and from the cache, with the tokens that each program reads again."""
END_US = 0.5
"""What a tile takes behind its steps, where a program takes turns at them and no other goes on beside it."""
PARTS_US, PART_BYTES_A_US = 4.2, 2.2e6
"""What adding up the parts of shared tiles takes, and how fast they are written and read."""


def share_tiles(
    tiles: int, k: int, warpgroups: Warpgroups, sharing: bool, properties: DeviceProperties
) -> tuple[int, int]:
    """How many programs there are, each of a round and two steps at least, and how many tiles they share."""
    most = properties.num_sms * warpgroups.at_once
    if not sharing:
        return min(most, tiles), 0
    programs = min(most, max(tiles, tiles * cdiv(k, 128) // max(warpgroups.turns * warpgroups.steps, 2)))
    return programs, tiles % programs + (programs if tiles > programs else 0)


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
    step_bytes = warpgroups.sides * warpgroups.blocks * TILE_BYTES + tokens * 256
    if stages is None and tokens > 64:
        stages = 5
    return cut_into(step_bytes, m, n, k, warpgroups, tokens, sharing, properties, scale_sums, stages)


def cut_into(
    step_bytes: int,
    m: int,
    n: int,
    k: int,
    warpgroups: Warpgroups,
    tokens: int,
    sharing: bool,
    properties: DeviceProperties,
    scale_sums: bool,
    stages: int | None,
    stage_bytes: int = STAGE_BYTES,
) -> Tiles:
    """The same, of steps of so many bytes; None: as many stages as `stage_bytes` have room for, up to 8 steps."""
    sides, turns, blocks, steps, at_once = warpgroups
    token_tiles = cdiv(m, tokens)
    programs, shared = share_tiles(cdiv(n, 64 * sides * blocks) * token_tiles, k, warpgroups, sharing, properties)
    room = properties.shared_memory // at_once - (sides + 1) * OTHER_BYTES - (turns - 1) * sides * blocks * tokens * 256
    round_bytes = turns * steps * step_bytes
    if stages is None:
        wanted = 6 if shared else 8 if turns == 1 else 12
        stages = max(min(stage_bytes // round_bytes, wanted // (turns * steps)), 2)
    stages = min(room // round_bytes, stages)
    return Tiles(*warpgroups, tokens, stages, scale_sums, programs, shared, min(token_tiles, 4))


def time_of(tiles: Tiles, m: int, n: int, k: int, cuts: Cuts, tile_bytes: int, properties: DeviceProperties) -> float:
    """Microseconds that tiles take, but for what all of them do."""
    k_tiles, step_tiles = cdiv(k, 128), tiles.sides * tiles.blocks
    count = cdiv(n, tiles.outputs) * cdiv(m, tiles.tokens)

    own = step_tiles * cuts[tiles.tokens][tiles.warpgroups]
    weights = step_tiles * 1.03 * tile_bytes  # and scales
    from_cache = weights + min(m, tiles.tokens) * 256

    def of_steps(steps: float, programs: int) -> float:
        memory = weights * programs / MEMORY_BYTES_A_US if tiles.tokens <= 64 else 0  # else it is read several times
        return steps * max(own * cdiv(programs, properties.num_sms), memory, from_cache * programs / CACHE_BYTES_A_US)

    if tiles.shared:
        parts = tiles.programs + (tiles.shared if tiles.programs % tiles.shared else 0)
        parts *= tiles.outputs * min(m, tiles.tokens) * 4
        return of_steps(count * k_tiles / tiles.programs, tiles.programs) + PARTS_US + parts / PART_BYTES_A_US
    waves, rest = divmod(count, tiles.programs)
    ends = (waves + (rest > 0) - 1) * END_US if tiles.turns > tiles.at_once else 0.0
    return of_steps(waves * k_tiles, tiles.programs) + of_steps(k_tiles if rest else 0, rest) + ends


def fastest_of(
    possible: list[tuple[Warpgroups, int]],
    m: int,
    n: int,
    properties: DeviceProperties,
    time: Callable[[Cut], float],
) -> Cut:
    """Of warpgroups and tokens that are possible, shared tiles or whole ones, the fastest by `time`."""

    def tiles(groups: Warpgroups, tokens: int) -> int:
        return cdiv(n, 64 * groups.sides * groups.blocks) * cdiv(m, tokens)

    def may_be_whole(groups: Warpgroups, tokens: int) -> bool:
        # Two programs a multiprocessor are not dealt out evenly where there are fewer than multiprocessors.
        return groups.at_once == 1 or tiles(groups, tokens) > properties.num_sms

    def may_share(groups: Warpgroups, tokens: int) -> bool:
        # Of many tiles a part is all that the last wave wastes (8192 × 8192, 4096 tokens: 898 µs shared, 785 whole).
        taking_turns = groups.turns > 1 and groups.at_once == 1
        return not taking_turns and tiles(groups, tokens) <= 5 * properties.num_sms

    whole = [(*of, False) for of in possible if may_be_whole(*of)]
    return min(whole + [(*of, True) for of in possible if may_share(*of)], key=time)


@cache
def _fastest(m: int, n: int, k: int, per_step: int, scale_sums: bool, properties: DeviceProperties) -> Cut:
    """The fastest by `time_of`, for m a power of two."""
    widths = [min(max(m, 8), 128)] + [256] * (m > 128 and per_step == 1)
    possible = [(groups, tokens) for tokens in widths for groups in CUTS[tokens]]
    # Scales of several groups a step take registers.
    too_many = {
        1: [],
        2: [(Warpgroups(2, 1, 2), 128)],
        4: [(Warpgroups(2, 1, 2), 128), (TWO, 8), (TWO, 16), (TWO_OF_FEW_REGISTERS, 32)],
    }[per_step]
    possible = [of for of in possible if of not in too_many]

    def time(choice: Cut) -> float:
        return time_of(cut(m, n, k, *choice, properties, scale_sums), m, n, k, CUTS, TILE_BYTES, properties)

    return fastest_of(possible, m, n, properties, time)


def choose_tiles(m: int, n: int, k: int, group_size: int, with_minimum: bool, properties: DeviceProperties) -> Tiles:
    """Tiles as wide as the tokens, and of those the ones that `time_of` says are fastest.

    Choices change at powers of two tokens alone, so that a warm-up meets all of them.
    """
    scale_sums = not with_minimum and group_size % 128 == 0 and m <= 64
    choice = _fastest(next_power_of_2(m), n, k, groups_of_step(group_size), scale_sums, properties)
    return cut(m, n, k, *choice, properties, scale_sums)
