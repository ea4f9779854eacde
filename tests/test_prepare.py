"""data/prepare.py: encoding is lossless, counts add up, runs are repeatable and resumable."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pydoc_data.topics
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data import check, prepare, readers
from data.files import show_progress
from train_gpt import BOS_ID, ByteTable, read_shard, write_shard

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the a of and token shard model byte text line number print return self value".split()
HARD_TEXTS = [
    " leading and trailing ",
    "    indented\n\tand tabbed\r\n\r\n",
    "a \u2581literal\u2581\u2581 marker \u2581",
    "\u2581",
    " \u2581 ",
    "\x00nul\x00 and \x1b controls \x7f",
    "\ue000 private, \U0001f600 emoji, e\u0301 \u00e9 \ufb01 \u200b\ufeff\u2028",
    "\u2585 \u2047 <s> </s> <unk> <0x41>",
    "x" * 9000 + " " * 9000 + "y\n" * 9000,
    "",
]
any_text = st.text() | st.text(alphabet=" \u2581\n\t\r\x00ab\u00e9\U0001f600", max_size=60)


def make_text(seed: int, num_words: int = 150) -> str:
    """A document of pseudo-random lines, the same for the same seed."""
    draw = np.random.default_rng(seed).integers(0, len(WORDS), num_words)
    words = [WORDS[i] for i in draw]
    lines = [" " * 4 * (n % 3) + " ".join(words[n : n + 10]) for n in range(0, num_words, 10)]
    return f"document {seed}\n" + "\n".join(lines) + "\n"


TEXTS = [make_text(seed) for seed in range(60)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", TEXTS + HARD_TEXTS)


def run(out: Path, *words: object) -> dict[str, Any]:
    """Call the command with a small vocabulary and batches; returns the manifest."""
    arguments = ["--out", out, "--val-frac", 0.2, "--batch-bytes", 3000, "--workers", 1, *words]
    if "--tokenizer" not in words and "--vocab-size" not in words:
        arguments += ["--vocab-size", 360]
    assert prepare.main([str(word) for word in arguments]) == 0
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    return manifest


def fail(capsys: pytest.CaptureFixture[str], *words: object, status: int = 2) -> str:
    """Call the command, which must fail with one line on stderr and leave no shard; that line."""
    out = Path(str(words[words.index("--out") + 1]))
    assert prepare.main([str(word) for word in words]) == status
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert not list(out.glob("*.bin")) and not (out / "manifest.json").exists()
    return message


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the corpus with everything on."""
    out = tmp_path_factory.mktemp("made")
    run(out, "--input", corpus, "--byte-sidecar", "--write-val-text", "--shard-tokens", 2000)
    return out


@pytest.fixture(scope="module")
def processor(made: Path) -> sentencepiece.SentencePieceProcessor:
    return prepare.Processor(model_file=str(made / "tokenizer.model"))


@pytest.fixture(scope="module")
def normalizing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as published data sets use them: with NFKC and without runs of spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("model") / "published.model"
    path.write_bytes(model.getvalue())
    return path


def read_tokens(folder: Path, part: str, name: str = "corpus") -> np.ndarray:
    """All token ids of one part of a data set, in order."""
    pattern = f"{name}_{part}_[0-9]*.bin"
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(pattern))])


