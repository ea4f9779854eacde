"""Rules of style that the linter does not check.

Lengths and nesting of functions, the map of sections, the configuration, side effects of the
import, wording, the commands of the READMEs, and every record.
"""

from __future__ import annotations

import ast
import datetime
import functools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import train_gpt
from records import check
from records.check import check_record
from records.tables import find_records, format_records, knobs_page

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
TOOLS = sorted([*ROOT.glob("data/*.py"), *ROOT.glob("records/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
README = ROOT / "README.md"

MAX_PACKED_BYTES = 64_000
MAX_FUNCTION_LINES, MAX_NESTING = 60, 3
MAX_NESTED_LINES = 13  # of a function inside a function
MAX_UNDOCUMENTED_LINES = 8
BANNER_COLUMNS = 99  # it ends just before the last column
BANNER = re.compile(r"# --- (?:(\d+)\. )?([A-Za-z][\w -]*?) (-+)")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
LOOPS = ast.For | ast.AsyncFor | ast.While
BLOCKS = LOOPS | ast.If | ast.With | ast.AsyncWith | ast.Try | ast.Match

each_source = pytest.mark.parametrize("path", [SCRIPT, *TOOLS], ids=lambda path: path.name)
each_file = pytest.mark.parametrize("path", [SCRIPT, *TOOLS, *TESTS], ids=lambda path: path.name)


@functools.cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, which no test may change."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """All functions and methods in `tree`, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_lines(node: Definition) -> int:
    """Lines of a definition, signature and docstring included."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep blocks stand in each other; `elif` is as deep as its `if`, functions start anew."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        is_elif = isinstance(node, ast.If) and name == "orelse" and len(children) == 1
        for child in children:
            if isinstance(child, Definition) or not isinstance(child, ast.AST):
                continue
            same_level = is_elif and isinstance(child, ast.If)
            deeper = isinstance(child, BLOCKS) and not same_level
            deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


def comments_and_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every comment and docstring."""
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    for node in ast.walk(parse(path)):
        if isinstance(node, Definition | ast.Module) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def over(path: Path, measure: str, most: int) -> list[str]:
    """The functions of a file whose `measure` (a function of this file) is above `most`."""
    found = [(f.name, globals()[measure](f)) for f in functions_of(parse(path))]
    return [f"{name}: {measure} {value}" for name, value in found if value > most]


# --- The measures themselves ---------------------------------------------------------------------

SAMPLE = '''
def sample(a, b, /, c, *, d):
    """Doc."""
    for x in a:              # 1 deep
        if x:                # 2 deep
            pass
        elif b:              # as deep as its if
            with c:          # 3 deep
                y = [z for z in a if z]
        else:
            try:             # 3 deep
                pass
            except ValueError:
                pass
    return 1 if d else 2
'''


def test_the_measures_count_what_they_say() -> None:
    (function,) = functions_of(ast.parse(SAMPLE))
    assert nesting(function) == 3
    assert num_lines(function) == 14


# --- Size and shape ------------------------------------------------------------------------------


def test_the_packed_script_is_no_larger_than_agreed() -> None:
    packed = train_gpt.pack_source(SCRIPT.read_text(encoding="utf-8"))
    assert len(packed) <= MAX_PACKED_BYTES


@each_file
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    assert over(path, "num_lines", MAX_FUNCTION_LINES) == []


@each_file
def test_no_function_nests_too_deep(path: Path) -> None:
    assert over(path, "nesting", MAX_NESTING) == []


@each_source
def test_nested_functions_are_short(path: Path) -> None:
    long = {
        f"{inner.name} in {outer.name}: {num_lines(inner)} lines"
        for outer in functions_of(parse(path))
        for inner in functions_of(outer)
        if inner is not outer and num_lines(inner) > MAX_NESTED_LINES
    }
    assert long == set()


@each_source
def test_sources_are_ascii(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, start=1) if not line.isascii()] == []


# --- Words ---------------------------------------------------------------------------------------

FORBIDDEN = {
    "an exclamation mark": r"(?<!<)!(?!=)",
    "a filler": r"\b(simply|obviously|just works)\b",
    "a task without an issue's number": r"\b(TODO|FIXME|XXX|HACK)\b(?!.{0,3}#\d)",
    "a path of one machine": r"(?<![\w.~])/(home|root|work|Users|mnt)/",
    "a person's handle": r"(?<![\w.])@[A-Za-z]\w+",
}


@each_source
def test_comments_and_docstrings_are_plain(path: Path) -> None:
    found = [
        f"{number}: {what}"
        for number, text in comments_and_docstrings(path)
        for what, pattern in FORBIDDEN.items()
        if re.search(pattern, text)
    ]
    assert found == []


@each_source
def test_every_function_and_class_says_what_it_is(path: Path) -> None:
    silent = [
        f"{node.name}: {num_lines(node)} lines"
        for node in ast.walk(parse(path))
        if isinstance(node, Definition)
        and not ast.get_docstring(node)
        and num_lines(node) > MAX_UNDOCUMENTED_LINES
        and getattr(node, "name", "") != "__init__"  # its class has said it
    ]
    assert silent == []


# --- Sections ------------------------------------------------------------------------------------


def banners_of(path: Path) -> list[tuple[str, str]]:
    """Number and name of each banner; all have the same width."""
    banners = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ---"):
            found = BANNER.fullmatch(line)
            assert found and len(line) == BANNER_COLUMNS, line
            banners.append((found[1] or "", found[2]))
    return banners


def test_the_map_in_the_docstring_is_that_of_the_banners() -> None:
    path, docstring = SCRIPT, ast.get_docstring(parse(SCRIPT)) or ""
    _, _, after = docstring.partition("Sections:")
    promised = re.findall(r"(\d+)\. ([A-Za-z][\w -]*?)(?=  |\n|$)", after.partition("\n\n")[0])
    numbered = [(number, name) for number, name in banners_of(path) if number]
    assert numbered == promised
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))


