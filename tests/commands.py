"""`optimum-cli lowrank` in real processes, forked from one that has imported everything already."""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Done:
    """How a command ended: its exit code (negative for a signal), and what it has printed."""

    code: int
    out: str
    err: str


@dataclass
class Kill:
    """Ends the process with SIGKILL at the `number`-th thing that it does to files under `folder`.

    With a number of 0, counts only: the count goes into the file `counter`.
    """

    folder: str
    number: int = 0
    counter: str = ""


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")


def server():
    """What processes are forked from; it is started with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_lowrank.cli.terminal", "hf_lowrank.cli.factorize", "hf_lowrank.testing"])
    return context


def start(arguments, out, err, kill=None):
    """A process that runs a command and prints into two files."""
    process = server().Process(target=run_command, args=(list(map(str, arguments)), str(out), str(err), kill))
    process.start()
    return process


def command(*arguments, kill=None):
    """Run `optimum-cli lowrank` with `arguments` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start(arguments, out, err, kill)
        process.join(300)
        assert process.exitcode is not None, "it hangs"
        return Done(process.exitcode, out.read_text(), err.read_text())


def run_command(arguments, out, err, kill):
    """In the process: what the program `optimum-cli` does."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    if kill is not None:
        sys.addaudithook(watching(kill))
    from optimum.commands.optimum_cli import main

    sys.argv = ["optimum-cli", "lowrank", *arguments]
    main()


def watching(kill):
    """An audit hook, which Python calls before it does anything to a file."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event not in EVENTS or not str(args[0]).startswith(kill.folder):
            return
        count += 1
        if kill.counter:
            with contextlib.suppress(OSError):
                os.pwrite(counter, str(count).encode(), 0)
        elif count == kill.number:
            os.kill(os.getpid(), signal.SIGKILL)

    counter = os.open(kill.counter, os.O_WRONLY | os.O_CREAT) if kill.counter else None
    return hook