def read_texts(folder: Path, part: str) -> list[str]:
    """The documents of one part, decoded."""
    processor = prepare.load_processor(folder / "tokenizer.model")
    ids = read_tokens(folder, part)
    starts = np.flatnonzero(ids == BOS_ID)
    return [
        prepare.decode_document(processor, doc[1:].tolist()) for doc in np.split(ids, starts)[1:]
    ]


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a data set."""
    paths = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# --- Lossless encoding ---------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_encoding_any_text_is_lossless(processor, text: str):
    ids = prepare.encode_document(processor, text)
    assert prepare.decode_document(processor, ids) == text
    assert processor.decode(ids) == text  # SentencePiece's own decoder agrees


@settings(max_examples=300, deadline=None)
@given(text=any_text)
def test_the_byte_table_counts_exactly_the_utf8_bytes_of_any_text(processor, text: str):
    ids = np.array([BOS_ID, *prepare.encode_document(processor, text)])
    table = ByteTable(processor, processor.get_piece_size())
    counts = table.count(ids[1:], ids[:-1])
    assert counts.sum() == len(text.encode("utf-8"))
    assert [0, *counts] == prepare.count_bytes(processor, text)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_encoding_hard_texts_is_lossless(processor, text: str):
    assert prepare.decode_document(processor, prepare.encode_document(processor, text)) == text


def test_a_long_text_is_encoded_as_if_it_were_not_cut_into_segments(processor):
    text = "".join(TEXTS) + "word " * 3000 + " " * 5000 + "x" * 5000
    assert text[0] != " " and prepare.SPACE not in text
    assert prepare.encode_document(processor, text) == processor.encode(text)


def test_a_literal_marker_becomes_three_byte_tokens_and_a_space_does_not(processor):
    marker = [processor.piece_to_id(piece) for piece in ("<0xE2>", "<0x96>", "<0x81>")]
    space = processor.piece_to_id(prepare.SPACE)
    assert prepare.encode_document(processor, "\u2581") == marker
    assert space not in (*marker, processor.unk_id())


def test_the_tokenizer_has_pieces_for_indentation_and_line_ends(processor):
    pieces = {processor.id_to_piece(i) for i in range(processor.get_piece_size())}
    assert {"\n", "\t", prepare.SPACE, prepare.SPACE * 4} <= pieces
    assert any(len(piece) > 1 and piece.startswith(prepare.SPACE + "t") for piece in pieces)


def test_a_normalizing_tokenizer_is_applied_unchanged(normalizing_model: Path):
    processor = prepare.load_processor(normalizing_model)
    assert not prepare.is_lossless(processor)
    for text in HARD_TEXTS:
        assert prepare.encode_document(processor, text) == processor.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_the_sidecar_of_a_normalizing_tokenizer_sums_to_the_original(normalizing_model, text: str):
    processor = prepare.load_processor(normalizing_model)
    counts = prepare.count_bytes(processor, text)
    assert len(counts) == 1 + len(processor.encode(text))
    assert sum(counts) == len(text.encode("utf-8")) and min(counts) >= 0


# --- The data set --------------------------------------------------------------------------------


def test_every_document_is_in_the_data_set_once_and_in_order(made: Path):
    texts = {part: read_texts(made, part) for part in ("train", "val")}
    expected: dict[str, list[str]] = {"train": [], "val": []}
    for text in TEXTS + HARD_TEXTS:
        digest = hashlib.sha256(text.encode()).digest()
        is_val = int.from_bytes(digest[:8], "big") / 2**64 < 0.2
        if text.strip():
            expected["val" if is_val else "train"].append(text)
    assert texts == expected and texts["val"] and texts["train"]


def test_the_manifest_tells_what_the_files_hold(made: Path):
    manifest = json.loads((made / "manifest.json").read_bytes())
    for part in ("train", "val"):
        ids, texts = read_tokens(made, part), read_texts(made, part)
        assert manifest[part] == {
            "documents": len(texts),
            "text_bytes": sum(len(text.encode()) for text in texts),
            "shards": len(list(made.glob(f"corpus_{part}_[0-9]*.bin"))),
            "tokens": len(ids),
        }
    hashes = file_hashes(made)
    del hashes["manifest.json"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == hashes
    assert manifest["tokenizer"]["sha256"] == hashes["tokenizer.model"]
    assert manifest["tokenizer"]["vocab_size"] == 360 and manifest["tokenizer"]["is_lossless"]
    assert manifest["left_out"]["empty"] == 1
    assert not (made / ".partial").exists()


def test_shards_are_full_but_for_the_last_and_documents_go_on_in_the_next(made: Path):
    shards = [read_shard(path) for path in sorted(made.glob("corpus_train_*.bin"))]
    assert [path.name for path in sorted(made.glob("corpus_train_*.bin"))][:2] == [
        "corpus_train_000000.bin",
        "corpus_train_000001.bin",
    ]
    assert len(shards) > 3
    assert {len(shard) for shard in shards[:-1]} == {2000} and 0 < len(shards[-1]) <= 2000
    assert any(shard[0] != BOS_ID for shard in shards[1:])  # and read_texts finds them whole


@pytest.mark.parametrize("sizes", [[], [0], [5], [3, 3], [6, 6], [1, 11, 1], [7, 0, 5, 2], [25]])
def test_shards_hold_all_tokens_in_order(tmp_path: Path, sizes: list[int]):
    ids = np.arange(sum(sizes))
    parts = []
    for number, part in enumerate(np.split(ids, np.cumsum(sizes)[:-1]) if sizes else []):
        parts.append(tmp_path / f"{number}.bin")
        write_shard(parts[-1], part)
    entry = prepare.write_shards(parts, tmp_path / "x_train", 6)
    shards = [read_shard(path) for path in sorted(tmp_path.glob("x_train_*.bin"))]
    assert entry == {"shards": len(shards), "tokens": len(ids)}
    assert np.concatenate([ids[:0], *shards]).tolist() == ids.tolist()
    assert all(len(shard) == 6 for shard in shards[:-1]) and all(map(len, shards))


def test_validation_text_and_sidecar_agree_with_the_shards(made: Path, processor):
    text = (made / "val_text.bin").read_bytes()
    assert text == "".join(read_texts(made, "val")).encode()
    ids, counts = read_tokens(made, "val"), read_tokens(made, "val_bytes")
    table = ByteTable(processor, processor.get_piece_size())
    assert counts.tolist() == [0, *table.count(ids[1:], ids[:-1])]
    assert counts.sum() == len(text)


@pytest.mark.slow
def test_two_runs_and_two_workers_give_the_same_bytes(made: Path, corpus: Path, tmp_path: Path):
    options = ["--byte-sidecar", "--write-val-text", "--shard-tokens", 2000]
    run(tmp_path / "again", "--input", corpus, *options, "--batch-bytes", 10**6)
    run(tmp_path / "two", "--input", corpus, *options, "--workers", 2)
    assert file_hashes(tmp_path / "again") == file_hashes(made) == file_hashes(tmp_path / "two")


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_running_goes_on_and_ends_with_the_same_bytes(tmp_path: Path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [make_text(seed, 30) for seed in range(500)])
    options = ["--input", corpus, "--batch-bytes", 300, "--shard-tokens", 2000]
    command = [sys.executable, "data/prepare.py", "--out", tmp_path / "killed", "--val-frac", "0.2"]
    command += ["--vocab-size", "360", "--workers", "2", *options]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    partial = tmp_path / "killed" / ".partial"
    give_up_s = time.monotonic() + 60
    while len(list(partial.glob("train_*.bin"))) < 20 and time.monotonic() < give_up_s:
        time.sleep(0.005)
    helpers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(helpers) >= 2 and not psutil.wait_procs(helpers, timeout=20)[1]  # none stays behind
    assert not list((tmp_path / "killed").glob("*.bin"))
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("train_*.bin")}
    encoded: list[Path] = []
    encode = prepare.encode_batch

    def encode_and_note(batch: prepare.Batch) -> int:
        encoded.append(batch.path)
        return encode(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "encode_batch", encode_and_note)
        run(tmp_path / "killed", *options)
    assert not set(encoded) & set(finished) and encoded  # went on, from where it was
    run(tmp_path / "whole", *options)
    assert file_hashes(tmp_path / "killed") == file_hashes(tmp_path / "whole")


def test_a_second_call_does_nothing_and_a_damaged_file_is_made_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tmp_path, "--input", corpus)
    before = file_hashes(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "make_data_set", lambda plan, owned: pytest.fail("made again"))
        run(tmp_path, "--input", corpus)
    assert f"already complete: {tmp_path}" in capsys.readouterr().out
    shard = tmp_path / "corpus_val_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    run(tmp_path, "--input", corpus)
    assert "corpus_val_000000.bin is missing or damaged" in capsys.readouterr().out
    assert file_hashes(tmp_path) == before


def test_other_arguments_need_another_folder_or_force(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tmp_path, "--input", corpus, "--shard-tokens", 1000)
    other = ["--out", tmp_path, "--input", corpus, "--vocab-size", 380, "--val-frac", 0.2]
    assert prepare.main(list(map(str, other))) == 2
    message = capsys.readouterr().err
    assert "vocab_size 360, now 380" in message and "--out" in message and "--force" in message
    assert run(tmp_path, *other[2:], "--force")["tokenizer"]["vocab_size"] == 380
    assert len(list(tmp_path.glob("corpus_train_*.bin"))) == 1  # no stale shard stays


def readme_commands() -> list[Any]:
    """The commands of data/README.md that need no network; training is only described."""
    text = (ROOT / "data/README.md").read_text().replace("\\\n", " ")
    lines = re.findall(
        r"^(?:[A-Z_]+=\S+ )*python \S+\.py .*$|^RECIPE=.*$", text, flags=re.MULTILINE
    )
    commands = [line for line in lines if "data/download.py" not in line]
    assert len(commands) == 10
    slow = pytest.mark.slow
    is_slow = [any(word in line for word in ("stdlib", "train_gpt")) for line in commands]
    pairs = zip(commands, is_slow, strict=True)
    return [pytest.param(line, marks=slow if slow_line else ()) for line, slow_line in pairs]


@pytest.fixture(scope="module")
def texts_of_many_words() -> list[str]:
    """Texts whose words give a tokenizer of 2,048 pieces."""
    draw = np.random.default_rng(0).integers
    words = ["".join(map(chr, draw(97, 123, draw(2, 8)))) for _ in range(3000)]
    return [" ".join(words[i] for i in draw(0, 3000, 900)) for _ in range(40)]


@pytest.mark.parametrize("command", readme_commands())
def test_the_commands_of_the_readme_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    normalizing_model: Path,
    texts_of_many_words: list[str],
):
    texts = texts_of_many_words
    monkeypatch.chdir(tmp_path)
    for folder in ("texts", "data/tokenizers"):
        Path(folder).mkdir(parents=True)
    for name, chosen in (("train-00", texts[:20]), ("train-01", texts[20:]), ("val", texts[:3])):
        write_as(Path(f"texts/{name}.jsonl.zst"), chosen)
    Path("texts/notes.txt").write_text("notes\n")
    Path("mytext.txt").write_text("\n\n".join(texts))
    Path("data/tokenizers/fineweb_1024_bpe.model").write_bytes(normalizing_model.read_bytes())
    if "data/prepare.py" in command:
        assert prepare.main(shlex.split(command.partition("prepare.py ")[2])) == 0
        assert len(list(Path("data").glob("*/*_train_000000.bin"))) == 1
        return
    folder = re.findall(r"data/m\w+", command)[0]
    assert prepare.main(["--input", "mytext.txt", "--out", folder]) == 0
    if "data/check.py" in command:
        assert check.main([folder]) == 0
        return
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MODE": "describe"}
    command = command.replace("records/", f"{ROOT}/records/").replace(" train_", f" {ROOT}/train_")
    result = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "VOCAB_SIZE" in result.stdout, result.stderr


# --- Copies and splits ---------------------------------------------------------------------------


def test_copies_of_validation_documents_never_reach_training(tmp_path: Path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS + TEXTS[::-1])
    manifest = run(tmp_path / "out", "--input", corpus)
    train, val = read_texts(tmp_path / "out", "train"), read_texts(tmp_path / "out", "val")
    assert not set(train) & set(val) and len(set(val)) == len(val)
    assert manifest["left_out"]["copies_of_validation"] == len(val)
    assert manifest["left_out"]["copies_in_training"] == 0
    assert manifest["copies_kept"] == len(train) - len(set(train)) == len(train) // 2


def test_dedup_keeps_the_first_of_equal_training_documents(tmp_path: Path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS[:20] + TEXTS)
    manifest = run(tmp_path / "out", "--input", corpus, "--dedup")
    train, val = read_texts(tmp_path / "out", "train"), read_texts(tmp_path / "out", "val")
    assert train == [text for text in TEXTS if text not in val]
    left_out = manifest["left_out"]
    assert manifest["copies_kept"] == 0 and left_out["copies_in_training"] > 0
    assert left_out["copies_in_training"] + left_out["copies_of_validation"] == 20


def test_named_validation_files_are_the_validation_text(tmp_path: Path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    val = write_jsonl(tmp_path / "val.jsonl", ["only here\n", TEXTS[7], TEXTS[3]])
    manifest = run(tmp_path / "out", "--input", corpus, "--val-input", val)
    assert read_texts(tmp_path / "out", "val") == ["only here\n", TEXTS[7], TEXTS[3]]
    assert read_texts(tmp_path / "out", "train") == [
        t for n, t in enumerate(TEXTS) if n not in (3, 7)
    ]
    assert manifest["left_out"]["copies_of_validation"] == 2
    assert manifest["arguments"]["val_frac"] is None and "--val-input" in manifest["split_rule"]


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path):
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    models = []
    for number, val_text in enumerate([TEXTS[0], TEXTS[0] + "zzzzqqqq " * 2000]):
        val = write_jsonl(tmp_path / f"val{number}.jsonl", [val_text, TEXTS[0]])
        out = tmp_path / f"out{number}"
        run(out, "--input", train, "--val-input", val)
        models.append((out / "tokenizer.model").read_bytes())
    assert models[0] == models[1]


def test_the_sample_is_bounded_and_does_not_depend_on_the_order_of_documents():
    def sample(texts: list[str]) -> list[str]:
        chosen = prepare.Sample(max_bytes=3000)
        for text in texts:
            chosen.add(readers.hash_text(text), text)
        return chosen.texts()

    texts = sample(TEXTS)
    assert sum(len(text.encode()) for text in texts) == 3000
    assert texts == sample(TEXTS[::-1]) == sample(TEXTS + TEXTS)
    by_key = sorted(TEXTS, key=readers.hash_text)
    assert texts[:-1] == by_key[: len(texts) - 1] and by_key[len(texts) - 1].startswith(texts[-1])
    assert sample(TEXTS[:1]) == TEXTS[:1]


def test_find_repeats_finds_all_but_the_first_of_equal_keys():
    keys = [n.to_bytes(16, "big") for n in (5, 9, 5, 2**64, 9, 5, 0)]
    packed = bytearray(b"".join(keys))
    assert sorted(prepare.find_repeats(packed, np.arange(7))) == [2, 4, 5]
    assert sorted(prepare.find_repeats(packed, np.array([1, 2, 5, 6]))) == [5]
    assert len(prepare.find_repeats(packed, np.array([], dtype=int))) == 0


# --- Inputs --------------------------------------------------------------------------------------


def write_as(path: Path, texts: list[str]) -> None:
    """Write documents in the format that the file's name says, .zst as two frames."""
    lines = "".join(
        json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts
    ).encode()
    if path.name.endswith(".zst"):
        half = len(lines) // 2
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif path.suffix == ".parquet":
        with path.open("wb") as file:  # pyarrow itself opens no name that is not UTF-8
            table = pyarrow.table({"id": range(len(texts)), "text": texts})
            pyarrow.parquet.write_table(table, file)
    else:
        path.write_bytes(lines)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_data_set(made: Path, tmp_path: Path, suffix: str):
    write_as(tmp_path / f"corpus{suffix}", TEXTS + HARD_TEXTS)
    run(tmp_path / "out", "--input", tmp_path / f"corpus{suffix}")
    for part in ("train", "val"):
        assert read_tokens(tmp_path / "out", part).tolist() == read_tokens(made, part).tolist()


