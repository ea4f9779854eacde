"""Result files of comparisons: one JSON object per line, under the key of what was measured.

A line is added by rewriting the whole file under another name and renaming it, so a kill at any
moment leaves the file with or without the line, never with half of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from pathlib import Path
from typing import Any

import train_gpt
from records.logs import Json
from train_gpt import InputError


def read_results(path: Path) -> dict[str, Json]:
    """Return the lines of a result file by their key; none if the file does not exist."""
    results = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            result = json.loads(line)
            results[result["key"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number} is not a result: {error!r}") from error
    return results


def append_result(path: Path, result: Json) -> None:
    """Append a line to a result file, atomically; several processes may do so at once."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        before = path.read_bytes() if path.exists() else b""
        train_gpt.write_atomic(path, before + json.dumps(result).encode() + b"\n")
    finally:
        os.close(folder)


def parse_settings(text: Any, where: str) -> dict[str, str]:
    """Return the settings in `KEY=value KEY=value ...`, quoted as in a shell.

    `where` says in the message of the InputError where the text stands.
    """
    words = shlex.split(text) if isinstance(text, str) else [repr(text)]
    pairs = [word.partition("=") for word in words]
    bad = [f"{where}: {name + sep + value!r} is not KEY=value" for name, sep, value in pairs
           if not (sep and name.isidentifier() and name.isupper())]  # fmt: skip
    if bad:
        raise InputError("; ".join(bad))
    return {name: value for name, _, value in pairs}
