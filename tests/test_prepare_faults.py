"""data/prepare.py with unusual inputs: nothing is lost, nothing hangs, every refusal says why."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data import files, prepare, readers
from tests.test_prepare import (
    ROOT,
    TEXTS,
    fail,
    file_hashes,
    make_text,
    read_texts,
    read_tokens,
    run,
    write_as,
    write_jsonl,
)
from train_gpt import BOS_ID, InputError, read_shard, write_shard

QUICK = ["--vocab-size", 300, "--val-frac", 0.2, "--workers", 1]
CALL_LIMIT_S = 120  # for a call that would hang if the fault came back


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start the command as a process of its own."""
    command = [sys.executable, str(ROOT / "data/prepare.py"), *map(str, words)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def call(*words: object, **options: Any) -> tuple[int, str, str]:
    """Run the command as a process of its own; exit status, stdout and stderr."""
    process = start(*words, **options)
    try:
        out, err = process.communicate(timeout=CALL_LIMIT_S)
    finally:
        process.kill()
    return process.returncode, out, err


# --- Inputs are known by their content -----------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("option", ["--input", "--val-input"])
def test_another_text_under_the_same_name_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, option: str
):
    base = write_jsonl(tmp_path / "base.jsonl", TEXTS[:30])
    other = {"--input": "--val-input", "--val-input": "--input"}[option]
    for folder, word in (("a", "alpha"), ("b", "ALPHA")):
        path = tmp_path / folder / f"x{suffix}"
        path.parent.mkdir()
        write_as(path, [f"{text} {word}" for text in TEXTS[30:]])
        os.utime(path, (10**9, 10**9))  # older than the result
    words = ["--out", tmp_path / "out", *QUICK, other, base, option]
    assert prepare.main(list(map(str, [*words, tmp_path / f"a/x{suffix}"]))) == 0
    before = file_hashes(tmp_path / "out")
    assert prepare.main(list(map(str, [*words, tmp_path / f"b/x{suffix}"]))) == 2
    message = capsys.readouterr().err
    assert f"x{suffix} (SHA-256 " in message and "--force" in message
    assert file_hashes(tmp_path / "out") == before


def test_a_file_with_a_new_time_but_the_same_content_is_the_same_input(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tmp_path / "out", "--input", corpus)
    os.utime(corpus, (time.time() + 10, time.time() + 10))
    run(tmp_path / "out", "--input", corpus)
    assert "already complete" in capsys.readouterr().out


def test_a_data_set_of_an_earlier_version_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    manifest = run(tmp_path / "out", "--input", corpus)
    manifest["format"] = 1
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    words = ["--out", tmp_path / "out", "--input", corpus, *QUICK]
    assert prepare.main(list(map(str, words))) == 2
    assert "earlier version" in capsys.readouterr().err


# --- Nothing of others is replaced, and nothing is lost ------------------------------------------


