"""The records tool: reads logs, computes submission.json, writes records, tables and the demo."""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from matplotlib.text import Text

import train_gpt
from records import ROOT, check, compressors, demo, pages, plots, tables
from records.check import check_record
from records.compressors import measure_yardsticks, validation_text
from records.logs import RunLog, run_settings
from records.markdown import replace_marked
from records.records import main
from records.results import read_results
from records.significance import paired_p, welch_p
from records.submission import DESCRIBED, compute_submission
from tests.conftest import plain_config
from tests.processes import wait_until
from tests.record_data import (
    BPB,
    CODE_BYTES,
    SOURCE,
    Event,
    final_events,
    metrics_text,
    run_events,
    score,
    setup_events,
    step_event,
    write_run,
    write_runs,
)

plots.STYLE["figure.dpi"] = 40  # small pictures are drawn faster
SLOW_MACHINE_S = 600  # what a process may need to start on a machine that does other work


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Runs that a test may edit."""
    return write_runs(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record folder, as `build` makes it from the runs; not to be edited."""
    folder = tmp_path_factory.mktemp("built")
    out = folder / "records/track_10min_16mb/2026-01-03_Try"
    runs = map(str, write_runs(folder))
    assert main(["build", str(out), *runs, "--records", f"{folder}/records"]) == 0
    return out


@pytest.fixture
def record(tmp_path: Path, built: Path) -> Path:
    """A copy of the record folder that a test may edit."""
    out = tmp_path / "records/track_10min_16mb/2026-01-03_Try"
    return shutil.copytree(built, out)


def problems_of(record: Path) -> str:
    """What `check` says about a record."""
    return "\n".join(check_record(record, record.parent.parent).problems)


# --- Reading logs --------------------------------------------------------------------------------


def test_of_events_that_repeat_after_a_resume_the_last_counts(tmp_path: Path) -> None:
    events = [
        step_event(1, 7.0),
        step_event(2, 6.0),
        step_event(3, 9.9),
        step_event(2, 5.5),
        step_event(3, 5.0),
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    log = RunLog.read(path)
    assert [(e["step"], e["train_loss"]) for e in log.by_step("step")] == [(1, 7), (2, 5.5), (3, 5)]
    assert log.last("step")["train_loss"] == 5.0


def test_a_line_cut_by_a_kill_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(step_event(n, 5.0)) for n in (1, 2, 3)]
    path.write_text(f"{whole[0]}\n{whole[1][:20]}{whole[1]}\n{whole[2]}\n{whole[0][:9]}")
    assert [event["step"] for event in RunLog.read(path).events] == [1, 2, 3]


def read(folder: Path, events: list[Event]) -> RunLog:
    """Return the log of these events, through a file."""
    path = folder / "metrics.jsonl"
    path.write_text(metrics_text(events))
    return RunLog.read(path)


def session(mode: str, scores: dict[str, float], **changes: Any) -> list[Event]:
    """Return the events of one more start of the script in the folder of run_events(1, ...)."""
    ends = final_events(1, scores) if scores else []
    return [*setup_events(1, mode=mode, **changes), *ends]


def test_a_later_evaluation_decides_score_and_evaluation_knobs(tmp_path: Path) -> None:
    """Model and training stay those of the training, whatever the later environment says."""
    trained = run_events(1, 1.3, ttt_method="none", eval_stride=64)
    later = session("eval", {"quantized": 1.325, "ttt": 1.21}, ttt_method="lora", eval_stride=0)
    later[0]["values"]["MODEL_DIM"] = 9999  # MODE=eval reads the model from the artifact
    log = read(tmp_path, [*trained, *later])
    assert (log.score["event"], log.score["val_bpb"]) == ("final_ttt", 1.21)
    values = log.config["values"]
    assert (values["TTT_METHOD"], values["EVAL_STRIDE"], values["MODEL_DIM"]) == ("lora", 0, 256)
    assert log.last("final_sliding") == {}
    assert log.need("train_end")["steps"] == 400


def test_a_score_without_adaptation_is_not_replaced_by_an_earlier_one_with_it(
    tmp_path: Path,
) -> None:
    trained = [*run_events(1, 1.3)[:-1], {"event": "final_ttt", **score(1.2)}, run_events(1, 1)[-1]]
    assert read(tmp_path, trained).score["val_bpb"] == 1.2
    later = session("eval", {"quantized": 1.325, "sliding": 1.3}, ttt_method="none")
    assert read(tmp_path, [*trained, *later]).score["event"] == "final_sliding"


