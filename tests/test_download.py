"""data/download.py against a server on this machine that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
from huggingface_hub import constants

from data import download, files, prepare
from train_gpt import BOS_ID, read_shard, write_shard

VARIANT = download.VARIANTS["sp8192"]
DATASET = f"datasets/{VARIANT.dataset}"
SHARD, VAL = f"{DATASET}/fineweb_train_000000.bin", f"{DATASET}/fineweb_val_000000.bin"
MODEL = f"tokenizers/{VARIANT.tokenizer}.model"
CALL_LIMIT_S = 120  # for a call that would hang if the fault came back


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files in a folder as the Hub does; its faults can be switched on.

    Files are served as LFS files: requests are redirected to a content server, which has another
    host name, and the listing gives their SHA-256. With `git_model`, the tokenizer is a git file.
    """

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.commit = "a" * 40
        self.git_model = False
        self.break_after: list[int] = []  # bytes after which the next contents break off
        self.ranges = True
        self.replaced: dict[str, bytes] = {}  # content that is sent in place of the listed one
        self.listing: dict[str, Any] = {}  # changes of the listing: file name to its new entry
        self.listing_answer: bytes | None = None  # sent in place of the listing
        self.location = ""  # where contents are redirected to; empty: to this server
        self.endless = ""  # the file whose content never ends and has no length
        self.status = 200
        self.requests: list[str] = []  # method and path of each; ranges after "@"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def content_url(self) -> str:
        return f"http://localhost:{self.server_port}/cdn"

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep the test's output clean: some clients give up, as they should."""

    def content(self, name: str) -> bytes:
        return self.replaced.get(name) or (self.folder / name).read_bytes()

    def entry(self, name: str) -> dict[str, Any]:
        """One file of the listing, from the file in the folder."""
        content = (self.folder / name).read_bytes()
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"rfilename": f"datasets/{name}", "size": len(content)}
        entry["blobId"] = git_oid
        if not (self.git_model and name == MODEL):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
        return entry | self.listing.get(name, {})

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        gets = [request.split() for request in self.requests if request.startswith("GET /cdn/")]
        return [path.removeprefix("/cdn/") for _, path in gets]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = urllib.parse.urlsplit(self.path).path
        span = self.headers.get("Range", "").removeprefix("bytes=")
        hub.requests.append(f"{self.command} {path}{'@' if span else ''}{span}")
        if hub.status != 200:
            return self.answer(hub.status, {})
        if path.startswith("/cdn/"):
            return self.send_content(path.removeprefix("/cdn/"))
        if path == f"/api/datasets/{VARIANT.repo}":
            return self.send_listing()
        prefix = f"/datasets/{VARIANT.repo}/resolve/{hub.commit}/datasets/"
        name = path.removeprefix(prefix)
        if path == name or not (hub.folder / name).is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        entry = hub.entry(name)
        headers = {"X-Repo-Commit": hub.commit, "ETag": f'"{entry["blobId"]}"'}
        if "lfs" not in entry:
            return self.answer(200, headers, hub.content(name))
        headers |= {"X-Linked-Size": str(entry["size"]), "Location": f"{hub.content_url}/{name}"}
        headers["X-Linked-Etag"] = f'"{entry["lfs"]["sha256"]}"'
        if hub.location:
            headers["Location"] = hub.location
        self.answer(302, headers)

    def send_listing(self) -> None:
        hub = self.server
        names = [str(p.relative_to(hub.folder)) for p in hub.folder.rglob("*") if p.is_file()]
        siblings = [hub.entry(name) for name in sorted(names)]
        listing = {"id": VARIANT.repo, "sha": hub.commit, "siblings": siblings}
        self.answer(200, {}, hub.listing_answer or json.dumps(listing).encode())

    def send_content(self, name: str) -> None:
        hub = self.server
        content = hub.content(name)
        if hub.endless == name:
            return self.send_endless()
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(span[1]) if span and hub.ranges else 0
        headers = {"Content-Length": str(len(content) - start), "ETag": '"x"'}
        if span and hub.ranges:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if span and hub.ranges else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        end = len(content)
        if hub.break_after and name.endswith(".bin"):
            end = start + hub.break_after.pop(0)
            self.close_connection = True
        self.wfile.write(content[start:end])

    def send_endless(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 20))
        except OSError:
            pass  # the client gave up, as it should

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
def hub(tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "published"
    (folder / "tokenizers").mkdir(parents=True)
    (folder / MODEL).write_bytes(model)
    for number, part in enumerate(("val_000000", "train_000000", "train_000001")):
        ids = 5 + (np.arange(5000) + number) % 280
        ids[:: 500 + number] = BOS_ID
        write_shard(folder / DATASET / f"fineweb_{part}.bin", ids)
    server = Hub(folder)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what is kept of a broken transfer
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the call hangs"))
    signal.alarm(CALL_LIMIT_S)
    yield server
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


def run(out: Path, *words: object) -> int:
    return download.main(["--out", str(out), *map(str, words)])


def files_in(folder: Path, *, with_manifest: bool = False) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    if not with_manifest:
        contents.pop(f"{DATASET}/manifest.json", None)
    return contents


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, which must be an error message; no traceback may be there."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    last = text.splitlines()[-1]
    assert last.startswith("error: ")
    return last


# --- What arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("git_model", [False, True])
def test_all_files_arrive_as_published_and_a_second_call_fetches_nothing(
    hub: Hub, tmp_path: Path, git_model: bool
):
    hub.git_model = git_model
    assert run(tmp_path / "out", "--shards", 2) == 0
    assert files_in(tmp_path / "out") == files_in(hub.folder)
    num_fetched = len(hub.fetched())
    assert run(tmp_path / "out", "--shards", 2) == 0
    assert len(hub.fetched()) == num_fetched == (3 if git_model else 4)


def test_the_manifest_says_what_is_there(hub: Hub, tmp_path: Path, model: bytes):
    assert run(tmp_path / "out", "--shards", 2) == 0
    folder = tmp_path / "out" / DATASET
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["format"] == files.MANIFEST_FORMAT
    assert manifest["source"] == {"repository": VARIANT.repo, "commit": hub.commit}
    unknown = {"documents": None, "text_bytes": None}
    assert manifest["train"] == {**unknown, "tokens": 10_000, "shards": 2}
    assert manifest["val"] == {**unknown, "documents": 10, "tokens": 5000, "shards": 1}
    tokenizer = manifest["tokenizer"]
    assert (folder / tokenizer["file"]).read_bytes() == model
    assert tokenizer["sha256"] == hashlib.sha256(model).hexdigest()
    assert tokenizer["vocab_size"] == 290
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert len(manifest["files"]) == 3
    assert manifest["transform"] is None


def test_the_sidecar_of_a_variant_gives_the_bytes_of_the_text(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    published = download.VARIANTS["sp8192-caseops"]
    assert published.has_sidecar and published.transform == "lossless_caps_caseops_v1"
    variant = VARIANT._replace(has_sidecar=True, transform=published.transform)
    monkeypatch.setitem(download.VARIANTS, "sp8192", variant)
    write_shard(hub.folder / DATASET / "fineweb_val_bytes_000000.bin", np.full(5000, 3))
    assert run(tmp_path / "out", "--shards", 0) == 0
    manifest = json.loads((tmp_path / "out" / DATASET / "manifest.json").read_bytes())
    assert manifest["val"]["text_bytes"] == 15_000
    assert manifest["transform"] == published.transform
    assert "fineweb_val_bytes_000000.bin" in manifest["files"]


def test_only_the_training_shards_asked_for_are_fetched(hub: Hub, tmp_path: Path):
    assert run(tmp_path / "out", "--shards", 1) == 0
    assert set(files_in(hub.folder)) - set(files_in(tmp_path / "out")) == {
        f"{DATASET}/fineweb_train_000001.bin"
    }


def test_a_later_call_with_fewer_shards_keeps_and_checks_all(hub: Hub, tmp_path: Path):
    assert run(tmp_path / "out", "--shards", 2) == 0
    (tmp_path / "out" / DATASET / "fineweb_train_000001.bin").write_bytes(b"damaged")
    assert run(tmp_path / "out", "--shards", 1) == 0
    assert files_in(tmp_path / "out") == files_in(hub.folder)
    manifest = json.loads((tmp_path / "out" / DATASET / "manifest.json").read_bytes())
    assert manifest["train"]["shards"] == 2


def test_no_token_of_the_user_is_sent(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen: list[str | None] = []
    do_get = Handler.do_GET

    def watch(self: Handler) -> None:
        seen.append(self.headers.get("Authorization"))
        do_get(self)

    monkeypatch.setattr(Handler, "do_GET", watch)
    assert run(tmp_path / "out", "--shards", 0) == 0
    assert seen and set(seen) == {None}


# --- Broken, changed and missing files -----------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("breaks", [[3000, 4000], [500], [0, 0, 9000]])
def test_a_broken_connection_is_taken_up_again(
    hub: Hub, tmp_path: Path, ranges: bool, breaks: list[int]
):
    hub.ranges, hub.break_after = ranges, list(breaks)
    assert run(tmp_path / "out", "--shards", 0) == 0
    whole = (hub.folder / VAL).read_bytes()
    assert files_in(tmp_path / "out")[VAL] == whole
    asked = [request.partition("@")[2] for request in hub.requests if VAL in request]
    resumed = [f"{sum(breaks[: n + 1])}-" for n in range(len(breaks)) if sum(breaks[: n + 1])]
    if ranges:
        assert [span for span in asked if span] == resumed


def test_a_connection_that_brings_nothing_ends_with_a_message(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hub.break_after = [2000, *[0] * 20]
    assert run(tmp_path / "out", "--shards", 1) == 1
    assert "the same command continues from here" in error_line(capsys)
    assert list(files_in(tmp_path / "out")) == [MODEL]  # no partial file stays
    hub.break_after = []
    assert run(tmp_path / "out", "--shards", 2) == 0
    assert files_in(tmp_path / "out") == files_in(hub.folder)


@pytest.mark.parametrize("kind", ["other text", "short", "long", "one bit"])
@pytest.mark.parametrize("name", [VAL, SHARD, MODEL])
def test_content_that_is_not_the_published_one_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str
):
    whole = (hub.folder / name).read_bytes()
    other = whole[:1100] + bytes(len(whole) - 1100)
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    contents = {"other text": other, "short": whole[:-2], "long": whole + b"xx"}
    hub.replaced[name] = contents.get(kind, flipped)
    assert run(tmp_path / "out", "--shards", 1) == 1
    error_line(capsys)
    assert not (tmp_path / "out" / name).exists()
    hub.replaced.clear()
    assert run(tmp_path / "out", "--shards", 2) == 0
    assert files_in(tmp_path / "out") == files_in(hub.folder)


@pytest.mark.parametrize("moment", [1500, 4000, 9000])
def test_a_file_that_changes_during_the_transfer_is_never_mixed(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], moment: int
):
    """The connection breaks, the server's file is replaced, and the rest comes from the new one."""
    content = Hub.content

    def changing(self: Hub, name: str) -> bytes:
        whole = content(self, name)
        if name == VAL and "@" in self.requests[-1]:
            return whole[:1024] + bytes([9, 0]) * 5000
        return whole

    hub.break_after = [moment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hub, "content", changing)
        assert run(tmp_path / "out", "--shards", 0) == 1
    assert "has digest" in error_line(capsys)
    assert not (tmp_path / "out" / VAL).exists()


def test_a_new_commit_replaces_all_files_that_changed(hub: Hub, tmp_path: Path):
    assert run(tmp_path / "out", "--shards", 2) == 0
    hub.commit = "b" * 40
    write_shard(hub.folder / SHARD, 5 + np.arange(5000) % 100)
    hub.requests.clear()
    assert run(tmp_path / "out", "--shards", 1) == 0
    assert hub.fetched() == [SHARD]
    assert files_in(tmp_path / "out") == files_in(hub.folder)
    manifest = json.loads((tmp_path / "out" / DATASET / "manifest.json").read_bytes())
    assert manifest["source"]["commit"] == hub.commit


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\0" * 11_024])
def test_a_file_that_was_damaged_here_is_fetched_again(hub: Hub, tmp_path: Path, content: bytes):
    assert run(tmp_path / "out", "--shards", 2) == 0
    for name in (SHARD, MODEL):
        (tmp_path / "out" / name).write_bytes(content)
    assert run(tmp_path / "out", "--shards", 2) == 0
    assert files_in(tmp_path / "out") == files_in(hub.folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [(VAL, b"not a shard"), (SHARD, bytes(11_024)), (MODEL, b"not a model")],
)
def test_a_published_file_of_another_kind_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
):
    (hub.folder / name).write_bytes(content)
    assert run(tmp_path / "out", "--shards", 1) == 1
    assert f"{name} is published, but is not usable: " in error_line(capsys)
    assert not (tmp_path / "out" / name).exists()


def test_missing_files_are_named_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path / "out", "--shards", 30) == 2
    message = error_line(capsys)
    assert "fineweb_train_000002.bin" in message and "it has 2 of the training shards" in message
    for name in (VAL, MODEL):
        content = (hub.folder / name).read_bytes()
        (hub.folder / name).unlink()
        assert run(tmp_path / "out", "--shards", 1) == 1
        message = error_line(capsys)
        assert f"does not publish {name}" in message and "--shards" not in message
        (hub.folder / name).write_bytes(content)
    assert hub.fetched() == [] and not (tmp_path / "out").exists()


