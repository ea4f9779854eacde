"""Data: token shards, byte counts, the token stream, samplers, batches, the validation text."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import train_gpt
from tests.conftest import (
    VOCAB_SIZE,
    TinyData,
    make_documents,
    tiny_config,
    train_tiny_tokenizer,
    write_raw_shard,
)
from train_gpt import (
    BOS_ID,
    BatchLoader,
    ByteTable,
    Config,
    CoprimeSampler,
    InputError,
    SequentialSampler,
    ShuffledSampler,
    TokenStream,
    TrainStage,
    check_tokenizer,
    find_shards,
    load_tokenizer,
    load_validation,
    read_shard,
    train_stage_at,
    train_stages,
    write_shard,
)

REMEDY = "rebuild it with data/prepare.py or data/download.py"


def refusal_of(call: Callable[[], Any]) -> str:
    """The message with which `call` is refused."""
    with pytest.raises(InputError) as refusal:
        call()
    return str(refusal.value)


# --- Shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_a_written_shard_is_the_published_format_to_the_byte(tmp_path: Path, dtype: type):
    ids: np.ndarray = np.array([1, 0, 255, 256, 65_535], dtype=dtype)
    write_shard(tmp_path / "a.bin", ids)
    write_raw_shard(tmp_path / "b.bin", ids)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "b.bin"]  # no temporary left


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_shard_is_read_back(tmp_path: Path, count: int):
    ids = np.random.default_rng(0).integers(0, 65_536, count)
    write_raw_shard(tmp_path / "a.bin", ids)
    read = read_shard(tmp_path / "a.bin")
    assert read.dtype == np.uint16 and np.array_equal(read, ids)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            lambda raw: b"",
            "0 bytes, magic None version None, expected 20240520 and 1: not a token shard",
        ),
        (
            lambda raw: raw[:1023],
            "1023 bytes, but its header says 10 tokens = 1044 bytes: damaged",
        ),
        (
            lambda raw: b"PK\3\4" + raw[4:],
            "1044 bytes, magic 67324752 version 1, expected 20240520 and 1: not a token shard",
        ),
        (
            lambda raw: raw[:4] + b"\2" + raw[5:],
            "1044 bytes, magic 20240520 version 2, expected 20240520 and 1: not a token shard",
        ),
        (
            lambda raw: raw[:-1],
            "1043 bytes, but its header says 10 tokens = 1044 bytes: damaged",
        ),
        (
            lambda raw: raw + b"\0\0",
            "1046 bytes, but its header says 10 tokens = 1044 bytes: damaged",
        ),
        (
            lambda raw: raw[:8] + b"\xff\xff\xff\xff" + raw[12:],
            "1044 bytes, but its header says -1 tokens = 1022 bytes: damaged",
        ),
        (
            lambda raw: raw[:8] + b"\xff\xff\xff\x7f" + raw[12:],
            "1044 bytes, but its header says 2147483647 tokens = 4294968318 bytes: damaged",
        ),
    ],
)
def test_a_damaged_shard_is_refused_with_its_path_and_numbers(
    tmp_path: Path, edit: Callable[[bytes], bytes], problem: str
):
    path = tmp_path / "a_train_000000.bin"
    write_raw_shard(path, np.arange(10))
    path.write_bytes(edit(path.read_bytes()))
    expected = f"{path}: {problem}; {REMEDY}"
    assert refusal_of(lambda: read_shard(path)) == expected
    assert refusal_of(lambda: TokenStream([path], 10)) == expected


def test_shards_of_a_split_come_in_the_order_of_their_numbers(tmp_path: Path):
    names = [f"a_b_train_{number:06d}.bin" for number in range(12)]
    others = ["a_b_val_000000.bin", "a_b_val_bytes_000000.bin"]
    ignored = ["a_train_x.bin", "a_train_000001.idx", "._a_train_000000.bin", "artifact.bin"]
    for name in [*reversed(names), *others, *ignored]:
        (tmp_path / name).touch()
    cfg = Config(data_path=str(tmp_path))
    found = [[path.name for path in find_shards(cfg, p)] for p in ("train", "val", "val_bytes")]
    assert found == [names, others[:1], others[1:]]


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_is_refused_with_a_way_to_make_it(tmp_path: Path, part: str):
    folder = tmp_path / "none"
    assert refusal_of(lambda: find_shards(Config(data_path=str(folder)), part)) == (
        f"DATA_PATH={folder} holds no *_{part}_*.bin shard; make it: python data/prepare.py "
        f"--input FILE_OR_FOLDER --vocab-size 8192 --out {folder}; for a first look without a "
        "download: make run"
    )


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("fineweb10B_sp8192", "data/download.py --variant sp8192; "),
        ("fineweb10B_sp1024", "data/download.py --variant sp1024; "),
        ("fineweb10B_sp2048", "data/prepare.py --input FILE_OR_FOLDER "),  # not published
        (
            "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
            "data/download.py --variant sp8192-caseops; ",
        ),
        ("demo", "data/prepare.py --source stdlib --write-val-text --vocab-size 8192 --out "),
        ("mine", "data/prepare.py --input FILE_OR_FOLDER --vocab-size 8192 --out "),
    ],
)
def test_missing_data_name_the_command_for_that_folder_and_the_demo(
    tmp_path: Path, folder: str, command: str
):
    refusal = refusal_of(lambda: load_tokenizer(Config(data_path=str(tmp_path / folder))))
    assert command in refusal and "make run" in refusal
    assert ("--source stdlib" in refusal) == (folder == "demo")


def test_a_data_set_whose_files_are_being_replaced_is_refused(tmp_path: Path):
    # prepare.py removes the manifest first and moves the files one by one, not all at once.
    (tmp_path / ".partial").mkdir()
    cfg = Config(data_path=str(tmp_path))
    assert f"{tmp_path} is unfinished; run data/prepare.py again" in refusal_of(
        lambda: train_gpt.read_manifest(cfg)
    )


def test_a_missing_sidecar_is_no_error(tmp_path: Path):
    assert find_shards(Config(data_path=str(tmp_path)), "val_bytes") == []


# --- The stream ----------------------------------------------------------------------------------


def make_stream(folder: Path, *shards: np.ndarray, vocab_size: int = 65_536) -> TokenStream:
    """A stream over these shards, written to `folder`."""
    paths = [folder / f"x_train_{i:06d}.bin" for i in range(len(shards))]
    for path, ids in zip(paths, shards, strict=True):
        write_raw_shard(path, ids)
    return TokenStream(paths, vocab_size)


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any),
    start=st.integers(0, 60),
    count=st.integers(1, 60),
)
@example(sizes=[0, 3, 0, 0, 2, 0], start=3, count=11)
def test_the_stream_is_its_shards_joined_and_goes_round(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], start: int, count: int
):
    ids = np.arange(100, 100 + sum(sizes))
    shards = np.split(ids, np.cumsum(sizes)[:-1])
    stream = make_stream(tmp_path_factory.mktemp("stream"), *shards)
    expected = [int(ids[(start + i) % len(ids)]) for i in range(count)]
    read = stream.read(start, count)
    assert read.dtype == np.int64 and read.tolist() == expected


@pytest.mark.parametrize(("start", "count"), [(1, 3), (3, 1), (2, 9), (0, 50)])
def test_an_id_outside_the_vocabulary_is_refused_with_shard_and_position(
    tmp_path: Path, start: int, count: int
):
    stream = make_stream(tmp_path, np.array([1, 99]), np.array([7, 100, 65_535]), vocab_size=100)
    assert stream.read(0, 3).tolist() == [1, 99, 7]
    assert refusal_of(lambda: stream.read(start, count)) == (
        f"{tmp_path}/x_train_000001.bin: token id 100 at position 1 does not fit VOCAB_SIZE=100: "
        "the shards belong to another tokenizer, or the file is damaged; set VOCAB_SIZE, or "
        f"{REMEDY}"
    )


def test_a_shard_that_was_truncated_during_the_run_is_refused(tmp_path: Path):
    stream = make_stream(tmp_path, np.arange(10), np.arange(10))
    os.truncate(tmp_path / "x_train_000001.bin", 1024 + 2 * 4)
    assert stream.read(0, 14).tolist() == [*range(10), *range(4)]
    assert refusal_of(lambda: stream.read(10, 5)) == (
        f"{tmp_path}/x_train_000001.bin was truncated after it was opened; {REMEDY}"
    )


def test_a_stream_keeps_no_file_open(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    stream = make_stream(tmp_path, *(np.arange(n, n + 3) for n in range(50)))
    assert stream.read_all().tolist() == stream.read(0, 150).tolist()
    assert len(os.listdir("/proc/self/fd")) == before


# --- Samplers ----------------------------------------------------------------------------

DOCUMENTS = np.array([BOS_ID, 5, 6, 7, BOS_ID, 8, 9, BOS_ID, 5, 5, 5, 5, 5, BOS_ID, 6, 7, 8, 9, 5])


def test_the_sequential_plan_begins_at_a_document_and_goes_on_without_gaps(tmp_path: Path):
    stream = make_stream(tmp_path, DOCUMENTS[:8], DOCUMENTS[8:])
    firsts = set()
    for seed in range(40):
        plan = SequentialSampler(stream, 4, tiny_config(seed=seed))
        starts = [plan.start(4 * n) for n in range(20)]
        assert np.diff(starts).tolist() == [4] * 19
        firsts.add(starts[0] % len(DOCUMENTS))
    assert firsts == {0, 4, 7, 13}  # 40 seeds find each of the four documents


def test_the_sequential_plan_without_any_document_start_begins_anywhere(tmp_path: Path):
    stream = make_stream(tmp_path, np.full(30, 5))
    plans = [SequentialSampler(stream, 4, tiny_config(seed=seed)) for seed in range(20)]
    assert len({plan.start(0) % 30 for plan in plans}) > 5


@pytest.mark.parametrize("kind", [ShuffledSampler, CoprimeSampler])
@pytest.mark.parametrize("sizes", [(10, 9, 23, 41), (8,), (7, 8), (100, 3, 0, 16)])
def test_the_shuffled_plan_visits_every_window_of_every_shard_once_an_epoch(
    tmp_path: Path, sizes: tuple[int, ...], kind: type[ShuffledSampler]
):
    T = 4
    stream = make_stream(tmp_path, *(np.arange(size) for size in sizes))
    first_of_shard = np.cumsum([0, *sizes])
    plan = kind(stream, T, tiny_config(seed=3))
    offsets = set()
    for epoch in range(20):
        starts = np.sort(
            [plan.start(T * (epoch * plan.num_windows + n)) for n in range(plan.num_windows)]
        )
        num_seen = 0
        for first, size in zip(first_of_shard, sizes, strict=False):
            own = starts[(first <= starts) & (starts < first + size)]
            num_seen += len(own)
            # One window of the T that fit is given up for a phase that may be any of 0 .. T - 1.
            assert len(own) == max(0, size // T - 1)
            if len(own):
                assert set(np.diff(own)) <= {T}  # a grid, so no two windows share a target
                assert own[-1] + T + 1 <= first + size  # the last target lies in the shard too
                offsets.add(int(own[0] - first))
        assert num_seen == plan.num_windows
    if sum(sizes) > 50:
        assert offsets == {0, 1, 2, 3}


def test_the_shuffled_plan_draws_another_order_each_epoch_and_for_each_seed(tmp_path: Path):
    stream = make_stream(tmp_path, np.arange(403))
    plan, other = (ShuffledSampler(stream, 4, tiny_config(seed=seed)) for seed in (0, 1))
    orders = [plan.order(0), plan.order(1), other.order(0)]
    steps = [np.mean(np.diff(order) == 4) for order in orders]
    assert max(steps) < 0.1  # neighbours follow each other in 1 of 99 cases by chance
    for a, b in ((0, 1), (0, 2)):
        # After the phases are removed, equal orders would agree everywhere, chance agrees in 1 %.
        assert np.mean(orders[a] // 4 == orders[b] // 4) < 0.1


@pytest.mark.parametrize("name", sorted(train_gpt.SAMPLERS))
def test_a_plan_is_a_function_of_seed_and_window_not_of_what_was_asked_before(
    tmp_path: Path, name: str
):
    stream = make_stream(tmp_path, np.tile(DOCUMENTS, 10))
    plans = [train_gpt.SAMPLERS[name](stream, 4, tiny_config(seed=7)) for _ in range(2)]
    in_order = [plans[0].start(4 * n) for n in range(150)]
    scattered = np.random.default_rng(0).permutation(150)
    assert all(plans[1].start(4 * int(n)) == in_order[n] for n in scattered)


def test_too_little_data_for_a_plan_is_refused_with_the_numbers(tmp_path: Path):
    stream = make_stream(tmp_path, np.arange(7), np.arange(3))
    cfg = tiny_config()
    assert (
        SequentialSampler(stream, 9, cfg).start(9) - SequentialSampler(stream, 9, cfg).start(0) == 9
    )
    text = "10 training tokens are fewer than TRAIN_SEQ_LEN=10 + 1"
    assert refusal_of(lambda: SequentialSampler(stream, 10, cfg)) == text
    assert ShuffledSampler(stream, 3, cfg).num_windows == 1
    for name in ("shuffled", "coprime"):
        plan = functools.partial(train_gpt.SAMPLERS[name], stream, 4, tiny_config(loader=name))
        assert refusal_of(plan) == (
            "no training shard holds two windows of TRAIN_SEQ_LEN=4 tokens, "
            f"which LOADER={name} needs"
        )


# --- Batches -------------------------------------------------------------------------------------


@pytest.fixture
def stream(data: TinyData) -> TokenStream:
    """The training part of the tiny data set."""
    return TokenStream(sorted(data.folder.glob("*_train_*.bin")), VOCAB_SIZE)


def make_loader(
    stream: TokenStream, rank: int = 0, world_size: int = 1, **changes: Any
) -> BatchLoader:
    """A loader of 8 rows of 32 tokens over all ranks."""
    return BatchLoader(tiny_config(**changes), stream, rank=rank, world_size=world_size)


BATCH_TOKENS = 256  # of every step, unless a test says otherwise


def read_step(loader: BatchLoader, step: int, batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
    """What the loader reads for step `step` (from 0) of a training whose phase never changes."""
    return loader.read(step * batch_tokens, 32, batch_tokens)


def test_a_batch_of_the_sequential_loader_is_the_next_stretch_of_the_data(
    stream: TokenStream, data: TinyData
):
    loader = make_loader(stream)
    ids, T = np.concatenate(data.train), 32
    num_steps = len(ids) // (8 * T) + 2  # past the end of the data, so that it goes round
    batches = torch.stack([read_step(loader, step) for step in range(num_steps)])
    assert batches.shape == (num_steps, 8, T + 1) and batches.dtype == torch.int64
    first = loader.samplers[T].start(0) % len(ids)
    assert ids[first] == BOS_ID
    inputs, targets = batches[..., :-1].flatten().numpy(), batches[..., 1:].flatten().numpy()
    assert np.array_equal(inputs, np.resize(np.roll(ids, -first), len(inputs)))
    assert np.array_equal(targets, np.resize(np.roll(ids, -first - 1), len(inputs)))


@pytest.mark.parametrize("name", sorted(train_gpt.SAMPLERS))
def test_the_batches_of_all_ranks_together_are_those_of_one_rank(stream: TokenStream, name: str):
    alone = make_loader(stream, loader=name)
    for world_size in (2, 4, 8):
        ranks = [make_loader(stream, r, world_size, loader=name) for r in range(world_size)]
        for step in (0, 1, 9):
            joined = torch.cat([read_step(loader, step) for loader in ranks])
            assert torch.equal(joined, read_step(alone, step)), (world_size, step)


@pytest.mark.parametrize("name", ["shuffled", "coprime"])
def test_no_window_is_given_to_two_ranks_or_steps_of_an_epoch(tmp_path: Path, name: str):
    stream = make_stream(tmp_path, np.arange(5000), np.arange(5000, 12_000))  # ids tell the place
    loaders = [make_loader(stream, rank, 2, loader=name) for rank in range(2)]
    num_steps = (5000 // 32 - 1 + 7000 // 32 - 1) // 8
    rows = torch.cat([read_step(loader, step) for loader in loaders for step in range(num_steps)])
    assert (rows.diff(dim=1) == 1).all()
    assert len(rows[:, 1:].unique()) == 8 * 32 * num_steps


@pytest.mark.parametrize("name", sorted(train_gpt.SAMPLERS))
def test_the_seed_decides_the_data_order(stream: TokenStream, name: str):
    first, again, other = (
        read_step(make_loader(stream, loader=name, seed=seed), 0) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", sorted(train_gpt.SAMPLERS))
def test_a_prefetched_batch_is_what_read_returns_also_after_a_jump(stream: TokenStream, name: str):
    loader, plain = make_loader(stream, loader=name), make_loader(stream, loader=name)
    phase = train_stage_at(tiny_config(), 0.0, 1.0)
    for step in (0, 1, 2, 7, 8, 3, 3, 4):
        assert torch.equal(loader.batch(256 * step, phase), read_step(plain, step)), step


@pytest.mark.parametrize("name", sorted(train_gpt.SAMPLERS))
def test_a_batch_after_a_change_of_phase_has_the_new_shape_and_follows_the_old(
    stream: TokenStream, name: str
):
    knobs: dict[str, Any] = dict(train_seq_schedule="8@0.3,16@0.6", train_batch_schedule="64@0.5")
    cfg = tiny_config(loader=name, **knobs)
    loader = make_loader(stream, loader=name, **knobs)
    ids = np.concatenate([stream.read(0, stream.num_tokens)] * 2)
    position = 0
    for progress, seq_len, batch_tokens in (
        (0.0, 8, 64),
        (0.1, 8, 64),
        (0.3, 16, 64),
        (0.5, 16, 256),
        (0.6, 32, 256),
        (0.9, 32, 256),
    ):
        phase = train_stage_at(cfg, progress, 1.0)
        assert phase == TrainStage(
            seq_len, batch_tokens, loops=0, qat=False
        ) and phase in train_stages(cfg)
        batch = loader.batch(position, phase)
        assert batch.shape == (batch_tokens // seq_len, seq_len + 1)
        assert torch.equal(batch, loader.read(position, seq_len, batch_tokens))
        if name == "stream":  # not a token is left out or seen twice
            first = loader.samplers[32].start(0) % stream.num_tokens + position
            expected = ids[first : first + batch_tokens]
            assert np.array_equal(batch[:, :-1].flatten().numpy(), expected)
        position += batch_tokens


def test_batches_asked_for_in_order_are_read_once_and_one_ahead(stream: TokenStream):
    positions: list[int] = []

    class Noted(BatchLoader):
        def read(self, position: int, seq_len: int, batch_tokens: int) -> torch.Tensor:
            positions.append(position)
            return super().read(position, seq_len, batch_tokens)

    loader = Noted(tiny_config(), stream, rank=0, world_size=1)
    for step in range(4):
        loader.batch(256 * step, train_stage_at(tiny_config(), 0.0, 1.0))
    loader.executor.shutdown()  # waits for the one that is read ahead
    assert positions == [0, 256, 512, 768, 1024]


def test_rows_that_do_not_divide_over_the_ranks_are_refused_with_the_numbers(stream: TokenStream):
    assert refusal_of(lambda: make_loader(stream, 0, 3)) == (
        "TRAIN_BATCH_TOKENS=256 / TRAIN_SEQ_LEN=32 = 8 rows do not divide over 3 ranks; "
        "use a multiple of 96 tokens"
    )
    loader = make_loader(stream, 0, 3, train_batch_tokens=96 * 5)
    assert read_step(loader, 0, 96 * 5).shape == (5, 33)
    assert refusal_of(lambda: make_loader(stream, 0, 4, train_batch_schedule="192@0.5")) == (
        "TRAIN_BATCH_TOKENS=192 / TRAIN_SEQ_LEN=32 = 6 rows do not divide over 4 ranks; "
        "use a multiple of 128 tokens"
    )  # 256 / 32 = 8 rows do, of the phase after it


# --- Bytes ---------------------------------------------------------------------------------------


def decoded_bytes(tokenizer: sentencepiece.SentencePieceProcessor, ids: list[int]) -> int:
    """UTF-8 bytes that the ids of one document decode to."""
    return len(tokenizer.decode(ids).encode("utf-8"))


def counted_bytes(table: ByteTable, ids: list[int]) -> int:
    """Bytes that the table counts for a document's tokens behind its BOS."""
    document = np.array([BOS_ID, *ids])
    return int(table.count(document[1:], document[:-1]).sum())


