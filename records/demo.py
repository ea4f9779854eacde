"""The demo (`make run`): the whole job on a corpus that needs no download.

Its stages: corpus, training and scoring, compressors, plot, record, samples. Each one prints what
it does and about how long that takes; the first one that fails ends the demo.
"""

from __future__ import annotations

import datetime
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import train_gpt
from records import ROOT
from records.build import build_record
from records.compressors import list_yardsticks, yardstick_run
from records.logs import LOG, METRICS, RunLog
from records.plots import STAGES, draw_plot
from train_gpt import Config

DEMO_DATA = "data/demo"
DEMO_COMMAND = (
    f"python data/prepare.py --source stdlib --out {DEMO_DATA} --vocab-size 1024 --write-val-text"
)
NUM_DEMO_STAGES = 6
SAMPLE_PROMPTS = ("import ", "class ", "def ")  # for the demo corpus
SAMPLE_TOKENS = 60
PASS_S, SPEED_TEST_S = 40.0, 2.0  # a pass over the validation text at most; measuring the speed
STOP_PATIENCE_S = 60  # a run that gets SIGTERM finishes its step and saves a checkpoint


class StageFailed(RuntimeError):
    """A stage of the demo failed; `status` is its exit status, 128 + the number of a signal."""

    def __init__(self, what: str, status: int):
        super().__init__(f"{what} ended with exit status {status}")
        self.status = status if status > 0 else 128 - status


