"""CUDA graphs of whole steps: one for each padded size and way of sampling, all in one pool of memory.

A captured step runs for what its kernels take: nothing is launched from Python. What is captured depends on a `Shape`
and a `Mode` alone. Since only one graph runs at a time, all of them share memory: the largest is captured first, and
the others fit into what it took.
"""

import gc
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch

from octavo.engine.inputs import Shape
from octavo.engine.sampler import Mode

FEW = 16
"""Steps with prompts have two sizes by sequences, up to so many and all: attention looks at padding too."""


def decode_sizes(most: int) -> list[int]:
    """Numbers of sequences: 1, 2, 4, then by 8 and from 256 on by 16."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 16, 16)]
    return sorted({min(size, most) for size in sizes})


def token_sizes(most: int) -> list[int]:
    """Numbers of tokens: 16, 32, by 64 to 1024, from there an eighth of the power of two below apart."""
    sizes, step = [16, 32], 64
    while sizes[-1] < most:
        if sizes[-1] >= 16 * step:
            step *= 2
        sizes.append((sizes[-1] // step + 1) * step)
    return sorted({min(size, most) for size in sizes})


class Sizes:
    """The shapes that steps are padded to."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.decodes = decode_sizes(min(max_num_seqs, max_num_batched_tokens))
        self.tokens = token_sizes(max_num_batched_tokens)
        self.few, self.all = min(FEW, max_num_seqs), max_num_seqs

    def shape(self, tokens: int, sequences: int, decode: bool) -> Shape:
        """The smallest that such a step fits into."""
        if decode:
            size = self.decodes[bisect_left(self.decodes, sequences)]
            return Shape(size, size, True)
        size = self.tokens[bisect_left(self.tokens, tokens)]
        return Shape(size, self.few if sequences <= self.few else self.all, False)

    def every(self) -> list[Shape]:
        """All of them, the largest first."""
        mixed = [
            Shape(t, s, False) for t in self.tokens for s in sorted({self.few, self.all}) if s == self.few or t > FEW
        ]
        shapes = mixed + [Shape(size, size, True) for size in self.decodes]
        return sorted(shapes, key=lambda shape: (-shape.tokens, -shape.sequences))


def modes(shape: Shape) -> tuple[Mode, ...]:
    """The ways of sampling that are captured ahead: beside prompts, what a greedy sampler saves is nothing."""
    return (Mode.GREEDY, Mode.DRAWN) if shape.decode else (Mode.DRAWN,)


class Graphs:
    """Captures steps and replays them.

    Args:
        compute: enqueues a step of this shape and mode; its inputs and all that lasts lie at fixed places.
        rehearse: puts inputs there with which that computes nothing but padding, and runs what it is made of once, so
            that all kernels are loaded and all libraries have their workspaces.
        stream: what both are run on.
    """

    def __init__(
        self,
        compute: Callable[[Shape, Mode], torch.Tensor],
        rehearse: Callable[[Shape, Mode], Any],
        stream: torch.cuda.Stream,
    ) -> None:
        self.compute, self.rehearse, self.stream = compute, rehearse, stream
        self.pool = torch.cuda.graph_pool_handle()
        self.nbytes = 0
        self._captured: dict[tuple[Shape, Mode], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @property
    def count(self) -> int:
        return len(self._captured)

    def capture(self, shape: Shape, mode: Mode) -> None:
        """Captures a step, if it is not yet; waits for the device."""
        if (shape, mode) in self._captured:
            return
        self.rehearse(shape, mode)
        torch.cuda.synchronize(self.stream.device)
        free, _ = torch.cuda.mem_get_info(self.stream.device)
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it finds may call CUDA in its last moment, which ends a capture
        graph.capture_begin(self.pool, capture_error_mode="thread_local")
        try:
            result = self.compute(shape, mode)
        finally:
            graph.capture_end()
            if collects:
                gc.enable()
        torch.cuda.synchronize(self.stream.device)
        self.nbytes += free - torch.cuda.mem_get_info(self.stream.device)[0]
        self._captured[shape, mode] = graph, result

    def replay(self, shape: Shape, mode: Mode) -> torch.Tensor:
        """Enqueues a captured step; the result is good until the next."""
        graph, result = self._captured[shape, mode]
        graph.replay()
        return result
