"""How a weight becomes integers when its quantized inputs are known: least-squares repair, GPTQ, bias correction.

X [in, n] are a layer's inputs, Q = Q(X) the same after activation quantization; both matter only by their moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffpress.targets import FULL_RANGE


def damped(gram: Tensor, share: float) -> Tensor:
    """G + share mean(diag G) I; a dead channel, G_ii = 0, gets G_ii = 1, so that nothing reaches it."""
    diagonal = gram.diagonal()
    extra = torch.where(diagonal > 0, share * diagonal.mean(), torch.ones_like(diagonal))
    return gram + torch.diag(extra)


def refit_weight(weight: Tensor, gram: Tensor, cross: Tensor, *, ridge: float = 0.01) -> Tensor:
    """W' = argmin_V ||W X - V Q||^2 / n + l ||V - W||^2 = W (C + l I) (G + l I)^-1, l = ridge mean(diag G).

    W: [out, in]; G = Q Q^T / n, C = X Q^T / n: [in, in]. W' = W where Q = X, and in dead channels. Float64 inside;
    dtype of W.
    """
    normal = damped(gram.double(), ridge)
    right = weight.double() @ (cross.double() + normal - gram.double())  # [out, in]
    return torch.cholesky_solve(right.T, torch.linalg.cholesky(normal)).T.to(weight.dtype)


def gptq_codes(
    weight: Tensor, gram: Tensor, scale: Tensor, *, limit: int = FULL_RANGE, damping: float = 0.01, block: int = 128
) -> Tensor:
    """Codes q that keep ||(W - s q) Q||^2 small, |q| <= ``limit``: round one column, let those left make up for it.

    e_i = (w_i - q_i) / U_ii, w_j -= e_i U_ij for j > i, U^T U = (G + damping)^-1 (GPTQ, Frantar et al. 2022,
    algorithm 1), columns in the order of falling G_ii, updates behind ``block`` columns done at once. W: [out, in];
    G: [in, in]; s: [out], or [out, in] where channels of an output differ. Float64 inside; returns int8 [out, in].
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    hessian = damped(gram.double(), damping)[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    steps = (scale if scale.ndim == 2 else scale[:, None]).double().expand(weight.shape)[:, order]
    left = weight.double()[:, order]  # [out, in]
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], block):
        part = slice(start, start + block)
        inner, behind = upper[part, part], upper[part, start + block :]
        columns, errors = left[:, part].clone(), torch.empty_like(left[:, part])
        for i in range(columns.shape[1]):
            step = steps[:, start + i]
            rounded = (columns[:, i] / step).round().clamp(-limit, limit)
            codes[:, start + i] = rounded
            errors[:, i] = (columns[:, i] - rounded * step) / inner[i, i]
            columns[:, i:] -= errors[:, i, None] * inner[i, i:]
        left[:, start + block :] -= errors @ behind
    return codes[:, order.argsort()].to(torch.int8)


def mean_error(weight: Tensor, approximation: Tensor, mean_x: Tensor, mean_q: Tensor) -> Tensor:
    """W E[x] - V E[Q(x)]: what the bias lacks for the outputs to keep their mean. W, V: [out, in]; means: [in]."""
    return (weight.double() @ mean_x.double() - approximation.double() @ mean_q.double()).to(weight.dtype)
