"""optimum-cli finds the command, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import hf_lowrank


def test_list():
    command = Path(sys.executable).with_name("optimum-cli")
    done = subprocess.run([command, "lowrank", "list"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for registry in (hf_lowrank.METHODS, hf_lowrank.FORMATS, hf_lowrank.ALLOCATORS, hf_lowrank.STATISTICS):
        assert f"{registry.kind}:" in done.stdout
        assert all(f"  {name}" in done.stdout for name in registry.names())
