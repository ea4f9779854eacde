"""Synthetic runs for the tests of the records tool: consistent logs of runs that never happened."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

import train_gpt
from records.logs import RunLog
from records.submission import compute_submission
from tests.conftest import plain_config

Event = dict[str, Any]

# The source that "ran": its Config has some of the script's knobs, with the same defaults.
SOURCE = f'''"""The source that ran."""

class Config:
    num_layers: int = knob({train_gpt.Config().num_layers}, "distinct transformer blocks")
    track: str = knob({train_gpt.Config().track!r}, "competition track")
    allow_noncompliant: bool = knob(False, "let methods run that the rules forbid")
'''
CODE_BYTES = len(train_gpt.pack_source(SOURCE))
BPB = {1: 1.31, 2: 1.29, 3: 1.33}
TOKENS, NUM_BYTES, NUM_STEPS, STEP_TOKENS = 4000, 10_000, 400, 16_384


def config_event(**changes: Any) -> Event:
    """Return a `config` event with the script's defaults but for `changes`."""
    cfg = plain_config(**changes)
    values = {f.name.upper(): getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return {"event": "config", "values": values, "changed": train_gpt.changed_knobs(cfg)}


def score(bpb: float, **changes: Any) -> Event:
    """Return the keys of a final score."""
    loss = round(bpb * math.log(2) * NUM_BYTES / TOKENS, 8)
    common: Event = dict(eval_s=2.5, tokens=TOKENS, bytes=NUM_BYTES, partial=False, compliant=True)
    return {"val_loss": loss, "val_bpb": bpb, **common, **changes}


def pace(step: int, train_s: float) -> Event:
    """Return the rates that a run logs after `step` steps."""
    tokens = step * STEP_TOKENS
    return {
        "step_avg_ms": round(1e3 * train_s / step, 3),
        "tokens_per_s": round(tokens / train_s),
        "train_s": train_s,
        "tokens": tokens,
    }


def step_event(number: int, loss: float) -> Event:
    """Return a `step` event; a step takes a quarter of a second."""
    shown = dict(step=number, steps=NUM_STEPS, train_loss=loss, lr_scale=1.0)
    return {"event": "step", **shown, **pace(number, number / 4)}


def setup_events(seed: int, **changes: Any) -> list[Event]:
    """Return the events at the start of a session."""
    versions = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6", "sentencepiece": "0.2.3"}
    sha = hashlib.sha256(SOURCE.encode()).hexdigest()
    return [
        config_event(seed=seed, num_layers=6, model_dim=256, **changes),
        {"event": "run", "run_id": f"run_{seed}", "seed": seed, "ranks": 1, "device": "cpu"},
        {"event": "versions", **versions, "source_sha256": sha},
        {"event": "hardware", "name": "2 CPU cores, Imaginary 3000"},
    ]


def final_events(seed: int, scores: dict[str, float]) -> list[Event]:
    """Return the events of scoring: the scores (bpb by kind), sizes and the ledger."""
    parts = dict(mlp_codes_bytes=699_000 + seed, frame_bytes=1000)
    artifact_bytes = sum(parts.values())
    sizes = dict(artifact_bytes=artifact_bytes, code_bytes=CODE_BYTES)
    total = artifact_bytes + CODE_BYTES
    spent = dict(training_s=100.5, evaluation_s=9.25 + seed, other_s=20.0)
    return [
        {"event": "size", **sizes, "total_bytes": total, "budget_bytes": 16_000_000},
        {"event": "bytes", **parts},
        *({"event": f"final_{kind}", **score(bpb)} for kind, bpb in scores.items()),
        {"event": "ledger", **spent, "training_budget_s": 600.0, "evaluation_budget_s": 600.0},
    ]


def run_events(seed: int, bpb: float, **changes: Any) -> list[Event]:
    """Return the events of a finished run whose sliding score is `bpb`."""
    noise = np.random.default_rng(seed).normal(0, 0.05, NUM_STEPS + 1)
    logged = (*range(1, NUM_STEPS, 4), NUM_STEPS)
    losses = {n: round(2.2 + 5 * math.exp(-n / 25) + noise[n] - n / 800, 5) for n in logged}
    return [
        *setup_events(seed, **changes),
        {"event": "model", "params": 4_123_456, "plan": "0> 1> 2(0) 3"},
        {"event": "data", "train_tokens": 10_000_000, "val_targets": TOKENS},
        *(step_event(n, loss) for n, loss in losses.items()),
        *({"event": "val", "step": n, **score(2.9 - n / 500)} for n in (100, 200, 300)),
        {"event": "train_end", "steps": NUM_STEPS, **pace(NUM_STEPS, NUM_STEPS / 4)},
        {"event": "final_prequant", **score(bpb + 0.02)},
        *final_events(seed, {"quantized": bpb + 0.025, "sliding": bpb}),
    ]


def log_text(events: list[Event]) -> str:
    """Return train.log of a run with these events, in the script's format."""
    lines = []
    for event in events:
        if event["event"] == "config":
            lines += [
                f"config {' *'[name in event['changed']]} {name}:{value}"
                for name, value in sorted(event["values"].items())
            ]
        else:
            lines.append(train_gpt.format_event(**event))
        if event["event"] == "hardware":
            lines.append(f"{'=' * 30} source {'=' * 30}\n{SOURCE}\n{'=' * 68}")
    return "\n".join([*lines, ""])


def metrics_text(events: list[Event]) -> str:
    """Return metrics.jsonl of a run with these events."""
    return "".join(json.dumps(event) + "\n" for event in events)


def write_run(folder: Path, events: list[Event]) -> Path:
    """Write a run's folder with log, metrics, source and the run's own submission.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.log").write_text(log_text(events), "utf-8", "backslashreplace")
    (folder / "metrics.jsonl").write_text(metrics_text(events), encoding="utf-8")
    (folder / "train_gpt_source.py").write_text(SOURCE, encoding="utf-8")
    (folder / "train_gpt.py").write_bytes(train_gpt.pack_source(SOURCE))
    described = {"author": "A. Author", "date": "2026-01-02", "name": "run", "previous": ""}
    own = compute_submission([RunLog.read(folder / "metrics.jsonl")], described)
    (folder / "submission.json").write_text(json.dumps(own), encoding="utf-8")
    return folder


def write_runs(folder: Path) -> list[Path]:
    """Write three finished runs that differ in their seed."""
    return [write_run(folder / f"run{s}", run_events(s, bpb)) for s, bpb in BPB.items()]
