"""Markdown tables, and generated blocks between marks in a file that people also edit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from train_gpt import InputError


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table; columns of numbers are aligned to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    is_number = [
        all(re.fullmatch(r"-|[-+\d.,]+", row[column]) for row in rows)
        and any(row[column] != "-" for row in rows)
        for column in range(len(header))
    ]
    rule = ["---:" if number else "---" for number in is_number]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def replace_marked(text: str, mark: str, content: str) -> str:
    """Return `text` with the block between <!-- mark --> and <!-- /mark --> replaced."""
    opening, closing = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, found, rest = text.partition(opening)
    _, closed, tail = rest.partition(closing)
    if not (found and closed):
        raise InputError(f"the marks {opening} and {closing} are missing")
    return f"{head}{opening}\n{content}\n{closing}{tail}"
