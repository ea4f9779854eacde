"""The optimizer steps of the published systems: clip, Muon of matrices, AdamW of the rest.

Formulas are those of the descriptions, in the dtype of the weights. Momentum is kept in that dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSIC = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [  # openai/parameter-golf#1344
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of one system: learning rates before their schedule, decoupled weight decays."""

    matrix_lr: float
    matrix_decay: float
    scalar_lr: float
    scalar_decay: float
    token_lr: float
    token_decay: float
    beta2: float
    momentum: tuple[float, float, int]  # at step 0, at the end of the ramp, steps of the ramp
    clip: float = math.inf  # of the norm over all parameters
    row_norm: bool = False  # MuonEq-R, arXiv 2603.28254
    coefficients: list[tuple[float, float, float]]
    decays_from_the_start: bool = False  # the learning rate, linearly to 0 over the whole run


RECIPES = {
    "naive_baseline": Recipe(
        matrix_lr=0.04, matrix_decay=0, scalar_lr=0.04, scalar_decay=0, token_lr=0.05,
        token_decay=0, beta2=0.95, momentum=(0.85, 0.95, 500), coefficients=CLASSIC,
    ),
    "pr430_v1": Recipe(
        matrix_lr=0.02, matrix_decay=0.04, scalar_lr=0.02, scalar_decay=0.04, token_lr=0.03,
        token_decay=0.04, beta2=0.95, momentum=(0.92, 0.99, 1500), clip=0.3, coefficients=CLASSIC,
    ),
    "pr457": Recipe(
        matrix_lr=0.04, matrix_decay=0, scalar_lr=0.04, scalar_decay=0.01, token_lr=0.05,
        token_decay=0.01, beta2=0.95, momentum=(0.85, 0.95, 500), coefficients=CLASSIC,
        decays_from_the_start=True,
    ),
    "pr430_final": Recipe(
        matrix_lr=0.025, matrix_decay=0.04, scalar_lr=0.025, scalar_decay=0.04, token_lr=0.035,
        token_decay=0.04, beta2=0.95, momentum=(0.92, 0.99, 1500), clip=0.3, coefficients=CLASSIC,
    ),
    "pr1460": Recipe(
        matrix_lr=0.02, matrix_decay=0.085, scalar_lr=0.02, scalar_decay=0.02, token_lr=0.03,
        token_decay=0.085, beta2=0.95, momentum=(0.92, 0.99, 1500), clip=0.3, row_norm=True,
        coefficients=CLASSIC,
    ),
    "pr2135": Recipe(
        matrix_lr=0.028, matrix_decay=0.095, scalar_lr=0.02, scalar_decay=0.02, token_lr=0.03,
        token_decay=0.085, beta2=0.99, momentum=(0.92, 0.97, 1500), clip=0.3, row_norm=True,
        coefficients=POLAR_EXPRESS,
    ),
}  # fmt: skip


def group_of(name: str) -> str:
    """token, matrix, cap or scalar: what trains a parameter.

    The projections of hashed and value embeddings count as matrices. That is so in the base of
    openai/parameter-golf#430's first version; the base of its last one has them among the scalars.
    """
    if name in ("tok_emb.weight", "ve_table.weight") or name.endswith(".table.weight"):
        return "token"
    matrices = ("c_q", "c_k", "c_v", "proj", "fc", "ve_proj")
    if name.removesuffix(".weight").split(".")[-1] in matrices:
        return "matrix"
    return "cap" if name == "caps" else "scalar"


def muon(
    w: Tensor, gradient: Tensor, m: Tensor, recipe: Recipe, *, step: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Weight and momentum of a matrix after step number `step`, from 0."""
    first, last, ramp_steps = recipe.momentum
    momentum = first + (last - first) * min(step / ramp_steps, 1)
    lr = recipe.matrix_lr * scale
    m = momentum * m + gradient
    u = gradient + momentum * m  # Nesterov
    if recipe.row_norm:
        u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-7)
    x = u / (u.norm() + 1e-7)
    rows, columns = x.shape
    if rows > columns:
        x = x.T
    for a, b, c in recipe.coefficients:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    if rows > columns:
        x = x.T
    w = w * (1 - lr * recipe.matrix_decay)
    return w - lr * math.sqrt(max(1, rows / columns)) * x, m


def adamw(
    w: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], *,
    step: int, lr: float, decay: float, beta2: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Weight and moments after step number `step`, from 0."""
    first = 0.9 * moments[0] + 0.1 * gradient
    second = beta2 * moments[1] + (1 - beta2) * gradient.square()
    unbiased = first / (1 - 0.9 ** (step + 1))
    deviation = (second / (1 - beta2 ** (step + 1))).sqrt()
    return w * (1 - lr * decay) - lr * unbiased / (deviation + 1e-8), (first, second)


class Optimizer:
    """Weights, their moments, and the steps of a recipe's run of `num_steps` steps."""

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor], num_steps: int):
        self.recipe, self.weights, self.num_steps, self.step_index = recipe, weights, num_steps, 0
        self.moments = {
            name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()
        }

    def step(self, gradients: dict[str, Tensor]) -> None:
        """Update all weights by the gradients of the mean loss."""
        recipe, step = self.recipe, self.step_index
        scale = 1 - step / self.num_steps if recipe.decays_from_the_start else 1.0
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        clip = min(1, recipe.clip / norm)
        rates = {
            "token": (recipe.token_lr, recipe.token_decay),
            "scalar": (recipe.scalar_lr, recipe.scalar_decay),
            "cap": (recipe.scalar_lr, 0.0),
        }
        for name, w in self.weights.items():
            g, moments, group = clip * gradients[name], self.moments[name], group_of(name)
            if group == "matrix":
                w, m = muon(w, g, moments[0], recipe, step=step, scale=scale)
                self.weights[name], self.moments[name] = w, (m, m)
            else:
                lr, decay = rates[group]
                self.weights[name], self.moments[name] = adamw(
                    w, g, moments, step=step, lr=lr * scale, decay=decay, beta2=recipe.beta2
                )
        self.step_index += 1
