"""Configuration: what the environment may say, and every way in which it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import train_gpt
from tests.conftest import NAIVE, plain_config
from train_gpt import (
    OUR_WORDS,
    Config,
    InputError,
    changed_knobs,
    config_from_env,
    parse_value,
    read_recipe,
)

KINDS: dict[str, Any] = get_type_hints(Config)
FIELDS = {f.name: f for f in fields(Config)}
BASELINE_KNOBS = (
    "DATA_PATH TOKENIZER_PATH RUN_ID SEED VAL_BATCH_SIZE VAL_LOSS_EVERY TRAIN_LOG_EVERY ITERATIONS "
    "WARMDOWN_ITERS WARMUP_STEPS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN MAX_WALLCLOCK_SECONDS "
    "QK_GAIN_INIT VOCAB_SIZE NUM_LAYERS NUM_KV_HEADS MODEL_DIM NUM_HEADS MLP_MULT TIE_EMBEDDINGS "
    "ROPE_BASE LOGIT_SOFTCAP EMBED_LR HEAD_LR TIED_EMBED_LR TIED_EMBED_INIT_STD MATRIX_LR "
    "SCALAR_LR MUON_MOMENTUM MUON_BACKEND_STEPS MUON_MOMENTUM_WARMUP_START "
    "MUON_MOMENTUM_WARMUP_STEPS BETA1 BETA2 ADAM_EPS GRAD_CLIP_NORM"
).split()


# What makes the defaults the naive baseline, on which contradictions are shown.
PLAIN_ENVIRONMENT = {
    name: value for name in FIELDS
    if (value := getattr(plain_config(), name)) != FIELDS[name].default
}  # fmt: skip


def problems_of(env: dict[str, str]) -> list[str]:
    """The lines of the message with which `env` is refused."""
    with pytest.raises(InputError) as refusal:
        config_from_env(env)
    head, *problems = str(refusal.value).split("\n  ")
    assert head == "invalid environment:"
    return problems


# --- Parsing -------------------------------------------------------------------------------------


def test_an_empty_environment_gives_the_defaults():
    assert config_from_env({}) == Config()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (bool, "1", True),
        (bool, "true", True),
        (bool, "True", True),
        (bool, "0", False),
        (bool, "FALSE", False),
        (int, "12", 12),
        (int, "-3", -3),
        (float, "12", 12.0),
        (float, "1e-3", 0.001),
        (float, "-.5", -0.5),
        (str, "", ""),
        (str, " a=b ", " a=b "),
    ],
)
def test_a_text_is_read_as_the_type_of_its_knob(kind: type, text: str, value: Any):
    parsed = parse_value(text, kind)
    assert parsed == value and type(parsed) is kind


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (bool, "yes"),
        (bool, ""),
        (bool, "2"),
        (int, "1.5"),
        (int, "1e3"),
        (int, ""),
        (int, "true"),
        (float, "nan"),
        (float, "inf"),
        (float, "-Infinity"),
        (float, "ten"),
        (float, ""),
    ],
)
def test_a_text_of_another_type_is_a_value_error(kind: type, text: str):
    with pytest.raises(ValueError):
        parse_value(text, kind)


# Texts of a form of their own.
LISTS = {
    "train_seq_schedule": "512@0.25",
    "train_batch_schedule": "65536@0.1,131072@0.2",
    "xsa_layers": "0,2,5-7",
    "ve_layers": "7,8",
    "enable_looping_at": "0.5",
    "clip_sigmas": "attn:13,mlp:11.5,embed:14,table:12.85",
    "ttt_phases": "833,1666",
    "ttt_lora_targets": "q,head",
    "mixer_orders": "0-3,8",
    "ngram_tilt_orders": "4,16",
}
# Settings without which a knob's other value contradicts the defaults.
COMPANIONS: dict[str, dict[str, Any]] = {
    "quantizer": {"quant_grid": "uniform", "row_steps": "max"},
    "trigram_hash": {"isolate_documents": False},
    "eval_hash_rows": {"ttt_method": "chunk"},
    "ttt_polyak": {"ttt_method": "chunk"},
    "value_residual": {"parallel_residual": "none"},
}


def another_value(name: str) -> Any:
    """A value of the knob that is not the default and contradicts no default."""
    f, kind = FIELDS[name], KINDS[name]
    default: Any = f.default
    if kind is bool:
        return not default
    if kind is str:
        others = [choice for choice in f.metadata["choices"] if choice != default]
        return others[-1] if others else LISTS.get(name, "some/where else")
    candidates = [*f.metadata["choices"], 2 * default, default / 2, f.metadata["high"], 64, 1]
    for value in (kind(c) for c in candidates if c is not None and c != default):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            Config(**{name: value, **COMPANIONS.get(name, {})})
            return value
    raise AssertionError(f"no other value of {name} is accepted")


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "recipe"])
def test_a_variable_sets_the_field_of_its_name_and_no_other(name: str):
    value, companions = another_value(name), COMPANIONS.get(name, {})
    cfg = config_from_env({k.upper(): str(v) for k, v in {name: value, **companions}.items()})
    assert getattr(cfg, name) == value and type(getattr(cfg, name)) is KINDS[name]
    assert changed_knobs(cfg) == sorted(k.upper() for k in {name, *companions})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("SEED", "7", 7),
        ("MODEL_DIM", "256", 256),
        ("NUM_LAYERS", "12", 12),
        ("MATRIX_LR", "2e-2", 0.02),
        ("MAX_WALLCLOCK_SECONDS", "0", 0.0),
        ("MLP_MULT", "3", 3.0),
        ("TRAIN_BATCH_TOKENS", "524288", 524_288),
        ("ROPE_DIMS", "32", 32),
    ],
)
def test_a_number_from_the_environment_reaches_the_config(name: str, text: str, value: Any):
    cfg = config_from_env({name: text})
    assert getattr(cfg, name.lower()) == value
    assert changed_knobs(cfg) == [name]


@pytest.mark.parametrize("name", BASELINE_KNOBS)
def test_the_public_baseline_s_knobs_are_accepted(name: str):
    default = getattr(Config(), name.lower())
    text = str(int(default)) if isinstance(default, bool) else str(default)
    assert config_from_env({name: text}) == Config()


def test_the_recipe_of_the_naive_baseline_has_the_public_one_s_values():
    cfg = config_from_env({"RECIPE": str(NAIVE)})
    public = {
        "seed": 1337, "val_batch_size": 524_288, "iterations": 20_000, "warmup_steps": 20,
        "train_batch_tokens": 524_288, "train_seq_len": 1024, "max_wallclock_seconds": 600.0,
        "qk_gain_init": 1.5, "vocab_size": 1024, "num_layers": 9, "num_kv_heads": 4,
        "model_dim": 512, "num_heads": 8, "mlp_mult": 2, "tie_embeddings": True,
        "rope_base": 10_000.0, "logit_softcap": 30.0, "embed_lr": 0.6, "head_lr": 0.008,
        "tied_embed_lr": 0.05, "tied_embed_init_std": 0.005, "matrix_lr": 0.04, "scalar_lr": 0.04,
        "muon_momentum": 0.95, "muon_backend_steps": 5, "muon_momentum_warmup_start": 0.85,
        "muon_momentum_warmup_steps": 500, "beta1": 0.9, "beta2": 0.95, "adam_eps": 1e-8,
        "grad_clip_norm": 0.0,
    }  # fmt: skip
    assert {name: getattr(cfg, name) for name in public} == public


@pytest.mark.parametrize(
    "name",
    [
        "PATH", "HOME", "LANG", "SHLVL", "HOSTNAME", "PWD", "TERM", "USER", "LOGNAME", "_",
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
        "NCCL_NET", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR",
        "TOKENIZERS_PARALLELISM", "HF_HOME", "VIRTUAL_ENV", "SLURM_JOB_ID", "KUBERNETES_PORT",
        "COMPILER", "MODEL", "MODEL_DIR", "ARTIFACTS", "LORA_PATH", "GITHUB_RUN_ID", "WANDB_RUN_ID",
        "NUM_THREADS", "OPENBLAS_NUM_THREADS",
    ],
)  # fmt: skip
def test_a_foreign_variable_passes(name: str):
    assert config_from_env({name: "anything"}) == Config()


def test_the_environment_given_is_the_only_one_that_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEED", "5")
    assert config_from_env({}).seed == Config().seed


def test_the_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        (
            {"MAX_WALLCLOCK_SECONDS": "ten"},
            "MAX_WALLCLOCK_SECONDS='ten' is not a valid float",
        ),
        ({"MATRIX_LR": "nan"}, "MATRIX_LR='nan' is not a valid float"),
        ({"NUM_LAYERS": "9.0"}, "NUM_LAYERS='9.0' is not a valid int"),
        ({"SEED": ""}, "SEED='' is not a valid int"),
        ({"COMPILE": "yes"}, "COMPILE='yes' is not a valid bool"),
        (
            {"COMPRESSOR": "gzip"},
            "COMPRESSOR='gzip' must be one of ans, zlib, zstd, lzma, brotli, brotli_shuffled",
        ),
        ({"MODE": "Train"}, "MODE='Train' must be one of all, train, eval, describe, generate"),
        (
            {"NUM_LAYERS": "257"},
            "NUM_LAYERS=257 must be in [1, 256] (number of distinct blocks)",
        ),
        (
            {"MATRIX_LR": "-0.1"},
            "MATRIX_LR=-0.1 must be at least 0 (Muon learning rate of the block matrices)",
        ),
        pytest.param({"ATTN_BITS": "3"}, "ATTN_BITS=3 must be one of 4, 5, 6, 7, 8, 16"),
        pytest.param(
            {"EMBED_BITS": "9"},
            "EMBED_BITS=9 must be one of 4, 5, 6, 7, 8, 16",
        ),
        ({"NUM_LAYER": "9"}, "NUM_LAYER is not a knob; did you mean NUM_LAYERS?"),
        ({"ITERATION": "9"}, "ITERATION is not a knob; did you mean ITERATIONS?"),
        ({"MATRIXLR": "9"}, "MATRIXLR is not a knob; did you mean MATRIX_LR?"),
        ({"QK_GAIN": "4"}, "QK_GAIN is not a knob; did you mean QK_GAIN_INIT?"),
        ({"PHASED_TTT_ENABLED": "1"}, "PHASED_TTT_ENABLED is not a knob; use TTT_PHASES"),
        ({"LORA_RANK": "8"}, "LORA_RANK is not a knob; did you mean TTT_LORA_RANK?"),
        ({"SPARE_LORA": "8"}, "SPARE_LORA is not a knob of this script"),
        ({"iterations": "5"}, "iterations must be spelled in capitals: ITERATIONS"),
        ({"Matrix_Lr": "1"}, "Matrix_Lr must be spelled in capitals: MATRIX_LR"),
        (
            {"MAX_WALLCLOCK": "5"},
            "MAX_WALLCLOCK is not a knob; did you mean MAX_WALLCLOCK_SECONDS?",
        ),
        ({"SMEAR_GATE_ENABLED": "1"}, "SMEAR_GATE_ENABLED is not a knob; did you mean SMEAR_GATE?"),
        (
            {"BATCH_TOKENS": "5"},
            "BATCH_TOKENS is not a knob; did you mean MICRO_BATCH_TOKENS or TRAIN_BATCH_TOKENS?",
        ),
        ({"NUM_ITERATION": "5"}, "NUM_ITERATION is not a knob; use ITERATIONS"),
        ({"max_step": "5"}, "max_step is not a knob; use ITERATIONS"),
        ({"GRAD_ACCUM_STEP": "5"}, "GRAD_ACCUM_STEP is not a knob; use MICRO_BATCH_TOKENS"),
        ({"MAX_STEPPER": "5"}, None),
        ({"LR": "1"}, "LR is not a knob; use MATRIX_LR, TIED_EMBED_LR, SCALAR_LR"),
        ({"LQER_RANK": "4"}, "LQER_RANK is not a knob; there is no such setting"),
        ({"NGRAM_TILT_SHARE": "1"}, "NGRAM_TILT_SHARE is not a knob; use NGRAM_TILT_MIN_FRAC"),
        ({"TIME": "1"}, None),
    ],
)
def test_a_bad_variable_is_refused_in_these_words(env: dict[str, str], problem: str | None):
    if problem is None:
        assert config_from_env(env) == Config()
    else:
        assert problems_of(env) == [problem]


def test_every_published_name_maps_to_knobs_that_exist():
    for pair in train_gpt.PUBLISHED_NAMES.split():
        name, _, knobs = pair.partition("=")
        assert name.lower() not in FIELDS
        assert knobs == "-" or {knob.lower() for knob in knobs.split(",")} <= FIELDS.keys(), pair


@pytest.mark.parametrize(
    ("line", "setting"),
    [
        ("SEED=1", ("SEED", "1")),
        ("  export SEED = 1  ", ("SEED", "1")),
        ('TRACK="demo run"', ("TRACK", "demo run")),
        ("TRACK='a # b'  # why", ("TRACK", "a # b")),
        ("TRACK=a#b # why", ("TRACK", "a#b")),
        ("TRACK=", ("TRACK", "")),
        ("TRACK= # nothing", ("TRACK", "")),
        ("# SEED=1", None),
        ("", None),
    ],
)
def test_a_line_of_a_recipe_is_read_as_in_an_env_file(line: str, setting: Any):
    assert train_gpt.parse_setting(line) == setting
    assert train_gpt.parse_setting(line + "\r") == setting


@pytest.mark.parametrize("line", ['TRACK="demo', "TRACK='a' b", "SEED", "export"])
def test_a_malformed_line_of_a_recipe_is_refused_with_its_number(tmp_path: Path, line: str):
    path = tmp_path / "run.env"
    path.write_text(f"SEED=1\n{line}\n")
    with pytest.raises(InputError, match=f"run.env:2: {re.escape(repr(line))}"):
        read_recipe(path)


def test_a_recipe_must_be_a_small_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (train_gpt.MAX_RECIPE_BYTES + 1))
    for path in (tmp_path / "pipe", tmp_path / "large", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="must be a regular file"):
            read_recipe(path)


@pytest.mark.parametrize(
    "env",
    [
        {"XSA_LAYERS": "0-99999999999"},
        {"TTT_PHASES": "1-99999999999"},
        {"MIXER_ORDERS": "0-5,7-99999999"},
        {"NUM_LOOPS": "1500000000"},
        {"NUM_LOOPS": str(10**30)},
        {"TRAIN_BATCH_TOKENS": "6400000000000"},
        {"NGRAM_TABLE_BITS": "32"},
        {"MODEL_DIM": "16384"},
        {"TRAIN_SEQ_LEN": str(2**20), "MODEL_DIM": "8192", "ROPE_DIMS": "0"},
    ],
)
def test_a_setting_that_takes_all_memory_is_refused_before_it_does(env: dict[str, str]):
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            config_from_env(env)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("word", sorted(OUR_WORDS))
def test_a_name_with_a_word_of_ours_is_never_foreign(word: str):
    name = f"ZZ_{word}_ZZ"
    assert problems_of({name: "1"}) == [f"{name} is not a knob of this script"]
    assert config_from_env({f"ZZ_A{word}Z": "1"}) == Config()  # a part of a word is not the word


def test_all_problems_come_in_one_message():
    env = {
        "NUM_LAYER": "9",
        "PHASED_TTT_ENABLED": "1",
        "MAX_WALLCLOCK_SECONDS": "ten",
        "SEED": "-1",
        "NUM_KV_HEADS": "3",
        "HOME": "/root",
    }
    with pytest.raises(InputError) as refusal:
        config_from_env(env)
    assert str(refusal.value) == (
        "invalid environment:\n"
        "  NUM_LAYER is not a knob; did you mean NUM_LAYERS?\n"
        "  PHASED_TTT_ENABLED is not a knob; use TTT_PHASES\n"
        "  MAX_WALLCLOCK_SECONDS='ten' is not a valid float\n"
        "  SEED=-1 must be in [0, 2147483647] (random seed of initialization and data order)\n"
        "  NUM_KV_HEADS=3 must divide NUM_HEADS=8"
    )
    assert isinstance(refusal.value, ValueError)


DIVISORS = ["num_heads", "num_kv_heads", "train_seq_len"]  # in the rules between knobs; see below
BOUNDED = [
    (name, end)
    for name in FIELDS
    for end in ("low", "high")
    if FIELDS[name].metadata[end] is not None and (end == "high" or name not in DIVISORS)
]


@pytest.mark.parametrize(("name", "end"), BOUNDED)
def test_a_bound_belongs_to_the_range_and_what_lies_beyond_does_not(name: str, end: str):
    bound = KINDS[name](FIELDS[name].metadata[end])
    step = 1 if KINDS[name] is int else 1e-6 * (abs(bound) or 1.0)
    beyond = bound - step if end == "low" else bound + step

    def complaints(value: Any) -> list[str]:
        try:
            Config(**{name: value})
        except InputError as error:
            lines = str(error).split("\n  ")[1:]
            return [line for line in lines if line.startswith(f"{name.upper()}={value} must be ")]
        return []

    ranges = [line for line in complaints(bound) if FIELDS[name].metadata["doc"] in line]
    assert ranges == []
    assert len(complaints(beyond)) >= 1


@pytest.mark.parametrize("name", [name.upper() for name in DIVISORS])
def test_a_divisor_of_zero_is_refused_like_any_other_number(name: str):
    first, *_ = problems_of({name: "0"})
    assert first.startswith(f"{name}=0 must be in [1, ")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"model_dim": 510, "rope_dims": 2},
            "NUM_HEADS=8 must divide MODEL_DIM=510",
        ),
        (
            {"model_dim": 4, "num_heads": 1, "num_kv_heads": 1, "rope_dims": 4, "gate_window": 4}
            | {"mlp_mult": 0.2},
            "MLP_MULT=0.2 times MODEL_DIM=4 must be at least 1",
        ),
        ({"num_kv_heads": 3}, "NUM_KV_HEADS=3 must divide NUM_HEADS=8"),
        ({"num_kv_heads": 16}, "NUM_KV_HEADS=16 must divide NUM_HEADS=8"),
        (
            {"rope_dims": 7},
            "ROPE_DIMS=7 (0 = the head's width) must be even and at most MODEL_DIM/NUM_HEADS=64",
        ),
        (
            {"rope_dims": 66},
            "ROPE_DIMS=66 (0 = the head's width) must be even and at most MODEL_DIM/NUM_HEADS=64",
        ),
        (
            {"model_dim": 40},
            "ROPE_DIMS=0 (0 = the head's width) must be even and at most MODEL_DIM/NUM_HEADS=5",
        ),
        (
            {"train_batch_tokens": 524_289},
            "TRAIN_BATCH_TOKENS=524289 must be a multiple of TRAIN_SEQ_LEN=1024",
        ),
        (
            {"eval_stride": 1025},
            "EVAL_STRIDE=1025 must be at most the evaluation context 1024 "
            "(EVAL_SEQ_LEN or TRAIN_SEQ_LEN)",
        ),
        (
            {"eval_seq_len": 32},
            "EVAL_STRIDE=64 must be at most the evaluation context 32 "
            "(EVAL_SEQ_LEN or TRAIN_SEQ_LEN)",
        ),
        (
            {"muon_coefficients": "polar", "muon_backend_steps": 6},
            "MUON_BACKEND_STEPS=6 must be at most 5 with MUON_COEFFICIENTS=polar",
        ),
        ({"xsa_last_n": 10}, "XSA_LAST_N=10 must be at most NUM_LAYERS=9"),
        (
            {"xsa_layers": "0,9"},
            "XSA_LAYERS='0,9' must list blocks below NUM_LAYERS=9, such as 0,2,5-7",
        ),
        (
            {"ve_layers": "a-3"},
            "VE_LAYERS='a-3' must list blocks below NUM_LAYERS=9, such as 0,2,5-7",
        ),
        (
            {"train_seq_schedule": "512@0.5,256@0.4"},
            "TRAIN_SEQ_SCHEDULE='512@0.5,256@0.4' must be VALUE@PROGRESS,... with increasing "
            "values of progress below 1, such as 1024@0.1,2048@0.7",
        ),
        (
            {"train_batch_schedule": "0@0.5"},
            "TRAIN_BATCH_SCHEDULE='0@0.5' must be VALUE@PROGRESS,... with increasing "
            "values of progress below 1, such as 1024@0.1,2048@0.7",
        ),
        (
            {"train_seq_schedule": "2048@0.5"},
            "TRAIN_SEQ_SCHEDULE: 2048 is above TRAIN_SEQ_LEN=1024",
        ),
        (
            {"train_batch_schedule": "1536@0.5"},
            "TRAIN_BATCH_TOKENS=1536 must be a multiple of TRAIN_SEQ_LEN=1024",
        ),
        (
            {"num_loops": 2, "enable_looping_at": "0.5,0.4"},
            "ENABLE_LOOPING_AT='0.5,0.4' must be one value of progress below 1, or NUM_LOOPS "
            "non-decreasing ones",
        ),
        (
            {"num_loops": 1, "enable_looping_at": "1"},
            "ENABLE_LOOPING_AT='1' must be one value of progress below 1, or NUM_LOOPS "
            "non-decreasing ones",
        ),
        ({"ngram_tilt": 2.6, "ngram_tilt_orders": ""}, "NGRAM_TILT=2.6 needs NGRAM_TILT_ORDERS"),
        (
            {"num_loops": 1, "loop_start": 5, "loop_end": 4},
            "LOOP_START=5, LOOP_END=4 must be blocks in this order, below NUM_LAYERS=9",
        ),
        (
            {"parallel_residual": "stream", "parallel_start_layer": 9},
            "PARALLEL_START_LAYER=9 must be below NUM_LAYERS=9",
        ),
        (
            {"bigram_vocab_size": 1},
            "BIGRAM_VOCAB_SIZE and TRIGRAM_VOCAB_SIZE must be 0 or at least 2",
        ),
        (
            {"attn_gate": "window", "gate_window": 513},
            "GATE_WINDOW=513 must be at most MODEL_DIM=512",
        ),
        (
            {"ttt_method": "lora", "eval_hash_rows": 64},
            "EVAL_HASH_ROWS=64: TTT_METHOD=lora trains this table in TTT_PHASES alone; set them, "
            "or EVAL_HASH_ROWS=0",
        ),
        (
            {"ttt_method": "lora", "ttt_polyak": 0.5},
            "TTT_POLYAK=0.5: TTT_METHOD=lora averages no weights; set it to 0",
        ),
        *(
            (
                {"ttt_num_lrs": 2, **changes},
                "TTT_NUM_LRS=2 must be 1 with TTT_WARM_START_A, NGRAM_TILT, ADAPTIVE_TEMPERATURE "
                "or MIXER=hedge_entropy",
            )
            for changes in (
                {"ttt_method": "lora", "ttt_warm_start_a": True},
                {"ttt_method": "lora", "ngram_tilt": 2.0},
                {"ttt_method": "lora", "adaptive_temperature": 0.98},
            )
        ),
        *(
            (
                {"ttt_method": "pretrain", "allow_noncompliant": True, **changes},
                "TTT_METHOD=pretrain is illegal: set ALLOW_NONCOMPLIANT=1 MIXER=none NGRAM_TILT=0",
            )
            for changes in ({"mixer": "backoff"}, {"ngram_tilt": 1.0}, {"mixer": "hedge"})
        ),
        *(
            (
                {"ttt_lora_targets": targets},
                f"TTT_LORA_TARGETS={targets!r} must name modules of attn, head, k, mlp, mlp_block, "
                "o, q, v, each once",
            )
            for targets in ("q,q", "mlp,head,mlp", "", "q,", "all")
        ),
        *(
            (
                {"ttt_lora_lr": lr},
                f"TTT_LORA_LR={lr:g} must be -1 (chosen by the first documents) or at least 0",
            )
            for lr in (-0.5, -1e-9, -0.999)
        ),
        *(
            (
                {"quantizer": "rtn", "row_steps": "max", "quant_grid": "uniform", **changes},
                "QUANTIZER=rtn has no Hessians: not with QUANT_GRID=trellis, or ROW_STEPS=solved "
                "without CLIP_SIGMAS",
            )
            for changes in (
                {"quant_grid": "trellis"},
                {"row_steps": "solved"},
            )
        ),
        *(
            (
                {"clip_sigmas": "12", "row_steps": steps},
                f"CLIP_SIGMAS and ROW_STEPS={steps} both set the quantization scales",
            )
            for steps in ("max", "percentile")
        ),
        *(
            (
                {"clip_sigmas": sigmas},
                f"CLIP_SIGMAS={sigmas!r} must be a number, or one for each of attn, mlp, embed, "
                "table",
            )
            for sigmas in (
                "0",
                "-3",
                "attn:13",
                "attn:13,mlp:11,embed:14",
                "attn:13,mlp:11,embed:14,table:0",
                "attn:13,mlp:11,embed:14,table:12,gate:9",
                "attn=13",
                ",",
                "nan",
            )
        ),
    ],
)
def test_a_contradiction_is_refused_in_these_words(changes: dict[str, Any], problem: str):
    with pytest.raises(InputError) as refusal:
        plain_config(**changes)
    assert str(refusal.value) == f"invalid configuration:\n  {problem}"
    whole = {**PLAIN_ENVIRONMENT, **changes}
    env = {name.upper(): str(value) for name, value in whole.items()}
    assert problems_of(env) == [problem]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_dims": 64},
        {"eval_stride": 1024},
        {"eval_seq_len": 2048, "eval_stride": 2048},
        {"muon_coefficients": "polar", "muon_backend_steps": 5},
        {"muon_coefficients": "classic", "muon_backend_steps": 6},
        {"xsa_last_n": 9},
        {"num_kv_heads": 8},
        {"train_batch_tokens": 3 * 1024},  # neither a power of two nor a multiple of 8 rows
        {"train_seq_len": 768, "train_batch_tokens": 768},
        {"model_dim": 80, "rope_dims": 10},
        {"parallel_start_layer": 9},
        {"loop_start": 9, "loop_end": 4},
        {"train_seq_schedule": "512@0.999", "train_batch_schedule": "512@0.999"},
        {"model_dim": 8, "num_heads": 4},
        {"quantizer": "rtn", "quant_grid": "uniform", "clip_sigmas": "12"},
        {"clip_sigmas": "12.85"},
        {"ttt_lora_targets": "head,v,mlp,o,k,q"},
        {"ttt_method": "pretrain", "allow_noncompliant": True, "adaptive_temperature": 0.98},
    ],
)
def test_what_only_comes_near_a_contradiction_is_accepted(changes: dict[str, Any]):
    assert plain_config(**changes) == dataclasses.replace(plain_config(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"xsa_layers": "5-2"},
        {"xsa_layers": "0,7-5"},
        {"ttt_phases": "833,1666-1000"},
        {"bigram_dim": 10**9},
        {"ve_layers": ","},
        {"num_loops": 1, "enable_looping_at": "nan"},
        {"bigram_dim": 1},  # one column has no standard deviation
        {"trigram_dim": 1},
        {"ve_dim": 1},
    ],
)
def test_a_list_that_selects_nothing_is_refused(changes: dict[str, Any]):
    with pytest.raises(InputError):
        Config(**changes)


@pytest.mark.parametrize(
    "sigmas",
    [
        "attn:13,mlp:11,embed:14,tables:12", "a:1,b:2,c:3,d:4", "inf", "12,attn:inf",
        "12,85", "attn:13,12", "12,", ":12", "attn:13,attn:12,mlp:11,embed:14,table:12",
    ],
)  # fmt: skip
def test_clip_sigmas_of_unknown_groups_or_without_bound_are_refused(sigmas: str):
    with pytest.raises(InputError):
        Config(clip_sigmas=sigmas)


def test_clip_sigmas_are_one_number_for_all_or_one_for_each_group():
    assert Config().sigmas == {} and Config().solves_scales
    one = Config(clip_sigmas="12.85")
    assert one.sigmas == dict.fromkeys(("attn", "mlp", "embed", "table"), 12.85)
    each = Config(clip_sigmas="table:12,attn:13,mlp:11.5,embed:14")
    assert each.sigmas == {"attn": 13.0, "mlp": 11.5, "embed": 14.0, "table": 12.0}
    assert not one.solves_scales and not each.solves_scales
    assert not Config(row_steps="percentile").solves_scales


@pytest.mark.parametrize(
    ("quantizer", "limit_s", "reserve_s", "expected_s"),
    [
        ("gptq", 600.0, 12.0, 588.0),
        ("gptq", 60.0, 12.0, 54.0),  # never more than a tenth
        ("gptq", 0.0, 12.0, 0.0),  # no limit stays no limit
        ("rtn", 600.0, 12.0, 600.0),
    ],
)
def test_calibration_is_kept_a_share_of_the_training_budget(
    quantizer: str, limit_s: float, reserve_s: float, expected_s: float
):
    cfg = Config(
        quantizer=quantizer,
        row_steps="max",
        quant_grid="uniform",
        max_wallclock_seconds=limit_s,
        gptq_reserve_seconds=reserve_s,
    )
    assert cfg.train_seconds == expected_s


# --- Recipes -------------------------------------------------------------------------------------


def test_a_recipe_lies_below_the_environment_and_above_the_defaults(tmp_path: Path):
    recipe = tmp_path / "run.env"
    recipe.write_text("# a comment\n\n  MODEL_DIM = 256 \nSEED=1\nRUN_ID=a=b\nMLP_MULT=3\n")
    cfg = config_from_env({"RECIPE": str(recipe), "SEED": "2", "RANK": "0"})
    assert (cfg.model_dim, cfg.seed, cfg.run_id, cfg.mlp_mult) == (256, 2, "a=b", 3.0)
    assert changed_knobs(cfg) == ["MLP_MULT", "MODEL_DIM", "RECIPE", "RUN_ID", "SEED"]


def test_an_empty_recipe_variable_means_no_recipe():
    assert config_from_env({"RECIPE": ""}) == Config()


def test_a_bad_value_in_a_recipe_is_refused_like_one_in_the_environment(tmp_path: Path):
    recipe = tmp_path / "run.env"
    recipe.write_text("SEED=one\nMLP_MULT=0\n")
    assert problems_of({"RECIPE": str(recipe)}) == [
        "SEED='one' is not a valid int",
        "MLP_MULT=0.0 must be in [0.125, 64] (MLP width / MODEL_DIM)",
    ]


@pytest.mark.parametrize("line", ["NUM_LAYER=9", "RECIPE=other.env", "=1", "NCCL_NET=ib"])
def test_a_recipe_line_that_sets_no_knob_is_refused_with_its_place(tmp_path: Path, line: str):
    recipe = tmp_path / "run.env"
    recipe.write_text(f"SEED=1\n# second\n{line}\n")
    with pytest.raises(InputError) as refusal:
        config_from_env({"RECIPE": str(recipe)})
    assert str(refusal.value).startswith(f"{recipe}:3: {line!r} is not KNOB=value of a knob")


def test_a_recipe_line_in_small_letters_is_not_ignored(tmp_path: Path):
    recipe = tmp_path / "run.env"
    recipe.write_text("model_dim=64\n")
    try:
        assert config_from_env({"RECIPE": str(recipe)}).model_dim == 64
    except InputError as error:
        assert "model_dim" in str(error)


def test_a_missing_recipe_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "none.env"
    with pytest.raises(InputError) as refusal:
        config_from_env({"RECIPE": str(path)})
    text = f"RECIPE={path} cannot be read: [Errno 2] No such file or directory: '{path}'"
    assert str(refusal.value) == text


def test_a_recipe_that_is_not_text_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "run.env"
    path.write_bytes(b"SEED=1\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"^RECIPE=.*run\.env cannot be read: 'utf-8' codec"):
        read_recipe(path)


# --- Derived values ------------------------------------------------------------------------------


def test_derived_values_follow_from_the_knobs():
    cfg = plain_config(model_dim=96, num_heads=4, num_kv_heads=2, mlp_mult=2.5, train_seq_len=128)
    assert (cfg.head_dim, cfg.mlp_dim, cfg.rotary_dims, cfg.score_seq_len) == (24, 240, 24, 128)
    changed = dataclasses.replace(cfg, rope_dims=8, eval_seq_len=256)
    assert (changed.rotary_dims, changed.score_seq_len) == (8, 256)


def test_changed_knobs_are_those_that_differ_sorted():
    assert changed_knobs(Config()) == []
    cfg = Config(seed=3, compile=False, model_dim=256, muon_wd=0.095)
    assert changed_knobs(cfg) == ["COMPILE", "MODEL_DIM", "SEED"]


def test_every_knob_says_what_it_means_and_its_default_has_its_type():
    for name, f in FIELDS.items():
        assert len(f.metadata["doc"]) >= 4, name
        assert type(f.default) is KINDS[name], name
