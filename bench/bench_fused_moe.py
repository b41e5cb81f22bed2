"""A layer of experts: bound by the weights of the experts that tokens go to, by the tensor cores at many tokens.

octavo's time has the routing in it, from the router's logits; the others are given experts and weights. Rows are sorted
by expert inside the timing by all but the loop of cuBLAS calls, which would have to wait for it on the host. Weights of
8 or 4 bits, of shapes that have `bits`, are in `quantized_experts.py`.
"""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

import octavo
from octavo.bench import experts, quantized_experts
from octavo.bench.check import Requantized
from octavo.bench.harness import Inputs, Provider, Shape, Unsupported
from octavo.bench.providers import drawn

OP = "fused_moe"
DTYPES = (torch.bfloat16,)


def shapes() -> list[Shape]:
    return experts.layers() + quantized_experts.shapes()


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    fresh = drawn(dtype, device, generator)
    count, hidden, intermediate = shape["E"], shape["hidden"], shape["intermediate"]
    routing = experts.draw_routing(shape, shape["busy"], dtype, device, generator)
    routing["x"] = torch.randn(shape["T"], hidden, **fresh)
    if "bits" in shape:
        return routing | quantized_experts.draw(shape, dtype, device, generator)
    w1 = torch.empty(count, 2 * intermediate, hidden, device=device, dtype=dtype)
    w2 = torch.empty(count, hidden, intermediate, device=device, dtype=dtype)
    for weight in (*w1, *w2):
        weight.copy_(torch.randn(weight.shape, **fresh) / weight.shape[1] ** 0.5)
    return {"w1": w1, "w2": w2, **routing}


def exact(inputs: Inputs) -> torch.Tensor | Requantized:
    """What lies between the two products is not rounded, but where 8 bits are what is multiplied."""
    if "bits" in inputs:
        values = _exact(inputs, lambda expert, rows: quantized_experts.layer(inputs, expert, rows))
        rounded = _exact(inputs, lambda expert, rows: quantized_experts.layer(inputs, expert, rows, rounded=True))
        return Requantized(values, (rounded - values).square().mean().sqrt().item())
    w1, w2 = inputs["w1"], inputs["w2"]

    def layer(expert: int, rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ w1[expert].to(rows.dtype).t()).chunk(2, -1)
        return (gate / (1 + torch.exp(-gate)) * up) @ w2[expert].to(rows.dtype).t()

    return _exact(inputs, layer)


