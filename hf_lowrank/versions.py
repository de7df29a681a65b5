"""Which versions of what a result depends on are at work."""

from importlib.metadata import version


def versions():
    """`{package: version}` of this package and those that decide what it computes."""
    # Imported here, since the package imports this module.
    from hf_lowrank import __version__

    others = ("torch", "transformers", "accelerate", "safetensors")
    return {"hf-lowrank": __version__, **{name: version(name) for name in others}}
