"""Check a data set: are its files sound, and is validation text in the training data?

    python data/check.py data/mine

Prints a line for each check and a verdict. The exit status is 0 if all is well, 1 if there is a
problem, 2 if the folder cannot be read as a data set.

Files: one data set in the folder, shards numbered without gaps, headers, sizes and SHA-256 as the
manifest says.
Tokens: ids within the vocabulary, documents that begin with BOS, totals as the manifest says.
Bytes: the bytes that validation tokens stand for, from the sidecar or the tokenizer's pieces.
Overlap: validation documents that are in the training data, exactly or nearly. Every run of 16
tokens of a document (a shingle) is hashed. A near copy has at least half of its distinct shingles
in one training document. Of large validation texts only shingles whose hash is a multiple of a
power of two are used, which estimates the same shares (Broder, 1997).

Sections: 1. Files  2. Tokens  3. Bytes  4. Overlap
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import case_markers  # noqa: E402  (the path above makes the import possible)
from data.files import (  # noqa: E402
    MANIFEST,
    hash_file,
    make_output_safe,
    open_regular,
    show_progress,
)
from data.prepare import (  # noqa: E402
    TOKENIZER_FILE,
    Processor,
    decode_ids,
    is_lossless,
    load_processor,
    read_manifest,
)
from train_gpt import BOS_ID, ByteTable, InputError, read_shard  # noqa: E402

BLOCK_TOKENS = 1 << 18  # fits the CPU's cache
PARTS = ("train", "val", "val_bytes")
CHECK_REMEDY = "restore it, or remove it to check without sizes, hashes and totals"


class Report:
    """Prints the result of each check and counts the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def note(self, text: str) -> None:
        """Print something that is not a problem."""
        print(f"  {text}")

    def problem(self, text: str) -> None:
        """Print and count a problem."""
        print(f"  PROBLEM: {text}")
        self.problems.append(text)

    def compare(self, what: str, found: object, expected: object) -> None:
        """A problem if a value is not the one that the manifest gives; None there is unknown."""
        if expected is not None and found != expected:
            self.problem(f"{what}: {found}, but the manifest says {expected}")


class DataSet(NamedTuple):
    """A folder's shards by part, its manifest if there is one, and its tokenizer."""

    folder: Path
    shards: dict[str, list[Path]]
    manifest: dict[str, Any]
    processor: Processor

    def expected(self, split: str, key: str) -> Any:
        """A total from the manifest, or None if it is not known."""
        entry = self.manifest.get(split)
        return entry.get(key) if isinstance(entry, dict) else None


# --- 1. Files ------------------------------------------------------------------------------------


def open_data_set(folder: Path, tokenizer: Path | None, report: Report) -> DataSet:
    """Find the files of a data set; InputError if it has no validation shard or no tokenizer."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the shards")
    manifest = read_manifest(folder, ("files",), CHECK_REMEDY) or {}
    shards = find_shards(folder, report)
    if not shards["val"]:
        raise InputError(f"{folder} holds no validation shard (*_val_000000.bin)")
    processor = load_processor(find_tokenizer(folder, manifest, tokenizer))
    return DataSet(folder, shards, manifest, processor)


def find_shards(folder: Path, report: Report) -> dict[str, list[Path]]:
    """The shards of each part in order; reports what does not belong to one data set."""
    shards: dict[str, list[Path]] = {part: [] for part in PARTS}
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for path in sorted(folder.glob("*.bin")):
        match = re.fullmatch(r"(.+)_(train|val|val_bytes)_(\d{6})\.bin", path.name)
        if match:
            shards[match[2]].append(path)
            numbers[match[1], match[2]].append(int(match[3]))
        elif re.fullmatch(r".+_(train|val|val_bytes)_[0-9].*\.bin", path.name):
            report.problem(f"{path.name} has no name of a shard, but training would read it")
    if len(names := sorted({name for name, _ in numbers})) > 1:
        report.problem(f"shards of {len(names)} data sets are in one folder: {', '.join(names)}")
    for (name, part), found in numbers.items():
        if found != list(range(len(found))):
            missing = min(set(range(max(found) + 1)) - set(found))
            report.problem(f"{name}_{part}_{missing:06d}.bin is missing")
    return shards


def find_tokenizer(folder: Path, manifest: dict[str, Any], given: Path | None) -> Path:
    """The tokenizer's file: as given, else as the manifest says, else in the usual places."""
    tokenizers = folder.parent.parent / "tokenizers"
    candidates = [given] if given else [folder / TOKENIZER_FILE]
    entry = manifest.get("tokenizer")
    name = entry.get("file") if isinstance(entry, dict) else None
    if not given and isinstance(name, str):
        candidates.append(tokenizers / Path(name).name)
    if not given and (match := re.fullmatch(r".*_sp(\d+)(_.+)?", folder.resolve().name)):
        candidates.append(tokenizers / f"fineweb_{match[1]}_bpe{match[2] or ''}.model")
    for path in candidates:
        if os.path.lexists(path):
            return path
    raise InputError(f"no tokenizer at {' or '.join(map(str, candidates))}; give --tokenizer")