def test_a_text_file_is_one_document_and_a_glob_is_sorted(tmp_path: Path):
    for number, text in enumerate(TEXTS[:12]):
        (tmp_path / f"{number:02d}.txt").write_bytes(text.encode() + b"\r\nend")
    manifest = run(
        tmp_path / "out", "--input", tmp_path / "*.txt", tmp_path / "03.txt", "--name", "t"
    )
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 12
    assert [entry["name"] for entry in manifest["arguments"]["input"]] == [
        f"{n:02d}.txt" for n in range(12)
    ]
    assert (tmp_path / "out" / "t_train_000000.bin").is_file()


def test_a_given_tokenizer_is_copied_and_used(
    corpus: Path, normalizing_model: Path, tmp_path: Path
):
    options = ["--byte-sidecar", "--write-val-text"]
    manifest = run(tmp_path, "--input", corpus, "--tokenizer", normalizing_model, *options)
    assert (tmp_path / "tokenizer.model").read_bytes() == normalizing_model.read_bytes()
    assert manifest["tokenizer"]["is_lossless"] is False
    counts, ids = read_tokens(tmp_path, "val_bytes"), read_tokens(tmp_path, "val")
    text = (tmp_path / "val_text.bin").read_bytes()
    assert len(counts) == len(ids) and counts.sum() == len(text) == manifest["val"]["text_bytes"]


