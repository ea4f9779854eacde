"""The recipes of published systems: that each is the system it says, and that it runs.

The numbers of parameters are added up here from the systems' descriptions, part by part; none of
them comes from the script.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_gpt
from data.download import VARIANTS
from records import records
from records.check import RECIPE_HEADINGS, check_recipe
from records.knobs import format_knob_value
from records.logs import RunLog, run_settings
from records.tables import find_recipes, format_records
from tests.conftest import VOCAB_SIZE, TinyData, environment, plain_config
from tests.processes import metrics, run_script, submission
from train_gpt import GPT, Config, Run, Trainer, Validation

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "records/track_10min_16mb"

NAIVE = "2026-03-17_NaiveBaseline"
TRIGRAM = "2026-03-22_TrigramHash_XSA_TTT"
VRL = "2026-03-22_11L_XSA_VRL_SWA_Seq4096"
GATED = "2026-03-26_GatedAttn_ValueResid_XSA6_HedgeMixer_LegalTTT"
SP8192 = "2026-04-08_SP8192_TTT_HashEmbedding"
FRONTIER = "2026-05-01_Frontier"
RECIPES = [NAIVE, TRIGRAM, VRL, GATED, SP8192, FRONTIER]

each_recipe = pytest.mark.parametrize("name", RECIPES)


def recipe(name: str, **changes: str) -> Config:
    """The Config of a recipe, with `changes` from the environment."""
    path = FOLDER / name / "run.env"
    return train_gpt.config_from_env({"RECIPE": str(path), "MODE": "describe", **changes})


def described(cfg: Config) -> dict[str, str]:
    """The lines of MODE=describe that follow the knobs, by their first word."""
    lines = train_gpt.describe(cfg).partition("\n\n")[2].splitlines()
    return {line.split()[0]: line for line in lines}


def num_parameters(cfg: Config) -> int:
    """The script's own count, on a model without memory."""
    with torch.device("meta"):
        model = GPT(cfg, train_gpt.ATTENTION_BACKENDS["sdpa"](), torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def test_these_are_all_recipes() -> None:
    assert [folder.name for folder in find_recipes(ROOT / "records")] == sorted(RECIPES)


# --- Parameters ----------------------------------------------------------------------------------

WIDTH, HEADS, HEAD = 512, 8, 64


def block(kv_heads: int, hidden: int) -> int:
    """Parameters of one block: matrices, two output scales, the mix with x0, gains of queries."""
    attention = 2 * WIDTH * WIDTH + 2 * WIDTH * kv_heads * HEAD
    return attention + 2 * WIDTH * hidden + 2 * WIDTH + 2 * WIDTH + HEADS


def hashed(rows: int, dim: int) -> int:
    """Parameters of a hashed table and its projection."""
    return rows * dim + dim * WIDTH


SMEAR_BLEND, SMEAR_LAMBDA = WIDTH, 12 + 1
THWU1 = 1024 * WIDTH + 10 * block(4, 1536) + 5 * WIDTH + SMEAR_BLEND + hashed(10240, 128) + 1
VALUE_EMBEDDING = 1024 * 128 + 128 * 8 * HEAD + 1 + 2  # table, projection, scale, one a block
PR720 = 1024 * WIDTH + 11 * block(8, 1792) + 5 * WIDTH + SMEAR_BLEND + hashed(4096, 128) + 1
PR720 += VALUE_EMBEDDING
SEED_001_EXTRAS = 11 * (HEADS + 1)  # a gate a head and lambda_v
LANES = 11 * (2 * 2 + 2)  # post weights and lambda_res, of every block
PR1855 = 8192 * WIDTH + 11 * (block(4, 2048) + HEADS * 12) + 8 * 2 * WIDTH + SMEAR_LAMBDA + LANES

EXPECTED = {
    NAIVE: 1024 * WIDTH + 9 * block(4, 1024) + 4 * WIDTH,
    TRIGRAM: THWU1 - 6144 * 128 + hashed(20480, 32),
    VRL: 1024 * WIDTH + 11 * block(4, 1024) + 5 * WIDTH + SMEAR_BLEND + 10,
    GATED: PR720 + SEED_001_EXTRAS,
    SP8192: 8192 * WIDTH + 11 * block(4, 2048) + 7 * 2 * WIDTH,
    FRONTIER: PR1855 + 2,  # and the caps of the logits
}
STATED = {
    NAIVE: 17_059_912, TRIGRAM: 25_402_449, VRL: 20_735_074, GATED: 33_055_935,
    SP8192: 35_943_512, FRONTIER: 35_945_673,
}  # fmt: skip


def test_the_stated_numbers_are_the_sums_of_their_parts() -> None:
    assert EXPECTED == STATED
    assert THWU1 == 25_517_137 and PR720 == 33_055_836 and PR1855 == 35_945_671  # their logs


@each_recipe
def test_the_recipe_has_the_stated_number_of_parameters(name: str) -> None:
    assert f"params:{STATED[name]} " in described(recipe(name))["model"]


@pytest.mark.parametrize(
    ("name", "logged", "changes"),
    [
        (TRIGRAM, 25_517_137, {"BIGRAM_VOCAB_SIZE": "10240", "TRIGRAM_VOCAB_SIZE": "0"}),  # thwu1
        (VRL, 17_060_432, {"NUM_LAYERS": "9", "TRAIN_SEQ_LEN": "1024"}),  # PR #457's log
        (GATED, 33_055_836, {"ATTN_GATE": "none", "VALUE_RESIDUAL": "none"}),  # #720
        (GATED, 33_318_079, {"BIGRAM_VOCAB_SIZE": "6144", "XSA_LAST_N": "11"}),  # PR #430's logs
        (FRONTIER, 35_945_671, {"ASYM_LOGIT_RESCALE": "0"}),  # #1855
    ],
)
def test_what_was_logged_has_the_logged_number(name: str, logged: int, changes: Any) -> None:
    assert num_parameters(recipe(name, **changes)) == logged


def test_the_defaults_are_the_frontier_s_model_and_training() -> None:
    """Its recipe says how it is scored, and nothing else (design: the best stack by default)."""
    changed = set(train_gpt.changed_knobs(recipe(FRONTIER))) - {"MODE", "RECIPE"}
    assert {name.partition("_")[0] for name in changed} == {
        "EVAL",
        "TTT",
        "NGRAM",
        "ROPE",
    }  # ROPE_SCALING of the longer window
    assert num_parameters(Config()) == STATED[FRONTIER]


# --- Order of the blocks -------------------------------------------------------------------------


def blocks_of(plan: list[train_gpt.LayerCall]) -> tuple[list[int], list[int]]:
    """The blocks of the first half, whose outputs are saved, and of the second."""
    return [v.block for v in plan if v.save], [v.block for v in plan if not v.save]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        (NAIVE, "0 1 2 3", "4 5 6 7 8"),
        (TRIGRAM, "0 1 2 3 4", "5 6 7 8 9"),
        (VRL, "0 1 2 3 4", "5 6 7 8 9 10"),
        (GATED, "0 1 2 3 4", "5 6 7 8 9 10"),
        (SP8192, "0 1 2 3 4 5 4", "5 4 5 6 7 8 9 10"),
        (FRONTIER, "0 1 2 3 4 5 3 4", "5 3 4 5 6 7 8 9 10"),
    ],
)
def test_blocks_run_in_the_published_order(name: str, encoder: str, decoder: str) -> None:
    plans = train_gpt.layer_schedules(recipe(name))
    assert blocks_of(plans[-1]) == ([*map(int, encoder.split())], [*map(int, decoder.split())])
    skips = [visit.skip for visit in plans[-1] if not visit.save]
    assert skips[: len(encoder.split())] == list(range(len(encoder.split())))
    num_layers = recipe(name).num_layers
    assert [visit.block for visit in plans[0]] == list(range(num_layers))  # before the loops


