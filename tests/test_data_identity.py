"""Identity of a data set: what the trainer checks before it trains or scores.

Sets with a manifest are compared with it; sets without one are checked against the rules that every
data set follows. Each refusal names the file, the value, the rule and the remedy.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train_gpt
from tests.conftest import VOCAB_SIZE, TinyData, tiny_config, write_raw_shard
from train_gpt import (
    BOS_ID,
    ByteTable,
    Config,
    InputError,
    TokenStream,
    atomic_file,
    data_identity,
    find_shards,
    load_tokenizer,
    load_validation,
)


def refusal_of(call: Callable[[], Any]) -> str:
    """The message with which `call` is refused; one line."""
    with pytest.raises(InputError) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def load(folder: Path, **knobs: Any) -> train_gpt.Validation:
    """The validation text of a folder, checked as the trainer checks it, tokenizer first."""
    cfg = tiny_config(data_path=str(folder), **knobs)
    validation = load_validation(cfg, load_tokenizer(cfg)[0])
    find_shards(cfg, "train")
    return validation


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    payload = path.read_bytes()
    return {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def write_manifest(folder: Path, val_documents: list[str], **changes: Any) -> dict[str, Any]:
    """Write manifest.json with the keys of data/prepare.py that concern the trainer."""
    files = {path.name: describe_file(path) for path in sorted(folder.glob("*.*[ln]"))}
    val_tokens = sum(len(train_gpt.read_shard(p)) for p in folder.glob("*_val_0*.bin"))
    manifest = {
        "format": 1,
        "val": {
            "documents": len(val_documents),
            "text_bytes": sum(len(text.encode()) for text in val_documents),
            "tokens": val_tokens,
        },
        "tokenizer": {"file": "tokenizer.model", "sha256": files["tokenizer.model"]["sha256"]},
        "files": files,
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def plain(data: TinyData, tmp_path: Path) -> Path:
    """A data set without a manifest: two shards each of training, validation and sidecar."""
    folder = tmp_path / "set"
    shutil.copytree(data.folder, folder)
    counts = ByteTable(data.tokenizer, VOCAB_SIZE).count_text(data.val)
    for number, (ids, sizes) in enumerate(
        zip(np.split(data.val, [700]), np.split(counts, [700]), strict=True)
    ):
        write_raw_shard(folder / f"tiny_val_{number:06d}.bin", ids)
        write_raw_shard(folder / f"tiny_val_bytes_{number:06d}.bin", sizes)
    return folder


@pytest.fixture
def listed(plain: Path, data: TinyData) -> Path:
    """The same data set with a manifest."""
    write_manifest(plain, data.val_documents)
    return plain


def text_bytes(data: TinyData) -> int:
    """UTF-8 bytes of the validation documents."""
    return sum(len(text.encode()) for text in data.val_documents)


# --- Names and numbers of shards -----------------------------------------------------------------


def test_a_sound_data_set_is_accepted_with_and_without_a_manifest(plain: Path, data: TinyData):
    assert load(plain).target_bytes.sum() == text_bytes(data)
    write_manifest(plain, data.val_documents)
    for check in ("quick", "full"):
        assert load(plain, check_data=check).target_bytes.sum() == text_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "tiny_val_000000 (1).bin",
        "tiny_val_000001 copy.bin",
        "tiny_val_000000_old.bin",
        "tiny_val_2.bin",
        "tiny_val_0000002.bin",
        "tiny_val_bytes_000001(1).bin",
        "tiny_train_000001-backup.bin",
    ],
)
def test_a_stray_copy_of_a_shard_is_refused(plain: Path, name: str):
    shutil.copy(plain / "tiny_val_000000.bin", plain / name)
    message = refusal_of(lambda: load(plain))
    assert message.startswith(f"{plain / name}: expected tiny_")
    assert "numbered from 000000 without gaps; remove this file if it is a copy" in message


@pytest.mark.parametrize("part", ["train", "val", "val_bytes"])
def test_a_missing_first_shard_is_refused_by_name(plain: Path, part: str):
    (plain / f"tiny_{part}_000000.bin").unlink()
    assert refusal_of(lambda: load(plain)).startswith(
        f"{plain}/tiny_{part}_000001.bin: expected tiny_{part}_000000.bin next, because shards are"
    )


@pytest.mark.parametrize("missing", [[2], [1, 3], [0]])
def test_a_gap_in_the_numbers_is_refused(tmp_path: Path, missing: list[int]):
    for number in set(range(6)) - {*missing}:
        write_raw_shard(tmp_path / f"x_train_{number:06d}.bin", np.arange(9))
    message = refusal_of(lambda: find_shards(Config(data_path=str(tmp_path)), "train"))
    assert (
        f"{tmp_path}/x_train_{missing[0] + 1:06d}.bin: expected x_train_{missing[0]:06d}" in message
    )


@pytest.mark.parametrize(
    "name",
    ["older_val_000000.bin", "Copy of tiny_train_000000.bin", "x_val_bytes_000000.bin",
     "tiny_2_val_000000.bin"],
)  # fmt: skip
@pytest.mark.parametrize("part", ["train", "val", "val_bytes"])
def test_two_data_sets_in_a_folder_are_refused(plain: Path, name: str, part: str):
    shutil.copy(plain / "tiny_val_000000.bin", plain / name)
    cfg = Config(data_path=str(plain))
    message = refusal_of(lambda: find_shards(cfg, part))
    assert message.startswith(f"DATA_PATH={plain} holds shards of 2 data sets: ")
    assert "tiny" in message and name.rsplit("_val")[0].rsplit("_train")[0] in message
    assert message.endswith("keep one data set in a folder and move the others elsewhere")


def test_hidden_files_are_no_shards(plain: Path):
    (plain / "._tiny_val_000000.bin").write_bytes(b"AppleDouble")
    load(plain)


# --- Regular files only --------------------------------------------------------------------------

NAMES = ["tiny_val_000000.bin", "tiny_val_bytes_000001.bin", "tiny_train_000001.bin",
         "tokenizer.model", "manifest.json"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("replace", [os.mkfifo, os.mkdir])
def test_a_pipe_or_folder_in_place_of_a_file_is_refused_and_not_waited_for(
    listed: Path, name: str, replace: Callable[[Path], None]
):
    (listed / name).unlink()
    replace(listed / name)
    assert refusal_of(lambda: load(listed)).startswith(f"{listed / name} is not a regular file; ")


@pytest.mark.parametrize(
    "name", ["tiny_val_000000.bin", "tiny_train_000001.bin", "tokenizer.model"]
)
def test_a_device_in_place_of_a_file_is_refused(plain: Path, name: str):
    (plain / name).unlink()
    (plain / name).symlink_to("/dev/zero")
    message = refusal_of(
        lambda: [
            load(plain),
            TokenStream(find_shards(tiny_config(data_path=str(plain)), "train"), 9),
        ]
    )
    assert message.startswith(f"{plain / name} is not a regular file; ")


def test_a_broken_link_in_place_of_a_shard_is_refused(plain: Path):
    (plain / "tiny_val_000000.bin").unlink()
    (plain / "tiny_val_000000.bin").symlink_to("nowhere")
    message = refusal_of(lambda: load(plain))
    assert message.startswith(f"{plain}/tiny_val_000000.bin cannot be read: No such file")


# --- Manifest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tiny_val_000001.bin", "tiny_val_bytes_000001.bin", "tiny_train_000001.bin"]
)
def test_a_listed_shard_that_is_missing_is_refused(listed: Path, name: str):
    (listed / name).unlink()
    assert refusal_of(lambda: load(listed)).startswith(
        f"{listed / name} is missing, but {listed}/manifest.json lists it; rebuild it with"
    )


@pytest.mark.parametrize("part", ["val", "val_bytes"])
def test_all_shards_of_a_listed_split_missing_are_refused(listed: Path, part: str):
    for path in listed.glob(f"tiny_{part}_0*.bin"):
        path.unlink()
    assert f"tiny_{part}_000000.bin is missing, but" in refusal_of(lambda: load(listed))


@pytest.mark.parametrize("part", ["val", "val_bytes"])
def test_a_validation_shard_that_the_manifest_does_not_list_is_refused(listed: Path, part: str):
    path = listed / f"tiny_{part}_000002.bin"
    write_raw_shard(path, np.ones(5))
    assert refusal_of(lambda: load(listed)) == (
        f"{path} is not listed in {listed}/manifest.json, so it is of another data set; remove it"
    )


def test_training_shards_that_the_manifest_does_not_list_are_used_with_one_warning(
    listed: Path, capfd: pytest.CaptureFixture[str]
):
    for number in (2, 3, 4):
        write_raw_shard(listed / f"tiny_train_{number:06d}.bin", np.arange(10))
    for _ in range(2):
        load(listed)
    assert capfd.readouterr().err == (
        f"warning: {listed}/tiny_train_000002.bin is not listed in {listed}/manifest.json; "
        "training uses 3 such shards\n"
    )
    message = refusal_of(lambda: load(listed, check_data="full"))
    assert message.startswith(f"CHECK_DATA=full: {listed}/manifest.json has no SHA-256 of ")


@pytest.mark.parametrize("name", ["tiny_val_000000.bin", "tiny_train_000000.bin"])
def test_a_shard_of_another_size_is_refused(listed: Path, name: str):
    size = (listed / name).stat().st_size
    ids = train_gpt.read_shard(listed / name)
    write_raw_shard(listed / name, ids[:-1])
    assert refusal_of(lambda: load(listed)).startswith(
        f"size of {listed / name} is {size - 2}, but {listed}/manifest.json says {size}: "
    )


def swap_tokens(path: Path) -> None:
    """Change a shard into one of equal size and equal tokens in another order."""
    ids = np.array(train_gpt.read_shard(path))
    index = int(np.flatnonzero(np.diff(ids[1:]))[0]) + 1
    ids[[index, index + 1]] = ids[[index + 1, index]]
    write_raw_shard(path, ids)


@pytest.mark.parametrize("name", ["tiny_val_000000.bin", "tiny_val_bytes_000001.bin"])
def test_validation_files_are_compared_by_hash(listed: Path, name: str):
    swap_tokens(listed / name)
    message = refusal_of(lambda: load(listed))
    assert message.startswith(f"SHA-256 of {listed / name} is ") and "manifest.json says" in message


@pytest.mark.parametrize("number", [0, 1])
def test_training_shards_are_compared_by_hash_on_request(listed: Path, number: int):
    path = listed / f"tiny_train_{number:06d}.bin"
    swap_tokens(path)
    load(listed)
    assert refusal_of(lambda: load(listed, check_data="full")).startswith(f"SHA-256 of {path} is ")
    load(listed, check_data="full", mode="eval")  # reads no training shard


@pytest.mark.parametrize("key", ["tokens", "documents", "text_bytes"])
@pytest.mark.parametrize("change", [-1, 1, 1000])
def test_totals_of_the_validation_text_are_compared(
    listed: Path, data: TinyData, key: str, change: int
):
    manifest = json.loads((listed / "manifest.json").read_text())
    value = manifest["val"][key]
    write_manifest(listed, data.val_documents, val={**manifest["val"], key: value + change})
    message = refusal_of(lambda: load(listed))
    assert f" is {value}, but {listed}/manifest.json says {value + change}: " in message
    assert message.startswith(f"{listed}: number of validation ")


def test_a_limit_on_the_validation_text_does_not_limit_the_check(listed: Path, data: TinyData):
    assert load(listed, val_tokens_limit=20).num_targets == 20
    write_manifest(listed, data.val_documents[:-1])
    assert "number of validation documents" in refusal_of(lambda: load(listed, val_tokens_limit=20))


@pytest.mark.parametrize("with_hash", [True, False])
def test_bytes_that_the_sidecar_miscounts_are_refused(plain: Path, data: TinyData, with_hash: bool):
    path = plain / "tiny_val_bytes_000000.bin"
    counts = np.array(train_gpt.read_shard(path))
    counts[3] += 1
    write_raw_shard(path, counts)
    manifest = write_manifest(plain, data.val_documents)
    if not with_hash:
        write_manifest(plain, data.val_documents, files={})
    true = manifest["val"]["text_bytes"]
    message = refusal_of(lambda: load(plain))
    assert f"is {true + 1}, but {plain}/manifest.json says {true}" in message


def test_another_tokenizer_of_the_same_size_is_refused(listed: Path, tmp_path: Path):
    payload = (listed / "tokenizer.model").read_bytes()
    other = tmp_path / "other.model"
    other.write_bytes(payload + b"\xa2\x06\x00")  # an unknown field: the same pieces
    cfg = tiny_config(data_path=str(listed), tokenizer_path=str(other))
    assert refusal_of(lambda: load_tokenizer(cfg)).startswith(f"SHA-256 of {other} is ")
    other.write_bytes(payload)
    load_tokenizer(cfg)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"tokenizer": {}},
        {"val": {}},
        {"val": None, "tokenizer": None, "files": None},
        {"files": {"tiny_val_000000.bin": {}, "tiny_val_000001.bin": {},
                   "tiny_val_bytes_000000.bin": {}, "tiny_val_bytes_000001.bin": {}}},
        {"format": 99, "unknown": [1, 2]},
    ],
)  # fmt: skip
def test_what_a_manifest_does_not_say_is_not_compared(
    plain: Path, data: TinyData, changes: dict[str, Any]
):
    write_manifest(plain, data.val_documents, **changes)
    load(plain)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"files": [1]}', b'{"files": {"a": 1}}', b'{"val": {"tokens": "9"}}',
     b'{"val": {"text_bytes": 1.5}}', b'{"val": {"tokens": true}}', b'{"tokenizer": {"sha256": 3}}',
     b'{"files": {"a": {"bytes": "1"}}}', b'{"val": 3}', b"[" * 100_000, b"\xff\xfe",
     b'{"val": {"tokens": 1' + b"0" * 5000 + b"}}"],
    ids=range(15),
)  # fmt: skip
def test_a_malformed_manifest_is_refused(plain: Path, content: bytes):
    (plain / "manifest.json").write_bytes(content)
    assert refusal_of(lambda: load(plain)) == (
        f"{plain}/manifest.json is not a manifest of data/prepare.py or data/download.py; "
        "rebuild it"
    )


# --- Without a manifest --------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 2, 57])
def test_a_validation_text_that_does_not_begin_with_bos_is_refused(plain: Path, first: int):
    ids = np.array(train_gpt.read_shard(plain / "tiny_val_000000.bin"))
    ids[0] = first
    write_raw_shard(plain / "tiny_val_000000.bin", ids)
    message = refusal_of(lambda: load(plain))
    assert message.startswith(f"{plain}/tiny_val_000000.bin begins with token {first}, but a data")


def other_text(counts: np.ndarray, is_bos: np.ndarray) -> np.ndarray:
    """Byte counts that are those of the tokens in the opposite order, BOS in its place."""
    changed = counts.copy()
    changed[~is_bos] = counts[~is_bos][::-1]
    return changed


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda counts, is_bos: np.full_like(counts, 5), "which is BOS and stands for no text"),
        (lambda counts, is_bos: np.full_like(counts, 65_535), "which is BOS"),
        (lambda counts, is_bos: np.roll(counts, 1), "which is BOS"),
        (lambda counts, is_bos: counts + (np.arange(len(counts)) == 0), "at token 0, which is BOS"),
        (lambda counts, is_bos: np.where(is_bos, 0, 5), "above what their pieces spell"),
        (lambda counts, is_bos: np.where(is_bos, 0, 65_535), "above what their pieces spell"),
        (lambda counts, is_bos: 2 * counts, "above what their pieces spell"),
        (other_text, "above what their pieces spell"),
        (lambda counts, is_bos: 0 * counts, "the byte counts sum to 0, but the pieces spell"),
        (lambda counts, is_bos: np.minimum(counts, 1), "the byte counts sum to"),
        (lambda counts, is_bos: counts // 2, "the byte counts sum to"),
    ],
)
def test_a_sidecar_that_cannot_belong_is_refused(
    plain: Path,
    data: TinyData,
    change: Callable[[np.ndarray, np.ndarray], np.ndarray],
    problem: str,
):
    counts = ByteTable(data.tokenizer, VOCAB_SIZE).count_text(data.val)
    changed = change(counts, data.val == BOS_ID)
    write_raw_shard(plain / "tiny_val_bytes_000000.bin", changed[:700])
    write_raw_shard(plain / "tiny_val_bytes_000001.bin", changed[700:])
    message = refusal_of(lambda: load(plain))
    assert message.startswith(f"{plain}/tiny_val_bytes_000000.bin: ") and problem in message
    assert "sidecar and shards belong to different data sets; rebuild it with" in message


def test_bos_may_count_the_bytes_of_a_document_without_other_tokens(plain: Path, data: TinyData):
    ids = np.concatenate([data.val[:20], [BOS_ID], data.val, [BOS_ID]])
    counts = ByteTable(data.tokenizer, VOCAB_SIZE).count_text(ids)
    counts[[20, len(ids) - 1]] = 3
    for path in [*plain.glob("*_val_000001.bin"), *plain.glob("*_val_bytes_000001.bin")]:
        path.unlink()
    write_raw_shard(plain / "tiny_val_000000.bin", ids)
    write_raw_shard(plain / "tiny_val_bytes_000000.bin", counts)
    assert load(plain).target_bytes.sum() == counts.sum()


# --- Published data sets -------------------------------------------------------------------------


def published_counts(monkeypatch: pytest.MonkeyPatch, folder: Path, targets: int, size: int):
    """Let the folder's name be that of a published set with these totals."""
    monkeypatch.setitem(train_gpt.PUBLISHED_TARGETS, folder.name, targets)
    monkeypatch.setattr(train_gpt, "PUBLISHED_BYTES", size)


