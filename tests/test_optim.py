"""Optimizers against plain ones, schedules against closed forms, averages against brute force."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import train_gpt
from tests.conftest import MakeRun, random_model, tiny_config
from train_gpt import (
    Config,
    Muon,
    Progress,
    Run,
    Trainer,
    WeightAverager,
    lr_scale,
    momentum_at,
    newton_schulz_coefficients,
    normalize_rows,
    orthogonalize,
    parameter_roles,
)

# As published; the script's own table is not used as an oracle.
CLASSIC = (3.4445, -4.7750, 2.0315)
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal n x n matrix in float64."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


def with_singular_values(rows: int, columns: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix rows x columns with these singular values, and its left and right vectors."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    k = min(rows, columns)
    left = random_orthogonal(rows, generator)[:, :k]
    right = random_orthogonal(columns, generator)[:, :k]
    return left @ values.diag() @ right.T, left, right


SHAPES = [(16, 16), (12, 30), (30, 12), (1, 9), (9, 1)]
ITERATIONS = [("classic", 5), ("classic", 1), ("classic", 7), ("polar", 5), ("polar", 2)]


# --- Orthogonalization ---------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("kind", "num_steps"), ITERATIONS)
def test_each_iteration_applies_its_polynomial_to_the_singular_values(
    kind: str, num_steps: int, rows: int, columns: int
):
    values = torch.linspace(0.1, 3.0, min(rows, columns), dtype=torch.float64)
    g, left, right = with_singular_values(rows, columns, values)
    x = orthogonalize(g[None], newton_schulz_coefficients(kind, num_steps), torch.float64)[0]
    s = values / (values.norm() + 1e-7)  # the Frobenius norm is that of the singular values
    for a, b, c in (POLAR if kind == "polar" else [CLASSIC] * num_steps)[:num_steps]:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(x, left @ s.diag() @ right.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "dtype", "low", "high"),
    [
        ("classic", torch.float32, 0.68, 1.21),
        ("classic", torch.bfloat16, 0.6, 1.3),  # products of bf16 numbers add some per cent
        ("polar", torch.float32, 0.85, 1.15),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (32, 96), (96, 32)])
def test_singular_values_come_near_1_and_the_vectors_stay(
    kind: str, dtype: torch.dtype, low: float, high: float, *, rows: int, columns: int
):
    values = torch.linspace(0.05, 1.0, min(rows, columns), dtype=torch.float64)
    g, left, right = with_singular_values(rows, columns, values)
    x = orthogonalize(g[None].float(), newton_schulz_coefficients(kind, 5), dtype)[0]
    assert x.dtype == dtype and x.shape == (rows, columns)
    singular = torch.linalg.svdvals(x.double())
    assert low < singular.min() and singular.max() < high
    core = left.T @ x.double() @ right
    off_diagonal = core - core.diagonal().diag()
    assert off_diagonal.norm() / core.norm() < (1e-4 if dtype == torch.float32 else 0.1)


def test_random_matrices_of_a_stack_are_treated_each_alone():
    g = torch.randn(3, 24, 40) * torch.tensor([1e-3, 1.0, 1e4])[:, None, None]
    coefficients = newton_schulz_coefficients("classic", 5)
    together = orthogonalize(g, coefficients, torch.float32)
    for alone, one in zip(together, g, strict=True):
        torch.testing.assert_close(orthogonalize(one[None], coefficients, torch.float32)[0], alone)
        singular = torch.linalg.svdvals(alone)
        assert 0.65 < singular.min() and singular.max() < 1.25


def test_a_matrix_of_zeros_stays_zero():
    zeros = torch.zeros(2, 4, 6)
    for dtype in (torch.float32, torch.bfloat16):
        x = orthogonalize(zeros, newton_schulz_coefficients("classic", 5), dtype)
        assert (x == 0).all()


def test_fewer_polar_iterations_are_the_first_ones():
    for k in range(1, 6):
        assert newton_schulz_coefficients("polar", k) == list(POLAR[:k])
        assert newton_schulz_coefficients("classic", k) == [CLASSIC] * k


# --- Muon ----------------------------------------------------------------------------------------


def plain_muon_step(
    p: Tensor, m: Tensor, g: Tensor, cfg: Config, *, lr: float, momentum: float, decay: float
) -> tuple[Tensor, Tensor]:
    """One step for one matrix in float64 as techniques describe it: new weight, new momentum."""
    m = momentum * m + g
    u = g + momentum * m
    if cfg.muon_row_norm:
        u = torch.stack([row / max(float(row.norm()), 1e-7) for row in u])
    x = u / (u.norm() + 1e-7)
    x = x.T if p.shape[0] > p.shape[1] else x
    steps = cfg.muon_backend_steps
    for a, b, c in POLAR[:steps] if cfg.muon_coefficients == "polar" else [CLASSIC] * steps:
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    x = x.T if p.shape[0] > p.shape[1] else x
    p = p * (1 - lr * decay)
    return p - lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * x, m


def make_params(shapes: list[tuple[int, int]]) -> list[nn.Parameter]:
    """Random matrices."""
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def muon_step(muon: Muon, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
    """One whole step: the gradients are collected, then used."""
    muon.start_reduce()
    muon.step(lr, momentum, weight_decay)


@pytest.mark.parametrize(
    ("knobs", "decay"),
    [
        ({}, 0.0),
        ({}, 0.3),
        ({"muon_row_norm": True}, 0.0),
        ({"muon_coefficients": "polar", "muon_backend_steps": 3}, 0.0),
        ({"muon_backend_steps": 2, "muon_row_norm": True}, 0.1),
    ],
)
def test_muon_equals_a_plain_loop_over_the_matrices(
    knobs: dict[str, Any], decay: float, make_run: MakeRun
):
    run = make_run(**knobs)
    params = make_params([(8, 8), (16, 8), (8, 16), (8, 8), (16, 8), (8, 8)])
    muon = Muon(params, run)
    plain = [(p.detach().double(), torch.zeros_like(p).double()) for p in params]
    for step in range(6):
        lr, momentum = 0.1 / (step + 1), 0.8 + 0.02 * step
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            w, m = plain[i]
            plain[i] = plain_muon_step(
                w, m, p.grad.double(), run.cfg, lr=lr, momentum=momentum, decay=decay
            )
        muon_step(muon, lr, momentum, decay)
        for p, (w, _) in zip(params, plain, strict=True):
            # float32 against float64; the iteration amplifies rounding by its slope, some hundreds.
            torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=2e-4)


def test_muon_leaves_the_gradients_as_they_were(make_run: MakeRun):
    params = make_params([(4, 4), (4, 4)])
    before = [torch.randn_like(p) for p in params]
    for p, g in zip(params, before, strict=True):
        p.grad = g.clone()
    muon_step(Muon(params, make_run()), 0.1, 0.9)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_with_row_norm_the_size_of_a_row_s_gradient_does_not_matter(
    shape: tuple[int, int], make_run: MakeRun
):
    grad_or_zeros = torch.randn(shape)
    scaled = grad_or_zeros.clone()
    scaled[2] *= 1000
    scaled[3] *= 0.01
    updates = {}
    for row_norm in (True, False):
        for name, g in (("plain", grad_or_zeros), ("scaled", scaled)):
            params = [nn.Parameter(torch.zeros(shape))]
            params[0].grad = g.clone()
            muon_step(Muon(params, make_run(muon_row_norm=row_norm)), 1.0, 0.9)
            updates[row_norm, name] = params[0].detach()
    torch.testing.assert_close(updates[True, "plain"], updates[True, "scaled"], rtol=0, atol=1e-4)
    assert (updates[False, "plain"] - updates[False, "scaled"]).abs().max() > 0.05


def test_row_norm_of_a_row_without_gradient_is_zero_not_nan(make_run: MakeRun):
    params = [nn.Parameter(torch.zeros(4, 6))]
    params[0].grad = torch.randn(4, 6)
    params[0].grad[1] = 0
    muon_step(Muon(params, make_run(muon_row_norm=True)), 1.0, 0.9)
    assert params[0].isfinite().all() and (params[0][1].abs() < 1e-6).all()
    assert params[0][0].abs().max() > 0.1


def test_a_matrix_without_a_gradient_counts_as_one_whose_gradient_is_zero(make_run: MakeRun):
    with_none, with_zero = make_params([(4, 6)] * 3), make_params([(4, 6)] * 3)
    gradients = torch.randn(3, 4, 6)
    gradients[1] = 0
    for params in (with_none, with_zero):
        for p, start, g in zip(params, torch.ones(3, 4, 6), gradients, strict=True):
            p.data.copy_(start)
            p.grad = g.clone()
    with_none[1].grad = None
    for params in (with_none, with_zero):
        muon_step(Muon(params, make_run()), 0.1, 0.9, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(with_none, with_zero, strict=True))


def keep_updates(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let Muon apply its updates as they are, without orthogonalization; they are noted."""
    noted: list[Tensor] = []

    def keep(g_LOI: Tensor, *args: Any) -> Tensor:
        noted.append(g_LOI.clone())
        return g_LOI

    monkeypatch.setattr(train_gpt, "orthogonalize", keep)
    return noted


