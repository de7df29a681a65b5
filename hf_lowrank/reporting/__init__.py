"""What became of a model, and what could become of one, for people to read."""

from .spectra import Spectra, spectra
from .summary import Summary, summary


__all__ = ["Spectra", "Summary", "spectra", "summary"]
