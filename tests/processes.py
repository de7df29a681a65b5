"""Python in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile


# The packages of this environment, without its .pth files; and none of ours, unless `sys.path` is told where.
ABSENT = """
import sys
from importlib.machinery import PathFinder
sys.path.append({site!r})
class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Absent
"""


def run(code, *options, **environment):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *options, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )


def run_without(absent, code, **environment):
    """In an interpreter that reads no .pth file and cannot import the packages `absent`."""
    head = ABSENT.format(site=sysconfig.get_paths()["purelib"], absent=tuple(absent))
    return run(head + code, "-S", **environment)


def run_script(script, *arguments, processes=1, timeout=300):
    """A script that trains on the CPU, in one process or in several that torchrun starts."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(script), *(str(argument) for argument in arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


WORKER = """
import contextlib, io, json, sys
names = {}
for line in sys.stdin:
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            exec(json.loads(line), names)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""


class Worker:
    """A process that runs one piece of code after the other: what it imports is imported once.

    `with Worker(**environment) as worker:` starts it; names live on from piece to piece.
    """

    def __init__(self, **environment):
        self.environment = environment

    def __enter__(self):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.errors.close()

    def attempt(self, code):
        """`(what it printed, the error it raised or "")`."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise AssertionError(f"the process has ended: {self.errors.read()[-3000:]}")
        return json.loads(answer)

    def run(self, code):
        """What it printed; an error fails the test."""
        printed, error = self.attempt(code)
        assert not error, error
        return printed

    def fail(self, code):
        """The error, which has to come."""
        _, error = self.attempt(code)
        assert error, "no error was raised"
        return error
