"""GPTQ: int4 whose rounding errors are made up for by the weights that are not rounded yet.

With inputs x of a layer and H = Σ x xᵀ, the output changes by tr(E H Eᵀ) when the weights change by E. Columns are
rounded one after another; the error of column j, over [H⁻¹]'s Cholesky factor U, is taken out of the columns behind it:

    E_j = (w_j - q_j · scale) / U_jj,    w_i -= E_j · U_ji   for i > j

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022),
https://arxiv.org/abs/2210.17323, algorithm 1.
"""

import torch

from octavo.engine.quantize.rounding import int4_round, int4_scale

COLUMNS = 128
"""Columns between which errors are handed on at once; those behind them get theirs in one matrix product."""


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int, act_order: bool, damp: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight to int4.

    Args:
        weight: `[N, K]`, fp32.
        hessian: `[K, K]`, fp32: the sum of its inputs' outer products.
        group_size: inputs that share a scale, a divisor of K and of 128.
        act_order: whether columns are rounded in the order of the Hessian's diagonal, the largest first. Scales are
            then those of the weights as they were (static groups).
        damp: what is added to the diagonal, in parts of its mean; more where that does not make it definite.
        dtype: of the scales.

    Returns:
        codes `[N, K]` int8, -8 to 7, and scales `[N, K / group_size]`.

    Raises:
        ValueError: a Hessian that is not finite, or has no inverse.
    """
    n, k = weight.shape
    w = weight.clone()
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else None
    fixed = int4_scale(w.unflatten(1, (-1, group_size)), dtype).squeeze(-1) if act_order else None
    if order is not None:
        w, hessian = w[:, order], hessian[order][:, order]
    factor = _inverse_factor(hessian, damp)
    q, scales = torch.empty_like(w), []
    group_of = (torch.arange(k) if order is None else order.cpu()) // group_size
    groups = group_of.tolist()
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        block, errors = w[:, start:end], torch.empty(n, end - start, device=w.device)
        rows = factor[start:end, start:end]
        diagonal = rows.diagonal().tolist()
        for j in range(end - start):
            column = start + j
            if fixed is not None:
                scale = fixed[:, groups[column]]
            elif column % group_size == 0:
                scale = int4_scale(block[:, j : j + group_size], dtype).squeeze(-1)
                scales.append(scale)
            q[:, column] = int4_round(block[:, j], scale)
            errors[:, j] = (block[:, j] - q[:, column] * scale.float()) / diagonal[j]
            block[:, j + 1 :].addr_(errors[:, j], rows[j, j + 1 :], alpha=-1)
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    if order is not None and fixed is not None:
        return q[:, order.argsort()].to(torch.int8), fixed
    return q.to(torch.int8), torch.stack(scales, 1)


def _inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """U, upper triangular, with Uᵀ U = (H + damp · mean(diag H) · I)⁻¹."""
    mean = hessian.diagonal().mean().item()
    if not torch.isfinite(hessian.diagonal()).all():
        raise ValueError("the layer's inputs are not finite in calibration: choose another dtype or calibration text")
    while damp <= 1:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean if mean > 0 else 1.0)  # inputs that are all 0 leave rounding to nearest
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damp *= 10
    raise ValueError(f"damp: the Hessian of {hessian.shape[0]} inputs has no inverse even with {damp / 10:g}")
