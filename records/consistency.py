"""Whether the numbers in the log of a run agree with each other.

Everything that follows from other logged values is computed again: bits per byte from loss, tokens
and bytes; sums of bytes and of seconds; rates; flags; budgets from the knobs. What the logs cannot
show (that the artifact has this loss, that the seconds passed, which machine it was) is not checked
here; `check --rescore` scores the artifact again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from records.logs import FINAL_SCORES, Json, RunLog

SCORE_KEYS = ("val_loss", "val_bpb", "tokens", "bytes")
# Of what a run logs as rounded values: 8 decimals of losses and scores, 3 of seconds.
SCORE_ROUNDING, SECONDS_ROUNDING = 5e-9, 5e-4


def find_contradictions(log: RunLog) -> list[str]:
    """Return what in the events of a finished run cannot be true at the same time."""
    checks = (check_scores, check_flags, check_size_event, check_training, check_ledger)
    return [f"{log.path.name}: {problem}" for check in checks for problem in check(log)]


def check_scores(log: RunLog) -> Iterator[str]:
    """Yield contradictions to: every score is positive and bpb = loss / ln 2 * tokens / bytes."""
    for event in log.events:
        name = event["event"]
        if name not in ("val", "final_prequant", *FINAL_SCORES):
            continue
        if missing := [key for key in SCORE_KEYS if key not in event]:
            yield f"{name} has no {', '.join(missing)}"
            continue
        loss, bpb, tokens, num_bytes = (event[key] for key in SCORE_KEYS)
        if not all(math.isfinite(x) and x > 0 for x in (loss, bpb, tokens, num_bytes)):
            yield (
                f"{name}: val_loss {loss}, val_bpb {bpb}, tokens {tokens} and bytes {num_bytes} "
                "must be positive"
            )
            continue
        factor = tokens / (math.log(2) * num_bytes)
        if abs(bpb - loss * factor) > 1.1 * SCORE_ROUNDING * (1 + factor) + 1e-12 * bpb:
            yield (
                f"{name}: val_bpb is {bpb}, but val_loss {loss} over {tokens:,} tokens and "
                f"{num_bytes:,} bytes gives {loss * factor:.8f}"
            )


def check_flags(log: RunLog) -> Iterator[str]:
    """Yield scores that are compliant though partial, or though a knob allows to break rules."""
    values, targets = log.config["values"], log.last("data").get("val_targets")
    for name in FINAL_SCORES:
        if not (event := log.last(name)):
            continue
        partial, compliant = event.get("partial"), event.get("compliant")
        if compliant and partial:
            yield f"{name} is both partial and compliant"
        if compliant and values.get("ALLOW_NONCOMPLIANT") is True:
            yield f"{name} is compliant, but ALLOW_NONCOMPLIANT is set"
        if not partial and values.get("VAL_TOKENS_LIMIT"):
            yield f"{name} is not partial, but VAL_TOKENS_LIMIT={values['VAL_TOKENS_LIMIT']}"
        if targets is not None and event.get("tokens") != targets:
            yield f"{name} has {event.get('tokens')} tokens, the validation text {targets}"


def check_size_event(log: RunLog) -> Iterator[str]:
    """Yield sums that are wrong: of code and artifact, or of the parts of the artifact."""
    size = log.need("size", "artifact_bytes", "code_bytes", "total_bytes", "budget_bytes")
    if size["artifact_bytes"] + size["code_bytes"] != size["total_bytes"]:
        yield (
            f"artifact_bytes {size['artifact_bytes']:,} and code_bytes {size['code_bytes']:,} "
            f"are not total_bytes {size['total_bytes']:,}"
        )
    if not min(size["artifact_bytes"], size["code_bytes"]) > 0:
        yield "artifact_bytes and code_bytes must be positive"
    parts = sum(value for key, value in log.last("bytes").items() if key != "event")
    if parts and parts != size["artifact_bytes"]:
        yield f"the `bytes` event sums to {parts:,}, artifact_bytes is {size['artifact_bytes']:,}"
    yield from check_knob(log, "ARTIFACT_BUDGET_BYTES", "budget_bytes", size)


def check_knob(log: RunLog, knob: str, key: str, event: Json) -> Iterator[str]:
    """Yield a logged budget that is not the value of its knob."""
    value = log.config["values"].get(knob, event[key])
    if value != event[key]:
        yield f"{key} is {event[key]:,}, but {knob}={value}"


def check_training(log: RunLog) -> Iterator[str]:
    """Yield averages, rates and totals that do not follow from steps, seconds and tokens."""
    end = log.last("train_end")
    if not end:
        return
    for event in [*log.by_step("step"), {**end, "step": end.get("steps", 0)}]:
        yield from check_rates(event)
    keys = ("train_s", "tokens")
    if steps := log.by_step("step"):
        last = steps[-1]
        shown = {"steps": last["step"], **{key: last.get(key) for key in keys}}
        stated = {key: end.get(key) for key in ("steps", *keys)}
        if shown != stated:
            yield f"train_end has {stated}, the last step {shown}"


def check_rates(event: Json) -> Iterator[str]:
    """Yield violations of step_avg_ms * step = train_s and tokens_per_s * train_s = tokens."""
    name, step = event["event"], event["step"]
    keys = ("train_s", "tokens", "step_avg_ms", "tokens_per_s")
    if missing := [key for key in keys if key not in event]:
        yield f"{name} {step} has no {', '.join(missing)}"
        return
    train_s, tokens, step_ms, rate = (event[key] for key in keys)
    if not min(step, train_s, tokens) > 0:
        if name == "train_end":
            yield f"train_end: steps {step}, train_s {train_s}, tokens {tokens} must be positive"
        return
    if abs(step_ms - 1e3 * train_s / step) > 1e-3 + 1.1e3 * SECONDS_ROUNDING / step:
        yield f"{name} {step}: step_avg_ms {step_ms} is not {train_s} s over {step} steps"
    slack = 0.51 + rate * 1.1 * SECONDS_ROUNDING / train_s
    if abs(rate - tokens / train_s) > slack:
        yield f"{name} {step}: tokens_per_s {rate} is not {tokens} tokens over {train_s} s"


def check_ledger(log: RunLog) -> Iterator[str]:
    """Yield entries of the ledger below the seconds of their stages, and wrong budgets."""
    keys = ("training_s", "evaluation_s", "training_budget_s", "evaluation_budget_s")
    ledger = log.need("ledger", *keys)
    yield from check_knob(log, "MAX_WALLCLOCK_SECONDS", "training_budget_s", ledger)
    yield from check_knob(log, "EVAL_MAX_SECONDS", "evaluation_budget_s", ledger)
    scored_s = sum(log.last(name).get("eval_s", 0.0) for name in FINAL_SCORES)
    for name, least_s in (
        ("training_s", log.last("train_end").get("train_s", 0.0)),
        ("evaluation_s", scored_s),
    ):
        if ledger[name] < least_s - 10 * SECONDS_ROUNDING:
            yield f"the ledger has {name} {ledger[name]}, its stages took {least_s:.3f} s"
    if not ledger["evaluation_s"] > 0:
        yield "evaluation_s must be positive"
