"""tests/gpu_check.py without a GPU: what it reads, what it compares, how it fails."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from tests import gpu_check
from tests.conftest import tiny_config

EAGER: dict[str, Any] = {"compile": False, "precision": "fp32"}
SMALL = train_gpt.Config(**gpu_check.SMALL, **EAGER)


def check(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    return gpu_check.main()


def test_the_computed_report_has_the_stages_that_are_measured():
    computed = gpu_check.computed_steps(gpu_check.REPORT.read_text())
    cfg = gpu_check.part_of_a_rank(train_gpt.Config())
    assert cfg.train_batch_tokens == cfg.micro_batch_tokens == 98_304
    stages = gpu_check.measured_stages(cfg)
    assert [gpu_check.stage_name(stage) for stage in stages] == [*computed]
    assert len(stages) == 2 and all(20 < float(ms) < 500 for ms, _ in computed.values())


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check(monkeypatch) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_an_unknown_part_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        check(monkeypatch, "--small", "--parts", "step,speed")
    assert "no speed; there are tests, step, run" in capsys.readouterr().err


def test_a_part_that_fails_does_not_stop_the_others_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    answers = {"tests": (False, ["Exit status 1."]), "run": (True, ["a score"])}
    monkeypatch.setattr(gpu_check, "in_a_process", lambda part, small: answers[part])
    out = tmp_path / "check.md"
    assert check(monkeypatch, "--small", "--parts", "tests,run", "--out", str(out)) == 1
    text = out.read_text()
    assert "## tests: FAILED" in text and "## run: passed" in text and "a score" in text


@pytest.mark.parametrize(
    ("program", "expected", "shown"),
    [
        ("print('one'); print('[\"a score\"]')", (True, ["a score"]), "one\n"),
        ("print('one'); print('two'); exit(3)", (False, ["Exit status 3."]), "one\ntwo\n"),
        ("exit(1)", (False, ["Exit status 1."]), ""),
    ],
)
def test_lines_of_a_part_are_shown_and_the_last_one_is_its_result(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    expected: tuple[bool, list[str]],
    shown: str,
):
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[str]:
        return real([sys.executable, "-c", program], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert gpu_check.in_a_process("tests", small=True) == expected
    assert capsys.readouterr().out == shown


def test_a_wrong_gradient_fails_the_comparison(monkeypatch: pytest.MonkeyPatch):
    real: Callable[..., dict[str, Any]] = gpu_check.gradients

    def gradients(cfg: train_gpt.Config, windows: int) -> dict[str, Any]:
        result = real(dataclasses.replace(cfg, compile=False), windows)
        if cfg.compile:
            result["tok_emb.weight"] *= 2
        return result

    monkeypatch.setattr(gpu_check, "gradients", gradients)
    cfg = dataclasses.replace(SMALL, compile=True)
    loss, whole, worst = gpu_check.compare_with_eager(cfg, windows=2)
    assert loss == 0 and whole > train_gpt.MAX_GRAD_ERROR and worst == "tok_emb.weight: 1.0e+00"
    with pytest.raises(AssertionError, match="the compiled model differs from the eager one"):
        gpu_check.step_part(cfg)


def test_steps_of_every_stage_are_timed():
    cfg = dataclasses.replace(SMALL, train_batch_tokens=512)
    steps = list(gpu_check.measure_steps(cfg, "eager"))
    assert [step.stage for step in steps] == [
        "loops 2, 64 tokens a row",
        "loops 0, 64 tokens a row",
    ]
    assert all(step.ms > 0 and step.peak_gb > 0 for step in steps)


def test_windows_are_those_of_the_stage():
    cfg = tiny_config(train_batch_tokens=256, train_seq_len=32)
    window_BT = gpu_check.random_windows(cfg, train_gpt.train_stages(cfg)[-1])
    assert window_BT.shape == (8, 33)
