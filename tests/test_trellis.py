"""GPTQ on both grids: against rounding, a plain loop, every path of the trellis; its gain."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import (
    NEXT_STATES,
    RATE_LAMBDA,
    TRELLIS_SEGMENT,
    as_cuda_graph,
    factor_hessians,
    gaussian_code_bits,
    gptq,
    round_trellis,
    round_uniform,
    trellis_levels,
    viterbi,
    viterbi_on_device,
)

QMAX = 31
uniform = functools.partial(round_uniform, qmax=QMAX)


NUM_STATES = len(NEXT_STATES) // 2


def trellis(bits_LIV: torch.Tensor, rate_lambda: float = 0.0):
    return functools.partial(round_trellis, bits_LIV=bits_LIV, rate_lambda=rate_lambda)


def correlated_problem(num_matrices: int, rows: int, columns: int):
    """Weights, Hessians of correlated inputs, steps of 0.4 standard deviations a row."""
    weight_LOI = torch.randn(num_matrices, rows, columns)
    x_LNI = torch.randn(num_matrices, 4 * columns, columns) @ torch.randn(
        num_matrices, columns, columns
    )
    return weight_LOI, x_LNI.mT @ x_LNI, 0.4 * weight_LOI.std(dim=2)


def dequantized(code_OI: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(trellis_levels(code_OI.numpy())) / 2


def weighted_error(error_OI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    return float((error_OI.double() @ hessian_II.double() * error_OI).sum())


def entropy_bits(code: np.ndarray) -> float:
    share = np.unique(code, return_counts=True)[1] / code.size
    return float(-(share * np.log2(share)).sum())


def reference_gptq(weight_OI, hessian_II, step_OI):
    """The recursion as a plain loop in float64: columns one by one, every update at once."""
    h, w = hessian_II.double().clone(), weight_OI.double().clone()
    for i in range(len(h)):
        if h[i, i] == 0:
            h[i, i], w[:, i] = 1, 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    order = h.diagonal().argsort(descending=True)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, step_OI, code = w[:, order], step_OI.double()[:, order], torch.zeros_like(w)
    for i in range(len(h)):
        code[:, i] = (w[:, i] / step_OI[:, i]).round().clamp(-QMAX, QMAX)
        error = (w[:, i] - code[:, i] * step_OI[:, i]) / u[i, i]
        for k in range(i, len(h)):
            w[:, k] -= error * u[i, k]
    return code[:, order.argsort()].to(torch.int16)


def test_with_an_identity_hessian_gptq_is_rounding():
    weight_LOI = torch.randn(2, 12, 200)
    step_LO, step_LI = weight_LOI.std(dim=2) / 3, torch.rand(2, 200) + 0.5
    hessian_LII = 7 * torch.eye(200).expand(2, 200, 200)
    code_LOI = gptq(weight_LOI, factor_hessians(hessian_LII), step_LO, step_LI, uniform)
    exact = weight_LOI / (step_LO[:, :, None] * step_LI[:, None])
    assert torch.equal(code_LOI, exact.round().clamp(-QMAX, QMAX).to(torch.int16))


def test_gptq_beats_rounding_on_correlated_inputs():
    weight_LOI, hessian_LII, step_LO = correlated_problem(1, 32, 64)
    code_LOI = gptq(weight_LOI, factor_hessians(hessian_LII), step_LO, torch.ones(1, 64), uniform)
    step_O1 = step_LO[0, :, None]
    rounded_OI = (weight_LOI[0] / step_O1).round() * step_O1
    errors = [
        weighted_error(q - weight_LOI[0], hessian_LII[0])
        for q in (code_LOI[0] * step_O1, rounded_OI)
    ]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("columns", [5, 128, 200, 300])  # within, at and beyond a block of 128
def test_gptq_equals_the_plain_loop_with_dead_columns_and_column_steps(columns: int):
    weight_LOI, hessian_LII, step_LO = correlated_problem(1, 40, columns)
    hessian_LII += 0.3 * hessian_LII.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns)
    hessian_LII[:, [1, 4]] = 0
    hessian_LII[:, :, [1, 4]] = 0
    step_LI = torch.rand(1, columns) + 0.5
    code_LOI = gptq(weight_LOI, factor_hessians(hessian_LII), step_LO, step_LI, uniform)
    step_OI = step_LO[0, :, None] * step_LI[0]
    reference_OI = reference_gptq(weight_LOI[0], hessian_LII[0], step_OI)
    # float32 may fall to the other side of a tie, whose error the later columns then spread.
    assert (code_LOI[0] != reference_OI).float().mean() < 0.01
    assert (code_LOI[0][:, [1, 4]] == 0).all()


@pytest.mark.parametrize("grid", ["uniform", "trellis"])
def test_a_stack_gives_the_codes_that_its_matrices_give_alone(
    grid: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_gpt, "TRELLIS_SEGMENT", 32)
    weight_LOI, hessian_LII, step_LO = correlated_problem(3, 70, 150)
    step_LI = torch.rand(3, 150) + 0.5
    bits_LIV = gaussian_code_bits(2 + torch.rand(3, 150), QMAX)

    def codes(one: slice) -> torch.Tensor:
        rounding = trellis(bits_LIV[one], 0.05) if grid == "trellis" else uniform
        factor = factor_hessians(hessian_LII[one])
        return gptq(weight_LOI[one], factor, step_LO[one], step_LI[one], rounding)

    alone_LOI = torch.cat([codes(slice(i, i + 1)) for i in range(3)])
    # Matrix products of other sizes may add in another order: a rare tie falls otherwise.
    assert (codes(slice(0, 3)) != alone_LOI).float().mean() < 0.01


def test_the_factor_gives_each_columns_conditional_deviation_in_the_weights_order():
    _, hessian_LII, _ = correlated_problem(2, 3, 20)
    factor = factor_hessians(hessian_LII)
    for hessian_II, order_I, std_I in zip(
        hessian_LII, factor.order_LI, factor.upper_diagonal_LI, strict=True
    ):
        damped = hessian_II.double() + 0.01 * hessian_II.diagonal().mean() * torch.eye(20)
        for position in (0, 7, 19):  # what is left of H_jj once the later columns are eliminated
            late = order_I[position:]
            variance = torch.linalg.inv(damped[late][:, late])[0, 0].item()
            assert float(std_I[order_I[position]]) == pytest.approx(variance**0.5, rel=1e-3)


def test_every_state_is_entered_by_two_branches_of_one_quantiser_and_both_parities():
    for state in range(NUM_STATES):
        branches = np.flatnonzero(NEXT_STATES == state)
        assert len(branches) == 2 and len(set(branches // 2 % 2)) == 1
        assert set(branches % 2) == {0, 1}


@pytest.mark.parametrize("length", [1, 2, 5, 8, 10])
def test_viterbi_finds_the_cheapest_of_all_paths(length: int):
    cost_T4N = np.random.default_rng(length).random((length, 4, 3), np.float32)
    subset_TN = viterbi(cost_T4N)
    for segment in range(3):
        costs = {}
        for parities in itertools.product((0, 1), repeat=length):
            state, path = 0, []
            for parity in parities:
                path.append(2 * (state % 2) + parity)
                state = NEXT_STATES[2 * state + parity]
            costs[tuple(path)] = cost_T4N[np.arange(length), path, segment].sum()
        assert tuple(subset_TN[:, segment]) == min(costs, key=lambda path: costs[path])


@pytest.mark.parametrize("num_segments", [1, 3, 44])
def test_the_search_on_a_device_finds_a_path_as_cheap_as_the_host_s(num_segments: int):
    cost_T4N = torch.rand(TRELLIS_SEGMENT, 4, num_segments) * 9
    costs = []
    for subset_TN in (torch.from_numpy(viterbi(cost_T4N.numpy())), viterbi_on_device(cost_T4N)):
        assert subset_TN.shape == (TRELLIS_SEGMENT, num_segments)
        state_N = np.zeros(num_segments, np.int64)
        for subset_N in subset_TN.numpy():  # each of the quantiser that the state asks for
            assert (subset_N >> 1 == state_N & 1).all()
            state_N = NEXT_STATES[2 * state_N + (subset_N & 1)].astype(np.int64)
        costs.append(cost_T4N.double().gather(1, subset_TN[:, None]).sum(dim=(0, 1)))
    # Sums in another order may round another way: paths are as cheap, not always the same.
    torch.testing.assert_close(costs[1], costs[0], rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_the_trellis_s_codes_are_the_host_s_on_a_gpu():
    target_LO, column_L = 4 * torch.randn(3, 700), torch.tensor([0, 4, 2])
    bits_LIV = gaussian_code_bits(0.5 + torch.rand(3, 5), 30)
    on_host = trellis(bits_LIV, RATE_LAMBDA)(target_LO, column_L)
    on_gpu = trellis(bits_LIV.cuda(), RATE_LAMBDA)(target_LO.cuda(), column_L.cuda())
    for found, expected in zip(on_gpu, on_host, strict=True):
        assert (found.cpu() == expected).float().mean() > 0.999  # ties may break another way


@pytest.mark.gpu
def test_a_cuda_graph_of_the_search_finds_what_the_search_finds():
    bits_LIV = gaussian_code_bits(0.5 + torch.rand(3, 5), 30).cuda()
    search = trellis(bits_LIV, RATE_LAMBDA)
    column_L = torch.tensor([0, 4, 2]).cuda()
    graph = as_cuda_graph(search, torch.zeros(3, 700).cuda(), torch.zeros_like(column_L))
    assert graph is not search
    for _ in range(3):
        target_LO = 4 * torch.randn(3, 700).cuda()
        both = graph(target_LO, column_L), search(target_LO, column_L)
        for found, expected in zip(*both, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 40, 64])
def test_the_decoder_finds_the_values_that_the_encoder_chose(
    rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_gpt, "TRELLIS_SEGMENT", 16)
    target_LO = 4 * torch.randn(2, rows)
    target_LO[0, 0] = 100.0  # far beyond the largest code
    bits_LIV = gaussian_code_bits(torch.full((2, 3), 4.0), 15)
    code_LO, value_LO = trellis(bits_LIV, 0.05)(target_LO, torch.tensor([2, 0]))
    code_OL = code_LO.T.to(torch.int16).contiguous()
    assert torch.equal(dequantized(code_OL), value_LO.T)
    assert code_OL.abs().max() == 15 and code_LO[0, 0] == 15
    inside = target_LO.abs() < 14  # and so between two levels of each subset, 2 steps apart
    assert ((value_LO - target_LO).abs()[inside] <= 1).all()


def test_by_default_decoder_and_encoder_use_the_same_trellis_over_several_segments():
    target_LO = 4 * torch.randn(1, 2 * TRELLIS_SEGMENT + 7)
    bits_LIV = gaussian_code_bits(torch.full((1, 1), 4.0), 63)
    code_LO, value_LO = trellis(bits_LIV, RATE_LAMBDA)(target_LO, torch.tensor([0]))
    code_OI = code_LO.T.to(torch.int16).contiguous().numpy()
    level_OI = trellis_levels(code_OI)
    assert torch.equal(torch.from_numpy(level_OI) / 2, value_LO.T)
    assert (level_OI[::TRELLIS_SEGMENT] % 2 == 0).all() and (level_OI % 2).any()


@pytest.mark.parametrize("limit", [31, 127, 1023])
def test_the_largest_codes_lead_to_levels_without_overflow(limit: int):
    dtype = np.int8 if limit < 128 else np.int16
    code_OI = np.array([[limit], [-limit], [limit], [limit], [-limit]], dtype=dtype)
    level_OI = trellis_levels(code_OI)
    assert np.array_equal(level_OI, 2 * code_OI.astype(int) + level_OI % 2)


def test_rows_that_fill_a_segment_up_cost_nothing(monkeypatch: pytest.MonkeyPatch):
    target_LO = 4 * torch.randn(1, 11)
    bits_LIV, column_L = gaussian_code_bits(torch.full((1, 1), 4.0), 15), torch.tensor([0])
    values = []
    for segment in (11, 64):
        monkeypatch.setattr(train_gpt, "TRELLIS_SEGMENT", segment)
        values.append(trellis(bits_LIV, 0.05)(target_LO, column_L)[1])
    assert torch.equal(*values)


def test_each_segment_begins_in_state_0_and_the_states_walk_by_parity(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(train_gpt, "TRELLIS_SEGMENT", 16)
    code_OI = np.random.default_rng(0).integers(-9, 9, (50, 7), dtype=np.int8)
    level_OI = trellis_levels(code_OI)
    for column in range(7):
        state = 0
        for row in range(50):
            state = 0 if row % 16 == 0 else state
            assert level_OI[row, column] == 2 * code_OI[row, column] + state % 2
            state = NEXT_STATES[2 * state + code_OI[row, column] % 2]


def test_zeros_stay_zeros_whatever_the_price_of_bits():
    bits_LIV = gaussian_code_bits(torch.full((1, 1), 3.0), 15)
    for rate_lambda in (0.0, 0.1):
        code_LO, value_LO = trellis(bits_LIV, rate_lambda)(torch.zeros(1, 300), torch.tensor([0]))
        assert not code_LO.any() and not value_LO.any()


@pytest.mark.parametrize("std", [0.5, 2.0, 10.0])
def test_gaussian_code_bits_make_a_distribution_of_each_quantisers_codes(
    std: float,
):
    share_V = 2 ** -gaussian_code_bits(torch.tensor([[std]]), 63)[0, 0].double()
    assert float(share_V[0] + 2 * share_V[2::2].sum()) == pytest.approx(1, abs=1e-5)
    assert float(2 * share_V[1::2].sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("rate_lambda", "gain_db"),
    [(0, 1.0), (RATE_LAMBDA, 1.1)],
)
def test_at_equal_entropy_the_trellis_is_a_decibel_better(rate_lambda, gain_db):
    torch.manual_seed(0)
    step, x_LO = 0.4145, torch.randn(1, 2**18)
    uniform_LO = (x_LO / step).round()
    bits_LIV = gaussian_code_bits(torch.full((1, 1), 1 / step), QMAX)
    code_LO, value_LO = trellis(bits_LIV, rate_lambda)(
        x_LO / step, torch.zeros(1, dtype=torch.long)
    )
    is_q1 = ((value_LO - code_LO) > 0).numpy()
    bits = [entropy_bits(code_LO.numpy()[is_q1 == q]) for q in (False, True)]
    mean_bits = np.average(bits, weights=[(is_q1 == q).sum() for q in (False, True)])
    errors = [float((value * step - x_LO).square().mean()) for value in (uniform_LO, value_LO)]
    saved_bits = entropy_bits(uniform_LO.numpy()) - mean_bits
    # A bit is worth 20 log10(2) dB where the error falls as 2^(-2 bits), as it does here.
    assert 10 * np.log10(errors[0] / errors[1]) + 20 * np.log10(2) * saved_bits > gain_db