def test_every_section_of_the_script_begins_with_prose() -> None:
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    for place, line in enumerate(lines):
        if line.startswith("# --- ") and BANNER.fullmatch(line) and line[6].isdigit():
            prose = 0
            while lines[place + 1 + prose].startswith("# "):
                prose += 1
            assert 2 <= prose <= 5, line


# --- Configuration -------------------------------------------------------------------------------


def test_the_environment_is_read_in_one_place() -> None:
    """And one variable is set, before the packages that read it are imported."""
    nodes = [*ast.walk(parse(SCRIPT))]
    uses = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)
            and node.attr in ("environ", "getenv", "putenv")]  # fmt: skip
    calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call)]
    defaults = [call for call in calls if call.startswith("os.environ.")]
    assert defaults == ["os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')"]
    assert uses == ["os.environ"] * 2


# Reading a knob here does not use it: these check it or show it.
NOT_A_USE = {"check_combinations", "config_from_env", "changed_knobs", "log_setup", "describe"}


def config_reads(tree: ast.AST, owners: tuple[str, ...]) -> set[str]:
    """Names x of the attributes read as <owner>.x, for any of `owners`, or as ....cfg.x."""
    reads = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = node.value
            name = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
            if name in owners:
                reads.add(node.attr)
    return reads


def used_knobs(tree: ast.Module) -> set[str]:
    """Knobs that something outside Config reads, by themselves or through a property of Config."""
    used: set[str] = set()
    properties: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            properties = {f.name: config_reads(f, ("self",)) for f in functions_of(node)}
        elif getattr(node, "name", "") not in NOT_A_USE:
            used |= config_reads(node, ("cfg",))
    for name in [name for name in properties if name in used]:
        used |= properties[name]
    return used


def test_every_knob_is_used() -> None:
    tree = parse(SCRIPT)
    by_name = set(
        re.findall(r"""env(?:\.get\(|\[)"([A-Z_]+)"[\])]""", ast.unparse(tree).replace("'", '"'))
    )
    unused = {f.name for f in fields(train_gpt.Config)} - used_knobs(tree)
    assert {name for name in unused if name.upper() not in by_name} == set()


def test_options_are_never_looked_up_by_a_guess() -> None:
    guesses = [
        ast.unparse(node)
        for node in ast.walk(parse(SCRIPT))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and ast.unparse(node.args[0]).endswith("cfg")
    ]
    assert guesses == []


# --- Errors and imports --------------------------------------------------------------------------


@each_source
def test_no_error_is_swallowed_without_a_word(path: Path) -> None:
    silent = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            nothing = all(isinstance(statement, ast.Pass) for statement in node.body)
            if node.type is None or (nothing and "#" not in lines[node.body[0].lineno - 1]):
                silent.append(node.lineno)
    assert silent == []


def test_every_assertion_of_the_script_says_what_was_broken() -> None:
    asserts = [node for node in ast.walk(parse(SCRIPT)) if isinstance(node, ast.Assert)]
    assert [node.lineno for node in asserts if node.msg is None] == []


@each_source
def test_imports_stand_at_the_top_and_name_what_they_take(path: Path) -> None:
    tree = parse(path)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    stars = [n.lineno for n in imports if any(alias.name == "*" for alias in n.names)]
    inside = [n.lineno for f in functions_of(tree) for n in ast.walk(f)
              if isinstance(n, ast.Import | ast.ImportFrom)]  # fmt: skip
    assert (stars, inside) == ([], [])  # optional kernels and compressors go through importlib


