"""The script as a process: what a run writes, what it says, and how it refuses and fails."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import train_gpt
from tests.conftest import (
    VOCAB_SIZE,
    TinyData,
    environment,
    make_documents,
    tiny_config,
    train_tiny_tokenizer,
)
from tests.processes import (
    SCRIPT,
    Result,
    log_events,
    metrics,
    parse_line,
    python_process,
    run_script,
    submission,
)

RUN: dict[str, Any] = {
    "run_dir": "run", "num_layers": 2, "iterations": 6, "train_log_every": 1, "val_loss_every": 4,
    "warmup_steps": 1, "eval_stride": 16, "submission_author": "A. Golfer", "track": "demo",
}  # fmt: skip


def run_environment(data: TinyData, **changes: Any) -> dict[str, str]:
    return environment(tiny_config(**{**RUN, "data_path": str(data.folder), **changes}))


class Done(NamedTuple):
    """A run that has ended well."""

    env: dict[str, str]
    folder: Path  # RUN_DIR
    result: Result
    log: str


@pytest.fixture(scope="module")
def done(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """MODE=all in a fresh interpreter, as a user starts it."""
    work, env = tmp_path_factory.mktemp("end_to_end"), run_environment(data)
    result = python_process([str(SCRIPT)], env, work)
    assert result.status == 0, result.err
    return Done(env, work / "run", result, (work / "run" / "train.log").read_text())


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder to run in."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


# --- What a run writes ---------------------------------------------------------------------------


def test_run_writes_its_files_and_nothing_else(done: Done):
    assert sorted(p.name for p in done.folder.iterdir()) == [
        "artifact.bin", "checkpoint", "metrics.jsonl", "run_state.json", "submission.json",
        "train.log", "train_gpt.py", "train_gpt_source.py",
    ]  # fmt: skip
    assert [p.name for p in done.folder.parent.iterdir()] == ["run"]
    assert done.result.err == ""


FINAL = ("final_prequant", "final_quantized", "final_sliding")


def test_console_lines_parse_as_events_in_the_order_of_the_run(done: Done):
    events = [event for event, _ in log_events(done.result.out)]
    first = {event: events.index(event) for event in events}
    expected = ["run", "model", "step", "val", "checkpoint", "train_end", *FINAL, "ledger"]
    expected.append("submission")
    assert sorted(expected, key=first.__getitem__) == expected
    assert events.count("step") == 6 and events.count("val") == 1
    assert events.index("size") < events.index("final_quantized")


def head_and_events(log: str) -> tuple[list[str], str, list[str]]:
    """Config lines, source, and event lines of train.log."""
    before, source, after = re.split(r"(?m)^=+(?: source =+)?\n", log, maxsplit=2)
    lines = before.splitlines()
    config = [line for line in lines if line.startswith("config ")]
    return config, source, [*lines[len(config) :], *after.splitlines()]


def test_log_is_the_configuration_the_source_and_the_lines_of_the_console(done: Done):
    config, source, lines = head_and_events(done.log)
    assert len(config) == len(train_gpt.Config.__dataclass_fields__)
    assert source.rstrip("\n") == SCRIPT.read_text().rstrip("\n")
    assert lines == done.result.out.splitlines()


def test_config_lines_carry_a_star_on_the_changed_knobs_alone(done: Done):
    parsed = {}
    for line in head_and_events(done.log)[0]:
        star, name, value = re.fullmatch(r"config ([ *]) ([A-Z0-9_]+):(.*)", line).groups()  # type: ignore[union-attr]
        parsed[name] = (star == "*", value)
    assert list(parsed) == sorted(parsed)
    inherited = {"PATH", "HOME", "TMPDIR", "LANG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}
    inherited |= {"TORCH_CPP_LOG_LEVEL"}
    given = {name: value for name, value in done.env.items() if name not in inherited}
    assert {name: value for name, (star, value) in parsed.items() if star} == given
    assert parsed["ROPE_BASE"] == (False, "10000.0")


def test_metrics_repeat_every_event_of_the_log_with_equal_values(done: Done):
    records = [
        json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[0]["event"] == "config"
    config = records.pop(0)
    assert config["values"]["NUM_LAYERS"] == 2 and "NUM_LAYERS" in config["changed"]
    lines = log_events(done.result.out)
    assert [r.pop("event") for r in records] == [event for event, _ in lines]
    for record, (event, values) in zip(records, lines, strict=True):
        if event in FINAL:  # a line calls a pass legal, for only the run can be compliant
            record["legal"] = record.pop("compliant")
        assert list(record) == list(values), event
        for key, value in record.items():
            if isinstance(value, float):  # the log shows 8 digits
                assert float(values[key]) == pytest.approx(value, rel=6e-8, abs=0), (event, key)
            else:
                assert values[key] == str(value), (event, key)


def test_losses_and_bits_per_byte_fit_together_in_every_line(done: Done, data: TinyData):
    for event in ("val", *FINAL):
        record = metrics(done.folder, event)[-1]
        assert record["tokens"] == len(data.val) - 1
        assert record["bytes"] == sum(len(text.encode()) for text in data.val_documents)
        bits = record["val_loss"] / math.log(2) * record["tokens"]
        assert record["val_bpb"] == pytest.approx(bits / record["bytes"], rel=1e-7)
        assert record["partial"] is False


def test_submission_has_the_fixed_schema_and_the_numbers_of_the_log(done: Done):
    report, last = submission(done.folder), metrics(done.folder, "final_sliding")[0]
    assert sorted(report) == sorted([
        "author", "date", "name", "track", "val_bpb", "val_bpb_std", "seeds", "artifact_bytes_max",
        "code_bytes", "source_sha256", "hardware", "versions", "previous", "compliant", "budget",
    ])  # fmt: skip
    assert sorted(report["seeds"]["1337"]) == sorted(
        ["val_bpb", "val_loss", "steps", "train_s", "eval_s", "artifact_bytes"]
    )
    assert list(report["seeds"]) == ["1337"]
    seed = report["seeds"]["1337"]
    assert report["val_bpb"] == seed["val_bpb"] == last["val_bpb"]
    assert seed["val_loss"] == last["val_loss"]
    end, ledger = metrics(done.folder, "train_end")[0], metrics(done.folder, "ledger")[0]
    assert (seed["steps"], seed["train_s"]) == (end["steps"], end["train_s"]) == (6, end["train_s"])
    assert seed["eval_s"] == report["budget"]["time"]["evaluation_s"] == ledger["evaluation_s"]
    assert report["budget"]["time"]["training_s"] == ledger["training_s"] == end["train_s"]
    assert report["author"] == "A. Golfer" and report["compliant"] is True
    verdicts = metrics(done.folder, "submission")
    assert verdicts == [{"event": "submission", "compliant": True, "reasons": "none"}]
    assert done.result.out.splitlines()[-1] == "submission compliant:True reasons:none"
    assert done.result.out.count("compliant") == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", report["date"])
    source_sha = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()
    assert report["source_sha256"] == metrics(done.folder, "versions")[0]["source_sha256"]
    assert report["source_sha256"] == source_sha


def test_counted_size_is_that_of_the_files_on_the_disk(done: Done):
    artifact = (done.folder / "artifact.bin").stat().st_size
    code = (done.folder / "train_gpt.py").stat().st_size
    report, size = submission(done.folder), metrics(done.folder, "size")[0]
    assert (size["artifact_bytes"], size["code_bytes"]) == (artifact, code)
    assert size["total_bytes"] == artifact + code
    assert report["artifact_bytes_max"] == report["seeds"]["1337"]["artifact_bytes"] == artifact
    assert report["code_bytes"] == code
    counted = dict(report["budget"]["bytes"])
    groups = counted.pop("groups")
    assert counted == {"total_bytes_max": artifact + code, "budget_bytes": 16_000_000}
    assert sum(groups.values()) == artifact
    logged = metrics(done.folder, "bytes")[0]
    assert groups == {name: logged[name] for name in groups}


def test_ledger_counts_every_stage_of_the_evaluation(done: Done):
    stages = {r["name"]: r for r in metrics(done.folder, "stage")}
    counted = [r["elapsed_s"] for r in stages.values() if r["budget"] == "evaluation"]
    ledger = metrics(done.folder, "ledger")[0]
    assert ledger["evaluation_s"] == pytest.approx(sum(counted), abs=2e-3)
    names = {name for name, r in stages.items() if r["budget"] == "evaluation"}
    assert names == {"read_artifact", "evaluate_quantized", "evaluate_sliding"}


def test_readable_source_and_packed_script_are_the_same_program(done: Done):
    assert (done.folder / "train_gpt_source.py").read_bytes() == SCRIPT.read_bytes()
    packed = (done.folder / "train_gpt.py").read_bytes()
    assert packed == train_gpt.pack_source(SCRIPT.read_text())
    assert len(packed) < 0.4 * SCRIPT.stat().st_size
    assert b'"""One' not in packed and b"# --- " not in packed


