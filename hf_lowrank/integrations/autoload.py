"""Start-up hook: import hf_lowrank the moment transformers meets a factorized checkpoint, or PEFT one of our adapters.

Installed as the top-level module `_hf_lowrank_autoload`, which a `.pth` file runs at interpreter start. It uses the
standard library only, never raises, and does nothing until one of the modules in `AFTER` is imported; then a table
of that module is replaced by one that imports the plugin when asked for something of ours, and the config of a part of
a factorized model tells that it is one.
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


def swapping(attribute, lazy):
    """A function that puts a `lazy` table in the place of that table of a module."""

    def swap(module):
        table = getattr(module, attribute, None)
        if type(table) is dict:
            setattr(module, attribute, lazy(table))

    return swap


def inheriting(module):
    """Let the config of a part be read with the `quantization_config` of the factorized whole; idempotent.

    transformers makes the config of a part, such as the vision model of a composite, of a `vision_config` alone, which
    does not say how weights are stored.

    Args:
        module: `transformers.configuration_utils`.
    """
    from functools import wraps

    config_class = getattr(module, "PreTrainedConfig", None)
    if config_class is None or hasattr(config_class.get_config_dict, "lowrank_parts"):
        return
    original = config_class.get_config_dict.__func__

    @wraps(original)
    def get_config_dict(cls, *args, **kwargs):
        found, others = original(cls, *args, **kwargs)
        whole = found.get("quantization_config")
        if isinstance(whole, dict) and whole.get("quant_method") == KEY:
            foreign = found.get("model_type") != cls.model_type
            # What `from_pretrained` of the class goes on with in the place of the whole.
            for name, part in found.items():
                if isinstance(part, dict) and (
                    name == cls.base_config_key or (foreign and part.get("model_type") == cls.model_type)
                ):
                    part.setdefault("quantization_config", whole)
        return found, others

    get_config_dict.lowrank_parts = True
    config_class.get_config_dict = classmethod(get_config_dict)


# What happens to a module right after it is imported.
AFTER = {
    "transformers.configuration_utils": inheriting,
    "transformers.quantizers.auto": swapping("AUTO_QUANTIZATION_CONFIG_MAPPING", LazyTable),
    "peft.mapping": swapping("PEFT_TYPE_TO_CONFIG_MAPPING", LazyTuners),
}


class Finder:
    """Lets the import of some modules go its ordinary way, then calls a function with each.

    Args:
        after (`dict[str, Callable]`): the functions, by name of the module.
    """

    def __init__(self, after):
        self.after = dict(after)

    def find_spec(self, name, path=None, target=None):
        after = self.after.pop(name, None)
        if after is None:
            return None
        if not self.after:
            sys.meta_path.remove(self)
        # Imported only now: it would be the slowest part of starting an interpreter.
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            after(module)

        spec.loader.exec_module = exec_module
        return spec


def install():
    """Put the finder in front, once, unless the user opted out or the modules are there already."""
    off = os.environ.get("HF_LOWRANK_AUTOLOAD", "1").lower() in ("0", "false", "off", "no")
    after = {name: swap for name, swap in AFTER.items() if name not in sys.modules}
    if not off and after and not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(after))


def after_import(name, function):
    """Call `function` with the module `name` right after its import; not if something else is waiting for it."""
    if not any(isinstance(finder, Finder) and name in finder.after for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder({name: function}))


def register_tuners():
    """Let PEFT know our tuners: at once where it is imported already, else as soon as it meets one of them.

    For a process that imports hf_lowrank by itself, so that opting out of the start-up hook does not matter.
    """
    if "peft.mapping" in sys.modules:
        __import__(TUNERS)
    else:
        after_import("peft.mapping", AFTER["peft.mapping"])
