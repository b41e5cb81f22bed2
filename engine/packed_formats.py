"""Quantised weights in safetensors, as GPTQ, AWQ and compressed-tensors lay them out, and as octavo's layers take them.

A linear layer of theirs is several tensors under one module's name. Nothing is rounded: codes, scales and zero points
become those of an `Int4Weight`, `Int8Weight` or `Fp8Weight`, exactly. bitsandbytes' NF4 alone is dequantised (nf4.py).

| format | codes | zero points |
| --- | --- | --- |
| GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) | `qweight` int32 [K / 8, N], inputs from the lowest bits | `qzeros` [groups, N / 8], less 1 in its first version |
| AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978), "gemm" | `qweight` [K, N / 8], outputs 0, 2, 4, 6, 1, 3, 5, 7 | `qzeros` [groups, N / 8], alike |
| compressed-tensors "pack-quantized", 4 bits | `weight_packed` [N, K / 8], plus 8 | `weight_zero_point` [N / 8, groups] |
| the same, 8 bits | `weight_packed` [N, K / 4], plus 128 | none |
| compressed-tensors "int-quantized", 8 bits | `weight` int8 [N, K]; `input_scale` where static | none |
| compressed-tensors "float-quantized", fp8 | `weight` float8_e4m3fn [N, K], a scale a tensor, output or block | none |
| Hugging Face's "fp8" | the same by block, scales under the name `weight_scale_inv` | none |

Where the 8-bit formats say that activations are quantised too, the layer's are (W8A8): int8 and fp8 with a scale a
weight tensor or output and activations by token or tensor, fp8 in blocks of 128 by 128 and activations in groups of 128.
A checkpoint of compressed-tensors may have several formats, each for the layers that its config group names.
"""  # noqa: E501  (a table)

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from octavo.engine.checkpoint import Activations, Fp8Weight, Int4Weight, Int8Weight, Weight
from octavo.engine.nf4 import NF4_OPTIONAL, NF4_REQUIRED, read_nf4

BLOCK = 128
"""Inputs that share a scale, and outputs beside them, where both activations and weights have scales by blocks."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


Parts = Mapping[str, torch.Tensor]
"""The tensors of one layer, by suffix."""


@dataclass(frozen=True)
class PackedFormat:
    """What a checkpoint's `quantization_config` says of its linear layers' tensors."""

    read: Callable[[str, Parts], Weight]
    required: frozenset[str]
    """Suffixes of the tensors that make up a quantised layer."""
    optional: frozenset[str] = frozenset()
    codes: str = "weight"
    """The tensor that tells the layer's size."""
    size: Callable[[int, int], tuple[int, int] | None] = lambda n, k: (n, k)
    """Outputs and inputs by the shape of `codes`; None where that does not tell."""

    @property
    def suffixes(self) -> frozenset[str]:
        """Of all tensors that a quantised layer may have."""
        return self.required | self.optional

    def of(self, module: str) -> "PackedFormat":
        """The format of one layer, which is that of all."""
        return self

    def check(self, module: str, suffixes: Collection[str]) -> None:
        """Raises ValueError where a tensor that makes up the layer is not among those that are there."""
        missing = self.required.difference(suffixes)
        if missing:
            raise ValueError(
                f"{module}.{min(missing)}: missing from the checkpoint, which has {module}.{min(suffixes)}"
            )

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
        """`(out_features, in_features)` by the shapes of the tensors, None where only their data tell.

        Raises:
            ValueError: the codes are not of two dimensions.
        """
        if len(shapes[self.codes]) != 2:
            raise ValueError(f"{self.codes}: shape {shapes[self.codes]}; expected two dimensions")
        return self.size(*shapes[self.codes])

    def weight(self, module: str, parts: Parts, dtype: torch.dtype = torch.float32) -> Weight:
        """The weight of a layer from its tensors; `dtype` is that of one that is dequantised.

        Raises:
            ValueError: a tensor is missing or does not fit the others.
        """
        self.check(module, parts)
        weight = self.read(module, parts)
        return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight


@dataclass(frozen=True)
class MixedFormats:
    """Formats of a checkpoint whose layers have not all the same."""

    groups: tuple[tuple[tuple[str, ...], PackedFormat], ...]
    """Of each, whose it is: names of modules, "re:" and what their names begin with, as a pattern, or "Linear"."""

    @property
    def suffixes(self) -> frozenset[str]:
        """Of all tensors that a quantised layer may have."""
        return frozenset().union(*(form.suffixes for _, form in self.groups))

    def of(self, module: str) -> PackedFormat:
        """The format of one layer: that which names it before that of all linear layers, as compressed-tensors has it.

        Raises:
            ValueError: no group names the layer.
        """
        for targets, form in self.groups:
            patterns = (re.match(t.removeprefix("re:"), module) for t in targets if t.startswith("re:"))
            if module in targets or any(patterns):
                return form
        for targets, form in self.groups:
            if "Linear" in targets:
                return form
        raise ValueError(f"{module}: quantised, but no group of config_groups names it")


