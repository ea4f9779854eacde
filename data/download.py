"""Download a published FineWeb data set: tokenizer, validation shard and the first training shards.

    python data/download.py --variant sp1024 --shards 10  # default: sp8192, 80 shards (16 GB)

The files come from a repository on the Hugging Face Hub, all from one commit. Each is compared with
the size and SHA-256 that the Hub lists before it gets its name. The result is data/datasets/<name>/
with a manifest, and data/tokenizers/, as train_gpt.py expects. The same command continues after an
interruption: files that are whole are kept.

HF_ENDPOINT names a mirror of the Hub. Without a network (or with HF_HUB_OFFLINE=1) the files are
taken from the Hub's cache, if it has them.

Sections: 1. What is published  2. The connection  3. Files on this machine  4. The download
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoSibling
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.case_markers import PUBLISHED_NAME  # noqa: E402  (the path above makes it possible)
from data.files import (  # noqa: E402
    MANIFEST,
    MANIFEST_FORMAT,
    Progress,
    hash_file,
    lock_folder,
    make_output_safe,
    open_regular,
    read_small,
    show_progress,
)
from data.prepare import MAX_TOKENIZER_BYTES, is_lossless, parse_tokenizer  # noqa: E402
from train_gpt import (  # noqa: E402
    BOS_ID,
    SHARD_HEADER_BYTES,
    InputError,
    read_shard,
    sync_folder,
    write_atomic,
)

DEFAULT_ENDPOINT = "https://huggingface.co"
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
REPOSITORY_ROOT = "datasets/"  # the published repositories hold everything below this folder
STAGING = ".download"  # inside the data set's folder; each file arrives here
TIMEOUT_S = 60
MAX_LISTING_BYTES = 1 << 26
MAX_SHARD_BYTES = SHARD_HEADER_BYTES + 2 * (2**31 - 1)


class DownloadFailed(RuntimeError):
    """The server, the network or the published files are at fault, not the command."""


FAILURES = (DownloadFailed, OSError, httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL)
NO_NETWORK = (httpx2.TransportError, OfflineModeIsEnabled)


class Variant(NamedTuple):
    repo: str
    dataset: str
    tokenizer: str
    has_sidecar: bool = False  # byte counts, for tokens that do not keep the original text
    transform: str | None = None  # of data/case_markers.py, which the text went through


CASEOPS = f"{PUBLISHED_NAME}_reserved"
VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe"),
    "sp4096": Variant("kevclark/parameter-golf", "fineweb10B_sp4096", "fineweb_4096_bpe"),
    "sp8192": Variant("kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe"),
    "sp8192-caseops": Variant(
        "romeerp/parameter-golf-caseops-v1",
        f"fineweb10B_sp8192_{CASEOPS}",
        f"fineweb_8192_bpe_{CASEOPS}",
        has_sidecar=True,
        transform=PUBLISHED_NAME,
    ),
}


# --- 1. What is published ------------------------------------------------------------------------


class RemoteFile(NamedTuple):
    """Size and digest of a published file: SHA-256 (64 hex digits), or git's blob id (40)."""

    size: int
    digest: str


class Snapshot(NamedTuple):
    """One commit of a repository: its files by their names here, and how to get one of them.

    `fetch` takes a file's name and a folder, and returns the path of the file in that folder.
    """

    repo: str
    commit: str
    files: dict[str, RemoteFile]
    fetch: Callable[[str, Path], Path]


def open_hub(repo: str, endpoint: str) -> Snapshot:
    """The newest commit of a data set repository on the Hub."""
    api = huggingface_hub.HfApi(endpoint=endpoint, token=False)
    try:
        info = api.dataset_info(repo, files_metadata=True, timeout=TIMEOUT_S)
        listed = {item.rfilename: describe(item) for item in info.siblings or []}
    except FAILURES:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DownloadFailed(
            f"{endpoint} does not answer like the Hugging Face Hub ({first_line(error)}); set "
            "HF_ENDPOINT to the address of the Hub or of a mirror of it"
        ) from None
    commit = str(info.sha)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise DownloadFailed(f"{endpoint} gives {commit!r} as the commit of {repo}, not a hash")

    files = below_root(listed)
    fetch = functools.partial(fetch_from_hub, repo=repo, commit=commit, endpoint=endpoint)
    return Snapshot(repo, commit, files, lambda name, folder: fetch(name, files[name], folder))


