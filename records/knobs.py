"""What the script's source says about its knobs: groups, meanings and defaults."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from dataclasses import fields
from typing import Any

from train_gpt import Config


def format_knob_value(value: Any) -> str:
    """Return a knob's value as text for an environment variable: 1 for True, 2 for 2.0."""
    if isinstance(value, bool):
        return str(int(value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


@functools.cache
def knob_groups() -> dict[str, str]:
    """Return the group of every knob: the comment line above it in the source of Config."""
    groups, group = {}, ""
    for line in inspect.getsource(Config).splitlines():
        if found := re.fullmatch(r"    # (\w[\w ]*)", line):
            group = found[1]
        elif found := re.match(r"    (\w+): \w+ = knob\(", line):
            groups[found[1].upper()] = group
    return groups


def evaluation_knobs() -> set[str]:
    """Return the knobs that only change how an artifact is scored: Evaluation and what follows."""
    names, groups = list(knob_groups()), list(knob_groups().values())
    return set(names[groups.index("Evaluation") :])


def knob_docs() -> dict[str, tuple[str, str]]:
    """Return meaning and default of every knob."""
    return {
        f.name.upper(): (f.metadata["doc"], format_knob_value(f.default)) for f in fields(Config)
    }


def config_defaults(source: str) -> dict[str, Any]:
    """Return the defaults of all knobs as a script's source states them, without running it.

    Empty if the source has no class Config of lines `name: type = knob(default, ...)`.
    """
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    defaults = {}
    for line in (line for node in classes if node.name == "Config" for line in node.body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Call):
            name, (first, *_) = line.target, [*line.value.args, None]
            if isinstance(name, ast.Name) and first is not None:
                defaults[name.id.upper()] = ast.literal_eval(first)
    return defaults
