"""Pairs of pieces that a BPE tokenizer never emits, and scores without their probability."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F

import train_gpt
from records import audit
from tests.conftest import MakeRun, TinyData, random_model
from tests.test_ttt import METHODS, verdicts_of
from train_gpt import InputError, Validation, noncanonical_pairs

FACTOR = 1e-3


def plain_tokens(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Ids of the pieces that stand for text."""
    return [
        token
        for token in range(processor.get_piece_size())
        if not (
            processor.is_byte(token) or processor.is_control(token) or processor.is_unknown(token)
        )
    ]


def pairs_by_encoding(processor: sentencepiece.SentencePieceProcessor) -> np.ndarray:
    """What noncanonical_pairs returns, by encoding every pair."""
    texts = [processor.id_to_piece(i).replace("\u2581", " ") for i in range(len(processor))]
    banned_VV = np.zeros((len(processor), len(processor)), dtype=bool)
    for a in plain_tokens(processor):
        for b in plain_tokens(processor):
            banned_VV[a, b] = processor.encode(texts[a] + texts[b]) != [a, b]
    return banned_VV


def test_the_pairs_are_those_that_are_encoded_otherwise(data: TinyData):
    banned_VV = noncanonical_pairs(data.tokenizer)
    np.testing.assert_array_equal(banned_VV, pairs_by_encoding(data.tokenizer))
    assert banned_VV.sum() > 20


@pytest.mark.parametrize("letters", ["ab", "aab \u00e9"])
def test_pieces_of_repeated_letters_give_the_same_pairs(letters: str):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(letters), 40)) for _ in range(400)]
    processor = trained_tokenizer(
        texts, model_type="bpe", vocab_size=400, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, byte_fallback=True,
        split_by_whitespace=False,
    )  # fmt: skip
    banned_VV = noncanonical_pairs(processor)
    np.testing.assert_array_equal(banned_VV, pairs_by_encoding(processor))
    assert banned_VV.mean() > 0.02
    ids = np.array(processor.encode("".join(rng.choice(list(letters), 20_000))))
    assert not banned_VV[ids[:-1], ids[1:]].any()


def test_no_pair_occurs_in_the_training_or_validation_tokens(data: TinyData):
    banned_VV = noncanonical_pairs(data.tokenizer)
    for path in data.folder.glob("*_[0-9]*.bin"):
        if "bytes" not in path.name:
            ids = train_gpt.read_shard(path)
            assert len(ids) > 1000 and not banned_VV[ids[:-1], ids[1:]].any()


def test_bytes_and_control_pieces_may_follow_and_precede_anything(data: TinyData):
    banned_VV = noncanonical_pairs(data.tokenizer)
    others = np.setdiff1d(np.arange(len(banned_VV)), plain_tokens(data.tokenizer))
    assert len(others) >= 256 and not banned_VV[others].any() and not banned_VV[:, others].any()


WORDS = [f"{a}{b} {b}{c}" for a in "abcde" for b in "fghij" for c in "klmno"]


def trained_tokenizer(
    texts: Sequence[str] = WORDS, **settings: Any
) -> sentencepiece.SentencePieceProcessor:
    """A small tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2,
        **{"vocab_size": 60, "hard_vocab_limit": False, **settings},
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {"model_type": "bpe"}])
def test_tokenizers_that_are_not_bpe_or_normalize_are_refused(settings):
    # By default, SentencePiece removes and adds spaces.
    with pytest.raises(InputError, match="NONCANONICAL_FACTOR: the tokenizer is not BPE, or"):
        noncanonical_pairs(trained_tokenizer(**settings))


def test_a_vocabulary_whose_table_would_be_too_large_is_refused(data: TinyData, monkeypatch):
    monkeypatch.setattr(train_gpt, "MAX_CANONICAL_VOCAB", len(data.tokenizer) - 1)
    with pytest.raises(InputError, match="NONCANONICAL_FACTOR: a table of pairs of .* too large"):
        noncanonical_pairs(data.tokenizer)


def validation_with(data: TinyData, num_targets: int, banned_VV: np.ndarray | None) -> Validation:
    ids = data.val[: num_targets + 1]
    return Validation(ids, np.ones(num_targets, np.int64), False, banned_VV)


def test_scores_are_those_of_the_renormalized_distribution(make_run: MakeRun, data: TinyData):
    run = make_run(noncanonical_factor=FACTOR, num_layers=2)
    model, banned_VV = random_model(run.cfg), noncanonical_pairs(data.tokenizer)
    T = run.cfg.score_seq_len
    found, plain = (
        train_gpt.evaluate(run, model, validation_with(data, T, x), T).nll_T
        for x in (banned_VV, None)
    )
    ids_1T, target_T = (torch.from_numpy(data.val[i : T + i].astype(np.int64)) for i in (0, 1))
    with torch.no_grad():
        p_TV = model.logits(ids_1T[None])[0].double().softmax(1)
    np.testing.assert_allclose(plain, F.nll_loss(p_TV.log(), target_T, reduction="none"), atol=1e-4)
    p_TV = torch.where(torch.from_numpy(banned_VV)[ids_1T], p_TV * FACTOR, p_TV)
    p_TV /= p_TV.sum(1, keepdim=True)
    expected = F.nll_loss(p_TV.log(), target_T, reduction="none")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found <= plain + 1e-5).all() and found.sum() < plain.sum() - 0.1


@pytest.mark.parametrize(
    "name",
    [
        "chunk_hedge",
        pytest.param("lora_mixer", marks=pytest.mark.slow),
        pytest.param("lora_tilt", marks=pytest.mark.slow),
    ],
)
def test_the_audit_passes_with_every_kind_of_mixer(make_run: MakeRun, data: TinyData, name: str):
    run = make_run(**METHODS[name], noncanonical_factor=FACTOR)
    text = validation_with(data, 200, noncanonical_pairs(data.tokenizer))
    audit.audit(run, random_model(run.cfg), text)
    assert verdicts_of(run) == dict.fromkeys(["C1", "C2", "C3", "C4"], "pass")


def test_the_knob_decides_whether_pairs_are_found(data: TinyData):
    size = len(data.tokenizer)
    env = {"DATA_PATH": str(data.folder), "VOCAB_SIZE": str(size), "VAL_TOKENS_LIMIT": "99"}
    cfg = train_gpt.config_from_env(env)
    processor, _ = train_gpt.load_tokenizer(cfg)
    assert train_gpt.load_validation(cfg, processor).banned_VV is None
    cfg = train_gpt.config_from_env({**env, "NONCANONICAL_FACTOR": "0.001"})
    validation = train_gpt.load_validation(cfg, processor)
    banned_VV = validation.banned_VV
    assert 0 < validation.head(9).table_s == validation.table_s
    assert banned_VV is not None and banned_VV.shape == (size, size)