def _gptq(module: str, parts: Parts, zero_offset: int) -> Int4Weight:
    q = _nibbles(module, "qweight", parts["qweight"], dim=0).t().contiguous()  # [N, K]
    scale = _scales(module, "scales", parts["scales"].t(), q)
    zero = _nibbles(module, "qzeros", parts["qzeros"], dim=1).t().to(torch.int32) + zero_offset
    return _int4(module, "qzeros", q, scale, zero, _order(module, "g_idx", parts.get("g_idx"), q, scale))


def _awq(module: str, parts: Parts) -> Int4Weight:
    q, zero = (
        _nibbles(module, name, parts[name], dim=1, order=_AWQ_ORDER).t().contiguous() for name in ("qweight", "qzeros")
    )
    return _int4(module, "qzeros", q, _scales(module, "scales", parts["scales"].t(), q), zero.to(torch.int32))


def _packed(module: str, parts: Parts) -> Int4Weight:
    q = _of_shape(module, _nibbles(module, "weight_packed", parts["weight_packed"], dim=1), parts)
    scale = _scales(module, "weight_scale", parts["weight_scale"], q)
    order = _order(module, "weight_g_idx", parts.get("weight_g_idx"), q, scale)
    if "weight_zero_point" in parts:
        zero = _nibbles(module, "weight_zero_point", parts["weight_zero_point"], dim=0).to(torch.int32)
    else:
        zero = torch.full(scale.shape, 8, device=scale.device)
    return _int4(module, "weight_zero_point", q, scale, zero, order)


def _packed_bytes(module: str, parts: Parts) -> Int8Weight:
    words = parts["weight_packed"]
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(
            f"{module}.weight_packed: {words.dtype}, shape {tuple(words.shape)}; expected int32 of two dimensions"
        )
    q = (words.contiguous().view(torch.uint8) ^ 128).view(torch.int8)
    return _integers(module, {"weight": _of_shape(module, q, parts), "weight_scale": parts["weight_scale"]})