def check_files(data: DataSet, report: Report) -> bool:
    """Check headers, and names, sizes and SHA-256 against the manifest; False if one is damaged."""
    paths = [path for part in PARTS for path in data.shards[part]]
    is_sound = True
    for path in paths:
        try:
            open_regular(path).close()  # no FIFO, which could not be mapped
            read_shard(path)
        except (InputError, OSError) as error:
            report.problem(str(error))
            is_sound = False
    if not data.manifest:
        report.note(f"no {MANIFEST}: sizes, hashes and totals cannot be compared")
        return is_sound
    entries: dict[str, Any] = data.manifest["files"]
    for name in sorted({path.name for path in paths} - set(entries)):
        report.problem(f"{name} is not in the manifest")
    sizes = [path.stat().st_size for path in paths]
    with show_progress("hashing", sum(sizes)) as bar:
        for name, entry in entries.items():
            path = data.folder / Path(name).name
            if not path.is_file():
                report.problem(f"{name} is in the manifest, but not in the folder")
            elif not isinstance(entry, dict) or hash_file(path, bar) != entry.get("sha256"):
                report.problem(f"{name} has changed: its SHA-256 is not the manifest's")
    report.note(f"{len(entries)} files of the manifest compared by SHA-256")
    return is_sound


# --- 2. Tokens -----------------------------------------------------------------------------------


def read_blocks(paths: Sequence[Path], block_tokens: int = BLOCK_TOKENS) -> Iterator[np.ndarray]:
    """Token ids of all shards in blocks of whole documents, about `block_tokens` each.

    A document that continues in the next shard is put together.
    """
    held: list[np.ndarray] = []
    for ids in read_pieces(paths, block_tokens):
        starts = np.flatnonzero(ids == BOS_ID)
        if not len(starts) or (not held and starts[-1] == 0):
            held.append(ids)
            continue
        yield np.concatenate([*held, ids[: starts[-1]]])
        held = [ids[starts[-1] :]]
    if held:
        yield np.concatenate(held)


def read_pieces(paths: Sequence[Path], piece_tokens: int) -> Iterator[np.ndarray]:
    """Token ids of all shards in pieces of `piece_tokens`."""
    for path in paths:
        ids = read_shard(path)
        for first in range(0, len(ids), piece_tokens):
            yield np.array(ids[first : first + piece_tokens])


class TokenCounts(NamedTuple):
    """What the tokens of one split are."""

    num_tokens: int
    num_documents: int
    num_empty: int  # documents of BOS alone
    largest: int  # the largest id
    begins_with_bos: bool


def count_tokens(paths: Sequence[Path]) -> TokenCounts:
    """Count the tokens and documents of one split."""
    num_tokens = num_documents = num_empty = largest = 0
    begins_with_bos = True
    for block in read_blocks(paths):
        starts = np.flatnonzero(block == BOS_ID)
        if num_tokens == 0:
            begins_with_bos = bool(block[0] == BOS_ID)
        lengths = np.diff(starts, append=len(block))
        num_tokens += len(block)
        num_documents += len(starts)
        num_empty += int((lengths == 1).sum())
        largest = max(largest, int(block.max()))
    return TokenCounts(num_tokens, num_documents, num_empty, largest, begins_with_bos)


