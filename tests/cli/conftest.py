import filecmp
from pathlib import Path

import optimum.commands.register.register_hf_lowrank as installed
import pytest

import hf_lowrank


@pytest.fixture(autouse=True, scope="session")
def installed_command():
    """optimum reads a copy of the file that makes the commands known."""
    own = Path(hf_lowrank.__file__).parent / "cli" / "optimum_register.py"
    assert filecmp.cmp(own, installed.__file__, shallow=False), "the copy is old; run `pip install -e .` again"
