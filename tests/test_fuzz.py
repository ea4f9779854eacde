"""Random damage to what a run or a tool reads: a refusal or a sound result, never a traceback.

Artifacts have a file of their own, test_mutations.py. Here are checkpoints under right checksums,
shards and sidecars, environments, and folders of records. Each test prints the outcomes, the
slowest input and the memory gained.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_gpt
from records.records import main as records_main
from tests.conftest import VOCAB_SIZE, TinyData
from tests.record_data import SOURCE, run_events
from tests.test_data_identity import listed, load, plain  # noqa: F401
from tests.test_records_check import NAME, TRACK, forge
from tests.test_train import (  # noqa: F401
    Resume,
    change_checkpoint,
    open_trainer,
    same_bits,
    stopped,
    stopped_folder,
)  # fmt: skip
from train_gpt import InputError, Progress

LIMIT_MIB = 300
SEED = 5
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**30, -(10**18), 0.5, -0.0, 1e308, math.nan,
    math.inf, "", "1", "nan", "../x", "\0", "\ud800", "a\nb", "x" * 5000, "日本", [], {}, [[]],
    [0] * 999, {"": None},
]  # fmt: skip


def change_json(value: Any, rng: np.random.Generator) -> Any:
    """A copy of a JSON value in which one entry is odd, missing, copied, nested or too much."""
    value = copy.deepcopy(value)
    parent: Any = {"root": value}
    key: Any = "root"
    node = value
    while isinstance(node, dict | list) and len(node) and rng.random() < 0.85:
        parent = node
        key = rng.choice(list(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
        key = key.item() if isinstance(key, np.str_) else key
        node = node[key]
    kind = rng.integers(6)
    if kind == 0 and parent is not None and not (len(parent) == 1 and "root" in parent):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent["unknown"] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    elif kind == 2:
        nested: Any = node
        for _ in range(int(rng.integers(1, 300))):
            nested = [nested]
        parent[key] = nested
    elif kind == 3 and isinstance(node, int | float) and not isinstance(node, bool):
        parent[key] = node * float(rng.choice([-1, 0, 0.5, 1.0001, 1e9]))
    else:
        parent[key] = ODD_VALUES[rng.integers(len(ODD_VALUES))]
    return parent["root"] if "root" in parent else value


def change_bytes(payload: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with a few bits flipped, a part cut, doubled or zeroed, or noise in their place."""
    data, kind = bytearray(payload), rng.integers(6)
    start, stop = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 9)):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[start:stop]
    elif kind == 2:
        data[start:start] = data[start:stop]
    elif kind == 3:
        data[start:stop] = bytes(stop - start)
    elif kind == 4:
        data[start : start + 8] = rng.bytes(8)
    else:
        place = 4 * int(rng.integers(0, min(len(data), 1024) // 4))  # of the header
        data[place : place + 4] = int(rng.integers(-(2**31), 2**31)).to_bytes(
            4, "little", signed=True
        )
    return bytes(data)


class Outcomes:
    """Counts outcomes and keeps the slowest one and the memory gained."""

    def __init__(self) -> None:
        self.counts, self.slowest = Counter[str](), (0.0, "")
        self.before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @contextlib.contextmanager
    def record(self, name: str) -> Iterator[Callable[[str], None]]:
        said = list[str]()
        started_s = time.monotonic()
        try:
            yield said.append
        except InputError as error:
            assert str(error) and "\0" not in str(error)
            said.append("refused")
        elapsed_s = time.monotonic() - started_s
        self.slowest = max(self.slowest, (elapsed_s, name))
        self.counts[f"{name}: {said[0] if said else 'accepted'}"] += 1

    def report(self) -> float:
        """Print everything; return the memory gained in MiB."""
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before_kib) / 1024
        print(dict(self.counts), "slowest", self.slowest, f"memory gained: {grown:.0f} MiB")
        return grown


def change_meta(folder: Path, rng: np.random.Generator) -> None:
    """Change one value of meta.json."""
    path = folder / "meta.json"
    path.write_text(json.dumps(change_json(json.loads(path.read_text()), rng)))


def change_tensor(folder: Path, rng: np.random.Generator) -> None:
    """Give a tensor another shape, dtype or name, under a right checksum."""

    def change(meta: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        name = str(rng.choice(sorted(state)))
        shape = [int(n) for n in rng.integers(0, 5, rng.integers(0, 4))]
        dtype = [torch.float32, torch.float16, torch.int64, torch.bool][rng.integers(4)]
        state[name + "x" * (rng.random() < 0.3)] = torch.zeros(shape, dtype=dtype)

    change_checkpoint(folder, change)


def change_state(folder: Path, rng: np.random.Generator) -> None:
    """Change bytes of state.safetensors, under a right checksum."""
    path = folder / "state.safetensors"
    path.write_bytes(change_bytes(path.read_bytes(), rng))
    meta = json.loads((folder / "meta.json").read_text())
    meta["state_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("count", [24, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_refused_or_sound(stopped: Resume, count: int):  # noqa: F811
    """A checkpoint that is accepted may differ only in numbers that a run can have."""
    rng, outcomes = np.random.default_rng(SEED), Outcomes()
    run, whole = stopped.run(), stopped.directory.with_name("copy")
    shutil.copytree(stopped.checkpoint, whole)
    trainer, _ = open_trainer(run)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    for number in range(count):
        shutil.rmtree(stopped.checkpoint)
        shutil.copytree(whole, stopped.checkpoint)
        change = (change_meta, change_tensor, change_state)[number % 3]
        change(stopped.checkpoint, rng)
        with outcomes.record(change.__name__):
            train_gpt.read_checkpoint(stopped.checkpoint, trainer)
        assert same_bits(before, trainer.tensors()) and trainer.progress == Progress()
    assert outcomes.report() < LIMIT_MIB
    assert outcomes.counts["change_tensor: accepted"] <= count / 20  # those that were right
    assert outcomes.counts["change_meta: refused"] > count / 6


@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_manifest", [False, True])
def test_damaged_data_is_refused_or_scored_on_the_same_number_of_bytes(
    request: pytest.FixtureRequest, data: TinyData, has_manifest: bool, count: int
):
    """What is accepted without a manifest still has BOS first and ids of the vocabulary."""
    folder: Path = request.getfixturevalue("listed" if has_manifest else "plain")
    rng, outcomes = np.random.default_rng(SEED), Outcomes()
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    num_bytes = load(folder).target_bytes.sum()
    names = [path for path in whole if "val" in path.name or path.suffix in (".json", ".model")]
    for _ in range(count // 2):
        path = names[rng.integers(len(names))]
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(change_json(json.loads(whole[path]), rng)))
        else:
            path.write_bytes(change_bytes(whole[path], rng))
        with outcomes.record(path.suffix) as say:
            validation = load(folder)
            say("accepted")
            assert validation.ids[0] == train_gpt.BOS_ID
            assert validation.ids.max() < VOCAB_SIZE
            if has_manifest and path.suffix == ".bin":
                assert (
                    path.read_bytes() == whole[path] and validation.target_bytes.sum() == num_bytes
                )
        path.write_bytes(whole[path])
    assert outcomes.report() < LIMIT_MIB
    assert outcomes.counts[".bin: refused"] > 0


@pytest.mark.parametrize("count", [200, pytest.param(6000, marks=pytest.mark.slow)])
def test_odd_environments_are_refused_or_configurations(count: int):
    """Every configuration that is accepted can be described within a second or two."""
    rng, outcomes = np.random.default_rng(SEED), Outcomes()
    knobs = [f for f in dataclasses.fields(train_gpt.Config) if f.name != "recipe"]
    texts = [
        "", "0", "1", "-1", "2", "7", "0.5", "1e-30", "1e308", "inf", "nan", "-0", "007", "1_000",
        "+3", "9" * 40, "0-99999999999", "1-3,5", "5,1", ",", "128@0.4", "128@2", "a@b", "true",
        "None", "x" * 9999, "q,k,head", "\0", "é", "../../etc/passwd", "/dev/zero", " 1", "0x10",
        "attn:12,mlp:3",
    ]  # fmt: skip
    for number in range(count):
        env = {"MODE": "describe"}
        for _ in range(rng.integers(1, 5)):
            field = knobs[rng.integers(len(knobs))]
            choices = [str(c) for c in field.metadata.get("choices") or ()]
            options = choices if choices and rng.random() < 0.6 else texts
            name = field.name.upper()
            if rng.random() < 0.1:  # a slip of the pen
                place = int(rng.integers(len(name)))
                name = name[:place] + name[place + 1 :]
            env[name] = str(options[rng.integers(len(options))])
        with outcomes.record("environment") as say:
            cfg = train_gpt.config_from_env(env)
            say("accepted")
            if cfg.mode == "describe" and number % 20 == 0:
                assert train_gpt.describe(cfg)
    assert outcomes.report() < LIMIT_MIB
    assert outcomes.counts["environment: refused"] > count / 4 < count - 1
    assert outcomes.counts["environment: accepted"] > 0


@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_record_folders_are_refused_without_a_traceback(tmp_path: Path, count: int):
    """The check ends with status 0, 1 or 2 and says what is wrong."""
    rng, outcomes = np.random.default_rng(SEED), Outcomes()
    folder = forge(tmp_path / "records" / TRACK / NAME, run_events(1, 1.3), SOURCE)
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    statuses = Counter[int]()
    for _ in range(count):
        path = [p for p in whole if whole[p]][rng.integers(sum(map(bool, whole.values())))]
        if path.suffix == ".json" and rng.random() < 0.7:
            path.write_text(json.dumps(change_json(json.loads(whole[path]), rng)))
        elif path.suffix == ".jsonl" and rng.random() < 0.7:
            lines = whole[path].decode().splitlines()
            place = int(rng.integers(len(lines)))
            lines[place] = json.dumps(change_json(json.loads(lines[place]), rng))
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_bytes(change_bytes(whole[path], rng))
        out, err = io.StringIO(), io.StringIO()
        with outcomes.record(path.suffix) as say:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = records_main(["check", str(folder)])
            statuses[status] += 1
            say(f"status {status}")
            assert status == 0 or err.getvalue() + out.getvalue()
        path.write_bytes(whole[path])
    assert outcomes.report() < LIMIT_MIB
    assert statuses.keys() <= {0, 1, 2} and statuses[0] < count
