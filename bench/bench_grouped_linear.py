"""Products by expert of sorted rows: bound by the weights of the experts that have rows, or by the tensor cores."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

import octavo
from octavo.bench import experts
from octavo.bench.harness import Inputs, Provider, Shape
from octavo.bench.providers import drawn, flashinfer_workspace

OP = "grouped_linear"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    """Gate and up of the layers of experts, for so many tokens."""
    return [shape for shape in experts.layers() if shape["busy"] == shape["E"]]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    fresh = drawn(dtype, device, generator)
    count, hidden, top_k = shape["E"], shape["hidden"], shape["top_k"]
    weight = torch.empty(count, 2 * shape["intermediate"], hidden, device=device, dtype=dtype)
    for of_expert in weight:
        of_expert.copy_(torch.randn(of_expert.shape, **fresh) / hidden**0.5)
    ids = experts.draw_routing(shape, shape["busy"], dtype, device, generator)["topk_ids"]
    _, ends = experts.by_expert(ids, count)
    return {"x": torch.randn(shape["T"] * top_k, hidden, **fresh), "weight": weight, "offsets": F.pad(ends, (1, 0))}


def exact(inputs: Inputs) -> torch.Tensor:
    weight = inputs["weight"]

    def product(expert: int, rows: torch.Tensor) -> torch.Tensor:
        return rows @ weight[expert].to(rows.dtype).t()

    return experts.exact_products(inputs["x"], inputs["offsets"][1:], product, weight.shape[1])


def flops(shape: Shape) -> int:
    return 2 * 2 * shape["T"] * shape["top_k"] * shape["hidden"] * shape["intermediate"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """The weights of the experts that have rows, on average over the draws; rows in and out; offsets."""
    rows, outputs = shape["T"] * shape["top_k"], 2 * shape["intermediate"]
    numbers = experts.hit(shape) * outputs * shape["hidden"] + rows * (shape["hidden"] + outputs)
    return round(dtype.itemsize * numbers) + 4 * (shape["E"] + 1)


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight, offsets = inputs["x"], inputs["weight"], inputs["offsets"]
    return lambda: octavo.grouped_linear(x, weight, offsets)


def _grouped_mm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight, ends = inputs["x"], inputs["weight"], inputs["offsets"][1:]
    return lambda: F.grouped_mm(x, weight.mT, offs=ends)


def _loop(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, weight, until = inputs["x"], inputs["weight"], inputs["offsets"].tolist()
    parts = [(e, a, b) for e, (a, b) in enumerate(pairwise(until)) if a < b]
    out = x.new_empty(x.shape[0], weight.shape[1])

    def call() -> torch.Tensor:
        for expert, start, end in parts:
            torch.mm(x[start:end], weight[expert].t(), out=out[start:end])
        return out

    return call


def _flashinfer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    from flashinfer.gemm import SegmentGEMMWrapper

    x, weight, offsets = inputs["x"], inputs["weight"], inputs["offsets"].long()
    wrapper = SegmentGEMMWrapper(flashinfer_workspace(x.device))
    return lambda: wrapper.run(x, weight, len(weight), True, seg_indptr=offsets)


PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (grouped_mm)": Provider(_grouped_mm, devices=("cpu", "cuda"), package="torch"),
    "torch (loop)": Provider(_loop, package="torch", note="rows of each expert known beforehand"),
    "flashinfer": Provider(_flashinfer, "flashinfer", package="flashinfer-python"),
}