@pytest.fixture(scope="session")
def tokenizers(data: TinyData) -> dict[str, sentencepiece.SentencePieceProcessor]:
    """Tokenizers of different making: lossless, normalising as published, with runs of spaces."""
    texts = make_documents(100, seed=0)
    indented = [text.replace(" ", "\n        ") for text in texts]
    published = {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "allow_whitespace_only_pieces": False,
        "user_defined_symbols": ["<sep>", "\u2581<x>"],
        "control_symbols": ["<ctl>"],
    }
    models = {
        "published": train_tiny_tokenizer(texts, **published),
        "indented": train_tiny_tokenizer(texts + indented),
    }
    made = {k: sentencepiece.SentencePieceProcessor(model_proto=m) for k, m in models.items()}
    return {"lossless": data.tokenizer, **made}


@pytest.mark.parametrize("kind", ["lossless", "published", "indented"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30))
@example(text="the of and to in a is that for it as was")
@example(text="  two  and   three    spaces \n\t of")
@example(text="        the\n        of   and\n                to")
@example(text="naïve Größe 日本 😀 — ﬁ ½ x\u0301 \u2581")
@example(text="<sep>the <sep> <x> the<x>")
def test_counted_bytes_of_a_document_are_those_of_its_decoded_text(
    tokenizers: dict[str, sentencepiece.SentencePieceProcessor], kind: str, text: str
):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(ids)
    first_space = bool(ids) and tokenizer.id_to_piece(ids[0]).startswith("\u2581")
    # A space that a document begins with counts nothing: techniques exempt the token after BOS.
    expected = len(decoded.encode("utf-8")) - (first_space and decoded.startswith(" "))
    assert counted_bytes(ByteTable(tokenizer, VOCAB_SIZE), ids) == expected


