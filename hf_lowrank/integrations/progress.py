"""One progress bar over the matrices, through transformers' own tqdm (so its switches turn it off)."""

from transformers.utils import logging


def bar(iterable, description):
    """A progress bar around `iterable`."""
    return logging.tqdm(iterable, desc=description)


class Progress:
    """Counts matrices; shows the current name, and one line of summary at the end.

    Args:
        total (`int`): how many matrices there are.
        description (`str`, defaults to `"Factorizing"`): what is done to them.
    """

    def __init__(self, total, description="Factorizing"):
        self._bar = logging.tqdm(total=total, desc=description, unit="matrix")

    def start(self, name):
        """The matrix at work."""
        self._bar.set_postfix_str(name, refresh=False)

    def done(self):
        """One more is finished."""
        self._bar.update(1)

    def close(self, summary=None):
        """End the bar; `summary` replaces its name."""
        if summary:
            self._bar.set_postfix_str("")
            self._bar.set_description(summary)
        self._bar.close()