@pytest.mark.parametrize(("name", "share"), [(SP8192, 0.5), (FRONTIER, 0.35)])
def test_loops_begin_at_the_published_share_of_training(name: str, share: float) -> None:
    loops = {
        x: train_gpt.train_stage_at(recipe(name), x, 1.0).loops for x in (0, share - 1e-6, share, 1)
    }
    assert loops == {0: 0, share - 1e-6: 0, share: 2, 1: 2}


def test_parallel_residuals_begin_at_the_published_blocks() -> None:
    parts = [
        visit.block
        for visit in train_gpt.layer_schedules(recipe(FRONTIER))[-1]
        if visit.split_lanes
    ]
    assert parts == [8]
    with torch.device("meta"):
        model = GPT(recipe(SP8192), train_gpt.ATTENTION_BACKENDS["sdpa"](), torch.float32)
    assert [module.shares_input for module in model.blocks] == [False] * 7 + [True] * 4
    assert not [
        visit for visit in train_gpt.layer_schedules(recipe(SP8192))[-1] if visit.split_lanes
    ]


# --- Files ---------------------------------------------------------------------------------------


@each_recipe
def test_the_records_tool_finds_nothing_wrong(name: str) -> None:
    assert check_recipe(FOLDER / name) == []


@each_recipe
def test_every_group_of_knobs_stands_under_its_comment(name: str) -> None:
    lines = (FOLDER / name / "run.env").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# ")
    assert len(lines) == len(set(lines)) and all(len(line) <= 100 for line in lines)
    knobs = [line.partition("=")[0] for line in lines if not line.startswith("#")]
    assert len(knobs) == len(set(knobs))


