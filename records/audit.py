"""Audit the score of an artifact: does its evaluation keep the four conditions of legality?

    python records/audit.py --artifact logs/x/artifact.bin
    python records/audit.py --artifact X/artifact.bin --script X/train_gpt.py  # with its own script

The knobs come from the environment, as for MODE=eval of the script. The adaptive pass (or the
sliding-window pass, if nothing adapts) runs several times over the beginning of the validation
text and is checked against the conditions of openai/parameter-golf#1017. That beginning has about
4 * TTT_CHUNK_TOKENS targets; with LoRA, also documents after those that choose its learning rates.

    C1  a score depends on the tokens before it alone: other tokens do not change earlier scores
    C2  a score comes from a distribution over the whole vocabulary: its probabilities sum to 1
    C3  a score is computed before anything is trained on it: learning rate 0 equals no training
    C4  there is a single pass from left to right: every target is scored once

The log gets one line per condition. Exit status: 0 (legal), 1 (not legal), 2 (bad input).

Sections: 1. Conditions  2. Audit  3. Command line
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# Python puts the folder of this file on the path: records.py would hide the package of that name.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "records")]

import train_gpt  # noqa: E402  (the path above makes the import possible)
from train_gpt import GPT, Run, Score, Validation  # noqa: E402

# --- 1. Conditions -------------------------------------------------------------------------------
# Each check returns messages, empty if the condition holds. `script` is the module under audit:
# train_gpt, or the file that --script names.

ROWS_PER_CHECK = 8  # positions whose whole distribution is computed in one check
MAX_EXCESS = 1e-5  # of the sum of the probabilities over 1: thousands of float32 terms
MAX_SCORE_ERROR = 1e-4  # nats between a recorded score and the distribution it is said to be from
ROUNDING = 1e-3  # nats: what a different batch shape may change
MIN_TARGETS = 4096  # of the text under audit
CHECKED_PLACES = (1 / 3, 2 / 3)  # of the text, where tokens are changed
REQUIRED = train_gpt.__all__


@torch.no_grad()
def check_normalization(
    logits_NV: Tensor,
    target_N: Tensor,
    scored_N: Tensor,
    mixed: Any,
    *,
    calls: itertools.count[int],
    problems: list[str],
) -> None:
    """C2: check some scores against the distribution over all tokens, at calls 1, 2, 4, 8, ...

    It is called with the logits after the softcap, the targets, the recorded nats and the mixer
    with its inputs (None without one).
    """
    number = next(calls)
    is_power_of_two = number & (number - 1) == 0
    scored = torch.ones_like(target_N) if mixed is None else mixed[2].flatten()
    rows = scored.nonzero().flatten()
    if not is_power_of_two or not len(rows):
        return
    rows = rows[:: -(-len(rows) // ROWS_PER_CHECK)]
    logits_NV = logits_NV[rows]
    if mixed is None:
        logp_NV = logits_NV.double().log_softmax(dim=1)
    else:
        mixer, context_BTK, _ = mixed
        logp_NV = mixer.log_probs(logits_NV, context_BTK.flatten(0, 1)[rows])
    excess = float((logp_NV.exp().sum(dim=1) - 1).abs().max())
    target_logp_N = logp_NV.gather(1, target_N[rows, None])[:, 0]
    error = float((target_logp_N + scored_N[rows]).abs().max())
    if excess > MAX_EXCESS:
        problems.append(f"probabilities sum to 1 +- {excess:.3g}")
    if error > MAX_SCORE_ERROR:
        problems.append(f"the score is {error:.3g} nats off the distribution")


def score_text(
    script: Any, run: Run, model: GPT, text: Validation, *, learns: bool = True
) -> tuple[Score, np.ndarray]:
    """The score of the pass under audit over `text`, and the nats of every target."""
    stride = run.cfg.eval_stride or run.cfg.score_seq_len
    score = script.evaluate(run, model, text, stride, adaptive=run.cfg.adapts, learns=learns)
    nll_T = run.all_reduce_sum(torch.from_numpy(score.nll_T).to(run.device))
    return score, nll_T.cpu().numpy()


def changed_texts(script: Any, ids: np.ndarray, place: int) -> list[tuple[str, np.ndarray, float]]:
    """Texts that differ from token `place` on: what differs, the ids, the rounding to allow."""
    is_bos = ids == script.BOS_ID
    token, reversed_rest, new_document = ids.copy(), ids.copy(), ids.copy()
    token[place] = 2 + (ids[place] == 2)
    rest = ~is_bos[place:]  # documents still begin where they did
    reversed_rest[place:][rest] = ids[place:][rest][::-1]
    new_document[place] = script.BOS_ID
    return [
        ("token", token, 0.0),
        ("text from", reversed_rest, 0.0),
        # Documents are batched by length, and sums over other batches round differently.
        ("document from", new_document, ROUNDING),
    ]


def check_causality(
    script: Any, run: Run, model: GPT, text: Validation, base_T: np.ndarray
) -> list[str]:
    """C1: no other token, and no other continuation, may change a score before it."""
    # Kernels that sum in any order differ between equal runs; with all others this is 0.
    noise = np.abs(score_text(script, run, model, text)[1] - base_T).max()
    problems = []
    for part in CHECKED_PLACES:
        place = int(part * text.num_targets)
        place += int(text.ids[place] == script.BOS_ID)
        for changed, ids, rounding in changed_texts(script, text.ids, place):
            nll_T = score_text(script, run, model, text._replace(ids=ids))[1]
            change = float(np.abs(nll_T - base_T)[: max(0, place - 1)].max(initial=0))
            if change > max(4 * noise, rounding):
                problems.append(f"another {changed} {place} changes earlier scores by {change:.3g}")
    return problems


def check_learning_rate_zero(script: Any, run: Run, model: GPT, text: Validation) -> list[str]:
    """C3: a pass with learning rate 0 must score what a pass without training does, to the bit."""
    cfg = run.cfg
    run.cfg = dataclasses.replace(cfg, ttt_lr=0.0, ttt_lora_lr=0.0)
    zero_T = score_text(script, run, model, text)[1]
    none_T = score_text(script, run, model, text, learns=False)[1]
    run.cfg = cfg
    return [] if np.array_equal(zero_T, none_T) else ["learning rate 0 is not no learning"]


# --- 2. Audit ------------------------------------------------------------------------------------
# The passes leave the model as it was, which is checked too.


def find_problems(script: Any, run: Run, model: GPT, text: Validation) -> dict[str, list[str]]:
    """All messages by condition."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normalization, order = list[str](), list[str]()
    model.normalization_check = functools.partial(
        check_normalization,
        calls=itertools.count(1),
        problems=normalization,
    )
    score, base_T = score_text(script, run, model, text)
    model.normalization_check = None
    causality = check_causality(script, run, model, text, base_T)
    too_early = [problem for problem in score.problems if "were scored" in problem]
    too_early += check_learning_rate_zero(script, run, model, text)
    order += [problem for problem in score.problems if "were scored" not in problem]
    if (score.tokens, score.num_bytes) != (text.num_targets, int(text.target_bytes.sum())):
        order.append(f"{score.tokens} of {text.num_targets} targets scored")
    if any(not torch.equal(before[name], x) for name, x in model.state_dict().items()):
        order.append("the pass left other weights behind")
    return {
        "C1 strict causal dependence": causality,
        "C2 full normalized distribution": normalization,
        "C3 score before update": too_early,
        "C4 single left-to-right pass": order,
    }


