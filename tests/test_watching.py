"""What a run shows while it works: progress, stages, METRICS; and what --help says."""

from __future__ import annotations

import importlib.machinery
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import train_gpt
from tests.conftest import MakeRun, TinyData, environment, make_documents, tiny_config
from tests.processes import SCRIPT, run_script
from train_gpt import Config, InputError, Run, Validation, open_metrics


def last_line(text: str) -> str:
    """What a terminal shows in its last line after `text`."""
    return text.rpartition("\n")[2].rpartition("\x1b[K")[2]


def test_a_terminal_shows_every_step_in_one_line_that_the_log_does_not_keep(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    run.show("nothing: no terminal")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run.show("first " + 500 * "x")
    run.show("second")
    shown = capsys.readouterr().out
    assert "nothing" not in shown and "\n" not in shown and last_line(shown) == "second"
    assert max(map(len, re.split("\r\x1b\\[K", shown))) < 500
    run.log("event", value=1)
    assert capsys.readouterr().out == "\r\x1b[Kevent value:1\n"
    assert (run.directory / "train.log").read_text() == "event value:1\n"


def trainer_at(run: Run, **progress: Any) -> Any:
    return types.SimpleNamespace(run=run, progress=train_gpt.Progress(**progress))


@pytest.mark.parametrize(
    ("knobs", "done", "eta_s"),
    [
        ({"iterations": 40}, 0.25, 60.0),
        ({"iterations": 20_000, "max_wallclock_seconds": 50.0}, 0.4, 30.0),
    ],
)
def test_steps_say_their_share_of_the_budget_and_the_time_left(
    make_run: MakeRun, knobs: dict[str, Any], done: float, eta_s: float
) -> None:
    run = make_run(**knobs)
    trainer = trainer_at(run, step=10, train_s=20.0, tokens=4000)
    train_gpt.log_step(trainer, 2.5, 1.0, is_logged=False)
    train_gpt.log_step(trainer, 2.5, 1.0, is_logged=True)
    (event,) = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
    assert (event["progress"], event["eta_s"], event["tokens_per_s"]) == (done, eta_s, 200)
    assert "steps" not in event


def test_validations_during_training_can_use_a_sample(data: TinyData) -> None:
    whole = Validation(data.val, data.val[1:].astype("int64"), False)
    assert whole.head(0) is whole is whole.head(whole.num_targets)
    sample = whole.head(40)
    assert (sample.num_targets, len(sample.target_bytes), sample.partial) == (40, 40, True)
    assert sample.ids.tolist() == data.val[:41].tolist()


# --- METRICS -------------------------------------------------------------------------------------


class Sent:
    """A stand-in for both packages that keeps what it is sent."""

    def __init__(self) -> None:
        self.numbers: list[tuple[str, float, int]] = []
        self.started: dict[str, Any] = {}
        self.closed = False

    def init(self, **options: Any) -> None:
        self.started = options

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.numbers += [(name, value, step) for name, value in numbers.items()]

    def SummaryWriter(self, folder: str) -> Sent:
        self.started = {"dir": folder}
        return self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.numbers.append((name, value, step))

    def finish(self) -> None:
        self.closed = True

    close = finish


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_metrics_get_the_numbers_of_the_log(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    sent, run = Sent(), make_run(metrics=package)
    name = "torch.utils.tensorboard" if package == "tensorboard" else package
    monkeypatch.setitem(sys.modules, name, sent)
    open_metrics(run)
    run.log("step", step=7, train_loss=2.5)
    run.log("final_quantized", val_bpb=1.25, partial=False, name="x")
    assert sent.numbers == [
        ("step/step", 7, 7), ("step/train_loss", 2.5, 7), ("final_quantized/val_bpb", 1.25, 7),
    ]  # fmt: skip
    assert sent.started["dir"] == str(run.directory) and not sent.closed
    run.at_exit.close()
    assert sent.closed


def test_metrics_that_fail_later_do_not_end_the_run(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(numbers: dict[str, float], step: int) -> None:
        calls.append(step)
        raise OSError("no space\nleft")

    sent, run, calls = Sent(), make_run(metrics="wandb"), list[int]()

    def end() -> None:
        sent.closed = True
        raise OSError("no network")

    monkeypatch.setattr(sent, "log", fail)
    monkeypatch.setattr(sent, "finish", end)
    monkeypatch.setitem(sys.modules, "wandb", sent)
    open_metrics(run)
    run.log("step", step=7, train_loss=2.5)
    run.log("step", step=8, train_loss=2.4)
    assert calls == [7]
    lines = (run.directory / "train.log").read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith("warning ")
    assert "METRICS=wandb has stopped: no space" in lines[1]
    run.at_exit.close()
    assert sent.closed


def test_metrics_that_cannot_start_are_refused(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = types.ModuleType("wandb")  # it has no `init`
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with pytest.raises(InputError, match="METRICS=wandb cannot be used: .*init"):
        open_metrics(make_run(metrics="wandb"))


def test_a_missing_package_is_named_and_leaves_no_folder(data: TinyData, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    missing = "wandb"
    if importlib.machinery.PathFinder.find_spec(missing):
        pytest.skip("wandb is installed")
    env = environment(tiny_config(data_path=str(data.folder), metrics=missing))
    result = run_script(env, work)
    assert result.status == 2 and "pip install wandb" in result.err
    assert [*work.iterdir()] == []


# --- Help ----------------------------------------------------------------------------------------


def test_help_names_the_knobs_that_matter_and_where_the_rest_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = train_gpt.usage()
    for name in train_gpt.MAIN_KNOBS:
        assert f"\n  {name.upper()}=" in text, name
    assert "KNOBS.md" in text and "RECIPE=records/demo/cpu.env python train_gpt.py" in text
    assert len(text.splitlines()) < 40 and 10 <= len(train_gpt.MAIN_KNOBS) <= 20


@pytest.mark.slow
def test_the_command_line_prints_help_and_refuses_arguments(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("--help").stdout == train_gpt.usage() + "\n"
    refused = run("--lr", "3")
    assert refused.returncode == 2 and "the argument '--lr' is not read" in refused.stderr
    assert [*tmp_path.iterdir()] == []


# --- Own text ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_text_trains_and_generates_with_the_commands_of_the_readme(tmp_path: Path) -> None:
    """The commands of README.md, on a text of 150 kB, for a few steps."""
    page = (SCRIPT.parent / "README.md").read_text()
    block = page.partition("test_own_text_trains")[2].partition("```bash\n")[2].partition("```")[0]
    commands = block.strip().splitlines()
    assert len(commands) == 3
    (tmp_path / "mytext.txt").write_text("\n\n".join(make_documents(700, seed=3)))
    for name in (".venv", "records", "train_gpt.py"):
        (tmp_path / name).symlink_to(SCRIPT.parent / name)
    (tmp_path / "data").mkdir()
    for path in (SCRIPT.parent / "data").glob("*.py"):
        (tmp_path / "data" / path.name).symlink_to(path)
    few = {
        "ITERATIONS": "3", "COMPILE": "0", "TTT_METHOD": "none", "EVAL_STRIDE": "0",
        "PRECISION": "fp32", "MAX_NEW_TOKENS": "20", "VAL_SAMPLE_TOKENS": "600",
    }  # fmt: skip
    commands[0] += " --vocab-size 320"  # few words
    env = {**environment(Config()), **few, "VOCAB_SIZE": "320"}
    for command in commands:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once") and len(done.stdout) > 6
