"""MODE=generate: text that the model of an artifact writes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from tests.conftest import MakeRun, TinyData, environment, random_model, tiny_config
from tests.processes import Result, run_script
from train_gpt import BOS_ID, GPT, Config, Run, encode_artifact, quantize_model

CONTEXT = 32  # TRAIN_SEQ_LEN of tiny_config
# Modules that look back: gates, n-grams, the value residual, document masks, loops.
RICH: dict[str, Any] = {
    "smear_gate": "lambda", "bigram_vocab_size": 64, "trigram_vocab_size": 64, "num_loops": 1,
    "loop_start": 1, "loop_end": 1, "value_residual": "resformer", "attn_gate": "sparse",
    "isolate_documents": True,
}  # fmt: skip


@pytest.fixture
def written(make_run: MakeRun) -> tuple[Run, GPT]:
    """A run that samples greedily, and a random model."""
    run = make_run(temperature=0.0, max_new_tokens=12, **RICH)
    return run, random_model(run.cfg)


def greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    """The likeliest continuation, each token by a forward pass over the whole text."""
    text = list(ids)
    for _ in range(count):
        text.append(int(model.logits(torch.tensor([text]))[0, -1].argmax()))
    return text[len(ids) :]


@torch.no_grad()
def test_greedy_text_is_the_argmax_of_full_forward_passes(written: tuple[Run, GPT]) -> None:
    run, model = written
    for prompt in ([BOS_ID], [BOS_ID, 7, 90, 41], [50] * (CONTEXT - 12)):
        expected = greedy(model, prompt, 12)
        assert BOS_ID not in expected
        assert train_gpt.sample_tokens(run, model, prompt, seed=0) == expected


@torch.no_grad()
def test_text_goes_on_beyond_the_context(written: tuple[Run, GPT]) -> None:
    run, model = written
    prompt = [40 + n for n in range(CONTEXT)]
    tokens = train_gpt.sample_tokens(run, model, prompt, seed=0)
    assert len(tokens) == 12
    assert tokens[:1] == greedy(model, prompt, 1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_are_named(
    written: tuple[Run, GPT], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = written
    logits = torch.full((1, 1, run.cfg.vocab_size), math.nan)
    monkeypatch.setattr(GPT, "logits", lambda *args: logits)
    run = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, temperature=temperature))
    with pytest.raises(train_gpt.RunFailed, match="logits are not finite"):
        train_gpt.sample_tokens(run, model, [BOS_ID], seed=0)


def test_text_ends_where_the_document_ends(
    written: tuple[Run, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = written
    script = iter([60, 61, BOS_ID, 62])

    def logits(ids_BT: torch.Tensor, past: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([[next(script)]]), 320).float()

    monkeypatch.setattr(model, "logits", logits)
    assert train_gpt.sample_tokens(run, model, [BOS_ID], seed=0) == [60, 61]


def sampled(run: Run, model: GPT, seed: int, **knobs: Any) -> list[int]:
    run.cfg = tiny_config(**RICH, max_new_tokens=12, **knobs)
    return train_gpt.sample_tokens(run, model, [BOS_ID, 7], seed)


def test_seed_top_k_and_temperature_decide_what_is_sampled(written: tuple[Run, GPT]) -> None:
    run, model = written
    best = train_gpt.sample_tokens(run, model, [BOS_ID, 7], seed=0)
    assert sampled(run, model, 3) == sampled(run, model, 3)
    assert len({tuple(sampled(run, model, seed)) for seed in range(4)}) > 1
    assert sampled(run, model, 3, top_k=1) == best
    assert sampled(run, model, 3, temperature=1e-300) == best
    assert sampled(run, model, 3, top_k=10**6) == sampled(run, model, 3, top_k=0)


def test_tokens_are_drawn_in_proportion_to_their_probabilities(
    written: tuple[Run, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = written
    run.cfg = tiny_config(top_k=2, temperature=2.0, max_new_tokens=2000)
    row = torch.full((1, 1, 320), -1.0)
    row[..., [70, 71]] = torch.tensor([2.0, 0.0])
    monkeypatch.setattr(model, "logits", lambda ids_BT, past: row)
    tokens = train_gpt.sample_tokens(run, model, [BOS_ID], seed=0)
    assert set(tokens) == {70, 71}
    assert tokens.count(70) / 2000 == pytest.approx(1 / (1 + 2.71828**-1), abs=0.03)


# --- As a process --------------------------------------------------------------------------------


@pytest.fixture
def artifact(data: TinyData, tmp_path: Path) -> Path:
    """The artifact of a random model with the tokenizer of the data set."""
    cfg = tiny_config(**RICH)
    model = random_model(cfg)
    sha256 = hashlib.sha256((data.folder / "tokenizer.model").read_bytes()).hexdigest()
    path = tmp_path / "artifact.bin"
    path.write_bytes(encode_artifact(cfg, quantize_model(cfg, model), sha256))
    return path


def generate(data: TinyData, artifact: Path, **knobs: str) -> Result:
    """Run the script with nothing but artifact and tokenizer."""
    work = artifact.parent / "work"
    work.mkdir(exist_ok=True)
    given = {
        "MODE": "generate", "ARTIFACT": str(artifact), "MAX_NEW_TOKENS": "8",
        "TOKENIZER_PATH": str(data.folder / "tokenizer.model"), **knobs,
    }  # fmt: skip
    result = run_script(environment(Config(), **given), work)
    assert [*work.iterdir()] == [], "it leaves files"
    return result


@pytest.mark.slow
def test_the_script_writes_on_and_leaves_no_files(data: TinyData, artifact: Path) -> None:
    text, bad_byte = "Größe 日本\n\t'x' $HOME ", os.fsdecode(b"caf\xe9 1")
    prompts = {"": "", text: text, bad_byte: "caf\ufffd 1"}
    for prompt, shown in prompts.items():
        result = generate(data, artifact, PROMPT=prompt)
        assert (result.status, result.err) == (0, "")
        assert result.out.startswith(shown) and len(result.out) > len(shown) + 1
    greedy = {"PROMPT": "the man", "TEMPERATURE": "0"}
    outputs = {generate(data, artifact, **greedy, SEED=seed).out for seed in ("1", "5")}
    assert len(outputs) == 1


@pytest.mark.slow
def test_a_long_prompt_is_cut_to_the_context_and_said(data: TinyData, artifact: Path) -> None:
    words = "one two three four five six seven eight nine ten " * 20
    count = len(data.tokenizer.encode(words)) + 1
    result = generate(data, artifact, PROMPT=words)
    assert result.status == 0 and result.out.startswith(words)
    assert f"PROMPT has {count} tokens; the model reads only the last {CONTEXT}\n" in result.err


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"TEMPERATURE": "-1"}, "TEMPERATURE=-1.0 must be at least 0"),
        ({"TEMPERATURE": "nan"}, "TEMPERATURE='nan' is not a valid float"),
        ({"TOP_K": "-2"}, "TOP_K=-2 must be at least 0"),
        ({"MAX_NEW_TOKENS": "1e3"}, "MAX_NEW_TOKENS='1e3' is not a valid int"),
        ({"ARTIFACT": "none.bin"}, "ARTIFACT=none.bin does not exist"),
        ({"TOKENIZER_PATH": "none.model"}, "no tokenizer at none.model"),
    ],
)
def test_bad_values_are_refused(
    data: TinyData, artifact: Path, knobs: dict[str, str], message: str
) -> None:
    result = generate(data, artifact, **knobs)
    assert result.status == 2 and message in result.err and "Traceback" not in result.err