def test_counted_bytes_of_the_validation_text_are_its_own(data: TinyData):
    table = ByteTable(data.tokenizer, VOCAB_SIZE)
    text_bytes = sum(len(text.encode("utf-8")) for text in data.val_documents)
    assert not any(text.startswith(" ") for text in data.val_documents)
    assert int(table.count(data.val[1:], data.val[:-1]).sum()) == text_bytes


def test_some_piece_of_the_indented_tokenizer_is_a_run_of_spaces(
    tokenizers: dict[str, sentencepiece.SentencePieceProcessor],
):
    # Without one the test above would say nothing about such pieces.
    pieces = [tokenizers["indented"].id_to_piece(i) for i in range(VOCAB_SIZE)]
    assert any(piece.startswith("\u2581\u2581\u2581\u2581") for piece in pieces)


def test_a_token_counts_its_marker_unless_a_control_token_precedes(
    tokenizers: dict[str, sentencepiece.SentencePieceProcessor],
):
    tokenizer = tokenizers["published"]
    table = ByteTable(tokenizer, VOCAB_SIZE)
    the, marked = tokenizer.encode("x the")[-1], tokenizer.piece_to_id("\u2581<x>")
    assert tokenizer.id_to_piece(the) == "\u2581the"
    controls = [tokenizer.pad_id(), BOS_ID, 2, tokenizer.unk_id(), tokenizer.piece_to_id("<ctl>")]
    a_byte = tokenizer.piece_to_id("<0x41>")
    assert tokenizer.is_byte(a_byte) and all(map(tokenizer.is_control, set(controls) - {3}))
    for target, num_bytes in ((the, 3), (marked, 3)):
        for previous in range(VOCAB_SIZE):
            counted = table.count(np.array([target]), np.array([previous]))
            assert counted.dtype == np.int64
            assert counted == num_bytes + (previous not in controls), previous
    everywhere = np.arange(VOCAB_SIZE)
    for control in controls:
        assert not table.count(np.full(VOCAB_SIZE, control), everywhere).any()
    assert (table.count(np.full(VOCAB_SIZE, a_byte), everywhere) == 1).all()


