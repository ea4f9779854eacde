"""data/download.py against a server on this machine: whole files, broken connections, refusals."""

from __future__ import annotations

import http.server
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import download
from train_gpt import read_shard, write_shard

DATASET = "datasets/fineweb10B_sp8192"
SHARD = f"{DATASET}/fineweb_train_000000.bin"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; can break off answers and can ignore ranges."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.break_after: list[int] = []  # bytes after which the next answers break off
        self.ranges = True
        self.requests: list[tuple[str, int]] = []  # path and first byte of each

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        payload = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found and self.server.ranges else 0
        self.server.requests.append((self.path.lstrip("/"), start))
        if start >= len(payload) > 0:
            return self.send_error(416)
        self.send_response(206 if self.server.ranges else 200)
        self.send_header("Content-Length", str(len(payload) - start))
        if self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(payload) - 1}/{len(payload)}")
        self.end_headers()
        end = len(payload)
        if self.server.break_after and path.suffix == ".bin":
            end = start + self.server.break_after.pop(0)
        self.wfile.write(payload[start:end])

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def model() -> bytes:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on", "and some more words"] * 9),
        model_writer=content,
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return content.getvalue()


@pytest.fixture
def server(tmp_path: Path, model: bytes) -> Iterator[Server]:
    folder = tmp_path / "published"
    (folder / "tokenizers").mkdir(parents=True)
    (folder / "tokenizers/fineweb_8192_bpe.model").write_bytes(model)
    for number, part in enumerate(("val_000000", "train_000000", "train_000001")):
        write_shard(folder / DATASET / f"fineweb_{part}.bin", np.arange(5000) + number)
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(server: Server, out: Path, *words: str) -> int:
    return download.main(["--base-url", server.url, "--out", str(out), *words])


def files_in(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_all_files_arrive_as_published_and_a_second_call_fetches_nothing(
    server: Server, tmp_path: Path
):
    assert run(server, tmp_path / "out", "--shards", "2") == 0
    assert files_in(tmp_path / "out") == files_in(server.folder)
    num_requests = len(server.requests)
    assert num_requests == 4 and run(server, tmp_path / "out", "--shards", "2") == 0
    assert len(server.requests) == num_requests


def test_only_as_many_training_shards_are_fetched_as_asked_for(server: Server, tmp_path: Path):
    assert run(server, tmp_path / "out", "--shards", "1") == 0
    assert set(files_in(server.folder)) - set(files_in(tmp_path / "out")) == {
        f"{DATASET}/fineweb_train_000001.bin"
    }


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_again(server: Server, tmp_path: Path, ranges: bool):
    server.ranges = ranges
    server.break_after = [3000, 4000]
    assert run(server, tmp_path / "out", "--shards", "0") == 0
    assert (
        files_in(tmp_path / "out")[f"{DATASET}/fineweb_val_000000.bin"]
        == (server.folder / DATASET / "fineweb_val_000000.bin").read_bytes()
    )
    assert [start for _, start in server.requests[1:]] == ([0, 3000, 7000] if ranges else [0, 0, 0])


def test_what_an_earlier_call_left_is_continued(server: Server, tmp_path: Path):
    whole = (server.folder / SHARD).read_bytes()
    part = tmp_path / "out" / f"{SHARD}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(whole[:1500])
    assert run(server, tmp_path / "out", "--shards", "1") == 0
    assert (SHARD, 1500) in server.requests
    assert (tmp_path / "out" / SHARD).read_bytes() == whole and not part.exists()


def test_a_part_that_is_already_whole_only_gets_its_name(server: Server, tmp_path: Path):
    part = tmp_path / "out" / f"{SHARD}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes((server.folder / SHARD).read_bytes())
    assert run(server, tmp_path / "out", "--shards", "1") == 0
    assert len(read_shard(tmp_path / "out" / SHARD)) == 5000


def test_a_connection_that_brings_nothing_ends_with_a_message_and_keeps_what_came(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server.break_after = [2000, 0]
    assert run(server, tmp_path / "out", "--shards", "0") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "bytes are missing" in message and "the same command goes on" in message
    part = tmp_path / "out" / DATASET / "fineweb_val_000000.bin.part"
    assert part.stat().st_size == 2000


def test_a_damaged_shard_is_refused_and_does_not_stay(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with (server.folder / SHARD).open("ab") as file:
        file.write(b"rubbish")
    assert run(server, tmp_path / "out", "--shards", "1") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{server.url}/{SHARD}: what came is not what it should be" in message
    assert "5000 tokens" in message
    assert not list((tmp_path / "out").rglob("*train*"))


def test_a_file_that_was_damaged_here_is_fetched_again(server: Server, tmp_path: Path):
    assert run(server, tmp_path / "out", "--shards", "1") == 0
    (tmp_path / "out" / SHARD).write_bytes(b"")
    assert run(server, tmp_path / "out", "--shards", "1") == 0
    assert len(read_shard(tmp_path / "out" / SHARD)) == 5000


def test_a_shard_that_is_not_published_is_named(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(server, tmp_path / "out", "--shards", "3") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "fineweb_train_000002.bin: HTTP Error 404" in message
    assert (tmp_path / "out" / DATASET / "fineweb_train_000001.bin").is_file()


def test_without_a_network_there_is_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert download.main(["--base-url", "http://127.0.0.1:1", "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: http://127.0.0.1:1/tokenizers/fineweb_8192_bpe.model: ")
    assert "with a network" in message and message.count("\n") == 1


def test_every_variant_names_its_files_as_the_training_script_expects_them():
    for name, variant in download.VARIANTS.items():
        files = list(download.list_files(variant, 2))
        assert re.match(r"tokenizers/fineweb_\d+_bpe.*\.model$", files[0])
        assert files[-1] == f"datasets/{variant.dataset}/fineweb_train_000001.bin"
        assert files[1] == f"datasets/{variant.dataset}/fineweb_val_000000.bin"
        assert any("val_bytes" in file for file in files) == (name == "sp8192-caseops")