def fetch_from_hub(
    name: str, remote: RemoteFile, folder: Path, *, repo: str, commit: str, endpoint: str
) -> Path:
    """Download one file into `folder`; its path there."""
    path = huggingface_hub.hf_hub_download(
        repo,
        REPOSITORY_ROOT + name,
        repo_type="dataset",
        revision=commit,
        local_dir=folder,
        endpoint=endpoint,
        token=False,
        tqdm_class=bounded_bar(name, remote.size),
    )
    return Path(path)


def describe(sibling: RepoSibling) -> RemoteFile:
    """The entry of one file in the Hub's listing."""
    if sibling.lfs is not None:
        return RemoteFile(int(sibling.lfs.size), str(sibling.lfs.sha256))
    return RemoteFile(int(sibling.size or 0), str(sibling.blob_id))


def open_cache(variant: Variant) -> Snapshot | None:
    """The commit of a variant's repository that the Hub's cache on this machine holds, if any.

    The cache stores each file under its digest, so it can be checked without a network.
    """
    tokenizer = REPOSITORY_ROOT + tokenizer_name(variant)
    path = huggingface_hub.try_to_load_from_cache(variant.repo, tokenizer, repo_type="dataset")
    if not isinstance(path, str):
        return None
    root = Path(path.removesuffix(tokenizer))
    cached: dict[str, RemoteFile] = {}
    for file in root.rglob("*"):
        digest = file.resolve().name
        if file.is_file() and re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", digest):
            cached[file.relative_to(root).as_posix()] = RemoteFile(file.stat().st_size, digest)

    def fetch(name: str, folder: Path) -> Path:
        target = folder / REPOSITORY_ROOT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / REPOSITORY_ROOT / name, target)
        return target

    return Snapshot(variant.repo, root.name, below_root(cached), fetch)


def open_installed(variant: Variant, out: Path) -> Snapshot | None:
    """What an earlier call downloaded to `out`, by its manifest, if any."""
    folder = dataset_folder(variant, out)
    manifest = read_own_manifest(folder)
    if manifest is None:
        return None
    files = {
        f"datasets/{variant.dataset}/{name}": RemoteFile(entry["bytes"], entry["sha256"])
        for name, entry in manifest["files"].items()
    }
    tokenizer = out / tokenizer_name(variant)
    if tokenizer.is_file():
        size = tokenizer.stat().st_size
        files[tokenizer_name(variant)] = RemoteFile(size, manifest["tokenizer"]["sha256"])

    def fetch(name: str, folder: Path) -> Path:
        raise DownloadFailed(f"{out / name} is missing or damaged")

    return Snapshot(variant.repo, manifest["source"]["commit"], files, fetch)


def below_root(files: dict[str, RemoteFile]) -> dict[str, RemoteFile]:
    """The files of a repository by their names here."""
    return {
        name.removeprefix(REPOSITORY_ROOT): file
        for name, file in files.items()
        if name.startswith(REPOSITORY_ROOT)
    }


def open_snapshot(variant: Variant, out: Path, num_shards: int, endpoint: str) -> Snapshot:
    """The files to fetch: from the Hub, or without a network from what this machine has."""
    try:
        return open_hub(variant.repo, endpoint)
    except NO_NETWORK as error:
        reason = f"{endpoint} cannot be reached ({first_line(error)})"
    for snapshot in (open_installed(variant, out), open_cache(variant)):
        if snapshot and set(wanted_files(variant, num_shards)) <= set(snapshot.files):
            print(f"{reason}; using commit {snapshot.commit[:12]}, which this machine has")
            return snapshot
    raise DownloadFailed(f"{reason}, and this machine does not have all files; try again")


# --- 2. The connection ---------------------------------------------------------------------------


def read_endpoint() -> str:
    """The Hub's address, from HF_ENDPOINT if it is set; InputError if it is not usable."""
    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
    if not is_safe_url(endpoint, allow_loopback=True):
        raise InputError(
            f"HF_ENDPOINT={endpoint} must be an address that begins with https:// "
            "(http:// for this machine only); unset it to use the Hugging Face Hub"
        )
    return endpoint