# --- Hostile or wrong answers --------------------------------------------------------------------


@pytest.mark.parametrize("name", [VAL, SHARD, MODEL])
def test_a_body_that_never_ends_is_stopped(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    hub.endless = name
    assert run(tmp_path / "out", "--shards", 1) == 1
    assert "more bytes arrive than the published" in error_line(capsys)
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("size", [0, -5, 2**60])
def test_an_impossible_size_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
):
    hub.listing[VAL] = {"lfs": {"sha256": "0" * 64, "size": size, "pointerSize": 1}}
    assert run(tmp_path / "out", "--shards", 0) == 1
    assert f"is listed with {size:,} bytes" in error_line(capsys)


def test_a_download_that_does_not_fit_on_the_disk_is_refused_at_once(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(tmp_path / "out", "--shards", 2) == 2
    message = error_line(capsys)
    assert "are to be downloaded, 10,000 are free" in message and hub.fetched() == []


@pytest.mark.parametrize(
    "location",
    ["ftp://127.0.0.1/x", "http://example.org/x", "file:///etc/passwd", "http://10.0.0.1/x"],
)
def test_a_redirect_to_another_kind_of_address_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], location: str
):
    hub.location = location
    assert run(tmp_path / "out", "--shards", 0) == 1
    message = error_line(capsys)
    assert f"redirects to {location.removeprefix('file://')}, which is not https" in message
    assert files_in(tmp_path / "out", with_manifest=True) == {}


