"""The computed memory and times of a run's stages, and the tables that are made from them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train_gpt
from tests.conftest import TRACK

ROOT = Path(train_gpt.__file__).parent
TINY = ("NUM_LAYERS=2", "XSA_LAST_N=1", "LOOP_START=0", "LOOP_END=1", "PARALLEL_START_LAYER=1")
RESERVED_GB = 2.0  # that README leaves free
DEFAULT = train_gpt.config_from_env({"MODE": "describe"})
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="the simulation compiles its guard with g++"
)


def run_python(*arguments: str) -> str:
    """Standard output of Python with these arguments: the simulation needs its own process."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


PARTS = """
from tests import gpu_stages as s
import dataclasses
import json
import numpy as np
import train_gpt as t

texts = [s.validation_ids(9_000, 60, 1.0) for _ in range(2)]
lengths = np.diff(t.document_bounds(texts[0]))
sent = s.sent_bytes(["_reduce_scatter_base_ float32 [(2, 8), (16, 8)]",
    "_allgather_base_ bfloat16 [(16, 8), (2, 8)]", "allreduce_ float32 [(80,)]",
    "allreduce_ float32 [()]"])

def step(index, rows, resets=False):
    windows = [t.Window(24 * index, 24 * index + 24, 24 * index)] * rows
    return t.EvalStep("adapt", windows, resets)

cfg = t.config_from_env({"MODE": "describe", "TTT_CONTEXT": "incremental", "TTT_CHUNK_SIZE": "24"})
second = s.Count(launches=1000, num_bytes=0.0, flops=0.0, seconds=0.0)
cost = s.AdapterSteps(4, second, 3000, 500, 0.001, 0.0, 1e-4)
together, empty = t.EvalStep("update_ngrams", text=(0, 9)), t.EvalStep("score")
long = [step(0, 4, True), step(1, 4), step(2, 1), together, step(0, 1, True)]
short = [step(0, 1, True), empty, empty, together, empty]
windowed = dataclasses.replace(cfg, ttt_context="window", micro_batch_tokens=1000)
print(json.dumps({
    "same": bool((texts[0] == texts[1]).all()), "documents": len(lengths),
    "targets": int(lengths.sum()), "mean": float(lengths.mean()),
    "median": float(np.median(lengths)), "longest": int(lengths.max()), "sent": sent,
    "pass": s.pass_seconds(cfg, [long, short], cost),
    "passes": [s.num_passes(x, 5, 400) for x in (cfg, windowed)],
}))
"""


@needs_compiler
def test_the_parts_of_the_computed_times():
    found = json.loads(run_python("-c", PARTS))
    assert found["same"] and (found["documents"], found["targets"]) == (60, 9_000)
    # Log-normal with sigma 1: the mean is exp(1 / 2) times the median, here without the far tail.
    assert 1.4 < found["mean"] / found["median"] < 1.65 and found["longest"] > 1_000
    # 7 of 8 parts of 512 bytes in float32, 256 in bf16, and twice 7 of 8 parts of 324
    sizes = {"_reduce_scatter_base_": 448, "_allgather_base_": 224, "allreduce_": 567}
    assert found["sent"] == sizes
    steps, seconds = found["pass"]
    # 3,000 launches, 1,000 and 1,500, where documents end, and again 3,000; or the GPU's work on
    # rows x context of 4 x 24, 4 x 48, 1 x 72 and 1 x 24 tokens.
    assert steps == 4
    slow, fast = (0.030, 0.0202, 0.015, 0.030), (0.015, 0.0202, 0.0082, 0.015)
    assert seconds == pytest.approx([sum(fast), sum(slow)])
    assert found["passes"] == [1, 3]  # of 5 rows, of which 2 fit


@needs_compiler
@pytest.mark.slow
def test_the_times_of_stages_of_a_small_run():
    sections = ["--small", "--sections", "calibration,adaptive,communication"]
    output = run_python("-m", "tests.gpu_stages", "default", *TINY, *sections)
    headings = [line.split(":")[0] for line in output.splitlines() if line.startswith("## ")]
    assert headings == ["## Calibration", "## Adaptive pass", "## Communication"]
    assert output.count("Computed, not measured") == 3
    rows = {row[0]: row[1:] for row in table_rows(output)}
    assert len(rows["products of second moments"]) == 3
    three, one = rows["2 x 3"], rows["4 x 1"]  # at least 2 documents are counted
    steps, launches = ([int(row[i].replace(",", "")) for row in (three, one)] for i in (0, 1))
    assert steps[0] > steps[1] > 20 and launches[0] > launches[1] > 500
    before = rows["64 x 1 in an earlier version, its own steps"]
    assert before == ["3,500", "5,945", "61", "", "21.8", "104", "208"]


# --- Tables of the READMEs -----------------------------------------------------------------------


