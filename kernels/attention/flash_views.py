"""FlashAttention's tensors as `paged_attention` takes them: views of dense keys and values as pages, masks, checks."""

import itertools
import operator
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from octavo.kernels.attention.paged_check import MAX_HEAD_SIZE
from octavo.kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
)
from octavo.kernels.registry import OPS
from octavo.kernels.rope import rotary_embedding

PAGE_SIZES = 128, 16, 1
"""Slots of a page that a row of keys is cut into, the first of them that divides it: the page size is compiled into the
kernels, so there are few. Decoding is fastest where a page has a multiple of 16."""


class Pages(NamedTuple):
    """Dense keys and values, `[batch, seqlen, heads, head_size]`, as two caches of pages that one table serves.

    Page i of row b is number `b · row + i · step`.
    """

    key: torch.Tensor
    value: torch.Tensor
    of_row: int
    row: int
    step: int


def as_pages(
    key: torch.Tensor, value: torch.Tensor, page_sizes: tuple[int, ...] = PAGE_SIZES, copies: bool = False
) -> Pages:
    """Views of `key` and `value`, of one shape and any strides.

    Where no page of these sizes serves both, with `copies` of what is not contiguous; else a row is one page, and each
    seqlen compiles kernels of its own: that is for caches, whose capacity is always the same.
    """
    batch, seqlen = key.shape[:2]
    for page_size in page_sizes:
        if seqlen % page_size == 0:
            of_row = seqlen // page_size
            numbers = _numbers(key, page_size)
            if numbers is not None and numbers == _numbers(value, page_size):
                row, step = numbers
                pages = max(batch - 1, 0) * row + max(of_row - 1, 0) * step + 1
                if pages < 2**31:
                    key, value = (_cut(x, page_size, pages, row, step) for x in (key, value))
                    return Pages(key, value, of_row, row, step)
    if copies:
        return as_pages(key.contiguous(), value.contiguous(), page_sizes)
    return Pages(key, value, 1, 1, 1)


