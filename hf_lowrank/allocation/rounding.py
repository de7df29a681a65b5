"""Ranks that a kernel likes: rounding down to a multiple without leaving the allowed range."""


def round_down(rank, multiple, least=1):
    """The largest multiple of `multiple` up to `rank`; below it, the largest halving of `multiple` that fits.

    A small matrix has no room for multiples of 8: there 4, 2 or 1 is used, so the budget still holds. `least` is what
    the kernel insists on; a rank below it is raised to it.
    """
    while multiple > max(rank, least) and multiple % 2 == 0:
        multiple //= 2
    return max(least, rank - rank % multiple)