@pytest.mark.parametrize("missing", [0, 1, 2047])
def test_a_published_text_may_have_the_targets_that_logs_leave_out(
    plain: Path, data: TinyData, monkeypatch: pytest.MonkeyPatch, missing: int
):
    published_counts(monkeypatch, plain, len(data.val) - 1 - missing, text_bytes(data))
    load(plain)
    load(plain / "../set")


@pytest.mark.parametrize("difference", [-5000, -1, 2048, 10**6])
def test_other_totals_than_the_published_ones_are_refused(
    plain: Path, data: TinyData, monkeypatch: pytest.MonkeyPatch, difference: int
):
    published_counts(monkeypatch, plain, len(data.val) - 1 - difference, text_bytes(data))
    message = refusal_of(lambda: load(plain))
    assert message.startswith(f"{plain}: {len(data.val)} validation tokens for {text_bytes(data)} ")


@pytest.mark.parametrize("factor", [0.99, 1.01, 2])
def test_other_bytes_than_the_published_ones_are_refused(
    plain: Path, data: TinyData, monkeypatch: pytest.MonkeyPatch, factor: float
):
    size = int(factor * text_bytes(data))
    published_counts(monkeypatch, plain, len(data.val) - 1, size)
    assert f"of this name has about {len(data.val) - 1} for {size};" in refusal_of(
        lambda: load(plain)
    )


