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
    warmdown_steps: int = 0  # last steps, over which the learning rate falls linearly ...
    warmdown_frac: float = 0  # ... or last share of the run
    lowest_scale: float = 0  # factor of the learning rate in the end


RECIPES = {
    "naive_baseline": Recipe(
        matrix_lr=0.04, matrix_decay=0, scalar_lr=0.04, scalar_decay=0, token_lr=0.05,
        token_decay=0, beta2=0.95, momentum=(0.85, 0.95, 500), coefficients=CLASSIC,
        warmdown_steps=1200,
    ),
    "pr430_v1": Recipe(
        matrix_lr=0.02, matrix_decay=0.04, scalar_lr=0.02, scalar_decay=0.04, token_lr=0.03,
        token_decay=0.04, beta2=0.95, momentum=(0.92, 0.99, 1500), clip=0.3, coefficients=CLASSIC,
        warmdown_steps=3000,
    ),
    "pr457": Recipe(
        matrix_lr=0.04, matrix_decay=0, scalar_lr=0.04, scalar_decay=0.01, token_lr=0.05,
        token_decay=0.01, beta2=0.95, momentum=(0.85, 0.95, 500), coefficients=CLASSIC,
        warmdown_frac=1,
    ),
    "pr430_final": Recipe(
        matrix_lr=0.025, matrix_decay=0.04, scalar_lr=0.025, scalar_decay=0.04, token_lr=0.035,
        token_decay=0.04, beta2=0.95, momentum=(0.92, 0.99, 1500), clip=0.3, coefficients=CLASSIC,
        warmdown_steps=3500,
    ),
    "pr1460": Recipe(
        matrix_lr=0.02, matrix_decay=0.085, scalar_lr=0.02, scalar_decay=0.02, token_lr=0.03,
        token_decay=0.085, beta2=0.95, momentum=(0.92, 0.99, 1500), clip=0.3, row_norm=True,
        coefficients=CLASSIC, warmdown_frac=0.667,
    ),
    "pr2135": Recipe(
        matrix_lr=0.028, matrix_decay=0.095, scalar_lr=0.02, scalar_decay=0.02, token_lr=0.03,
        token_decay=0.085, beta2=0.99, momentum=(0.92, 0.97, 1500), clip=0.3, row_norm=True,
        coefficients=POLAR_EXPRESS, warmdown_frac=0.85, lowest_scale=0.1,
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


def lr_scale(recipe: Recipe, step: int, num_steps: int) -> float:
    """Factor of all learning rates at a step, from 0, of a run that the steps limit."""
    warmdown = recipe.warmdown_steps or recipe.warmdown_frac * num_steps
    return max(recipe.lowest_scale, min(1, (num_steps - step) / warmdown))


def muon(
    w: Tensor, gradient: Tensor, m: Tensor, recipe: Recipe, *, step: int, lr: float
) -> tuple[Tensor, Tensor]:
    """Weight and momentum of a matrix after step number `step` of the run, from 0."""
    first, last, ramp_steps = recipe.momentum
    momentum = first + (last - first) * min(step / ramp_steps, 1)
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
    updates: int, lr: float, decay: float, beta2: float,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Weight and moments after update number `updates` of them, from 1."""
    first = 0.9 * moments[0] + 0.1 * gradient
    second = beta2 * moments[1] + (1 - beta2) * gradient.square()
    unbiased = first / (1 - 0.9**updates)
    deviation = (second / (1 - beta2**updates)).sqrt()
    return w * (1 - lr * decay) - lr * unbiased / (deviation + 1e-8), (first, second)


class Optimizer:
    """Weights, their moments, and the steps of a recipe's run of `num_steps` steps."""

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor], num_steps: int):
        self.recipe, self.weights, self.num_steps, self.updates = recipe, weights, num_steps, 0
        self.moments = {
            name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()
        }

    def update(self, gradients: dict[str, Tensor], step: int) -> None:
        """Update all weights by the gradients of the mean loss, at a step of the run, from 0."""
        recipe, self.updates = self.recipe, self.updates + 1
        scale = lr_scale(recipe, step, self.num_steps)
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
                lr = recipe.matrix_lr * scale
                w, m = muon(w, g, moments[0], recipe, step=step, lr=lr)
                self.weights[name], self.moments[name] = w, (m, m)
            else:
                lr, decay = rates[group]
                self.weights[name], self.moments[name] = adamw(
                    w, g, moments, updates=self.updates, lr=lr * scale, decay=decay,
                    beta2=recipe.beta2,
                )  # fmt: skip
