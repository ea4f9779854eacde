"""`records.py check` and `build`: what they refuse, and what they say they cannot prove."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_gpt
from records import ROOT, check, plots
from records.check import check_code_size, check_record, packer_of
from records.logs import FINAL_SCORES, RunLog, run_settings, source_file
from records.pages import HEADINGS, format_result
from records.records import main
from records.rescore import adjusted_knobs, compare_scores
from records.submission import DESCRIBED, TRACK_LIMITS, compute_submission
from records.tables import find_records
from tests.conftest import TinyData, environment, tiny_config
from tests.processes import run_script
from tests.record_data import (
    CODE_BYTES,
    NUM_BYTES,
    SOURCE,
    TOKENS,
    Event,
    final_events,
    log_text,
    metrics_text,
    run_events,
    setup_events,
    write_run,
    write_runs,
)

plots.STYLE["figure.dpi"] = 40  # small pictures are drawn faster
TRACK, NAME = "track_10min_16mb", "2026-01-03_Try"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of three seeds, as `build` makes it; not to be edited."""
    folder = tmp_path_factory.mktemp("built")
    out = folder / "records" / TRACK / NAME
    runs = map(str, write_runs(folder))
    assert main(["build", str(out), *runs, "--records", f"{folder}/records"]) == 0
    return out


@pytest.fixture
def record(tmp_path: Path, built: Path) -> Path:
    """A copy of the record that a test may edit."""
    return shutil.copytree(built, tmp_path / "records" / TRACK / NAME)


def problems_of(record: Path) -> str:
    """Return what `check` finds wrong with a record."""
    return "\n".join(check_record(record, record.parent.parent).problems)


# --- Edited files --------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], object]
EDITS: dict[str, tuple[Edit, str]] = {
    "score": (lambda s: s.update(val_bpb=1.0), "val_bpb is 1.0, the logs give 1.31"),
    "seed": (lambda s: s["seeds"]["2"].update(steps=399), "seeds.2.steps is 399"),
    "type": (lambda s: s.update(code_bytes=True), "code_bytes is True, the logs give"),
    "missing": (lambda s: s.pop("code_bytes"), "code_bytes is missing"),
    "missing seed": (lambda s: s["seeds"].pop("1"), "seeds.1 is missing"),
    "unknown": (lambda s: s.update(note="x"), "note is an unknown key"),
    "unknown deep": (lambda s: s["budget"]["time"].update(x=1), "budget.time.x is an unknown key"),
    "date": (lambda s: s.update(date="yesterday"), "not YYYY-MM-DD"),
    "name": (lambda s: s.update(name="Other"), "is not named after date and name"),
    "previous": (lambda s: s.update(previous="track_x/y"), "has no submission.json"),
    "previous outside": (lambda s: s.update(previous="../../etc"), "has no submission.json"),
    "author": (lambda s: s.update(author=3), "author is 3, not one line of text"),
    "two lines": (lambda s: s.update(author="a\nb"), "author is 'a\\nb', not one line of text"),
    "compliant": (lambda s: s.update(compliant=1), "compliant is not true or false"),
    "no number": (lambda s: s.update(val_bpb="1.2"), "val_bpb is '1.2', not a number"),
    "huge number": (lambda s: s.update(val_bpb=10**400), "not a number"),
    "no object": (lambda s: s.update(budget=[1]), "budget is [1], not an object"),
    "no seeds": (lambda s: s.update(seeds=[]), "seeds is not an object of runs"),
    "bad seed": (lambda s: s["seeds"].update({"2": 5}), "seeds.'2' is 5, not an object"),
    "github": (lambda s: s.update(github_id=7), "github_id is 7, not one line of text"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_check_refuses_an_edited_submission(record: Path, edit: str) -> None:
    change, message = EDITS[edit]
    path = record / "submission.json"
    submission = json.loads(path.read_bytes())
    change(submission)
    path.write_text(json.dumps(submission))
    assert message in problems_of(record)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "[" * 100_000, "\ufeff{}"])