@pytest.mark.parametrize("given_as", ["out/tokenizer.model", "link.model", "sub/../out/mine.model"])
def test_force_reads_a_tokenizer_inside_out_and_keeps_it(
    corpus: Path, tmp_path: Path, given_as: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run(Path("out"), "--input", corpus)
    Path("sub").mkdir()
    Path("link.model").symlink_to("out/tokenizer.model")
    Path("out/mine.model").write_bytes(Path("out/tokenizer.model").read_bytes())
    model = Path(given_as).read_bytes()
    texts = read_texts(Path("out"), "train")
    run(Path("out"), "--input", corpus, "--tokenizer", given_as, "--force", "--name", "again")
    assert Path(given_as).read_bytes() == model == Path("out/tokenizer.model").read_bytes()
    assert not list(Path("out").glob("corpus_*"))  # no second data set in the folder
    ids = read_tokens(Path("out"), "train", "again")
    assert ids.tolist().count(BOS_ID) == len(texts)


def test_force_keeps_the_old_data_set_until_the_new_one_is_finished(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tmp_path / "out", "--input", corpus)
    before = file_hashes(tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(corpus.read_bytes() + b"{")
    words = ["--out", tmp_path / "out", "--input", broken, *QUICK, "--force"]
    assert prepare.main(list(map(str, words))) == 2
    assert "broken.jsonl:61: not JSON" in capsys.readouterr().err
    assert file_hashes(tmp_path / "out") == before


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "val_text.bin", "fineweb_train_000000.bin", "a_b_val_0 (1).bin"]
)
def test_a_file_of_others_in_out_is_not_replaced(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir()
    foreign.write_bytes(b"precious")
    words = ["--out", foreign.parent, "--input", corpus, *QUICK, "--force", "--write-val-text"]
    assert prepare.main(list(map(str, words))) == 2
    assert f"{foreign} was made elsewhere" in capsys.readouterr().err
    assert [path.name for path in foreign.parent.iterdir()] == [name]
    assert foreign.read_bytes() == b"precious"


@pytest.mark.parametrize("names", [["notes.txt"], ["../corpus.jsonl"], ["sub/x_train_000000.bin"]])
def test_a_manifest_that_names_other_files_does_not_delete_them(
    corpus: Path, tmp_path: Path, names: list[str]
):
    out = tmp_path / "out"
    manifest = run(out, "--input", corpus)
    entry = {"bytes": 1, "sha256": ""}
    manifest["files"] |= dict.fromkeys(names, entry)
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "sub").mkdir()
    for name in names:
        if not (out / name).exists():
            (out / name).write_text("precious")
    before = {name: (out / name).read_bytes() for name in names}
    run(out, "--input", corpus, "--force")
    assert {name: (out / name).read_bytes() for name in names} == before


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_folder_for_unfinished_work_of_others_is_not_touched(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
):
    partial, other = tmp_path / "out/.partial", tmp_path / "other"
    other.mkdir()
    (other / "train_000000_0123456789abcdef.bin").write_bytes(b"precious")
    partial.parent.mkdir()
    if kind == "folder":
        other.rename(partial)
    elif kind == "link":
        partial.symlink_to(other)
    else:
        partial.write_bytes(b"precious")
    words = ["--out", partial.parent, "--input", corpus, *QUICK]
    assert prepare.main(list(map(str, words))) == 2
    assert str(partial) in capsys.readouterr().err
    kept = partial if kind == "file" else partial / "train_000000_0123456789abcdef.bin"
    assert kept.read_bytes() == b"precious"


def test_inputs_in_the_folder_for_unfinished_work_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    inside = tmp_path / "out/.partial/corpus.jsonl"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(corpus.read_bytes())
    words = ["--out", tmp_path / "out", "--input", inside, *QUICK]
    assert "lies in the folder for unfinished work" in fail(capsys, *words)
    assert inside.is_file()


@pytest.mark.parametrize("moves", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 3))])
def test_a_kill_while_files_are_moved_into_place_is_repaired(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
):
    options = ["--input", corpus, "--shard-tokens", 2000, "--vocab-size", 320]
    run(tmp_path / "whole", *options)
    run(tmp_path / "out", "--input", corpus, "--name", "old", "--shard-tokens", 1000)
    replace, left = os.replace, [moves]

    def replace_then_die(source: Path, target: Path) -> None:
        if Path(source).parent.name == "final" and Path(target).parent == tmp_path / "out":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_then_die)
        words = ["--out", tmp_path / "out", "--val-frac", 0.2, "--workers", 1, *options, "--force"]
        assert prepare.main(list(map(str, words))) == 130
    assert not (tmp_path / "out/manifest.json").exists()
    run(tmp_path / "out", *options)
    assert file_hashes(tmp_path / "out") == file_hashes(tmp_path / "whole")


