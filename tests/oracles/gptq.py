"""GPTQ by its definition instead of its recursion.

Sources: arXiv 2210.17323, openai/parameter-golf#1394.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_codes(weight_OI: Tensor, hessian_II: Tensor, step_O: Tensor, largest: int) -> Tensor:
    """Integer codes (O, I) in float64; a weight is its code times the step of its row.

    Columns are rounded one by one, in the order of falling diagonal of the Hessian. Before a column
    is rounded, it takes the value that minimizes the error (W - Q) H (W - Q)^T, given the columns
    that are rounded already and all others free. H is damped by 1 % of its mean diagonal. Columns
    whose input is always zero count as the average of the others there, and their codes are zero.
    """
    w, h, step_O = weight_OI.double().clone(), hessian_II.double().clone(), step_O.double()
    dead = h.diagonal() == 0
    w[:, dead] = 0
    h.diagonal()[dead] = h.diagonal()[~dead].mean()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    order = h.diagonal().argsort(descending=True)
    code, error = torch.zeros_like(w), torch.zeros_like(w)
    for count, column in enumerate(order):
        rounded, free = order[:count], order[count:]
        # The gradient by the free errors is zero: error_free H_ff + error_rounded H_rf = 0.
        pull = error[:, rounded] @ h[rounded][:, free]
        best = w[:, column] + torch.linalg.solve(h[free][:, free], pull, left=False)[:, 0]
        code[:, column] = (best / step_O).round().clamp(-largest, largest)
        error[:, column] = w[:, column] - code[:, column] * step_O
    return code
