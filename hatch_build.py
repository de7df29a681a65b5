"""Files that belong beside the package in site-packages, in wheels and in editable installs alike.

hatchling's own `force-include` would move them, and the package imports one of them.
"""

import shutil
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


# The start-up hook, the command that optimum-cli finds, and what vLLM imports without importing the package.
BESIDE = {
    "hf_lowrank/integrations/autoload.py": "_hf_lowrank_autoload.py",
    "hf_lowrank/integrations/autoload.pth": "_hf_lowrank_autoload.pth",
    "hf_lowrank/cli/optimum_register.py": "optimum/commands/register/register_hf_lowrank.py",
    "hf_lowrank/integrations/vllm": "_hf_lowrank_vllm",
}


class CopyBeside(BuildHookInterface):
    """Puts copies into the wheel, from a folder outside the project."""

    def initialize(self, version, build_data):
        """Copy the files and name the copies."""
        self.folder = Path(tempfile.mkdtemp(prefix="hf_lowrank_"))
        for source, target in BESIDE.items():
            source, copy = Path(self.root, source), self.folder / Path(target).name
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
            build_data["force_include"][str(copy)] = target

    def finalize(self, version, build_data, artifact_path):
        """Remove the copies."""
        shutil.rmtree(self.folder)
