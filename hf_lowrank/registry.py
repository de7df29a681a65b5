"""Name -> class tables. A file that registers its class is found by every shared test and every loader."""

import dataclasses
import importlib
import pkgutil

from .errors import ConfigError, UnknownNameError


class Registry:
    """A table of dataclasses (or modules) under unique names.

    Args:
        kind (`str`): what the table holds, in the singular; used in messages (`"method"`).
    """

    def __init__(self, kind):
        self.kind = kind
        self._classes = {}
        # What is found by its name, and is nothing that a user could choose.
        self._unlisted = set()

    def register(self, name, listed=True):
        """Class decorator that enters the class under `name` and sets its `name` attribute.

        One that is not `listed` is found, so that checkpoints can name it, but not offered.
        """

        def enter(cls):
            if name in self._classes and self._classes[name] is not cls:
                raise ConfigError(f"{self.kind} {name!r} is already registered by {self._classes[name].__qualname__}.")
            cls.name = name
            self._classes[name] = cls
            if not listed:
                self._unlisted.add(name)
            return cls

        return enter

    def __getitem__(self, name):
        if name not in self:
            raise UnknownNameError(f"Unknown {self.kind} {name!r}; choose one of {self.names()}.")
        return self._classes[name]

    def __contains__(self, name):
        # What JSON or YAML holds in the place of a name may not even be hashable.
        return isinstance(name, str) and name in self._classes

    def names(self):
        """All listed names, sorted."""
        return sorted(self._classes.keys() - self._unlisted)

    def listed(self, name):
        """The class under a name that is listed; refuses others."""
        if name in self and name in self._unlisted:
            raise UnknownNameError(f"{self.kind} {name!r} cannot be chosen; choose one of {self.names()}.")
        return self[name]

    def build(self, value):
        """An instance from a name, from `{"name": ..., **options}` or from an instance (returned as it is)."""
        if isinstance(value, str):
            return self[value]()
        if isinstance(value, dict):
            options = dict(value)
            cls = self[options.pop("name", None)]
            allowed = [field.name for field in dataclasses.fields(cls)]
            unknown = sorted(set(options) - set(allowed), key=str)
            if unknown:
                raise ConfigError(f"{self.kind} {cls.name!r} has no option {unknown}; its options are {allowed}.")
            return cls(**options)
        if type(value) in self._classes.values():
            return value
        raise ConfigError(
            f"`{self.kind}` must be a registered name, a dict with a name, or an instance; got {value!r}. "
            f"Registered: {self.names()}."
        )

    def describe(self, instance):
        """The JSON form of `instance` that [`Registry.build`] accepts: a bare name where all options are defaults."""
        options = {
            field.name: getattr(instance, field.name)
            for field in dataclasses.fields(instance)
            if getattr(instance, field.name) != field.default
        }
        return {"name": instance.name, **options} if options else instance.name


def import_submodules(package):
    """Import every public module of `package`, so that its decorators run; import errors are not caught."""
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not module.name.rpartition(".")[2].startswith("_"):
            importlib.import_module(module.name)
