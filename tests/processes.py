"""Runs of the script as operating system processes, and readers of what they leave behind.

`start` and `run_script` fork the process from a helper that has imported torch and no more, then
run the file as `python FILE` would: an environment, a folder and an exit status of its own, and a
process that can be killed, without the seconds that importing torch takes. The helper also has
the script compiled and packed, which every run does.
`python_process` starts a fresh interpreter.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import train_gpt

SCRIPT = Path(train_gpt.__file__).resolve()
TIMEOUT_S = 1200.0  # no process of these tests needs a hundredth of it on an idle machine

HELPER = """
import atexit, functools, gc, json, os, runpy, sys, threading, traceback
import numpy, safetensors.torch, sentencepiece, torch, torch._dynamo, torch.distributed

script, packed = sys.argv[1], json.loads(sys.stdin.readline()).encode("latin-1")
with open(script, encoding="utf-8", newline="") as file:
    source = file.read()
code, cache = compile(source, script, "exec"), functools.cache
code_of_file = runpy._get_code_from_file

def compiled(*arguments):  # those of runpy, which differ from version to version
    if arguments[-1] != script:
        return code_of_file(*arguments)
    return code if len(arguments) == 1 else (code, script)

runpy._get_code_from_file = compiled

def cache_of_packing(function):
    cached = cache(function)
    if function.__name__ != "pack_source":
        return cached
    return lambda text: packed if text == source else cached(text)

functools.cache = cache_of_packing

def serve():
    gc.freeze()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)

request = serve()
if request is not None:
    for name, descriptor in (("/dev/null", 0), (request["out"], 1), (request["err"], 2)):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = [request["script"]]
    sys.path[0] = os.path.dirname(request["script"])
    sys.path[1:1] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
    status = 0
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # what the interpreter does at its end, less the freeing of torch
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status or 0)
"""


class Result(NamedTuple):
    """How a process ended and what it said."""

    status: int  # negative: the signal that ended it
    out: str
    err: str


class Process:
    """A running script."""

    def __init__(self, pid: int, out: Path, err: Path):
        self.pid, self.out, self.err = pid, out, err
        self.status: int | None = None

    def poll(self) -> int | None:
        """Exit status, or None while it runs."""
        if self.status is None:
            self.status = ask({"poll": self.pid})
        return self.status

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Result:
        """Wait for its end; killed and an error after `timeout_s`."""
        try:
            wait_until(lambda: self.poll() is not None, timeout_s, "the process has not ended")
        except TimeoutError:
            self.send(signal.SIGKILL)
            raise
        assert self.status is not None
        return Result(self.status, self.out.read_text(), self.err.read_text())

    def wait_for_output(self, text: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until it has printed `text`, or has ended."""

        def printed() -> bool:
            return text in self.out.read_text() or self.poll() is not None

        wait_until(printed, timeout_s, f"the process has not printed {text!r}")


def wait_until(holds: Callable[[], bool], timeout_s: float, problem: str) -> None:
    """Poll `holds`; TimeoutError after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{problem} after {timeout_s} s")
        time.sleep(0.005)


@functools.cache
def helper() -> subprocess.Popen[str]:
    """The process that the scripts are forked from; ends with the tests."""
    names = ("PATH", "HOME", "TMPDIR", "LANG")
    env = {name: os.environ[name] for name in names if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-c", HELPER, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **env,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        },
        text=True,
    )
    atexit.register(process.kill)
    packed = train_gpt.pack_source(train_gpt.script_source()).decode("latin-1")
    print(json.dumps(packed), file=process.stdin, flush=True)
    return process


def ask(request: Mapping[str, Any]) -> Any:
    """The helper's answer to `request`."""
    process = helper()
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def start(env: Mapping[str, str], cwd: Path, script: Path = SCRIPT) -> Process:
    """Start `script` with exactly the variables `env` in the folder `cwd`."""
    folder = Path(tempfile.mkdtemp(prefix="process_", dir=cwd.parent))
    out, err = folder / "stdout", folder / "stderr"
    for path in (out, err):
        path.touch()
    request = {"script": str(script), "env": dict(env), "cwd": str(cwd)}
    return Process(ask({**request, "out": str(out), "err": str(err)}), out, err)


def run_script(
    env: Mapping[str, str], cwd: Path, script: Path = SCRIPT, timeout_s: float = TIMEOUT_S
) -> Result:
    """Run `script` to its end."""
    return start(env, cwd, script).wait(timeout_s)


def start_ranks(envs: list[dict[str, str]], cwd: Path, script: Path = SCRIPT) -> list[Process]:
    """Start one process a rank, joined as torchrun joins them; rank r has the variables envs[r]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(len(envs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start({**env, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd, script)
        for rank, env in enumerate(envs)
    ]


def wait_for_ranks(ranks: list[Process], timeout_s: float = TIMEOUT_S) -> list[Result]:
    """Wait for the end of each; none is left behind."""
    try:
        return [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.send(signal.SIGKILL)


def run_ranks(envs: list[dict[str, str]], cwd: Path, script: Path = SCRIPT) -> list[Result]:
    """Run one process a rank to its end."""
    return wait_for_ranks(start_ranks(envs, cwd, script))


def python_process(
    command: list[str], env: Mapping[str, str], cwd: Path, timeout_s: float = TIMEOUT_S
) -> Result:
    """Run this Python with the arguments `command` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, *command],
        env=dict(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Result(done.returncode, done.stdout, done.stderr)


# --- Readers -------------------------------------------------------------------------------------

KEY_VALUE = re.compile(r' ([a-z0-9_]+):("(?:[^"\\]|\\.)*"|[^ "]+)')


def parse_line(line: str) -> tuple[str, dict[str, str]]:
    """Event and values of a log line `event key:value ...`; a value with spaces is quoted."""
    event = re.match(r"[a-z0-9_]+", line)
    assert event, f"no event in {line!r}"
    values, position = {}, event.end()
    while position < len(line):
        pair = KEY_VALUE.match(line, position)
        assert pair, f"no key:value at column {position} of {line!r}"
        key, value = pair.groups()
        assert key not in values, f"{key} twice in {line!r}"
        values[key] = json.loads(value) if value.startswith('"') else value
        position = pair.end()
    return event.group(), values


def log_events(text: str) -> list[tuple[str, dict[str, str]]]:
    """Every event of the lines of a console output or a log without its head."""
    return [parse_line(line) for line in text.splitlines()]


def metrics(folder: Path, event: str) -> list[dict[str, Any]]:
    """The records of that event in metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step; a step that was done again must have had the same loss."""
    by_step: dict[int, float] = {}
    for record in metrics(folder, "step"):
        loss = by_step.setdefault(record["step"], record["train_loss"])
        assert loss == record["train_loss"], f"step {record['step']} had another loss before"
    return by_step


def submission(folder: Path) -> dict[str, Any]:
    """Content of submission.json."""
    return json.loads((folder / "submission.json").read_text())