@pytest.mark.parametrize("entry", ["x", {}, {"bytes": 5}, None])
def test_a_damaged_entry_of_the_manifest_is_repaired(corpus: Path, tmp_path: Path, entry: Any):
    run(tmp_path / "set", "--input", corpus)
    whole, path = file_hashes(tmp_path / "set"), tmp_path / "set/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"]["corpus_val_000000.bin"] = entry
    path.write_text(json.dumps(manifest))
    run(tmp_path / "set", "--input", corpus)
    assert file_hashes(tmp_path / "set") == whole


def test_a_kill_while_the_unfinished_work_is_removed_is_made_good(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rmtree, partial = shutil.rmtree, tmp_path / "set/.partial"

    def remove_one_and_die(folder: Path) -> None:
        rmtree(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_one_and_die)
        words = ["--input", corpus, "--out", tmp_path / "set", *QUICK]
        assert prepare.main(list(map(str, words))) == 130
    assert (partial / "prepare.json").is_file()  # that this script made the folder is still known
    assert prepare.main(list(map(str, words))) == 0
    assert not partial.exists()


def test_text_that_lies_in_the_output_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text")
    words = ["--input", tmp_path / "texts", "--out", tmp_path / "texts"]
    assert prepare.main(list(map(str, words))) == 2
    assert "is also --out, where no text is looked for" in capsys.readouterr().err


def test_a_refused_call_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    fail(capsys, "--out", tmp_path / "out", "--input", bad)
    fail(capsys, "--out", tmp_path / "out", "--input", tmp_path / "absent.txt")
    fail(capsys, "--out", tmp_path / "out", "--input", tmp_path)
    assert not (tmp_path / "out").exists()


# --- Two calls at once ---------------------------------------------------------------------------


def test_a_second_call_names_the_process_that_holds_the_folder(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "out").mkdir()
    with files.lock_folder(tmp_path / "out"):
        status, _, err = call("--out", tmp_path / "out", "--input", corpus, *QUICK)
    assert status == 2 and f"is in use by process {os.getpid()} on " in err and " since 20" in err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_several_calls_at_once_make_one_sound_data_set(tmp_path: Path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [make_text(seed) for seed in range(400)])
    words = ["--out", tmp_path / "out", "--input", corpus, *QUICK, "--batch-bytes", 2000]
    processes = [start(*words) for _ in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=CALL_LIMIT_S)
        assert process.returncode in (0, 2), err
        assert process.returncode == 0 or "is in use by" in err
    assert 0 in [process.returncode for process in processes]
    manifest = json.loads((tmp_path / "out/manifest.json").read_bytes())
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    hashes["manifest.json"] = file_hashes(tmp_path / "out")["manifest.json"]
    assert file_hashes(tmp_path / "out") == hashes  # and no lock stays


@pytest.mark.parametrize("content", ["", "{", '{"pid": 1, "host": "x", "since": "2020"}'])
def test_a_lock_file_that_a_dead_process_left_does_not_matter(
    corpus: Path, tmp_path: Path, content: str
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").write_text(content)
    run(tmp_path / "out", "--input", corpus)
    assert not (tmp_path / "out/.lock").exists()


# --- Names and output that are not UTF-8 ---------------------------------------------------------

BYTES_NAMES = [b"caf\xe9", b"\xff\xfe", "größe \U0001f600".encode(), b"line\nbreak"]


@pytest.mark.parametrize("name", BYTES_NAMES)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_file_names_of_any_bytes_work(tmp_path: Path, name: bytes, suffix: str):
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    folder.mkdir()
    corpus = folder / f"{os.fsdecode(name)}{suffix}"
    write_as(corpus, TEXTS)
    manifest = run(folder / "out", "--input", corpus)
    assert manifest["arguments"]["input"][0]["name"].endswith(suffix)
    run(folder / "two", "--input", corpus, "--tokenizer", folder / "out/tokenizer.model")
    assert read_texts(folder / "two", "val") == read_texts(folder / "out", "val")


@pytest.mark.parametrize("name", BYTES_NAMES[:3])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_that_cannot_spell_a_name_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes, encoding: str
):
    folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    folder.mkdir()
    corpus = write_jsonl(folder / "corpus.jsonl", TEXTS[:20])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    run(folder / "out", "--input", corpus)
    words = ["--out", folder / "out", "--input", corpus, "--vocab-size", 370]
    assert prepare.main(list(map(str, words))) == 2


@pytest.mark.slow
def test_output_in_ascii_works_for_a_process(tmp_path: Path, corpus: Path):
    words = ["--out", tmp_path / "größe", "--input", corpus, *QUICK]
    status, out, err = call(*words, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (status, err) == (0, "") and "gr\\xf6\\xdfe" in out


# --- JSON and zstd -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["9" * 5000, "-" + "1" * 9999, "1e999", "NaN", "[" * 200 + "]" * 200, '{"text": 5}']
)
def test_other_fields_of_a_json_line_do_not_matter(tmp_path: Path, value: str):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"meta": {value}, "text": "kept", "more": {value}}}\n')
    assert [text for text, _ in readers.read_documents(path)] == ["kept"]


