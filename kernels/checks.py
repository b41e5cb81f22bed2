"""Argument validation: every message names the argument, its value, what is accepted, and what to do.

All of it looks at metadata only (dtype, shape, stride, device), so it costs no synchronisation and traces cleanly under
`torch.compile(fullgraph=True)`. Values of index tensors (slots, positions, block ids) can't be read on a GPU without a
synchronisation: kernels skip what is out of range, and the reference on the CPU raises. `octavo.kernels.debug` has the
device look at some of them.
"""

from collections.abc import Sequence

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_dtype(name: str, x: torch.Tensor, accepted: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless `x` is a tensor of one of the `accepted` dtypes."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in accepted:
        raise TypeError(
            f"{name}: dtype {str(x.dtype).removeprefix('torch.')} is not accepted; "
            f"expected {_names(accepted)}: convert it with {name}.to(…)"
        )


def check_same_dtype(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raises TypeError unless both tensors have one dtype."""
    check_dtype(name, x, (other.dtype,))


def check_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if x.device != other.device:
        raise ValueError(
            f"{name}: on {x.device}, but {other_name} is on {other.device}: "
            f"move one with {name}.to({other_name}.device)"
        )


def check_ndim(name: str, x: torch.Tensor, ndim: int, layout: str) -> None:
    """Raises ValueError unless `x` has `ndim` dimensions; `layout` says which, such as "[tokens, heads, head_size]"."""
    if x.dim() != ndim:
        raise ValueError(f"{name}: shape {tuple(x.shape)} has {x.dim()} dimensions; expected {ndim}: {layout}")


def check_shape(name: str, x: torch.Tensor, expected: Sequence[int], layout: str) -> None:
    """Raises ValueError unless `x` has exactly the `expected` shape."""
    if x.shape != tuple(expected):
        raise ValueError(f"{name}: shape {tuple(x.shape)}; expected {tuple(expected)}: {layout}")


def check_of_tokens(name: str, values: torch.Tensor, x: torch.Tensor) -> None:
    """Raises ValueError unless `values` are one number, or one for each token (row) of `x`."""
    tokens = x.shape[:-1]
    if values.numel() != 1 and values.shape not in (tokens, (*tokens, 1)):
        raise ValueError(
            f"{name}: shape {tuple(values.shape)}; expected one element, or {(*tokens, 1)}: one for each token of x"
        )


def check_last_dim_contiguous(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless neighbours in the last dimension are neighbours in memory."""
    if x.dim() and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: the last dimension has stride {x.stride(-1)}; expected 1: pass {name}.contiguous()")


def check_turnable(name: str, x: torch.Tensor, layout: str) -> None:
    """Raises ValueError unless the heads of `x`, which has three dimensions, can be rotated in place."""
    check_ndim(name, x, 3, layout)
    check_last_dim_contiguous(name, x)
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are an expanded view, which cannot be rotated in "
            f"place: pass {name}.contiguous()"
        )


def check_rotary(query: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless each token of `query` has a position and the table goes with its heads."""
    tokens, _, head_size = query.shape
    check_dtype("positions", positions, INTS)
    check_shape("positions", positions, (tokens,), "[tokens], as query")
    check_last_dim_contiguous("positions", positions)
    check_device("positions", positions, "query", query)
    check_dtype("cos_sin_cache", cos_sin_cache, FLOATS)
    check_ndim("cos_sin_cache", cos_sin_cache, 2, "[max_position, rotary_dim]")
    check_last_dim_contiguous("cos_sin_cache", cos_sin_cache)
    check_device("cos_sin_cache", cos_sin_cache, "query", query)
    rotary_dim = cos_sin_cache.shape[1]
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_size:
        raise ValueError(
            f"cos_sin_cache: shape {tuple(cos_sin_cache.shape)} has rotary_dim {rotary_dim}; expected an even number "
            f"of columns from 2 to head_size ({head_size}): cosines, then sines"
        )


def check_contiguous(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless `x` is contiguous."""
    if not x.is_contiguous():
        raise ValueError(
            f"{name}: strides {x.stride()} of shape {tuple(x.shape)} are not contiguous: pass {name}.contiguous()"
        )


def check_rows(x: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless `x` is made of rows of numbers: what an op works on row by row."""
    check_dtype("x", x, FLOATS)
    check_last_dim_contiguous("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: shape {tuple(x.shape)}; expected a last dimension of at least one element")


def check_norm_parameter(name: str, parameter: torch.Tensor, x: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless `parameter` is a number for each element of a row of `x`."""
    check_dtype(name, parameter, FLOATS)
    check_shape(name, parameter, (x.shape[-1],), "[hidden], as wide as x")
    check_last_dim_contiguous(name, parameter)
    check_device(name, parameter, "x", x)


def check_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """Raises TypeError or ValueError unless the rows of `x` can be normalised with these."""
    check_rows(x)
    check_norm_parameter("weight", weight, x)
    if eps < 0:
        raise ValueError(f"eps: {eps}; expected a number of at least 0")


def check_gated(x: torch.Tensor) -> None:
    """Raises TypeError or ValueError unless the rows of `x` are a gate and what it multiplies."""
    check_rows(x)
    if x.shape[-1] % 2:
        raise ValueError(
            f"x: last dimension {x.shape[-1]} is odd; expected an even one: the gate, then what it multiplies"
        )


def check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> None:
    """Raises TypeError or ValueError unless these make a dense linear layer, perhaps with SiLU × gate behind it."""
    check_rows(x)
    check_dtype("weight", weight, (x.dtype,))
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}; expected [outputs, {x.shape[-1]}], as many inputs as x has, and at "
            "least one output"
        )
    check_contiguous("weight", weight)
    check_device("weight", weight, "x", x)
    if activation not in (None, "silu_and_mul"):
        raise ValueError(f'activation: {activation!r}; expected None or "silu_and_mul"')
    if activation is not None and weight.shape[0] % 2:
        raise ValueError(f"weight: {weight.shape[0]} outputs; expected an even number, gate's and up's")
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, weight.shape[:1], "[outputs], as weight")
        check_contiguous("bias", bias)
        check_device("bias", bias, "x", x)