@pytest.mark.parametrize("command", ["check", "table"])
def test_a_submission_that_is_no_json_object_is_refused(
    command: str, text: str, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (record / "submission.json").write_text(text, encoding="utf-8")
    records = record.parent.parent
    arguments = ["check", str(record)] if command == "check" else ["table"]
    assert main([*arguments, "--records", str(records)]) == (1 if command == "check" else 2)
    captured = capsys.readouterr()
    assert f"{record}/submission.json" in captured.out + captured.err


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("metrics_seed2.jsonl", '"val_bpb": 1.29,', '"val_bpb": 1.19,', "the logs give"),
        ("metrics_seed2.jsonl", '"lr_scale": 1.0', '"lr_scale": 0.5', "has nothing like"),
        (
            "train_seed2.log",
            "val_bpb:1.29 ",
            "val_bpb:1.19 ",
            "metrics_seed2.jsonl has nothing like `final_sliding",
        ),
        ("train_seed2.log", "config * NUM_LAYERS:6", "config * NUM_LAYERS:7", "has no line"),
        ("train_seed2.log", "class Config", "class Other", "does not contain the source"),
        ("train_gpt_source.py", "ran", "did not run", "is not the source"),
        ("run.env", "NUM_LAYERS=6", "NUM_LAYERS=7", "is not the setting of metrics_seed1"),
        ("run.env", "NUM_LAYERS=6\n", "", "is not the setting of metrics_seed1"),
        ("README.md", "1.29000", "1.19000", "another Result"),
        ("README.md", "## Limits", "## Limitations", "the fixed ones are"),
        ("README.md", "## Limits", "\n" * 120 + "## Limits", "more than 120 lines"),
        ("README.md", "<!-- /result -->", "", "are missing"),
    ],
)
def test_check_refuses_an_edited_file(
    record: Path, name: str, old: str, new: str, message: str
) -> None:
    text = (record / name).read_text()
    assert old in text
    (record / name).write_text(text.replace(old, new))
    assert message in problems_of(record)


@pytest.mark.parametrize(
    "name", ["plot.png", "README.md", "run.env", "train_seed1.log", "metrics_seed3.jsonl"]
)
def test_check_refuses_a_missing_file(record: Path, name: str) -> None:
    (record / name).unlink()
    assert problems_of(record)
    assert main(["check", str(record)]) == 1


@pytest.mark.parametrize(
    "name", ["README.md", "submission.json", "metrics_seed1.jsonl", "train_gpt_source.py"]
)
def test_check_refuses_a_pipe_in_place_of_a_file(record: Path, name: str) -> None:
    """It must not wait for somebody to write into the pipe."""
    (record / name).unlink()
    os.mkfifo(record / name)
    assert "is missing" in problems_of(record)


@pytest.mark.parametrize("name", ["README.md", "train_gpt_source.py", "run.env"])
def test_check_refuses_a_file_that_is_no_text(record: Path, name: str) -> None:
    (record / name).write_bytes(b"\xff\xfe\x00 no text")
    assert problems_of(record)


def test_check_refuses_a_record_in_another_track(record: Path) -> None:
    moved = record.parent.with_name("track_other") / record.name
    record.parent.rename(moved.parent)
    assert "the folder stands in track_other" in problems_of(moved)


def test_check_refuses_a_log_under_the_name_of_another_seed(record: Path) -> None:
    for kind, end in (("metrics", "jsonl"), ("train", "log")):
        (record / f"{kind}_seed3.{end}").rename(record / f"{kind}_seed4.{end}")
    assert "belongs to metrics_seed3.jsonl" in problems_of(record)


def test_a_github_name_is_accepted(tmp_path: Path, record: Path) -> None:
    """A submission to the challenge needs it."""
    out = record.parent / "2026-01-04_Named"
    run = write_run(tmp_path / "run", run_events(1, 1.3))
    where = ["--records", str(record.parent.parent), "--github-id", "some-one"]
    assert main(["build", str(out), str(run), *where]) == 0
    assert json.loads((out / "submission.json").read_bytes())["github_id"] == "some-one"
    assert problems_of(out) == ""


# --- Forged records ------------------------------------------------------------------------------
# Every file of a forged record is consistent with every other: the forger builds it as `build`
# does. Only the arithmetic gives it away.