@pytest.mark.parametrize(
    "answer",
    [b"not JSON", b"[]", b"{}", b"null", b'{"id": "x", "sha": "main", "siblings": []}',
     b'{"id": "x", "siblings": [{"rfilename": "y", "lfs": {}}]}', b"[" * 100_000],
)  # fmt: skip
def test_an_answer_that_is_not_the_hubs_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: bytes
):
    hub.listing_answer = answer
    assert run(tmp_path / "out", "--shards", 0) == 1
    assert hub.url in error_line(capsys)


def test_a_listing_of_any_length_is_bounded(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(download, "MAX_LISTING_BYTES", 1000)
    hub.listing_answer = b" " * 2000
    assert run(tmp_path / "out", "--shards", 0) == 1
    assert "list of files exceeds 1000 bytes" in error_line(capsys)


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_a_server_that_refuses_is_named(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
):
    hub.status = status
    assert run(tmp_path / "out", "--shards", 0) == 1
    assert str(status) in error_line(capsys)


@pytest.mark.parametrize(
    "endpoint",
    ["mirror.example", "/tmp/x", "file:///tmp/x", "http://example.org", "ftp://x", "", "http://["],
)
def test_an_endpoint_that_is_no_https_address_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert run(tmp_path / "out") == 2
    assert f"HF_ENDPOINT={endpoint.rstrip('/')} must be an address" in error_line(capsys)


def test_the_removed_option_names_its_replacement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for value in ("http://127.0.0.1", "/tmp/folder", "mirror.example"):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, "--base-url", value)
        assert "set HF_ENDPOINT" in capsys.readouterr().err


