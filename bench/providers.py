"""What several benchmarks' providers share: compiled formulas, exact results in pieces, packing, page tables."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from octavo.bench.harness import LeftOut, Shape
from octavo.bench.shapes import TOKENS

# Elements of a double-precision intermediate: 256 MB.
PIECE = 2**25
# Each shape takes a compiler seconds, and the numbers of tokens between these say nothing new.
COMPILED_TOKENS = (1, 64, 1024, 8192)


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """`torch.compile` of a plain formula, for these shapes alone, in the default mode.

    The limits on recompilations are lifted: a sweep compiles one formula for many shapes, and past the limit
    `torch.compile` would run it eagerly and be timed as such.

    Raises:
        LeftOut: the first argument has one of the benchmarks' numbers of tokens that are not compiled for.
    """
    tokens = args[0].shape[0]
    if tokens in TOKENS and tokens not in COMPILED_TOKENS:
        raise LeftOut(f"measured at T = {', '.join(map(str, COMPILED_TOKENS))}")
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, 4096)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 65536)
    call = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: call(*args)


def by_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of each row in fp64, some rows at a time, so that its intermediates stay small."""
    rows = max(1, PIECE // x.shape[-1])
    return torch.cat([function(piece.double()) for piece in x.split(rows)])


def drawn(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    """The keyword arguments of `torch.rand` and `torch.randn` for a benchmark's inputs."""
    return {"generator": generator, "device": device, "dtype": dtype}


def gated_input(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """What a gated activation reads: `[T, 2 · intermediate]`, the gate first."""
    return torch.randn(shape["T"], 2 * shape["intermediate"], **drawn(dtype, device, generator))


def gated_out(x: torch.Tensor) -> torch.Tensor:
    """Room for a gated activation of x."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def wide_dtype(device: torch.device) -> torch.dtype:
    """What exact matrix products are computed in: fp64 on a CPU; fp32 on a GPU, most of which are slow at fp64."""
    return torch.float64 if device.type == "cpu" else torch.float32


@contextmanager
def full_fp32() -> Iterator[None]:
    """Inside, fp32 matrix products are fp32, not TF32, whatever a peer has set."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def pack_words(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned weights `[N, K]` as int32 words `[N, K / (32 / bits)]`, the lowest bits first.

    Transposed this is GPTQ's `qweight`, from which vLLM and conch start.
    """
    factor = 32 // bits
    words = torch.zeros(q.shape[0], q.shape[1] // factor, dtype=torch.int32, device=q.device)
    for index in range(factor):
        words |= q[:, index::factor].to(torch.int32) << (bits * index)
    return words


def page_tables(
    block_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A block table as FlashInfer wants it.

    Returns:
        Where each sequence's pages start `[B + 1]`, the page ids of all sequences, and the tokens in each last page
        `[B]`; int32.
    """
    pages = (seq_lens + page_size - 1) // page_size
    starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).to(torch.int32)
    used = torch.arange(block_table.shape[1], device=block_table.device) < pages[:, None]
    return starts, block_table[used], (seq_lens - 1) % page_size + 1


@functools.cache
def flashinfer_workspace(device: torch.device) -> torch.Tensor:
    """The buffer for partial results that FlashInfer's wrappers share; calls on one stream do not overlap.

    Many heads of many sequences want more than the 128 MB that its documentation asks for.
    """
    return torch.zeros(1 << 30, dtype=torch.uint8, device=device)
