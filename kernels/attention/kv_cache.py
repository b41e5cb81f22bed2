"""The formats of the paged KV cache, for the ops that write it and those that read it.

Both caches are `[pages, page_size, kv_heads, head_size]` of one dtype, which decides the format:

- the dtype of keys and values: x itself, bit for bit;
- float8_e4m3fn, float8_e5m2: x / scale, rounded half to even, beyond the dtype's largest number that number, NaN for
  NaN. The scale is the caller's, `k_scale` and `v_scale`: fp32, one number for all heads or one a KV head; None is 1.0;
- int8: x / scale, rounded half to even. The scale is that of one token and head, its largest magnitude / 127, and lies
  in `key_scale_cache` and `value_scale_cache`, fp32 `[pages, page_size, kv_heads]`, in the same page and slot. A head
  of zeros has the scale 0. A head that holds an infinity or a NaN has that for its scale and 0 in all places, so that
  all of it reads back as NaN, and no other head or token does.

Read back, a slot holds `q · scale`. The quotient is fp32 and correctly rounded, so that `(x.float() / scale)` of torch,
clamped and converted, gives the same bits, but for the sign of a NaN.
"""

import torch
import triton
import triton.language as tl

from octavo.kernels.checks import check_device, check_dtype, check_last_dim_contiguous, check_shape
from octavo.kernels.launch import INTERPRET
from octavo.kernels.quant.rounding import rounded
from octavo.kernels.tiles import device_properties

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Triton's interpreter has no PTX, and reads float8 with wrong subnormal numbers, infinities and NaNs.
PTX = tl.constexpr(not INTERPRET and torch.version.hip is None)


def check_supported(cache: torch.Tensor) -> None:
    """Raises ValueError where kernels for the GPU can't take the dtype of a cache at all."""
    if cache.dtype != torch.float8_e4m3fn or INTERPRET or torch.version.hip:
        return
    major, minor = device_properties(cache.device).capability
    if (major, minor) < (8, 9):
        raise ValueError(
            f"key_cache: dtype float8_e4m3fn needs a GPU of compute capability 8.9 or later, this one has "
            f"{major}.{minor}: use float8_e5m2 or int8"
        )


def native_fp8(cache: torch.Tensor) -> bool:
    """Whether the GPU converts fp32 to the dtype of a float8 cache by itself; else kernels do it in integers.

    Triton converts before sm_90 by way of a truncated fp16, and in its interpreter with wrong carries.

    Raises:
        ValueError: as `check_supported`.
    """
    check_supported(cache)
    if cache.dtype not in FLOAT8 or INTERPRET or torch.version.hip:
        return False
    return device_properties(cache.device).capability >= (9, 0)


def scale_stride(scale: torch.Tensor | None) -> int:
    """The distance between two heads' scales of a float8 cache: 0 where all heads share one."""
    return 0 if scale is None or scale.numel() == 1 else 1


def strides_of(cache: torch.Tensor | None) -> tuple[int, ...]:
    """The strides of a cache's pages, slots and heads; zeros for one that is absent."""
    return (0, 0, 0) if cache is None else cache.stride()[:3]


@triton.jit
def quantize(x, scale, SCALED: tl.constexpr, dtype: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """x (fp32) in a cache's dtype: divided by `scale`, [ROWS, 1], if it is SCALED, and rounded."""
    if SCALED:
        x = tl.div_rn(x, scale)
    if dtype == tl.int8:
        return rounded(x, dtype, 127.0, NATIVE_FP8)
    elif dtype == tl.float8e4nv:
        return rounded(x, dtype, 448.0, NATIVE_FP8)
    elif dtype == tl.float8e5:
        return rounded(x, dtype, 57344.0, NATIVE_FP8)
    else:
        return x.to(dtype)


@triton.jit
def _fp8_as_fp16(x):
    """Numbers of a float8 type as fp16, which holds all of them."""
    if PTX:
        return x.to(tl.float16)
    byte = x.to(tl.uint8, bitcast=True).to(tl.int32)
    if x.dtype == tl.float8e5:
        return (byte << 8).to(tl.uint16).to(tl.float16, bitcast=True)
    # Exponents are biased by 7 here and by 15 there. A NaN of either sign has all other bits set.
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    half = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), half).to(tl.float16)


@triton.jit
def _int8_as_fp16(x):
    """int8 as fp16, four numbers by five instructions: x + 128 in the lowest bits of 1024, less 1152."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 u, less;
        xor.b32 u, $2, 0x80808080;
        mov.b32 less, 0x64806480;
        prmt.b32 $0, u, 0x64646464, 0x4140;
        prmt.b32 $1, u, 0x64646464, 0x4342;
        sub.f16x2 $0, $0, less;
        sub.f16x2 $1, $1, less;
        }""",
        "=r,=r,r",
        [x],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def widened(x, dtype: tl.constexpr):
    """What a cache holds, in a float type of two bytes or more, which holds it exactly; the scale is left out.

    Float8 becomes fp16 by one instruction for two numbers, and goes on from there, because Triton would turn the
    infinities and NaNs of float8_e5m2 into finite bf16. int8 becomes bf16 by eight instructions for four numbers on
    sm_90, and fp32, and with it the rest, by a conversion of each.
    """
    if x.dtype == tl.float8e4nv or x.dtype == tl.float8e5:
        x = _fp8_as_fp16(x)
    elif PTX and x.dtype == tl.int8 and dtype == tl.float16:
        x = _int8_as_fp16(x)
    return x.to(dtype)


