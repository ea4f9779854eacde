"""The script's model of each recipe against an independent oracle of the published system.

Full size, float32, on a CPU. Parameters and text are fixed functions of names and places
(tests/oracles/inputs.py). Each oracle is one page of formulas in tests/oracles/, and the numbers
below were computed once by it, in float64: they hold the oracle itself in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import train_gpt
from tests.conftest import TRACK, random_model
from tests.oracles import naive_baseline, pr430_final, pr430_v1, pr457, pr1460, pr2135
from tests.oracles.inputs import fill_all, fixed_text
from train_gpt import GPT, Config

# Row, position and piece of the eight logits that are stored one by one: first positions, the
# positions around document starts, the last ones.
PLACES = [
    (0, 0, 5), (0, 36, 910), (0, 38, 203), (0, 100, 77), (0, 127, 640), (1, 1, 318), (1, 66, 1001),
    (1, 127, 444),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Logits of a system: their sum, the sum of their absolute values, and those at PLACES."""

    total: float
    absolute: float
    values: tuple[float, ...]
    looped: bool = True  # as in evaluation; a system without loops has one form


@dataclass(frozen=True, kw_only=True)
class System:
    """A recipe, the oracle of the system that it describes, and what the oracle computes."""

    name: str
    recipe: str
    logits: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    num_parameters: int
    golden: tuple[Golden, ...]
    # Changes of the recipe, each of which gives the same logits.
    knobs: tuple[dict[str, str], ...] = ({},)

    def oracle(self, params: dict[str, Tensor], ids_BT: Tensor, looped: bool) -> Tensor:
        """Logits by the formulas, (B, T, V)."""
        has_loops = len(self.golden) > 1
        return self.logits(params, ids_BT, **({"looped": looped} if has_loops else {}))


NAIVE = System(
    name="naive_baseline",
    recipe="2026-03-17_NaiveBaseline",
    logits=naive_baseline.logits,
    shapes=naive_baseline.SHAPES,
    num_parameters=17_059_912,
    golden=(
        Golden(
            total=8640.20,
            absolute=1814476.98,
            values=(14.99145, -5.55791, 2.98528, -4.50481, -1.49912, 5.49461, 1.56663, -10.54548),
        ),
    ),
)
TRIGRAM = System(
    name="pr430_v1",
    recipe="2026-03-22_TrigramHash_XSA_TTT",
    logits=pr430_v1.logits,
    shapes=pr430_v1.SHAPES,
    num_parameters=25_402_449,
    golden=(
        Golden(
            total=11939.33,
            absolute=1817456.48,
            values=(5.85069, 4.30505, 2.89040, -8.56695, 3.32803, 6.03584, 9.33147, -1.82363),
        ),
    ),
)
POLYNOMIAL = System(
    name="pr430_v1_polynomial",
    recipe=TRIGRAM.recipe,
    logits=functools.partial(pr430_v1.logits, polynomial=True),
    shapes=pr430_v1.SHAPES,
    num_parameters=25_402_449,
    knobs=({"TRIGRAM_HASH": "polynomial"},),
    golden=(
        Golden(
            total=3816.02,
            absolute=1820532.80,
            values=(3.09211, 4.00679, -2.56468, -11.29901, 5.61299, 0.90504, 7.26513, -10.18410),
        ),
    ),
)
VRL = System(
    name="pr457",
    recipe="2026-03-22_11L_XSA_VRL_SWA_Seq4096",
    logits=pr457.logits,
    shapes=pr457.SHAPES,
    num_parameters=20_735_074,
    golden=(
        Golden(
            total=6639.20,
            absolute=1817710.23,
            values=(9.26683, -8.13735, 0.16385, -11.12432, 4.63587, 8.06941, 17.28944, -6.23138),
        ),
    ),
)
GATED = System(
    name="pr430_final",
    recipe="2026-03-26_GatedAttn_ValueResid_XSA6_HedgeMixer_LegalTTT",
    logits=pr430_final.logits,
    shapes=pr430_final.SHAPES,
    num_parameters=33_055_935,
    # The text is twice as long as this training context, as the source's was as its table's.
    knobs=(
        {},
        {
            "ROPE_BASE": "10000",
            "ROPE_SCALING": "ntk",
            "TRAIN_SEQ_LEN": "64",
            "EVAL_SEQ_LEN": "128",
        },
    ),
    golden=(
        Golden(
            total=16040.69,
            absolute=1820549.77,
            values=(5.80888, -5.72644, -6.56684, -13.67215, 1.05792, 8.81135, 18.08238, -1.50747),
        ),
    ),
)
SP8192 = System(
    name="pr1460",
    recipe="2026-04-08_SP8192_TTT_HashEmbedding",
    logits=pr1460.logits,
    shapes=pr1460.SHAPES,
    num_parameters=35_943_512,
    golden=(
        Golden(
            total=31920.29,
            absolute=14483849.00,
            values=(13.29530, -5.76449, -0.68252, 6.69281, -9.22907, 11.56922, -6.18873, -6.64416),
        ),
        Golden(
            total=20946.14,
            absolute=14482836.92,
            values=(11.77748, -6.54434, -2.94817, 5.59455, -9.54891, 10.14084, -6.04634, -6.36314),
            looped=False,
        ),
    ),
)
FRONTIER = System(
    name="pr2135",
    recipe="2026-05-01_Frontier",
    logits=pr2135.logits,
    shapes=pr2135.SHAPES,
    num_parameters=35_945_673,
    # The source scores windows longer than its training context with the same rotary base.
    knobs=({}, {"TRAIN_SEQ_LEN": "64", "EVAL_SEQ_LEN": "128"}),
    golden=(
        Golden(
            total=1562.38,
            absolute=14418745.78,
            values=(8.42379, -7.23890, -0.04352, -0.82165, -5.72793, 9.15269, -4.39141, -1.07843),
        ),
        Golden(
            total=-10828.69,
            absolute=14425317.54,
            values=(8.68182, -9.29101, -3.72403, -3.02448, -7.25466, 8.24193, -1.94256, -1.91257),
            looped=False,
        ),
    ),
)
SYSTEMS = [NAIVE, TRIGRAM, POLYNOMIAL, VRL, GATED, SP8192, FRONTIER]


