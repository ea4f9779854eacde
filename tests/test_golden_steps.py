"""Optimizer steps of each recipe, and GPTQ, against independent oracles in tests/oracles/."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from tests.conftest import TRACK, random_model
from tests.oracles.gptq import gptq_codes
from tests.oracles.inputs import fill, hashed
from tests.oracles.optimizers import RECIPES, Optimizer
from tests.test_golden import SYSTEMS, System
from train_gpt import GPT, Progress, Run, Trainer

NUM_STEPS, VOCAB = 20_000, 320
# The recipe's layers, heads, features and optimizers, at a width of 128.
SMALL = {
    "MODEL_DIM": "128", "VOCAB_SIZE": str(VOCAB), "TRAIN_SEQ_LEN": "32", "EVAL_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "256", "MICRO_BATCH_TOKENS": "256", "MAX_WALLCLOCK_SECONDS": "0",
    "ITERATIONS": str(NUM_STEPS), "TTT_METHOD": "none", "EVAL_STRIDE": "0", "PRECISION": "fp32",
    "COMPILE": "0", "ATTENTION": "sdpa", "INIT": "default", "EMBED_INIT": "normal",
}  # fmt: skip


def small_trainer(recipe: str) -> Trainer:
    """A trainer of the recipe's model at a small width, its parameters filled by the fixed rule."""
    path = TRACK / recipe / "run.env"
    cfg = train_gpt.config_from_env({"RECIPE": str(path), **SMALL})
    run = Run(
        cfg=cfg, directory=Path(), rank=0, world_size=1, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip
    model = random_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fill(name, tuple(parameter.shape)))
    return Trainer(run, model)


def fixed_window(step: int) -> Tensor:
    """Ids (8, 33) of a step's batch."""
    place = (hashed(f"window {step}", 8 * 33) + 1) / 2
    return torch.from_numpy((place * VOCAB).astype(np.int64)).reshape(8, 33)


def gradients_of(model: GPT, window_BT: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean cross-entropy, which leave the model as it was."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits_NV = model.logits(window_BT[:, :-1]).flatten(0, 1)
    loss = F.cross_entropy(logits_NV, window_BT[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize(
    "first_step", [0, pytest.param(19_000, marks=pytest.mark.slow)]
)  # in the momentum's ramp, in the warmdown
@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.name in RECIPES], ids=lambda s: s.name)
def test_the_trainer_makes_the_published_optimizer_steps(system: System, first_step: int):
    trainer = small_trainer(system.recipe)
    trainer.progress = Progress(first_step)
    model = trainer.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    oracle = Optimizer(RECIPES[system.name], dict(start), num_steps=NUM_STEPS)
    for step in range(first_step, first_step + 2):
        window_BT = fixed_window(step)
        oracle.update(gradients_of(model, window_BT), step)
        trainer.step(window_BT)
        for name, parameter in model.named_parameters():
            update = parameter.detach() - start[name]
            expected = oracle.weights[name] - start[name]
            difference = ((update - expected).norm() / expected.norm()).item()
            # Rounding makes up to 1e-4: AdamW divides small gradients by their own size.
            assert difference < 5e-4, f"step {step}, {name}"


@pytest.mark.parametrize("num_dead", [0, 5])
def test_gptq_rounds_each_column_from_its_best_value(num_dead: int):
    weight_OI = torch.from_numpy(hashed("weight", 64 * 96)).reshape(64, 96).float()
    source_NI = torch.from_numpy(hashed("inputs", 400 * 96)).reshape(400, 96)
    mixing_II = torch.from_numpy(hashed("mixing", 96 * 96)).reshape(96, 96)
    inputs_NI = 0.02 * source_NI @ (torch.eye(96) + 0.3 * mixing_II)
    inputs_NI[:, 7 : 7 + num_dead] = 0
    hessian_II = inputs_NI.T @ inputs_NI / len(inputs_NI)
    step_O = 12.85 * weight_OI.std(dim=1) / 31
    code_LOI = train_gpt.gptq(
        weight_OI[None],
        train_gpt.factor_hessians(hessian_II[None].float()),
        step_O[None],
        torch.ones(1, 96),
        functools.partial(train_gpt.round_uniform, qmax=31),
    )
    expected_OI = gptq_codes(weight_OI, hessian_II, step_O, largest=31)
    plain_OI = (weight_OI / step_O[:, None]).round()
    assert (plain_OI != expected_OI).double().mean() > 0.2  # the inputs are correlated
    # float32 may fall to the other side of a tie, whose error later columns take over.
    assert (code_LOI[0] != expected_OI).double().mean() < 0.001
