"""optimum-cli finds the commands, in a process of its own, and starts as fast as without them."""

import re
import subprocess
import sys
from pathlib import Path

import hf_lowrank
from hf_lowrank.refine import REFINEMENTS


def optimum_cli(*arguments, options=()):
    program = Path(sys.executable).with_name("optimum-cli")
    command = [sys.executable, *options, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_list():
    done = optimum_cli("lowrank", "list")
    assert done.returncode == 0, done.stderr
    registries = (hf_lowrank.METHODS, hf_lowrank.FORMATS, hf_lowrank.ALLOCATORS, REFINEMENTS, hf_lowrank.STATISTICS)
    for registry in registries:
        assert f"{registry.kind}:" in done.stdout
        assert all(f"  {name}" in done.stdout for name in registry.names())


def test_nothing_heavy_is_imported_before_a_command_is_chosen():
    done = optimum_cli("lowrank", "--help", options=["-X", "importtime"])
    assert done.returncode == 0, done.stderr
    assert "factorize" in done.stdout and "to-dense" in done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert "optimum.commands.optimum_cli" in imported
    assert not imported & {"torch", "transformers", "hf_lowrank"}