def is_safe_url(url: str, *, allow_loopback: bool) -> bool:
    """Whether `url` is an https address, or an http address of this machine if that is allowed."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    is_loopback = allow_loopback and parts.scheme == "http" and host in LOOPBACK
    return bool(host) and (parts.scheme == "https" or is_loopback)


class LimitedStream(httpx2.SyncByteStream):
    """The body of an answer; DownloadFailed when it is longer than `max_bytes`."""

    def __init__(self, stream: httpx2.SyncByteStream, max_bytes: int):
        self.stream = stream
        self.max_bytes = max_bytes

    def __iter__(self) -> Iterator[bytes]:
        num_bytes = 0
        for chunk in self.stream:
            num_bytes += len(chunk)
            if num_bytes > self.max_bytes:
                raise DownloadFailed(f"the server's list of files exceeds {self.max_bytes} bytes")
            yield chunk

    def close(self) -> None:
        self.stream.close()


def make_client(endpoint: str) -> httpx2.Client:
    """The HTTP client that huggingface_hub uses: no address that is not https is ever visited."""
    allow_loopback = is_safe_url(endpoint, allow_loopback=True) and endpoint.startswith("http:")

    def check_request(request: httpx2.Request) -> None:  # redirects come here, too
        if huggingface_hub.is_offline_mode():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        if not is_safe_url(str(request.url), allow_loopback=allow_loopback):
            raise DownloadFailed(f"the server redirects to {request.url}, which is not https")

    def limit_listing(response: httpx2.Response) -> None:
        if "/api/" in response.url.path and isinstance(response.stream, httpx2.SyncByteStream):
            response.stream = LimitedStream(response.stream, MAX_LISTING_BYTES)

    hooks: dict[str, list[Callable[..., Any]]] = {
        "request": [check_request],
        "response": [limit_listing],
    }
    return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT_S)


def bounded_bar(name: str, size: int) -> type[tqdm]:
    """A progress bar class for huggingface_hub that ends a download which does not end.

    The limit leaves room for retries, of which only some count backwards.
    """
    max_bytes = 2 * size + (1 << 26)

    class Bar(tqdm):  # type: ignore[misc]
        """Counts what arrives."""

        received = 0

        def __init__(self, **settings: Any):
            super().__init__(**{**settings, "desc": Path(name).name, "disable": None})

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > max_bytes:
                raise DownloadFailed(f"{name}: more bytes arrive than the published {size:,}")
            return super().update(n)

    return Bar


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# --- 3. Files on this machine --------------------------------------------------------------------


def dataset_folder(variant: Variant, out: Path) -> Path:
    """The folder that DATA_PATH names."""
    return out / "datasets" / variant.dataset


def tokenizer_name(variant: Variant) -> str:
    """The tokenizer's file, in the repository (below its root) and here."""
    return f"tokenizers/{variant.tokenizer}.model"


def wanted_files(variant: Variant, num_shards: int) -> list[str]:
    """Names of the files to fetch, in the repository (below its root) and here."""
    parts = ["val_000000", *(["val_bytes_000000"] if variant.has_sidecar else [])]
    parts += [f"train_{index:06d}" for index in range(num_shards)]
    shards = [f"datasets/{variant.dataset}/fineweb_{part}.bin" for part in parts]
    return [tokenizer_name(variant), *shards]


def count_present(folder: Path) -> int:
    """Number of training shards up to the last one in `folder`, so that a call keeps them all."""
    found = [re.fullmatch(r"fineweb_train_(\d{6})\.bin", path.name) for path in list_files(folder)]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def list_files(folder: Path) -> list[Path]:
    """The files in `folder`; none if it does not exist."""
    return list(folder.iterdir()) if folder.is_dir() else []


def check_folder(variant: Variant, out: Path, wanted: list[str]) -> None:
    """Raise InputError if the data set's folder holds shards that are not part of the data set."""
    folder = dataset_folder(variant, out)
    read_own_manifest(folder)
    for path in list_files(folder):
        is_shard = re.fullmatch(r".*_(train|val|val_bytes)_[0-9].*\.bin", path.name)
        if is_shard and f"datasets/{variant.dataset}/{path.name}" not in wanted:
            raise InputError(
                f"{path} is not part of the published data set; move it, or give another --out"
            )


def read_own_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest that an earlier call wrote, None if there is none; InputError for another."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        manifest: dict[str, Any] = json.loads(read_small(path, 1 << 28))
        entries = manifest["files"].values()
        texts = [manifest["source"]["commit"], manifest["tokenizer"]["sha256"]]
        texts += [entry["sha256"] for entry in entries]
        sizes = [entry["bytes"] for entry in entries]
        if all(isinstance(t, str) for t in texts) and all(isinstance(n, int) for n in sizes):
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # refused below
    raise InputError(f"{path} was not written by this script; move it, or give another --out")


