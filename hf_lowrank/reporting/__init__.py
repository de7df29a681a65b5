"""What became of a model, and what could become of one, for people to read."""

from .checkpoint_ranks import Spectra, spectra
from .rank_profile import MatrixRank, RankProfile, rank_profile
from .report import Report, report
from .samples import Sample
from .summary import Summary, summary


__all__ = [
    "MatrixRank",
    "RankProfile",
    "Report",
    "Sample",
    "Spectra",
    "Summary",
    "rank_profile",
    "report",
    "spectra",
    "summary",
]
