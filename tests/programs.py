"""Programs and functions in processes of their own that need not wait for the libraries: servers that have them fork.

The server of programs has imported PyTorch and what takes longest beside it. transformers, ghostssm, huggingface_hub
and numba are imported by the program, in its order and under its environment.

    python -m tests.programs    # the server: a JSON line for each program, an exit code for each line
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
import types
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

_LIBRARIES = ("torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "safetensors.torch")


def fork_server() -> ForkServerContext:
    """For functions of tests in processes of their own, which begin as after a first run of everything."""
    context = multiprocessing.get_context("forkserver")
    users = ["tests.test_processes", "tests.test_resuming", "tests.distillation.test_command", "tests.cli.test_faults"]
    context.set_forkserver_preload(["tests.warm", *users])
    return context


def in_process(
    program: str, *arguments: object, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As ``python -c program arguments...``, with further variables in its environment."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "program": program,
            "arguments": [*map(str, arguments)],
            "environment": dict(os.environ) | (environment or {}),
            "cwd": str(cwd or Path.cwd()),
            "streams": folder,
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(asked["arguments"], code, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    # Further arenas set address space aside that counts as a program's memory although nothing is in it.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.programs"]
    server = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # ends its input, and so it
    return server


def _next_program() -> str | None:
    """Serve; returns in a child, in which the program is the next thing to do, and at the end of the input."""
    for module in _LIBRARIES:
        importlib.import_module(module)
    gc.freeze()  # a collection would copy every page of what is shared
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ |= asked["environment"]
        writing = os.O_CREAT | os.O_WRONLY
        for number, file in enumerate((os.devnull, *(f"{asked['streams']}/{name}" for name in ("out", "err")))):
            os.dup2(os.open(file, writing if number else os.O_RDONLY), number)
        sys.argv = ["-c", *asked["arguments"]]
        sys.path[0] = ""
        program: str = asked["program"]
        return program
    return None


def _run(program: str) -> int:
    """Run a program as the main module; its exit code."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(program, "<string>", "exec"), vars(main))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    source = _next_program()
    if source is not None:
        code = _run(source)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # to take the libraries apart would take longer than most programs