@each_recipe
def test_the_readme_has_the_commands_of_its_recipe(name: str) -> None:
    text, cfg = (FOLDER / name / "README.md").read_text(encoding="utf-8"), recipe(name)
    path = f"RECIPE=records/track_10min_16mb/{name}/run.env"
    unbroken = ("|", "MODE=", path)
    assert all(len(line) <= 100 or line.startswith(unbroken) for line in text.splitlines())
    assert f"\nMODE=describe {path} python train_gpt.py\n" in text
    assert (
        f"\n{path} python -m torch.distributed.run --standalone --nproc_per_node=8 train_gpt.py\n"
        in text
    )
    (variant,) = re.findall(r"\npython data/download.py --variant (\S+)\n", text)
    assert f"./data/datasets/{VARIANTS[variant].dataset}" == cfg.data_path
    assert VARIANTS[variant].tokenizer == f"fineweb_{cfg.vocab_size}_bpe"  # found without a knob


@each_recipe
def test_the_batch_divides_over_eight_ranks_in_one_pass(name: str) -> None:
    for phase in train_gpt.train_stages(cfg := recipe(name)):
        rows, rest = divmod(phase.batch_tokens, 8 * phase.seq_len)
        assert rest == 0 and rows * phase.seq_len <= cfg.micro_batch_tokens


SMALL_STACKS = sorted(
    path
    for folder in ("demo", "track_cpu_10min_1mb")
    for path in (FOLDER.parent / folder).glob("*.env")
)


@pytest.mark.parametrize("path", SMALL_STACKS, ids=lambda path: path.stem)
def test_a_small_stack_sets_no_knob_to_its_default(path: Path) -> None:
    cfg = train_gpt.config_from_env({"RECIPE": str(path)})
    assert train_gpt.read_recipe(path).keys() == {*train_gpt.changed_knobs(cfg)} - {"RECIPE"}


def test_the_recipe_of_a_larger_vocabulary_fits_with_fewer_bits() -> None:
    (path,) = FOLDER.glob("*.env")
    cfg = train_gpt.config_from_env({"RECIPE": str(path)})
    assert train_gpt.read_recipe(path).keys() == {*train_gpt.changed_knobs(cfg)} - {"RECIPE"}
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    shapes = train_gpt.model_layout(cfg)[0]
    num_params = sum(math.prod(shape) for shape in shapes.values())
    num_code_bytes = len(train_gpt.pack_source(train_gpt.script_source()))
    bits = 8 * (cfg.artifact_budget_bytes - num_code_bytes) / num_params
    assert f"| 24,576 | {num_params / 1e6:.1f} M | {bits:.2f} |" in page


