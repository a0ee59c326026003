"""Python programs in processes of their own that need not import torch again: an interpreter that has imported it, and
has done nothing else, forks for each of them.

The import takes two seconds of a core, more than most of these programs. ``python()`` is what a command begins with,
where it would be sys.executable. A program has its own files, folder, arguments, environment and exit, and imports all
but the modules that are named; what these read from the environment when they are imported is read once. Signals are
handed on, but for kill -9, after which the program is killed as well, a moment later.

This file is the interpreter that forks (``warm.py serve SOCKET MODULE ...``) and the process that a command starts
(``warm.py run SOCKET WORD ...``), which is why it imports nothing of the project.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

# What programs that read cells, embed or train import, but for the project itself.
_CELLS = (
    "torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.utils.tensorboard", "anndata", "huggingface_hub",
)  # fmt: skip
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@functools.cache
def python(*, cells: bool = False) -> list[str]:
    """The first words of a command whose Python has torch already, and with cells what these take; after them come -c
    CODE or -m MODULE."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = str(Path(folder.name) / "socket")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, "serve", address, *(_CELLS if cells else ("torch",))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
    )  # fmt: skip
    assert server.stdout is not None
    assert server.stdout.read(1) == b"!", "it listens"

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    return [sys.executable, "-I", "-S", __file__, "run", address]


def write_command(path: Path, *words: str) -> Path:
    """Makes an executable file that is such a Python with everything that takes cells, and words before those given."""
    path.write_text(f'#!/bin/sh\nexec {shlex.join([*python(cells=True), *words])} "$@"\n')
    path.chmod(0o755)
    return path


def _run(address: str, words: list[str]) -> int:
    """Has a program run, with this process's files, folder and environment; its exit status."""
    request = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(address)
        socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
        server.sendall(request)
        program = _number(server)

        def hand_on(number: int, _: object) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(program, number)

        for number in HANDED_ON:
            signal.signal(number, hand_on)
        status = _number(server)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _serve(address: str, imported: list[str]) -> dict[str, Any]:
    """Forks for every request until the standard input ends; returns in each program, with its request."""
    for name in imported:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(64)
        sys.stdout.write("!")
        sys.stdout.flush()
        while True:
            ready, _, _ = select.select([listener, 0], [], [], 1.0)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if 0 in ready:
                break
            if listener in ready:
                connection, _ = listener.accept()
                with connection:
                    if os.fork() == 0:
                        listener.close()
                        return _accompany(connection)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    sys.exit()


def _accompany(connection: socket.socket) -> dict[str, Any]:
    """Forks the program of a request, tells its number and then its status; returns in the program."""
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    length, request = int.from_bytes(head, "little"), b""
    while len(request) < length:
        request += connection.recv(length - len(request))
    program = os.fork()
    if program == 0:
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        found: dict[str, Any] = json.loads(request)
        return found
    connection.sendall(program.to_bytes(8, "little", signed=True))
    ended = os.pidfd_open(program)
    if ended not in select.select([connection, ended], [], [])[0]:
        os.kill(program, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(8, "little", signed=True))
    os._exit(0)


def _number(connection: socket.socket) -> int:
    return int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little", signed=True)


def _be(request: dict[str, Any]) -> None:
    """Runs the program of a request as an interpreter that was started with its words would."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    words = [word for word in request["words"] if word != "-u"]
    option, what, *arguments = words
    sys.argv = [option, *arguments]
    sys.path[:0] = [os.getcwd() if option == "-m" else "", *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert option == "-c", words
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(_run(sys.argv[2], sys.argv[3:]))
    _be(_serve(sys.argv[2], sys.argv[3:]))
