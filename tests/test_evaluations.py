"""The tool that compares ways of evaluating: its plan, its results, its statistics."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from records import evaluations
from records.evaluations import (
    Evaluation,
    list_evaluations,
    main,
    method_rows,
    read_plan,
    scores_by_method,
)
from records.results import append_result, read_results
from tests.processes import wait_until
from train_gpt import InputError

PLAN = """
settings = "DATA_PATH=data/x VAL_TOKENS_LIMIT=64"
[models]
small = ["a.bin", "b.bin"]
large = ["c.bin"]
[methods]
lora = "TTT_METHOD=lora TTT_LORA_LR=1e-3"
tilt = "NGRAM_TILT=1"
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN, encoding="utf-8")
    return path


def result(evaluation: Evaluation, sliding: float, adapted: float) -> dict[str, Any]:
    """A line of results as a run would write it."""
    scores = {
        "final_quantized": sliding + 0.1,
        "final_sliding": sliding,
        "final_ttt": adapted,
    }
    return {
        "key": evaluation.key,
        "model": evaluation.model,
        "artifact": evaluation.artifact,
        "method": evaluation.method,
        "status": 0,
        "tokens": 64,
        "bytes": 128,
        "source_sha256": "0" * 64,
        **{event: {"val_bpb": bpb, "eval_s": 2.0} for event, bpb in scores.items()},
    }