def run_and_stack(record: str, stack: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a record's first run, and what a small stack makes of them."""
    (folder,) = FOLDER.parent.glob(f"track_cpu_10min_1mb/*_{record}")
    log = RunLog.read(folder / "metrics_seed1337.jsonl")
    cfg = train_gpt.config_from_env({"RECIPE": str(folder.parent / stack)})
    values = {name: getattr(cfg, name.lower()) for name in run_settings(log)}
    return {name: log.config["values"][name] for name in values}, values


def test_a_small_stack_is_the_setting_of_its_old_record() -> None:
    """But for knobs that concern nothing in it, and for the validations during training."""
    ran, values = run_and_stack("ShortFirst", "short_first.env")
    assert ran.pop("VAL_LOSS_EVERY") == 0 and values.pop("VAL_LOSS_EVERY") > 0
    assert values == ran and {"TRAIN_SEQ_SCHEDULE", "SMEAR_GATE"} < ran.keys()


@pytest.mark.parametrize(
    ("record", "stack"),
    [
        ("LowerRates", "lower_rates.env"),
        ("Vocab4096", "vocab_4096.env"),
        ("Vocab2048", "vocab_2048.env"),
        ("PublicBaseline", "public_baseline.env"),
    ],
)
def test_a_small_stack_is_the_setting_of_its_record(record: str, stack: str) -> None:
    ran, values = run_and_stack(record, stack)
    assert values == ran and {"VOCAB_SIZE", "MATRIX_LR"} < ran.keys()


def write_recipe(folder: Path, setting: str, readme: str | None) -> Path:
    """A recipe folder in a track of its own."""
    path = folder / "track_test/2026-01-02_Small"
    path.mkdir(parents=True)
    (path / "run.env").write_text(setting, encoding="utf-8")
    if readme is not None:
        (path / "README.md").write_text(readme, encoding="utf-8")
    return path


PAGE = "\n".join(["# Small: a test", *(f"## {heading}" for heading in RECIPE_HEADINGS)])
ONE_BLOCK = plain_config(num_layers=1, model_dim=64, vocab_size=16)
SMALL = "# Small.\n" + "".join(
    f"{name}={format_knob_value(getattr(ONE_BLOCK, name.lower()))}\n"
    for name in train_gpt.changed_knobs(ONE_BLOCK)
)
SMALL_SIZE = 16 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 * 128 + 4 * 64 + 8


def test_a_good_recipe_is_listed_without_a_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_recipe(tmp_path, SMALL, f"{PAGE}\n**{SMALL_SIZE:,} parameters**: few.\n")
    assert records.main(["check", str(folder), "--records", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{folder}: ok\n"
    table = format_records(tmp_path)
    link = "[2026-01-02_Small](track_test/2026-01-02_Small/README.md)"
    assert f"| {link} | {SMALL_SIZE:,} | Small: a test |" in table
    assert "## track_test" in table and "val bpb" not in table
    (folder / "metrics_seed1.jsonl").touch()  # then it is a record that lacks the rest
    assert find_recipes(tmp_path) == []
    assert records.main(["check", str(folder), "--records", str(tmp_path)]) == 1
    assert "submission.json is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "readme", "problem"),
    [
        (SMALL, None, "unusable: "),
        (SMALL + "NUM_LAYER=3\n", PAGE, "unusable: "),
        (SMALL + "NUM_HEADS=7\n", PAGE, "must divide MODEL_DIM"),
        (SMALL + "NUM_HEADS=8\n", PAGE, "run.env sets NUM_HEADS to its default"),
        (SMALL, PAGE.replace("## Missing", ""), "README.md has the headings"),
        (SMALL, PAGE + "\n" * 121, "README.md has more than 120 lines"),
        (SMALL, PAGE, f"README.md states no parameters, the model has {SMALL_SIZE:,}"),
        (SMALL, PAGE + "\n**7 parameters**", f"states 7 parameters, the model has {SMALL_SIZE:,}"),
    ],
)
def test_a_bad_recipe_is_refused_with_the_reason(
    tmp_path: Path, setting: str, readme: str | None, problem: str
) -> None:
    problems = check_recipe(write_recipe(tmp_path, setting, readme))
    assert any(problem in found for found in problems), problems


# --- Runs in small -------------------------------------------------------------------------------

SMALL_RUN = {
    "MODE": "all", "RUN_DIR": "run", "VOCAB_SIZE": str(VOCAB_SIZE), "MODEL_DIM": "32",
    "NUM_HEADS": "4", "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "128",
    "MICRO_BATCH_TOKENS": "64", "ITERATIONS": "8", "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "0", "VAL_LOSS_EVERY": "0", "TRAIN_LOG_EVERY": "1", "COMPILE": "0",
    "PRECISION": "fp32", "CHECKPOINT_EVERY_SECONDS": "0", "VAL_BATCH_SIZE": "2048",
    "EVAL_MAX_SECONDS": "0",
}  # fmt: skip


def shrink(cfg: Config) -> dict[str, str]:
    """Overrides that make a recipe small: sizes alone, and steps where steps are counted."""
    changes = {**SMALL_RUN, "NUM_KV_HEADS": str(cfg.num_kv_heads // 2)}
    smaller: dict[str, object] = {
        "bigram_vocab_size": 64, "trigram_vocab_size": 64, "rope_dims": 4, "eval_stride": 8,
        "eval_seq_len": 40, "warmdown_iters": 4, "eval_hash_rows": 64, "ttt_phases": "9",
    }  # fmt: skip
    changes |= {k.upper(): str(size) for k, size in smaller.items() if getattr(cfg, k)}
    if cfg.solves_scales:
        changes |= {"ARTIFACT_BUDGET_BYTES": str(CODE_BYTES + SMALL_ARTIFACT)}
    if cfg.adapts:
        changes |= {
            "TTT_CHUNK_TOKENS": "1280", "TTT_CHUNK_SIZE": "24", "TTT_LORA_RANK": "4",
            "TTT_BATCH_SEQS": "8", "HEDGE_MIN_TOKENS": "1000", "NGRAM_TABLE_BITS": "16",
        }  # fmt: skip
    return changes | ({"SWA_EVERY": "1"} if cfg.averaging == "swa" else {})


CODE_BYTES = len(train_gpt.pack_source(train_gpt.script_source()))
SMALL_ARTIFACT = 62_000  # bytes: some 5 bits a weight of the small frontier model


def check_export(cfg: Config, folder: Path) -> None:
    """The artifact in `folder` is as the recipe wants it, and fills a budget that it is to fill."""
    header, _ = train_gpt.decode_header((folder / "artifact.bin").read_bytes())
    specs = {name: spec for name, *spec in header["tensors"]}
    assert header["compressor"] == cfg.compressor
    bits, _, flags = specs["blocks.0.mlp.fc.weight"]
    assert bits == cfg.mlp_bits
    assert bool(flags & 2) == (cfg.quant_grid == "trellis")
    assert bool(metrics(folder, "calibrated")) == (cfg.quantizer == "gptq")
    if cfg.solves_scales:
        assert 0.98 < metrics(folder, "size")[0]["total_bytes"] / cfg.artifact_budget_bytes <= 1


def small_run(data: TinyData, tmp_path: Path, name: str) -> tuple[Config, Path]:
    """The small Config of a recipe, and the folder of a run of it."""
    cfg = recipe(name)
    changes = {**shrink(cfg), "DATA_PATH": str(data.folder), "TRACK": "demo"}
    env = {**environment(Config()), **changes, "RECIPE": str(FOLDER / name / "run.env")}
    result = run_script(env, tmp_path)
    assert result.status == 0, result.err
    return recipe(name, **{k: v for k, v in changes.items() if k != "MODE"}), tmp_path / "run"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != NAIVE)) for n in RECIPES]
)
def test_the_recipe_trains_writes_and_scores_in_small(
    data: TinyData, tmp_path: Path, name: str
) -> None:
    cfg, folder = small_run(data, tmp_path, name)
    losses = [event["train_loss"] for event in metrics(folder, "step")]
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    (raw,), (quantized,) = metrics(folder, "final_prequant"), metrics(folder, "final_quantized")
    assert quantized["val_loss"] == pytest.approx(raw["val_loss"], abs=0.5)
    assert bool(metrics(folder, "final_sliding")) == bool(cfg.eval_stride)
    check_export(cfg, folder)
    learned = metrics(folder, "final_ttt")
    assert len(learned) == (name != NAIVE) == cfg.adapts
    assert all(event["tokens"] == quantized["tokens"] for event in learned)
    assert all(event["val_loss"] < quantized["val_loss"] + 0.2 for event in learned)
    report = submission(folder)
    assert report["val_bpb"] == (learned or [quantized])[-1]["val_bpb"]
    assert report["artifact_bytes_max"] == (folder / "artifact.bin").stat().st_size
    scores = [quantized, *learned, report]
    assert {score["compliant"] for score in scores} == {name != TRIGRAM}
    texts = [event["text"] for event in metrics(folder, "warning")]
    assert not re.search("averaged no weights", "\n".join(texts))
    assert not any({"adjusted", "untrained"} & event.keys() for event in learned)