@pytest.fixture(scope="module")
def stdlib_texts() -> Iterator[list[str]]:
    yield [text for text, _ in readers.read_stdlib()]


def test_the_standard_library_gives_about_12_mb_in_an_order_that_does_not_change(stdlib_texts):
    assert 9e6 < sum(len(text.encode()) for text in stdlib_texts) < 15e6
    assert stdlib_texts == [text for text, _ in readers.read_stdlib()] != sorted(stdlib_texts)
    assert Path(json.__file__).read_text(encoding="utf-8") in stdlib_texts


def test_the_standard_library_comes_without_its_tests_and_without_text_twice(stdlib_texts):
    topics = set(pydoc_data.topics.topics.values())
    assert topics <= set(stdlib_texts)
    longest = max(topics, key=len)
    assert sum(longest[:2000] in text for text in stdlib_texts) == 1
    suite = Path(json.__file__).parent.parent / "test"
    assert not any(
        path.read_text() in stdlib_texts for path in suite.glob("test_json*/test_dump.py")
    )


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9\n", "a.txt: byte 0xe9 at offset 3 is not UTF-8"),
        (
            "a.jsonl",
            b'{"text": "ok"}\n\n{"text": "caf\xe9"}\n',
            "a.jsonl:3: byte 0xe9 at offset 13",
        ),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "a.jsonl:2: not JSON (Expecting value"),
        ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl:1: `text` is missing, it must be a string"),
        ("a.jsonl", b'{"text": 7}\n', "a.jsonl:1: `text` is int, it must be a string"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: `text` is list, it must be a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: `text` holds the lone surrogate U+D800"),
        ("a.jsonl", b"", "no text: 0 documents"),
        ("a.jsonl", b'{"text": ""}\n{"text": " \\n"}\n', "no text: 2 documents, 2 of them empty"),
        ("a.txt", b"x", "no validation document among 1 documents, 0 of them empty"),
        ("a.jsonl.zst", b"not zstd", "a.jsonl.zst: cannot be decompressed (zstd"),
        ("a.parquet", b"not parquet", "a.parquet: not valid parquet at its beginning"),
        ("a.csv", b"x", "a.csv: unknown kind of file; the name must end in .txt, .jsonl,"),
    ],
)
def test_bad_content_is_named_with_its_place(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
):
    (tmp_path / name).write_bytes(content)
    words = ["--out", tmp_path / "out", "--input", tmp_path / name, "--val-frac", 0.001]
    assert message in fail(capsys, *words)