def forge(folder: Path, events: list[Event], source: str = SOURCE) -> Path:
    """Write a record of one seed with these events; all files are computed from them."""
    folder.mkdir(parents=True)
    digest = hashlib.sha256(source.encode()).hexdigest()
    for event in events:
        if event["event"] == "versions":
            event["source_sha256"] = digest
    (folder / "metrics_seed1.jsonl").write_text(metrics_text(events))
    (folder / "train_seed1.log").write_text(log_text(events).replace(SOURCE, source))
    (folder / "train_gpt.py").write_text(source)
    log = RunLog.read(folder / "metrics_seed1.jsonl")
    described = dict(zip(DESCRIBED, ("A. Author", *NAME.split("_"), ""), strict=True))
    submission = compute_submission([log], described)
    (folder / "submission.json").write_text(json.dumps(submission))
    page = "".join(f"## {heading}\n\n" for heading in HEADINGS)
    result = format_result([log], submission, None)
    (folder / "README.md").write_text(f"<!-- result -->\n{result}\n<!-- /result -->\n{page}")
    settings = [f"{k}={v}\n" for k, v in run_settings(log).items()]
    (folder / "run.env").write_text("".join(settings))
    (folder / "requirements.txt").touch()
    (folder / "plot.png").touch()
    return folder


def change(name: str, **values: Any) -> Callable[[list[Event]], None]:
    """Return an edit that changes keys of every event of that name."""

    def edit(events: list[Event]) -> None:
        for event in events:
            if event["event"] == name:
                event.update(values)

    return edit


def change_knob(name: str, value: Any) -> Callable[[list[Event]], None]:
    """Return an edit that changes a knob in the configuration."""

    def edit(events: list[Event]) -> None:
        config = events[0]
        config["values"][name] = value
        config["changed"] = sorted({*config["changed"], name})

    return edit


def all_of(*edits: Callable[[list[Event]], None]) -> Callable[[list[Event]], None]:
    """Return an edit that makes all of these."""

    def edit(events: list[Event]) -> None:
        for one in edits:
            one(events)

    return edit


def loss_of(bpb: float) -> float:
    """Return the loss that belongs to a score of the synthetic runs."""
    return round(bpb * math.log(2) * NUM_BYTES / TOKENS, 8)


