"""bitsandbytes' NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), as its 4-bit models are saved.

    weight = quant_map[code] · absmax of its block
    absmax = nested_quant_map[absmax code] · nested_absmax of its block of blocks + nested_offset

The second formula holds where scales are quantised too ("double quantisation"). A layer's tensors, under `weight`:

| suffix | what it holds |
| --- | --- |
| (none) | uint8 [N · K / 2, 1]: codes row by row, the first of two in the high nibble |
| `.absmax` | fp32, or uint8 where nested: one a block, of N · K / blocksize |
| `.quant_map` | fp32 [16]: what a code stands for |
| `.nested_absmax`, `.nested_quant_map` | fp32 [blocks / nested_blocksize] and [256] |
| `.quant_state.bitsandbytes__nf4` | uint8: JSON with `blocksize`, `shape`, `dtype`, and the nested ones' |

octavo has no kernel for NF4, whose steps are uneven: weights are dequantised once, in fp32, as bitsandbytes does.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

_STATE = "weight.quant_state.bitsandbytes__nf4"
NF4_REQUIRED = frozenset({"weight", "weight.absmax", "weight.quant_map", _STATE})
NF4_OPTIONAL = frozenset({"weight.nested_absmax", "weight.nested_quant_map"})


def read_nf4(module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight `[N, K]` in fp32 from a layer's tensors by suffix.

    Raises:
        ValueError: a tensor does not fit the others, or the state is not what bitsandbytes writes.
    """
    state = _state(module, parts[_STATE])
    n, k = state["shape"]
    codes, quant_map, absmax = (parts[name] for name in ("weight", "weight.quant_map", "weight.absmax"))
    blocks = -(-n * k // state["blocksize"])
    _expect(module, "weight", codes, torch.uint8, -(-n * k // 2))
    _expect(module, "weight.quant_map", quant_map, torch.float32, 16)
    if NF4_OPTIONAL & parts.keys():
        absmax = _nested(module, parts, state, blocks)
    else:
        _expect(module, "weight.absmax", absmax, torch.float32, blocks)
    codes = codes.flatten()
    pairs = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[: n * k]
    values = quant_map[pairs.int()]
    if blocks * state["blocksize"] == n * k:
        values = values.view(blocks, -1) * absmax.unsqueeze(1)
    else:
        values = values * absmax.repeat_interleave(state["blocksize"])[: n * k]
    return values.view(n, k)


def _nested(module: str, parts: Mapping[str, torch.Tensor], state: Mapping[str, Any], blocks: int) -> torch.Tensor:
    missing = NF4_OPTIONAL.difference(parts)
    if missing:
        raise ValueError(f"{module}.{min(missing)}: missing from the checkpoint")
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, int | float):
        raise ValueError(
            f"{module}.{_STATE}: nested_blocksize {size!r}, nested_offset {offset!r}; expected a size and a number"
        )
    codes, quant_map, absmax = (
        parts[name] for name in ("weight.absmax", "weight.nested_quant_map", "weight.nested_absmax")
    )
    _expect(module, "weight.absmax", codes, torch.uint8, blocks)
    _expect(module, "weight.nested_quant_map", quant_map, torch.float32, 256)
    _expect(module, "weight.nested_absmax", absmax, torch.float32, -(-blocks // size))
    return quant_map[codes.int()] * absmax.repeat_interleave(size)[:blocks] + offset


def _state(module: str, data: torch.Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(data.cpu().numpy()))
        fits = len(state["shape"]) == 2 and all(type(x) is int and x > 0 for x in (*state["shape"], state["blocksize"]))
        fits = fits and state["quant_type"] == "nf4"
    except (ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ValueError(
            f"{module}.{_STATE}: expected JSON with quant_type nf4, a shape of two dimensions and a blocksize"
        )
    return state


def _expect(module: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, count: int) -> None:
    if tensor.dtype != dtype or tensor.numel() != count:
        raise ValueError(
            f"{module}.{name}: {tensor.dtype}, {tensor.numel()} elements; expected {count} of {dtype} by "
            f"{module}.{_STATE}"
        )
