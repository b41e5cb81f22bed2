"""`plan_attention`, and `paged_attention` with its plan: one kernel that gives what two give."""

from dataclasses import replace

import pytest
import torch
from attention_args import TENSORS, op_args
from hypothesis import given
from hypothesis import strategies as st
from test_paged_attention import DECODE, MIX, case, dense
from test_paged_features import caches

import octavo
from octavo.kernels import tiles as tiles_module
from octavo.kernels.attention import attention_tiles, decode, paged, plan_attention
from octavo.kernels.launch import recording
from octavo.kernels.registry import without_interpreter
from octavo.testing import assert_accurate, check_op

PLANNED = ("query", "key_cache", "block_table", "seq_lens", "cu_seqlens_q")
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def launches(dtype):
    """Every tile choice that ships and a plan changes, on meta tensors: tests/test_compile.py compiles them."""
    bf16 = dtype == torch.bfloat16
    for d in (64, 96, 128, 256) if bf16 else (128,):
        for tokens in (1, 5, 64):
            _launch(dtype, d, 4, tokens, 1)
        for group, longest in ((1, 1), (8, 1), (4, 16)):
            _launch(dtype, d, group, 64, longest, window_size=100, softcap=50.0, return_lse=True)
    for cache_dtype in (torch.int8, torch.float8_e5m2) if bf16 else ():
        for d in (64, 128, 256):
            _launch(dtype, d, 4, 64, 1, cache_dtype)
            _launch(dtype, d, 4, 64, 16, cache_dtype)
    if bf16:
        _launch(dtype, 80, 4, 1, 1, window_size=100, softcap=50.0, return_lse=True)
        _launch(dtype, 128, 4, 1, 1, window_size=100, rolling=True)
        _launch(dtype, 128, 4, 4, 1, alibi=True)
        for d in (64, 128, 256):
            _launch(torch.float32, d, 4, 64, 8, window_size=100, return_lse=True)


def _launch(dtype, d, group, tokens, longest, cache_dtype=None, rolling=False, alibi=False, **options):
    def empty(*shape, dtype=torch.int32):
        return torch.empty(shape, device="meta", dtype=dtype)

    query, cache = empty(tokens, 8 * group, d, dtype=dtype), empty(100, 16, 8, d, dtype=cache_dtype or dtype)
    args = dict(zip(TENSORS, (query, cache, cache, empty(4, 50), empty(4), empty(5)), strict=True))
    if cache_dtype == torch.int8:
        args |= {name: empty(100, 16, 8, dtype=torch.float32) for name in ("key_scale_cache", "value_scale_cache")}
    if alibi:
        args["alibi_slopes"] = empty(8 * group, dtype=torch.float32)
    shared = longest, True, options.get("window_size"), rolling, alibi
    plan = plan_attention._plan_attention_cuda(*(args[name] for name in PLANNED), *shared)
    paged._paged_attention_cuda(*op_args(args, longest, rolling=rolling, plan=plan, **options))