def table_rows(text: str) -> list[list[str]]:
    """The cells of all lines of tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def report() -> str:
    return (TRACK / "gpu_report.md").read_text(encoding="utf-8")


def numbers_of(pattern: str, text: str) -> list[float]:
    """The groups of the only place where a pattern matches, spaces standing for line ends too."""
    (match,) = re.finditer(pattern.replace(" ", r"\s+"), text)
    return [float(group.replace(",", "")) for group in match.groups()]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def hardware_rows() -> list[tuple[float, int, str]]:
    """README's settings by card: GB of the card, MICRO_BATCH_TOKENS, and the memory as written."""
    section = readme().split("| hardware | settings | memory per GPU |")[1].split("\n\n")[0]
    rows, default = list[tuple[float, int, str]](), DEFAULT.micro_batch_tokens
    for hardware, settings, memory in table_rows(section):
        card = re.search(r"(\d+) GB", hardware)
        if card:
            tokens = re.search(r"MICRO_BATCH_TOKENS=(\d+)", settings)
            rows.append((float(card[1]), int(tokens[1]) if tokens else default, memory))
    return rows


def training_memory() -> tuple[float, float]:
    """GB, and GB a token, of compiled training as README has them."""
    fixed, kilobytes = numbers_of(r"([\d.]+) GB, and ([\d.]+) kB per token", readme())
    return fixed, kilobytes / 1e6


def test_micro_batches_of_the_hardware_table_fit_in_the_memory_of_their_cards():
    fixed, per_token = training_memory()
    rows = hardware_rows()
    assert {card for card, *_ in rows} == {80, 24, 16, 12, 8}
    for card, tokens, memory in rows:
        needed = fixed + tokens * per_token
        assert needed <= card - RESERVED_GB, card
        written, unit = memory.split()
        decimals = len(written.partition(".")[2])
        assert (f"{needed:.{decimals}f}", unit) == (written, "GB"), card


def test_the_memory_that_readme_names_is_that_of_the_report():
    fixed, per_token = training_memory()
    pattern = r"Memory: ([\d.]+) GB between steps, ([\d.]+) GB at the peak"
    live, peak = max(
        (tuple(map(float, match.groups())) for match in re.finditer(pattern, report())),
        key=lambda pair: pair[1],
    )
    tokens = DEFAULT.micro_batch_tokens
    assert abs(fixed - live) < 0.11 and abs(fixed + tokens * per_token - peak) < 0.11
    kilobytes, base = numbers_of(r"takes ([\d.]+) kB per token and ([\d.]+) GB\.", readme())
    rows: Any = {row[0]: row[1:] for row in table_rows(report())}
    peak = float(rows["training, not compiled"][0])
    assert abs(base + tokens * kilobytes / 1e6 - peak) < 0.6


def test_other_stages_fit_where_training_fits():
    rows = {row[0]: row[1:] for row in table_rows(report())}
    cards = [int(card) for card in rows["GPU memory, GiB"] if card.isdigit()]
    most = {
        name.split(",")[0]: [int(x.replace(",", "")) for x in cells]
        for name, cells in rows.items()
        if name.startswith(("MICRO_BATCH_TOKENS, calibration", "TTT_BATCH_SIZE,"))
    }
    (each,) = numbers_of(r"each of `TTT_BATCH_SIZE` adapters takes ([\d.]+) GB", readme())
    # Of the report's cards, the first and the last differ by so many documents.
    documents = most["TTT_BATCH_SIZE"][0] - most["TTT_BATCH_SIZE"][-1]
    assert abs((cards[0] - cards[-1]) * 2**30 / 1e9 / documents - each) < 0.006
    peak = float(rows["adapters, documents longer than EVAL_SEQ_LEN"][0])
    for card, tokens, _ in hardware_rows():
        if card in cards:
            assert tokens <= most["MICRO_BATCH_TOKENS"][cards.index(int(card))]
        if card > 8:
            assert peak + RESERVED_GB < card * 2**30 / 1e9
    (documents_of_8_gb,) = numbers_of(r"`MICRO_BATCH_TOKENS=12288 TTT_BATCH_SIZE=(\d+)`", readme())
    assert documents_of_8_gb <= most["TTT_BATCH_SIZE"][cards.index(8)]


def test_the_questions_about_times_have_the_figures_of_the_report():
    heading = r"## Adaptive pass: ([\d,]+) s at 5 us a launch, ([\d,]+) s at 10 us\n"
    fast, slow = numbers_of(heading, report())
    (three,) = [row for row in table_rows(report()) if row[0].endswith(" x 3")]
    text = (TRACK / "README.md").read_text(encoding="utf-8")
    steps, launches, gigabytes = three[1], three[2], f"{float(three[3]):.0f}"
    pass_s = f"{fast:.0f} s at 5 us a launch, {slow:.0f} s at 10 us"
    (calibration,) = numbers_of(r"## Calibration: ([\d.]+) s\n", report())
    (ms,) = numbers_of(r"## Communication: ([\d.]+) ms a training step", report())
    questions = {
        "How long does the adaptive pass take?": [
            f"{launches} launches", f"{gigabytes} GB", f"{steps} steps", pass_s,
        ],
        "How long are calibration, quantization and each": [f"{calibration:.1f} s for calibration"],
        "Communication between GPUs:": [f"{ms:.2f} ms a step"],
    }  # fmt: skip
    for question, figures in questions.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {question}")]
        assert [figure for figure in figures if figure not in line] == []
    assert slow < 400  # so that it leaves time for the other passes