def test_every_artifact_is_scored_with_every_method_a_seed_of_each_model_first(plan: Path):
    found = list_evaluations(read_plan(plan))
    assert [(e.artifact, e.method) for e in found] == [
        (artifact, method)
        for artifact in ("a.bin", "c.bin", "b.bin")
        for method in ("lora", "tilt")
    ]
    assert found[0].settings == {
        "DATA_PATH": "data/x",
        "VAL_TOKENS_LIMIT": "64",
        "TTT_METHOD": "lora",
        "TTT_LORA_LR": "1e-3",
    }
    assert len({e.key for e in found}) == 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "settings = 3",
        "not toml",
        PLAN.replace("TTT_METHOD=", "X "),
        PLAN.replace('["c.bin"]', "[]"),
        PLAN.replace('["c.bin"]', "[3]"),
        PLAN.replace('"NGRAM_TILT=1"', "7"),
        PLAN.replace('settings = "', 'settings = ["').replace('=64"', '=64"]'),
    ],
)
def test_what_is_no_plan_is_refused(plan: Path, text: str, capsys: pytest.CaptureFixture[str]):
    plan.write_text(text, encoding="utf-8")
    assert main(["table", str(plan)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("evaluations.py: ") and ("is not a plan" in said or "KEY=value" in said)


def test_a_damaged_line_of_results_is_refused(plan: Path, capsys: pytest.CaptureFixture[str]):
    results = plan.with_suffix(".jsonl")
    results.write_text(json.dumps({"key": "x", "status": 0}) + '\n{"key": "y", "sta')
    for command in ("run", "table"):
        assert main([command, str(plan)]) == 2
        assert f"{results}:2 is not a result" in capsys.readouterr().err


def test_what_has_ended_before_an_interruption_is_kept(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    first, *others = list_evaluations(read_plan(plan))
    results = plan.with_suffix(".jsonl")

    def evaluate(evaluation: Evaluation, script: Path) -> dict[str, Any]:
        if evaluation.key != first.key:
            return result(evaluation, 2.0, 1.5)
        wait_until(lambda: len(read_results(results)) == len(others), 600, "others are lost")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    assert main(["run", str(plan), "--jobs", "2"]) == 130
    assert set(read_results(results)) == {e.key for e in others}


def test_knobs_of_the_environment_do_not_reach_an_evaluation(
    plan: Path, monkeypatch: pytest.MonkeyPatch
):
    given: list[dict[str, str]] = []

    def run(command: list[str], env: dict[str, str], **more: Any) -> SimpleNamespace:
        given.append(env)
        return SimpleNamespace(returncode=1, stderr="")

    monkeypatch.setattr("records.evaluations.subprocess.run", run)
    for name, value in {"TTT_EPOCHS": "7", "VAL_TOKENS_LIMIT": "9", "RECIPE": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    evaluations.evaluate(list_evaluations(read_plan(plan))[0], Path("train_gpt.py"))
    assert not {"TTT_EPOCHS", "RECIPE"} & given[0].keys()
    assert (given[0]["VAL_TOKENS_LIMIT"], given[0]["OMP_NUM_THREADS"]) == ("64", "1")


def test_results_of_several_writers_are_all_kept(tmp_path: Path):
    path = tmp_path / "results.jsonl"

    def write(writer: int) -> None:
        for number in range(25):
            append_result(path, {"key": f"{writer} {number}"})

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(write, range(4)))
    assert len(read_results(path)) == 100


def test_differences_are_to_the_sliding_window_of_the_same_artifacts(plan: Path):
    found = list_evaluations(read_plan(plan))
    small = [e for e in found if e.model == "small"]
    bpb = {"lora": (1.5, 1.7), "tilt": (1.9, 2.0)}
    results = [
        result(e, {"a.bin": 2.0, "b.bin": 2.1}[e.artifact], bpb[e.method][e.artifact == "b.bin"])
        for e in small
    ]
    scores = scores_by_method(results, ["a.bin", "b.bin"])
    assert scores["lora"] == [(1.5, 2.0), (1.7, 2.0)]
    rows = method_rows(scores, read_plan(plan))
    assert [row[0] for row in rows] == ["lora", "tilt", "sliding", "disjoint"]
    assert rows[0][1:4] == ["1.6000", "0.1414", "-0.4500"]
    assert rows[0][-1] == "TTT_METHOD=lora TTT_LORA_LR=1e-3"
    assert rows[2][:5] == ["sliding", "2.0500", "0.0707", "-", "-"]


def test_differences_to_a_method_of_the_plan_are_tested_on_both_sides(plan: Path):
    scores = {"lora": [(1.5, 9.0), (1.7, 9.0)], "tilt": [(1.6, 9.0), (1.81, 9.0)]}
    rows = method_rows(scores, read_plan(plan)._replace(base="lora"))
    better = method_rows(scores, read_plan(plan)._replace(base="tilt"))
    # One degree of freedom: p = 1 - 2 / pi * atan(0.105 / 0.005).
    assert rows[1][3:5] == ["+0.1050", "0.0303"] and rows[0][3:5] == ["-", "-"]
    assert better[0][3:5] == ["-0.1050", "0.0303"]


@pytest.mark.parametrize("base", ['"other"', "3", '["lora"]'])
def test_a_base_that_the_plan_does_not_have_is_refused(plan: Path, base: str):
    plan.write_text(f"base = {base}\n" + plan.read_text(), encoding="utf-8")
    with pytest.raises(InputError, match="base"):
        read_plan(plan)


def test_a_method_that_lacks_an_artifact_is_not_compared(plan: Path):
    found = list_evaluations(read_plan(plan))
    results = [result(e, 2.0, 1.5) for e in found if e.artifact == "a.bin" or e.method == "tilt"]
    assert "lora" not in scores_by_method(results, ["a.bin", "b.bin"])


def test_the_table_and_the_plot_are_written_from_what_is_done(plan: Path):
    found = list_evaluations(read_plan(plan))
    lines = [json.dumps(result(e, 2.0 + 0.01 * i, 1.5)) for i, e in enumerate(found[:4])]
    plan.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    evaluations.write_table(read_plan(plan))
    text = plan.with_suffix(".md").read_text(encoding="utf-8")
    assert "4 of 6 evaluations are done" in text and "| lora " in text
    assert plan.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_table_of_nothing_is_refused(plan: Path):
    with pytest.raises(InputError, match="no result"):
        evaluations.write_table(read_plan(plan))


@pytest.mark.parametrize("score", [None, 3, "1.5", {"val_bpb": "low", "eval_s": 1.0}, {}])
def test_a_result_of_wrong_types_is_refused(
    score: Any, plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [result(e, 2.0, 1.5) for e in list_evaluations(read_plan(plan))]
    results[1]["final_sliding"] = score
    text = "".join(json.dumps(line) + "\n" for line in results)
    plan.with_suffix(".jsonl").write_text(text, encoding="utf-8")
    assert main(["table", str(plan)]) == 2
    assert "has a result of wrong types" in capsys.readouterr().err
