"""PEFT is optional."""

from ...errors import MissingPackageError


def require_peft(what):
    """The module `peft`; `what` is the function that needs it.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{what} needs PEFT: `pip install 'hf-lowrank[peft]'`.") from error
    return peft
