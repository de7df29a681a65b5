"""What became of a model, for people to read."""

from .report import Report, report
from .samples import Sample
from .summary import Summary, summary


__all__ = ["Report", "Sample", "Summary", "report", "summary"]