def _exact(inputs: Inputs, layer: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x, weights = inputs["x"], inputs["topk_weights"]
    order, ends = experts.by_expert(inputs["topk_ids"], len(inputs["w1"]))
    y = experts.exact_products(x[order // weights.shape[1]], ends, layer, x.shape[1])
    rows = torch.empty_like(y)
    rows[order] = y
    return (rows.view(*weights.shape, -1) * weights[..., None]).sum(1)


def flops(shape: Shape) -> int:
    """Three products of a token and each of its experts."""
    return 2 * 3 * shape["T"] * shape["top_k"] * shape["hidden"] * shape["intermediate"]


def bytes_moved(shape: Shape, dtype: torch.dtype) -> int:
    """The weights of the experts that get a token, on average over the draws; tokens in and out, logits."""
    weights = experts.hit(shape) * 3 * shape["hidden"] * shape["intermediate"]
    weight_bytes = quantized_experts.weight_bytes(shape) if "bits" in shape else dtype.itemsize
    return round(weight_bytes * weights + dtype.itemsize * shape["T"] * (2 * shape["hidden"] + shape["E"]))


def _weights(inputs: Inputs) -> Inputs:
    return quantized_experts.octavo_weights(inputs) if "bits" in inputs else {n: inputs[n] for n in ("w1", "w2")}


def _wide_only(inputs: Inputs) -> None:
    if "bits" in inputs:
        raise Unsupported("measured with weights of x's dtype")


def _octavo(inputs: Inputs) -> Callable[[], torch.Tensor]:
    x, logits, top_k, weights = inputs["x"], inputs["logits"], inputs["topk_ids"].shape[1], _weights(inputs)

    def call() -> torch.Tensor:
        topk_weights, topk_ids = octavo.moe_route(logits, top_k)
        return octavo.fused_moe(x, topk_weights=topk_weights, topk_ids=topk_ids, **weights)

    return call


def _routed(inputs: Inputs) -> Callable[[], torch.Tensor]:
    args = {name: inputs[name] for name in ("x", "topk_weights", "topk_ids")} | _weights(inputs)
    return lambda: octavo.fused_moe(**args)


def _separate(inputs: Inputs) -> Callable[[], torch.Tensor]:
    _wide_only(inputs)
    x, w1, w2, logits = (inputs[name] for name in ("x", "w1", "w2", "logits"))
    top_k = inputs["topk_ids"].shape[1]

    def call() -> torch.Tensor:
        weights, ids = octavo.moe_route(logits, top_k)
        rows, offsets, positions = octavo.moe_permute(x, ids, len(w1))
        hidden = octavo.silu_and_mul(octavo.grouped_linear(rows, w1, offsets))
        return octavo.moe_unpermute(octavo.grouped_linear(hidden, w2, offsets), positions, weights)

    return call


def _grouped_mm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    _wide_only(inputs)
    x, w1, w2, weights, ids = (inputs[name] for name in ("x", "w1", "w2", "topk_weights", "topk_ids"))

    def call() -> torch.Tensor:
        order, ends = experts.by_expert(ids, len(w1))
        gate, up = F.grouped_mm(x[order // ids.shape[1]], w1.mT, offs=ends).chunk(2, -1)
        return experts.combined(F.grouped_mm(F.silu(gate) * up, w2.mT, offs=ends), order, weights)

    return call


def _loop(inputs: Inputs) -> Callable[[], torch.Tensor]:
    _wide_only(inputs)
    x, w1, w2, weights, ids = (inputs[name] for name in ("x", "w1", "w2", "topk_weights", "topk_ids"))
    order, ends = experts.by_expert(ids, len(w1))
    until = ends.tolist()
    parts = [(e, a, b) for e, (a, b) in enumerate(pairwise([0, *until])) if a < b]

    def call() -> torch.Tensor:
        rows = x[order // ids.shape[1]]
        y = torch.empty_like(rows)
        for expert, start, end in parts:
            gate, up = (rows[start:end] @ w1[expert].t()).chunk(2, -1)
            torch.mm(F.silu(gate) * up, w2[expert].t(), out=y[start:end])
        return experts.combined(y, order, weights)

    return call


def _tuned_by_neighbour(count: int, intermediate: int) -> None:
    """Where vLLM has a tuned file for an H200 and none for this GPU of Hopper, it gets that one under its name."""
    import vllm.envs as envs
    from vllm.model_executor.layers.fused_moe import fused_moe

    if torch.cuda.get_device_capability() != (9, 0) or not envs.VLLM_TUNED_CONFIG_FOLDER:
        return
    name = fused_moe.get_config_file_name(count, intermediate, None)
    shipped, folder = Path(fused_moe.__file__).parent / "configs", Path(envs.VLLM_TUNED_CONFIG_FOLDER)
    neighbour = shipped / f"E={count},N={intermediate},device_name=NVIDIA_H200.json"
    if neighbour.exists() and not (shipped / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(neighbour, folder / name)


def _vllm(inputs: Inputs) -> Callable[[], torch.Tensor]:
    if "bits" in inputs:
        return quantized_experts.vllm(inputs)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe import fused_experts

    args = [inputs[name] for name in ("x", "w1", "w2", "topk_weights", "topk_ids")]
    _tuned_by_neighbour(len(inputs["w1"]), inputs["w2"].shape[2])
    config = VllmConfig()

    def call() -> torch.Tensor:
        with set_current_vllm_config(config):
            return fused_experts(*args)

    return call


_GIVEN = "routing not included"

PROVIDERS = {
    "octavo": Provider(_octavo, devices=("cpu", "cuda"), package="octavo"),
    "torch (grouped_mm)": Provider(_grouped_mm, devices=("cpu", "cuda"), package="torch", note=_GIVEN),
    "torch (loop)": Provider(_loop, package="torch", note=f"{_GIVEN}, rows of each expert known beforehand"),
    "octavo, separate": Provider(_separate, devices=("cpu", "cuda"), package="octavo"),
    "octavo, routed": Provider(_routed, package="octavo", note=_GIVEN),
    "vllm": Provider(_vllm, "vllm", package="vllm", note=f"{_GIVEN}, an H200's tuned file where an H100 has none"),
    "vllm marlin": Provider(quantized_experts.marlin, "vllm", package="vllm", note=_GIVEN),
    "vllm cutlass": Provider(quantized_experts.cutlass, "vllm", package="vllm", note=_GIVEN),
}