def test_what_breaks_the_rules_needs_the_flag() -> None:
    with pytest.raises(ValueError, match="TTT_METHOD=pretrain is illegal"):
        recipe(TRIGRAM, ALLOW_NONCOMPLIANT="0")
    with pytest.raises(ValueError, match="MIXER=hedge_entropy"):
        recipe(GATED, MIXER="hedge_entropy")
    assert recipe(GATED, MIXER="hedge_entropy", ALLOW_NONCOMPLIANT="1").mixer == "hedge_entropy"


# --- Full size -----------------------------------------------------------------------------------


def seconds(started_s: float) -> str:
    """Time since then."""
    return f"{time.perf_counter() - started_s:.1f} s"


def chunks_to_score(cfg: Config) -> tuple[Config, Validation]:
    """Random text of a few chunks, and the evaluation of `cfg` at its shape with such chunks."""
    T, chunk = cfg.score_seq_len, cfg.ttt_chunk_size
    changes: Any = {
        "eval_stride": cfg.eval_stride and T // 2, "ttt_chunk_tokens": T, "ttt_epochs": 1,
        "ttt_phases": cfg.ttt_phases and "1", "hedge_min_tokens": T, "ngram_table_bits": 16,
        "eval_max_seconds": 0.0,
    }  # fmt: skip
    is_lora = cfg.ttt_method == "lora"
    length = 6 * chunk + 64 if is_lora else T + 65 + T * cfg.adapts
    ids = np.random.default_rng(0).integers(4, cfg.vocab_size, length)
    ids[[0, 3 * chunk + 20] if is_lora else 0] = train_gpt.BOS_ID  # two documents
    ones = np.ones(length - 1, dtype=np.int64)
    return dataclasses.replace(cfg, **changes), Validation(ids, ones, partial=False)