def announce(number: int, text: str) -> None:
    """Print the progress line of a stage."""
    print(f"\n[{number}/{NUM_DEMO_STAGES}] {text}", flush=True)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to `process`, wait for it, then kill all processes that it started."""
    process.terminate()
    try:
        process.wait(STOP_PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        print("still running; killing it", file=sys.stderr)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # no process of the group is left
    process.wait()


def run_command(command: Sequence[str], what: str, env: Mapping[str, str]) -> None:
    """Run a stage as a process and show its output; raise StageFailed if it fails."""
    # In its own session, so that Ctrl-C reaches only this process, which then stops the stage.
    process = subprocess.Popen(command, cwd=ROOT, env=dict(env), start_new_session=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        stop_group(process)
        raise
    if status:
        raise StageFailed(what, status)


def print_summary(folder: Path, elapsed_s: float) -> None:
    """Print the table at the end of the demo."""
    log = RunLog.read(folder / METRICS)
    end = log.need("train_end", "steps", "tokens_per_s")
    size = log.need("size", "artifact_bytes", "total_bytes", "budget_bytes")
    yardsticks = list_yardsticks(log.need("yardstick"))
    rows = {
        "parameters": f"{log.need('model', 'params')['params']:,}",
        "steps": f"{end['steps']:,}",
        "tokens/s": f"{end['tokens_per_s']:,.0f}",
        **{f"bpb, {STAGES[n]}": f"{log.last(n)['val_bpb']:.4f}" for n in STAGES if log.last(n)},
        **{f"bpb, {name}": f"{bpb:.4f}" for name, bpb in yardsticks},
        "artifact bytes": f"{size['artifact_bytes']:,}",
        "counted bytes (with code)": f"{size['total_bytes']:,} of {size['budget_bytes']:,}",
    }  # fmt: skip
    adapted = {"adjusted": log.score, "untrained": log.score, "notes": log.last("final")}
    rows |= {f"adapted ({key})": e[key] for key, e in adapted.items() if e.get(key)}
    files = {"log": LOG, "submission": "submission.json", "plot": "plot.png", "record": "record/"}
    rows |= {name: f"{folder}/{file}" for name, file in files.items()}
    rows["seconds in total"] = f"{elapsed_s:.0f}"
    width = max(map(len, rows))
    print("\n" + "\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))
    beaten = [name for name, bpb in yardsticks if log.score["val_bpb"] < bpb]
    missed = [name for name, _ in yardsticks if name not in beaten]
    print(f"The model beats {', '.join(beaten) or 'no compressor'}.")
    if missed:
        print(f"It does not beat {', '.join(missed)}.", flush=True)


def scoring_speed(cfg: Config) -> float:
    """Return how many tokens per second a model of this shape scores on the CPU, not compiled."""
    device, dtype = train_gpt.open_device(cfg, 0)
    if device.type == "cuda":
        return math.inf
    model = train_gpt.GPT(cfg, train_gpt.choose_attention_backend(cfg, device, dtype), dtype)
    ids_BT = torch.ones(4, cfg.train_seq_len, dtype=torch.int64)
    model.eval_nll(ids_BT, ids_BT)
    started_s, count, elapsed_s = time.perf_counter(), 0, 0.0
    while elapsed_s < SPEED_TEST_S:
        model.eval_nll(ids_BT, ids_BT)
        count, elapsed_s = count + ids_BT.numel(), time.perf_counter() - started_s
    return count / elapsed_s


def limit_validation(cfg: Config) -> dict[str, str]:
    """Return the VAL_TOKENS_LIMIT with which a pass over the text takes at most PASS_S, if any."""
    tokens = train_gpt.read_manifest(cfg).val_tokens or 0
    limit = max(cfg.val_batch_size, PASS_S * scoring_speed(cfg))
    if cfg.val_tokens_limit or tokens <= limit:
        return {}
    shown = f"the first {limit:,.0f} of {tokens:,} validation tokens"
    print(f"      adapted to a slow machine: {shown} are scored, which marks the score partial")
    return {"VAL_TOKENS_LIMIT": f"{limit:.0f}"}


def demo_stages(folder: Path, env: Mapping[str, str], cfg: Config) -> None:
    """Run all stages of the demo, with the run in `folder`."""
    python, uses_demo = sys.executable, Path(cfg.data_path) == Path(DEMO_DATA)
    if uses_demo:
        announce(1, f"corpus and tokenizer in {DEMO_DATA} (about a minute, only the first time)")
        run_command([python, *shlex.split(DEMO_COMMAND)[1:]], "data/prepare.py", env)
    else:
        announce(1, f"the data set is DATA_PATH={cfg.data_path}")
    env = {**limit_validation(cfg), **env}
    limit_s = cfg.max_wallclock_seconds
    announce(2, f"train, write the artifact, read it back, score it; recipe {env['RECIPE']}")
    shown = f"at most {limit_s:.0f} s" if limit_s else "no time limit"
    print(f"      training: {shown}; the rest takes about half as long", flush=True)
    run_command([python, "train_gpt.py"], "train_gpt.py", env)
    announce(3, "compress the same text with xz, zstd and PPMd (less than a minute)")
    mark = yardstick_run(folder)
    print(" ".join(f"{key}:{value}" for key, value in mark.items()))
    announce(4, f"plot {folder}/plot.png (seconds)")
    draw_plot([RunLog.read(folder / METRICS)], folder / "plot.png")
    announce(5, f"record folder {folder}/record (seconds)")
    data_command = DEMO_COMMAND if uses_demo else ""
    build_record(folder / "record", [folder], data_command=data_command)
    announce(6, "three samples (seconds)")
    print_samples(folder, env, SAMPLE_PROMPTS if uses_demo else ("", "", ""))


def print_samples(folder: Path, env: Mapping[str, str], prompts: Sequence[str]) -> None:
    """Print what the run's artifact writes after each prompt, with another seed for each."""
    given = {"MODE": "generate", "RUN_DIR": str(folder), "MAX_NEW_TOKENS": str(SAMPLE_TOKENS)}
    for seed, prompt in enumerate(prompts):
        print(f"--- PROMPT={prompt!r} SEED={seed}", flush=True)
        train_gpt.run_mode({**env, **given, "PROMPT": prompt, "SEED": str(seed)})


def run_demo() -> None:
    """Run the whole job on the demo corpus, on the GPU if there is one, else on the CPU."""
    started_s = time.perf_counter()
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):  # handle them as Ctrl-C
        signal.signal(number, signal.default_int_handler)
    recipe = f"records/demo/{'gpu' if torch.cuda.is_available() else 'cpu'}.env"
    folder = Path("logs") / f"demo-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    env = {"RECIPE": recipe, "RUN_DIR": str(folder), **os.environ}
    folder = Path(env["RUN_DIR"])
    cfg = train_gpt.config_from_env(env)
    try:
        demo_stages(folder, env, cfg)
    except KeyboardInterrupt:
        if (folder / "checkpoint").exists():
            print(
                f"\nTo continue: RECIPE={env['RECIPE']} RUN_DIR={folder} make run", file=sys.stderr
            )
        raise
    print_summary(folder, time.perf_counter() - started_s)