def is_whole(path: Path, remote: RemoteFile, bar: Progress | None = None) -> bool:
    """Whether a file has the published size and digest."""
    try:
        has_size = path.is_file() and path.stat().st_size == remote.size
        return has_size and digest_file(path, remote, bar) == remote.digest
    except FileNotFoundError:
        return False


def digest_file(path: Path, remote: RemoteFile, bar: Progress | None = None) -> str:
    """The digest of a file of the kind that the Hub lists for it."""
    if len(remote.digest) == 64:
        return hash_file(path, bar)
    content = read_small(path, MAX_TOKENIZER_BYTES)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_content(path: Path, name: str) -> None:
    """Raise InputError if a file is not a whole shard, or not a usable tokenizer."""
    if name.endswith(".bin"):
        read_shard(path)
    else:
        parse_tokenizer(read_small(path, MAX_TOKENIZER_BYTES), name)


def check_file_sizes(snapshot: Snapshot, wanted: list[str], out: Path) -> None:
    """Raise an error if a wanted file is not published, too large, or does not fit on the disk."""
    if missing := [name for name in wanted if name not in snapshot.files]:
        num_train = sum("_train_" in name for name in wanted) - sum(
            "_train_" in name for name in missing
        )
        if "_train_" not in missing[0]:
            raise DownloadFailed(f"{snapshot.repo} does not publish {missing[0]}")
        raise InputError(
            f"{snapshot.repo} does not publish {missing[0]}; it has {num_train} of the training "
            "shards asked for: lower --shards (local shards of higher numbers are asked for, too)"
        )
    for name in wanted:
        limit = MAX_SHARD_BYTES if name.endswith(".bin") else MAX_TOKENIZER_BYTES
        if not 0 < (size := snapshot.files[name].size) <= limit:
            raise DownloadFailed(f"{name} is listed with {size:,} bytes, from 1 to {limit:,} fit")
    num_bytes = sum(snapshot.files[name].size for name in wanted if not (out / name).exists())
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if num_bytes > (free := shutil.disk_usage(existing).free):
        raise InputError(
            f"{out}: {num_bytes:,} bytes are to be downloaded, {free:,} are free; make room, "
            "lower --shards or give another --out"
        )


# --- 4. The download -----------------------------------------------------------------------------


def open_staging(folder: Path) -> Path:
    """An empty folder for files that arrive; what a killed call left there is removed."""
    staging = folder / STAGING
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        raise InputError(f"{staging} is not a folder; move or remove it")
    if staging.is_dir():
        if others := set(os.listdir(staging)) - {".cache", "datasets"}:
            raise InputError(f"{staging / min(others)} was not made by this script; move it")
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def install(snapshot: Snapshot, name: str, out: Path, staging: Path) -> None:
    """Fetch one file, check it, and give it its name."""
    remote = snapshot.files[name]
    arrived = snapshot.fetch(name, staging)
    if not is_whole(arrived, remote):
        digest = digest_file(arrived, remote)
        arrived.unlink()
        raise DownloadFailed(
            f"{name}: what arrived has digest {digest[:12]}..., published is "
            f"{remote.digest[:12]}... with {remote.size:,} bytes; the same command tries again"
        )
    try:
        check_content(arrived, name)
    except InputError as error:
        raise DownloadFailed(f"{name} is published, but is not usable: {error}") from None
    target = out / name
    if name.endswith(".bin"):  # in the folder that holds the staging folder
        with open_regular(arrived) as file:
            os.fsync(file.fileno())
        os.replace(arrived, target)
        sync_folder(target.parent)
    else:
        write_atomic(target, read_small(arrived, MAX_TOKENIZER_BYTES))