def _of_shape(module: str, q: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Codes that are as many as `weight_shape` says."""
    shape = parts["weight_shape"].tolist()
    if list(q.shape) != shape:
        raise ValueError(f"{module}.weight_packed: holds {list(q.shape)} codes; {module}.weight_shape says {shape}")
    return q


def _integers(module: str, parts: Parts, activations: Activations | None = None) -> Int8Weight:
    q = parts["weight"]
    if q.dtype != torch.int8 or q.dim() != 2:
        raise ValueError(f"{module}.weight: {q.dtype}, shape {tuple(q.shape)}; expected int8 of two dimensions")
    scale = _scales(module, "weight_scale", parts["weight_scale"].reshape(q.shape[0], -1), q)
    return Int8Weight(q, scale, q.shape[1] // scale.shape[1], _with_scale(module, activations, parts))


def _float8(
    module: str, parts: Parts, block: tuple[int, int] | None = None, activations: Activations | None = None
) -> Fp8Weight:
    name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    q, scale = parts["weight"], parts[name]
    if q.dtype != torch.float8_e4m3fn or q.dim() != 2:
        raise ValueError(
            f"{module}.weight: {q.dtype}, shape {tuple(q.shape)}; expected float8_e4m3fn of two dimensions"
        )
    n, k = q.shape
    if block is None:
        scale = scale.reshape(-1, 1)
        block = (1 if scale.shape[0] == n else n, k)
    expected = (-(-n // block[0]), -(-k // block[1]))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"{module}.{name}: shape {tuple(parts[name].shape)}; expected {expected} for {n} outputs of {k}"
        )
    return Fp8Weight(q, scale, block, _with_scale(module, activations, parts))


def _with_scale(module: str, activations: Activations | None, parts: Parts) -> Activations | None:
    """What quantises the inputs of this layer; its own scale where the checkpoint has one (static quantisation)."""
    if activations is None or activations.granularity != "tensor" or "input_scale" not in parts:
        return activations
    scale = parts["input_scale"]
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(f"{module}.input_scale: {scale.dtype}, shape {tuple(scale.shape)}; expected one number")
    return Activations("tensor", scale.reshape(1).float())


def packed_format(config: Mapping[str, Any]) -> tuple[PackedFormat | MixedFormats, list[str]]:
    """The format that a `quantization_config` names, and what the user should know about it.

    Raises:
        ValueError: naming the key, its value and what is supported.
    """
    method = config.get("quant_method")
    if method == "gptq":
        _expect(config, "bits", (4,))
        version = config.get("checkpoint_format", "gptq")
        if version not in ("gptq", "gptq_v2"):
            raise _unsupported("checkpoint_format", version, "gptq, gptq_v2")
        read = partial(_gptq, zero_offset=1 if version == "gptq" else 0)
        required = frozenset({"qweight", "qzeros", "scales"})
        return PackedFormat(read, required, frozenset({"g_idx"}), "qweight", lambda k, n: (n, 8 * k)), []
    if method == "awq":
        _expect(config, "bits" if "bits" in config else "w_bit", (4,))
        _expect(config, "version", ("gemm", "GEMM"), default="gemm")
        required = frozenset({"qweight", "qzeros", "scales"})
        return PackedFormat(_awq, required, frozenset(), "qweight", lambda k, n: (8 * n, k)), []
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    if method == "fp8":
        block = _block(config, "weight_block_size")
        dynamic = config.get("activation_scheme", "dynamic") == "dynamic"
        activations = Activations("group") if dynamic and block == (BLOCK, BLOCK) else None
        optional = frozenset({"activation_scale", "input_scale"} if activations is None else ())
        read_float8 = partial(_float8, block=block, activations=activations)
        notes = [_DENSE] if activations is None else []
        return PackedFormat(read_float8, frozenset({"weight", "weight_scale_inv"}), optional), notes
    if method == "bitsandbytes":
        _expect(config, "load_in_4bit", (True,))
        _expect(config, "bnb_4bit_quant_type", ("nf4",), default="fp4")
        return PackedFormat(read_nf4, NF4_REQUIRED, NF4_OPTIONAL, "weight", lambda n, k: None), [_NF4]
    raise _unsupported("quant_method", method, "gptq, awq, compressed-tensors, fp8, bitsandbytes (nf4); and GGUF files")


def _compressed_tensors(config: Mapping[str, Any]) -> tuple[PackedFormat | MixedFormats, list[str]]:
    groups = list((config.get("config_groups") or {}).values())
    if not groups:
        raise _unsupported("config_groups", "0 of them", "one for all linear layers, or several that name theirs")
    formats, notes = [], []
    for group in groups:
        form, said = _config_group(group, group.get("format") or config.get("format"))
        formats.append((tuple(group.get("targets") or ()), form))
        notes += [note for note in said if note not in notes]
    if config.get("kv_cache_scheme"):
        notes.insert(0, "the checkpoint has scales of a float8 KV cache: kv_cache_dtype='fp8' makes use of them")
    return formats[0][1] if len(formats) == 1 else MixedFormats(tuple(formats)), notes


def _config_group(group: Mapping[str, Any], name: str | None) -> tuple[PackedFormat, list[str]]:
    """The format that a config group describes, which is called `name`."""
    weights = group.get("weights") or {}
    inputs = group.get("input_activations")
    activations = _activations(inputs, weights) if inputs else None
    notes = [_PLAIN_ACTIVATIONS] if inputs and activations is None else []
    static = inputs is not None and activations is not None and not inputs.get("dynamic")
    required, optional = ({"input_scale"}, ()) if static else ((), {"input_scale"})
    bits = weights.get("num_bits")
    _expect(weights, "symmetric", (True, False) if (name, bits) == ("pack-quantized", 4) else (True,), default=True)
    if name == "float-quantized":
        _expect(weights, "type", ("float",))
        _expect(weights, "num_bits", (8,))
        _expect(weights, "strategy", ("tensor", "channel", "block"))
        block = _block(weights, "block_structure") if weights["strategy"] == "block" else None
        read_float8 = partial(_float8, block=block, activations=activations)
        if activations is None:
            notes.append(_DENSE)
        names = frozenset({"weight", "weight_scale", *required})
        return PackedFormat(read_float8, names, frozenset(optional)), notes
    _expect(weights, "type", ("int",), default="int")
    _expect(weights, "strategy", ("group", "channel"))
    if name == "pack-quantized":
        _expect(weights, "num_bits", (4, 8))
        names = frozenset({"weight_packed", "weight_scale", "weight_shape"})
        if bits == 8:
            _expect(weights, "actorder", (None, "weight", "static"))
            return PackedFormat(_packed_bytes, names, frozenset(), "weight_packed", lambda n, k: (n, 4 * k)), notes
        zero_and_order = frozenset({"weight_zero_point", "weight_g_idx"})
        return PackedFormat(_packed, names, zero_and_order, "weight_packed", lambda n, k: (n, 8 * k)), notes
    if name == "int-quantized":
        _expect(weights, "num_bits", (8,))
        names = frozenset({"weight", "weight_scale", *required})
        return PackedFormat(partial(_integers, activations=activations), names, frozenset(optional)), notes
    raise _unsupported("format", name, "pack-quantized, int-quantized, float-quantized")


_PLAIN_ACTIVATIONS = "activations are not quantised, though the checkpoint was made for that: weights alone are"
_NF4 = "NF4 weights are dequantised to the dtype of the activations: four times the memory"
_DENSE = "fp8 weights are kept dense, in the dtype of the activations: twice the memory, or four times"


def _activations(inputs: Mapping[str, Any], weights: Mapping[str, Any]) -> Activations | None:
    """How the layers' inputs are quantised; None where octavo has no op for it."""
    kind = weights.get("type", "int")
    same = inputs.get("type", "int") == kind and inputs.get("num_bits", 8) == weights.get("num_bits") == 8
    if not same or not inputs.get("symmetric", True):
        return None
    dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy", "tensor")
    if weights.get("strategy") in ("channel", "tensor"):
        if strategy == "tensor":
            return Activations("tensor")
        return Activations("token") if strategy == "token" and dynamic is True else None
    blocks = kind == "float" and weights.get("block_structure") == [BLOCK, BLOCK]
    groups = strategy == "group" and inputs.get("group_size") == BLOCK and dynamic is True
    return Activations("group") if blocks and groups else None


def _block(config: Mapping[str, Any], key: str) -> tuple[int, int]:
    block = config.get(key)
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise _unsupported(key, block, "two positive numbers, of outputs and inputs that share a scale")
    return block[0], block[1]


def _unsupported(key: str, value: Any, supported: str) -> ValueError:
    return ValueError(f"quantization_config: {key}: {value!r}; supported: {supported}")


def _expect(config: Mapping[str, Any], key: str, supported: tuple[Any, ...], default: Any = None) -> None:
    value = config.get(key, default)
    if value not in supported:
        raise _unsupported(key, value, ", ".join(map(str, supported)))


def _nibbles(
    module: str, name: str, words: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))
) -> torch.Tensor:
    """The eight codes of each int32 word as uint8, in place of it along `dim`: nibble i is number order[i] of them."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(
            f"{module}.{name}: {words.dtype}, shape {tuple(words.shape)}; expected int32 of two dimensions"
        )
    places = sorted(range(8), key=order.__getitem__)
    codes = torch.stack([words >> 4 * i & 15 for i in places], dim + 1)
    return codes.flatten(dim, dim + 1).to(torch.uint8)


def _scales(module: str, name: str, scale: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`[N, groups]`, checked against q `[N, K]`."""
    fits = scale.dim() == 2 and scale.shape[0] == q.shape[0] and scale.shape[1] and q.shape[1] % scale.shape[1] == 0
    if not fits or not scale.is_floating_point():
        raise ValueError(
            f"{module}.{name}: {scale.dtype} for {tuple(scale.shape)} outputs and groups; the codes are of "
            f"{q.shape[0]} outputs and {q.shape[1]} inputs"
        )
    group_size = q.shape[1] // scale.shape[1]
    if group_size % 32:
        raise ValueError(f"{module}.{name}: groups of {group_size} inputs; supported: multiples of 32")
    return scale.contiguous()


