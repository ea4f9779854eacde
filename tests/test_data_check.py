"""data/check.py: every kind of damage is a problem, and copies in the training data are found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import check, prepare
from tests.test_prepare import TEXTS, make_text, run, write_jsonl
from tests.test_prepare_faults import train_model
from train_gpt import BOS_ID, read_shard, write_shard


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a sidecar and several shards, of texts without near copies."""
    draw = np.random.default_rng(0).integers
    words = ["".join(map(chr, draw(97, 123, draw(2, 8)))) for _ in range(2000)]
    texts = [" ".join(words[i] for i in draw(0, 2000, 200)) for _ in range(60)]
    folder = tmp_path_factory.mktemp("sound")
    corpus = write_jsonl(folder / "corpus.jsonl", texts)
    run(folder / "set", "--input", corpus, "--byte-sidecar", "--shard-tokens", 5000)
    return folder / "set"


@pytest.fixture
def data(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound data set that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


def verdict(folder: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit status and output of the command."""
    status = check.main([str(folder), *map(str, words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out + captured.err


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the ids of a shard."""
    write_shard(path, change(np.array(read_shard(path))))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest in place."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


TRAIN, VAL = "corpus_train_000000.bin", "corpus_val_000000.bin"
COUNTS = "corpus_val_bytes_000000.bin"


def test_a_sound_data_set_is_ok(sound: Path, capsys: pytest.CaptureFixture[str]):
    status, output = verdict(sound, capsys)
    assert status == 0 and output.endswith("verdict: ok\n") and "PROBLEM" not in output
    manifest = json.loads((sound / "manifest.json").read_bytes())
    for split in ("train", "val"):
        entry = manifest[split]
        totals = f"{split}: {entry['tokens']:,} tokens in {entry['documents']:,} documents"
        assert totals in output
    assert f"{manifest['val']['text_bytes']:,} bytes, counted by the sidecar" in output
    assert "exact copies in training: 0 of" in output and "near copies in training: 0 of" in output


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda d: (d / "corpus_train_000001.bin").unlink(), "is missing"),
    "the last shard is missing": (
        lambda d: sorted(d.glob("corpus_train_*"))[-1].unlink(),
        "is in the manifest, but not in the folder",
    ),
    "a stray copy": (
        lambda d: shutil.copy(d / VAL, d / "corpus_val_000000 (1).bin"),
        "has no name of a shard, but training would read it",
    ),
    "a shard too many": (
        lambda d: shutil.copy(d / VAL, d / "corpus_val_000002.bin"),
        "corpus_val_000002.bin is not in the manifest",
    ),
    "two data sets": (
        lambda d: shutil.copy(d / TRAIN, d / "other_train_000000.bin"),
        "shards of 2 data sets are in one folder: corpus, other",
    ),
    "a truncated shard": (lambda d: os.truncate(d / TRAIN, 3000), "damaged"),
    "no shard": (lambda d: (d / TRAIN).write_bytes(b"text"), "not a token shard"),
    "a changed token": (
        lambda d: rewrite(d / TRAIN, lambda ids: np.append(ids[:-1], ids[-1] ^ 1)),
        "its SHA-256 is not the manifest's",
    ),
    "another tokenizer": (
        lambda d: (d / "tokenizer.model").write_bytes(
            prepare.train_tokenizer([" ".join(TEXTS)], 300, prepare.TOKENIZER_SETTINGS)
        ),
        "the shards belong to another tokenizer",
    ),
    "an id out of range": (
        lambda d: rewrite(d / VAL, lambda ids: np.append(ids[:-1], 60_000)),
        "val: id 60000, but the tokenizer has 360 pieces",
    ),
    "no BOS": (
        lambda d: rewrite(d / TRAIN, lambda ids: ids[1:]),
        "train: the first document does not begin with BOS",
    ),
    "no BOS in validation": (
        lambda d: rewrite(d / VAL, lambda ids: ids[ids != BOS_ID]),
        "val: the first document does not begin with BOS",
    ),
    "a sidecar of fives": (
        lambda d: rewrite(d / COUNTS, lambda counts: np.full(len(counts), 5)),
        "counts differ from the bytes of their pieces",
    ),
    "a short sidecar": (
        lambda d: rewrite(d / COUNTS, lambda counts: counts[:-1]),
        "validation tokens",
    ),
    "a lost sidecar": (lambda d: (d / COUNTS).unlink(), f"{COUNTS} is in the manifest"),
    "other totals": (
        lambda d: edit_manifest(d, lambda m: m["train"].update(tokens=7)),
        "but the manifest says 7",
    ),
    "other bytes": (
        lambda d: edit_manifest(d, lambda m: m["val"].update(text_bytes=8)),
        "but the manifest says 8",
    ),
    "other documents": (
        lambda d: edit_manifest(d, lambda m: m["val"].update(documents=9)),
        "but the manifest says 9",
    ),
    "a table for an entry": (
        lambda d: edit_manifest(d, lambda m: m["files"].update({VAL: "x"})),
        f"{VAL} has changed",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_kind_of_damage_is_a_problem(
    data: Path, capsys: pytest.CaptureFixture[str], name: str
):
    damage, message = DAMAGES[name]
    damage(data)
    status, output = verdict(data, capsys)
    assert status == 1 and "verdict: " in output
    assert any(message in line for line in output.splitlines() if "PROBLEM" in line), output


@pytest.mark.parametrize("factor", [0, 3, 100])
def test_a_sidecar_of_a_normalizing_tokenizer_that_cannot_belong_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: int
):
    model = train_model(tmp_path / "own.model")
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    run(tmp_path / "set", "--input", corpus, "--tokenizer", model)
    assert "PROBLEM: sidecar" not in verdict(tmp_path / "set", capsys, "--max-near", 1)[1]
    rewrite(tmp_path / "set" / COUNTS, lambda counts: counts * factor)
    (tmp_path / "set/manifest.json").unlink()
    status, output = verdict(tmp_path / "set", capsys, "--max-near", 1)
    assert status == 1 and "PROBLEM: sidecar" in output


def test_a_folder_that_is_no_data_set_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    assert verdict(tmp_path / "absent", capsys)[0] == 2
    assert verdict(data / TRAIN, capsys)[0] == 2
    assert "holds no validation shard" in verdict(tmp_path / "empty", capsys)[1]
    (data / "manifest.json").write_text("{")
    output = verdict(data, capsys)[1]
    assert "was not written by data/prepare.py; restore it, or remove it to check" in output
    (data / "manifest.json").unlink()
    assert "no manifest.json" in verdict(data, capsys)[1]
    (data / "tokenizer.model").unlink()
    status, output = verdict(data, capsys)
    assert status == 2 and "no tokenizer at" in output and "--tokenizer" in output
    (data / VAL).unlink()
    os.mkfifo(data / VAL)
    status, output = verdict(data, capsys, "--tokenizer", data.parent / "nothing.model")
    assert status == 2


def test_a_fifo_in_place_of_a_shard_is_a_problem_and_does_not_hang(
    data: Path, capsys: pytest.CaptureFixture[str]
):
    (data / TRAIN).unlink()
    os.mkfifo(data / TRAIN)
    (data / "manifest.json").unlink()
    status, output = verdict(data, capsys)
    assert status == 1 and "is a FIFO" in output


def test_a_published_folder_finds_its_tokenizer_by_name(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for suffix in ("", "_lossless_caps"):
        folder = tmp_path / f"datasets/fineweb10B_sp360{suffix}"
        shutil.copytree(sound, folder)
        (folder / "manifest.json").unlink()
        model = tmp_path / f"tokenizers/fineweb_360_bpe{suffix}.model"
        model.parent.mkdir(exist_ok=True)
        (folder / "tokenizer.model").rename(model)
        assert verdict(folder, capsys)[0] == 0


# --- Overlap -------------------------------------------------------------------------------------


def make_set(folder: Path, train: list[list[int]], val: list[list[int]], model: Path) -> Path:
    """A data set of these documents, given as ids without BOS, in two training shards."""
    folder.mkdir(parents=True)
    shutil.copy(model, folder / "tokenizer.model")
    for part, documents in (("train", train), ("val", val)):
        ids = np.array([i for document in documents for i in (BOS_ID, *document)])
        pieces = np.array_split(ids, 2) if part == "train" else [ids]
        for number, piece in enumerate(pieces):
            write_shard(folder / f"x_{part}_{number:06d}.bin", piece)
    return folder


def random_documents(num: int, length: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(4, 360, (num, length)).tolist()


def near_copy(document: list[int], share: float) -> list[int]:
    """The document with its last tokens replaced, so that about `share` of it stays."""
    kept = round(len(document) * share)
    return document[:kept] + random_documents(1, len(document) - kept, seed=9)[0]


def found_copies(output: str) -> dict[str, tuple[int, float]]:
    """Number of documents and share of bytes of each kind of copy."""
    found = {}
    for line in output.splitlines():
        kind, mark, rest = line.strip().partition(" copies in training: ")
        if mark:
            share = float(rest.split("documents, ")[1].split("%")[0]) / 100
            found[kind] = int(rest.split(" of ")[0].replace(",", "")), share
    return found


@pytest.mark.parametrize("max_sketch", [1 << 22, 2000, 500])
def test_copies_in_the_training_data_are_found(
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    max_sketch: int,
):
    monkeypatch.setattr(check, "MAX_SKETCH", max_sketch)  # smaller: one in 4 or 16 shingles
    val = random_documents(20, 400)
    copies = [val[3], val[7]]
    near = [near_copy(val[11], 0.8), near_copy(val[12], 0.7), near_copy(val[13], 0.2)]
    train = random_documents(30, 300, seed=1) + copies + near + random_documents(9, 300, seed=2)
    folder = make_set(tmp_path / "set", train, val, sound / "tokenizer.model")
    status, output = verdict(folder, capsys)
    found = found_copies(output)
    assert found["exact"][0] == 2 and found["near"][0] == 2
    assert 0.08 < found["exact"][1] < 0.12 and 0.08 < found["near"][1] < 0.12
    assert status == 1 and "PROBLEM: validation documents are in the training data" in output
    assert "PROBLEM: near copies are" in output


@pytest.mark.parametrize("share", [0.3, 0.45, 0.55, 0.9])
def test_a_near_copy_has_half_of_the_shingles(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
):
    val = random_documents(10, 500)
    train = [*random_documents(10, 500, seed=1), near_copy(val[4], share)]
    folder = make_set(tmp_path / "set", train, val, sound / "tokenizer.model")
    status, output = verdict(folder, capsys, "--max-near", 0.5)
    assert found_copies(output)["near"][0] == (share > 0.5) and status == 0
    assert verdict(folder, capsys, "--max-near", 0.01)[0] == (share > 0.5)
    assert "overlap" not in verdict(folder, capsys, "--no-overlap")[1]


def test_parts_of_many_documents_are_no_near_copy_but_are_counted(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    val = random_documents(4, 400)
    train = [val[0][start : start + 100] for start in range(0, 400, 100)]
    folder = make_set(tmp_path / "set", train, val, sound / "tokenizer.model")
    status, output = verdict(folder, capsys)
    assert status == 0 and found_copies(output)["near"][0] == 0
    seen = float(output.split("% of the validation shingles")[0].split()[-1])
    assert seen == pytest.approx(100 * 4 * 85 / (4 * 385), abs=0.1)


def test_boilerplate_is_no_copy_and_short_documents_are_compared_whole(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    license_text = random_documents(1, 100, seed=5)[0]
    val = [license_text + document for document in random_documents(40, 60)] + [[7, 8, 9], [7, 8]]
    train = [license_text + document for document in random_documents(40, 60, seed=1)] + [[7, 8, 9]]
    folder = make_set(tmp_path / "set", train, val, sound / "tokenizer.model")
    found = found_copies(verdict(folder, capsys)[1])
    assert found["near"][0] == 0 and found["exact"][0] == 1


documents_of_ids = st.lists(st.lists(st.integers(2, 5), max_size=40), min_size=1, max_size=6)


def shingles_of(document: list[int]) -> set[tuple[int, ...]]:
    width = check.SHINGLE_TOKENS
    return {tuple(document[i : i + width]) for i in range(len(document) - width + 1)}


@given(train=documents_of_ids, val=documents_of_ids)
def test_shares_agree_with_sets_of_shingles(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], val: list[list[int]]
):
    """The definition, document by document; some training documents derive from validation."""
    train = train + [document[3:] + document[:30] for document in val[::2]] + val[1:2]
    folder = tmp_path_factory.mktemp("shares")
    paths = []
    for name, documents in (("train", train), ("val", val)):
        ids = [i for document in documents for i in (BOS_ID, *document)]
        paths.append(folder / f"{name}.bin")
        write_shard(paths[-1], np.array(ids))
    sketch = check.Sketch([paths[1]])
    for block in check.read_blocks([paths[0]], 50):
        sketch.add_training(block)
    for index, document in enumerate(val):
        own = shingles_of(document)
        assert sketch.num_shingles[index] == len(own)
        shares = [len(own & shingles_of(other)) / max(len(own), 1) for other in train]
        assert sketch.best[index] == pytest.approx(max(shares))
        assert sketch.is_exact[index] == (document in train)
    everywhere = set().union(*map(shingles_of, train))
    pairs = [shingle in everywhere for document in val for shingle in shingles_of(document)]
    assert sketch.share_seen() == pytest.approx(sum(pairs) / max(len(pairs), 1))


@given(
    lengths=st.lists(st.integers(0, 30), max_size=8),
    cut=st.integers(0, 100),
    block_tokens=st.integers(1, 60),
)
def test_blocks_hold_whole_documents_whatever_the_shards(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], cut: int, block_tokens: int
):
    ids = np.array([i for length in lengths for i in (BOS_ID, *range(5, 5 + length))], dtype=int)
    folder = tmp_path_factory.mktemp("blocks")
    write_shard(folder / "0.bin", ids[:cut])
    write_shard(folder / "1.bin", ids[cut:])
    blocks = list(check.read_blocks([folder / "0.bin", folder / "1.bin"], block_tokens))
    assert np.concatenate([ids[:0], *blocks]).tolist() == ids.tolist()
    assert all(block[0] == BOS_ID for block in blocks)


def test_shingle_hashes_are_equal_where_the_ids_are_and_only_there():
    ids = np.random.default_rng(0).integers(0, 3, 3000).astype(np.uint16)
    hashes = check.hash_shingles(ids)
    windows = np.lib.stride_tricks.sliding_window_view(ids, check.SHINGLE_TOKENS)
    assert len(hashes) == len(windows)
    assert len(set(hashes.tolist())) == len({window.tobytes() for window in windows})
    again = check.hash_shingles(ids[100:200])
    assert again.tolist() == hashes[100 : 200 - check.SHINGLE_TOKENS + 1].tolist()
    for length in range(check.SHINGLE_TOKENS):
        assert len(check.hash_shingles(ids[:length])) == 0


def test_a_set_of_similar_texts_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Documents of one template: texts of 2,000 words with a few changed."""
    base = make_text(1, 2000).split(" ")
    texts = [" ".join([*base[:number], f"changed{number}", *base[number:]]) for number in range(40)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    run(tmp_path / "set", "--input", corpus, "--vocab-size", 330)
    status, output = verdict(tmp_path / "set", capsys)
    assert status == 1 and "PROBLEM: near copies are" in output