def _numbers(x: torch.Tensor, page_size: int) -> tuple[int, int] | None:
    """How far apart the numbers of two rows and of two pages of a row are; None where pages can't be numbered so."""
    batch, seqlen = x.shape[:2]
    row, page = x.stride(0), x.stride(1) * page_size
    if batch <= 1 or seqlen == 0 or row * page_size == seqlen * page:  # rows side by side
        return seqlen // page_size, 1
    if torch.compiler.is_compiling():
        return None  # for as_strided, which trusts strides that Inductor is free to change
    if page and row % page == 0:
        return row // page, 1
    return (1, page // row) if row and page % row == 0 else None


def _cut(x: torch.Tensor, page_size: int, pages: int, row: int, step: int) -> torch.Tensor:
    batch, seqlen, heads, head_size = x.shape
    of_row = seqlen // page_size
    if row == of_row and step == 1:
        return x.view(batch * of_row, page_size, heads, head_size)
    stride = x.stride(1) * page_size // step if step else x.stride(0)
    return x.as_strided((pages, page_size, heads, head_size), (stride, *x.stride()[1:]))


def table_of(
    pages: Pages, batch: int, rows: torch.Tensor | None = None, skipped: torch.Tensor | None = None
) -> torch.Tensor:
    """The block table, `[batch, pages of a row]` int32: of rows b at b, or of `rows` [batch].

    The first `skipped` [batch] pages of each row are left out, so that its table ends in as many entries of -1.
    """
    device = pages.key.device
    if rows is None and skipped is None and pages.row == pages.of_row and pages.step == 1:
        return torch.arange(batch * pages.of_row, dtype=torch.int32, device=device).view(batch, pages.of_row)
    if rows is None:
        rows = torch.arange(batch, dtype=torch.int32, device=device)
    page = torch.arange(pages.of_row, dtype=torch.int32, device=device)
    if skipped is None:
        return (rows * pages.row)[:, None] + page * pages.step
    page = skipped[:, None] + page
    return torch.where(page < pages.of_row, (rows * pages.row)[:, None] + page * pages.step, -1)


def slots_of(past: torch.Tensor, new: int, block_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """Where `write_kv` puts `new` tokens a sequence after its `past` [batch]: [batch · new]; none outside the table."""
    width = block_table.shape[1]
    if width == 0:
        return past.new_full((past.shape[0] * new,), -1)
    position = past[:, None].long()
    if new != 1:
        position = position + torch.arange(new, device=past.device)
    at = position // page_size
    page = block_table.gather(1, at.clamp(0, width - 1))
    slots = torch.add(position, page - at, alpha=page_size)  # page · page_size + position % page_size
    return torch.where((at >= 0) & (at < width), slots, -1).flatten()


def visible(causal: bool, window_size: tuple[int, int], seqlen_k: int) -> tuple[bool, int | None]:
    """FlashAttention's masks as `paged_attention`'s: whether it is causal, and the window.

    Raises:
        TypeError: a window that is not two numbers.
        ValueError: a window that ends between a query's position and the last key.
    """
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise TypeError(f"window_size: {window_size!r}; expected (left, right), two numbers; (-1, -1) for no window")
    left, right = window_size
    if causal:
        right = 0
    if right > 0 and right >= seqlen_k:
        right = -1
    if left >= 0 and left >= seqlen_k:
        left = -1
    if right > 0:
        raise ValueError(
            f"window_size: {tuple(window_size)}; expected 0 on the right (no key after a query's own position, as with "
            f"causal=True), or -1 or at least {seqlen_k}, the keys (no limit)"
        )
    return right == 0, left + 1 if left >= 0 else None


def check_dropout(dropout_p: float) -> None:
    """Raises ValueError unless there is no dropout."""
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: {dropout_p}; expected 0.0: octavo is for inference")


def check_query(q: torch.Tensor, ndim: int, layout: str) -> None:
    """Raises TypeError or ValueError unless `q` is made of heads that `paged_attention` takes."""
    check_dtype("q", q, FLOATS)
    check_ndim("q", q, ndim, layout)
    check_last_dim_contiguous("q", q)
    if q.shape[-1] % 8 or not 0 < q.shape[-1] <= MAX_HEAD_SIZE:
        raise ValueError(f"q: head_size {q.shape[-1]}; expected a multiple of 8 up to {MAX_HEAD_SIZE}")


def check_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ndim: int, layout: str, cache: str = "") -> None:
    """Raises TypeError or ValueError unless `k` and `v`, with `cache` at the end of their names, go with `q`."""
    names = f"k{cache}", f"v{cache}"
    for name, x in zip(names, (k, v), strict=True):
        check_dtype(name, x, (q.dtype,))
        check_ndim(name, x, ndim, layout)
        check_last_dim_contiguous(name, x)
        check_device(name, x, "q", q)
    check_shape(names[1], v, k.shape, f"the shape of {names[0]}")
    heads, head_size = k.shape[-2:]
    if head_size != q.shape[-1] or heads == 0 or q.shape[-2] % heads:
        raise ValueError(
            f"{names[0]}: {heads} heads of size {head_size}; expected heads of size {q.shape[-1]}, and of q's "
            f"{q.shape[-2]} heads a multiple"
        )


def check_numbers(name: str, x: torch.Tensor, q: torch.Tensor, size: int, meaning: str) -> None:
    """Raises TypeError or ValueError unless `x` is `[size]` int32 beside `q`."""
    check_dtype(name, x, (torch.int32,))
    check_shape(name, x, (size,), meaning)
    check_device(name, x, "q", q)
    check_last_dim_contiguous(name, x)


def check_table(block_table: torch.Tensor, q: torch.Tensor, batch: int) -> None:
    """Raises TypeError or ValueError unless `block_table` has a row for each of `batch` sequences."""
    check_dtype("block_table", block_table, (torch.int32,))
    check_ndim("block_table", block_table, 2, "[batch, max_pages]")
    check_shape("block_table", block_table, (batch, block_table.shape[1]), "[batch, max_pages]")
    check_device("block_table", block_table, "q", q)
    check_last_dim_contiguous("block_table", block_table)


def length_of(name: str, number: int | torch.Tensor) -> int:
    """`number`, which may be in a tensor. Raises TypeError or ValueError unless it is one and not negative."""
    if isinstance(number, torch.Tensor):
        check_shape(name, number, (1,) * number.dim(), "a number, or a tensor of one element")
        number = number.item()  # type: ignore[assignment]
    if not isinstance(number, int | torch.SymInt):
        try:
            number = operator.index(number)
        except TypeError:
            raise TypeError(f"{name}: {number!r}; expected a whole number, or a tensor of one element") from None
    if number < 0:
        raise ValueError(f"{name}: {number}; expected at least 0")
    return number


def _is_readable(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.device.type != "cpu":
        return False
    return OPS["paged_attention"].backend("cpu") != "triton (interpreter)"  # which stands for a GPU


def _values(x: torch.Tensor | None) -> list[int] | None:
    """The numbers in `x` where they can be read without a synchronisation, on the CPU, else None.

    There paged_attention raises for wrong ones too, but by the names that arguments have there.
    """
    return x.tolist() if x is not None and _is_readable(x) else None


def check_packed_keys(
    cu_seqlens_k: torch.Tensor | None, seqused_k: torch.Tensor | None, rows: int | None, max_seqlen_k: int
) -> None:
    """Raises ValueError where lengths that lie on the CPU contradict each other, or k's `rows` where it is packed."""
    starts, used = _values(cu_seqlens_k), _values(seqused_k)
    lengths = used or []
    if starts is not None:
        counts = [end - start for start, end in itertools.pairwise(starts)]
        if any(n < 0 for n in counts) or (rows is not None and not 0 <= starts[0] <= starts[-1] <= rows):
            most = "" if rows is None else f", from 0 up to {rows}, the rows of k"
            raise ValueError(f"cu_seqlens_k: {starts}; expected no number less than the one before{most}")
        lengths = counts if seqused_k is None else lengths
        if rows is not None and used is not None and any(n > m for n, m in zip(used, counts, strict=True)):
            raise ValueError(f"seqused_k: {used}; expected at most {counts}, the keys of each by cu_seqlens_k")
    if used is not None and any(n < 0 for n in used):
        raise ValueError(f"seqused_k: {used}; expected at least 0")
    if rows is not None and max(lengths, default=0) > max_seqlen_k:
        raise ValueError(f"max_seqlen_k: {max_seqlen_k}; expected at least {max(lengths)}, the most keys of a sequence")


def check_rows(cache_batch_idx: torch.Tensor | None, batch: int, rows: int) -> None:
    """Raises ValueError unless k_cache has enough `rows`, or those in `cache_batch_idx` if it lies on the CPU."""
    if cache_batch_idx is None and rows < batch:
        raise ValueError(f"k_cache: {rows} rows; expected at least {batch}, as q has")
    wanted = _values(cache_batch_idx)
    if wanted is not None and any(not 0 <= row < rows for row in wanted):
        raise ValueError(f"cache_batch_idx: {wanted}; expected 0 to {rows - 1}, the rows of k_cache")


def check_cache_lengths(
    q: torch.Tensor,
    cache_seqlens: int | torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    capacity: int,
    new: int,
) -> None:
    """Raises ValueError for keys outside a cache, where that is seen without a synchronisation: on the CPU.

    One length for all is seen anywhere; but on a GPU `new` keys that don't fit are left out, and no error.
    """
    if torch.compiler.is_compiling():
        return
    if isinstance(cache_seqlens, torch.Tensor):
        past = _values(cache_seqlens)
    else:
        past = [capacity if cache_seqlens is None else cache_seqlens] * q.shape[0]
        new = new if _is_readable(q) else 0
    if past is not None and any(not 0 <= n <= capacity - new for n in past):
        value = past if isinstance(cache_seqlens, torch.Tensor) else cache_seqlens
        added = f", less {new} of k" if new else ""
        raise ValueError(f"cache_seqlens: {value}; expected 0 to {capacity - new}: the capacity {capacity}{added}")
    skipped = _values(cache_leftpad)
    if past is not None and skipped is not None and any(not 0 <= s <= n for s, n in zip(skipped, past, strict=True)):
        raise ValueError(f"cache_leftpad: {skipped}; expected 0 to cache_seqlens, {past}")


def check_tables_of_angles(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, capacity: int) -> None:
    """Raises TypeError or ValueError unless every position of a cache has its row in `cos` and `sin`."""
    check_dtype("rotary_cos", cos, FLOATS)
    check_ndim("rotary_cos", cos, 2, "[seqlen, rotary_dim / 2]")
    check_dtype("rotary_sin", sin, (cos.dtype,))
    check_shape("rotary_sin", sin, cos.shape, "the shape of rotary_cos")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_device(name, x, "q", q)
    if cos.shape[0] < capacity or not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(
            f"rotary_cos: shape {tuple(cos.shape)}; expected at least {capacity} rows, the cache's capacity, and 1 to "
            f"{q.shape[-1] // 2} columns, for half of q's head_size"
        )


def turned(
    x: torch.Tensor, past: torch.Tensor, moving: bool, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """A copy of `x` [batch, n, heads, head_size], turned by its positions, `past` [batch] and on, or `past` alone."""
    batch, n, heads, head_size = x.shape
    steps = torch.arange(n, device=x.device)
    positions = (past[:, None] + (steps if moving else torch.zeros_like(steps))).flatten()
    at = positions.clamp(0, cos.shape[0] - 1)
    rows = x.reshape(batch * n, heads, head_size).clone(memory_format=torch.contiguous_format)
    every_row = torch.arange(batch * n, device=x.device)
    rotary_embedding(rows, None, every_row, torch.cat((cos[at], sin[at]), 1), interleaved=interleaved)
    return rows.view(x.shape)