@pytest.mark.parametrize("value", ["[" * 200_000, '{"a":' * 200_000, "[" * 99_999 + "]" * 99_999])
def test_json_that_is_nested_too_deeply_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
):
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{{"text": "x", "meta": {value}}}\n')
    message = fail(capsys, "--out", tmp_path / "out", "--input", path)
    assert "deep.jsonl:2: lists or objects are nested too deeply" in message


def test_a_number_as_text_is_still_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for value in ("7", "7" * 5000, "-0", "7.5"):
        path = tmp_path / "x.jsonl"
        path.write_text(f'{{"text": {value}}}\n')
        message = fail(capsys, "--out", tmp_path / "out", "--input", path)
        assert "x.jsonl:1: `text` is" in message


def skippable_frame(content: bytes) -> bytes:
    return (0x184D2A50).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize("window_log", [10, 27, 28, 31])
def test_zstd_frames_of_any_window_are_read(tmp_path: Path, window_log: int):
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    settings = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=0)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(compressor.compress(lines) + compressor.flush())
    assert [text for text, _ in readers.read_documents(path)] == TEXTS


def test_zstd_frames_in_any_number_are_read_and_a_cut_is_named(tmp_path: Path):
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    compress = zstandard.ZstdCompressor().compress
    parts = [compress(lines[:1000]), compress(b""), compress(lines[1000:])]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(skippable_frame(b"index").join([b"", *parts, b""]))
    assert [text for text, _ in readers.read_documents(path)] == TEXTS
    whole = b"".join(parts)
    for size in (1, len(parts[0]) + 5, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"x\.jsonl\.zst: the zstd data is cut short"):
            list(readers.read_documents(path))


@given(text=st.binary(max_size=40), size=st.integers(1, 9))
def test_lines_do_not_depend_on_the_chunks_that_bring_them(text: bytes, size: int):
    text = text.replace(b"\0", b"\n")
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    lines = text.split(b"\n")
    assert list(readers.split_lines(chunks)) == (lines if lines[-1] else lines[:-1])


# --- Tokenizers ----------------------------------------------------------------------------------


