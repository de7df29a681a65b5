"""Start-up hook: import hf_lowrank the moment transformers meets a factorized checkpoint, or PEFT one of our adapters.

Installed as the top-level module `_hf_lowrank_autoload`, which a `.pth` file runs at interpreter start. It uses the
standard library only, never raises, and does nothing until one of the modules in `TABLES` is imported; then a table
of that module is replaced by one that imports the plugin when asked for something of ours.
HF_LOWRANK_AUTOLOAD=0 turns it off.
"""

import os
import sys


KEY = "lowrank"
PACKAGE = "hf_lowrank"
TUNERS = "hf_lowrank.tuners"


class LazyTable(dict):
    """A dict that imports hf_lowrank, which registers itself, before it says that "lowrank" is unknown."""

    def __contains__(self, key):
        if key == KEY and not super().__contains__(key) and PACKAGE not in sys.modules:
            __import__(PACKAGE)
        return super().__contains__(key)


class LazyTuners(dict):
    """A dict that imports our tuners before it says that the type of an adapter that names hf_lowrank is unknown."""

    def __missing__(self, key):
        if isinstance(key, str) and PACKAGE in key and TUNERS not in sys.modules:
            __import__(TUNERS)
            if key in self:
                return self[key]
        raise KeyError(key)


# Module -> the table in it, and what takes its place.
TABLES = {
    "transformers.quantizers.auto": ("AUTO_QUANTIZATION_CONFIG_MAPPING", LazyTable),
    "peft.mapping": ("PEFT_TYPE_TO_CONFIG_MAPPING", LazyTuners),
}


class Finder:
    """Lets the import of some modules go its ordinary way, then swaps their tables.

    Args:
        modules (`list[str]`): keys of `TABLES`.
    """

    def __init__(self, modules):
        self.waiting = set(modules)

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        self.waiting.discard(name)
        if not self.waiting:
            sys.meta_path.remove(self)
        # Imported only now: it would be the slowest part of starting an interpreter.
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            attribute, lazy = TABLES[name]
            table = getattr(module, attribute, None)
            if type(table) is dict:
                setattr(module, attribute, lazy(table))

        spec.loader.exec_module = exec_module
        return spec


def install():
    """Put the finder in front, once, unless the user opted out or the modules are there already."""
    off = os.environ.get("HF_LOWRANK_AUTOLOAD", "1").lower() in ("0", "false", "off", "no")
    modules = [name for name in TABLES if name not in sys.modules]
    if not off and modules and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(modules))


def register_tuners():
    """Let PEFT know our tuners: at once where it is imported already, else as soon as it meets one of them.

    For a process that imports hf_lowrank by itself, so that opting out of the start-up hook does not matter.
    """
    if "peft.mapping" in sys.modules:
        __import__(TUNERS)
    elif not any(isinstance(finder, Finder) and "peft.mapping" in finder.waiting for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(["peft.mapping"]))