def test_other_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_as(tmp_path / "a.jsonl.zst", TEXTS)
    cut = tmp_path / "cut.jsonl.zst"
    cut.write_bytes((tmp_path / "a.jsonl.zst").read_bytes()[:-50])
    ints = tmp_path / "ints.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), ints)
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), other)
    bytes_ = tmp_path / "bytes.parquet"
    text = pyarrow.array([b"fine", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), bytes_)
    out = ["--out", tmp_path / "out"]
    assert "can't decode byte 0xe9 in position 3" in fail(capsys, *out, "--input", bytes_)
    assert "cut short" in fail(capsys, *out, "--input", cut)
    assert "row 1: `text` is int" in fail(capsys, *out, "--input", ints)
    assert "no column `text` among ['body']" in fail(capsys, *out, "--input", other)
    assert "no such file or folder, and no file matches" in fail(
        capsys, *out, "--input", tmp_path / "*.md"
    )
    one = write_jsonl(tmp_path / "one.jsonl", TEXTS[:1])
    words = [*out, "--input", one, "--val-input", one]
    assert "no training document among 2 documents, 0 of them empty, 1 are" in fail(capsys, *words)


def test_a_vocabulary_that_does_not_fit_the_text_is_refused_with_the_numbers(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--out", tmp_path, "--input", corpus, "--val-frac", 0.2]
    message = fail(capsys, *words, "--vocab-size", 5000)
    assert re.search(r"too little text .* at most \d+ pieces, --vocab-size is 5000", message)
    assert "is too small" in fail(capsys, *words, "--vocab-size", 263)


def test_an_unfit_tokenizer_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(b"nothing")
    words = ["--out", tmp_path / "out", "--input", corpus, "--tokenizer"]
    assert "not a SentencePiece model" in fail(capsys, *words, wrong)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=45, minloglevel=2
    )
    wrong.write_bytes(model.getvalue())
    message = fail(capsys, *words, wrong)
    assert "0 of 256 byte pieces" in message and "leave out --tokenizer" in message
    assert "No such file" in fail(capsys, *words, tmp_path / "absent.model", status=1)