NO_TIME_LIMITS = change("ledger", training_budget_s=0.0, evaluation_budget_s=0.0)
FORGERIES: dict[str, tuple[Callable[[list[Event]], None], str]] = {
    "a lower bpb": (change("final_sliding", val_bpb=1.2), "but val_loss"),
    "a bpb that is lower by a millionth": (change("final_sliding", val_bpb=1.299999), "val_loss"),
    "more bytes than the text has": (change("final_sliding", bytes=NUM_BYTES + 9), "but val_loss"),
    "fewer tokens": (change("final_sliding", tokens=TOKENS - 1), "the validation text 4000"),
    "a bpb below 0": (change("final_sliding", val_bpb=-0.5, val_loss=loss_of(-0.5)), "positive"),
    "a bpb of 0": (change("final_sliding", val_bpb=0.0, val_loss=0.0), "must be positive"),
    "not a number": (change("final_sliding", val_bpb=math.nan), "val_bpb is"),
    "a validation score": (change("val", val_bpb=1.0), "val: val_bpb is 1.0"),
    "a total that is no sum": (change("size", total_bytes=CODE_BYTES), "are not total_bytes"),
    "parts that are no sum": (change("bytes", frame_bytes=1), "the `bytes` event sums to"),
    "smaller code": (
        change("size", code_bytes=100, total_bytes=700_101),
        "code_bytes is 100, the source packs into",
    ),
    "no code": (change("size", code_bytes=0, total_bytes=700_001), "must be positive"),
    "a second of training": (change("train_end", train_s=1.0), "train_end 400: step_avg_ms"),
    "a second in the ledger": (change("ledger", training_s=1.0), "its stages took 100.000 s"),
    "no evaluation time": (change("ledger", evaluation_s=0.5), "its stages took 5.000 s"),
    "more steps": (change("train_end", steps=800, step_avg_ms=125.0), "the last step"),
    "more tokens": (change("train_end", tokens=10**9), "tokens_per_s"),
    "a partial score": (change("final_sliding", partial=True), "both partial and compliant"),
    "a limited text": (change_knob("VAL_TOKENS_LIMIT", 4000), "but VAL_TOKENS_LIMIT=4000"),
    "forbidden methods": (change_knob("ALLOW_NONCOMPLIANT", True), "ALLOW_NONCOMPLIANT is set"),
    "another budget": (change_knob("ARTIFACT_BUDGET_BYTES", 10**9), "ARTIFACT_BUDGET_BYTES=1000"),
    "another time limit": (change_knob("MAX_WALLCLOCK_SECONDS", 0.0), "MAX_WALLCLOCK_SECONDS=0"),
    "a hidden knob": (lambda e: e[0]["changed"].remove("NUM_LAYERS"), "NUM_LAYERS=6 is not the"),
    "an invented knob": (lambda e: e[0]["changed"].append("TRACK"), "is the default"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_check_refuses_a_forged_record(name: str, tmp_path: Path) -> None:
    edit, message = FORGERIES[name]
    events = run_events(1, 1.3)
    edit(events)
    assert message in problems_of(forge(tmp_path / "records" / TRACK / NAME, events))


def test_the_forger_s_record_without_an_edit_is_accepted(tmp_path: Path) -> None:
    record = forge(tmp_path / "records" / TRACK / NAME, run_events(1, 1.3))
    assert problems_of(record) == ""


@pytest.mark.parametrize("lines", [40, 100, 400])
def test_check_refuses_a_source_that_is_larger_than_the_counted_code(
    lines: int, tmp_path: Path
) -> None:
    """Digests and log are those of the other source; only its size gives it away."""
    numbers = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(lines)]
    source = SOURCE + "".join(f"x_{i} = 0x{number}\n" for i, number in enumerate(numbers))
    record = forge(tmp_path / "records" / TRACK / NAME, run_events(1, 1.3), source)
    assert "the source packs into" in problems_of(record)


@pytest.mark.slow
@pytest.mark.parametrize("more", [-1, 1, 1000])
def test_the_size_of_the_packed_script_is_exact_if_it_packs_as_this_one(more: int) -> None:
    source = train_gpt.script_source()
    size = len(train_gpt.pack_source(source))
    assert check_code_size(source, size) == ([], [])
    problems, notes = check_code_size(source, size + more)
    assert f"code_bytes is {size + more:,}" in problems[0] and notes == []
    older = source.replace("def pack_source(", "def pack_source_of_today(")
    problems, notes = check_code_size(older, size + more)
    assert problems == [] and "not proven" in notes[0]


def test_packers_differ_if_any_function_differs_that_packs() -> None:
    parts = [
        "def pack_source(x): return f(x)",
        "def f(x): return g(x) + f(x)",
        "def g(x): return x",
    ]
    packer = packer_of("\n".join([*parts, "def other(): return 1"]))
    assert packer and packer == packer_of("\n".join([*reversed(parts), "def other(): return 2"]))
    assert packer != packer_of("\n".join([*parts[:2], "def g(x): return -x"]))
    assert packer_of("def f(x): return x") == ""


@pytest.mark.parametrize("source", ["def f(:\n", "'''", "\0", "x = (\n"])
def test_check_refuses_a_source_that_is_no_python(source: str, tmp_path: Path) -> None:
    record = forge(tmp_path / "records" / TRACK / NAME, run_events(1, 1.3), source)
    assert "the source cannot be packed" in problems_of(record)


def test_check_compares_the_packed_script_with_its_source_and_its_size(
    record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = record / "train_gpt.py"
    right = packed.read_bytes()
    packed.write_bytes(right + b"\n")
    said = problems_of(record)
    assert f"train_gpt.py has {len(right) + 1} bytes, submission.json {len(right)}" in said
    packed.write_bytes(right[:-2] + b" \n")
    findings = check_record(record, record.parent.parent)
    assert findings.problems == [] and any(note.startswith(
        "not proven: train_gpt.py is train_gpt_source.py, packed") for note in findings.notes
    )  # fmt: skip
    monkeypatch.setattr(check, "packer_of", lambda source: "the same")
    assert problems_of(record) == "not true: train_gpt.py is train_gpt_source.py, packed"
    packed.write_bytes(right)
    assert problems_of(record) == ""


def test_a_record_of_the_readable_script_alone_is_still_checked(record: Path) -> None:
    (record / "train_gpt_source.py").replace(record / "train_gpt.py")
    assert problems_of(record) == ""
    (record / "train_gpt.py").write_text("x = 1\n")
    assert "train_gpt.py is not the source that submission.json names" in problems_of(record)


@pytest.mark.parametrize(
    ("knob", "value", "key"),
    [
        ("MAX_WALLCLOCK_SECONDS", 0.0, "training_budget_s 0.0 is looser than the 600"),
        ("MAX_WALLCLOCK_SECONDS", 600.5, "training_budget_s 600.5 is looser"),
        ("EVAL_MAX_SECONDS", 0.0, "evaluation_budget_s 0.0 is looser"),
        ("ARTIFACT_BUDGET_BYTES", 10**12, "budget_bytes 1,000,000,000,000 is looser"),
        ("ARTIFACT_BUDGET_BYTES", 16_000_001, "budget_bytes 16,000,001 is looser"),
    ],
)
def test_budgets_looser_than_the_track_s_are_not_compliant(
    knob: str, value: float, key: str, tmp_path: Path
) -> None:
    """The record says so itself; one that claims the contrary is refused."""
    events = run_events(1, 1.3)
    change_knob(knob, value)(events)
    target = "budget_bytes" if knob.startswith("ARTIFACT") else key.split(maxsplit=1)[0]
    change("size" if target == "budget_bytes" else "ledger", **{target: value})(events)
    record = forge(tmp_path / "records" / TRACK / NAME, events)
    submission = json.loads((record / "submission.json").read_bytes())
    assert submission["compliant"] is False and problems_of(record) == ""
    assert f"**Not compliant**: {key}" in (record / "README.md").read_text()
    (record / "submission.json").write_text(json.dumps({**submission, "compliant": True}))
    assert "compliant is True, the logs give False" in problems_of(record)


def test_every_track_of_the_records_has_limits() -> None:
    folders = {folder.parent.name for folder in find_records(ROOT / "records")}
    assert folders <= TRACK_LIMITS.keys()
    for limits in TRACK_LIMITS.values():
        assert min(limits) > 0


def test_check_says_what_it_has_proven_and_what_not(
    record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(record), "--records", str(record.parent.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{record}: ok", f"  {check.PROVEN}", f"  {check.NOT_PROVEN}"]
    events = run_events(1, 1.3, track="track_home")
    other = forge(tmp_path / "records/track_home" / NAME, events)
    assert main(["check", str(other), "--records", str(tmp_path / "records")]) == 0
    assert "since no limits of track_home are known" in capsys.readouterr().out


@pytest.mark.parametrize("size", [0.995, 1.004])
def test_the_size_of_another_packer_is_a_note(size: float) -> None:
    problems, notes = check.check_code_size(SOURCE, round(size * CODE_BYTES))
    assert problems == [] and "with this version of the packer" in notes[0]
    assert check.check_code_size(SOURCE, CODE_BYTES) == ([], [])


# --- Sessions ------------------------------------------------------------------------------------


def later_pass(**changes: Any) -> list[Event]:
    """Return the events of a MODE=eval in the folder of run_events(1, ...)."""
    scores = {"quantized": 1.325, "sliding": 1.3, "ttt": 1.2}
    return [*setup_events(1, mode="eval", **changes), *final_events(1, scores)]


def build_one(folder: Path, events: list[Event]) -> Path:
    """Return the record that `build` makes of one run with these events."""
    run = write_run(folder / "run", events)
    out = folder / "records" / TRACK / NAME
    assert main(["build", str(out), str(run), "--records", f"{folder}/records"]) == 0
    return out


@pytest.mark.parametrize("method", ["lora", "chunk", "none"])
def test_run_env_has_the_knobs_of_the_pass_that_gave_the_score(method: str, tmp_path: Path) -> None:
    trained = run_events(1, 1.3, ttt_method="pretrain", allow_noncompliant=True)
    events = [*trained, *later_pass(ttt_method=method, ttt_lora_rank=7)]
    out = build_one(tmp_path, events)
    cfg = train_gpt.config_from_env({"RECIPE": f"{out}/run.env"})
    assert (cfg.ttt_method, cfg.ttt_lora_rank, cfg.num_layers) == (method, 7, 6)
    assert not cfg.allow_noncompliant
    assert json.loads((out / "submission.json").read_bytes())["val_bpb"] == 1.2
    assert problems_of(out) == ""


@pytest.mark.parametrize(
    "changes", [{"check_data": "full"}, {"resume": False}, {"submission_author": "B. Golfer"}]
)
def test_knobs_of_one_run_or_person_are_no_settings_of_the_record(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    plain = RunLog.read(write_run(tmp_path / "plain", run_events(1, 1.3)) / "metrics.jsonl")
    changed = RunLog.read(
        write_run(tmp_path / "changed", run_events(1, 1.3, **changes)) / "metrics.jsonl"
    )
    assert changed.config != plain.config and run_settings(changed) == run_settings(plain)


def test_an_audit_after_the_score_does_not_change_the_record(tmp_path: Path) -> None:
    events = run_events(1, 1.3, ttt_method="lora")
    audit = setup_events(1, mode="eval", ttt_method="chunk", val_tokens_limit=64)
    out = build_one(tmp_path, [*events, *audit, {"event": "audit", "verdict": "pass"}])
    cfg = train_gpt.config_from_env({"RECIPE": f"{out}/run.env"})
    assert (cfg.ttt_method, cfg.val_tokens_limit) == ("lora", 0)


def other_source(events: list[Event]) -> None:
    """Let the later pass be of another version of the script."""
    last = [event for event in events if event["event"] == "versions"][-1]
    last["source_sha256"] = "0" * 64


def other_machine(events: list[Event]) -> None:
    """Let the later pass run on another machine."""
    [event for event in events if event["event"] == "hardware"][-1]["name"] = "1 x H100"


@pytest.mark.parametrize(
    ("changes", "edit", "message"),
    [
        ({"data_path": "data/other"}, None, "differ in DATA_PATH: "),
        ({"precision": "fp32"}, None, "differ in PRECISION: "),
        ({"artifact": "other/artifact.bin"}, None, "is of ARTIFACT=other/artifact.bin"),
        ({}, other_source, "differ in `versions`"),
        ({}, other_machine, "differ in `hardware`"),
    ],
)
def test_build_refuses_a_score_of_another_script_machine_text_or_artifact(
    changes: dict[str, Any],
    edit: Callable[[list[Event]], None] | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = [*run_events(1, 1.3), *later_pass(**changes)]
    if edit:
        edit(events)
    run = write_run(tmp_path / "run", events)
    assert main(["build", f"{tmp_path}/out", str(run)]) == 2
    assert message in capsys.readouterr().err


def test_build_refuses_a_folder_without_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", later_pass())
    assert main(["build", f"{tmp_path}/out", str(run)]) == 2
    assert "has no training, only a MODE=eval" in capsys.readouterr().err


# --- Values and names ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["corpus-v1.0", "data/2.0", "x.0.0", "1.0", "a b", "50%.0"])
def test_a_text_knob_stands_in_run_env_as_it_was(text: str, tmp_path: Path) -> None:
    out = build_one(tmp_path, run_events(1, 1.3, data_path=text))
    assert f"\nDATA_PATH={text}\n" in (out / "run.env").read_text()
    assert train_gpt.config_from_env({"RECIPE": f"{out}/run.env"}).data_path == text
    assert problems_of(out) == ""


@pytest.mark.parametrize("text", ["a\nSEED=9", " a", "a\t", "caf\udce9", "a\u2028b"])
def test_a_value_that_run_env_cannot_hold_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", run_events(1, 1.3, data_path=text))
    assert main(["build", f"{tmp_path}/out", str(run)]) == 2
    assert "DATA_PATH=" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["two\nlines", "caf\udce9", "tab\there", "", "x" * 201])
def test_a_name_that_is_not_one_line_is_refused_before_anything_is_written(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", run_events(1, 1.3))
    out = tmp_path / "out"
    for option in ("--name", "--author"):
        status = main(["build", str(out), str(run), option, text])
        if not text:  # then it is that of the run
            assert status == 0
            shutil.rmtree(out)
            continue
        assert status == 2 and f"set {option}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["caf\udce9", "größe", "$a^$b_{", "a b'c\"d|e", "new\nline"])
def test_a_run_s_folder_may_have_any_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record is built where README.md can name its folder, and refused elsewhere."""
    run = write_run(tmp_path / name, run_events(1, 1.3))
    assert main(["plot", str(run)]) == 0
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    out = tmp_path / f"record {name}"
    status = main(["build", str(out), str(run)])
    if name.isprintable():
        assert status == 0 == main(["check", str(out)])
        assert f"SEED=1 python {shlex.quote(str(out))}/train_gpt_source.py" in (
            (out / "README.md").read_text(encoding="utf-8")
        )
    else:
        assert status == 2 and "printable" in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminal_that_is_not_utf_8_gets_its_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "größe caf\udce9", run_events(1, 1.3))
    done = subprocess.run(
        [sys.executable, ROOT / "records/records.py", "plot", os.fsencode(run)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"/gr\\xf6\\xdfe caf\\udce9/plot.png\n")


# --- Reproducing ---------------------------------------------------------------------------------


def command_of(record: Path) -> tuple[dict[str, str], str]:
    """Return environment and script of the last command under Reproduce."""
    text = (record / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Reproduce")[2].partition("## Rules")[0]
    line = section.strip().splitlines()[-2]
    found = re.fullmatch(r"RECIPE=(\S+) SEED=(\d+) python (\S+)", line)
    assert found, line
    return {"RECIPE": found[1], "SEED": found[2]}, found[3]


@pytest.mark.parametrize("record", find_records(ROOT / "records"), ids=lambda path: path.name)
@pytest.mark.slow
def test_the_command_of_a_record_runs_its_own_script_with_its_settings(record: Path) -> None:
    env, script = command_of(record)
    assert ROOT / script == source_file(record)
    done = run_script({**env, "MODE": "describe"}, ROOT, ROOT / script)
    assert (done.status, done.err) == (0, "")
    (log,) = (x for x in check.read_logs(record) if str(x.config["values"]["SEED"]) == env["SEED"])
    assert f"params:{log.need('model')['params']} " in done.out
    values = log.config["values"]
    for name in run_settings(log):
        assert f"\n* {name}={values[name]}\n" in done.out


# --- Scoring again -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of one real run of the script on tiny data, with its artifact."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = tiny_config(
        data_path=str(data.folder), run_dir=str(folder / "run"), iterations=4, seed=3,
        track="track_test", ttt_method="none",
    )  # fmt: skip
    result = run_script(environment(cfg), folder)
    assert result.status == 0, result.err
    out = folder / "records/track_test/2026-01-05_Tiny"
    options = ["--records", f"{folder}/records", "--with-artifacts"]
    assert main(["build", str(out), str(folder / "run"), *options]) == 0
    return out


@pytest.mark.slow
def test_scoring_again_finds_the_scores_of_a_real_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--records", str(trained.parent.parent)]
    assert main(["check", "--rescore", "--tolerance", "1e-6", str(trained), *where]) == 0
    said = capsys.readouterr().out
    for kind in ("quantized", "sliding"):
        assert re.search(rf"seed 3: final_{kind} [\d.]+, scored again [\d.]+ \([+-]0.00000", said)


@pytest.fixture
def claim(trained: Path, tmp_path: Path) -> Path:
    """A copy of the real record in which the sliding score is better than it was."""
    copy = shutil.copytree(trained, tmp_path / "records/track_test" / trained.name)
    path = copy / "metrics_seed3.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["event"] == "final_sliding":
            factor = event["tokens"] / (math.log(2) * event["bytes"])
            event["val_loss"] = round(event["val_loss"] - 0.1, 8)
            event["val_bpb"] = round(event["val_loss"] * factor, 8)
    text, old = metrics_text(events), (copy / "train_seed3.log").read_text()
    path.write_text(text)
    line = next(x for x in old.splitlines() if x.startswith("final_sliding "))
    new = train_gpt.format_event(**next(e for e in events if e["event"] == "final_sliding"))
    (copy / "train_seed3.log").write_text(old.replace(line, new))
    log = RunLog.read(path)
    submission = json.loads((copy / "submission.json").read_bytes())
    computed = compute_submission([log], submission)
    (copy / "submission.json").write_text(json.dumps(computed))
    assert main(["refresh", str(copy), "--records", str(tmp_path / "records")]) == 0
    return copy


@pytest.mark.slow
def test_scoring_again_refuses_a_consistent_claim(
    claim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--records", str(claim.parent.parent)]
    assert problems_of(claim) == ""
    assert main(["check", "--rescore", str(claim), *where]) == 1
    said = capsys.readouterr().out
    assert f"{claim}: REFUSED" in said and "final_sliding" in said


def scored_log(**changes: Any) -> RunLog:
    """The log of a run with a score of each pass, changed by name; None leaves a pass out."""
    events = run_events(1, 1.3)
    events.insert(-1, {**events[-2], "event": "final_ttt", "val_bpb": 1.2})
    found = [{**e, **(changes.get(e["event"], {}) or {})} for e in events
             if changes.get(e["event"], {}) is not None]  # fmt: skip
    return RunLog(Path("metrics.jsonl"), found)


def test_a_run_that_its_time_had_limited_is_scored_again_in_the_same_way() -> None:
    limited = scored_log(
        final_sliding={"adjusted": "eval_stride 64 -> 128"},
        final_ttt={"adjusted": "ttt_num_lrs 3 -> 1, ttt_chunk_size 24 -> 48"},
    )
    assert adjusted_knobs(scored_log()) == [({}, FINAL_SCORES)]
    knobs = {"EVAL_STRIDE": "128", "TTT_NUM_LRS": "1", "TTT_CHUNK_SIZE": "48"}
    assert adjusted_knobs(limited) == [(knobs, FINAL_SCORES)]


@pytest.mark.parametrize("sliding", ["", "eval_stride 64 -> 128", "eval_stride 64 -> 512"])
@pytest.mark.parametrize("last", ["", "eval_stride 64 -> 128", None])
def test_passes_with_strides_of_their_own_are_scored_by_runs_of_their_own(
    sliding: str, last: str | None
) -> None:
    log = scored_log(
        final_sliding={"adjusted": sliding}, final_ttt=None if last is None else {"adjusted": last}
    )
    log.config["values"]["TTT_METHOD"] = "chunk"
    knobs = [{"EVAL_STRIDE": text.split()[-1]} if text else {} for text in (sliding, last or "")]
    if last is None or sliding == last:
        assert adjusted_knobs(log) == [(knobs[0], FINAL_SCORES)]
    else:
        assert adjusted_knobs(log) == [(knobs[0], FINAL_SCORES[:2]), (knobs[1], FINAL_SCORES[2:])]


@pytest.mark.parametrize(
    ("logged", "again", "problem"),
    [
        ({}, {}, ""),
        ({"untrained": "3 of 9 steps"}, {"val_bpb": 1.15}, ""),  # it may learn more now
        ({"untrained": "3 of 9 steps"}, {"val_bpb": 1.25}, "final_ttt 1.2, scored again 1.25"),
        ({}, {"val_bpb": 1.15}, "final_ttt 1.2, scored again 1.15"),
        (None, {}, ""),  # there was no time for it
        ({}, None, "final_ttt was not scored again"),
    ],
)
def test_scores_that_less_time_explains_are_no_problem(
    logged: dict[str, Any] | None, again: dict[str, Any] | None, problem: str
) -> None:
    old, new = (scored_log(final_ttt=changes) for changes in (logged, again))
    found = compare_scores(old, new, tolerance_bpb=0.001)
    assert (problem in "\n".join(found.problems)) and bool(found.problems) == bool(problem)
    assert any("final_ttt" in note for note in found.notes) == (not problem)


@pytest.mark.slow
def test_scoring_again_finds_a_packed_script_that_is_not_its_source(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(check, "packer_of", lambda source: object())  # no packer is like another
    copy = shutil.copytree(trained, tmp_path / "records/track_test" / trained.name)
    packed = copy / "train_gpt.py"
    packed.write_bytes(packed.read_bytes()[:-1] + b"#")
    assert main(["check", "--rescore", str(copy), "--records", str(tmp_path / "records")]) == 1
    assert "train_gpt.py is not what its source packs itself into" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["artifact", "data", "size"])
def test_what_cannot_be_scored_again_is_named(
    missing: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(trained, tmp_path / "records/track_test" / trained.name)
    artifact, options = copy / "artifact_seed3.bin", ["--records", str(tmp_path / "records")]
    if missing == "artifact":
        artifact.unlink()
        (trained.parents[2] / "run/artifact.bin").rename(tmp_path / "away")
    elif missing == "data":
        options += ["--data-path", f"{tmp_path}/nowhere"]
    else:
        artifact.write_bytes(artifact.read_bytes() + b"\0")
    try:
        assert main(["check", "--rescore", str(copy), *options]) == 1
    finally:
        if missing == "artifact":
            (tmp_path / "away").rename(trained.parents[2] / "run/artifact.bin")
    said = capsys.readouterr().out
    expected = {"artifact": "is there", "data": "nowhere is not there", "size": "bytes, the record"}
    assert "not scored again: " in said and expected[missing] in said