# --- Files of others, links, locks ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["fineweb_train_000000 (1).bin", "corpus_val_000000.bin", "fineweb_val_bytes_000000.bin"],
)
def test_a_shard_of_another_data_set_in_the_folder_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    stray = tmp_path / "out" / DATASET / name
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"precious")
    assert run(tmp_path / "out", "--shards", 1) == 2
    assert f"{stray} is not part of the published data set" in error_line(capsys)
    assert stray.read_bytes() == b"precious" and hub.requests == []


@pytest.mark.parametrize("content", [b"{}", b"not JSON", b'{"arguments": {}, "files": {}}'])
def test_a_manifest_of_others_is_not_replaced(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
):
    path = tmp_path / "out" / DATASET / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert run(tmp_path / "out", "--shards", 1) == 2
    assert "was not written by this script" in error_line(capsys)
    assert path.read_bytes() == content


@pytest.mark.parametrize("place", [SHARD, MODEL, f"{DATASET}/{download.STAGING}"])
def test_nothing_is_written_through_a_link(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
):
    target, link = tmp_path / "precious", tmp_path / "out" / place
    link.parent.mkdir(parents=True)
    if place.endswith(download.STAGING):
        target.mkdir()
        (target / "kept").write_bytes(b"precious")
        link.symlink_to(target)
        assert run(tmp_path / "out", "--shards", 1) == 2
        assert f"{link} is not a folder" in error_line(capsys)
        assert (target / "kept").read_bytes() == b"precious"
        return
    target.write_bytes(b"precious")
    link.symlink_to(target)
    assert run(tmp_path / "out", "--shards", 2) == 0
    assert target.read_bytes() == b"precious" and not link.is_symlink()
    assert files_in(tmp_path / "out") == files_in(hub.folder)


