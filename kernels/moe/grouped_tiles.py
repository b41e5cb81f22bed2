"""The tiles of a product by experts, and which kernel computes them."""

from dataclasses import dataclass

import torch

from octavo.kernels.tiles import DeviceProperties, cdiv, next_power_of_2

COPIED_BYTES = 128
"""Of a row that one copy brings on Hopper: the copy engine's widest swizzle. A step is one or some."""
MOST_FEW, MOST_TALL = 32, 400
"""Rows that an expert has on average, up to which reading weights is all that takes time, and up to which tall tiles
are faster than those of 128 rows by 256 outputs. On an H100, 8 experts of 4096 → 14336, tall and others: with 1024
tokens 1284 and 1860 µs, fp8 828 and 910; with 4096 tokens 5073 and 4638, fp8 3147 and 2641 (hot, in turns)."""
TAILS = {64: 32, 128: 64, 256: 32}
"""Of tall tiles, by their rows: rows that the last may have more."""
_OTHER_BYTES = 2048
"""Of shared memory: barriers, and what the GPU keeps for itself."""


@dataclass(frozen=True)
class Scales:
    """Of quantised operands; those of 16 bits have none."""

    x: torch.Tensor | None = None
    """`[S, 1]`: one a row; or `[S, K / 128]`."""
    weight: torch.Tensor | None = None
    """`[E, outputs]` (gate's, then up's), or `[E]`; beside `[S, K / 128]` those of blocks of 128 outputs and inputs,
    `[E, outputs / 128, K / 128]`. Of weights alone those of groups of inputs, `[E, groups, outputs]`."""
    minimum: torch.Tensor | None = None
    """Of groups of int4 weights, as their scales."""

    @property
    def blocks(self) -> int:
        """How many blocks of 128 inputs have scales of their own; 0 where scales are of whole rows."""
        return self.weight.shape[2] if self.weight is not None and self.weight.dim() == 3 else 0

    @property
    def strides(self) -> tuple[int, int]:
        """From one expert's to the next's, and from one output's to the next's."""
        if self.weight is None:
            return 0, 0
        return (1, 0) if self.weight.dim() == 1 else (self.weight.stride(0), self.weight.stride(1))