# --- The artifact in another place ---------------------------------------------------------------


@pytest.fixture
def shipped(done: Done, data: TinyData, work: Path) -> Path:
    """An empty folder with what a reviewer gets: packed script, artifact, tokenizer, val shard."""
    shutil.copy(done.folder / "train_gpt.py", work)
    shutil.copy(done.folder / "artifact.bin", work)
    shutil.copy(data.folder / "tokenizer.model", work)
    shutil.copy(data.folder / "tiny_val_000000.bin", work)
    return work


EVALUATE = {
    "MODE": "eval", "ARTIFACT": "artifact.bin", "DATA_PATH": ".", "RUN_DIR": "again",
    "VAL_BATCH_SIZE": "512", "EVAL_STRIDE": "16", "COMPILE": "0", "PRECISION": "fp32",
}  # fmt: skip


def base_environment() -> dict[str, str]:
    """What every process needs and no knob."""
    return environment(train_gpt.Config())


def final_scores(folder: Path) -> dict[str, tuple[float, float]]:
    events = ("final_quantized", "final_sliding")
    records = {event: metrics(folder, event)[-1] for event in events}
    return {event: (r["val_loss"], r["val_bpb"]) for event, r in records.items()}


@pytest.mark.slow
def test_packed_script_alone_scores_the_artifact_to_the_same_bits(done: Done, shipped: Path):
    env = {**base_environment(), **EVALUATE, "VOCAB_SIZE": str(VOCAB_SIZE)}
    result = python_process(["train_gpt.py"], env, shipped)
    assert result.status == 0, result.err
    assert final_scores(shipped / "again") == final_scores(done.folder)
    assert not [event for event, _ in log_events(result.out) if event == "step"]
    assert metrics(shipped / "again", "size") == metrics(done.folder, "size")