@pytest.mark.slow
@each_recipe
def test_the_recipe_runs_at_its_full_shape(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    T, loss_before = recipe(name).train_seq_len, math.log(recipe(name).vocab_size)
    cfg = recipe(name, COMPILE="0", PRECISION="fp32", TRAIN_BATCH_TOKENS=str(T))
    device = torch.device("cpu")
    run = Run(cfg=cfg, directory=tmp_path, rank=0, world_size=1, device=device, dtype=torch.float32)
    started_s = time.perf_counter()
    model = train_gpt.build_model(run)
    assert sum(parameter.numel() for parameter in model.parameters()) == STATED[name]
    trainer, built = Trainer(run, model), seconds(started_s)
    trainer.enter_stage(train_gpt.train_stages(cfg)[-1])  # with all loops, and on quantised weights
    ids = np.random.default_rng(0).integers(4, cfg.vocab_size, T + 1)
    started_s = time.perf_counter()
    loss = trainer.step(torch.from_numpy(ids[None])).item()
    stepped = seconds(started_s)
    assert loss == pytest.approx(loss_before, abs=0.05)
    del trainer
    started_s, model = time.perf_counter(), train_gpt.build_model(run)  # as read from a file
    run.cfg, validation = chunks_to_score(cfg)
    stride = run.cfg.eval_stride or run.cfg.score_seq_len
    score = train_gpt.evaluate(run, model, validation, stride, adaptive=cfg.adapts)
    assert score.tokens == validation.num_targets
    assert score.nats / score.tokens == pytest.approx(loss_before, abs=0.5)
    assert bool(score.problems) == cfg.allow_noncompliant == (name == TRIGRAM)
    scored = f"{score.tokens} targets scored by {cfg.ttt_method} in {seconds(started_s)}"
    with capsys.disabled():
        print(f"\n{name}: built in {built}, a step of {T} tokens in {stepped}, {scored}")