@triton.jit
def largest_bits(x):
    """The largest magnitude of each row of x (fp32), as its bits: NaN is larger than infinity, so that it shows."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def int8_scale(bits):
    """The scale of an int8 head whose largest magnitude has these bits."""
    return tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0)


@triton.jit
def fp8_scale(scale_ptr, head, stride_head, mask):
    """The scales of the heads `head` in a float8 cache, [ROWS, 1]; 1.0 where there are none."""
    if scale_ptr is None:
        return tl.full([head.shape[0], 1], 1.0, tl.float32)
    else:
        return tl.load(scale_ptr + head * stride_head, mask=mask, other=1.0)[:, None]


@triton.jit
def write_rows(
    cache_ptr,
    scale_cache_ptr,
    scale_ptr,
    source_ptr,
    from_offsets,
    to_offsets,
    scale_offsets,
    head,
    stride_scale,
    there,
    wanted,
    D: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes rows, one head of one token each, in the cache's format; offsets, head and masks are [ROWS].

    Rows that are `there` are read, without waiting for their slots; those that are `wanted` are written.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    given_scale = fp8_scale(scale_ptr, head, stride_scale, there)
    x = tl.load(source_ptr + from_offsets[:, None] + d, mask=there[:, None] & (d < D), other=0.0)  # [ROWS, D]
    if dtype == tl.int8:
        x = x.to(tl.float32)
        scale = int8_scale(largest_bits(x))
        tl.store(scale_cache_ptr + scale_offsets, scale, mask=wanted)
        x = quantize(x, scale[:, None], True, dtype, NATIVE_FP8)
    elif dtype != x.dtype:
        x = quantize(x.to(tl.float32), given_scale, scale_ptr is not None, dtype, NATIVE_FP8)
    tl.store(cache_ptr + to_offsets[:, None] + d, x, mask=wanted[:, None] & (d < D))


def check_kv_cache(
    source_name: str,
    source: torch.Tensor,
    kv_heads: int,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    """Raises TypeError or ValueError unless both caches have one format that goes with `source`, `[…, head_size]`.

    `source` is the tensor that is written to them or attends to them; its dtype is the one that is kept as it is.
    """
    head_size = source.shape[-1]
    check_dtype("key_cache", key_cache, (source.dtype, *FLOAT8, torch.int8))
    if key_cache.dim() != 4 or key_cache.shape[2:] != (kv_heads, head_size) or key_cache.shape[1] == 0:
        raise ValueError(
            f"key_cache: shape {tuple(key_cache.shape)}; expected [pages, page_size, {kv_heads}, {head_size}] "
            f"with page_size at least 1, as {source_name} has {kv_heads} heads of size {head_size}"
        )
    check_dtype("value_cache", value_cache, (key_cache.dtype,))
    check_shape("value_cache", value_cache, key_cache.shape, "the shape of key_cache")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_last_dim_contiguous(name, cache)
        check_device(name, cache, source_name, source)
    if key_cache.dtype != source.dtype or not (k_scale is v_scale is key_scale_cache is value_scale_cache is None):
        _check_scales(source_name, source, key_cache, k_scale, v_scale, key_scale_cache, value_scale_cache)


def _check_scales(
    source_name: str,
    source: torch.Tensor,
    key_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    key_scale_cache: torch.Tensor | None,
    value_scale_cache: torch.Tensor | None,
) -> None:
    cache_dtype, kv_heads = str(key_cache.dtype).removeprefix("torch."), key_cache.shape[2]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if key_cache.dtype not in FLOAT8:
            raise ValueError(f"{name}: given with a cache of {cache_dtype}; expected None: it scales float8 caches")
        check_dtype(name, scale, (torch.float32,))
        if scale.dim() > 1 or scale.numel() not in (1, kv_heads):
            raise ValueError(f"{name}: shape {tuple(scale.shape)}; expected one element or [{kv_heads}], one a KV head")
        check_last_dim_contiguous(name, scale)
        check_device(name, scale, source_name, source)
    for name, scales in (("key_scale_cache", key_scale_cache), ("value_scale_cache", value_scale_cache)):
        if (scales is not None) != (key_cache.dtype == torch.int8):
            was, wanted = ("missing", "a tensor") if scales is None else ("given", "None")
            raise ValueError(
                f"{name}: {was} with a cache of {cache_dtype}; expected {wanted}: an int8 cache, and no other, "
                "has a scale a token and head"
            )
        if scales is not None:
            check_dtype(name, scales, (torch.float32,))
            check_shape(name, scales, key_cache.shape[:3], "[pages, page_size, kv_heads], as key_cache")
            check_device(name, scales, source_name, source)
