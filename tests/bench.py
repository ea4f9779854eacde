"""Measures speed and memory of training and evaluation on this machine and prints a table.

    make bench                               # every case, each in its own process
    python tests/bench.py --case small       # one case, as a JSON line

Utilization is the model's FLOPs per second (6 per matrix weight and token, plus causal attention)
divided by the rate of a 2048 x 2048 x 2048 matrix product in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_gpt as tg

NAIVE = Path(tg.__file__).parent / "records/track_10min_16mb/2026-03-17_NaiveBaseline/run.env"
BASELINE = dataclasses.replace(
    tg.config_from_env({"RECIPE": str(NAIVE)}),
    train_batch_tokens=16_384, micro_batch_tokens=16_384, val_batch_size=16_384,
)  # fmt: skip
SMALL = dataclasses.replace(
    BASELINE, num_layers=6, model_dim=256, num_heads=8, num_kv_heads=4, mlp_mult=4.0,
    train_seq_len=512, train_batch_tokens=8192, val_batch_size=8192,
)  # fmt: skip
MATRIX_SIZE = 2048
CASES = {
    "small": "6 layers x 256, sequence 512",
    "small_plain": "same shape, plain PyTorch loss in fp32",
    "small_optimizer": "same shape, optimizer step only",
    "small_eval": "same shape, evaluation only",
    "baseline": "naive baseline, full shape",
    "baseline_optimizer": "same shape, optimizer step only",
    "baseline_eval": "same shape, evaluation only",
}


def seconds_per_call(call: Callable[[], Any], run: tg.Run, budget_s: float) -> float:
    """Return the shortest time of `call` within `budget_s` seconds, after a warm-up call."""
    call()
    times: list[float] = []
    started_s = time.perf_counter()
    while not times or time.perf_counter() - started_s < budget_s:
        run.synchronize()
        before_s = time.perf_counter()
        call()
        run.synchronize()
        times.append(time.perf_counter() - before_s)
    return min(times)


def matrix_flops_per_s(run: tg.Run, dtype: torch.dtype, budget_s: float) -> float:
    """Return the FLOPs per second of a square matrix product in `dtype`."""
    a = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=run.device).to(dtype)
    return 2 * MATRIX_SIZE**3 / seconds_per_call(lambda: a @ a, run, budget_s)


def make_run(cfg: tg.Config) -> tg.Run:
    """Return a run of one process on this machine's device, without files."""
    device, dtype = tg.open_device(cfg, 0)
    return tg.Run(
        cfg=cfg, directory=Path(), rank=-1, world_size=1, device=device, dtype=dtype
    )  # rank -1 writes nothing


def plain_step(model: tg.GPT, window_BT: torch.Tensor) -> None:
    """Run forward and backward with all logits in float32 at once, by F.cross_entropy."""
    logits_NV = model.logits(window_BT[:, :-1]).flatten(0, 1)
    F.cross_entropy(logits_NV, window_BT[:, 1:].flatten()).backward()
    model.zero_grad(set_to_none=True)


def measure(case: str, budget_s: float) -> dict[str, Any]:
    """Return time, tokens/s and FLOPs/s of a case, and the peak memory of the process."""
    cfg = SMALL if case.startswith("small") else BASELINE
    if case.endswith("plain"):
        cfg = dataclasses.replace(cfg, compile=False, precision="fp32")
    run = make_run(cfg)
    model = tg.build_model(run)
    rows = cfg.train_batch_tokens // cfg.train_seq_len
    trainer = tg.Trainer(run, model)
    window_BT = torch.randint(cfg.vocab_size, (rows, cfg.train_seq_len + 1))
    ids_BT = window_BT.to(run.device)
    if case.endswith("optimizer"):  # it needs gradients; their values do not matter
        for param in trainer.params:
            param.grad = torch.randn_like(param)

    def optimizer() -> None:
        trainer.adam.step()
        trainer.muon.start_reduce()
        trainer.muon.step(1e-9, 0.9, 0.0)

    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_step(model, ids_BT),
        "optimizer": optimizer,
        "eval": lambda: model.eval_nll(ids_BT[:, :-1], ids_BT[:, 1:]),
    }
    kind = case.rpartition("_")[2]
    call = calls.get(kind, lambda: trainer.step(window_BT))
    matrices, attention = tg.flops_per_token(cfg)
    tokens = 0 if kind == "optimizer" else cfg.train_batch_tokens
    flops = tokens * (matrices + attention) / (3 if kind == "eval" else 1)
    elapsed_s = seconds_per_call(call, run, budget_s)
    return {
        "case": case,
        "ms": 1e3 * elapsed_s,
        "tokens_per_s": tokens / elapsed_s,
        "flops_per_s": flops / elapsed_s,
        "matrix_flops_per_s": matrix_flops_per_s(run, run.dtype, 2.0),
        "peak_memory_mib": tg.peak_memory_mib(run.device),
        "precision": str(run.dtype).removeprefix("torch."),
        "device": tg.describe_hardware(run),
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Print the table, and the speed relative to the plain loss."""
    first = next(iter(results.values()))
    print(f"\n{first['device']}, torch {torch.__version__}")
    for result in {r["precision"]: r for r in results.values()}.values():
        rate = result["matrix_flops_per_s"] / 1e12
        print(f"{MATRIX_SIZE}-cubed product in {result['precision']}: {rate:.3f} TFLOP/s")
    print(f"\n{'case':<34}{'ms':>9}{'tokens/s':>11}{'utilization':>13}{'peak MiB':>10}")
    for name, result in results.items():
        share = result["flops_per_s"] / result["matrix_flops_per_s"]
        tokens = f"{result['tokens_per_s']:.0f}" if result["tokens_per_s"] else "-"
        shown = f"{share:.1%}" if share else "-"
        print(
            f"{CASES[name]:<34}{result['ms']:>9.1f}{tokens:>11}{shown:>13}"
            f"{result['peak_memory_mib']:>10.0f}"
        )
    if {"small", "small_plain"} <= results.keys():
        ratio = results["small"]["tokens_per_s"] / results["small_plain"]["tokens_per_s"]
        print(f"\nspeed relative to the plain loss (same shape): {ratio:.2f} x")


def main() -> None:
    """Measure one case, or each of them in a new process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure only this case, print a JSON line")
    parser.add_argument(
        "--budget-s", type=float, default=10.0, help="seconds for repetitions of a case"
    )
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.budget_s)))
        return
    results: dict[str, dict[str, Any]] = {}
    for case, title in CASES.items():
        print(f"measuring {title} ...", flush=True)
        command = [sys.executable, __file__, "--case", case, "--budget-s", str(args.budget_s)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[case] = json.loads(output.splitlines()[-1])
    print_table(results)


if __name__ == "__main__":
    main()