def test_a_vocabulary_of_another_size_is_refused(data: TinyData):
    assert refusal_of(lambda: ByteTable(data.tokenizer, 1024)) == (
        f"VOCAB_SIZE=1024 does not match the tokenizer's {VOCAB_SIZE}; set it to {VOCAB_SIZE}, or "
        "use another tokenizer"
    )


UNFIT = (
    "the tokenizer cannot be used: {}; use another one, or let data/prepare.py train one "
    "(leave out --tokenizer)"
)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bos_id": 3, "eos_id": 1, "unk_id": 2}, "BOS has id 3, but documents begin with id 1"),
        ({"bos_id": 2, "eos_id": 1}, "BOS has id 2, but documents begin with id 1"),
        ({"bos_id": -1, "eos_id": 1, "unk_id": 2}, "BOS has id -1, but documents begin with id 1"),
        (
            {"byte_fallback": False},
            "0 of 256 byte pieces, so some characters would count no bytes",
        ),
        (
            {"bos_id": 0, "pad_id": 1, "byte_fallback": False},
            "BOS has id 0, but documents begin with id 1; "
            "0 of 256 byte pieces, so some characters would count no bytes",
        ),
        (
            {"required_chars": "", "allow_whitespace_only_pieces": False, "no_spaces": True},
            "no piece for a single space, so a space would count three bytes",
        ),
    ],
)
def test_a_tokenizer_that_would_miscount_documents_or_bytes_is_refused(
    options: dict[str, Any], problem: str
):
    texts = make_documents(100, seed=0)
    if options.get("no_spaces"):
        texts = [text.replace(" ", "") for text in texts]
    small = {"vocab_size": 60} if "byte_fallback" in options else {}
    options = {k: v for k, v in options.items() if k != "no_spaces"}
    model = train_tiny_tokenizer(texts, **{**options, **small})
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = tokenizer.get_piece_size()
    assert refusal_of(lambda: ByteTable(tokenizer, size)) == UNFIT.format(problem)