DEFAULT_EXPORT = {  # the script's own defaults, which tiny_config replaces by plainer ones
    name: getattr(train_gpt.Config(), name)
    for name in ("quantizer", "quant_grid", "row_steps", "gate_bits", "compressor")
}
OTHER_EXPORTS: dict[str, dict[str, Any]] = {
    "default": {},
    "seed": {
        "quant_grid": "uniform", "clip_sigmas": "12.85", "attn_bits": 6, "mlp_bits": 6,
        "compressor": "brotli_shuffled", "gate_bits": 16,
        "num_layers": 3, "num_loops": 1, "loop_start": 1, "loop_end": 1, "attn_gate": "head",
    },
}  # fmt: skip


@pytest.mark.parametrize("export", [pytest.param(e, marks=pytest.mark.slow) for e in OTHER_EXPORTS])
def test_what_any_export_wrote_scores_to_the_same_bits_without_training_data(
    export: str, data: TinyData, tmp_path: Path
):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    knobs = {"gptq_calibration_batches": 2, **DEFAULT_EXPORT, **OTHER_EXPORTS[export]}
    result = run_script(run_environment(data, **knobs), first)
    assert result.status == 0, result.err
    done = first / "run"
    for path in (done / "train_gpt.py", done / "artifact.bin", data.folder / "tokenizer.model",
                 data.folder / "tiny_val_000000.bin"):  # fmt: skip
        shutil.copy(path, second)
    assert not list(second.glob("*_train_*"))
    result = run_script({**base_environment(), **EVALUATE}, second, second / "train_gpt.py")
    assert result.status == 0, result.err
    assert final_scores(second / "again") == final_scores(done)
    quantized, before = metrics(done, "final_quantized")[0], metrics(done, "final_prequant")[0]
    assert quantized["val_loss"] == pytest.approx(before["val_loss"], rel=0.02)
    events = [event for event, _ in log_events(result.out)]
    assert not {"step", "calibrated", "quantized"} & set(events)


