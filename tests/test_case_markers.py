"""data/case_markers.py and the data sets made with it: nothing is lost and bytes add up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from data import case_markers, compare_tokenizers, prepare
from data.case_markers import ALL_CAPS, CAPITAL, ESCAPE, TITLE
from tests.conftest import MakeRun, TinyData, environment, random_model, tiny_config
from tests.processes import metrics, run_script
from tests.test_artifact import Parts
from tests.test_data_check import edit_manifest, rewrite, verdict
from tests.test_prepare import HARD_TEXTS, TEXTS, any_text, run, write_jsonl
from tests.test_recipes import FOLDER, FRONTIER, recipe, shrink
from train_gpt import BOS_ID, Config, InputError, Run, load_validation, read_shard, write_shard

HARD = "aAbBzZ\u0130\u0131\u00df\u1e9e\u03c3\u03c2\u03a3\u01c4\u01c5\u01c6\u212a\u212b\u00e5\u00c5"
hard_text = st.text(alphabet=HARD + case_markers.MARKERS + " '\n\u0301\u2581\ue000\ue005\U0010fffd")
decomposed = st.text().map(lambda text: unicodedata.normalize("NFD", text))


def check_round_trip(text: str) -> str:
    """The encoded text, after the checks that hold for any text."""
    marked = case_markers.encode(text)
    assert case_markers.decode(marked) == text
    before = case_markers.original_bytes(marked.encode())
    assert before[-1] == len(text.encode())
    steps = np.diff(before, prepend=0)
    assert 0 <= steps.min() <= steps.max() <= 1
    return marked


@settings(max_examples=300, deadline=None)
@given(any_text | hard_text | decomposed)
@example("".join(HARD_TEXTS))
def test_decoding_gives_back_any_text(text: str):
    check_round_trip(text)


def test_decoding_gives_back_every_character_in_every_place():
    """After a space, a lower-case letter, a capital, and itself; no letter is in most planes."""
    numbers = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]
    check_round_trip("".join(map(chr, numbers)))
    letters = [
        chr(n) for n in numbers if n < 0x3000 or 0xA000 <= n < 0xB000 or 0x10000 <= n < 0x11000
    ]
    check_round_trip("".join(f" {letter}a{letter}B{letter}{letter}-" for letter in letters))


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("The USA's McKay", f"{TITLE}the {ALL_CAPS}usa's {TITLE}mc{CAPITAL}kay"),
        ("I iPhone HTMLx", f"{TITLE}i i{CAPITAL}phone {TITLE}h{CAPITAL}t{CAPITAL}m{CAPITAL}lx"),
        ("\u00c9TAT \u03a3\u0391\u03a3", f"{ALL_CAPS}\u00e9tat {ALL_CAPS}\u03c3\u03b1\u03c3"),
        ("\u0130 \u1e9e \u01c5 \u212a \u2167", "\u0130 \u1e9e \u01c5 \u212a \u2167"),
        (f"A{TITLE}b", f"{TITLE}a{ESCAPE}{TITLE}b"),
        (ESCAPE, ESCAPE + ESCAPE),
    ],
)
def test_markers_stand_before_what_they_describe(text: str, marked: str):
    assert case_markers.encode(text) == marked


def test_the_letters_are_the_same_with_every_python():
    listed = "".join(capital + lower for capital, lower in sorted(case_markers.PAIRS.items()))
    assert len(case_markers.PAIRS) == 671
    digest = hashlib.sha256(listed.encode()).hexdigest()
    assert digest == "2bf0afae0f6a54d7435c7500e1bbc1a628ad93f87e2d5825270be1886ed12856"


PUBLISHED = case_markers.TRANSFORMS[case_markers.PUBLISHED_NAME]


def mark_by_the_published_rules(text: str) -> str:
    """openai/parameter-golf#1729 in words: runs of ASCII letters, each by its kind."""

    def mark(match: re.Match[str]) -> str:
        run = match[0]
        if run in case_markers.MARKERS:
            return ESCAPE + run
        if len(run) > 1 and run.isupper():
            return ALL_CAPS + run.lower()
        first = (TITLE if run[0].isupper() else "") + run[0].lower()
        return first + re.sub("[A-Z]", lambda each: CAPITAL + each[0].lower(), run[1:])

    return re.sub(f"[A-Za-z]+|[{case_markers.MARKERS}]", mark, text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abABzZ\u00e9\u00c9 1'" + case_markers.MARKERS) | any_text)
@example("USA\u00e9 \u00c9TAT McKay iPHONE A")
def test_the_published_form_marks_ascii_letters_only(text: str):
    marked = PUBLISHED.encode(text)
    assert marked == mark_by_the_published_rules(text)
    assert PUBLISHED.decode(marked) == text


def test_the_script_knows_the_names_of_all_forms():
    assert train_gpt.TRANSFORMS == ["none", *case_markers.TRANSFORMS]


def mixed_texts() -> list[str]:
    """Texts with title case, capitals, and characters that look like markers."""
    return [
        f"{text.title()}{text.upper()[:90]} McKay {TITLE}x{ESCAPE} \u0130\u00df {text}"
        for text in TEXTS
    ]


@pytest.fixture(scope="module", params=["merge", "separate"])
def marked_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marked")
    corpus = write_jsonl(folder / "corpus.jsonl", mixed_texts())
    options = ["--vocab-size", 400, f"--case-markers={request.param}", "--write-val-text"]
    run(folder / "set", "--input", corpus, *options)
    return folder / "set"


def load_model(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_sidecar_counts_the_original_bytes_of_each_document(marked_set: Path):
    ids = read_shard(marked_set / "corpus_val_000000.bin")
    counts = np.asarray(read_shard(marked_set / "corpus_val_bytes_000000.bin"), dtype=int)
    processor = load_model(marked_set)
    starts = np.flatnonzero(ids == BOS_ID)
    texts = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        marked = prepare.decode_document(processor, ids[start:end].tolist())
        texts.append(case_markers.decode(marked))
        assert counts[start:end].sum() == len(texts[-1].encode())
    assert set(texts) <= set(mixed_texts())
    assert "".join(texts).encode() == (marked_set / "val_text.bin").read_bytes()
    manifest = json.loads((marked_set / "manifest.json").read_bytes())
    assert manifest["transform"] == "case-markers-1"
    assert manifest["val"]["text_bytes"] == counts.sum()


def test_markers_merge_with_spaces_and_letters_or_stand_alone(marked_set: Path):
    processor = load_model(marked_set)
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    arguments = json.loads((marked_set / "manifest.json").read_bytes())["arguments"]
    merges = arguments["case_markers"] == "merge"
    assert any(TITLE in piece and len(piece) > 1 for piece in pieces) == merges
    assert any(re.search(f"\u2581{TITLE}[a-z]", piece) for piece in pieces) == merges
    assert arguments["any_script"] is (merges or None)


def make_config(folder: Path) -> Config:
    return Config(data_path=str(folder), vocab_size=400)


def test_training_needs_the_sidecar_of_a_set_with_markers(marked_set: Path, tmp_path: Path):
    folder = Path(shutil.copytree(marked_set, tmp_path / "set"))
    validation = load_validation(make_config(folder), load_model(folder))
    assert validation.target_bytes.sum() == len((folder / "val_text.bin").read_bytes())
    (folder / "corpus_val_bytes_000000.bin").unlink()
    with pytest.raises(InputError, match=r"corpus_val_bytes_000000.bin is missing"):
        load_validation(make_config(folder), load_model(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="the text has case markers, which stand for no text"):
        load_validation(make_config(folder), load_model(folder))


def test_a_set_that_was_marked_needs_the_sidecar_whatever_its_tokenizer(
    data: TinyData, tmp_path: Path
):
    folder = Path(shutil.copytree(data.folder, tmp_path / "set"))
    cfg = tiny_config(data_path=str(folder))
    (folder / "manifest.json").write_text(json.dumps({"transform": None}))
    assert load_validation(cfg, data.tokenizer).num_targets == len(data.val) - 1
    (folder / "manifest.json").write_text(json.dumps({"transform": case_markers.NAME}))
    with pytest.raises(InputError, match=r"no \*_val_bytes_\*.bin gives the bytes"):
        load_validation(cfg, data.tokenizer)
    (folder / "manifest.json").write_text(json.dumps({"transform": "rot13"}))
    with pytest.raises(InputError, match="is not a manifest of data/prepare.py"):
        load_validation(cfg, data.tokenizer)


def test_loading_compares_the_bytes_of_each_document_with_its_text(
    marked_set: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(marked_set, tmp_path / "set"))
    edit_manifest(folder, lambda manifest: manifest.update(files={}))
    load_validation(make_config(folder), load_model(folder))
    rewrite(folder / "corpus_val_bytes_000000.bin", move_a_byte)
    ids = read_shard(folder / "corpus_val_000000.bin")
    end = np.flatnonzero(ids == BOS_ID)[1]
    marked = prepare.decode_document(load_model(folder), ids[:end].tolist())
    num_bytes = len(case_markers.decode(marked).encode())
    message = f"of a document sum to {num_bytes - 1}, but its text has {num_bytes} bytes"
    with pytest.raises(InputError, match=message):
        load_validation(make_config(folder), load_model(folder))
    edit_manifest(folder, lambda manifest: manifest["tokenizer"].update(is_lossless=False))
    load_validation(make_config(folder), load_model(folder))


def move_a_byte(counts: np.ndarray) -> np.ndarray:
    """A byte of the first document counts for the last one; the sum stays."""
    counts[np.flatnonzero(counts)[0]] -= 1
    counts[-1] += 1
    return counts


def test_the_check_decodes_every_document(
    marked_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = Path(shutil.copytree(marked_set, tmp_path / "set"))
    assert "PROBLEM" not in verdict(folder, capsys, "--max-near", 1)[1]
    rewrite(folder / "corpus_val_bytes_000000.bin", move_a_byte)
    edit_manifest(folder, lambda manifest: manifest.update(files={}))
    assert "the counts of 2 documents do not sum to their bytes" in verdict(folder, capsys)[1]
    rewrite(folder / "corpus_val_000000.bin", lambda ids: np.where(ids == ids[-1], 60_000, ids))
    status, output = verdict(folder, capsys)
    assert status == 1 and "verdict: " in output, output


def test_a_set_in_the_published_form_is_loaded_and_checked(
    marked_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    processor = load_model(marked_set)
    texts = ["NASA\u00e9 and \u00c9TAT\u00e9 in McKay", f"{TITLE} The OTHER one"]
    for part, count in (
        ("val", prepare.encode_document),
        ("val_bytes", lambda processor, text: prepare.count_original_bytes(processor, text)[1:]),
    ):
        rows = [[part == "val", *count(processor, PUBLISHED.encode(text))] for text in texts]
        write_shard(tmp_path / f"x_{part}_000000.bin", np.concatenate(rows))
    shutil.copy(marked_set / "tokenizer.model", tmp_path)
    manifest: dict[str, Any] = {"files": {}, "tokenizer": {"is_lossless": True}}
    manifest["transform"] = case_markers.PUBLISHED_NAME
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    validation = load_validation(make_config(tmp_path), processor)
    assert validation.target_bytes.sum() == sum(len(text.encode()) for text in texts)
    assert "case markers" not in verdict(tmp_path, capsys)[1]
    edit_manifest(tmp_path, lambda manifest: manifest.update(transform=case_markers.NAME))
    assert "case markers of 1 documents are not those of their text" in verdict(tmp_path, capsys)[1]


def test_a_set_with_markers_is_another_one_than_without(
    marked_set: Path, capsys: pytest.CaptureFixture[str]
):
    corpus = marked_set.parent / "corpus.jsonl"
    words = ["--input", corpus, "--out", marked_set, "--vocab-size", 400, "--write-val-text"]
    assert prepare.main([*map(str, words)]) == 2
    assert "now None" in capsys.readouterr().err


KINDS = ["group digits", "unigram", "superwords", "any script", "merge, superwords"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_is_lossless(kind: str):
    processor = compare_tokenizers.train(TEXTS, kind, 310 if kind == "unigram" else 400)
    assert prepare.is_lossless(processor)
    assert prepare.crosses_spaces(processor) == ("superwords" in kind)
    for text in [*HARD_TEXTS, *TEXTS[:3]]:
        ids = prepare.encode_document(processor, text)
        assert prepare.decode_document(processor, ids) == text


@pytest.mark.parametrize(
    "option", [["--superwords"], ["--model", "unigram"], ["--tokenizer-bytes", "5000"]]
)
def test_options_of_training_need_a_tokenizer_to_train(
    option: list[str], marked_set: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--source", "stdlib", "--out", "x", *option]
    prepare.parse_options(words)
    with pytest.raises(SystemExit, match="2"):
        prepare.parse_options([*words, "--tokenizer", str(marked_set / "tokenizer.model")])
    assert option[0] in capsys.readouterr().err.split("error: ")[1]


def test_the_comparison_prints_tokens_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", mixed_texts())
    words = ["--input", str(corpus), "--val-input", str(corpus), "--vocab-sizes", "330"]
    assert compare_tokenizers.main([*words, "--kinds", "plain", "merge"]) == 0
    lines = capsys.readouterr().out.splitlines()
    num_bytes = sum(len(text.encode()) for text in mixed_texts())
    assert lines[0] == f"{num_bytes:,} bytes in 60 documents"
    assert [line.split()[0] for line in lines[1:]] == ["plain", "merge"]
    assert all(0.1 < float(line.split("tokens")[1].split()[0]) < 1 for line in lines[1:])
    assert compare_tokenizers.main([*words[:3], str(tmp_path / "none.jsonl")]) == 2
    (tmp_path / "empty.txt").touch()
    capsys.readouterr()
    assert compare_tokenizers.main([*words[:3], str(tmp_path / "empty.txt")]) == 2
    assert "--val-input holds no text" in capsys.readouterr().err
    for bad in (["--tokenizer-bytes", "0"], ["--tokenizer-bytes", "-1"], ["--vocab-sizes", "5"]):
        with pytest.raises(SystemExit, match="2"):
            compare_tokenizers.main([*words, *bad])


# --- Artifacts ------------------------------------------------------------------------------------

PROMPT = f"The USA's {TITLE} McKay \u00c9TAT"


@pytest.fixture
def marked_run(make_run: MakeRun, marked_set: Path) -> Run:
    """A run on the set with markers."""
    return make_run(data_path=str(marked_set), vocab_size=400, temperature=0.0, max_new_tokens=6)


def write_artifact(run: Run, path: Path) -> tuple[Path, str]:
    """A file with a random model for the run's data, and the tokenizer's SHA-256."""
    sha256 = train_gpt.load_tokenizer(run.cfg)[1]
    tensors = train_gpt.quantize_model(run.cfg, random_model(run.cfg))
    path.write_bytes(train_gpt.encode_artifact(run.cfg, tensors, sha256))
    return path, sha256


def edit_transform(path: Path, name: object) -> None:
    """Put another transform into an artifact's header, or none at all."""
    parts = Parts(path.read_bytes())
    parts.header["transform"] = name
    if name is None:
        del parts.header["transform"]
    path.write_bytes(parts.seal())


def test_an_artifact_names_the_transform_and_scores_only_such_text(
    marked_run: Run, make_run: MakeRun, tmp_path: Path
):
    path, sha256 = write_artifact(marked_run, tmp_path / "model.bin")
    assert Parts(path.read_bytes()).header["transform"] == case_markers.NAME
    train_gpt.read_artifact(path, marked_run, sha256)
    edit_transform(path, "none")
    message = r"cannot use the artifact .*: its text has transform 'none', not \['case-markers-1'\]"
    with pytest.raises(InputError, match=message):
        train_gpt.read_artifact(path, marked_run, sha256)
    plain = make_run()
    path, sha256 = write_artifact(plain, tmp_path / "plain.bin")
    assert Parts(path.read_bytes()).header["transform"] == "none"
    edit_transform(path, case_markers.NAME)
    message = r"has transform 'case-markers-1', not \['none'\]; set DATA_PATH to data with the same"
    with pytest.raises(InputError, match=message):
        train_gpt.read_artifact(path, plain, sha256)
    edit_transform(path, None)  # of an earlier version of the script
    train_gpt.read_artifact(path, plain, sha256)


@pytest.mark.parametrize("name", ["rot13", 7, [], {}, "x" * 10**5])
def test_generating_refuses_transforms_that_it_does_not_know(
    make_run: MakeRun, tmp_path: Path, name: object
):
    run = make_run(mode="generate")
    path, sha256 = write_artifact(run, tmp_path / "model.bin")
    edit_transform(path, name)
    with pytest.raises(InputError, match="its text has transform .*; use the script") as refusal:
        train_gpt.read_artifact(path, run, sha256)
    assert len(str(refusal.value)) < 400


def generate(run: Run, path: Path, sha256: str) -> None:
    run.cfg = dataclasses.replace(run.cfg, mode="generate", prompt=PROMPT)
    train_gpt.generate(run, path, train_gpt.load_tokenizer(run.cfg)[0], sha256)


@pytest.mark.parametrize("name", case_markers.TRANSFORMS)
def test_generating_marks_the_prompt_and_prints_plain_text(
    marked_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
):
    processor, _ = train_gpt.load_tokenizer(marked_run.cfg)
    path, sha256 = write_artifact(marked_run, tmp_path / "model.bin")
    edit_transform(path, name)
    transform = case_markers.TRANSFORMS[name]
    prompts = []

    def sample(run: Run, model: torch.nn.Module, ids: list[int], seed: int) -> list[int]:
        prompts.append(processor.decode(ids))
        return list(processor.encode(transform.encode(" NASA And \u00c9")))

    monkeypatch.setattr(train_gpt, "sample_tokens", sample)
    generate(marked_run, path, sha256)
    assert capsys.readouterr().out == f"{PROMPT} NASA And \u00c9\n"
    assert transform.encode(PROMPT).endswith(prompts[0]) and TITLE in prompts[0]


def test_a_script_alone_says_what_generating_needs(
    marked_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, sha256 = write_artifact(marked_run, tmp_path / "model.bin")
    monkeypatch.setitem(sys.modules, "data.case_markers", None)
    message = "transform case-markers-1 needs data/case_markers.py beside the script"
    with pytest.raises(InputError, match=message):
        generate(marked_run, path, sha256)


@pytest.mark.slow
def test_the_frontier_recipe_runs_on_a_set_with_markers(marked_set: Path, tmp_path: Path):
    changes = {**shrink(recipe(FRONTIER)), "DATA_PATH": str(marked_set), "VOCAB_SIZE": "400"}
    path = str(FOLDER / FRONTIER / "run.env")
    knobs = {**environment(Config()), **changes, "TRACK": "demo", "RECIPE": path}
    result = run_script(knobs, tmp_path)
    assert result.status == 0, result.err
    (score,) = metrics(tmp_path / "run", "final_ttt")
    manifest = json.loads((marked_set / "manifest.json").read_bytes())
    assert score["bytes"] == manifest["val"]["text_bytes"]
    artifact = str(tmp_path / "run/artifact.bin")
    assert Parts(Path(artifact).read_bytes()).header["transform"] == case_markers.NAME
    scored = run_script(
        {**knobs, "MODE": "eval", "ARTIFACT": artifact, "RUN_DIR": "eval"}, tmp_path
    )
    assert scored.status == 0, scored.err
    assert metrics(tmp_path / "eval", "final_ttt")[0]["val_loss"] == score["val_loss"]
    asked = {"MODE": "generate", "ARTIFACT": artifact, "PROMPT": "The USA", "MAX_NEW_TOKENS": "9"}
    written = run_script({**environment(Config()), "DATA_PATH": str(marked_set), **asked}, tmp_path)
    assert written.status == 0, written.err
    assert written.out.startswith("The USA")