def test_a_refusal_of_a_tokenizer_names_it():
    model = train_tiny_tokenizer(make_documents(100, seed=0), bos_id=2, eos_id=1)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    message = refusal_of(lambda: check_tokenizer(tokenizer, VOCAB_SIZE, "t.model"))
    assert message.startswith("t.model cannot be used: BOS has id 2")


# --- Tokenizer and validation text ---------------------------------------------------------------


def test_the_tokenizer_beside_the_shards_is_found_with_its_hash(data: TinyData):
    processor, sha256 = load_tokenizer(tiny_config(data_path=str(data.folder)))
    payload = (data.folder / "tokenizer.model").read_bytes()
    assert sha256 == hashlib.sha256(payload).hexdigest()
    assert processor.encode("the of and") == data.tokenizer.encode("the of and")


def test_the_published_layout_s_tokenizer_is_found_and_a_named_one_wins(
    data: TinyData, tmp_path: Path
):
    folder, payload = tmp_path / "datasets" / "x", (data.folder / "tokenizer.model").read_bytes()
    folder.mkdir(parents=True)
    published = tmp_path / "tokenizers" / "fineweb_320_bpe.model"
    published.parent.mkdir()
    published.write_bytes(payload)
    cfg = tiny_config(data_path=str(folder))
    assert load_tokenizer(cfg)[1] == hashlib.sha256(payload).hexdigest()
    own = train_tiny_tokenizer(make_documents(90, seed=9))
    (tmp_path / "own.model").write_bytes(own)
    cfg = tiny_config(data_path=str(folder), tokenizer_path=str(tmp_path / "own.model"))
    assert load_tokenizer(cfg)[1] == hashlib.sha256(own).hexdigest()


