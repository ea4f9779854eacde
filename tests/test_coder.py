"""The entropy coder gives back what it was given, near its entropy, and refuses damaged bytes."""

import hashlib
import math
import time

import numpy as np
import pytest

import train_gpt as coder
from train_gpt import CodeGrid


def encode_codes(codes, grids):
    return coder.CodeCodec(grids).encode(codes)


def decode_codes(payload, grids):
    return coder.CodeCodec(grids).decode(payload)


def matrix(rows, columns, seed=0, spread=0.0, limit=127):
    """Rounded Gaussian codes, whose columns' deviations are log-normal around 2.4; and those."""
    rng = np.random.default_rng(seed)
    deviation_I = 2.4 * np.exp(rng.normal(0, spread, columns))
    codes_OI = np.rint(rng.standard_normal((rows, columns)) * deviation_I)
    return codes_OI.clip(-limit, limit).astype(np.int16), deviation_I


def exact_bits(codes_OI, deviation_I):
    """Bits of the codes to a coder that knows each column's deviation."""
    total = 0.0
    for code_O, deviation in zip(codes_OI.T, deviation_I, strict=True):
        values, numbers = np.unique(code_O, return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            low, high = ((value + side) / deviation / math.sqrt(2) for side in (-0.5, 0.5))
            total -= number * math.log2((math.erf(high) - math.erf(low)) / 2)
    return total


SHAPES = [(1, 1), (1, 70), (70, 1), (256, 3), (257, 5), (0, 4), (3, 0), (600, 17), (2, 600)]


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("shapes", [[], *[[shape] for shape in SHAPES], SHAPES])
def test_codes_come_back_and_are_the_same_bytes_twice(shapes, trellis):
    codes = [matrix(*shape)[0] for shape in shapes]
    grids = [CodeGrid(rows, columns, trellis) for rows, columns in shapes]
    payload = encode_codes(codes, grids)
    assert payload == encode_codes(codes, grids)
    decoded = decode_codes(payload, grids)
    assert len(decoded) == len(codes)
    assert all(map(np.array_equal, decoded, codes))


@pytest.mark.parametrize("limit", [0, 1, 127, coder.MAX_CODE])
def test_codes_up_to_the_limit_come_back(limit):
    codes_OI = np.random.default_rng(0).integers(-limit, limit + 1, (200, 9))
    codes_OI[0, 0] = limit
    grids = [CodeGrid(200, 9)]
    (decoded_OI,) = decode_codes(encode_codes([codes_OI], grids), grids)
    assert np.array_equal(decoded_OI, codes_OI)


@pytest.mark.parametrize("trellis", [False, True])
def test_encoder_and_decoder_drive_the_same_model(trellis, monkeypatch):
    # Every context, every distribution and every update, in order.
    events = list[tuple]()
    models, update = coder.FrequencyTables.entropy_models, coder.CodeModel.update

    def entropy_models(tables, contexts_K):
        found = models(tables, contexts_K)
        events.append((contexts_K.tolist(), tables.counts_KW.tobytes()))
        return found

    def update_model(model, row, gain_L, codes_N):
        update(model, row, gain_L, codes_N)
        events.append((gain_L.tolist(), codes_N.tolist(), model.sum_C.tolist()))

    monkeypatch.setattr(coder.FrequencyTables, "entropy_models", entropy_models)
    monkeypatch.setattr(coder.CodeModel, "update", update_model)
    shapes = [(300, 5), (7, 3), (1, 20)]
    grids = [CodeGrid(*shape, trellis) for shape in shapes]
    payload = encode_codes([matrix(*shape)[0] for shape in shapes], grids)
    written = events.copy()
    events.clear()
    decode_codes(payload, grids)
    assert len(written) == 3 * 256 and events == written


def test_the_bytes_are_those_of_the_format():
    codes_OI, _ = matrix(300, 40, spread=0.5)
    payload = encode_codes([codes_OI, codes_OI[:9]], [CodeGrid(300, 40, True), CodeGrid(9, 40)])
    assert hashlib.sha256(payload).hexdigest()[:16] == "649453d867d0af1f"


def test_a_code_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="1024 exceeds 1023"):
        encode_codes([np.full((2, 2), 1024)], [CodeGrid(2, 2)])


@pytest.mark.parametrize(("spread", "excess"), [(0.0, 1.002), (0.3, 1.005), (1.0, 1.015)])
def test_codes_take_little_more_than_if_their_columns_were_known(spread, excess):
    codes_OI, deviation_I = matrix(2048, 256, spread=spread)
    payload = encode_codes([codes_OI], [CodeGrid(*codes_OI.shape)])
    assert 8 * len(payload) < excess * exact_bits(codes_OI, deviation_I)