def test_a_full_disk_is_reported_and_leaves_no_half_shard(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def refuse(path: Path, ids: np.ndarray) -> None:
        if "val_0" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_shard(path, ids)

    words = ["--out", tmp_path, "--input", corpus, "--val-frac", 0.2, "--vocab-size", 360]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "write_shard", refuse)
        assert "No space left on device; make room" in fail(capsys, *words, status=1)
    run(tmp_path, "--input", corpus)


def test_a_document_that_changes_between_the_passes_is_noticed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = write_jsonl(tmp_path / "own.jsonl", TEXTS)
    scan = prepare.scan_documents

    def scan_then_change(plan: prepare.Plan) -> Any:
        result = scan(plan)
        write_jsonl(own, [*TEXTS[:-1], "changed"])
        return result

    words = ["--out", tmp_path / "out", "--input", own, "--val-frac", 0.2, "--vocab-size", 360]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "scan_documents", scan_then_change)
        assert "changed while it was read" in fail(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "one of the arguments --source --input is required"),
        (["--source", "stdlib"], "required: --out"),
        (
            ["--source", "stdlib", "--out", "x", "--vocab-size", "100"],
            "100 is not from 263 to 65536",
        ),
        (["--source", "stdlib", "--out", "x", "--val-frac", "many"], "invalid float value: 'many'"),
        (["--source", "stdlib", "--out", "x", "--name", "a_b"], "letters, digits and -"),
    ],
)
def test_a_bad_option_is_named(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(words)
    assert message in capsys.readouterr().err


def test_progress_goes_to_a_log_as_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = iter([0.0, 10.0, 31.0, 60.0, 62.0, 100.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with show_progress("encoding", 10_000_000) as bar:  # at 0 s
        for _ in range(4):
            bar.update(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "encoding: 2 MB, 0.1 MB/s, 20% of 10 MB, 0:02:04 left",  # at 31 s
        "encoding: 4 MB, 0.1 MB/s, 40% of 10 MB, 0:01:33 left",  # at 62 s
    ]