def test_the_known_totals_are_those_of_public_logs():
    # The file of fineweb10B_sp1024 has 124,044,716 bytes = 1,024 + 2 * 62,021,846.
    first = train_gpt.PUBLISHED_TARGETS["fineweb10B_sp1024"]
    assert first <= 62_021_846 - 1 < first + train_gpt.PUBLISHED_WINDOW
    # 47,853,343 targets with the tail: openai/parameter-golf#2014.
    first = train_gpt.PUBLISHED_TARGETS["fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"]
    assert first <= 47_853_343 < first + train_gpt.PUBLISHED_WINDOW
    for size in (151_078_222, 151_074_309):
        error = abs(size / train_gpt.PUBLISHED_BYTES - 1)
        assert error < train_gpt.PUBLISHED_BYTES_ERROR


@pytest.mark.parametrize(
    ("dataset", "tokenizer"),
    [
        ("fineweb10B_sp320", "fineweb_320_bpe"),
        ("fineweb10B_sp320_caps", "fineweb_320_bpe_caps"),
        ("fineweb10B_sp320_lossless_caps_v1", "fineweb_320_bpe_lossless_caps_v1"),
        ("mine", "fineweb_320_bpe"),
    ],
)
def test_the_published_layout_gives_each_variant_its_own_tokenizer(
    plain: Path, tmp_path: Path, dataset: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "datasets" / dataset
    folder.parent.mkdir()
    plain.rename(folder)
    tokenizers = tmp_path / "tokenizers"
    tokenizers.mkdir()
    payload = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").unlink()
    for name in {"fineweb_320_bpe", "fineweb_320_bpe_other"} - {tokenizer}:
        (tokenizers / f"{name}.model").write_bytes(b"of another variant")
    message = refusal_of(lambda: load(folder))
    assert f"{tokenizers}/{tokenizer}.model; set TOKENIZER_PATH" in message
    (tokenizers / f"{tokenizer}.model").write_bytes(payload)
    load(folder)
    monkeypatch.chdir(folder)
    load(Path("."))  # where the parent folders have no names


# --- Many shards ---------------------------------------------------------------------------------


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process have at most 256 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("loader", sorted(train_gpt.SAMPLERS))
def test_more_shards_than_files_may_be_open_are_read(tmp_path: Path, few_files: None, loader: str):
    for number in range(1499):
        write_raw_shard(tmp_path / f"x_train_{number:06d}.bin", np.full(20, number % 300))
    cfg = tiny_config(data_path=str(tmp_path), loader=loader, train_seq_len=4, eval_stride=1,
                      train_batch_tokens=4096)  # fmt: skip
    stream = TokenStream(find_shards(cfg, "train"), VOCAB_SIZE)
    loaded = train_gpt.BatchLoader(cfg, stream, rank=0, world_size=1).read(0, 4, 4 * 1499)
    assert loaded.shape == (1499, 5) and len(loaded.unique()) > 250
    assert stream.read_all().tolist() == [n % 300 for n in range(1499) for _ in range(20)]


# --- Identity ------------------------------------------------------------------------------------


def test_the_identity_is_flat_and_the_same_for_every_check(listed: Path, data: TinyData):
    cfg = tiny_config(data_path=str(listed))
    identity = data_identity(cfg)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["val_tokens"] == len(data.val)
    assert identity["train_tokens"] == sum(map(len, data.train))
    assert identity["tokenizer_sha256"] == load_tokenizer(cfg)[1]
    assert data_identity(tiny_config(data_path=str(listed), check_data="full")) == identity
    evaluated = data_identity(tiny_config(data_path=str(listed), mode="eval"))
    assert evaluated.items() <= identity.items()
    assert identity.keys() - evaluated.keys() == {"train_tokens", "train_sample_sha256"}


def test_a_renamed_data_set_has_the_same_identity(plain: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(plain, other)
    for path in other.glob("tiny_*"):
        path.rename(other / path.name.replace("tiny", "corpus"))
    one, two = (data_identity(tiny_config(data_path=str(folder))) for folder in (plain, other))
    assert one == two


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("tiny_val_000001.bin", {"val_sha256"}),
        ("tiny_val_bytes_000000.bin", {"val_sha256"}),
        ("tiny_train_000000.bin", {"train_sample_sha256"}),
        ("tiny_train_000001.bin", {"train_sample_sha256"}),
    ],
)
def test_another_text_has_another_identity(plain: Path, name: str, keys: set[str]):
    cfg = tiny_config(data_path=str(plain))
    before = data_identity(cfg)
    swap_tokens(plain / name)
    after = data_identity(cfg)
    assert {key for key in before if before[key] != after[key]} == keys