@pytest.mark.slow
def test_artifact_alone_says_what_shape_its_model_has(done: Done, shipped: Path):
    result = run_script({**base_environment(), **EVALUATE}, shipped, shipped / "train_gpt.py")
    assert result.status == 0, result.err
    assert final_scores(shipped / "again") == final_scores(done.folder)


def test_two_stages_in_two_processes_give_what_one_gave(done: Done, work: Path):
    result = run_script({**done.env, "MODE": "train"}, work)
    assert result.status == 0, result.err
    folder = work / "run"
    assert (folder / "artifact.bin").read_bytes() == (done.folder / "artifact.bin").read_bytes()
    assert not (folder / "submission.json").exists()
    assert [event for event, *_ in log_events(result.out)[-2:]] == ["size", "ledger"]
    result = run_script({**done.env, "MODE": "eval"}, work)
    assert result.status == 0, result.err
    assert final_scores(folder) == final_scores(done.folder)


def test_packed_script_trains_to_the_same_artifact_and_score(done: Done, work: Path):
    shutil.copy(done.folder / "train_gpt.py", work)
    result = run_script(done.env, work, work / "train_gpt.py")
    assert result.status == 0, result.err
    for name in ("artifact.bin", "train_gpt.py"):
        assert (work / "run" / name).read_bytes() == (done.folder / name).read_bytes(), name
    assert final_scores(work / "run") == final_scores(done.folder)
    assert submission(work / "run")["val_bpb"] == submission(done.folder)["val_bpb"]


@pytest.mark.parametrize("length", [pytest.param(16, marks=pytest.mark.slow), 64])
def test_artifact_can_be_scored_with_another_context_than_it_was_trained_with(
    done: Done, shipped: Path, length
):
    env = {**base_environment(), **EVALUATE, "VOCAB_SIZE": str(VOCAB_SIZE)}
    result = run_script(
        {**env, "EVAL_SEQ_LEN": str(length), "TTT_METHOD": "none"},
        shipped,
        shipped / "train_gpt.py",
    )
    assert result.status == 0, result.err
    again, before = final_scores(shipped / "again"), final_scores(done.folder)
    for event, (loss, _) in again.items():
        assert loss != before[event][0] and loss == pytest.approx(before[event][0], rel=0.1)


def test_artifact_of_another_tokenizer_is_refused(shipped: Path):
    other = train_tiny_tokenizer(make_documents(40, seed=9))
    (shipped / "tokenizer.model").write_bytes(other)
    env = {**base_environment(), **EVALUATE, "VOCAB_SIZE": str(VOCAB_SIZE)}
    assert_refused(
        run_script(env, shipped, shipped / "train_gpt.py"),
        "cannot use the artifact artifact.bin: it was trained with another tokenizer",
    )


def test_damaged_artifact_is_refused(shipped: Path):
    payload = (shipped / "artifact.bin").read_bytes()
    (shipped / "artifact.bin").write_bytes(payload[:-100])
    env = {**base_environment(), **EVALUATE, "VOCAB_SIZE": str(VOCAB_SIZE)}
    assert_refused(
        run_script(env, shipped, shipped / "train_gpt.py"), "cannot use the artifact artifact.bin"
    )


@pytest.mark.parametrize(
    "head",
    [
        zlib.compress(b"7"),
        *(pytest.param(zlib.compress(x), marks=pytest.mark.slow) for x in (b"[]", b"{}")),
    ],
)
def test_artifact_with_a_strange_header_is_refused_without_a_traceback(shipped: Path, head: bytes):
    start = struct.pack("<8sHI", b"PGOLFART", 2, len(head)) + head
    (shipped / "artifact.bin").write_bytes(start + hashlib.sha256(start).digest())
    env = {**base_environment(), **EVALUATE, "VOCAB_SIZE": str(VOCAB_SIZE)}
    assert_refused(
        run_script(env, shipped, shipped / "train_gpt.py"), "cannot use the artifact artifact.bin"
    )


