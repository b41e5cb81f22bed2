"""Quantisation to int8: bound by memory as that to e4m3 is, and measured at the same shapes."""

from functools import partial
from typing import Any

import torch

import octavo
from octavo.bench import bench_quantize_fp8 as fp8
from octavo.bench.bench_quantize_fp8 import Call, compiled_call, exact_as, granularity, torch_call
from octavo.bench.harness import Inputs, Provider, Unsupported
from octavo.bench.quantized import GROUP

OP = "quantize_int8"
DTYPES = (torch.bfloat16,)

shapes, inputs, flops, bytes_moved = fp8.shapes, fp8.inputs, fp8.flops, fp8.bytes_moved


def exact(inputs: Inputs) -> Any:
    return exact_as(torch.int8, inputs)


def _octavo(inputs: Inputs) -> Call:
    x, by = inputs["x"], granularity(inputs)
    return lambda: octavo.quantize_int8(x, granularity=by)


def _vllm(inputs: Inputs) -> Call:
    import vllm._custom_ops as ops

    x, group = inputs["x"], inputs["group"]
    if group == 0:
        raise Unsupported("scales by token and by group only")
    if group == GROUP:
        from vllm.model_executor.layers.quantization.utils.int8_utils import per_token_group_quant_int8

        return lambda: per_token_group_quant_int8(x, GROUP)
    return lambda: ops.scaled_int8_quant(x)[:2]


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch": Provider(partial(torch_call, torch.int8), devices=("cpu", "cuda"), package="torch"),
    "torch.compile": Provider(partial(compiled_call, torch.int8), package="torch"),
    "vllm": Provider(_vllm, "vllm", package="vllm"),
}