@dataclass(frozen=True)
class Tiles:
    """Rows of x and outputs of a tile, inputs of a step, and the schedule of programs."""

    kernel: str
    """"few", "tall", "many" (`octavo.kernels.moe.grouped_few`, `grouped_tall`, `grouped_hopper`) or "triton"
    (`grouped`); of weights alone "int4", "int4_tall", "int8" (`grouped_int4`, `grouped_int4_tall`, `grouped_int8`), or
    "int4_plain" and "int8_plain" (`grouped_int4_plain`, ...)."""
    rows: int
    outputs: int
    """With SiLU and gate those of gate and of up together."""
    block_k: int
    num_warps: int
    stages: int
    programs_per_sm: int
    parts: int = 1
    """Programs that a tile's inputs are dealt out to; none is without a step."""
    tail: int = 0
    """Rows that an expert's last tile may have beyond `rows`."""
    box: int = 0
    """Rows that one copy brings, of which there are no more than a tile's rows take; 0: all at once."""
    tails: int = 1
    """Parts of a tall tile's tail, of which those behind an expert's last row are not multiplied."""

    def parts_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of results that are added up afterwards: where there are few, they are not rounded before."""
        return torch.float32 if self.kernel in ("few", "int4", "int8") or self.parts > 1 else dtype


def _mean(rows: int, experts: int) -> float:
    """Rows of an expert on average, if each that can have rows has some."""
    return rows / max(min(experts, rows), 1)


def rows_of(rows: int, experts: int, *, copied: bool, most: int = 128) -> int:
    """Rows of a tile, for that many rows of which nobody knows yet how they are spread over the experts.

    Half as many again as an expert has on average: then most experts have one tile, and their weights are read once.
    """
    mean = _mean(rows, experts)
    few = max(next_power_of_2(int(1.5 * mean)), 16)
    if not copied:
        few = min(few, 64) if mean <= 64 else 128
    return min(few, most)


def rows_of_tall(rows: int, experts: int, *, packed: bool = False) -> int:
    """Rows of a tall tile, of which an expert's last has room for some more; 0 where others are faster.

    packed: int4, which is unpacked for each tile.
    """
    mean = _mean(rows, experts)
    if mean <= MOST_FEW or (mean > MOST_TALL and not packed):
        return 0
    return 64 if mean <= 80 and not packed else 128 if mean <= 160 else 256


def rows_of_plain(rows: int, experts: int, *, copied: bool, blocks: bool = False) -> int:
    """Rows of a tile of weights that are multiplied as they are; blocks: with scales of blocks of inputs."""
    if copied and _mean(rows, experts) > MOST_FEW:
        return 128 if blocks else rows_of_tall(rows, experts) or 128
    return rows_of(rows, experts, copied=copied, most=32 if blocks else 128)


def _parts(tiles: int, inputs: int, slots: int, bytes_of_tile: int, block_k: int) -> int:
    """Programs a tile, so that as few multiprocessors as possible have nothing to do in the end.

    A part has 256 KB to read, at least. Parts are written and read once more: each one more has to save 2 %.
    """
    most = max(min(bytes_of_tile // 2**18, inputs // 256, 8), 1)

    def cost(parts: int) -> float:
        waves = tiles * parts / slots
        return cdiv(int(waves * 1000), 1000) / waves * (1 + 0.02 * parts)

    parts = min(range(1, most + 1), key=cost)
    steps = cdiv(inputs, block_k)
    return cdiv(steps, cdiv(steps, parts))


def _idle(tiles: int, properties: DeviceProperties) -> float:
    """How much longer tiles take than if they could be dealt out evenly, where that is a tenth or more.

    One multiprocessor alone reads a ninetieth of what all read, no more, so that the last tiles take as long as others.
    """
    waves = tiles / properties.num_sms
    longer = cdiv(tiles, properties.num_sms) / waves
    return longer if longer >= 1.1 else 1.0


def choose_tiles(
    rows: int,
    experts: int,
    outputs: int,
    inputs: int,
    tile: int,
    properties: DeviceProperties,
    *,
    gated: bool,
    copied: bool,
    itemsize: int,
    blocks: bool = False,
) -> Tiles:
    """The tiles for `[rows, inputs]` by `[experts, outputs, inputs]`, `tile` of the rows at a time.

    Args:
        tile: from `rows_of_plain`.
        gated: whether outputs are halved by SiLU × gate; then one program has all of a tile's inputs.
        copied: whether the copy engine loads, on Hopper.
        blocks: whether scales are of blocks of 128 inputs.
    """
    mean, active = _mean(rows, experts), min(experts, rows)
    room = properties.shared_memory - _OTHER_BYTES
    if copied and mean <= MOST_FEW:
        # Weights of 512 bytes of a row at a time: 16 tokens took 927 µs on an H100, 940 with 256, 960 with 128. There
        # is to be room for three steps: 64 tokens, in tiles of 32 rows, took 957 µs with two of 128 outputs, 941 with
        # five of 256 bytes, 938 with four of 64 outputs; of int8 498, and 487 with three of 256 bytes (fp8 486, 485,
        # but 491 with five). Two programs a multiprocessor, with half the memory each, took 0.5 to 2 % more.
        wide = tile > 16
        n = 64 if wide and itemsize > 1 else 128
        if gated and _idle(active * cdiv(outputs, 128), properties) > _idle(active * cdiv(outputs, 64), properties):
            n = 64
        step = (2 if wide and itemsize == 1 else 4) * COPIED_BYTES
        stages = room // ((tile + n) * step)
        if wide and itemsize == 1:
            stages = min(stages, 3)
        parts = 1
        if not gated:
            tiles, bytes_of_tile = active * cdiv(outputs, n), n * inputs * itemsize
            parts = _parts(tiles, inputs, properties.num_sms, bytes_of_tile, step // itemsize)
        return Tiles("few", tile, n, step // itemsize, 4, stages, 1, parts, box=8 if wide else 0)
    if copied and mean <= MOST_TALL and not blocks:
        step = (2 if tile == 64 else 1) * COPIED_BYTES
        tail = TAILS[tile]  # 1024 tokens: 1330 µs in two parts, 1341 in one
        stages = min(room // ((tile + tail + 128) * step), 5)
        tails = 2 if tile == 256 and itemsize > 1 else 1
        return Tiles("tall", tile, 128, step // itemsize, 4, stages, 1, tail=tail, box=min(tail, 64), tails=tails)
    if copied:
        return Tiles("many", tile, 256, COPIED_BYTES // itemsize, 4, 4, 1)
    # More than so many numbers a step spill where rows are not aligned, so that loads go through registers.
    block_k = 64 if itemsize <= 2 and tile <= 32 else 32
    return Tiles("triton", tile, 128, block_k, 8, 3, 1)


def choose_int4(
    rows: int,
    experts: int,
    outputs: int,
    inputs: int,
    tile: int,
    properties: DeviceProperties,
    *,
    gated: bool,
    copied: bool,
) -> Tiles:
    """The same for int4 weights; `outputs` are those of gate and of up."""
    if not copied:
        return Tiles("int4_plain", tile, 128, 128, 8, 2, 1)
    if tile > 64:
        stages = (properties.shared_memory - 2 * _OTHER_BYTES) // (tile * 256 + 2 * 4096)
        return Tiles("int4_tall", tile, 128, 128, 4, min(stages, 6), 1)
    handed = 2 * 64 * tile * 4 if gated else 0
    stage = 4 * 4096 + tile * 256
    stages = min((properties.shared_memory - handed - 5 * _OTHER_BYTES) // stage, 8)
    count = min(experts, rows) * cdiv(outputs, 256)
    parts = 1 if gated else _parts(count, inputs, properties.num_sms, 128 * inputs, 128)
    return Tiles("int4", tile, 256, 128, 4, stages, 1, parts)


def choose_int8(
    rows: int,
    experts: int,
    outputs: int,
    inputs: int,
    tile: int,
    properties: DeviceProperties,
    *,
    gated: bool,
    copied: bool,
    itemsize: int,
    group_size: int,
) -> Tiles:
    """The same for int8 weights beside floating point; the other kernel's steps lie in one group of inputs."""
    if not copied:  # in fp32, where no tensor cores multiply, longer steps spill
        sizes = (32, 64, 128) if itemsize == 2 else (32,)
        block_k = max(size for size in sizes if group_size % size == 0)
        return Tiles("int8_plain", tile, 128, block_k, 8, 2, 1)
    handed = 2 * 64 * tile * 4 if gated else 0
    stages = min((properties.shared_memory - handed - 5 * _OTHER_BYTES) // (4 * 8192 + tile * 256), 6)
    count = min(experts, rows) * cdiv(outputs, 256)
    parts = 1 if gated else _parts(count, inputs, properties.num_sms, 256 * inputs, 128)
    return Tiles("int8", tile, 256, 128, 4, stages, 1, parts)