def test_a_link_to_a_whole_file_is_kept(hub: Hub, tmp_path: Path):
    link = tmp_path / "out" / SHARD
    link.parent.mkdir(parents=True)
    link.symlink_to(hub.folder / SHARD)
    assert run(tmp_path / "out", "--shards", 1) == 0
    assert link.is_symlink() and SHARD not in hub.fetched()


def test_what_a_killed_call_left_is_removed_and_files_of_others_are_not(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    staging = tmp_path / "out" / DATASET / download.STAGING
    (staging / ".cache").mkdir(parents=True)
    (staging / "datasets").mkdir()
    (staging / "datasets/part.incomplete").write_bytes(b"left by a kill")
    assert run(tmp_path / "out", "--shards", 0) == 0
    assert not staging.exists()
    staging.mkdir()
    (staging / "notes.txt").write_bytes(b"precious")
    assert run(tmp_path / "out", "--shards", 0) == 2
    assert "was not made by this script" in error_line(capsys)
    assert (staging / "notes.txt").read_bytes() == b"precious"


def test_a_fifo_in_place_of_a_file_is_replaced_and_does_not_hang(hub: Hub, tmp_path: Path):
    for name in (SHARD, MODEL):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / "out" / name)
    assert run(tmp_path / "out", "--shards", 2) == 0
    assert files_in(tmp_path / "out") == files_in(hub.folder)