IMPORT_PROBE = """
import os, random, signal, sys
import numpy, torch
import torch.distributed, torch.nn.functional, safetensors.torch, sentencepiece
import ast, base64, contextlib, dataclasses, datetime, difflib, importlib.util, lzma, resource
import concurrent.futures

def state():
    return {
        "files here": os.listdir("."),
        "environment": dict(os.environ),
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": repr(numpy.random.get_state()),
        "Python RNG": random.getstate(),
        "CUDA": torch.cuda.is_initialized(),
        "process group": torch.distributed.is_initialized(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "default dtype": str(torch.get_default_dtype()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
    }

def watch(event, args):
    writes = event == "open" and (args[1] or "r")[:1] in "wax+"
    if watching and (writes or event in ("subprocess.Popen", "socket.connect", "os.mkdir")):
        print("import did", event, args)

watching = False
sys.addaudithook(watch)
before, watching = state(), True
sys.path.insert(0, sys.argv[1])
import train_gpt
watching = False
after = state()
print(*(f"import changed {key}" for key in before if before[key] != after[key]), sep="\\n", end="")
"""


def test_importing_the_script_does_nothing_else(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_PROBE, str(ROOT)],
        env={}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("given", "policy"),
    [
        pytest.param({}, "PASSIVE", marks=pytest.mark.slow),
        pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE", marks=pytest.mark.slow),
    ],
)
def test_threads_sleep_while_they_wait_unless_the_user_decides(
    given: dict[str, str], policy: str, tmp_path: Path
) -> None:
    program = (
        "import os, runpy, sys\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv[1:], os._exit = ['--help'], sys.exit\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train_gpt.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-B", "-c", program],
        env=given, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, policy), result.stderr


# --- README and records --------------------------------------------------------------------------


def test_knobs_md_lists_exactly_the_knobs() -> None:
    text = (ROOT / "KNOBS.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([A-Z][A-Z0-9_]*)` \|", text, flags=re.MULTILINE)
    assert listed == [f.name.upper() for f in fields(train_gpt.Config)]
    assert text == knobs_page(), "write it again: python records/records.py knobs"


def test_every_knob_in_the_readme_exists() -> None:
    names = {f.name.upper() for f in fields(train_gpt.Config)}
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## Knobs") : text.index("## Recipes")]
    rows = re.findall(r"^\| (`.*?`) \|", table, flags=re.MULTILINE)
    assert rows and {name for row in rows for name in re.findall(r"`(\w+)`", row)} <= names


def untested_commands(text: str, tests: str) -> list[str]:
    """First lines of ```bash blocks that no comment above says were run.

    The comment is <!-- tested: test_name -->, naming a test there is, or <!-- run: 2026-11-20 -->.
    """
    lines = text.splitlines()
    untested = []
    for place, line in enumerate(lines):
        if line.strip() != "```bash":
            continue
        above = next((before.strip() for before in reversed(lines[:place]) if before.strip()), "")
        tested = re.fullmatch(r"<!-- tested: (test_\w+) -->", above)
        dated = re.fullmatch(r"<!-- run: (\d{4}-\d{2}-\d{2}) -->", above)
        known = tested and re.search(rf"^def {tested[1]}\(", tests, flags=re.MULTILINE)
        if not known and not (dated and is_past(dated[1])):
            untested.append(lines[place + 1])
    return untested


def is_past(date: str) -> bool:
    """Whether `date` is a date, and not one to come."""
    try:
        return datetime.date.fromisoformat(date) <= datetime.date.today() + datetime.timedelta(1)
    except ValueError:
        return False


def test_a_command_counts_as_run_only_with_a_test_or_a_date() -> None:
    block = "{}\n```bash\nmake run\n```\n"
    tests = "def test_it() -> None:\n"
    for comment in ("<!-- tested: test_it -->", "<!-- run: 2026-01-02 -->"):
        assert untested_commands(block.format(comment), tests) == []
    for comment in ("", "<!-- tested: test_other -->", "<!-- run: 2026-13-02 -->", "text"):
        assert untested_commands(block.format(comment), tests) == ["make run"]


@pytest.mark.parametrize("path", [README, ROOT / "data/README.md"], ids=["README", "data"])
def test_every_command_of_the_readme_was_run(path: Path) -> None:
    tests = "\n".join(test.read_text(encoding="utf-8") for test in TESTS)
    assert untested_commands(path.read_text(encoding="utf-8"), tests) == []


@pytest.mark.slow  # packs the script of each
def test_every_record_is_what_its_logs_say() -> None:
    folders = find_records(ROOT / "records")
    verdicts = {folder.name: check_record(folder, ROOT / "records") for folder in folders}
    assert folders and {name: v.problems for name, v in verdicts.items() if v.problems} == {}


def test_the_newest_record_is_what_its_logs_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check_code_size", lambda *_: ([], []))
    newest = max(find_records(ROOT / "records"), key=lambda folder: folder.name)
    assert check_record(newest, ROOT / "records").problems == []


def test_the_list_of_records_is_up_to_date() -> None:
    written = (ROOT / "records/README.md").read_text(encoding="utf-8")
    expected = format_records(ROOT / "records")
    assert written == expected, "write it again: python records/records.py table"