def test_missing_artifact_is_refused(shipped: Path):
    (shipped / "artifact.bin").unlink()
    env = {**base_environment(), **EVALUATE, "VOCAB_SIZE": str(VOCAB_SIZE)}
    assert_refused(run_script(env, shipped, shipped / "train_gpt.py"), "artifact.bin")


# --- Refusals: status 2, one message, nothing trained --------------------------------------------


def assert_refused(result: Result, *texts: str, lines: int | None = 1) -> None:
    """Status 2 and one message, without a traceback, that has all of `texts`."""
    assert result.status == 2, result.out + result.err
    assert result.err.startswith("InputError: ") and "Traceback" not in result.err
    assert result.err.count("Error") == 1, result.err
    assert lines is None or len(result.err.splitlines()) == lines, result.err
    for text in texts:
        assert text in result.err
    assert "step " not in result.out


def test_bad_environment_ends_with_all_problems_in_one_message(work: Path):
    env = {
        **base_environment(), "NUM_LAYER": "3", "MUON_LRS": "1", "MATRIX_LR": "fast",
        "MAX_WALLCLOCK_SECONDS": "-1", "MODE": "dance", "XSA_LAST_N": "20", "SEED": "1e3",
    }  # fmt: skip
    result = run_script(env, work)
    assert_refused(result, lines=8)
    problems = sorted(line.strip() for line in result.err.splitlines()[1:])
    assert problems[0].startswith("MATRIX_LR='fast' is not a valid float")
    assert problems[1].startswith("MAX_WALLCLOCK_SECONDS=-1.0 must be in [0, 1000000000]")
    assert problems[2].startswith("MODE='dance' must be one of all, train, eval, describe")
    assert problems[3] == "MUON_LRS is not a knob; use MATRIX_LR"
    assert problems[4] == "NUM_LAYER is not a knob; did you mean NUM_LAYERS?"
    assert problems[5].startswith("SEED='1e3' is not a valid int")
    assert problems[6] == "XSA_LAST_N=20 must be at most NUM_LAYERS=11"
    assert list(work.iterdir()) == []  # refused before anything is written


def without(data: TinyData, work: Path, *patterns: str) -> Path:
    """A copy of the data set without some of its files."""
    folder = work / "data"
    shutil.copytree(data.folder, folder, ignore=shutil.ignore_patterns(*patterns))
    return folder


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_shards_are_named_with_the_command_that_makes_them(
    data: TinyData, work: Path, part
):
    folder = without(data, work, f"*_{part}_*.bin")
    result = run_script(run_environment(data, data_path=str(folder)), work)
    assert_refused(result, f"DATA_PATH={folder} holds no *_{part}_*.bin", "data/prepare.py")


def test_missing_data_set_is_named(data: TinyData, work: Path):
    result = run_script(run_environment(data, data_path="nowhere"), work)
    assert_refused(result, "nowhere/tokenizer.model", "data/prepare.py")


def test_missing_tokenizer_is_named(data: TinyData, work: Path):
    folder = without(data, work, "tokenizer.model")
    result = run_script(run_environment(data, data_path=str(folder)), work)
    assert_refused(result, f"no tokenizer at {folder}/tokenizer.model", "TOKENIZER_PATH")
    result = run_script(run_environment(data, tokenizer_path="t.model"), work)
    assert_refused(result, "no tokenizer at t.model")


def test_file_that_is_no_tokenizer_is_refused(data: TinyData, work: Path):
    (work / "t.model").write_bytes(b"not a model")
    result = run_script(run_environment(data, tokenizer_path="t.model"), work)
    assert_refused(result, "t.model is not a SentencePiece model")


def test_tokenizer_of_another_size_is_refused_with_both_numbers(data: TinyData, work: Path):
    result = run_script(run_environment(data, vocab_size=500), work)
    assert_refused(result, f"VOCAB_SIZE=500 does not match the tokenizer's {VOCAB_SIZE}")