@pytest.mark.parametrize("scores", [{}, {"quantized": 1.1}])
def test_an_audit_and_a_killed_evaluation_change_nothing(
    tmp_path: Path, scores: dict[str, float]
) -> None:
    trained = run_events(1, 1.3, ttt_method="none")
    before = read(tmp_path, trained)
    later = session("eval", scores, ttt_method="chunk", eval_stride=7)
    if not scores:  # an older script's audit
        later = [
            {**e, "values": {**e["values"], "MODE": "audit"}} if "values" in e else e for e in later
        ]
    after = read(tmp_path, [*trained, *(e for e in later if e["event"] != "ledger")])
    assert after.score == before.score and after.config == before.config
    assert run_settings(after) == run_settings(before)


def test_a_resumed_run_has_the_settings_of_the_session_that_scored(tmp_path: Path) -> None:
    """A continuation may change the byte budget, which is then the one that counts."""
    events = run_events(1, 1.3)
    place = next(i for i, event in enumerate(events) if event["event"] == "train_end")
    changes = dict(artifact_budget_bytes=15_000_000)
    log = read(tmp_path, [*events[:place], *setup_events(1, **changes), *events[place:]])
    assert log.config["values"]["ARTIFACT_BUDGET_BYTES"] == 15_000_000
    assert len(log.by_step("step")) == 101 and log.score["val_bpb"] == 1.3


TRAIN: Event = {"event": "begin", "name": "train"}


@pytest.mark.parametrize(("resumed", "kept"), [(None, []), (60, [40]), (100, [40, 80])], ids=str)
def test_steps_of_a_discarded_training_do_not_count(
    resumed: int | None, kept: list[int], tmp_path: Path
) -> None:
    """A restart with RESUME=0, or from a checkpoint, takes the steps after it again."""
    events = run_events(1, 1.3)
    place = next(i for i, event in enumerate(events) if event["event"] == "step")
    earlier: list[Event] = [TRAIN, *(step_event(n, 9.9) for n in (40, 80, 444)),
                            {"event": "checkpoint", "step": 100}]  # fmt: skip
    start: list[Event] = [{"event": "resume", "step": resumed}] if resumed else []
    log = read(tmp_path, [*events[:place], *earlier, *setup_events(1), *start, TRAIN,
                          *events[place:]])  # fmt: skip
    old = [e["step"] for e in log.all("step") if e["train_loss"] == 9.9]
    new = {e["step"] for e in events if e["event"] == "step"}
    assert old == kept and {e["step"] for e in log.by_step("step")} == {*kept, *new}
    assert log.last("step")["step"] == 400


