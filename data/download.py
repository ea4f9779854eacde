"""Fetch a published FineWeb data set: tokenizer, validation shard and the first training shards.

    python data/download.py --variant sp1024 --shards 10  # sp8192, 80 shards (16 GB) if not said

The result is data/datasets/<name>/ and data/tokenizers/, as train_gpt.py expects. Files arrive
under a temporary name and are checked before they get their own; an interrupted download goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.prepare import load_processor  # noqa: E402  (the path above makes the import possible)
from train_gpt import InputError, read_shard, sync_folder  # noqa: E402

HUB = "https://huggingface.co/datasets/{repo}/resolve/main/datasets"
TIMEOUT_S = 60


class Variant(NamedTuple):
    repo: str
    dataset: str
    tokenizer: str
    has_sidecar: bool = False  # byte counts for a tokenizer that does not spell the original


CASEOPS = "lossless_caps_caseops_v1_reserved"
VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", "fineweb10B_sp1024", "fineweb_1024_bpe"),
    "sp4096": Variant("kevclark/parameter-golf", "fineweb10B_sp4096", "fineweb_4096_bpe"),
    "sp8192": Variant("kevclark/parameter-golf", "fineweb10B_sp8192", "fineweb_8192_bpe"),
    "sp8192-caseops": Variant(
        "romeerp/parameter-golf-caseops-v1",
        f"fineweb10B_sp8192_{CASEOPS}",
        f"fineweb_8192_bpe_{CASEOPS}",
        has_sidecar=True,
    ),
}


def list_files(variant: Variant, num_shards: int) -> Iterator[str]:
    """Paths of the files to fetch, the same in the published repository and here."""
    yield f"tokenizers/{variant.tokenizer}.model"
    parts = ["val_000000", *(["val_bytes_000000"] if variant.has_sidecar else [])]
    for part in [*parts, *(f"train_{index:06d}" for index in range(num_shards))]:
        yield f"datasets/{variant.dataset}/fineweb_{part}.bin"


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path` unless it is there and whole, going on with what arrived before."""
    check: Callable[[Path], object] = read_shard if path.suffix == ".bin" else load_processor
    with contextlib.suppress(InputError, FileNotFoundError):
        check(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    furthest = part.stat().st_size
    while True:  # a broken connection is taken up again as long as it brings something
        try:
            append_rest(url, part)
            break
        except (OSError, http.client.HTTPException):
            if part.stat().st_size <= furthest:
                raise
            furthest = part.stat().st_size
    try:
        check(part)
    except InputError as error:
        part.unlink()
        raise InputError(f"{url}: what came is not what it should be ({error})") from None
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def append_rest(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`; OSError or HTTPException if the rest breaks off."""
    start = part.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing lies beyond what is here
            return
        raise
    with response, part.open("ab") as file:
        found = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != start:  # the server sends all of it
            file.truncate(start := 0)
        num_bytes = int(found[2] if found else response.headers.get("Content-Length", 0))
        with tqdm(total=num_bytes, initial=start, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    if (missing := num_bytes - part.stat().st_size) > 0:
        raise http.client.HTTPException(f"the connection broke, {missing} bytes are missing")


def explain(url: str, error: Exception) -> str:
    """An error of the data, the server, the connection or the disk, and what to do about it."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, urllib.error.HTTPError):
        return f"{url}: {error}; the server is there, but does not give this file"
    remedy = "with a network, and room on the disk, the same command goes on where this one stopped"
    return f"{url}: {error}; {remedy}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Fetch a published FineWeb data set.")
    parser.add_argument("--variant", choices=VARIANTS, default="sp8192", help="default: sp8192")
    parser.add_argument("--shards", type=int, default=80, help="training shards, default: 80")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: data/")
    parser.add_argument("--base-url", help="a mirror that holds datasets/ and tokenizers/")
    options = parser.parse_args(argv)
    if options.shards < 0:
        parser.error(f"--shards {options.shards} is negative")
    variant = VARIANTS[options.variant]
    base = (options.base_url or HUB.format(repo=variant.repo)).rstrip("/")
    names = list(list_files(variant, options.shards))
    for number, name in enumerate(names, start=1):
        print(f"{number}/{len(names)} {name}", flush=True)
        try:
            fetch(f"{base}/{name}", options.out / name)
        except (InputError, OSError, http.client.HTTPException) as error:
            print(f"error: {explain(f'{base}/{name}', error)}", file=sys.stderr)
            return 1
    print(f"complete: {options.out / 'datasets' / variant.dataset}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
