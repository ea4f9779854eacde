"""Export: curvature by brute force, GPTQ and steps by formulas, the byte budget, round trips."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_gpt
from tests.conftest import MakeRun, TinyData, environment, random_model, tiny_config
from tests.processes import SCRIPT, run_ranks, run_script
from train_gpt import (
    GPT,
    MAX_BITS_PER_WEIGHT,
    CalibrationStats,
    CastedLinear,
    Config,
    Embedding,
    InputError,
    KroneckerHessian,
    MatrixGroup,
    Progress,
    Quantized,
    Run,
    calibrate,
    decode_header,
    decode_tensors,
    dequantize_all,
    encode_artifact,
    fill_budget,
    group_matrices,
    heuristic_row_scales,
    model_layout,
    parameter_roles,
    prune_smallest,
    quantize_and_encode,
    quantize_model,
    read_artifact,
)

GPTQ: dict[str, Any] = {"quantizer": "gptq", "vocab_size": 48, "model_dim": 16, "num_layers": 2}
CODED = ("attn", "mlp", "embed", "table")
SHA = "0" * 64
TRIES = 8  # most encodings that the search for steps may take


def windows_of(cfg: Config, rows: int, seed: int = 0) -> torch.Tensor:
    """Random windows, (rows, T + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cfg.vocab_size, (rows, cfg.train_seq_len + 1), generator=generator)


def lone_run(cfg: Config) -> Run:
    """One process that writes nothing."""
    device = torch.device("cpu")
    return Run(cfg=cfg, directory=Path(), rank=0, world_size=1, device=device, dtype=torch.float32)


def curvatures_of(run: Run, model: GPT, *windows: torch.Tensor) -> dict[str, KroneckerHessian]:
    """What the script finds on these windows, each a pass of its own."""
    moments = CalibrationStats(model)
    for window_BT in windows:
        moments.accumulate(window_BT)
    return moments.hessians(run)


# --- Curvature -----------------------------------------------------------------------------------


