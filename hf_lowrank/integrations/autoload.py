"""Start-up hook: import hf_lowrank the moment transformers meets a factorized checkpoint.

Installed as the top-level module `_hf_lowrank_autoload`, which a `.pth` file runs at interpreter start. It uses the
standard library only, never raises, and does nothing until `transformers.quantizers.auto` is imported; then the table
of quantization configs is replaced by one that imports the plugin when asked for "lowrank".
HF_LOWRANK_AUTOLOAD=0 turns it off.
"""

import os
import sys


TARGET = "transformers.quantizers.auto"
TABLE = "AUTO_QUANTIZATION_CONFIG_MAPPING"
KEY = "lowrank"


class LazyTable(dict):
    """A dict that imports hf_lowrank, which registers itself, before it says that "lowrank" is unknown."""

    def __contains__(self, key):
        if key == KEY and not super().__contains__(key) and "hf_lowrank" not in sys.modules:
            __import__("hf_lowrank")
        return super().__contains__(key)


class Finder:
    """Lets the import of the module `target` go its ordinary way, then calls `after` with it."""

    def __init__(self, target, after):
        self.target = target
        self.after = after

    def find_spec(self, name, path=None, target=None):
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        # Imported only now: it would be the slowest part of starting an interpreter.
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.after(module)

        spec.loader.exec_module = exec_module
        return spec


def swap_table(module):
    """Put a [`LazyTable`] in the place of the table of quantization configs."""
    table = getattr(module, TABLE, None)
    if type(table) is dict:
        setattr(module, TABLE, LazyTable(table))


def install():
    """Put the finder in front, once, unless the user opted out or transformers is there already."""
    off = os.environ.get("HF_LOWRANK_AUTOLOAD", "1").lower() in ("0", "false", "off", "no")
    if not off and TARGET not in sys.modules and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(TARGET, swap_table))
