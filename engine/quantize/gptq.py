"""GPTQ: rounding whose errors are made up for by the weights that are not rounded yet.

With inputs x of a layer and H = Σ x xᵀ, the output changes by tr(E H Eᵀ) when the weights change by E. Columns are
rounded one after another; the error of column j, over [H⁻¹]'s Cholesky factor U, is taken out of the columns behind it:

    E_j = (w_j - q_j · scale) / U_jj,    w_i -= E_j · U_ji   for i > j

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022),
https://arxiv.org/abs/2210.17323, algorithm 1.
"""

import torch

from octavo.engine.quantize.rounding import as_codes, codes_of, int4_scale, round_to_nearest
from octavo.engine.quantize.settings import BLOCK, Settings

COLUMNS = 128
"""Columns between which errors are handed on at once; those behind them get theirs in one matrix product."""


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, settings: Settings, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a weight.

    Args:
        weight: `[N, K]`, fp32.
        hessian: `[K, K]`, fp32: the sum of its inputs' outer products.
        settings: the scheme; `act_order` says whether columns are rounded in the order of the Hessian's diagonal, the
            largest first, and `damp` what is added to it, in parts of its mean (more where that does not make it
            definite). Scales are those of the weights as they were; but int4 in order takes a group's once it is there.
            int4's are searched with errors weighted by the Hessian's diagonal.
        dtype: of int4's scales.

    Returns:
        codes and scales, as `round_to_nearest` does.

    Raises:
        ValueError: a Hessian that is not finite, or has no inverse.
    """
    n, k = weight.shape
    scheme = settings.scheme
    width = {"int4": settings.group_size, "fp8-block": BLOCK}.get(scheme, k)  # inputs that share a scale
    moving = scheme == "int4" and not settings.act_order
    importance = hessian.diagonal()
    if scheme == "int4":
        scales = int4_scale(weight.unflatten(1, (-1, width)), dtype, importance.unflatten(0, (-1, width))).squeeze(-1)
    else:
        scales = round_to_nearest(weight, settings, dtype)[1]
    wide = scales.repeat_interleave(BLOCK, 0) if scheme == "fp8-block" else scales.clone()  # [N, K / width]
    order = torch.arange(k, device=weight.device)
    if settings.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    w, factor = weight[:, order], _inverse_factor(hessian[order][:, order], settings.damp)
    q, groups = torch.empty_like(w), (order // width).tolist()
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        block, errors = w[:, start:end], torch.empty(n, end - start, device=w.device)
        rows = factor[start:end, start:end]
        diagonal = rows.diagonal().tolist()
        for j in range(end - start):
            column, group = start + j, groups[start + j]
            if moving and column % width == 0:
                of_group = importance[column : column + width]
                wide[:, group] = int4_scale(block[:, j : j + width], dtype, of_group).squeeze(-1)
            scale = wide[:, group].float()
            q[:, column] = codes_of(block[:, j], scale, scheme)
            errors[:, j] = (block[:, j] - q[:, column] * scale) / diagonal[j]
            block[:, j + 1 :].addr_(errors[:, j], rows[j, j + 1 :], alpha=-1)
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return as_codes(q[:, order.argsort()], scheme), wide if moving else scales


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