def check_tokens(data: DataSet, report: Report) -> None:
    """Check ids, document starts and totals of both splits."""
    vocab_size = data.processor.get_piece_size()
    for split in ("train", "val"):
        counts = count_tokens(data.shards[split])
        report.note(
            f"{split}: {counts.num_tokens:,} tokens in {counts.num_documents:,} documents and "
            f"{len(data.shards[split])} shard(s), largest id {counts.largest}"
        )
        if counts.largest >= vocab_size:
            report.problem(
                f"{split}: id {counts.largest}, but the tokenizer has {vocab_size} pieces: the "
                "shards belong to another tokenizer"
            )
        if counts.num_tokens and not counts.begins_with_bos:
            report.problem(f"{split}: the first document does not begin with BOS (id {BOS_ID})")
        if counts.num_empty:
            report.note(f"{split}: {counts.num_empty:,} documents are empty (BOS only)")
        report.compare(f"{split} tokens", counts.num_tokens, data.expected(split, "tokens"))
        report.compare(
            f"{split} documents", counts.num_documents, data.expected(split, "documents")
        )
        report.compare(f"{split} shards", len(data.shards[split]), data.expected(split, "shards"))


# --- 3. Bytes ------------------------------------------------------------------------------------


def count_piece_bytes(processor: Processor, ids: np.ndarray) -> np.ndarray:
    """Bytes that each token's piece stands for after the token before it (int64)."""
    table = ByteTable(processor, processor.get_piece_size())
    counts = np.zeros(len(ids), dtype=np.int64)  # the first token is BOS
    inside = np.minimum(ids, processor.get_piece_size() - 1)  # larger ids have been reported
    for start in range(1, len(ids), BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, len(ids))
        counts[start:end] = table.count(inside[start:end], inside[start - 1 : end - 1])
    return counts


def count_val_bytes(data: DataSet, report: Report) -> np.ndarray:
    """Bytes that each validation token stands for; problems with the sidecar are reported."""
    ids = np.concatenate([read_shard(path) for path in data.shards["val"]])
    counts, source = count_piece_bytes(data.processor, ids), "pieces"
    if data.shards["val_bytes"]:
        sidecar = np.concatenate([read_shard(path) for path in data.shards["val_bytes"]])
        if check_sidecar(data, ids, sidecar, counts, report):
            counts, source = sidecar, "the sidecar"
    num_bytes = int(counts.sum(dtype=np.int64))
    report.note(f"validation text: {num_bytes:,} bytes, counted by {source}")
    report.compare("validation bytes", num_bytes, data.expected("val", "text_bytes"))
    return counts


def check_sidecar(
    data: DataSet, ids: np.ndarray, sidecar: np.ndarray, by_pieces: np.ndarray, report: Report
) -> bool:
    """Check the sidecar's counts; False if they cannot belong to the tokens at all."""
    if len(sidecar) != len(ids):
        report.problem(f"sidecar: {len(sidecar):,} counts for {len(ids):,} validation tokens")
        return False
    transform = case_markers.TRANSFORMS.get(str(data.manifest.get("transform")))
    if is_lossless(data.processor) and transform is not None:
        check_marked(data, transform, ids, sidecar, report)
        return True
    if is_lossless(data.processor):
        if num_wrong := int((sidecar != by_pieces).sum()):
            report.problem(f"sidecar: {num_wrong:,} counts differ from the bytes of their pieces")
        return True
    is_bos = ids == BOS_ID
    is_empty = np.append(is_bos[1:], True)  # BOS counts only where no other token is left
    if num_wrong := int((sidecar[is_bos & ~is_empty] > 0).sum()):
        report.problem(f"sidecar: {num_wrong:,} BOS tokens count bytes")
    num_bytes, num_decoded = int(sidecar.sum(dtype=np.int64)), int(by_pieces.sum())
    if not num_decoded / 2 <= num_bytes <= 2 * num_decoded:
        report.problem(
            f"sidecar: {num_bytes:,} bytes, but the pieces stand for {num_decoded:,}; a sidecar of "
            "this text would be nearer to that"
        )
    return True


def check_marked(
    data: DataSet,
    transform: case_markers.CaseMarkers,
    ids: np.ndarray,
    sidecar: np.ndarray,
    report: Report,
) -> None:
    """Check each document's counts against the text that its tokens and case markers stand for."""
    ids = np.minimum(ids, data.processor.get_piece_size() - 1)  # larger ones have been reported
    starts = np.flatnonzero(ids == BOS_ID)
    num_wrong = num_unlike = 0
    for start, end in zip(starts, np.append(starts[1:], len(ids)), strict=True):
        marked = decode_ids(data.processor, ids[start:end].tolist()).decode("utf-8", "replace")
        text = transform.decode(marked)
        num_unlike += transform.encode(text) != marked
        num_wrong += int(sidecar[start:end].sum(dtype=np.int64)) != len(text.encode("utf-8"))
    if num_wrong:
        report.problem(f"sidecar: the counts of {num_wrong:,} documents do not sum to their bytes")
    if num_unlike:
        report.problem(f"case markers of {num_unlike:,} documents are not those of their text")


