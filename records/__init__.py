"""Tools for finished runs of train_gpt.py: records, tables, plots, ablations.

records.py      the command line: plot, yardstick, build, check, table, knobs, demo
ablations.py    a grid of changed knobs times seeds: run, time, tabulate and draw it
evaluations.py  trained artifacts times evaluation settings: run, tabulate and draw them

logs.py         reads the events of a run
results.py      reads and appends result files with one JSON object per line
significance.py mean, standard deviation, Welch's test, paired t test
compressors.py  bits per byte of general compressors on the validation text
plots.py        loss and bits per byte of runs
submission.py   computes submission.json from logs
pages.py        run.env and README.md of a record
build.py        makes a record folder from finished runs
check.py        verifies record and recipe folders
tables.py       records/README.md and the table of knobs
markdown.py     Markdown tables and generated blocks
demo.py         the demo: `make run`
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
