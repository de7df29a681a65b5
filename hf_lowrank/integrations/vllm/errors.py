"""The one error of this folder; it cannot import the others, see the docstring of the package."""


class ServingError(ValueError):
    """A factorized checkpoint, or a part of it, that cannot be served as it is; the message names the cure."""