def gather_problems(run: Run, own: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The messages of all ranks by condition, each once: every rank checks its own targets."""
    found: list[Any] = [own]
    if run.world_size > 1:
        found *= run.world_size
        dist.all_gather_object(found, own)
    return {name: [*dict.fromkeys(x for rank in found for x in rank[name])] for name in own}


def num_audited_targets(cfg: train_gpt.Config) -> int:
    """Targets for a few rounds of training, and for documents before and after a choice of rates.

    CHECKED_PLACES are then on both sides of the choice, if the script chooses.
    """
    choice = int(2.5 * train_gpt.PILOT_TARGETS) if cfg.ttt_method == "lora" else 0
    return max(MIN_TARGETS, 4 * cfg.ttt_chunk_tokens, choice)


def audit(run: Run, model: GPT, validation: Validation, script: Any = train_gpt) -> None:
    """Log a verdict for each condition; RunFailed of `script` if one does not hold."""
    # No clock decides what is trained: passes must be equal.
    run.cfg = dataclasses.replace(run.cfg, eval_max_seconds=0.0)
    count = min(validation.num_targets, num_audited_targets(run.cfg))
    ids, target_bytes = validation.ids[: count + 1], validation.target_bytes[:count]
    text = validation._replace(ids=ids, target_bytes=target_bytes, partial=True)
    by_condition = gather_problems(run, find_problems(script, run, model, text))
    for condition, problems in by_condition.items():
        run.log(
            "audit",
            condition=condition,
            verdict="fail" if problems else "pass",
            targets=count,
            detail=problems[0] if problems else "no problem found",
        )
    failed = [condition for condition, problems in by_condition.items() if problems]
    if failed:
        raise script.RunFailed(f"not legal: {'; '.join(failed)}")


# --- 3. Command line -----------------------------------------------------------------------------
# Under torchrun, the ranks share the passes as they share an evaluation.


def load_script(path: Path) -> Any:
    """Import a training script, readable or packed; InputError if this tool cannot audit it."""
    if path.resolve() == Path(train_gpt.__file__).resolve():
        return train_gpt
    if not path.is_file():
        raise train_gpt.InputError(f"--script {path} does not exist")
    spec = importlib.util.spec_from_file_location("audited_train_gpt", path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise train_gpt.InputError(f"--script {path} cannot be imported: {error}") from error
    missing = [name for name in REQUIRED if not hasattr(module, name)]
    if missing:
        raise train_gpt.InputError(
            f"--script {path} has no {', '.join(missing)}: use the records/audit.py of its "
            "version, or MODE=audit of the script if it has that"
        )
    return module


def audit_artifact(script: Any, artifact: Path) -> None:
    """Read the artifact as MODE=eval does and audit its score."""
    env = {**os.environ, "MODE": "eval", "ARTIFACT": str(artifact)}
    cfg = script.config_from_env(env)
    script.require(artifact.is_file(), f"--artifact {artifact} does not exist")
    with script.start_run(cfg, env) as run:
        processor, tokenizer_sha = script.load_tokenizer(cfg)
        script.prepare_directory(run, artifact)
        script.check_sizes(run, artifact)
        with run.stage("read_artifact", "evaluation"):
            model = script.read_artifact(artifact, run, tokenizer_sha)
        audit(run, model, script.load_validation(run.cfg, processor), script)


def report(error: Exception, status: int) -> int:
    """Print why the audit ended, once for all ranks; returns the exit status."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Audit the artifact that the command line names; returns the exit status."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="audit.py", description=summary)
    parser.add_argument("--artifact", type=Path, required=True, help="file to audit")
    parser.add_argument(
        "--script", type=Path, default=ROOT / "train_gpt.py", help="script that scores it"
    )
    options = parser.parse_args(argv)
    try:
        script = load_script(options.script)
    except train_gpt.InputError as error:
        return report(error, 2)
    try:
        audit_artifact(script, options.artifact)
    except script.InputError as error:
        return report(error, 2)
    except script.Interrupted as error:
        return report(error, 143)
    except (script.RunFailed, OSError) as error:
        return report(error, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
