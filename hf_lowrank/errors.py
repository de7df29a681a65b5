"""Every error the library raises on purpose, under one base, so that callers can catch by cause."""

# The cure for what a checkpoint promises and does not hold.
DAMAGED = "The checkpoint may be damaged: download or save it again."


class LowRankError(Exception):
    """Base of all errors raised by hf_lowrank."""


class ConfigError(LowRankError, ValueError):
    """An argument has a value that is not allowed."""


class RankError(ConfigError):
    """A rank is outside what the shape of its weight allows."""


class TargetError(ConfigError):
    """A module pattern matches nothing, or names a module that cannot be factorized."""


class MissingPackageError(ConfigError, ImportError):
    """A package that the library does not always need, and this call does, is not installed."""


class UnknownNameError(ConfigError):
    """A method, format, allocator or statistic is not registered under the given name."""


class CalibrationError(LowRankError, ValueError):
    """Calibration data is missing, empty or not usable for the model at hand."""


class EvaluationError(LowRankError, ValueError):
    """Evaluation data is missing, too short, or not what the measure can score."""


class StatisticsError(LowRankError, ValueError):
    """Saved or collected statistics do not fit the model, or are damaged."""


class CheckpointError(LowRankError, ValueError):
    """A checkpoint cannot be read, or does not hold what its config promises."""


class ComputedWeightError(LowRankError, RuntimeError):
    """Something writes into the weight of a factorized layer, which is computed: the change would be lost."""


class ResourceError(LowRankError, RuntimeError):
    """Memory or disk space is too small for what was asked; where that can be foreseen, raised before work starts."""


class NonFiniteError(LowRankError, ArithmeticError):
    """A weight, an activation or a statistic holds NaN or infinite values."""


class NotPSDError(LowRankError, ArithmeticError):
    """A matrix that must be positive semi-definite is not, even after the documented jitter ladder."""


class NumericalWarning(UserWarning):
    """A documented numerical remedy was applied; the message says which and how strongly."""