def _int4(
    module: str,
    name: str,
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    order: torch.Tensor | None = None,
) -> Int4Weight:
    """q, scale and zero points as an Int4Weight: (q − zero) · scale, which is q · scale + minimum."""
    if zero.shape != scale.shape:
        raise ValueError(
            f"{module}.{name}: {tuple(zero.shape)} outputs and groups; the scales are of {tuple(scale.shape)}"
        )
    if order is not None:
        q = q[:, order]
    group_size = q.shape[1] // scale.shape[1]
    minimum = None if bool((zero == 8).all()) else -zero * scale.float()  # fp32 holds the product exactly
    return Int4Weight(q, scale, minimum, group_size, order)


def _order(
    module: str, name: str, g_idx: torch.Tensor | None, q: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor | None:
    """The order of the inputs in which those of a group are neighbours (act-order); None where they are as they lie."""
    k, groups = q.shape[1], scale.shape[1]
    in_order = torch.arange(k, device=scale.device) // (k // groups)
    if g_idx is None or torch.equal(g_idx.long(), in_order):
        return None
    if g_idx.shape != (k,) or not torch.equal(g_idx.long().sort().values, in_order):
        raise ValueError(f"{module}.{name}: not the groups of {k} inputs, {k // groups} in each of {groups}")
    return g_idx.long().argsort(stable=True)
