"""Measures that others take too: perplexity over contiguous windows, zero-shot multiple choice, sizes."""

from ..provenance import environment
from .evaluate import evaluate
from .likelihood import encode_pair, loglikelihoods
from .multiple_choice import MultipleChoice, MultipleChoiceTask, multiple_choice
from .perplexity import Perplexity, PerplexityTask, perplexity
from .presets import PRESETS
from .result import Evaluation
from .samples import text_samples
from .size import Size, size_of
from .sweep import Sweep, SweepPoint, SweepRow, sweep
from .tasks import TASKS


__all__ = [
    "PRESETS",
    "TASKS",
    "Evaluation",
    "MultipleChoice",
    "MultipleChoiceTask",
    "Perplexity",
    "PerplexityTask",
    "Size",
    "Sweep",
    "SweepPoint",
    "SweepRow",
    "encode_pair",
    "environment",
    "evaluate",
    "loglikelihoods",
    "multiple_choice",
    "perplexity",
    "size_of",
    "sweep",
    "text_samples",
]
