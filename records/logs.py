"""The events of a run, as metrics.jsonl has them.

Every start of the script in a folder begins with a `config` event: the training, its continuation
after a kill, a later MODE=eval of the same artifact, an audit. Those from one `config` event to the
next are a session. The score of a folder is that of its last session that finished scoring; a
RunLog shows the events behind this score and leaves out later and earlier sessions that had no part
in it.

A run that was killed and resumed logs some events twice; the last one counts, and steps after the
checkpoint that it continued from do not. A kill can leave an incomplete line with the next event
appended to it; the incomplete part is skipped.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_gpt
from records.knobs import evaluation_knobs, format_knob_value
from train_gpt import InputError

Json = dict[str, Any]

METRICS, LOG = "metrics.jsonl", "train.log"
# The packed script, whose bytes are counted, and the readable one.
PACKED, SOURCE = "train_gpt.py", "train_gpt_source.py"


def source_file(folder: Path) -> Path:
    """Return the readable script of a record; older records have only that one."""
    return folder / (SOURCE if (folder / SOURCE).exists() else PACKED)


# Scores of the artifact, in the order in which a run computes them; the last one is its result.
# Repeated here, as the tracks in submission.py are: the checker does not take the rules from the
# script that it checks.
FINAL_SCORES = ("final_quantized", "final_sliding", "final_ttt")
# Events of the session that scored; those of other sessions belong to other scores.
SCORING_EVENTS = {*FINAL_SCORES, "pass", "final", "size", "bytes", "ledger"}
STEP_EVENTS = {"step", "val", "checkpoint"}
# Knobs of one run or one person. They are not part of the settings that a record publishes.
RUN_KNOBS = {
    "ARTIFACT", "CHECK_DATA", "MAX_NEW_TOKENS", "METRICS", "MODE", "PROMPT", "RECIPE", "RESUME",
    "RUN_DIR", "RUN_ID", "SEED", "SUBMISSION_AUTHOR", "SUBMISSION_NAME", "TEMPERATURE", "TOP_K",
}  # fmt: skip
# Knobs that a record states once, so that training and scoring must agree on them.
SHARED_KNOBS = ("DATA_PATH", "TOKENIZER_PATH", "PRECISION", "COMPILE", "ATTENTION", "TRACK")

# --- Types of the values -------------------------------------------------------------------------
# The kind of every value that a tool reads. Older runs log fewer keys, so a key may be missing.

MAX_NUMBER = 1e18
COUNT, NUMBER, LOSS, TEXT, FLAG = "a count", "a number of 0 or more", "a number", "text", "a flag"
SCORE_KINDS = {
    "val_loss": LOSS, "val_bpb": LOSS, "eval_s": NUMBER, "tokens": COUNT, "bytes": COUNT,
    "partial": FLAG, "compliant": FLAG, "adjusted": TEXT, "estimated_s": NUMBER,
}  # fmt: skip
PACE_KINDS = {"step_avg_ms": NUMBER, "tokens_per_s": NUMBER, "train_s": NUMBER, "tokens": COUNT}
EVENT_KINDS: dict[str, dict[str, str]] = {
    "run": {"run_id": TEXT, "seed": COUNT, "ranks": COUNT},
    "hardware": {"name": TEXT},
    "model": {"params": COUNT},
    "data": {"train_tokens": COUNT, "val_targets": COUNT},
    "stage": {"name": TEXT, "elapsed_s": NUMBER, "budget": TEXT},
    "step": {
        "step": COUNT,
        "steps": COUNT,
        "progress": NUMBER,
        "eta_s": NUMBER,
        "train_loss": LOSS,
        **PACE_KINDS,
    },  # fmt: skip
    "val": {"step": COUNT, **SCORE_KINDS},
    "resume": {"step": COUNT},
    "checkpoint": {"step": COUNT},
    "train_end": {"steps": COUNT, **PACE_KINDS},
    "size": dict.fromkeys(("artifact_bytes", "code_bytes", "total_bytes", "budget_bytes"), COUNT),
    "ledger": dict.fromkeys(
        ("training_s", "evaluation_s", "other_s", "training_budget_s", "evaluation_budget_s"),
        NUMBER,
    ),
    "yardstick": {
        "xz_bpb": NUMBER,
        "zstd_bpb": NUMBER,
        "ppmd_bpb": NUMBER,
        "ppmd_primed_bpb": NUMBER,
        "text_bytes": COUNT,
        "prime_bytes": COUNT,
    },
    "pass": {"name": TEXT, "estimated_s": NUMBER, "adjusted": TEXT},
    "final": {"score": TEXT, "notes": TEXT},
    **dict.fromkeys(("final_prequant", *FINAL_SCORES), SCORE_KINDS),
}
ALL_KEYS = {"versions": TEXT, "bytes": COUNT}  # events of any keys, with one kind of value


def is_kind(value: Any, kind: str) -> bool:
    """Return whether a value read from JSON is of one of the kinds above."""
    if kind in (TEXT, FLAG):
        return isinstance(value, str if kind == TEXT else bool)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == LOSS and not math.isfinite(value):  # a run that diverged
        return True
    return abs(value) < MAX_NUMBER and (
        kind == LOSS or (value >= 0 and (kind == NUMBER or isinstance(value, int)))
    )


def config_problems(event: Json) -> list[str]:
    """Return what is wrong with a `config` event: values by knob, and names of changed knobs."""
    values, changed = event.get("values"), event.get("changed")
    if not (isinstance(values, dict) and isinstance(changed, list)):
        return ["values is not an object or changed is not a list"]
    bad = [name for name, value in values.items() if isinstance(value, dict | list | None)]
    bad += [repr(name) for name in changed if not (isinstance(name, str) and name in values)]
    return [f"{name} has no value" for name in bad]


def event_problems(event: Json) -> list[str]:
    """Return what is wrong with an event: each key whose value is of another kind."""
    name = event["event"]
    if name == "config":
        return config_problems(event)
    kinds = EVENT_KINDS.get(name, {})
    if name in ALL_KEYS:
        kinds = dict.fromkeys(event.keys() - {"event"}, ALL_KEYS[name])
    return [
        f"{key} is {shorten(event[key])}, not {kind}"
        for key, kind in kinds.items()
        if key in event and not is_kind(event[key], kind)
    ]


def shorten(value: Any, max_characters: int = 60) -> str:
    """Return the repr of a value from JSON, cut to a length that fits a message."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."