def train_model(path: Path, **settings: Any) -> Path:
    """A small tokenizer with other settings than those of prepare.py."""
    own = {"model_type": "bpe", "vocab_size": 330, "minloglevel": 2, "byte_fallback": True}
    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    lines = [line for text in TEXTS for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        **{**own, **special, **settings},
    )
    return path


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Normalization rules of one's own: two curly quotes become straight ones."""
    path = tmp_path_factory.mktemp("rules") / "rules.tsv"
    path.write_text("201C\t22\n201D\t22\n")
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {"normalization_rule_tsv": "rules", "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity", "add_dummy_prefix": True},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
    ],
    ids=str,
)
def test_a_tokenizer_with_rules_of_its_own_is_applied_unchanged_and_gets_a_sidecar(
    tmp_path: Path, rules: Path, settings: dict[str, Any]
):
    if "normalization_rule_tsv" in settings:
        settings = {**settings, "normalization_rule_tsv": str(rules)}
    quiet = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    model = train_model(tmp_path / "own.model", **{**quiet, **settings})
    texts = [*TEXTS[:20], "it\u2019s \u201cquoted\u201d  twice \u2581 and", " led by a space"]
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS[20:])
    val = write_jsonl(tmp_path / "val.jsonl", texts)
    words = ["--input", train, "--val-input", val, "--tokenizer", model]
    manifest = run(tmp_path / "out", *words)
    assert manifest["tokenizer"]["is_lossless"] is False
    assert manifest["arguments"]["byte_sidecar"] is True
    processor = prepare.load_processor(model)
    ids = [i for text in texts for i in (BOS_ID, *processor.encode(text))]
    assert read_tokens(tmp_path / "out", "val").tolist() == ids
    counts = read_tokens(tmp_path / "out", "val_bytes")
    assert counts.sum() == manifest["val"]["text_bytes"] == len("".join(texts).encode())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos_id": 3, "eos_id": 1, "unk_id": 2}, "BOS has id 3, but documents begin with id 1"),
        ({"bos_id": 2, "eos_id": 1}, "BOS has id 2, but documents begin with id 1"),
        ({"bos_id": -1, "eos_id": 1, "unk_id": 2}, "BOS has id -1, but documents begin with id 1"),
        ({"byte_fallback": False, "vocab_size": 60}, "0 of 256 byte pieces"),
    ],
    ids=str,
)
def test_a_tokenizer_that_miscounts_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    corpus: Path,
    settings: dict[str, Any],
    message: str,
):
    model = train_model(tmp_path / "own.model", **settings)
    words = ["--out", tmp_path / "out", "--input", corpus, "--tokenizer", model]
    assert message in fail(capsys, *words)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"<0x41>", b"<0xG1>", "not a SentencePiece model"),
        (b"<0xFF>", b"<0x00>", "not a SentencePiece model"),
        ("\u2581t".encode(), b"\xff\x96\x81t", "not UTF-8"),
        (b"", b"\xff", "not a SentencePiece model"),
    ],
)
def test_a_damaged_tokenizer_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    corpus: Path,
    old: bytes,
    new: bytes,
    message: str,
):
    model = train_model(tmp_path / "own.model")
    model.write_bytes(model.read_bytes().replace(old, new, 1))
    words = ["--out", tmp_path / "out", "--input", corpus, "--tokenizer", model]
    found = fail(capsys, *words)
    assert message in found


@pytest.mark.parametrize(
    ("name", "run_of"), [("x.jsonl", " "), ("x.txt", " "), ("x.parquet", "\u3000")]
)
def test_a_token_of_more_bytes_than_a_sidecar_holds_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, run_of: str
):
    model = train_model(tmp_path / "own.model")
    text = f"before {run_of * 70_000} after"
    if name.endswith(".txt"):
        (tmp_path / name).write_text(text)
    else:
        write_as(tmp_path / name, [TEXTS[0], text])
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    words = ["--out", tmp_path / "out", "--input", train, "--val-input", tmp_path / name]
    message = fail(capsys, *words, "--tokenizer", model)
    place = {"x.jsonl": "x.jsonl:2", "x.txt": "x.txt", "x.parquet": "x.parquet row 2"}[name]
    assert f"{place}: one token of this document stands for" in message and "shorten" in message


# --- Special files, signals, cores ---------------------------------------------------------------