def test_tokenizer_of_another_size_is_refused_with_a_byte_sidecar_too(data: TinyData, work: Path):
    folder = without(data, work)
    shutil.copy(data.folder / "tiny_val_000000.bin", folder / "tiny_val_bytes_000000.bin")
    result = run_script(run_environment(data, data_path=str(folder), vocab_size=500), work)
    assert_refused(result, f"VOCAB_SIZE=500 does not match the tokenizer's {VOCAB_SIZE}")


def test_tokenizer_without_a_piece_for_the_space_is_refused(data: TinyData, work: Path):
    texts = ["".join(text.split()) for text in make_documents(60, seed=3)]
    model = train_tiny_tokenizer(
        texts, required_chars="", remove_extra_whitespaces=True, vocab_size=VOCAB_SIZE
    )
    (work / "t.model").write_bytes(model)
    result = run_script(run_environment(data, tokenizer_path="t.model"), work)
    assert_refused(result, "no piece for a single space", "data/prepare.py")


def test_shards_of_a_larger_vocabulary_are_refused(data: TinyData, work: Path):
    folder = without(data, work)
    train = next(folder.glob("*_train_000000.bin"))
    payload = bytearray(train.read_bytes())
    payload[1024:] = b"\xf4\x01" * ((len(payload) - 1024) // 2)  # ids 500
    train.write_bytes(payload)
    result = run_script(run_environment(data, data_path=str(folder), loader="shuffled"), work)
    assert_refused(result, "token id 500", f"VOCAB_SIZE={VOCAB_SIZE}", "another tokenizer")


def test_missing_compressor_package_is_refused_before_the_training(data: TinyData, work: Path):
    (work / "zstandard.py").write_text("raise ImportError('No module named zstandard')")
    env = {**run_environment(data, compressor="zstd"), "PYTHONPATH": str(work)}
    result = run_script(env, work)
    assert_refused(result, "COMPRESSOR=zstd", "zstandard", "requirements.txt")
    assert not (work / "run" / "train.log").exists()


def test_batch_that_does_not_divide_is_refused_with_the_numbers(data: TinyData, work: Path):
    env = {**run_environment(data), "TRAIN_BATCH_TOKENS": "250"}
    result = run_script(env, work)
    assert_refused(result, "TRAIN_BATCH_TOKENS=250", "TRAIN_SEQ_LEN=32", lines=2)


# --- Failures: status 1 --------------------------------------------------------------------------


def assert_failed(result: Result, *texts: str) -> None:
    """Status 1 and one line on stderr that has all of `texts`."""
    assert result.status == 1, result.out + result.err
    assert len(result.err.splitlines()) == 1 and result.err.startswith("RunFailed: "), result.err
    for text in texts:
        assert text in result.err


@pytest.fixture
def trained(done: Done, work: Path) -> Path:
    """The finished run as it was when the artifact had been written, in `work`."""
    shutil.copytree(done.folder, work / "run", ignore=shutil.ignore_patterns("submission.json"))
    return work / "run"


def test_artifact_over_its_budget_fails_the_run(done: Done, trained: Path):
    total = submission(done.folder)["budget"]["bytes"]["total_bytes_max"]
    for budget_bytes in (total - 1, total):
        env = {**done.env, "ARTIFACT_BUDGET_BYTES": str(budget_bytes)}
        result = run_script(env, trained.parent)
        if budget_bytes == total:
            assert result.status == 0, result.err
        else:
            assert_failed(result, f"{total} bytes", f"ARTIFACT_BUDGET_BYTES={budget_bytes}")
            assert not (trained / "submission.json").exists()


@pytest.mark.parametrize("margin, status", [(-1e-6, 1), (1e-6, 0)])
def test_score_above_the_target_fails_the_run(done: Done, trained: Path, margin, status):
    target = submission(done.folder)["val_bpb"] + margin
    result = run_script({**done.env, "TARGET_VAL_BPB": f"{target:.8f}"}, trained.parent)
    assert result.status == status, result.err
    if status:
        assert_failed(result, f"above TARGET_VAL_BPB={target:.8f}")


def test_evaluation_over_its_time_fails_the_run_and_is_not_called_compliant(
    done: Done, trained: Path
):
    result = run_script({**done.env, "EVAL_MAX_SECONDS": "0.001"}, trained.parent)
    assert_failed(result, "EVAL_MAX_SECONDS=0.001 is too short for disjoint windows: abandoned")
    assert not (trained / "submission.json").exists() or not submission(trained)["compliant"]


def test_an_artifact_scored_elsewhere_is_not_called_compliant(done: Done, shipped: Path):
    diverging = {"TTT_METHOD": "lora", "TTT_LORA_LR": "1e30", "TTT_CHUNK_SIZE": "4"}
    env = {**base_environment(), **EVALUATE, "VOCAB_SIZE": str(VOCAB_SIZE), **diverging}
    result = run_script(env, shipped)
    assert result.status == 0, result.err
    report, last = submission(shipped / "again"), metrics(shipped / "again", "submission")[-1]
    assert report["compliant"] is last["compliant"] is False
    assert last["reasons"] == "RUN_DIR does not hold the training of the artifact"
    assert report["val_bpb"] == submission(done.folder)["val_bpb"]
    (seed,) = report["seeds"].values()
    assert "the loss is nan; lower the learning rates" in seed["skipped"]


# --- MODE=describe -------------------------------------------------------------------------------


def describe(knobs: Mapping[str, str], work: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Lines of the configuration and the events that MODE=describe prints."""
    result = run_script({**base_environment(), **knobs, "MODE": "describe"}, work)
    assert result.status == 0 and result.err == "", result.err
    knobs_shown, _, rest = result.out.partition("\n\n")
    events = [parse_line(line) for line in rest.splitlines() if not line.startswith("plan ")]
    return knobs_shown.splitlines(), dict(events)


@pytest.mark.parametrize("rank", [{}, {"RANK": ""}])
def test_describe_needs_no_data_and_writes_nothing(rank: dict[str, str], work: Path):
    shown, events = describe({"NUM_LAYERS": "12", **rank}, work)
    assert list(work.iterdir()) == []
    assert [line for line in shown if line.startswith("*")] == [
        "* MODE=describe",
        "* NUM_LAYERS=12",
    ]
    assert len(shown) == len(train_gpt.Config.__dataclass_fields__)
    assert {"model", "groups"} <= set(events)


def test_describe_counts_the_parameters_of_the_default_model(work: Path):
    _, events = describe({}, work)
    assert events["model"]["params"] == "35945673"  # PR #2135's, with two caps
    assert sum(int(n) for n in events["groups"].values()) == 35_945_673
    block = 2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 2048
    matrices = 17 * block + 8192 * 512  # 11 blocks, 3 of them three times; tied head
    assert events["flops_per_token"]["matrices"] == str(6 * matrices)
    sizes = {name: float(value) for name, value in events["bytes_before_compression"].items()}
    assert sizes["bits_per_weight"] == pytest.approx(8 * sizes["weights"] / 35_945_673, abs=1e-3)
    assert sizes["weights"] + sizes["code"] == sizes["budget"]


# --- Dangers -------------------------------------------------------------------------------------


def test_run_dir_that_holds_the_running_script_does_not_lose_the_script(data: TinyData, work: Path):
    script = work / "train_gpt.py"
    shutil.copy(SCRIPT, script)
    run_script(run_environment(data, run_dir=".", mode="train", iterations=1), work, script)
    assert script.read_bytes() == SCRIPT.read_bytes()


# --- Compilation ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_and_plain_runs_agree(data: TinyData, done: Done, tmp_path: Path):
    # Fused kernels round differently; Adam's first steps turn rounding into steps of size lr.
    work = tmp_path / "compiled"
    work.mkdir()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    result = python_process(
        [str(SCRIPT)], {**run_environment(data, compile=True), **cache}, work, timeout_s=600
    )
    assert result.status == 0, result.err
    assert metrics(work / "run", "run")[0]["compile"] is True
    for event in ("step", "val", *FINAL):
        for compiled, plain in zip(
            metrics(work / "run", event), metrics(done.folder, event), strict=True
        ):
            key = "train_loss" if event == "step" else "val_loss"
            assert compiled[key] == pytest.approx(plain[key], rel=5e-3), event
    first = metrics(work / "run", "step")[0], metrics(done.folder, "step")[0]
    assert first[0]["train_loss"] == pytest.approx(first[1]["train_loss"], rel=1e-5)