# --- 4. Overlap ----------------------------------------------------------------------------------

SHINGLE_TOKENS = 16  # a power of two; 40 to 60 bytes of English
MAX_SKETCH = 1 << 22  # validation shingles that are kept, about
MAX_OWNERS = 16  # a shingle in more validation documents is boilerplate, and is not used
NEAR_SHARE = 0.5
FILTER_BITS = 24
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


def hash_shingles(ids: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every run of SHINGLE_TOKENS ids, by its start: a polynomial, then mixed.

    Doubling: the hash of 2n ids is that of the first n plus M^n times that of the others.
    """
    hashes = ids.astype(np.uint64) + np.uint64(1)
    power, width = MULTIPLIER, 1
    with np.errstate(over="ignore"):
        while width < SHINGLE_TOKENS:
            hashes = hashes[:-width] + hashes[width:] * power if len(hashes) > width else hashes[:0]
            power, width = power * power, 2 * width
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(32)
    return hashes


def find_shingles(block: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles in a block and the index of their document in it.

    Shingles lie inside one document, without its BOS. One in `rate` is kept, by its hash.
    """
    hashes = hash_shingles(block)
    bounds = np.concatenate([[0], np.cumsum(block == BOS_ID)])
    num_before = bounds[: len(hashes)]
    inside = bounds[SHINGLE_TOKENS : SHINGLE_TOKENS + len(hashes)] == num_before
    kept = inside & (num_before > 0) & (hashes & np.uint64(rate - 1) == 0)
    return hashes[kept], num_before[kept] - 1


class Sketch:
    """The shingles of the validation documents, and what of them has been found in training."""

    def __init__(self, paths: Sequence[Path]):
        num_tokens = sum(len(read_shard(path)) for path in paths)
        self.rate = 1 << max(0, (num_tokens // MAX_SKETCH).bit_length())
        self.digests: dict[bytes, list[int]] = defaultdict(list)  # of whole documents
        hashes, owners = self._read(paths)
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        is_new = np.ones(len(hashes), dtype=bool)  # of a (shingle, document) pair
        is_new[1:] = (np.diff(hashes) != 0) | (np.diff(owners) != 0)
        hashes, owners = hashes[is_new], owners[is_new]
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        is_rare = counts[inverse] <= MAX_OWNERS
        self.owners = owners[is_rare]
        self.hashes, first = np.unique(hashes[is_rare], return_index=True)
        self.first_owner = np.append(first, len(self.owners))  # a slice of owners for each hash
        self.num_shingles = np.bincount(self.owners, minlength=self.num_documents)
        self.filter = np.zeros(1 << FILTER_BITS, dtype=bool)
        self.filter[self._slot(self.hashes)] = True
        self.is_exact = np.zeros(self.num_documents, dtype=bool)
        self.is_seen = np.zeros(len(self.hashes), dtype=bool)
        self.best = np.zeros(self.num_documents)  # largest share found in one training document

    def _read(self, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
        """All shingles and the documents that they are in."""
        self.num_documents = 0
        found = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]
        for block in read_blocks(paths):
            hashes, owners = find_shingles(block, self.rate)
            found.append((hashes, owners + self.num_documents))
            for digest in hash_documents(block):
                self.digests[digest].append(self.num_documents)
                self.num_documents += 1
        return np.concatenate([h for h, _ in found]), np.concatenate([o for _, o in found])

    @staticmethod
    def _slot(hashes: np.ndarray) -> np.ndarray:
        """Where the filter of possible hashes looks: their highest bits."""
        return (hashes >> np.uint64(64 - FILTER_BITS)).astype(np.int64)

    def add_training(self, block: np.ndarray) -> None:
        """Compare a block of training documents with all validation documents."""
        for digest in hash_documents(block):
            self.is_exact[self.digests.get(digest, [])] = True
        hashes, documents = find_shingles(block, self.rate)
        possible = self.filter[self._slot(hashes)]
        hashes, documents = hashes[possible], documents[possible]
        index = np.searchsorted(self.hashes, hashes)
        known = index < len(self.hashes)
        known[known] = self.hashes[index[known]] == hashes[known]
        pairs = np.unique(np.stack([documents[known], index[known]]), axis=1)
        self.is_seen[pairs[1]] = True
        first, last = self.first_owner[pairs[1]], self.first_owner[pairs[1] + 1]
        num_owners = last - first
        # owners first[0]..last[0]-1, first[1]..last[1]-1, ... and the training document of each
        offsets = np.arange(num_owners.sum()) - np.repeat(
            num_owners.cumsum() - num_owners, num_owners
        )
        owners = self.owners[np.repeat(first, num_owners) + offsets]
        training = np.repeat(pairs[0], num_owners)
        keys, shared = np.unique(training * self.num_documents + owners, return_counts=True)
        owners = keys % self.num_documents
        np.maximum.at(self.best, owners, shared / self.num_shingles[owners])

    def share_seen(self) -> float:
        """Share of the validation shingles that occur anywhere in the training data."""
        weights = np.diff(self.first_owner)
        return float(weights[self.is_seen].sum() / max(weights.sum(), 1))


def hash_documents(block: np.ndarray) -> Iterator[bytes]:
    """A digest of each document in a block, without its BOS."""
    starts = np.flatnonzero(block == BOS_ID)
    for start, end in zip(starts, np.append(starts[1:], len(block)), strict=True):
        yield hashlib.sha256(block[start + 1 : end].data).digest()


def check_overlap(data: DataSet, counts: np.ndarray, max_near: float, report: Report) -> None:
    """Report exact and near copies of validation documents in the training data."""
    sketch = Sketch(data.shards["val"])
    paths = data.shards["train"]
    with show_progress("comparing", sum(path.stat().st_size for path in paths)) as bar:
        for block in read_blocks(paths):
            sketch.add_training(block)
            bar.update(2 * len(block))
    ids = np.concatenate([read_shard(path) for path in data.shards["val"]])
    owners = np.cumsum(ids == BOS_ID) - 1
    is_owned = owners >= 0
    num_bytes = np.bincount(owners[is_owned], counts[is_owned], minlength=sketch.num_documents)
    total = max(num_bytes.sum(), 1)
    is_near = ~sketch.is_exact & (sketch.best >= NEAR_SHARE)
    shares = {}
    for kind, chosen in (("exact", sketch.is_exact), ("near", is_near)):
        shares[kind] = num_bytes[chosen].sum() / total
        report.note(
            f"{kind} copies in training: {int(chosen.sum()):,} of {sketch.num_documents:,} "
            f"validation documents, {shares[kind]:.3%} of the validation bytes"
        )
    report.note(
        f"{sketch.share_seen():.3%} of the validation shingles occur somewhere in training "
        f"({len(sketch.hashes):,} distinct ones compared, 1 in {sketch.rate})"
    )
    num_twice = sum(len(same) - 1 for same in sketch.digests.values())
    if num_twice:
        report.note(f"{num_twice:,} validation documents are copies of other validation documents")
    if sketch.is_exact.any():
        report.problem("validation documents are in the training data")
    if shares["near"] > max_near:
        report.problem(
            f"near copies are {shares['near']:.3%} of the validation bytes, more than "
            f"{max_near:.3%} (--max-near)"
        )


# --- Command line --------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> list[str]:
    """Run all checks; the problems that were found."""
    report = Report()
    print("files")
    data = open_data_set(options.folder, options.tokenizer, report)
    if check_files(data, report):
        print("tokens")
        check_tokens(data, report)
        print("bytes")
        counts = count_val_bytes(data, report)
        if data.shards["train"] and not options.no_overlap:
            print("overlap")
            check_overlap(data, counts, options.max_near, report)
    return report.problems


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0 (all well), 1 (problems) or 2 (no data set)."""
    make_output_safe()
    parser = argparse.ArgumentParser(
        description="Check a data set: its files, tokens and bytes, and overlap of its splits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the folder with the shards")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="default: found by itself")
    near = "share of the validation bytes in near copies above which the verdict is bad"
    parser.add_argument("--max-near", type=float, default=0.02, metavar="SHARE", help=near)
    parser.add_argument("--no-overlap", action="store_true", help="leave out the comparison")
    options = parser.parse_args(argv)
    try:
        problems = check(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2
    print("verdict: " + (f"{len(problems)} problem(s)" if problems else "ok"))
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