@pytest.mark.parametrize(
    ("error", "status"), [(train_gpt.Interrupted("stopped"), 130), (train_gpt.RunFailed("x"), 1)]
)
def test_a_mode_of_the_script_that_ends_in_a_command_ends_it(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_demo() -> None:
        raise error

    monkeypatch.setattr("records.records.run_demo", run_demo)
    assert main(["demo"]) == status


WRONG_TYPES: list[tuple[Event, str]] = [
    ({"event": "resume", "step": "3"}, "step is '3', not a count"),
    ({"event": "checkpoint", "step": -3}, "step is -3, not a count"),
    ({"event": "step", "step": "3", "train_loss": 2.0}, "step is '3', not a count"),
    ({"event": "step", "step": -1}, "step is -1, not a count"),
    ({"event": "step", "step": 10**400}, "not a count"),
    ({"event": "final_ttt", "val_bpb": [1.2]}, "val_bpb is [1.2], not a number"),
    ({"event": "final_ttt", "val_bpb": True}, "val_bpb is True, not a number"),
    ({"event": "final_ttt", "compliant": 1}, "compliant is 1, not a flag"),
    ({"event": "hardware", "name": None}, "name is None, not text"),
    ({"event": "ledger", "training_s": float("nan")}, "training_s is nan, not a number of 0"),
    ({"event": "versions", "torch": 2.13}, "torch is 2.13, not text"),
    ({"event": "bytes", "mlp_codes_bytes": "many"}, "mlp_codes_bytes is 'many', not a count"),
    ({"event": "config", "values": [], "changed": []}, "values is not an object"),
    ({"event": "config", "values": {"SEED": {}}, "changed": []}, "SEED has no value"),
    ({"event": "config", "values": {}, "changed": ["X"]}, "'X' has no value"),
]


@pytest.mark.parametrize(("event", "problem"), WRONG_TYPES)
@pytest.mark.parametrize("command", ["plot", "yardstick"])
def test_values_of_wrong_types_are_refused_with_file_line_and_key(
    command: str,
    event: Event,
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "metrics.jsonl").write_text(metrics_text([*run_events(1, 1.3)[:4], event]))
    assert main([command, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/metrics.jsonl:5: `{event['event']}` event: " in said and problem in said


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"event": "x", "y": ' + "9" * 5000 + "}", '{"event": 3}', "3", "null", "\x00"],
)
def test_a_line_that_is_no_event_is_skipped(line: str, tmp_path: Path) -> None:
    events = run_events(1, 1.3)
    (tmp_path / "metrics.jsonl").write_text(f"{metrics_text(events)}{line}\n")
    assert RunLog.read(tmp_path / "metrics.jsonl").all_events == events


@pytest.mark.parametrize("name", ["SEED", "TRACK", "DATA_PATH"])
def test_a_log_without_a_needed_knob_is_refused_by_its_name(
    name: str, tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    events = run_events(1, 1.3)
    del events[0]["values"][name]
    events[0]["changed"] = []
    (runs[0] / "metrics.jsonl").write_text(metrics_text(events))
    command = ["yardstick"] if name == "DATA_PATH" else ["build", f"{tmp_path}/out"]
    assert main([*command, str(runs[0])]) == 2
    assert f"event has no {name}" in capsys.readouterr().err


def test_the_reported_score_is_the_last_one_of_the_run(tmp_path: Path) -> None:
    events = run_events(1, 1.3)
    assert RunLog(tmp_path, events).score["event"] == "final_sliding"
    events.insert(-1, {"event": "final_ttt", **score(1.25)})
    assert RunLog(tmp_path, events).score["val_bpb"] == 1.25
    without = [e for e in events if e["event"] not in ("final_ttt", "final_sliding")]
    assert RunLog(tmp_path, without).score["event"] == "final_quantized"


def test_a_folder_without_metrics_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(tmp_path)]) == 2
    assert f"{tmp_path}/metrics.jsonl is missing" in capsys.readouterr().err


# --- Plot ----------------------------------------------------------------------------------------


PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize("cut", [0, 1, 6, None])
def test_a_plot_is_drawn_of_whatever_part_of_a_run_there_is(tmp_path: Path, cut: int) -> None:
    events = run_events(1, 1.3)
    events = events[1:] if cut is None else events[:cut] or events
    (tmp_path / "metrics.jsonl").write_text(metrics_text(events))
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "change", [{}, {"train_loss": float("nan")}, {"tokens": 5}, {"train_s": 0}]
)
def test_a_plot_is_drawn_of_losses_that_are_not_finite_and_clocks_that_stand(
    tmp_path: Path, change: Event
) -> None:
    events = [e | change if e["event"] == "step" else e for e in run_events(1, 1.3)]
    for event in events:
        if event["event"] == "final_sliding":
            event["val_bpb"] = float("inf")
    (tmp_path / "metrics.jsonl").write_text(metrics_text(events))
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def drawn_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets every text of the figures that are saved from now on."""
    texts: list[str] = []
    save_figure = plots.save_figure

    def save(figure: Any, path: Path) -> None:
        save_figure(figure, path)
        texts.extend(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(plots, "save_figure", save)
    return texts


def test_the_plot_of_a_run_shows_its_name_its_stages_and_the_compressors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = {"event": "yardstick", "xz_bpb": 1.7, "zstd_bpb": 1.8, "ppmd_bpb": 1.6}
    events = run_events(1, 1.3, submission_name="Named")
    (tmp_path / "metrics.jsonl").write_text(metrics_text([*events, mark]))
    texts = drawn_texts(monkeypatch)
    assert main(["plot", str(tmp_path)]) == 0
    assert any(text.startswith("Named:  4,123,456 parameters  |  ") for text in texts)
    for expected in ("quantized", "1.3250", "sliding window", "1.3000", "PPMd", "1.6000"):
        assert expected in texts
    assert "test-time training" not in texts


@pytest.mark.parametrize("num_runs", [2, 3, 19])
def test_several_runs_are_drawn_over_each_other_under_their_names(
    num_runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for i in range(num_runs):
        folder = tmp_path / f"run_{i}"
        folder.mkdir()
        events = run_events(i, 1.3 + i / 100, submission_name=f"System {i}")
        (folder / "metrics.jsonl").write_text(metrics_text(events))
        folders.append(str(folder))
    texts = drawn_texts(monkeypatch)
    assert main(["plot", *folders, "--out", f"{tmp_path}/all.png"]) == 0
    assert {f"System {i}" for i in range(num_runs)} <= {*texts}
    assert {"million tokens", "seconds of training", "bits per byte"} <= {*texts}
    if num_runs <= plots.MAX_LABELED_RUNS:
        assert {f"{1.3 + i / 100:.4f}" for i in range(num_runs)} <= {*texts}


@pytest.mark.parametrize(
    ("steps", "sizes", "shown_steps", "shown_bytes"),
    [
        ((500, 468), (999_100, 999_698), "(468 to 500 steps)", "  at most 999,698 bytes"),
        ((500, 500), (999_100, 999_100), "(500 steps)", "  999,100 bytes"),
    ],
)
def test_the_plot_of_several_seeds_names_the_steps_and_bytes_of_all(
    steps: tuple[int, int],
    sizes: tuple[int, int],
    shown_steps: str,
    shown_bytes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logs = []
    for seed, (count, size) in enumerate(zip(steps, sizes, strict=True)):
        events = run_events(seed, 1.3)
        for event in events:
            event |= {"train_end": {"steps": count}, "size": {"total_bytes": size}}.get(
                event["event"], {}
            )
        logs.append(RunLog(tmp_path, events))
    texts = drawn_texts(monkeypatch)
    plots.draw_plot(logs, tmp_path / "plot.png")
    assert f"million tokens {shown_steps}" in texts
    assert any("2 seeds  |" in text and shown_bytes in text for text in texts)


def test_runs_of_one_name_are_told_apart_and_records_can_be_drawn(
    record: Path, runs: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = plots.read_runs([record, record])
    assert [run.name for run in found[:2]] == [
        f"run_{seed}, {record.name}, seed {seed}" for seed in (1, 2)
    ]
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *map(str, runs)]) == 0
    assert (tmp_path / "runs.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$a^$b_{", "$a^$b_{"),
        pytest.param("$\\frac{$", "$\\frac{$", marks=pytest.mark.slow),
        pytest.param("new\nline\x00", "new\\nline\\x00", marks=pytest.mark.slow),
        ("caf\udce9", "caf\\udce9"),
        pytest.param("x" * 300, "x" * 45 + "...", marks=pytest.mark.slow),
        pytest.param("", "run", marks=pytest.mark.slow),
    ],
)
def test_any_name_can_be_drawn(
    name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for number in (1, 2):
        folder = tmp_path / str(number) / "run"
        folder.mkdir(parents=True)
        events = run_events(number, 1.3, submission_name=name)
        events[1]["run_id"] = ""
        (folder / "metrics.jsonl").write_text(metrics_text(events))
        folders.append(str(folder))
    out, texts = tmp_path / "out.png", drawn_texts(monkeypatch)
    assert main(["plot", folders[0]]) == 0 == main(["plot", *folders, "--out", str(out)])
    assert (Path(folders[0]) / "plot.png").read_bytes().startswith(PNG)
    assert out.read_bytes().startswith(PNG)
    assert any(text.startswith(f"{shown}:  ") for text in texts)


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert np.allclose(plots.smooth([3.0] * 50), 3.0)
    assert plots.smooth([5.0, *[1.0] * 60])[0] == pytest.approx(5.0)


# --- Yardstick -----------------------------------------------------------------------------------


def test_yardsticks_are_the_sizes_of_the_compressed_text() -> None:
    text = b"All work and no play makes Jack a dull boy. " * 300
    mark = measure_yardsticks(text)
    xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert mark["xz_bpb"] == round(8 * len(xz) / len(text), 6)
    assert 0 < mark["zstd_bpb"] < 1 and mark["text_bytes"] == len(text)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two documents with a tokenizer of its own, and its text."""
    folder = tmp_path_factory.mktemp("data")
    documents = ["The cat sat on the mat.\n" * 40, "  A second document,  with spaces.\n" * 30]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\u2581", "\n"], minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [i for text in documents for i in [1, *processor.encode(text)]]
    train_gpt.write_shard(folder / "x_val_000000.bin", np.array(ids))
    # As a decoder has it, the space that a document begins with belongs to no token.
    (folder / "expected.txt").write_text("".join(text.removeprefix(" ") for text in documents))
    return folder