def test_known_magnitudes_of_columns_save_learning_them():
    codes_OI, deviation_I = matrix(64, 512, spread=1.0)
    eighths_I = np.rint(8 * np.log2(deviation_I / 2.4)).astype(np.int64)
    blind, told = (
        len(encode_codes([codes_OI], [CodeGrid(64, 512, column_log_scale_I=log_scale_I)]))
        for log_scale_I in (0, eighths_I)
    )
    assert 8 * told < 1.015 * exact_bits(codes_OI, deviation_I)
    assert told < 0.985 * blind


def test_a_gain_for_each_row_saves_when_rows_differ():
    codes_OI, _ = matrix(512, 256)
    mixed_OI = np.where(np.arange(512)[:, None] % 2, codes_OI, codes_OI // 4)
    whole, even, odd = (
        len(encode_codes([c], [CodeGrid(*c.shape)]))
        for c in (mixed_OI, mixed_OI[::2], mixed_OI[1::2])
    )
    assert whole < 1.01 * (even + odd)


def test_the_state_of_the_trellis_is_a_context():
    codes_OI, _ = matrix(1024, 64)
    state_I = np.zeros((4, 64), np.int64)
    for row in range(256):  # states with the other quantiser have half the codes
        codes_OI[row::256] //= 1 + (state_I & 1)
        parity_I = codes_OI[row::256] & 1
        state_I = coder.NEXT_STATES[2 * state_I + parity_I]
    plain, walked = (
        len(encode_codes([codes_OI], [CodeGrid(1024, 64, trellis)])) for trellis in (False, True)
    )
    assert walked < 0.97 * plain


def test_matrices_of_both_grids_share_their_tables():
    codes = [matrix(200, 32, seed)[0] for seed in range(8)]
    grids = [CodeGrid(200, 32, trellis) for trellis in [False, True] * 4]
    together = len(encode_codes(codes, grids))
    apart = sum(len(encode_codes([c], [g])) for c, g in zip(codes, grids, strict=True))
    assert together < apart


def damaged(payload, rng):
    """The payload with bytes changed, cut, repeated or added."""
    changed = bytearray(payload)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(changed) if rng.random() < 0.5 else min(len(changed), 20)))
        changed[at] = rng.integers(256)
    cut = int(rng.integers(len(changed)))
    return [
        bytes(changed),
        bytes(changed[:cut]),
        bytes(changed[cut:]),
        bytes(changed[:cut] + changed),
        bytes(changed) + bytes(4 * rng.integers(1, 5)),
    ][rng.integers(5)]


@pytest.mark.slow
def test_damaged_bytes_raise_value_error_or_give_the_shapes():
    shapes, rng = [(150, 20), (3, 7), (40, 33)], np.random.default_rng(0)
    grids = [CodeGrid(*shape, trellis=shape != (3, 7)) for shape in shapes]
    payload = encode_codes([matrix(*shape)[0] for shape in shapes], grids)
    numbers = coder.encode_numbers([np.arange(50) % 7, np.arange(9)])
    started_s = time.monotonic()
    for _ in range(300):
        try:
            assert [c.shape for c in decode_codes(damaged(payload, rng), grids)] == shapes
        except ValueError:
            pass
        try:
            decoded = coder.decode_numbers(damaged(numbers, rng), [50, 9])
            assert [len(d) for d in decoded] == [50, 9]
        except ValueError:
            pass
    assert time.monotonic() - started_s < 120  # a whole payload takes some 50 ms


@pytest.mark.parametrize("payload", [b"", b"\0", bytes(6), b"\xff" * 64, bytes(64)])
def test_bytes_that_are_no_codes_are_refused(payload):
    with pytest.raises(ValueError, match="damaged"):
        decode_codes(payload, [CodeGrid(5, 5)])


def test_numbers_come_back_near_their_entropy():
    rng = np.random.default_rng(0)
    arrays = [
        np.rint(rng.normal(-70, 5, 20_000)),
        rng.integers(-127, 128, 300),
        np.zeros(0),
        np.full(1000, 9),
        np.array([4]),
    ]
    arrays = [array.astype(np.int64) for array in arrays]
    payload = coder.encode_numbers(arrays)
    assert payload == coder.encode_numbers(arrays)
    decoded = coder.decode_numbers(payload, [len(array) for array in arrays])
    assert all(map(np.array_equal, decoded, arrays))
    gaussian_bits = 0.5 * math.log2(2 * math.pi * math.e * 25)
    assert 8 * len(payload) < 1.02 * 20_000 * gaussian_bits + 1.05 * 300 * 8 + 400