def test_a_missing_tokenizer_is_refused_with_the_places_and_the_remedy(tmp_path: Path):
    folder = tmp_path / "datasets" / "x"
    assert refusal_of(lambda: load_tokenizer(tiny_config(data_path=str(folder)))) == (
        f"no tokenizer at {folder}/tokenizer.model or "
        f"{tmp_path}/tokenizers/fineweb_320_bpe.model; set TOKENIZER_PATH, or make "
        f"it: python data/prepare.py --input FILE_OR_FOLDER --vocab-size 320 --out {folder}; "
        "for a first look without a download: make run"
    )
    cfg = tiny_config(data_path=str(folder), tokenizer_path=str(tmp_path / "no.model"))
    assert refusal_of(lambda: load_tokenizer(cfg)).startswith(
        f"no tokenizer at {tmp_path}/no.model;"
    )


@pytest.mark.parametrize("damage", [b"not a model", b"\x0a\xff\xff\xff\xff\xff"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, damage: bytes):
    path = tmp_path / "t.model"
    path.write_bytes(damage)
    message = refusal_of(lambda: load_tokenizer(tiny_config(tokenizer_path=str(path))))
    assert message.startswith(f"{path} is not a SentencePiece model: ")


def test_an_empty_tokenizer_file_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "t.model"
    path.touch()
    message = refusal_of(lambda: load_tokenizer(tiny_config(tokenizer_path=str(path))))
    assert message.startswith(f"{path} is not a SentencePiece model: ")


def copy_data(data: TinyData, folder: Path, val: np.ndarray | None = None) -> Config:
    """A data set with the same tokenizer and this validation shard; its configuration."""
    write_raw_shard(folder / "tiny_val_000000.bin", data.val if val is None else val)
    return tiny_config(data_path=str(folder))


def test_the_validation_text_is_every_shard_and_its_bytes_come_from_the_table(data: TinyData):
    validation = load_validation(tiny_config(data_path=str(data.folder)), data.tokenizer)
    assert np.array_equal(validation.ids, data.val) and not validation.partial
    assert validation.num_targets == len(data.val) - 1 == len(validation.target_bytes)
    text_bytes = sum(len(text.encode("utf-8")) for text in data.val_documents)
    assert validation.target_bytes.sum() == text_bytes


@pytest.mark.parametrize(
    ("limit", "num_targets", "partial"), [(100, 100, True), (-1, -1, False), (10**6, -1, False)]
)
def test_a_limit_on_the_validation_text_is_marked_where_it_cuts(
    data: TinyData, limit: int, num_targets: int, partial: bool
):
    full = len(data.val) - 1
    limit, num_targets = (n if n > 0 else full for n in (limit, num_targets))
    cfg = tiny_config(data_path=str(data.folder), val_tokens_limit=limit)
    validation = load_validation(cfg, data.tokenizer)
    assert (validation.num_targets, validation.partial) == (num_targets, partial)
    assert np.array_equal(validation.ids, data.val[: num_targets + 1])
    assert len(validation.target_bytes) == num_targets


@pytest.mark.parametrize("limit", [0, 50])
def test_a_sidecar_gives_the_bytes_of_each_target(data: TinyData, tmp_path: Path, limit: int):
    cfg = copy_data(data, tmp_path)
    counts = ByteTable(data.tokenizer, VOCAB_SIZE).count_text(data.val)
    counts[(counts > 1) & (np.arange(len(counts)) % 50 == 0)] -= 1
    write_raw_shard(tmp_path / "tiny_val_bytes_000000.bin", counts[:1000])
    write_raw_shard(tmp_path / "tiny_val_bytes_000001.bin", counts[1000:])
    cfg = tiny_config(data_path=cfg.data_path, val_tokens_limit=limit)
    validation = load_validation(cfg, data.tokenizer)
    assert np.array_equal(validation.target_bytes, counts[1 : limit + 1 if limit else None])
    assert np.array_equal(validation.ids, data.val[: len(validation.target_bytes) + 1])


def test_a_sidecar_of_another_length_is_refused_with_the_numbers(data: TinyData, tmp_path: Path):
    cfg = copy_data(data, tmp_path)
    sidecar = tmp_path / "tiny_val_bytes_000000.bin"
    write_raw_shard(sidecar, np.ones(len(data.val) - 1))
    n = len(data.val)
    assert refusal_of(lambda: load_validation(cfg, data.tokenizer)) == (
        f"{sidecar}: {n - 1} byte counts for {n} validation tokens; "
        f"sidecar and shards belong to different data sets; {REMEDY}"
    )


@pytest.mark.parametrize("count", [0, 1])
def test_too_short_a_validation_text_is_refused(data: TinyData, tmp_path: Path, count: int):
    cfg = copy_data(data, tmp_path, val=np.ones(count))
    assert refusal_of(lambda: load_validation(cfg, data.tokenizer)) == (
        f"DATA_PATH={tmp_path}: {count} validation tokens, at least 2 are needed"
    )


def test_two_tokens_are_the_least_that_can_be_scored(data: TinyData, tmp_path: Path):
    validation = load_validation(copy_data(data, tmp_path, val=data.val[:2]), data.tokenizer)
    assert validation.num_targets == 1 and len(validation.target_bytes) == 1
