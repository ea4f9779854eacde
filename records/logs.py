"""The events of a run, as metrics.jsonl has them.

A run that was killed and resumed logs some events twice; the last one counts. A kill can leave an
incomplete line with the next event appended to it; the incomplete part is skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_gpt
from train_gpt import InputError

Json = dict[str, Any]

METRICS, LOG, SOURCE = "metrics.jsonl", "train.log", "train_gpt_source.py"
# Scores of the artifact, in the order in which a run computes them; the last one is its result.
FINAL_SCORES = ("final_quantized", "final_sliding", "final_ttt")
# Knobs of one run or one person. They are not part of the setting that a record publishes.
RUN_KNOBS = {
    "ARTIFACT", "MODE", "RECIPE", "RESUME", "RUN_DIR", "RUN_ID", "SEED", "SUBMISSION_AUTHOR",
    "SUBMISSION_NAME",
}  # fmt: skip


def parse_event(line: str) -> Json | None:
    """Return the event of one line of metrics.jsonl, or None if the line is incomplete."""
    try:
        event = json.loads(line[max(0, line.rfind('{"event"')) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


@dataclass(frozen=True)
class RunLog:
    """The events of one run, in order."""

    path: Path
    events: list[Json]

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Read a metrics.jsonl; raise InputError if it is missing or has no event."""
        if not path.is_file():
            raise InputError(f"{path} is missing: not the folder of a run of train_gpt.py")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        events = [event for event in map(parse_event, lines) if event]
        if not events:
            raise InputError(f"{path} holds no event")
        return cls(path, events)

    def last(self, name: str) -> Json:
        """Return the last event of that name, or an empty dict."""
        found = [event for event in self.events if event["event"] == name]
        return found[-1] if found else {}

    def need(self, name: str) -> Json:
        """Return the last event of that name; raise InputError if there is none."""
        if not (event := self.last(name)):
            raise InputError(f"{self.path} has no `{name}` event: the run is not finished")
        return event

    def by_step(self, name: str) -> list[Json]:
        """Return the events of that name sorted by step, the last one of each step."""
        steps = {event["step"]: event for event in self.events if event["event"] == name}
        return [steps[step] for step in sorted(steps)]

    @property
    def config(self) -> Json:
        """The last `config` event of a training, or that of a MODE=eval if there is no other."""
        found = [event for event in self.events if event["event"] == "config"]
        trained = [event for event in found if event["values"].get("MODE") != "eval"]
        if not found:
            raise InputError(f"{self.path} has no `config` event")
        return (trained or found)[-1]

    @property
    def seed(self) -> str:
        """The run's seed, as the key that submission.json uses."""
        return str(self.config["values"]["SEED"])

    @property
    def score(self) -> Json:
        """The final score event that the run reports."""
        names = [name for name in FINAL_SCORES if self.last(name)]
        return self.need(names[-1] if names else FINAL_SCORES[0])


def format_knob_value(value: Any) -> str:
    """Return a knob's value as an environment variable spells it."""
    return str(int(value)) if isinstance(value, bool) else str(value).removesuffix(".0")


def run_settings(log: RunLog) -> dict[str, str]:
    """Return the knobs that differ from their defaults, as run.env spells them."""
    config = log.config
    names = [name for name in config["changed"] if name not in RUN_KNOBS]
    return {name: format_knob_value(config["values"][name]) for name in names}


def append_event(folder: Path, event: str, **values: Any) -> None:
    """Append an event to the log and the metrics of a finished run, in the run's own format."""
    lines = {LOG: train_gpt.format_event(event, **values)}
    lines[METRICS] = json.dumps({"event": event, **values})
    for name, line in lines.items():
        text = (folder / name).read_bytes() if (folder / name).exists() else b""
        with open(folder / name, "a", encoding="utf-8") as file:
            file.write("\n" * (text[-1:] not in (b"", b"\n")) + line + "\n")
