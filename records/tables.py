"""Generated pages: records/README.md and KNOBS.md."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from records.check import is_recipe, stated_parameters
from records.knobs import format_knob_value, knob_groups
from records.markdown import table_lines
from records.submission import read_submission
from train_gpt import Config


def record_row(folder: Path, records: Path) -> list[str]:
    """The row of one record in the table of its track."""
    record = read_submission(folder / "submission.json")
    used = record["budget"]["time"]
    return [
        f"{record['val_bpb']:.5f}",
        f"{record['val_bpb_std']:.5f}" if len(record["seeds"]) > 1 else "-",
        str(len(record["seeds"])),
        f"[{record['name']}]({folder.relative_to(records).as_posix()}/README.md)",
        record["author"] or "-",
        record["date"],
        f"{record['budget']['bytes']['total_bytes_max']:,}",
        f"{used['training_s']:.0f} + {used['evaluation_s']:.0f}",
        record["hardware"],
        "yes" if record["compliant"] else "no",
    ]


def find_records(records: Path) -> list[Path]:
    """All record folders, sorted."""
    return sorted(path.parent for path in records.glob("track_*/*/submission.json"))


def find_recipes(records: Path) -> list[Path]:
    """All recipe folders, sorted."""
    return sorted(
        path.parent for path in records.glob("track_*/*/run.env") if is_recipe(path.parent)
    )


def recipe_row(folder: Path, records: Path) -> list[str]:
    """The row of one recipe: its name, the number of parameters and the title of its README."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    link = f"[{folder.name}]({folder.relative_to(records).as_posix()}/README.md)"
    return [link, stated_parameters(text), text.partition("\n")[0].removeprefix("# ")]


RECORDS_HEAD = """\
# Records

Made by `python records/records.py table`: do not edit. Each row comes from a `submission.json`, and
that from the logs beside it; `python records/records.py check records/track_*/*/` computes all of
them again. In every track the lowest bits per byte stand first."""


RECIPES_HEAD = """\
Recipes of published systems: settings that nobody has run here, so they have no score. Each README
sets what its source claims against what its logs show, and says what is missing."""


RECORDS_TAIL = """\
## Ablations

What each technique is worth at a track's scale stands in its `ablations.md`, where there is one: a
grid of changed knobs times seeds, each run a fixed number of steps. The grid is `ablations.toml`
beside it (how to write one: the head of `records/ablations.py`), every run a line of
`ablations.jsonl`, table and plot are made from that. What a step takes is measured by itself, each
variant next to its reference, into `ablations_time.jsonl`.

```bash
grid=records/track_cpu_10min_1mb/ablations.toml
python records/ablations.py run $grid --hours 0             # check the grid, run nothing
python records/ablations.py run $grid --jobs 2 --hours 4    # what is missing; killed, it goes on
python records/ablations.py run $grid --retry               # the failed runs, too
python records/ablations.py time $grid --jobs 2             # what a step takes; nothing else runs
python records/ablations.py table $grid                     # ablations.md and ablations.png
```"""


def format_records(records: Path) -> str:
    """The content of records/README.md."""
    lines = [RECORDS_HEAD]
    header = ["val bpb", "std", "n", "record", "author", "date", "bytes", "train + eval s"]
    header += ["hardware", "compliant"]
    folders, recipes = find_records(records), find_recipes(records)
    for track in sorted({folder.parent.name for folder in [*folders, *recipes]}):
        rows = [record_row(f, records) for f in folders if f.parent.name == track]
        rows.sort(key=lambda row: (row[-1] == "no", float(row[0])))
        lines += ["", f"## {track}"]
        lines += ["", *table_lines(header, rows)] if rows else []
        rows = [recipe_row(f, records) for f in recipes if f.parent.name == track]
        shown = table_lines(["recipe", "parameters", "system"], rows)
        lines += ["", RECIPES_HEAD, "", *shown] if rows else []
    if not folders:
        lines += ["", "There is no record yet."]
    return "\n".join([*lines, "", RECORDS_TAIL, ""])


def knob_range(metadata: Mapping[str, Any], kind: str) -> str:
    """Allowed values of a knob, in words."""
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    low, high = metadata["low"], metadata["high"]
    if low is None:
        return {"bool": "`0`, `1`", "str": "text"}.get(kind, kind)
    unit = f" {metadata['unit']}" if metadata["unit"] else ""
    return (f"{low:,g} or more" if high is None else f"{low:,g} to {high:,.8g}") + unit


def knob_table() -> str:
    """The table of all knobs, in the order of Config."""
    groups, rows = knob_groups(), []
    for group, members in itertools.groupby(fields(Config), lambda f: groups[f.name.upper()]):
        rows.append([f"**{group}**", "", "", ""])
        for f in members:
            shown = f"`{format_knob_value(f.default)}`" if f.default != "" else "empty"
            values = knob_range(f.metadata, type(f.default).__name__)
            rows.append([f"`{f.name.upper()}`", shown, values, f.metadata["doc"]])
    return "\n".join(table_lines(["knob", "default", "values", "meaning"], rows))


KNOBS_HEAD = """# Knobs

Made by `python records/records.py knobs`: do not edit. Every knob is an environment variable, or a
line of the file that `RECIPE` names; `MODE=describe python train_gpt.py` prints the values in use.
Knobs that public scripts have are spelled as there.

A variable that is not a knob stops the run if it looks like one: a knob in lower case, a name of
another script that maps to a knob, the beginning, the end or a longer form of a knob (by at least
two whole words), a close spelling, or a name with a word such as `TTT`, `MUON` or `GPTQ`. Known
variables of other programs always pass.

A recipe is an env file: `KEY=value` lines, with `#` comments, quotes and `export` as usual.
"""


def knobs_page() -> str:
    """The content of KNOBS.md."""
    return f"{KNOBS_HEAD}\n{knob_table()}\n"