def brute_force(model: GPT, window_BT: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    """By matrix: E[x x^T] of inputs and E[g^2] by output; by table: E[g g^T] and share of reads.

    A zero is added to the output of every visit; the gradient at it is that at the output.
    """
    ids_BT, target_BT = window_BT[:, :-1], window_BT[:, 1:]
    visits: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    hooks = []

    def watch(name: str) -> Callable[..., torch.Tensor]:
        def hook(_: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            zero = torch.zeros_like(y).requires_grad_()
            visits.setdefault(name, []).append((args[0].detach(), zero))
            return y + zero

        return hook

    for path, module in model.named_modules():
        if isinstance(module, CastedLinear | Embedding) and path != "lm_head":
            hooks.append(module.register_forward_hook(watch(f"{path}.weight")))
    x_BTD = model(ids_BT)
    for hook in hooks:
        hook.remove()
    head = "tok_emb.weight" if model.lm_head is None else "lm_head.weight"
    z_BTV = x_BTD @ model.get_parameter(head).T
    zero_BTV = torch.zeros_like(z_BTV).requires_grad_()
    cap = model.cfg.logit_softcap
    logits_BTV = cap * torch.tanh((z_BTV + zero_BTV) / cap)
    nats = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="sum")
    zeros = [zero for seen in visits.values() for _, zero in seen]
    grads = iter(torch.autograd.grad(nats, [*zeros, zero_BTV]))
    count, found = ids_BT.numel(), dict[str, tuple[torch.Tensor, ...]]()
    for name, seen in visits.items():
        a = b = torch.zeros((), dtype=torch.float64)
        for x, _ in seen:
            g = next(grads).flatten(0, -2).double()
            if "table" in name or name == "tok_emb.weight":
                rows = model.get_parameter(name).shape[0]
                a, b = a + g.T @ g, b + F.one_hot(x.flatten(), rows).sum(dim=0).double()
            else:
                x = x.flatten(0, -2).double()
                a, b = a + x.T @ x, b + (g * g).sum(dim=0)
        found[name] = (a / count, b / count)
    x, g = x_BTD.detach().flatten(0, 1).double(), next(grads).flatten(0, 1).double()
    pair = (x.T @ x / count, (g * g).sum(dim=0) / count)
    found[head] = (*found.get(head, ()), *pair)
    return found


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_embeddings": False},
    "loops": {"num_layers": 3, "num_loops": 2, "loop_start": 1, "loop_end": 1},
    "tables": {
        "bigram_vocab_size": 20,
        "bigram_dim": 6,
        "trigram_vocab_size": 30,
        "trigram_dim": 4,
        "ve_layers": "0,1",
        "ve_dim": 6,
    },
    "values": {
        "value_residual": "resformer",
        "attn_gate": "sparse",
        "gate_window": 4,
        "smear_gate": "lambda",
        "skip_gates": True,
    },
    "lanes": {"parallel_residual": "routed", "parallel_start_layer": 1, "num_layers": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_curvature_is_the_brute_force_mean_of_products(shape: str, make_run: MakeRun):
    cfg = tiny_config(**GPTQ | SHAPES[shape])
    model, window_BT = random_model(cfg), windows_of(cfg, 3)
    found = curvatures_of(make_run(), model, window_BT)
    expected = brute_force(model, window_BT)
    assert found.keys() == expected.keys()
    for name, pairs in expected.items():
        a, b = sum_of_forms(list(zip(pairs[::2], pairs[1::2], strict=True)))
        # Sums of a hundred products in float32 against float64.
        torch.testing.assert_close(
            found[name].inputs_II.double(), a, rtol=1e-3, atol=1e-5 * float(a.abs().max())
        )
        torch.testing.assert_close(
            found[name].outputs_O.double(), b, rtol=1e-3, atol=1e-5 * float(b.abs().max())
        )


def sum_of_forms(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """The form with the trace of a pair, or of the sum of two (as matrix, as table), by rows and
    as a whole; its outputs are 1 in the mean.
    """
    a = torch.stack([inputs * outputs.mean() for inputs, outputs in pairs]).sum(dim=0)
    by_row = torch.stack([inputs.trace() * outputs for inputs, outputs in pairs]).sum(dim=0)
    return a, by_row / by_row.mean()


def test_a_tied_embedding_s_form_has_the_trace_of_the_sum_row_by_row(make_run: MakeRun):
    cfg = tiny_config(**GPTQ)
    model, window_BT = random_model(cfg), windows_of(cfg, 3)
    found = curvatures_of(make_run(), model, window_BT)["tok_emb.weight"]
    table, reads, inputs, outputs = brute_force(model, window_BT)["tok_emb.weight"]
    for row in range(cfg.vocab_size):
        exact = table.trace() * reads[row] + inputs.trace() * outputs[row]
        trace = found.inputs_II.double().trace() * found.outputs_O[row].double()
        assert float(trace) == pytest.approx(float(exact), rel=1e-3)


def test_watching_changes_neither_the_weights_nor_what_the_model_computes(make_run: MakeRun):
    cfg = tiny_config(**GPTQ)
    model, window_BT = random_model(cfg), windows_of(cfg, 2)
    before, logits = dict(model.state_dict()), model.logits(window_BT[:, :-1])
    curvatures_of(make_run(), model, window_BT)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.logits(window_BT[:, :-1]), logits)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_two_passes_are_one_and_two_ranks_are_one(make_run: MakeRun):
    cfg = tiny_config(**GPTQ | SHAPES["tables"])
    model, window_BT = random_model(cfg), windows_of(cfg, 4)
    whole = curvatures_of(make_run(), model, window_BT)
    both = curvatures_of(make_run(), model, window_BT[:1], window_BT[1:])
    sent: list[torch.Tensor] = []

    class Second(Run):
        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            sent.append(tensor.clone())
            return tensor

    class First(Run):
        def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.add_(sent.pop(0))  # fails if the ranks send in another order

    own = {f.name: getattr(make_run(), f.name) for f in dataclasses.fields(Run)}
    ranks = [kind(**own) for kind in (Second, First)]
    curvatures_of(ranks[0], model, window_BT[:1])
    summed = curvatures_of(ranks[1], model, window_BT[1:])
    assert not sent
    for other in (both, summed):
        for name, curvature in whole.items():
            for a, b in zip(curvature, other[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_coded_matrix_has_a_hessian(shape: str, make_run: MakeRun):
    cfg = tiny_config(**GPTQ | SHAPES[shape])
    model = random_model(cfg)
    found = curvatures_of(make_run(), model, windows_of(cfg, 2))
    roles = {name: role.quant_group for name, role in parameter_roles(model).items()}
    assert found.keys() == {name for name, group in roles.items() if group in CODED}
    for name, (inputs_II, outputs_O) in found.items():
        rows, columns = model.get_parameter(name).shape
        assert inputs_II.shape == (columns, columns) and outputs_O.shape == (rows,)
        assert inputs_II.isfinite().all() and (outputs_O >= 0).all()
        assert float(inputs_II.trace()) > 0 and float(outputs_O.sum()) > 0
        lowest = torch.linalg.eigvalsh(inputs_II.double())[0]
        assert lowest > -1e-5 * inputs_II.trace()
    stacks = group_matrices(cfg, model, found)
    names = [name for stack in stacks for name in stack.names]
    assert sorted(names) == sorted(found) and all(
        stack.hessian_factor is not None for stack in stacks
    )


# --- Calibration ---------------------------------------------------------------------------------


class Text:
    """A loader that notes what is read."""

    def __init__(self, cfg: Config):
        self.cfg, self.reads = cfg, list[tuple[int, int, int]]()

    def read(self, position: int, seq_len: int, batch_tokens: int) -> torch.Tensor:
        self.reads.append((position, seq_len, batch_tokens))
        return windows_of(self.cfg, batch_tokens // seq_len, seed=position)


def test_calibration_reads_the_text_after_what_was_trained_on(make_run: MakeRun):
    run = make_run(**GPTQ, gptq_calibration_batches=3)
    text = Text(run.cfg)
    found: Any = calibrate(run, random_model(run.cfg), text, Progress(7, 1.0, 7 * 256 + 5))  # type: ignore[arg-type]
    assert text.reads == [(1792 - 1792 % 32 + i * 256, 32, 256) for i in range(3)]
    windows = [windows_of(run.cfg, 8, seed=read[0]) for read in text.reads]
    exact = curvatures_of(run, random_model(run.cfg), *windows)
    for name, curvature in found.items():
        torch.testing.assert_close(curvature.inputs_II, exact[name].inputs_II, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("train_s", "batches"), [(0.0, 5), (99.9999, 1), (200.0, 1)])
def test_calibration_ends_where_the_training_budget_would(
    train_s: float, batches: int, make_run: MakeRun
):
    run = make_run(**GPTQ, gptq_calibration_batches=5, max_wallclock_seconds=100.0)
    text = Text(run.cfg)
    calibrate(run, random_model(run.cfg), text, Progress(1, train_s, 0))  # type: ignore[arg-type]
    assert len(text.reads) == batches


def test_calibration_runs_nothing_that_is_compiled(make_run: MakeRun):
    """Its batches have shapes of their own, which would be compiled on the training clock."""
    run = make_run(**GPTQ | {"num_layers": 3}, gptq_calibration_batches=1)
    model, text = random_model(run.cfg), Text(run.cfg)
    expected: Any = calibrate(run, model, text, Progress())  # type: ignore[arg-type]
    names = [name for name in ("run_block", "blend_skip", "nll") if hasattr(model, name)]

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("compiled")

    for name in names:
        setattr(model, name, refuse)
    found: Any = calibrate(run, model, text, Progress())  # type: ignore[arg-type]
    assert len(names) == 3 and all(getattr(model, name) is refuse for name in names)
    for name in expected:
        assert torch.equal(found[name].inputs_II, expected[name].inputs_II)


def test_queries_keys_and_values_share_one_product(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run, sizes, real = make_run(**GPTQ), list[int](), train_gpt.second_moments
    model = random_model(run.cfg)

    def count(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.size(-1))
        return real(x)

    monkeypatch.setattr(train_gpt, "second_moments", count)
    stats = CalibrationStats(model)
    stats.accumulate(windows_of(run.cfg, 2))
    # In each layer: q, k and v; the output projection; both matrices of the MLP. Then the embedding
    # and the head.
    assert len(sizes) == 4 * run.cfg.num_layers + 2
    inputs = [stats.sums[f"blocks.0.attn.c_{x}.weight", "inputs"] for x in "qkv"]
    others = [stats.sums[f"blocks.{i}.attn.c_q.weight", "inputs"] for i in range(2)]
    assert torch.equal(inputs[0], inputs[1]) and torch.equal(inputs[0], inputs[2])
    assert not torch.equal(*others)


@pytest.mark.parametrize("slowdown", [0.1, 1.0, 4.0, 10.0])
def test_calibration_stays_within_the_budget_on_a_machine_of_any_speed(
    slowdown: float, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    """A pass costs CALIBRATION_COST times a step of training, which took `slowdown` seconds."""
    run = make_run(**GPTQ, gptq_calibration_batches=5, max_wallclock_seconds=100.0)
    now_s, rows = [0.0], list[int]()

    def accumulate(self: CalibrationStats, rows_BT: torch.Tensor) -> None:
        rows.append(len(rows_BT))
        now_s[0] += train_gpt.CALIBRATION_COST * slowdown * len(rows_BT) / 8
        real(self, rows_BT)

    real = CalibrationStats.accumulate
    monkeypatch.setattr(CalibrationStats, "accumulate", accumulate)
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    steps = int(90 / slowdown)
    trained = Progress(steps, steps * slowdown, steps * 256)
    text: Any = Text(run.cfg)
    assert calibrate(run, random_model(run.cfg), text, trained)
    assert trained.train_s + now_s[0] <= 100.0
    assert rows == [8] * 5 if slowdown <= 0.1 else 0 < sum(rows) < 40


# --- GPTQ and steps ------------------------------------------------------------------------------


def cost(
    model: GPT, tensors: dict[str, Quantized], found: dict[str, KroneckerHessian]
) -> dict[str, float]:
    """tr(E H E^T) of each matrix's error, in float64."""
    weights, costs = dequantize_all(tensors), {}
    for name, (inputs_II, _) in found.items():
        error_OI = (weights[name] - model.get_parameter(name).detach()).double()
        costs[name] = float((error_OI @ inputs_II.double() * error_OI).sum())
    return costs


@pytest.fixture
def calibrated(make_run: MakeRun) -> tuple[GPT, dict[str, KroneckerHessian]]:
    """A random model with all kinds of matrices, and its curvature."""
    cfg = tiny_config(**GPTQ | SHAPES["tables"])
    model = random_model(cfg)
    return model, curvatures_of(make_run(), model, windows_of(cfg, 8))


@pytest.mark.parametrize("steps", ["max", "percentile"])
def test_gptq_s_error_in_the_hessian_s_norm_is_below_rounding_s(
    steps: str, calibrated: tuple[GPT, dict[str, KroneckerHessian]]
):
    model, found = calibrated
    bits: dict[str, Any] = {f"{group}_bits": 4 for group in CODED}
    costs = []
    for quantizer in ("rtn", "gptq"):
        cfg = dataclasses.replace(model.cfg, quantizer=quantizer, row_steps=steps, **bits)
        stacks = group_matrices(cfg, model, found if quantizer == "gptq" else {})
        costs.append(cost(model, quantize_model(cfg, model, stacks), found))
    for name, rounded in costs[0].items():
        assert costs[1][name] <= 1.02 * rounded, name  # greedy: nearly always, not always, below
    assert sum(costs[1].values()) < 0.9 * sum(costs[0].values())


@pytest.mark.parametrize("sigmas", ["12.85", "attn:12.85,mlp:5,embed:20,table:3"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_clip_sigmas_make_steps_of_so_many_standard_deviations(
    sigmas: str, quantizer: str, calibrated: tuple[GPT, dict[str, KroneckerHessian]]
):
    model, found = calibrated
    cfg = dataclasses.replace(
        model.cfg, clip_sigmas=sigmas, row_steps="solved", quantizer=quantizer, mlp_bits=6
    )
    tensors = quantize_model(cfg, model, group_matrices(cfg, model, found))
    for name in found:
        group = parameter_roles(model)[name].quant_group
        k = {"attn": 12.85, "mlp": 5, "embed": 20, "table": 3}[group] if ":" in sigmas else 12.85
        std_O = model.get_parameter(name).detach().double().numpy().std(axis=1, ddof=1)
        expected_O = k * std_O / (2 ** (cfg.bits[group] - 1) - 1)
        np.testing.assert_allclose(tensors[name].row_scales.astype(float), expected_O, rtol=1e-3)  # type: ignore[union-attr]
        assert tensors[name].column_scales is None


def test_rows_of_zero_deviation_do_not_divide_by_zero():
    cfg = tiny_config(clip_sigmas="12.85", row_steps="solved")
    model = random_model(cfg)
    with torch.no_grad():
        model.tok_emb.weight[0] = 0.3
        model.tok_emb.weight[1] = 0.0
    stored = quantize_model(cfg, model)["tok_emb.weight"]
    assert stored.row_scales is not None and (stored.row_scales > 0).all()
    assert stored.dequantized().isfinite().all()
    assert (stored.dequantized()[1] == 0).all()


@pytest.mark.parametrize("share", [0.9, 0.999, 0.9999984])
def test_percentile_scales_are_a_quantile_of_each_row(share: float, monkeypatch: Any):
    assert train_gpt.CLIP_PERCENTILE == 0.9999984
    monkeypatch.setattr(train_gpt, "CLIP_PERCENTILE", share)
    weight_OI, cfg = torch.randn(5, 400), tiny_config(row_steps="percentile", attn_bits=6)
    expected_O = np.quantile(np.abs(weight_OI.numpy()), share, axis=1) / 31
    scale_O = heuristic_row_scales(cfg, weight_OI, "attn")
    np.testing.assert_allclose(scale_O.numpy(), expected_O, rtol=1e-5)


def test_max_scales_map_the_largest_weight_of_a_row_to_the_largest_code():
    weight_OI, cfg = torch.randn(5, 400), tiny_config(row_steps="max", attn_bits=6)
    scale_O = heuristic_row_scales(cfg, weight_OI, "attn")
    torch.testing.assert_close(scale_O, weight_OI.abs().amax(1) / 31)


def test_percentile_scales_of_a_table_of_more_than_2_to_the_24_numbers():
    weight_OI = torch.randn(65_537, 8).repeat(1, 32)
    cfg = tiny_config(row_steps="percentile")
    scale_O = heuristic_row_scales(cfg, weight_OI, "embed")
    last_O = heuristic_row_scales(cfg, weight_OI[-600:], "embed")
    assert scale_O.shape == (65_537,) and torch.equal(scale_O[-600:], last_O)


@pytest.mark.parametrize("share", [0.03, 0.5])
def test_pruning_zeroes_the_smallest_share_of_large_matrices_alone(share: float):
    cfg = tiny_config(vocab_size=2200, prune_frac=share)  # 2200 x 32 > 65,536 > the others
    model = random_model(cfg)
    for stack in group_matrices(cfg, model, {}):
        for name, weight_OI in zip(stack.names, stack.weight_LOI, strict=True):
            exact_OI = model.get_parameter(name).detach()
            zeros = weight_OI == 0
            if name == "tok_emb.weight":
                assert float(zeros.float().mean()) == pytest.approx(share, abs=1e-3)
                assert exact_OI[zeros].abs().max() <= exact_OI[~zeros].abs().min()
            assert torch.equal(weight_OI[~zeros], exact_OI[~zeros])
            assert name == "tok_emb.weight" or not zeros.any()
    small = torch.randn(256, 256)  # of exactly 65,536 numbers
    assert torch.equal(prune_smallest(small, 0.5), small)


# --- The byte budget -----------------------------------------------------------------------------


def normal_stack(rows: int = 100, columns: int = 80) -> MatrixGroup:
    """A stack of one matrix whose columns' deviations vary by a factor of 20."""
    spread_LI = torch.logspace(-0.65, 0.65, columns)[None]
    weight_LOI = torch.randn(1, rows, columns) * spread_LI[:, None]
    return MatrixGroup(
        ["x"], weight_LOI, None, torch.ones(1, rows), torch.ones(1, columns), 8, spread_LI
    )


def size_of(stack: MatrixGroup, multiplier: float) -> float:
    """Bytes of the rounded weights by their exact entropy, column by column."""
    bits = 0.0
    for column_O in (stack.weight_LOI[0] / multiplier).round().T:
        counts = torch.unique(column_O, return_counts=True)[1].double()
        bits += float((counts * (counts.sum() / counts).log2()).sum())
    return bits / 8


class Encoder:
    """Makes payloads of a size that depends on the multiplier, and counts."""

    def __init__(self, size: Callable[[float], float]):
        self.size, self.calls = size, list[tuple[float, int]]()

    def __call__(self, multiplier: float) -> bytes:
        payload = bytes(max(1, int(self.size(multiplier))))
        self.calls.append((multiplier, len(payload)))
        return payload


@pytest.mark.parametrize("budget", [2_500, 3_000, 4_000, 5_000])
@pytest.mark.parametrize(("factor", "extra"), [(1.0, 0), (1.15, 300), (0.9, 900)])
def test_the_budget_is_filled_by_an_encoder_that_costs_more_or_less_than_estimated(
    budget: int, factor: float, extra: int
):
    stack = normal_stack(rows=300, columns=40)
    encoder = Encoder(lambda multiplier: factor * size_of(stack, multiplier) + extra)
    payload = fill_budget([stack], encoder, budget)
    assert 0.998 * budget <= len(payload) <= budget, encoder.calls
    assert len(encoder.calls) <= TRIES


def test_an_encoder_with_noise_never_passes_the_budget():
    stack, budget = normal_stack(), 3_000
    for seed in range(20):
        rng = np.random.default_rng(seed)

        def noisy(m: float, rng: np.random.Generator = rng) -> float:
            return size_of(stack, m) * (1 + 0.01 * rng.standard_normal())

        encoder = Encoder(noisy)
        payload = fill_budget([stack], encoder, budget)
        below = [size for _, size in encoder.calls if size <= budget]
        assert len(encoder.calls) <= TRIES and len(payload) == max(below), encoder.calls
        assert len(payload) > 0.97 * budget


@pytest.mark.parametrize("budget", [-5, 0, 1, 200])
def test_a_budget_that_cannot_be_reached_gives_an_artifact_that_is_too_large(budget: int):
    # account_sizes fails the run then, with the numbers.
    encoder = Encoder(lambda multiplier: size_of(normal_stack(), multiplier) + 250)
    payload = fill_budget([normal_stack()], encoder, budget)
    assert len(payload) > budget and 0 < len(encoder.calls) <= TRIES
    assert all(math.isfinite(multiplier) for multiplier, _ in encoder.calls)


def test_a_budget_beyond_the_finest_steps_is_not_filled():
    stack = normal_stack()
    encoder = Encoder(lambda multiplier: size_of(stack, multiplier))
    payload = fill_budget([stack], encoder, 10**7)
    (_, size), *more = encoder.calls
    assert not more and len(payload) == size
    # Empirical entropy of 100 samples a column is less than the true one: never above.
    assert size < MAX_BITS_PER_WEIGHT / 8 * stack.weight_LOI.numel()
    fine = size_of(stack, encoder.calls[0][0])
    assert fine > 0.8 * min(MAX_BITS_PER_WEIGHT, math.log2(100)) / 8 * stack.weight_LOI.numel()


@pytest.fixture(scope="module")
def larger() -> tuple[GPT, dict[str, KroneckerHessian]]:
    """A random model of 40,000 weights and its curvature on random text."""
    cfg = tiny_config(quantizer="gptq", gate_bits=8, vocab_size=256)
    model = random_model(cfg)
    moments = CalibrationStats(model)
    moments.accumulate(windows_of(cfg, 16))
    return model, moments.hessians(lone_run(cfg))


def export(run: Run, model: GPT, found: dict[str, KroneckerHessian]) -> tuple[bytes, int]:
    """The artifact, and how often one was made."""
    payload = quantize_and_encode(run, model, found, SHA)
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    events = [record for line in lines if (record := json.loads(line))["event"] == "quantized"]
    assert len(payload) in [event["artifact_bytes"] for event in events]
    return payload, len(events)


EXPORT = {
    "vocab_size": 256,
    "quantizer": "gptq",
    "row_steps": "solved",
    "gate_bits": 8,
}
CODE_BYTES = 777


@pytest.mark.parametrize(
    ("grid", "compressor", "budget"),
    [
        pytest.param("uniform", "ans", 9_000, marks=pytest.mark.slow),
        pytest.param("uniform", "ans", 16_000, marks=pytest.mark.slow),
        pytest.param("uniform", "ans", 22_000, marks=pytest.mark.slow),
        ("uniform", "brotli", 16_000),
        pytest.param("trellis", "ans", 12_000, marks=pytest.mark.slow),
        pytest.param("trellis", "ans", 18_000, marks=pytest.mark.slow),
    ],
)
def test_solved_steps_fill_the_budget_with_code_and_artifact(
    grid: str, compressor: str, budget: int, larger: Any, make_run: MakeRun
):
    run = make_run(
        **EXPORT, quant_grid=grid, compressor=compressor, artifact_budget_bytes=budget + CODE_BYTES
    )
    (run.directory / "train_gpt.py").write_bytes(bytes(CODE_BYTES))
    payload, times = export(run, *larger)
    # The size of a brotli stream of this length jumps by 1 % between neighboring scales.
    fill = 0.99 if compressor == "brotli" else 0.998
    assert fill * budget <= len(payload) <= budget and times <= TRIES


def test_clip_sigmas_switch_the_solver_off(larger: Any, make_run: MakeRun):
    run = make_run(**EXPORT, clip_sigmas="12.85", artifact_budget_bytes=10**6, attn_bits=6)
    (run.directory / "train_gpt.py").write_bytes(bytes(CODE_BYTES))
    payload, times = export(run, *larger)
    assert times == 1
    exact = quantize_model(run.cfg, larger[0], group_matrices(run.cfg, *larger))
    assert payload == encode_artifact(run.cfg, exact, SHA)


def test_a_large_budget_is_not_filled_with_noise(larger: Any, make_run: MakeRun):
    run = make_run(**EXPORT, compressor="ans")
    (run.directory / "train_gpt.py").write_bytes(bytes(CODE_BYTES))
    payload, times = export(run, *larger)
    weights = sum(larger[0].get_parameter(name).numel() for name in larger[1])
    assert times == 1 and len(payload) < 1.1 * MAX_BITS_PER_WEIGHT / 8 * weights + 3000
    model = train_gpt.GPT(
        run.cfg, train_gpt.choose_attention_backend(run.cfg, run.device, run.dtype), run.dtype
    )
    header, body = decode_header(payload)
    model.load_state_dict(dequantize_all(decode_tensors(header, body, *model_layout(run.cfg))))
    window_BT = windows_of(run.cfg, 4, seed=5)
    losses = [
        float(m.eval_nll(window_BT[:, :-1], window_BT[:, 1:]).mean()) for m in (model, larger[0])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_solved_steps_cost_less_at_equal_bytes_than_equal_clipping(larger: Any, make_run: MakeRun):
    model, found = larger
    six = {"attn_bits": 6, "mlp_bits": 6, "embed_bits": 6}

    def loss(payload: bytes, cfg: Config) -> float:
        """Half of this is what the Kronecker form says that the loss grows by."""
        header, body = decode_header(payload)
        weights, total = dequantize_all(decode_tensors(header, body, *model_layout(cfg))), 0.0
        for name, (inputs_II, outputs_O) in found.items():
            error_OI = (weights[name] - model.get_parameter(name).detach()).double()
            by_row_O = (error_OI @ inputs_II.double() * error_OI).sum(dim=1)
            total += float((by_row_O * outputs_O).sum())
        return total

    by_hand = make_run(**EXPORT | six, compressor="ans", clip_sigmas="10")
    exact = quantize_model(by_hand.cfg, model, group_matrices(by_hand.cfg, model, found))
    reference = encode_artifact(by_hand.cfg, exact, SHA)
    run = make_run(**EXPORT, compressor="ans", artifact_budget_bytes=len(reference))
    (run.directory / "train_gpt.py").write_bytes(b"")
    solved, _ = export(run, model, found)
    assert len(solved) <= len(reference)
    # A random model knows no rows that matter much more than others: a trained one gains more.
    assert loss(solved, run.cfg) < 0.9 * loss(reference, by_hand.cfg)


# --- Round trips of every combination ------------------------------------------------------------


def assert_is_assembled(model: GPT, tensors: dict[str, Quantized]) -> None:
    """The model's parameters are, bit for bit, what the stored tensors say."""
    expected = dequantize_all(tensors)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(parameters[name].detach(), weight), name


COMPRESSORS = ("ans", "zlib", "zstd", "lzma", "brotli", "brotli_shuffled")


def allowed(**knobs: Any) -> bool:
    try:
        tiny_config(**knobs)
    except InputError:
        return False
    return True


COMBINATIONS = [
    knobs
    for quantizer, grid, (steps, sigmas), compressor in itertools.product(
        ("rtn", "gptq"),
        ("uniform", "trellis"),
        [("solved", ""), ("max", ""), ("percentile", ""), ("solved", "9")],
        COMPRESSORS,
    )
    if allowed(
        **(
            knobs := {
                "quantizer": quantizer,
                "quant_grid": grid,
                "row_steps": steps,
                "clip_sigmas": sigmas,
                "compressor": compressor,
            }
        )
    )
]


def test_config_allows_rounding_in_3_ways_and_gptq_in_8_for_each_compressor():
    assert len(COMBINATIONS) == 6 * (3 + 8)


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[GPT, dict[str, KroneckerHessian]]]:
    """A random model that has every kind of tensor, and its curvature."""
    cfg = tiny_config(**GPTQ | SHAPES["tables"] | SHAPES["values"])
    model = random_model(cfg)
    moments = CalibrationStats(model)
    moments.accumulate(windows_of(cfg, 2))
    yield model, moments.hessians(lone_run(cfg))


def in_turn(knobs: dict[str, Any]) -> Any:
    """The combination; slow if its coder is general and another of its kind stands for it."""
    name = "-".join(filter(None, knobs.values()))
    rounds = knobs["quantizer"] == "rtn"
    plain = knobs["row_steps"] == ("max" if rounds else "solved") and not knobs["clip_sigmas"]
    stands = knobs["compressor"] in ("ans", "zlib") or plain
    stands &= knobs["compressor"] != "lzma" or rounds
    stands &= knobs["compressor"] in ("ans", "brotli_shuffled")
    stands &= knobs["quant_grid"] == "uniform" or plain
    return pytest.param(knobs, id=name, marks=[] if stands else [pytest.mark.slow])


@pytest.mark.parametrize("knobs", [*map(in_turn, COMBINATIONS)])
def test_a_model_read_back_is_what_was_stored_and_is_stored_to_the_same_bytes(
    knobs: dict[str, Any], small: Any, make_run: MakeRun, tmp_path: Path
):
    model, found = small
    gate_bits = len(str(knobs)) % 2 * 8 + 8  # both ways to store gates, some of each
    cfg = dataclasses.replace(model.cfg, **knobs, gate_bits=gate_bits)

    def stored() -> dict[str, Quantized]:
        stacks = group_matrices(cfg, model, found if cfg.quantizer == "gptq" else {})
        spread = float(torch.cat([stack.column_std_LI.flatten() for stack in stacks]).median())
        return quantize_model(cfg, model, stacks, spread / 15 if cfg.solves_scales else 1.0)

    tensors = stored()
    payload = encode_artifact(cfg, tensors, SHA)
    assert encode_artifact(cfg, stored(), SHA) == payload
    path = tmp_path / "a.bin"
    path.write_bytes(payload)
    assert_is_assembled(read_artifact(path, make_run(), SHA), tensors)
    header, body = decode_header(payload)
    back = decode_tensors(header, body, *model_layout(cfg))
    assert encode_artifact(cfg, back, SHA) == payload
    weights = dequantize_all(tensors)
    for name in found:  # 8 bits, or 15 steps a deviation: near the model itself
        exact = model.get_parameter(name).detach()
        assert float((weights[name] - exact).norm() / exact.norm()) < 0.35, name


ODD_SHAPES: dict[str, dict[str, Any]] = {
    "one block": {"num_layers": 1},
    "lanes": {"parallel_residual": "lanes", "parallel_start_layer": 1},
    "routed": {"parallel_residual": "routed", "parallel_start_layer": 1},
    "merge": {"parallel_residual": "merge", "parallel_start_layer": 1},
    "x0": {"value_residual": "x0"},
    "vrl": {"value_residual": "vrl"},
    "two caps": {"asym_logit_rescale": True},
    "one head": {"num_heads": 1, "num_kv_heads": 1},
    "loops": SHAPES["loops"] | {"skip_gates": True},
    "narrow": {"model_dim": 2, "num_heads": 1, "num_kv_heads": 1, "mlp_mult": 0.5},
    "blend": {"smear_gate": "blend", "attn_gate": "input"},
}


@pytest.mark.parametrize("compressor", ["ans", "zlib"])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_every_shape_of_model_is_written_and_read_with_gates_in_8_bits(
    shape: str, compressor: str, make_run: MakeRun, tmp_path: Path
):
    cfg = tiny_config(
        **{**GPTQ, "quantizer": "rtn", **ODD_SHAPES[shape]},
        compressor=compressor,
        gate_bits=8,
    )
    model = random_model(cfg)
    tensors = quantize_model(cfg, model)
    path = tmp_path / "a.bin"
    path.write_bytes(encode_artifact(cfg, tensors, SHA))
    back = read_artifact(path, make_run(), SHA)
    assert_is_assembled(back, tensors)
    for name, exact in model.named_parameters():
        error = (back.get_parameter(name) - exact).detach().abs()
        step = exact.detach().abs().max() / 127 if exact.numel() else torch.tensor(0.0)
        # Coded steps are the nearest power of 2^(1/8), so that the largest may be cut by 4.4 %.
        bound = torch.maximum(0.55 * step, 0.045 * exact.detach().abs())
        assert (error <= bound + 1e-6).all(), name


# --- Several processes ---------------------------------------------------------------------------

KEEP = f"""
import os, sys
import torch
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_gpt
from tests.conftest import randomize_

build, calibrate = train_gpt.build_model, train_gpt.calibrate

def build_random(run):
    model = build(run)
    randomize_(model)
    return model

def calibrate_and_keep(run, *args):
    found = calibrate(run, *args)
    torch.save({{k: tuple(v) for k, v in found.items()}}, f"found_{{run.rank}}.pt")
    return found

train_gpt.build_model, train_gpt.calibrate = build_random, calibrate_and_keep
sys.exit(train_gpt.main())
"""
STILL = dict.fromkeys(["embed_lr", "head_lr", "tied_embed_lr", "scalar_lr", "matrix_lr"], 0.0)
DEFAULT_EXPORT = {  # the script's own defaults, which tiny_config replaces by plainer ones
    name: getattr(Config(), name)
    for name in ("quantizer", "quant_grid", "row_steps", "gate_bits", "compressor")
}


@pytest.mark.slow
def test_two_processes_find_the_curvature_that_one_finds(data: TinyData, tmp_path: Path):
    script = tmp_path / "keep.py"
    script.write_text(KEEP)
    knobs = dict(STILL, run_dir="run", num_layers=2, iterations=1, gptq_calibration_batches=2)
    cfg = tiny_config(**{**DEFAULT_EXPORT, **knobs, "data_path": str(data.folder)})
    env, found = {**environment(cfg), "MODE": "train"}, {}
    for count in (1, 2):
        work = tmp_path / f"work_{count}"
        work.mkdir()
        results = (
            run_ranks([env] * count, work, script) if count > 1 else [run_script(env, work, script)]
        )
        assert [result.status for result in results] == [0] * count, results[0].err
        found[count] = [torch.load(work / f"found_{rank}.pt") for rank in range(count)]
    one, (first, second) = found[1][0], found[2]
    assert one.keys() == first.keys() == second.keys()
    for name, pair in one.items():
        for a, b, c in zip(pair, first[name], second[name], strict=True):
            torch.testing.assert_close(b, a, rtol=2e-3, atol=1e-4 * float(a.abs().max()))
            assert torch.equal(b, c), "replicas differ"


RAISE = f"""
import os, sys
import torch
sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_gpt

def no_decomposition():
    torch.linalg.cholesky(-torch.eye(3))

def interrupted():
    raise train_gpt.Interrupted("a signal")

def refused():
    raise train_gpt.InputError("a file")

cfg = train_gpt.config_from_env(os.environ)
with train_gpt.start_run(cfg, os.environ) as run:
    assert run.run_on_rank0(lambda: {{"rank": run.rank}}) == {{"rank": 0}}
    for work in (no_decomposition, interrupted, refused, lambda: 1 // 0):
        try:
            run.run_on_rank0(work)
        except Exception as error:
            print(type(error).__name__, str(error)[:20], flush=True)
    print(run.run_on_rank0(lambda: "goes on"))
"""


def test_what_rank_0_raises_is_raised_on_all_ranks_and_they_go_on(tmp_path: Path):
    script, work = tmp_path / "raise.py", tmp_path / "work"
    script.write_text(RAISE)
    work.mkdir()
    env = environment(tiny_config(run_dir="run"))
    results = run_ranks([env, env], work, script)
    assert [result.status for result in results] == [0, 0], results[0].err + results[1].err
    lines = [result.out.splitlines() for result in results]
    assert lines[0] == lines[1]
    names = [line.split()[0] for line in lines[0]]
    assert names == ["_LinAlgError", "Interrupted", "InputError", "ZeroDivisionError", "goes"]