def test_a_second_call_names_the_process_that_holds_the_folder(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "out" / DATASET
    folder.mkdir(parents=True)
    with files.lock_folder(folder):
        assert run(tmp_path / "out", "--shards", 0) == 2
    assert f"is in use by process {os.getpid()} on " in error_line(capsys)


# --- Without a network ---------------------------------------------------------------------------


def test_without_a_network_there_is_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert run(tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: http://127.0.0.1:1 cannot be reached (")
    assert "this machine does not have all files" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def go_offline(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "unreachable"])
def test_without_a_network_a_complete_data_set_is_checked_and_kept(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
):
    assert run(tmp_path / "out", "--shards", 1) == 0
    before = files_in(tmp_path / "out", with_manifest=True)
    go_offline(monkeypatch, how)
    assert run(tmp_path / "out", "--shards", 1) == 0
    assert files_in(tmp_path / "out", with_manifest=True) == before
    assert run(tmp_path / "out", "--shards", 2) == 1  # one shard more than there is
    (tmp_path / "out" / SHARD).write_bytes(b"damaged")
    assert run(tmp_path / "out", "--shards", 1) == 1
    assert "fineweb_train_000000.bin is missing or damaged" in error_line(capsys)


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "unreachable"])
def test_without_a_network_the_hubs_cache_is_used_and_checked(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
):
    huggingface_hub.set_client_factory(lambda: download.make_client(hub.url))
    for name in (MODEL, VAL, SHARD):
        huggingface_hub.hf_hub_download(
            VARIANT.repo,
            f"datasets/{name}",
            repo_type="dataset",
            revision=hub.commit,
            endpoint=hub.url,
            cache_dir=tmp_path / "cache",
        )
    folder = tmp_path / "cache" / f"datasets--{VARIANT.repo.replace('/', '--')}"
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(hub.commit)
    go_offline(monkeypatch, how)
    assert run(tmp_path / "out", "--shards", 1) == 0
    assert files_in(tmp_path / "out")[SHARD] == (hub.folder / SHARD).read_bytes()
    assert run(tmp_path / "out", "--shards", 2) == 1  # the cache has one training shard
    shard = next(path for path in (folder / "blobs").iterdir() if path.stat().st_size > 9000)
    shard.write_bytes(bytes(shard.stat().st_size))
    assert run(tmp_path / "two", "--shards", 1) == 1
    assert "has digest" in error_line(capsys)


# --- Names ---------------------------------------------------------------------------------------


def test_every_variant_names_its_files_as_the_training_script_expects_them():
    for name, variant in download.VARIANTS.items():
        wanted = download.wanted_files(variant, 2)
        assert re.match(r"tokenizers/fineweb_\d+_bpe.*\.model$", wanted[0])
        assert wanted[-1] == f"datasets/{variant.dataset}/fineweb_train_000001.bin"
        assert wanted[1] == f"datasets/{variant.dataset}/fineweb_val_000000.bin"
        assert any("val_bytes" in file for file in wanted) == (name == "sp8192-caseops")


def test_a_downloaded_folder_is_no_place_for_other_data(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path / "out", "--shards", 1) == 0
    before = files_in(tmp_path / "out", with_manifest=True)
    text = tmp_path / "text.txt"
    text.write_text("some words\n\n" * 100)
    for extra in ([], ["--force"]):
        words = ["--out", str(tmp_path / "out" / DATASET), "--input", str(text), *extra]
        assert prepare.main(words) == 2
        assert "was not written by data/prepare.py" in error_line(capsys)
    assert files_in(tmp_path / "out", with_manifest=True) == before
    assert len(read_shard(tmp_path / "out" / SHARD)) == 5000