def test_text_spelled_from_shards_is_the_text_whose_bytes_are_scored(data_path: Path) -> None:
    data = dataclasses.replace(train_gpt.Config(), data_path=str(data_path), vocab_size=300)
    text = validation_text(data)
    assert text == (data_path / "expected.txt").read_bytes()
    processor, _ = train_gpt.load_tokenizer(data)
    assert len(text) == train_gpt.load_validation(data, processor).target_bytes.sum()
    some = validation_text(dataclasses.replace(data, val_tokens_limit=20))
    assert text.startswith(some) and 0 < len(some) < len(text)


@pytest.mark.parametrize("at_once", [7, 64, 10**6])
def test_training_text_is_read_in_pieces(
    at_once: int, data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces join to the text of all training shards, however many tokens are read at once."""
    monkeypatch.setattr(compressors, "TOKENS_AT_ONCE", at_once)
    shutil.copytree(data_path, tmp_path / "set")
    for number in (0, 1):
        shutil.copy(data_path / "x_val_000000.bin", tmp_path / f"set/x_train_{number:06d}.bin")
    data = train_gpt.config_from_env({"DATA_PATH": f"{tmp_path}/set", "MODE": "describe"})
    pieces = [*compressors.training_text(data)]
    assert b"".join(pieces) == 2 * (data_path / "expected.txt").read_bytes()
    assert {*map(len, pieces[:-1])} == {compressors.PRIME_PIECE_BYTES}


def test_ppmd_is_what_its_decoder_gives_back() -> None:
    module = compressors.find_ppmd()
    text, prime = b"The cat sat on the mat. " * 200, b"A cat, a mat. " * 300
    encoder = module.Ppmd7Encoder(compressors.PPMD_ORDER, compressors.PPMD_MEMORY_BYTES)
    packed = encoder.encode(text) + encoder.flush()
    decoder = module.Ppmd7Decoder(compressors.PPMD_ORDER, compressors.PPMD_MEMORY_BYTES)
    assert decoder.decode(packed, len(text)) == text
    marks = compressors.measure_ppmd(text, [prime], 10**6)
    assert marks["ppmd_bpb"] == round(8 * len(packed) / len(text), 6)
    assert 0 < marks["ppmd_primed_bpb"] < marks["ppmd_bpb"] and marks["prime_bytes"] == len(prime)


@pytest.mark.parametrize("num_bytes", [2500, 10_000, 40_000])
def test_the_prime_compresses_into_the_bytes_of_the_artifact(num_bytes: int) -> None:
    """At most that many, and another piece would not fit for certain."""
    words = np.random.default_rng(0).integers(97, 105, 400_000, dtype=np.uint8).tobytes()
    size = compressors.PRIME_PIECE_BYTES
    pieces = [words[place : place + size] for place in range(0, len(words), size)]
    marks = compressors.measure_ppmd(b"x" * 5000, pieces, num_bytes)
    module = compressors.find_ppmd()
    encoder = module.Ppmd7Encoder(compressors.PPMD_ORDER, compressors.PPMD_MEMORY_BYTES)
    prime = words[: marks["prime_bytes"]]
    packed = len(encoder.encode(prime) + encoder.flush())
    assert num_bytes - 3 * size < packed <= num_bytes


def test_without_pyppmd_the_other_compressors_are_measured(
    tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    changes = dict(data_path=str(data_path), vocab_size=300)
    folder = write_run(tmp_path / "run", run_events(1, 1.3, **changes))
    assert main(["yardstick", str(folder)]) == 0
    assert "it needs the package pyppmd" in capsys.readouterr().out
    mark = RunLog.read(folder / "metrics.jsonl").last("yardstick")
    assert mark.keys() == {"event", "xz_bpb", "zstd_bpb", "text_bytes"}


def test_yardstick_of_a_run_joins_its_log_and_metrics(
    tmp_path: Path, data_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = dict(data_path=str(data_path), vocab_size=300)
    folder = write_run(tmp_path / "run", run_events(1, 1.3, **changes))
    (folder / "train.log").write_text("cut sho")
    assert main(["yardstick", str(folder)]) == 0
    assert "PPMd is not primed: " in capsys.readouterr().out  # there are no training shards
    text = (data_path / "expected.txt").read_bytes()
    expected = {**measure_yardsticks(text), **compressors.measure_ppmd(text)}
    mark = RunLog.read(folder / "metrics.jsonl").last("yardstick")
    assert mark == {"event": "yardstick", **expected}
    assert train_gpt.format_event(**mark) in (folder / "train.log").read_text().splitlines()
    shutil.copytree(data_path, tmp_path / "set")
    shutil.copy(data_path / "x_val_000000.bin", tmp_path / "set/x_train_000000.bin")
    changes["data_path"] = f"{tmp_path}/set"
    folder = write_run(tmp_path / "other", run_events(1, 1.3, **changes))
    assert main(["yardstick", str(folder)]) == 0
    mark = RunLog.read(folder / "metrics.jsonl").last("yardstick")
    assert mark["ppmd_primed_bpb"] < mark["ppmd_bpb"] and mark["prime_bytes"] == len(text)


# --- Submission ----------------------------------------------------------------------------------


def test_a_record_has_the_mean_and_the_sample_deviation_of_its_seeds(record: Path) -> None:
    submission = json.loads((record / "submission.json").read_bytes())
    assert submission["val_bpb"] == round(statistics.mean(BPB.values()), 8)
    assert submission["val_bpb_std"] == round(statistics.stdev(BPB.values()), 8)
    assert {seed: s["val_bpb"] for seed, s in submission["seeds"].items()} == {
        str(seed): bpb for seed, bpb in BPB.items()
    }


def test_budgets_are_compared_with_the_largest_run(record: Path) -> None:
    submission = json.loads((record / "submission.json").read_bytes())
    assert submission["artifact_bytes_max"] == 700_003
    assert submission["budget"]["bytes"]["total_bytes_max"] == 700_003 + CODE_BYTES
    groups = {"mlp_codes_bytes": 699_003, "frame_bytes": 1000}
    assert submission["budget"]["bytes"]["groups"] == groups
    assert submission["budget"]["time"]["evaluation_s"] == 12.25


def test_a_record_of_a_run_that_did_not_log_its_groups_of_bytes_is_as_good(tmp_path: Path) -> None:
    events = [event for event in run_events(1, 1.25) if event["event"] != "bytes"]
    log = RunLog.read(write_run(tmp_path / "old", events) / "metrics.jsonl")
    submission = compute_submission([log], dict.fromkeys(DESCRIBED, ""))
    assert submission["budget"]["bytes"].keys() == {"total_bytes_max", "budget_bytes"}


def test_name_and_date_come_from_the_folder_author_from_the_runs(record: Path) -> None:
    submission = json.loads((record / "submission.json").read_bytes())
    assert (submission["date"], submission["name"]) == ("2026-01-03", "Try")
    assert submission["author"] == "A. Author"


def test_one_run_has_no_deviation_and_one_partial_score_makes_a_record_noncompliant(
    tmp_path: Path,
) -> None:
    described = dict.fromkeys(DESCRIBED, "")
    log = RunLog(tmp_path, run_events(1, 1.3))
    assert compute_submission([log], described)["val_bpb_std"] == 0.0
    partial = [e if e["event"] != "final_sliding" else {**e, "compliant": False}
               for e in run_events(2, 1.3)]  # fmt: skip
    both = [log, RunLog(tmp_path, partial)]
    assert compute_submission(both, described)["compliant"] is False


@pytest.mark.parametrize(
    ("scores", "previous", "p"),
    [
        # t = sqrt(1.5), 4 degrees of freedom: closed form with s = 1 + t^2 / 4
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], 0.5 - 3 / 8 * (1.5 / 1.375) ** 0.5 * (1 - 1.5 / 16.5)),
        ([1.0, 2.0], [1.0, 2.0], 0.5),
        # t = sqrt(2), 2 degrees of freedom: (1 - t / sqrt(2 + t^2)) / 2
        ([0.0, 2.0], [2.0, 4.0], (1 - 0.5**0.5) / 2),
    ],
)
def test_welch_agrees_with_closed_forms(
    scores: list[float], previous: list[float], p: float
) -> None:
    assert welch_p(scores, previous) == pytest.approx(p, abs=1e-12)


def test_welch_is_undefined_for_single_runs_and_without_spread() -> None:
    assert welch_p([1.0], [2.0, 2.1]) is None
    assert welch_p([1.0, 1.0], [2.0, 2.0]) is None


def test_the_p_of_three_paired_gains_is_students():
    # t = mean / (std / sqrt(3)) = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom: for these
    # p = (1 - t / sqrt(t^2 + 2)) / 2.
    t = 2 * 3**0.5
    p = paired_p([1.0, 2.0, 3.0])
    assert p == pytest.approx((1 - t / (t * t + 2) ** 0.5) / 2, abs=1e-12)
    assert paired_p([1.0]) is None and paired_p([1.0, 1.0]) is None


def test_damaged_results_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "grid.jsonl"
    for line in ("{}", "[1]", '{"key": "a"', ""):
        path.write_text(f'{{"key": "b"}}\n{line}\n')
        with pytest.raises(train_gpt.InputError, match="grid.jsonl:2 is not a result"):
            read_results(path)


# --- Build and check -----------------------------------------------------------------------------


def test_a_record_holds_what_is_needed_to_check_and_to_repeat_it(record: Path) -> None:
    names = {path.name for path in record.iterdir()}
    logs = {f"{kind}_seed{seed}.{end}" for seed in BPB
            for kind, end in (("train", "log"), ("metrics", "jsonl"))}  # fmt: skip
    assert names == logs | {*check.RECORD_FILES, "train_gpt_source.py"}
    assert (record / "train_gpt_source.py").read_text() == SOURCE
    packed = (record / "train_gpt.py").read_bytes()
    assert packed == train_gpt.pack_source(SOURCE) and len(packed) == CODE_BYTES
    readme = (record / "README.md").read_text()
    assert "| 2 | 400 | 250.0 | 1.31000 | 1.31500 | 1.29000 | - | 700,002 |" in readme
    assert problems_of(record) == ""
    assert list(record.parent.iterdir()) == [record]


def test_run_env_holds_the_changed_knobs_with_their_meaning_and_gives_the_config_back(
    record: Path,
) -> None:
    text = (record / "run.env").read_text()
    assert "# number of distinct blocks\nNUM_LAYERS=6\n" in text
    assert "SEED" not in text
    cfg = train_gpt.config_from_env({"RECIPE": f"{record}/run.env"})
    assert dataclasses.replace(cfg, recipe="") == plain_config(num_layers=6, model_dim=256)


def test_the_yardstick_is_part_of_the_result(tmp_path: Path) -> None:
    mark = {"event": "yardstick", "xz_bpb": 1.7034, "zstd_bpb": 1.7312, "text_bytes": 10_000}
    folder = write_run(tmp_path / "run", [*run_events(1, 1.3), mark])
    assert main(["build", f"{tmp_path}/record", str(folder)]) == 0
    assert "xz -9e 1.7034, zstd" in (tmp_path / "record/README.md").read_text()


def test_a_record_names_the_one_before_and_its_significance(record: Path, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"better{s}", run_events(s, b - 0.1)) for s, b in BPB.items()]
    out, previous = record.parent / "2026-02-01_Better", "track_10min_16mb/2026-01-03_Try"
    where = ["--records", f"{tmp_path}/records", "--previous", previous]
    assert main(["build", str(out), *map(str, runs), *where]) == 0
    assert (
        "Previous record: 1.31000 (track_10min_16mb/2026-01-03_Try)"
        in (out / "README.md").read_text()
    )
    assert problems_of(out) == ""
    gone = [*where[:-1], "track_10min_16mb/gone"]
    assert main(["build", f"{out}_2", *map(str, runs), *gone]) == 2


def refused_build(tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which `build` refuses `runs`; no folder is left behind."""
    out = tmp_path / "refused/record"
    assert main(["build", str(out), *map(str, runs)]) == 2
    assert not out.parent.exists() or not list(out.parent.iterdir())
    return capsys.readouterr().err


def test_build_refuses_runs_that_differ_in_more_than_their_seed(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", run_events(9, 1.3, mlp_mult=3.0))
    assert "differ in knobs" in refused_build(tmp_path, [*runs, other], capsys)
    events = run_events(8, 1.3)
    events[3]["name"] = "another machine"
    other = write_run(tmp_path / "machine", events)
    assert "differ in hardware" in refused_build(tmp_path, [*runs, other], capsys)
    assert "the same seed" in refused_build(tmp_path, [*runs, runs[0]], capsys)


def test_build_refuses_a_run_whose_submission_is_not_that_of_its_log(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (runs[1] / "submission.json").read_text()
    (runs[1] / "submission.json").write_text(text.replace("1.29", "1.19"))
    assert "does not follow from its log" in refused_build(tmp_path, runs, capsys)


def test_build_refuses_an_unfinished_run_and_one_over_its_budget(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[0] / "submission.json").unlink()
    assert "the run did not finish" in refused_build(tmp_path, runs, capsys)
    events = run_events(1, 1.3)
    events[-1]["training_s"] = 600.5
    late = write_run(tmp_path / "late", events)
    assert "training_s 600.5 exceeds its budget" in refused_build(tmp_path, [late], capsys)


def test_build_never_overwrites(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert main(["build", f"{tmp_path}/there", str(runs[0])]) == 2
    assert "exists" in capsys.readouterr().err


# --- Tables --------------------------------------------------------------------------------------


def test_the_table_lists_every_track_with_the_best_first(record: Path, tmp_path: Path) -> None:
    better = write_run(tmp_path / "better", run_events(1, 1.2))
    where = ["--records", f"{tmp_path}/records"]
    assert main(["build", f"{record.parent}/2026-02-01_Better", str(better), *where]) == 0
    assert main(["table", *where]) == 0
    text = (tmp_path / "records/README.md").read_text()
    assert text.index("[Better](track_10min_16mb/2026-02-01_Better/README.md)") < text.index(
        "[Try]"
    )
    assert text.startswith("# Records") and "## track_10min_16mb" in text


def test_the_knob_table_has_one_row_a_knob_and_stands_between_its_marks() -> None:
    table = tables.knob_table()
    for f in dataclasses.fields(train_gpt.Config):
        assert table.count(f"| `{f.name.upper()}` |") == 1
    text = replace_marked("a\n<!-- knobs -->old<!-- /knobs -->\nb", "knobs", table)
    assert text == f"a\n<!-- knobs -->\n{table}\n<!-- /knobs -->\nb"
    with pytest.raises(train_gpt.InputError, match="marks"):
        replace_marked("no marks", "knobs", table)


def test_the_rules_of_a_record_name_things_that_exist() -> None:
    for name in re.findall(r"`(\w+)`", pages.RULES):
        assert hasattr(train_gpt, name), name


# --- Demo ----------------------------------------------------------------------------------------

FAKE_STAGE = """
import pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path("stopped").write_text("in order")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("started").touch()
while True:
    time.sleep(1)
"""


def test_a_stage_that_fails_ends_the_demo_with_its_exit_status() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(7)"]
    with pytest.raises(demo.StageFailed, match="the stage ended with exit status 7") as caught:
        demo.run_command(command, "the stage", os.environ)
    assert caught.value.status == 7


@pytest.mark.slow
def test_ctrl_c_ends_the_stage_in_order_and_leaves_nothing_running(tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(FAKE_STAGE)
    code = (
        "import os, pathlib, sys; from records import demo, records\n"
        f"demo.ROOT = pathlib.Path({str(tmp_path)!r})\n"
        f"demo.STOP_PATIENCE_S = {SLOW_MACHINE_S}\n"
        "stage = [sys.executable, 'stage.py']\n"
        "records.run_options = lambda _: demo.run_command(stage, 'x', os.environ)\n"
        "sys.exit(records.main(['demo']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_until(
        lambda: (tmp_path / "started").exists() or process.poll() is not None,
        SLOW_MACHINE_S,
        "the stage has not started",
    )
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SLOW_MACHINE_S)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    assert (tmp_path / "stopped").read_text() == "in order"


def test_the_demo_goes_through_its_stages_and_prints_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes and samples are stand-ins; the rest is real, `build` checks the record."""
    commands: list[str] = []
    samples: list[tuple[str, ...]] = []

    def run_mode(env: dict[str, str]) -> None:
        samples.append(tuple(env[name] for name in ("MODE", "PROMPT", "SEED", "RUN_DIR")))

    def run_command(command: list[str], what: str, env: dict[str, str]) -> None:
        commands.append(" ".join(command[1:]))
        if what == "train_gpt.py":
            write_run(Path(env["RUN_DIR"]), run_events(1, 1.3, data_path="data/demo"))
        else:
            (tmp_path / "data/demo").mkdir(parents=True)
            (tmp_path / "data/demo/val_text.bin").write_bytes(b"0123456789" * 1000)

    (tmp_path / "demo.env").write_text("DATA_PATH=data/demo\nMAX_WALLCLOCK_SECONDS=9\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    for module in (demo, pages):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "run_command", run_command)
    monkeypatch.setattr(train_gpt, "run_mode", run_mode)
    monkeypatch.setattr(demo, "scoring_speed", lambda cfg: math.inf)
    monkeypatch.setenv("RECIPE", str(tmp_path / "demo.env"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main(["demo"]) == 0
    assert commands == [demo.DEMO_COMMAND.removeprefix("python "), "train_gpt.py"]
    (folder,) = (tmp_path / "logs").iterdir()
    assert samples == [
        ("generate", prompt, str(seed), f"logs/{folder.name}")
        for seed, prompt in enumerate(demo.SAMPLE_PROMPTS)
    ]
    printed = capsys.readouterr().out
    for text in (
        "[1/6]",
        "[6/6]",
        "4,123,456",
        "1.3000",
        f"{700_001 + CODE_BYTES:,} of 16,000,000",
        "plot.png",
    ):
        assert text in printed
    assert (folder / "plot.png").exists() and (folder / "record/submission.json").exists()


def test_a_slow_machine_scores_a_part_of_the_text_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text('{"val": {"tokens": 200000}}')
    cfg = plain_config(data_path=str(tmp_path), val_batch_size=1000)
    for speed, limit in ((400.0, "16000"), (3.0, "1000"), (5000.0, None), (math.inf, None)):
        monkeypatch.setattr(demo, "scoring_speed", lambda _, speed=speed: speed)
        assert demo.limit_validation(cfg).get("VAL_TOKENS_LIMIT") == limit
        assert ("validation tokens" in capsys.readouterr().out) == (limit is not None)
    own = dataclasses.replace(cfg, val_tokens_limit=7)
    assert demo.limit_validation(own) == {}


def test_recipes_of_the_demo_are_valid_and_use_its_corpus() -> None:
    for name in ("cpu", "gpu"):
        cfg = train_gpt.config_from_env({"RECIPE": f"{ROOT}/records/demo/{name}.env"})
        assert cfg.data_path == demo.DEMO_DATA, name


def test_validation_losses_of_a_sample_are_not_joined_by_the_one_of_the_whole_text(
    tmp_path: Path,
) -> None:
    events = run_events(1, 1.3)
    for name, vals in (("whole", False), ("sample", True)):
        own = [{**e, "partial": vals} if e["event"] == "val" else e for e in events]
        log = RunLog.read(write_run(tmp_path / name, own) / "metrics.jsonl")
        points = plots.validation_points(log, [*log.by_step("step")], "tokens")
        assert len(points) == 3 + (name == "whole")
