"""`optimum-cli lowrank list`."""

import hf_lowrank


def print_registries():
    """Print every registered name with the first line of its documentation."""
    for registry in (hf_lowrank.METHODS, hf_lowrank.FORMATS, hf_lowrank.ALLOCATORS, hf_lowrank.STATISTICS):
        print(f"{registry.kind}:")
        for name in registry.names():
            print(f"  {name:<14} {(registry[name].__doc__ or '').strip().splitlines()[0]}")
