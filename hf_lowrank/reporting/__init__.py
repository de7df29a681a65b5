"""What became of a model, for people to read."""

from .rank_profile import MatrixRank, RankProfile, rank_profile
from .report import Report, report
from .samples import Sample
from .summary import Summary, summary


__all__ = ["MatrixRank", "RankProfile", "Report", "Sample", "Summary", "rank_profile", "report", "summary"]