def download(variant: Variant, out: Path, num_shards: int, endpoint: str) -> None:
    """Download a data set, keeping the files that are there and whole, and write its manifest."""
    folder = dataset_folder(variant, out)
    num_shards = max(num_shards, count_present(folder))
    wanted = wanted_files(variant, num_shards)
    check_folder(variant, out, wanted)
    snapshot = open_snapshot(variant, out, num_shards, endpoint)
    check_file_sizes(snapshot, wanted, out)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        num_bytes = sum(snapshot.files[name].size for name in wanted if (out / name).exists())
        with show_progress("checking", num_bytes) as bar:
            missing = [n for n in wanted if not is_whole(out / n, snapshot.files[n], bar)]
        staging = open_staging(folder)
        try:
            for number, name in enumerate(missing, start=1):
                print(f"{number}/{len(missing)} {name}", flush=True)
                install(snapshot, name, out, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        manifest = make_manifest(variant, snapshot, out, wanted)
        write_atomic(folder / MANIFEST, f"{json.dumps(manifest, indent=2)}\n".encode())
    print(f"complete: {folder} (commit {snapshot.commit[:12]} of {snapshot.repo})")


def make_manifest(
    variant: Variant, snapshot: Snapshot, out: Path, wanted: list[str]
) -> dict[str, Any]:
    """The manifest of a downloaded data set, in the format of data/prepare.py's."""
    folder, tokenizer = dataset_folder(variant, out), out / tokenizer_name(variant)
    model = read_small(tokenizer, MAX_TOKENIZER_BYTES)
    processor = parse_tokenizer(model, str(tokenizer))
    paths = [folder / Path(name).name for name in wanted if name.endswith(".bin")]
    splits: dict[str, dict[str, int | None]] = {}
    for split in ("train", "val"):
        shards = [read_shard(path) for path in paths if f"_{split}_0" in path.name]
        num_tokens = sum(map(len, shards))
        counts = {"tokens": num_tokens, "shards": len(shards)}
        splits[split] = {"documents": None, "text_bytes": None, **counts}  # None: unknown
    val = read_shard(folder / "fineweb_val_000000.bin")
    splits["val"]["documents"] = int(np.count_nonzero(val == BOS_ID))
    if variant.has_sidecar:
        sidecar = read_shard(folder / "fineweb_val_bytes_000000.bin")
        splits["val"]["text_bytes"] = int(sidecar.sum(dtype=np.int64))
    return {
        "format": MANIFEST_FORMAT,
        "name": variant.dataset,
        "source": {"repository": snapshot.repo, "commit": snapshot.commit},
        "transform": variant.transform,
        **splits,
        "tokenizer": {
            "file": f"../../{tokenizer_name(variant)}",
            "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": processor.get_piece_size(),
            "is_lossless": is_lossless(processor),
        },
        "files": {
            path.name: describe_file(path, snapshot.files[f"datasets/{folder.name}/{path.name}"])
            for path in paths
        },
    }


def describe_file(path: Path, remote: RemoteFile) -> dict[str, Any]:
    """The manifest's entry on a file that has just been compared with its published digest."""
    sha256 = remote.digest if len(remote.digest) == 64 else hash_file(path)
    return {"bytes": remote.size, "sha256": sha256}


def explain(error: BaseException) -> str:
    """An error of the server, the connection or the disk, and what to do about it."""
    again = "the same command continues from here"
    if isinstance(error, DownloadFailed):
        return str(error)
    if isinstance(error, HfHubHTTPError):
        return f"{first_line(error)}; the server is there, but does not give this file"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'disk'}: {error.strerror}; {again}"
    return f"{first_line(error)}; check the network, {again}"


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 and a message if it is not usable."""
    parser = argparse.ArgumentParser(
        description="Download a published FineWeb data set from the Hugging Face Hub.",
        epilog="Set HF_ENDPOINT to use a mirror of the Hub. data/README.md describes the files.",
    )
    parser.add_argument("--variant", choices=VARIANTS, default="sp8192", help="default: sp8192")
    parser.add_argument("--shards", type=int, default=80, help="training shards, default: 80")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: data/")
    parser.add_argument("--base-url", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.shards < 0:
        parser.error(f"--shards {options.shards} is negative")
    if options.base_url is not None:
        parser.error("--base-url was removed; set HF_ENDPOINT to the address of a Hub mirror")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 1 (failed), 2 (bad input) or 130 (Ctrl-C)."""
    make_output_safe()
    options = parse_options(argv)
    try:
        endpoint = read_endpoint()
        huggingface_hub.set_client_factory(functools.partial(make_client, endpoint))
        download(VARIANTS[options.variant], options.out, options.shards, endpoint)
    except KeyboardInterrupt:
        print(
            "interrupted; whole files stay, the same command continues from here", file=sys.stderr
        )
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
