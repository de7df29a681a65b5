"""What became of a model, for people to read."""

from .summary import Summary, summary


__all__ = ["Summary", "summary"]
