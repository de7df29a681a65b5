"""What became of a model, for people to read."""

from .rank_profile import MatrixRank, RankProfile, rank_profile
from .summary import Summary, summary


__all__ = ["MatrixRank", "RankProfile", "Summary", "rank_profile", "summary"]