def test_a_further_training_shard_changes_the_identity(plain: Path):
    cfg = tiny_config(data_path=str(plain))
    before = data_identity(cfg)
    write_raw_shard(plain / "tiny_train_000002.bin", np.arange(40))
    assert data_identity(cfg)["train_tokens"] == before["train_tokens"] + 40


# --- File systems that cannot sync ---------------------------------------------------------------


def refuse_sync(number: int, of_folders: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fsync of folders, or of files, fail with this error."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}") == of_folders:
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("of_folders", [True, False])
def test_a_folder_that_cannot_be_synced_is_used_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    number: int, of_folders: bool,
):  # fmt: skip
    refuse_sync(number, of_folders, monkeypatch)
    for name in ("a", "b", "c"):
        with atomic_file(tmp_path / name) as file:
            file.write(b"content")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(
        "abc", b"content"
    )
    assert capfd.readouterr().err == (
        f"warning: {tmp_path} cannot be synced ({os.strerror(number)}): "
        "a power cut may lose files\n"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("of_folders", [True, False])
def test_a_disk_that_fails_to_sync_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, of_folders: bool
):
    refuse_sync(number, of_folders, monkeypatch)
    with pytest.raises(OSError) as failure, atomic_file(tmp_path / "a") as file:
        file.write(b"content")
    assert failure.value.errno == number and failure.value.filename == str(tmp_path / "a")