@pytest.fixture
def alarm() -> Iterator[None]:
    """Raise an error in a call that hangs, instead of hanging."""
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the call hangs"))
    signal.alarm(CALL_LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("where", ["input", "folder", "glob", "val", "tokenizer", "manifest"])
def test_a_fifo_is_refused_and_does_not_hang(
    tmp_path: Path, corpus: Path, alarm: None, capsys: pytest.CaptureFixture[str], where: str
):
    folder = tmp_path / "texts"
    folder.mkdir()
    names = {"tokenizer": "x.model", "manifest": "manifest.json"}
    fifo = folder / names.get(where, "x.jsonl")
    os.mkfifo(fifo)
    words = {
        "input": ["--input", fifo],
        "folder": ["--input", folder],
        "glob": ["--input", folder / "*"],
        "val": ["--input", corpus, "--val-input", fifo],
        "tokenizer": ["--input", corpus, "--tokenizer", fifo],
        "manifest": ["--input", corpus],
    }[where]
    out = folder if where == "manifest" else tmp_path / "out"
    assert prepare.main(list(map(str, ["--out", out, *QUICK[2:], *words]))) == 2
    message = capsys.readouterr().err
    assert str(fifo) in message and message.count("\n") == 1


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_a_device_is_refused(
    tmp_path: Path, corpus: Path, alarm: None, capsys: pytest.CaptureFixture[str], device: str
):
    link = tmp_path / "x.txt"
    link.symlink_to(device)
    for words in (["--input", link], ["--input", corpus, "--tokenizer", device]):
        message = fail(capsys, "--out", tmp_path / "out", *words)
        assert "is a character device, not a regular file" in message


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that takes a second or more to read, train on and encode."""
    draw = np.random.default_rng(0).integers
    words = ["".join(map(chr, draw(97, 123, draw(2, 9)))) for _ in range(30_000)]
    texts = [" ".join(words[i] for i in draw(0, 30_000, 1000)) for _ in range(500)]
    return write_jsonl(tmp_path_factory.mktemp("large") / "large.jsonl", texts)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param("reading", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("training", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("reading", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("training", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("encoding", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("encoding", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_call_at_any_moment_and_the_next_call_completes_it(
    tmp_path: Path, large_corpus: Path, moment: str, number: signal.Signals
):
    out = tmp_path / "out"
    words = ["--out", out, "--input", large_corpus, "--vocab-size", 1000, "--batch-bytes", 10_000]
    process = start(*words)
    signs = {"reading": "prepare.json", "training": "final", "encoding": "train_*.bin"}
    while not list((out / ".partial").glob(signs[moment])) and process.poll() is None:
        time.sleep(0.005)
    if moment == "training":
        assert process.stdout is not None
        process.stdout.readline()  # "training a tokenizer ..."
    process.send_signal(number)
    _, err = process.communicate(timeout=CALL_LIMIT_S)
    assert process.returncode in (130, -number) and "Traceback" not in err, err
    assert not (out / "manifest.json").exists()
    assert prepare.main(list(map(str, words))) == 0
    assert not (out / ".partial").exists() and not (out / ".lock").exists()


def test_workers_follow_the_cores_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch):
    options = prepare.parse_options(["--source", "stdlib", "--out", "x"])
    for cores in ({0}, {3, 5}, set(range(7))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert prepare.choose_workers(options, 10**9) == len(cores)
        assert prepare.choose_workers(options, 1000) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert prepare.choose_workers(options, 10**9) == 5


# --- One's own text ------------------------------------------------------------------------------


def paragraphs(num: int, *, separator: str = "\n\n") -> str:
    return separator.join(make_text(seed, 60).strip().replace("\n\n", "\n") for seed in range(num))


@pytest.mark.parametrize(
    ("text", "boundary", "before"),
    [
        (paragraphs(50), "a paragraph's start", "\n\n"),
        (paragraphs(50, separator="\r\n \r\n"), "a paragraph's start", "\r\n"),
        (paragraphs(50, separator="\n"), "a line's start", "\n"),
        (paragraphs(50).replace("\n", " "), "a word's start", " "),
        ("x" * 20_000, "inside a word", "x"),
    ],
)
@pytest.mark.parametrize("share", [0.06, 0.3])
def test_a_single_text_is_split_at_the_best_boundary(
    tmp_path: Path, text: str, boundary: str, before: str, share: float
):
    path = tmp_path / "mytext.txt"
    path.write_bytes(text.encode())
    vocab = 266 if boundary == "inside a word" else 300
    words = ["--input", path, "--vocab-size", vocab, "--write-val-text", "--val-frac", share]
    manifest = run(tmp_path / "out", *words)
    (train,), (val,) = (read_texts(tmp_path / "out", part) for part in ("train", "val"))
    assert train + val == text and train.endswith(before) and not val[:1].isspace()
    assert share / 2 <= len(val) / len(text) <= 2 * share
    assert boundary in manifest["split_rule"] and "mytext.txt" in manifest["split_rule"]
    assert manifest["val"]["text_bytes"] == len(val.encode())
    assert (tmp_path / "out/val_text.bin").read_bytes() == val.encode()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_the_longest_of_few_documents_is_split_and_its_copies_are_left_out(
    tmp_path: Path, suffix: str
):
    long = paragraphs(30)
    write_as(tmp_path / f"x{suffix}", [TEXTS[0], long, TEXTS[1], long])
    manifest = run(tmp_path / "out", "--input", tmp_path / f"x{suffix}", "--val-frac", 0.01)
    (val,) = read_texts(tmp_path / "out", "val")
    assert long.endswith(val)
    assert read_texts(tmp_path / "out", "train") == [TEXTS[0], long[: -len(val)], TEXTS[1]]
    assert manifest["left_out"]["copies_of_validation"] == 1


@given(text=st.text(alphabet="ab \n\r", min_size=2, max_size=300), share=st.floats(0.001, 0.99))
def test_a_cut_leaves_two_parts_and_is_near_the_share(text: str, share: float):
    position, boundary = prepare.cut_position(text, share)
    assert 0 < position < len(text)
    if boundary != "inside a word":
        assert text[position - 1].isspace()
        assert round(len(text) * (1 - 2 * share)) <= position
        assert position <= max(1, round(len(text) * (1 - share / 2)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_neither_part_is_empty_whatever_is_drawn(tmp_path: Path, share: float):
    """With few documents, a draw may take all of them or none."""
    for number in range(3):
        corpus = write_jsonl(tmp_path / f"{number}.jsonl", [paragraphs(20 + number)] * 2)
        manifest = run(
            tmp_path / f"out{number}", "--input", corpus, "--val-frac", share, "--vocab-size", 310
        )
        assert manifest["train"]["documents"] == manifest["val"]["documents"] == 1


def test_no_validation_share_is_still_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus: Path
):
    words = ["--out", tmp_path / "out", "--input", corpus, "--val-frac", 0]
    assert "no validation document among 60 documents" in fail(capsys, *words)


def test_a_folder_is_searched_recursively_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "texts"
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden/x.txt", "a/.x.txt", "notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n{TEXTS[len(name)]}")
    write_as(folder / "c.jsonl.zst", TEXTS[20:40])
    (folder / "a/loop").symlink_to(folder)
    manifest = run(folder / "out", "--input", folder)
    names = [entry["name"] for entry in manifest["arguments"]["input"]]
    assert names == ["c.txt", "z.txt", "b.txt", "c.jsonl.zst"]
    assert "1 x .md" in capsys.readouterr().out
    again = run(folder / "out", "--input", folder)  # the result inside is no input
    assert again == manifest


def test_a_file_named_twice_is_read_once(tmp_path: Path, corpus: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to(corpus)
    words = [corpus, tmp_path / "*.jsonl", tmp_path / "sub/../corpus.jsonl", tmp_path]
    manifest = run(tmp_path / "out", "--input", *words)
    assert len(manifest["arguments"]["input"]) == 1


def test_a_shard_streams_from_parts_without_being_held(tmp_path: Path):
    """Writing a shard of many parts holds one part at a time."""
    parts = []
    for number in range(40):
        parts.append(tmp_path / f"{number}.bin")
        write_shard(parts[-1], np.full(100_000, number))
    tracemalloc.start()
    prepare.write_shards(parts, tmp_path / "x_train", 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read_shard(tmp_path / "x_train_000000.bin")) == 4_000_000
    assert peak < 2_000_000  # the shard has 8,000,000 bytes
