"""Python in a process of its own."""

import os
import socket
import subprocess
import sys
import sysconfig


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


def run_script(script, *arguments, processes=1):
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
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