@pytest.mark.parametrize("weight", [0.44, 0.9])
@pytest.mark.parametrize(("slow", "fast"), [(0.98, 0.85), (0.9, 0.5), (0.8, 0.0)])
def test_two_momenta_are_a_weighted_sum_of_exponential_averages_one_step_ahead(
    weight: float, slow: float, fast: float, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    noted = keep_updates(monkeypatch)
    params = make_params([(4, 6), (6, 4), (4, 6)])
    knobs = {"muon_fast_weight": weight, "muon_fast_momentum": fast, "muon_row_norm": False}
    muon = Muon(params, make_run(**knobs))
    averages = {rate: [torch.zeros(p.shape).double() for p in params] for rate in (slow, fast)}
    for _ in range(5):
        expected = [torch.zeros(p.shape).double() for p in params]
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            for rate, share in ((slow, 1 - weight), (fast, weight)):
                average = rate * averages[rate][i] + (1 - rate) * p.grad
                averages[rate][i] = average
                expected[i] += share * (rate * average + (1 - rate) * p.grad)
        noted.clear()
        muon_step(muon, 0.1, slow)
        updates = {p: u for stack, us in zip(muon.stacks, noted, strict=True)
                   for p, u in zip(stack, us, strict=True)}  # fmt: skip
        for p, update in zip(params, expected, strict=True):
            found = updates[p].double() * (1 - slow) * (1 - weight)  # the scale does not matter
            torch.testing.assert_close(found, update, rtol=1e-5, atol=1e-6)


def test_cautious_decay_shrinks_only_weights_that_the_update_shrinks_too(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    keep_updates(monkeypatch)
    params = make_params([(3, 5), (5, 3), (3, 5)])
    muon = Muon(params, make_run(muon_cautious_wd=True, muon_row_norm=False))
    lr, decay = 0.1, 0.5
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
        p.grad[0, 0] = 0  # no update: no decay
    muon_step(muon, lr, 0.0, decay)
    seen = set()
    for p, w_OI in zip(params, before, strict=True):
        assert p.grad is not None
        u_OI = p.grad * math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
        for w, u, found in zip(w_OI.flatten(), u_OI.flatten(), p.detach().flatten(), strict=True):
            agree = bool(w.sign() == u.sign())
            seen.add(agree)
            kept = w * (1 - lr * decay) if agree else w
            assert float(found) == pytest.approx(float(kept - lr * u), abs=1e-6)
    assert seen == {True, False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normuon_divides_rows_by_their_mean_square_over_time_and_keeps_the_norm(
    dtype: torch.dtype,
):
    square_LO1, expected_LO = torch.zeros(2, 4, 1), torch.zeros(2, 4).double()
    for _ in range(4):
        update_LOI = (torch.randn(2, 4, 6) * torch.tensor([0.1, 1, 3, 9])[:, None]).to(dtype)
        found_LOI = normalize_rows(update_LOI, square_LO1, 0.9)
        assert found_LOI.dtype == dtype
        for matrix, found, square in zip(update_LOI.double(), found_LOI, expected_LO, strict=True):
            square.copy_(0.9 * square + 0.1 * (matrix**2).mean(dim=1))
            scaled = matrix / square.sqrt()[:, None]
            scaled *= matrix.norm() / scaled.norm()
            tolerance = 1e-5 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(found.double(), scaled, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(square_LO1[..., 0].double(), expected_LO, rtol=1e-5, atol=1e-7)


def test_muon_normalizes_the_rows_after_the_orthogonalization(make_run: MakeRun):
    gradients = torch.randn(3, 2, 6, 4)
    found = []
    for beta2 in (0.0, 0.9):
        params = [nn.Parameter(torch.zeros(6, 4)) for _ in range(2)]
        muon = Muon(params, make_run(muon_beta2=beta2))
        for step in gradients:
            before = torch.stack([p.detach().clone() for p in params])
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            muon_step(muon, 1.0, 0.9)
            found.append(torch.stack([p.detach().clone() for p in params]) - before)
    square = torch.zeros(2, 6, 1)
    for plain, normalized in zip(found[:3], found[3:], strict=True):
        expected = normalize_rows(plain / 1.5**0.5, square, 0.9) * 1.5**0.5
        torch.testing.assert_close(normalized, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, normalized, atol=1e-3)


def test_normuon_of_a_matrix_without_gradient_is_zero(make_run: MakeRun):
    params = make_params([(4, 6)])
    before = params[0].detach().clone()
    muon_step(Muon(params, make_run(muon_beta2=0.9)), 0.1, 0.9)
    assert torch.equal(params[0], before)


# --- Several ranks -------------------------------------------------------------------------------


class Ranks:
    """A process group whose ranks are threads of this process.

    A collective is posted when it is called and complete when it is waited for. The n-th one of
    every rank must be of the same kind and shape, or processes would wait for each other forever.
    """

    def __init__(self, runs: list[Run], monkeypatch: pytest.MonkeyPatch):
        self.runs, self.local = runs, threading.local()
        self.posts: dict[int, dict[int, tuple[str, Tensor]]] = {}
        self.changed = threading.Condition()
        for rank, run in enumerate(runs):
            run.rank, run.world_size = rank, len(runs)
        for name in ("reduce_scatter_single", "all_gather_single", "all_reduce"):
            monkeypatch.setattr(torch.distributed, name, getattr(self, name), raising=False)

    def post(self, kind: str, tensor: Tensor, finish: Callable[[list[Tensor]], Any]) -> Any:
        """Give this rank's tensor; the answer's wait() calls `finish` with those of all ranks."""
        number, self.local.count = self.local.count, self.local.count + 1
        with self.changed:
            posts = self.posts.setdefault(number, {})
            posts[self.local.rank] = kind, tensor.clone()
            self.changed.notify_all()

        def wait() -> None:
            with self.changed:
                assert self.changed.wait_for(lambda: len(posts) == len(self.runs), timeout=30)
            assert len({(kind, tensor.shape) for kind, tensor in posts.values()}) == 1
            finish([posts[rank][1] for rank in range(len(self.runs))])

        return SimpleNamespace(wait=wait)

    def reduce_scatter_single(self, out: Tensor, whole: Tensor, async_op: bool = False) -> Any:
        own = slice(self.local.rank * len(out), (self.local.rank + 1) * len(out))
        assert len(whole) == len(out) * len(self.runs) and async_op
        return self.post("scatter", whole, lambda all_: out.copy_(torch.stack(all_).sum(0)[own]))

    def all_gather_single(self, whole: Tensor, own: Tensor, async_op: bool = False) -> Any:
        assert own.is_contiguous() and len(whole) == len(own) * len(self.runs) and async_op
        return self.post("gather", own, lambda all_: whole.copy_(torch.cat(all_)))

    def all_reduce(self, tensor: Tensor) -> None:
        self.post("sum", tensor, lambda all_: tensor.copy_(torch.stack(all_).sum(0))).wait()

    def each(self, work: Callable[[int], Any]) -> list[Any]:
        """Results of work(rank), all at the same time."""

        def start(rank: int) -> Any:
            self.local.rank, self.local.count = rank, 0
            return work(rank)

        self.posts.clear()
        with ThreadPoolExecutor(len(self.runs)) as executor:
            return list(executor.map(start, range(len(self.runs))))


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_the_ranks_together_orthogonalise_every_matrix_once(
    world_size: int, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    shapes = [(6, 8)] * 5 + [(10, 4)]
    gradients = torch.randn(3, world_size, 6, 80)  # a step, a rank, a matrix
    start = [torch.randn(shape) for shape in shapes]

    def make_muon(run: Run) -> tuple[Muon, list[nn.Parameter]]:
        params = [nn.Parameter(matrix.clone()) for matrix in start]
        return Muon(params, run), params

    def train(muon: Muon, params: list[nn.Parameter], gradients: Tensor) -> None:
        for step, by_matrix in enumerate(gradients):
            for p, g in zip(params, by_matrix, strict=True):
                p.grad = g[: p.numel()].view_as(p).clone()
            muon_step(muon, 0.1 / (step + 1), 0.9, 0.2)

    alone, expected = make_muon(make_run())
    train(alone, expected, gradients.mean(dim=1))
    orthogonalized: list[tuple[int, ...]] = []

    def noted(g_LOI: Tensor, *args: Any) -> Tensor:
        orthogonalized.append(tuple(g_LOI.shape))
        return orthogonalize(g_LOI, *args)

    monkeypatch.setattr(train_gpt, "orthogonalize", noted)
    ranks = Ranks([make_run() for _ in range(world_size)], monkeypatch)
    muons, params = zip(*map(make_muon, ranks.runs), strict=True)
    ranks.each(lambda rank: train(muons[rank], params[rank], gradients[:, rank] / world_size))
    share = math.ceil(5 / world_size)
    wanted = [(share, 6, 8), (1, 10, 4)] * 3 * world_size
    assert sorted(orthogonalized) == sorted(wanted)  # as few as can be, and as many on each rank
    for own in params:
        assert all(torch.equal(a, b) for a, b in zip(own, params[0], strict=True))
        for p, q in zip(own, expected, strict=True):
            # The sum of the gradients in another order; the iteration amplifies its rounding.
            torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    ranks.each(lambda rank: muons[rank].gather_buffers())
    for muon in muons:
        for mine, first, one in zip(muon.buffers, muons[0].buffers, alone.buffers, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine[: len(one)], one, rtol=1e-5, atol=1e-6)
            assert not mine[len(one) :].any()  # of the matrices that are not there


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("bound", [0.1, 1e6])
def test_the_clip_bounds_the_norm_of_the_gradient_of_all_ranks(
    bound: float, world_size: int, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    runs = [make_run(grad_clip_norm=bound, beta1=0.5) for _ in range(world_size)]
    ranks = Ranks(runs, monkeypatch)
    trainers = [Trainer(run, random_model(run.cfg)) for run in runs]
    noted = [give_gradients(trainer, monkeypatch) for trainer in trainers]
    losses = ranks.each(lambda rank: trainers[rank].step(torch.empty(8, 33)))
    total = {
        name: torch.stack([gradients[0][name] for gradients in noted]).double().sum(dim=0)
        for name in noted[0][0]
    }
    norm = math.sqrt(sum(float(g.square().sum()) for g in total.values()))
    assert norm > 1
    checked: set[str] = set()
    for trainer, loss in zip(trainers, losses, strict=True):
        assert loss == 0 and trainer.progress == Progress(1, 0.0, world_size * 8 * 32)
        seen = first_gradients(trainer)
        for name, p in trainer.model.named_parameters():
            if p in seen:
                expected = (total[name] * min(1, bound / norm)).float()
                torch.testing.assert_close(seen[p], expected, msg=name)
                checked.add(name)
    assert checked == total.keys()  # each matrix on the rank that keeps its momentum
    for trainer in trainers[1:]:
        for p, q in zip(trainer.params, trainers[0].params, strict=True):
            assert torch.equal(p, q)


# --- Both optimizers in a step -------------------------------------------------------------------


def give_gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Let `trainer.step` find random gradients instead of computing some; they are noted."""
    noted: list[dict[str, Tensor]] = []

    def accumulate(window: Tensor) -> Tensor:
        for p in trainer.params:
            p.grad = torch.randn_like(p)
        named = trainer.model.named_parameters()
        noted.append({name: p.grad.clone() for name, p in named})  # type: ignore[union-attr]
        return torch.zeros(())

    monkeypatch.setattr(trainer, "accumulate_gradients", accumulate)
    return noted


def first_gradients(trainer: Trainer) -> dict[Tensor, Tensor]:
    """The gradients that the optimizers saw in the first step, of BETA1=0.5, on this rank."""
    # (1 - beta1) times the gradient for AdamW, the gradient itself for Muon.
    seen = {p: state["exp_avg"] / 0.5 for p, state in trainer.adam.state.items()}
    muon, rank = trainer.muon, trainer.run.rank
    for stack, buffer in zip(muon.stacks, muon.buffers, strict=True):
        share = len(buffer) // muon.run.world_size
        own = range(rank * share, min((rank + 1) * share, len(stack)))
        seen |= {stack[i]: buffer[i] for i in own}
    return seen


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {
            "adam_wd": 0.2, "embed_wd": 0.3, "muon_wd": 0.1,
            "beta1": 0.7, "beta2": 0.9, "adam_eps": 1e-3,
        },
        {"embed_wd": 0.3, "tie_embeddings": False},
        {"muon_wd": 0.1},
        {"muon_momentum_cooldown_frac": 0.4},
        {"tie_embeddings": False, "skip_gates": True, "warmdown_frac": 0.75, "min_lr": 0.2},
    ],
)  # fmt: skip
def test_a_step_is_torch_s_adamw_and_plain_muon_with_the_schedule_s_rates(
    knobs: dict[str, Any], make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    knobs = {"iterations": 8, "muon_momentum_warmup_steps": 4, "model_dim": 16, **knobs}
    run = make_run(**knobs)
    cfg, model = run.cfg, random_model(run.cfg)
    trainer, roles = Trainer(run, model), parameter_roles(model)
    noted = give_gradients(trainer, monkeypatch)
    weights = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
    rates = {
        "token": 0.05 if cfg.tie_embeddings else 0.6, "head": 0.008, "scalar": 0.04,
    }  # fmt: skip
    plain = {}
    for name, role in roles.items():
        if role.optim_group != "matrix":
            copy = nn.Parameter(weights[name])
            rate = rates[role.optim_group]
            decay = cfg.adam_wd if role.optim_group == "scalar" else cfg.embed_wd
            adam = torch.optim.AdamW(
                [copy], lr=rate, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps,
                weight_decay=decay, foreach=False,
            )  # fmt: skip
            plain[name] = copy, adam, rate
    for step in range(8):
        trainer.step(torch.empty(8, 33))
        frac = cfg.warmdown_frac
        scale = min(1.0, max((1 - step / 8) / frac, cfg.min_lr))
        cooldown = (1 - step / 8) / (cfg.muon_momentum_cooldown_frac or 1e-9)
        momentum = 0.85 + (0.95 - 0.85) * min(step / 4, cooldown, 1)
        for name, parameter in model.named_parameters():
            grad_or_zeros = noted[step][name].double()
            if name in plain:
                copy, adam, rate = plain[name]
                copy.grad, adam.param_groups[0]["lr"] = grad_or_zeros, rate * scale
                adam.step()
                expected = copy.detach()
            else:
                rated = dict(lr=0.04 * scale, momentum=momentum, decay=cfg.muon_wd)
                expected, momenta[name] = plain_muon_step(
                    weights[name], momenta[name], grad_or_zeros, cfg, **rated
                )
                weights[name] = expected
            torch.testing.assert_close(
                parameter.detach().double(), expected, rtol=1e-5, atol=1e-4, msg=f"{step} {name}"
            )
    assert trainer.progress == Progress(8, 0.0, 8 * 8 * 32)
    assert all(p.grad is None for p in trainer.params)


@pytest.mark.parametrize("knobs", [{}, {"muon_fast_weight": 0.4}, {"muon_beta2": 0.9}])
def test_training_goes_on_from_saved_tensors_to_the_same_bits(
    knobs: dict[str, Any], make_run: MakeRun
):
    run = make_run(averaging="ema", num_layers=2, adam_wd=0.1, **knobs)
    first = Trainer(run, random_model(run.cfg, seed=1))
    windows = torch.randint(1, 320, (6, 8, 33))
    for window in windows[:3]:
        first.step(window)
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    progress = first.progress
    second = Trainer(run, random_model(run.cfg, seed=2))
    second.step(windows[5])  # its own moments must be forgotten
    second.load(saved, progress)
    for window in windows[3:]:
        assert torch.equal(first.step(window), second.step(window))
    tensors = second.tensors()
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("bound", [0.1, 1e6])
def test_the_clip_bounds_the_norm_over_all_parameters(
    bound: float, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(grad_clip_norm=bound, beta1=0.5)
    trainer = Trainer(run, random_model(run.cfg))
    noted = give_gradients(trainer, monkeypatch)
    trainer.step(torch.empty(8, 33))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in noted[0].values()))
    assert norm > 1
    seen = first_gradients(trainer)
    assert len(seen) == len(trainer.params)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(seen[p], noted[0][name] * min(1, bound / norm), msg=name)


# --- Schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frac", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_rate_is_full_then_falls_linearly_to_its_floor(frac: float, floor: float):
    for progress in np.linspace(0, 1, 41):
        scale = lr_scale(float(progress), warmdown_frac=frac, floor=floor)
        assert scale == pytest.approx(max(floor, min(1.0, (1 - progress) / frac)), abs=1e-12)
    assert lr_scale(1 - frac, warmdown_frac=frac) == 1
    assert lr_scale(1 - frac / 2, warmdown_frac=frac) == pytest.approx(0.5)
    assert lr_scale(1.0, warmdown_frac=frac, floor=floor) == floor


@pytest.mark.parametrize("power", [0.5, 1.2, 2.0])
def test_the_warmdown_falls_with_a_power_of_what_remains(power: float, make_run: MakeRun):
    for step in (0, 50, 59, 60, 61, 80, 99):
        progress, knobs = Progress(step, 0.1), {"iterations": 100, "warmdown_frac": 0.4}
        scale = scale_at(progress, make_run, **knobs, warmdown_power=power, min_lr=0.01)
        expected = max(0.01, min(1.0, ((100 - step) / 40) ** power))
        assert scale == pytest.approx(expected, abs=1e-12)
        linear = scale_at(progress, make_run, **knobs, warmdown_power=1.0)
        assert linear == scale_at(progress, make_run, **knobs)


def test_without_warmdown_the_rate_stays_full_to_the_end():
    assert [lr_scale(p, warmdown_frac=0.0) for p in (0.0, 0.5, 1.0)] == [1, 1, 1]


def test_muon_s_momentum_rises_linearly_over_its_steps_and_stays():
    cfg = tiny_config(muon_momentum_warmup_steps=500)
    for step in (0, 1, 250, 499, 500, 501, 10_000):
        for progress in (0.0, 0.5, 1.0):
            momentum = momentum_at(step, progress, cfg)
            assert momentum == pytest.approx(0.85 + 0.1 * min(step / 500, 1), abs=1e-12)
    assert momentum_at(0, 0.0, tiny_config(muon_momentum_warmup_steps=0)) == 0.95


def test_muon_s_momentum_falls_back_over_the_last_share_of_progress():
    cfg = tiny_config(muon_momentum_warmup_steps=100, muon_momentum_cooldown_frac=0.25)
    for step in (0, 50, 100, 10_000):
        for progress in np.linspace(0, 1, 41):
            ramp = min(step / 100, (1 - progress) / 0.25, 1)
            momentum = momentum_at(step, float(progress), cfg)
            assert momentum == pytest.approx(0.85 + 0.1 * ramp, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "train_s", "fraction"),
    [(0, 0, 0), (50, 10, 0.5), (10, 50, 0.5), (60, 50, 0.6), (100, 0, 1), (1, 150, 1)],
)
def test_progress_is_the_further_of_steps_and_clock(step: int, train_s: float, fraction: float):
    cfg = tiny_config(iterations=100, max_wallclock_seconds=100.0)
    assert Progress(step, train_s).fraction(cfg) == pytest.approx(fraction)
    no_clock = tiny_config(iterations=100)
    assert Progress(step, train_s).fraction(no_clock) == pytest.approx(step / 100)


@pytest.mark.parametrize(
    ("schedule", "next_step_s"), [("", 1.2), ("64@0.5", 4.8), ("256@0.5,64@0.8", 4.8)]
)
def test_a_next_step_with_a_larger_batch_is_expected_to_take_longer(
    schedule: str, next_step_s: float
):
    knobs: dict[str, Any] = {"train_batch_tokens": 256, "max_wallclock_seconds": 100}
    cfg = tiny_config(**knobs, iterations=1000, train_batch_schedule=schedule)
    steps, left_s = 90, 10.0
    tokens = steps * (64 if schedule else 256)  # so far, in a second each
    progress = Progress(steps, cfg.train_seconds - left_s, tokens)
    seconds = next_step_s * progress.train_s / steps
    assert not progress.is_over(cfg, left_s - seconds - 0.01)
    assert progress.is_over(cfg, left_s - seconds + 0.01)


def test_a_next_step_is_expected_to_take_at_least_as_long_as_the_last_ones():
    cfg = tiny_config(max_wallclock_seconds=100, iterations=1000)
    progress = Progress(90, cfg.train_seconds - 10.0, 90 * cfg.train_batch_tokens)  # a second each
    assert not progress._replace(last_s=0.5).is_over(cfg)
    assert not progress._replace(last_s=8.3).is_over(cfg)
    assert progress._replace(last_s=8.4).is_over(cfg)
    assert not progress._replace(last_s=4.1).is_over(cfg, steps=2)
    assert progress._replace(last_s=4.2).is_over(cfg, steps=2)
    assert not progress._replace(before_last_s=8.3).is_over(cfg)
    assert progress._replace(before_last_s=8.4).is_over(cfg)


def scale_at(progress: Progress, make_run: MakeRun, **knobs: Any) -> float:
    """Learning rate multiplier of the step after `progress`."""
    run = make_run(num_layers=1, **knobs)
    trainer = Trainer(run, random_model(run.cfg))
    trainer.progress = progress
    return trainer.lr_scale()


@pytest.mark.parametrize("step", [0, 1, 59, 60, 61, 80, 99])
def test_warmdown_iters_are_the_last_steps_if_steps_limit_the_run(step: int, make_run: MakeRun):
    scale = scale_at(Progress(step, 0.1), make_run, iterations=100, warmdown_iters=40)
    assert scale == pytest.approx(min(1.0, (100 - step) / 40))


@pytest.mark.parametrize("train_s", [0.0, 5.0, 40.0, 60.0, 95.0])
def test_warmdown_iters_are_seconds_at_the_measured_pace_if_the_clock_limits_the_run(
    train_s: float, make_run: MakeRun
):
    # 2 s a step: 20 steps take 40 of 100 s.
    progress = Progress(int(train_s / 2), train_s)
    knobs = dict(iterations=20_000, max_wallclock_seconds=100.0, warmdown_iters=20, min_lr=0.2)
    pace_s = train_s / max(1, progress.step)
    remaining = (100 - train_s) / (20 * pace_s) if train_s else 1.0
    assert scale_at(progress, make_run, **knobs) == pytest.approx(max(0.2, min(1, remaining)))


def test_a_warmdown_longer_than_the_run_begins_in_its_midst_as_the_baseline_s_does(
    make_run: MakeRun,
):
    scale = scale_at(Progress(10, 0.1), make_run, iterations=100, warmdown_iters=400)
    assert scale == pytest.approx((100 - 10) / 400)


def test_warmdown_iters_win_over_the_fraction(make_run: MakeRun):
    knobs = dict(iterations=100, warmdown_frac=1.0)
    assert scale_at(Progress(50), make_run, **knobs) == pytest.approx(0.5)
    assert scale_at(Progress(50), make_run, **knobs, warmdown_iters=10) == 1.0


# --- Averages ------------------------------------------------------------------------------------


def test_after_n_steps_the_initial_weights_have_the_share_decay_to_the_n():
    parameter = nn.Parameter(torch.ones(3))
    averager = WeightAverager(tiny_config(averaging="ema", ema_decay=0.9), [parameter])
    with torch.no_grad():
        parameter.zero_()
    for step in range(1, 21):
        averager.update(step, 1.0, 0.0)
        torch.testing.assert_close(averager.average[0], torch.full((3,), 0.9**step))
    assert (parameter == 0).all()
    averager.export_()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.9**20))


def test_the_ema_is_the_sum_of_all_weights_by_their_age():
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    start = [p.detach().double().numpy().copy() for p in parameters]
    averager = WeightAverager(tiny_config(averaging="ema", ema_decay=0.8), parameters)
    trail = []
    for step in range(1, 41):
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p))
        trail.append([p.detach().double().numpy().copy() for p in parameters])
        averager.update(step, 0.0, 1.0)
    for i, average in enumerate(averager.average):
        expected = 0.8**40 * start[i]
        expected += sum(0.2 * 0.8 ** (39 - n) * values[i] for n, values in enumerate(trail))
        np.testing.assert_allclose(average.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("every", "below"), [(1, 0.4), (5, 0.4), (3, 1.0), (4, 0.1)])
def test_swa_is_the_mean_of_the_weights_collected_while_the_multiplier_is_low(
    every: int, below: float
):
    cfg = tiny_config(averaging="swa", swa_every=every, swa_start_lr=below)
    parameter = nn.Parameter(torch.randn(6))
    averager = WeightAverager(cfg, [parameter])
    collected = []
    for step in range(1, 61):
        with torch.no_grad():
            parameter.add_(torch.randn(6))
        scale = min(1.0, (60 - step) / 30)
        averager.update(step, scale, step / 60)
        if scale < below and step % every == 0:
            collected.append(parameter.detach().double().numpy().copy())
    assert int(averager.count) == len(collected) > 0
    averager.export_()
    mean = np.mean(collected, axis=0)
    np.testing.assert_allclose(parameter.detach().numpy(), mean, atol=1e-5)


def test_swa_of_thousands_of_weights_keeps_float32_precision():
    parameter = nn.Parameter(torch.zeros(1))
    averager = WeightAverager(tiny_config(averaging="swa", swa_every=1), [parameter])
    values = 1 + 1e-3 * torch.randn(3000)
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            parameter.copy_(value)
        averager.update(step, 0.0, 1.0)
    # A bf16 sum would stop growing at 256; rounding to 24 bits 3,000 times stays within 1e-5.
    assert averager.average[0].item() == pytest.approx(values.double().mean().item(), abs=1e-5)


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_averages_are_float32_whatever_the_weights_are(averaging: str):
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    cfg = tiny_config(averaging=averaging, swa_every=1, ema_decay=0.999)
    averager = WeightAverager(cfg, [parameter])
    for step in range(1, 1001):
        averager.update(step, 0.0, 1.0)
    assert averager.average[0].dtype == torch.float32
    assert averager.average[0].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("averaging", ["none", "swa"])
def test_without_an_average_the_last_weights_are_exported(averaging: str):
    parameter = nn.Parameter(torch.randn(4))
    averager = WeightAverager(tiny_config(averaging=averaging, swa_every=1), [parameter])
    with torch.no_grad():
        parameter.add_(1)
    last = parameter.detach().clone()
    averager.update(1, 1.0, 0.0)  # the multiplier is not low
    averager.export_()
    assert torch.equal(parameter.detach(), last)


def test_a_trainer_averages_the_weights_after_each_of_its_steps(make_run: MakeRun):
    run = make_run(averaging="ema", ema_decay=0.5, num_layers=1)
    trainer = Trainer(run, random_model(run.cfg))
    expected = [p.detach().clone() for p in trainer.params]
    for window in torch.randint(1, 320, (3, 8, 33)):
        trainer.step(window)
        expected = [(e + p.detach()) / 2 for e, p in zip(expected, trainer.params, strict=True)]
    for average, wanted in zip(trainer.averager.average, expected, strict=True):
        torch.testing.assert_close(average, wanted)


def test_a_run_that_the_clock_ends_collects_weights_however_many_steps_were_allowed(
    make_run: MakeRun,
):
    run = make_run(
        averaging="swa", swa_every=1, iterations=20_000, max_wallclock_seconds=100.0, num_layers=1
    )
    trainer = Trainer(run, random_model(run.cfg))
    window = torch.randint(1, 320, (8, 33))
    for train_s, collected in ((79.0, 0), (81.0, 1), (99.0, 2)):  # 0.4 is reached at 80 s
        trainer.progress = Progress(trainer.progress.step, train_s)
        trainer.step(window)
        assert int(trainer.averager.count) == collected
