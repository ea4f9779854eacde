"""Plot, compare, pack and check finished runs of train_gpt.py.

    python records/records.py plot RUN_DIR                 # draw RUN_DIR/plot.png
    python records/records.py plot RUN_A RUN_B ...         # draw runs over each other: runs.png
    python records/records.py yardstick RUN_DIR            # general compressors on the same text
    python records/records.py build OUT_DIR RUN_DIR...     # a record folder from one run a seed
    python records/records.py check DIR...                 # verify records from their logs
    python records/records.py check --rescore DIR...       # and score their artifacts again
    python records/records.py refresh DIR...               # rewrite Result and plot.png of records
    python records/records.py table                        # write records/README.md
    python records/records.py knobs                        # write KNOBS.md
    python records/records.py demo                         # the whole job: what `make run` does

A record is a folder records/track_<name>/<date>_<Name>/. Every number in its submission.json and in
the table of its README is computed from the logs beside it, by `build` and again by `check`. A
recipe is such a folder with only run.env and README.md: a published system that was not run here.

Exit status: 0; 1 if a check fails; 2 for unusable input; 130 for Ctrl-C; else the failed stage's.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As a script, its own folder is first on the path and would hide the package `records`.
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "records")]

import train_gpt  # noqa: E402  (the path above makes the imports possible)
from records.build import build_record, refresh_record  # noqa: E402
from records.check import (  # noqa: E402
    NOT_PROVEN,
    PROVEN,
    check_recipe,
    check_record,
    is_recipe,
)
from records.compressors import yardstick_command  # noqa: E402
from records.demo import StageFailed, run_demo  # noqa: E402
from records.logs import METRICS, RunLog  # noqa: E402
from records.plots import draw_comparison, draw_plot, read_runs  # noqa: E402
from records.rescore import DEFAULT_TOLERANCE_BPB, rescore_record  # noqa: E402
from records.submission import DESCRIBED, OPTIONAL  # noqa: E402
from records.tables import format_records, knobs_page  # noqa: E402
from train_gpt import InputError  # noqa: E402


def add_build_options(build: argparse.ArgumentParser) -> None:
    """Add the options of `build`."""
    build.add_argument("out", type=Path, metavar="OUT_DIR")
    build.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    build.add_argument("--author", default="", help="default: SUBMISSION_AUTHOR of the first run")
    build.add_argument("--github-id", default="", help="the challenge's submission.json needs it")
    build.add_argument("--name", default="", help="default: from OUT_DIR, else the first run's")
    build.add_argument("--date", default="", help="default: from OUT_DIR, else the latest run's")
    build.add_argument("--previous", default="", help="the record before: track_<name>/<folder>")
    build.add_argument("--data-command", default="", help="makes the data set; for the README")
    build.add_argument("--with-artifacts", action="store_true", help="copy the artifacts, too")


def add_check_options(check: argparse.ArgumentParser) -> None:
    """Add the options of `check`."""
    check.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    check.add_argument(
        "--rescore",
        action="store_true",
        help="run the record's own train_gpt.py in MODE=eval on its artifact, compare the scores",
    )
    check.add_argument("--data-path", type=Path, help="default: DATA_PATH of the run")
    check.add_argument(
        "--tolerance",
        type=float,
        default=DEFAULT_TOLERANCE_BPB,
        metavar="BPB",
        help="how far a score may be from the logged one (default %(default)s)",
    )


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and a message if it is not usable."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="records.py", description=summary)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plot = commands.add_parser("plot", help="draw a run, or several over each other")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    plot.add_argument(
        "--out", type=Path, help="default: RUN_DIR/plot.png of one run, else runs.png"
    )
    yardstick = commands.add_parser("yardstick", help="xz, zstd and PPMd on the validation text")
    yardstick.add_argument("path", type=Path, metavar="RUN_DIR_OR_DATA_PATH")
    build = commands.add_parser("build", help="make a record folder from one finished run a seed")
    add_build_options(build)
    check = commands.add_parser("check", help="verify records and recipes from their files")
    add_check_options(check)
    refresh = commands.add_parser("refresh", help="rewrite the Result section and plot.png")
    refresh.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    table = commands.add_parser("table", help="write records/README.md")
    for command in (build, check, refresh, table):
        command.add_argument(
            "--records", type=Path, default=ROOT / "records", help="the folder of all tracks"
        )
    commands.add_parser("knobs", help="write KNOBS.md")
    commands.add_parser("demo", help="the whole job on a corpus that needs no download")
    return parser.parse_args(argv)


def check_command(options: argparse.Namespace) -> int:
    """Check each folder and print the verdict; return 1 if anything is wrong."""
    failed = 0
    for folder in options.folders:
        if is_recipe(folder):
            problems, notes = check_recipe(folder), list[str]()
        else:
            problems, notes = check_record(folder, options.records)
            notes = [] if problems else [PROVEN, NOT_PROVEN, *notes]
            if options.rescore and not problems:
                again = rescore_record(folder, options.data_path, options.tolerance)
                problems, notes = again.problems, [*notes, *again.notes]
        failed |= bool(problems)
        print(f"{folder}: {'REFUSED' if problems else 'ok'}")
        print("".join(f"  {line}\n" for line in (*problems, *notes)), end="", flush=True)
    return failed


def plot_command(folders: Sequence[Path], out: Path | None) -> None:
    """Draw one run folder, or several run and record folders over each other."""
    if len(folders) == 1 and (folders[0] / METRICS).is_file():
        path = out or folders[0] / "plot.png"
        draw_plot([RunLog.read(folders[0] / METRICS)], path)
    else:
        path = out or Path("runs.png")
        draw_comparison(read_runs(folders), path)
    print(path)


def run_options(options: argparse.Namespace) -> int:
    """Do what the command line asks; return the exit status."""
    match options.command:
        case "plot":
            plot_command(options.runs, options.out)
        case "yardstick":
            yardstick_command(options.path)
        case "build":
            build_record(
                options.out,
                options.runs,
                records=options.records,
                given={key: getattr(options, key) for key in (*DESCRIBED, *OPTIONAL)},
                data_command=options.data_command,
                with_artifacts=options.with_artifacts,
            )
        case "check":
            return check_command(options)
        case "refresh":
            for folder in options.folders:
                refresh_record(folder, options.records)
        case "table":
            content = format_records(options.records).encode()
            train_gpt.write_atomic(options.records / "README.md", content)
        case "knobs":
            train_gpt.write_atomic(ROOT / "KNOBS.md", knobs_page().encode())
        case "demo":
            run_demo()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may hold what the locale cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        return run_options(parse_options(argv))
    except StageFailed as error:
        print(f"records.py: {error}", file=sys.stderr)
        return error.status
    except (InputError, OSError) as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 2
    except train_gpt.RunFailed as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, train_gpt.Interrupted):
        print("records.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
