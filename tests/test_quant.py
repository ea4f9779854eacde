"""Quantization: codes and scales of every width, the error they leave, what each tensor gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from tests import bench_quant
from tests.conftest import random_model, tiny_config
from train_gpt import Config, Quantized, quantize_model, quantize_rows

BITS = range(4, 9)
SMALLEST_NORMAL = 2.0**-14  # of fp16: below it a scale would lose digits


def rows_of_many_sizes() -> torch.Tensor:
    """Rows from far below to far above what fp16 resolves; a zero row; one large number a row."""
    sizes = 10.0 ** torch.arange(-9, 6)
    w = torch.randn(15, 64) * sizes[:, None]
    outlier = torch.zeros(64)
    outlier[3] = 5.0
    return torch.cat([w, torch.zeros(1, 64), outlier[None], -outlier[None]])


@pytest.mark.parametrize("bits", BITS)
def test_codes_use_their_range_and_no_more(bits: int):
    stored = quantize_rows(rows_of_many_sizes(), bits)
    qmax = 2 ** (bits - 1) - 1
    assert stored.bits == bits and stored.values.dtype == np.int8
    assert np.abs(stored.values).max() == qmax  # symmetric: -(qmax + 1) does not occur
    largest = np.abs(stored.values).max(axis=1)
    w = rows_of_many_sizes()
    ordinary = (w.abs().amax(dim=1) / qmax > SMALLEST_NORMAL).numpy()
    assert ordinary.sum() > 8 and (largest[ordinary] == qmax).all()


@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_off_by_more_than_half_a_step(bits: int):
    w, qmax = rows_of_many_sizes(), 2 ** (bits - 1) - 1
    error = (quantize_rows(w, bits).dequantized() - w).double().abs()
    step = (w.double().abs().amax(dim=1) / qmax).clamp_min(SMALLEST_NORMAL)
    # The step is rounded to fp16, 11 bits, which can make it 2^-11 larger. The largest number of a
    # row lies within qmax * 2^-11 < 0.07 steps of the last level, so it is not the worst case.
    assert (error <= step[:, None] * (0.5 + 2.0**-11)).all()
    assert (error.amax(dim=1)[9:15] > 0.4 * step[9:15]).all()  # so the bound is not idle


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_nearest_levels_of_the_stored_scale(bits: int):
    w = torch.randn(40, 300) * torch.logspace(-3, 2, 40)[:, None]
    stored = quantize_rows(w, bits)
    assert stored.row_scales is not None and stored.row_scales.dtype == np.float16
    scale, qmax = stored.row_scales.astype(np.float64), 2 ** (bits - 1) - 1
    levels = np.arange(-qmax, qmax + 1)
    for row in range(40):
        distance = np.abs(w[row].double().numpy()[:, None] - levels * scale[row])
        chosen = np.take_along_axis(
            distance, stored.values[row][:, None].astype(int) + qmax, axis=1
        )
        # float32 division may choose between two levels that are equally near to 7 digits.
        assert (chosen[:, 0] <= distance.min(axis=1) + 1e-6 * scale[row] * qmax).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_scale_is_the_rows_largest_number_over_the_largest_code(bits: int):
    w = torch.randn(7, 20)
    stored = quantize_rows(w, bits)
    assert stored.row_scales is not None
    expected = w.abs().amax(dim=1).numpy() / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(stored.row_scales.astype(np.float32), expected, rtol=2**-11)


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_zeros_and_a_tiny_row_come_back_as_zeros_not_as_nan(bits: int):
    w = torch.zeros(3, 8)
    w[1] = 1e-12
    w[2] = -1e-40  # subnormal in float32 already
    stored = quantize_rows(w, bits)
    assert (stored.values == 0).all() and stored.row_scales is not None
    assert (stored.row_scales == np.float16(SMALLEST_NORMAL)).all()
    assert (stored.dequantized() == 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_huge_row_does_not_come_back_as_nan(bits: int):
    w = torch.randn(2, 8)
    w[1] *= 1e9
    try:
        back = quantize_rows(w, bits).dequantized()
    except (ValueError, RuntimeError):
        return  # refusing it is as good
    assert back.isfinite().all()


@pytest.mark.parametrize("value", [1e5, -1e30])
def test_a_huge_number_of_a_vector_is_not_stored_as_infinite(value: float):
    cfg = tiny_config()
    model = random_model(cfg)
    with torch.no_grad():
        model.skip_weights[0, 3] = value
    stored = quantize_model(cfg, model)["skip_weights"]
    assert np.isfinite(stored.values).all()


@pytest.mark.parametrize("bits", BITS)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    others=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8),
)
def test_a_row_is_quantised_by_its_own_numbers_alone(
    bits: int, values: list[float], others: list[float]
):
    row = torch.tensor([values])
    alone = quantize_rows(row, bits)
    other = torch.tensor(others).repeat(8)[: len(values)][None]
    together = quantize_rows(torch.cat([other, row]), bits)
    assert alone.row_scales is not None and together.row_scales is not None
    assert np.array_equal(together.values[1:], alone.values)
    assert together.row_scales[1] == alone.row_scales[0]


def test_more_bits_never_leave_a_larger_error():
    w = torch.randn(64, 256)
    errors = [float((quantize_rows(w, bits).dequantized() - w).norm()) for bits in BITS]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 0.4 < fine / coarse < 0.6  # a bit halves the step: 15/7, 31/15, ... levels


def test_dequantised_numbers_are_codes_times_scales():
    values = np.array([[-127, 0, 5], [1, 2, 3]], dtype=np.int8)
    scales = np.array([0.5, 2.0**-14], dtype=np.float16)
    back = Quantized(8, values, scales).dequantized()
    expected = torch.tensor([[-63.5, 0.0, 2.5], [2.0**-14, 2.0**-13, 3 * 2.0**-14]])
    assert back.dtype == torch.float32 and torch.equal(back, expected)
    plain = np.array([1.5, -2.0], dtype=np.float16)
    assert torch.equal(Quantized(16, plain, None).dequantized(), torch.tensor([1.5, -2.0]))


@pytest.mark.parametrize(
    "knobs",
    [
        {"attn_bits": 4, "mlp_bits": 5, "embed_bits": 6},
        {"attn_bits": 8, "mlp_bits": 7, "embed_bits": 4},
        {},
    ],
)
def test_each_group_of_tensors_gets_its_bits(knobs: dict[str, Any]):
    cfg = tiny_config(tie_embeddings=False, skip_gates=True, **knobs)
    model = random_model(cfg)
    tensors = quantize_model(cfg, model)
    parameters = dict(model.named_parameters())
    assert tensors.keys() == parameters.keys()
    defaults = Config()
    for name, stored in tensors.items():
        if name in ("tok_emb.weight", "lm_head.weight"):
            knob = "embed_bits"
        elif name.endswith(".weight"):
            knob = "attn_bits" if ".attn." in name else "mlp_bits"
        else:  # vectors: fp16, 11 bits
            assert stored.bits == 16 and stored.row_scales is None
            assert stored.values.dtype == np.float16
            torch.testing.assert_close(
                stored.dequantized(), parameters[name].detach(), rtol=2**-11, atol=1e-7
            )
            continue
        bits = knobs.get(knob, getattr(defaults, knob))
        assert stored.bits == bits, name
        assert np.abs(stored.values).max() == 2 ** (bits - 1) - 1
        assert stored.values.shape == tuple(parameters[name].shape)


def test_quantising_does_not_touch_the_model_and_is_deterministic():
    cfg = tiny_config()
    model = random_model(cfg)
    before = [p.detach().clone() for p in model.parameters()]
    first, second = quantize_model(cfg, model), quantize_model(cfg, model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for name, stored in first.items():
        assert stored.values.tobytes() == second[name].values.tobytes()


def test_what_was_quantised_once_is_quantised_to_itself():
    # A second save of a model that was read back loses nothing more, up to a scale's last bit.
    w = quantize_rows(torch.randn(30, 50), 6).dequantized()
    again = quantize_rows(w, 6)
    assert again.row_scales is not None
    torch.testing.assert_close(again.dequantized(), w, rtol=2**-10, atol=0)


def test_the_methods_that_make_bench_quant_measures_are_those_of_the_script():
    for name in bench_quant.MEASURED:
        bench_quant.knobs_of(bench_quant.METHODS[name], tg.Config())