# --- The two sides -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A system with its parameters, the text, and the oracle's logits for each `Golden`."""

    system: System
    params: dict[str, Tensor]
    ids_BT: Tensor
    logits_BTV: list[Tensor]


@pytest.fixture(scope="module", params=SYSTEMS, ids=lambda system: system.name)
def filled(request: pytest.FixtureRequest) -> Filled:
    """Each system in turn; tests of one system share the oracle's work."""
    torch.set_num_threads(1)
    system: System = request.param
    params = fill_all(system.shapes)
    ids_BT = fixed_text(params["tok_emb.weight"].shape[0])
    logits_BTV = [system.oracle(params, ids_BT, golden.looped) for golden in system.golden]
    return Filled(system=system, params=params, ids_BT=ids_BT, logits_BTV=logits_BTV)


def recipe_config(system: System, knobs: dict[str, str]) -> Config:
    """The recipe's Config with some knobs changed, for float32 on a CPU.

    Initial values are overwritten, so they are those that take the least time.
    """
    fixed = {
        "RECIPE": str(TRACK / system.recipe / "run.env"), "MODE": "describe", "PRECISION": "fp32",
        "COMPILE": "0", "ATTENTION": "sdpa", "INIT": "default", "EMBED_INIT": "normal",
    }  # fmt: skip
    return train_gpt.config_from_env(fixed | knobs)


@torch.no_grad()
def filled_model(cfg: Config, params: dict[str, Tensor]) -> GPT:
    """The script's model with these parameters, which must be exactly its own."""
    model = random_model(cfg)
    own = dict(model.named_parameters())
    assert {name: p.shape for name, p in own.items()} == {n: p.shape for n, p in params.items()}
    for name, parameter in own.items():
        parameter.copy_(params[name])
    return model


# --- Tests ---------------------------------------------------------------------------------------


def test_the_oracle_has_the_published_number_of_parameters(filled: Filled):
    shapes = filled.system.shapes.values()
    assert sum(math.prod(shape) for shape in shapes) == filled.system.num_parameters


def test_the_oracle_reproduces_the_stored_numbers(filled: Filled):
    for golden, logits_BTV in zip(filled.system.golden, filled.logits_BTV, strict=True):
        z_BTV = logits_BTV.double()
        # Errors of single logits, up to 2e-5, cancel out in the means.
        assert z_BTV.mean().item() == pytest.approx(golden.total / z_BTV.numel(), abs=1e-6)
        assert z_BTV.abs().mean().item() == pytest.approx(golden.absolute / z_BTV.numel(), abs=1e-6)
        assert [z_BTV[place].item() for place in PLACES] == pytest.approx(golden.values, abs=1e-4)


@torch.no_grad()
def test_the_script_computes_what_the_oracle_does(filled: Filled):
    for knobs in filled.system.knobs:
        model = filled_model(recipe_config(filled.system, knobs), filled.params)
        assert sum(p.numel() for p in model.parameters()) == filled.system.num_parameters
        for golden, expected_BTV in zip(filled.system.golden, filled.logits_BTV, strict=True):
            model.schedule = model.schedules[-1 if golden.looped else 0]
            difference = (model.logits(filled.ids_BT) - expected_BTV).abs().max().item()
            # Different orders of addition make up to 2e-5, in logits of up to 30.
            assert difference < 1e-4, f"{knobs}, looped={golden.looped}"