# --- Reading -------------------------------------------------------------------------------------


def parse_event(line: str) -> Json | None:
    """Return the event of one line of metrics.jsonl, or None if the line is incomplete."""
    try:
        event = json.loads(line[max(0, line.rfind('{"event"')) :])
    except (ValueError, RecursionError):
        return None
    is_event = isinstance(event, dict) and isinstance(event.get("event"), str)
    return event if is_event else None


@dataclass(frozen=True)
class RunLog:
    """The events of one run, in order."""

    path: Path
    all_events: list[Json]

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Read a metrics.jsonl; raise InputError if it has no event, or one of wrong types."""
        if not path.is_file():
            raise InputError(f"{path} is missing: not the folder of a run of train_gpt.py")
        text = path.read_text(encoding="utf-8", errors="replace")
        events = []
        for number, line in enumerate(text.split("\n"), start=1):
            if (event := parse_event(line)) is None:
                continue
            if problems := event_problems(event):
                where = f"{path}:{number}: `{event['event']}` event"
                raise InputError(f"{where}: {'; '.join(problems)}")
            events.append(event)
        if not events:
            raise InputError(f"{path} holds no event")
        return cls(path, events)

    @functools.cached_property
    def sessions(self) -> list[list[Json]]:
        """The events of each start of the script."""
        starts = [i for i, event in enumerate(self.all_events) if event["event"] == "config"]
        cuts = [0, *starts, len(self.all_events)]
        return [self.all_events[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if a < b]

    @functools.cached_property
    def scoring_index(self) -> int:
        """The last session that finished scoring, else that has any final score, else the last."""
        names = [{event["event"] for event in session} for session in self.sessions]
        finished = [i for i, found in enumerate(names) if {FINAL_SCORES[0], "ledger"} <= found]
        scored = [i for i, found in enumerate(names) if found & {*FINAL_SCORES}]
        return (finished or scored or [len(names) - 1])[-1]

    @functools.cached_property
    def events(self) -> list[Json]:
        """The events behind the score: the training and its continuations, then the scoring."""
        index = self.scoring_index
        trained = [s for s in self.sessions[:index] if mode_of(s) not in ("eval", "audit")]
        before = list[Json]()
        for session in trained:
            before = without_discarded(before, session)
            before += [e for e in session if e["event"] not in SCORING_EVENTS]
        scoring = self.sessions[index]
        later = [e for s in self.sessions[index + 1 :] for e in s if e["event"] == "yardstick"]
        return [*without_discarded(before, scoring), *scoring, *later]

    def all(self, name: str) -> list[Json]:
        """Return the events of that name."""
        return [event for event in self.events if event["event"] == name]

    def last(self, name: str) -> Json:
        """Return the last event of that name, or an empty dict."""
        return (self.all(name) or [{}])[-1]

    def need(self, name: str, *keys: str) -> Json:
        """Return the last event of that name; raise InputError unless it is there with `keys`."""
        if not (event := self.last(name)):
            raise InputError(f"{self.path} has no `{name}` event: the run is not finished")
        if missing := [key for key in keys if key not in event]:
            raise InputError(f"{self.path}: the `{name}` event has no {', '.join(missing)}")
        return event

    def by_step(self, name: str) -> list[Json]:
        """Return the events of that name sorted by step, the last one of each step."""
        steps = {event["step"]: event for event in self.all(name) if "step" in event}
        return [steps[step] for step in sorted(steps)]

    @property
    def config(self) -> Json:
        """The configuration behind the score.

        That is the one of the session that scored. If this was a later MODE=eval, which takes the
        model from the artifact, only its evaluation knobs count and the rest is the training's.
        """
        if not (configs := self.all("config")):
            raise InputError(f"{self.path} has no `config` event")
        scoring = configs[-1]
        if scoring["values"].get("MODE") != "eval" or len(configs) == 1:
            return scoring
        training, evaluation = configs[-2], evaluation_knobs()
        values = {**training["values"]}
        values |= {name: v for name, v in scoring["values"].items() if name in evaluation}
        changed = {name for name in training["changed"] if name not in evaluation}
        changed |= {name for name in scoring["changed"] if name in evaluation}
        return {**training, "values": values, "changed": sorted(changed)}

    def knob(self, name: str) -> Any:
        """Return the value of a knob; raise InputError if the log does not have it."""
        try:
            return self.config["values"][name]
        except KeyError:
            raise InputError(f"{self.path}: the `config` event has no {name}") from None

    @property
    def seed(self) -> str:
        """The run's seed, as the key that submission.json uses."""
        if not is_kind(seed := self.knob("SEED"), COUNT):
            raise InputError(f"{self.path}: SEED={shorten(seed)} is not a seed")
        return str(seed)

    @property
    def score(self) -> Json:
        """The final score event that the run reports."""
        names = [name for name in FINAL_SCORES if self.last(name)]
        keys = ("val_bpb", "val_loss", "tokens", "bytes", "partial")
        return self.need(names[-1] if names else FINAL_SCORES[0], *keys)


def without_discarded(before: list[Json], session: list[Json]) -> list[Json]:
    """Return the events before a session, without those of steps that it took again.

    It took all steps again if it began to train and did not resume from a checkpoint.
    """
    if not any(e["event"] == "begin" and e.get("name") == "train" for e in session):
        return before
    step = next((e.get("step", 0) for e in session if e["event"] == "resume"), 0)
    return [e for e in before if e["event"] not in STEP_EVENTS or e.get("step", 0) <= step]


def mode_of(session: list[Json]) -> str:
    """Return the MODE of a session, or an empty string."""
    return str(session[0].get("values", {}).get("MODE", ""))


def run_settings(log: RunLog) -> dict[str, str]:
    """Return the knobs that differ from their defaults, in the format of run.env."""
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
