"""A tensor as a sum of low-rank terms over modes that are merged in several ways, level by level."""

from dataclasses import dataclass

from .cp import cp_als, cp_product
from .kronecker import merge_modes, split_modes
from .svd import balanced, require_finite, truncated_svd


@dataclass(frozen=True)
class Level:
    """Terms of low rank over one partition of the modes.

    Args:
        partition (`list[list[int]]`): the modes of each block.
        factors (`list[torch.Tensor]`): `(R, product of the sizes in the block)` for each block.
    """

    partition: list
    factors: list

    def product(self, sizes):
        """The tensor of these terms, of `sizes` `(I_0, .., I_{N-1})`."""
        return split_modes(cp_product(self.factors), self.partition, sizes)


def fit_level(tensor, partition, rank, seed=0, start=None, tolerance=1e-3, sweeps=100):
    """The [`Level`] of `rank` terms near `tensor`: a truncated SVD of two blocks, the best there is; else [`cp_als`].

    Args:
        tensor (`torch.Tensor`): `(I_0, .., I_{N-1})`, float64.
        partition (`list[list[int]]`): two blocks or more, with every mode in one of them.
        rank (`int`): terms; with two blocks, up to the smaller.
        seed, start, tolerance, sweeps (*optional*): as of [`cp_als`].
    """
    merged = merge_modes(tensor, partition)
    if len(partition) > 2:
        return Level(partition, cp_als(merged, rank, seed, start, tolerance, sweeps))
    left, right, _ = truncated_svd(merged, rank)
    left, right = balanced(left, right)
    return Level(partition, [left.T.contiguous(), right])


def multi_resolution(
    tensor, partitions, ranks, order="coarse_to_fine", joint_sweeps=0, seed=0, tolerance=1e-3, sweeps=100
):
    r"""Low-rank terms over several partitions of the modes, each fitted to what the ones before have left.

        X ~ sum_l X_l,    X_l = split_l(CP_{R_l}(merge_l(residual_l))),    residual_{l+1} = residual_l - X_l

    With `joint_sweeps`, every level is then fitted again, in turn, to what all others leave. No step makes the error
    larger: a level of two blocks is replaced by the best one there is, others are improved from where they stand.

    Args:
        tensor (`torch.Tensor`): `(I_0, .., I_{N-1})`, any floating dtype; computed in float64.
        partitions (`list[list[list[int]]]`): for each level its blocks of modes, coarse levels (few blocks) first.
        ranks (`list[int]`): terms of each level; 0 leaves a level out.
        order (`str`, defaults to `"coarse_to_fine"`): or `"fine_to_coarse"`, the levels from the last to the first.
        joint_sweeps (`int`, defaults to 0): how often all levels are fitted again.
        seed, tolerance, sweeps (*optional*): as of [`cp_als`]; every level draws its own start.

    Returns:
        `list[Level | None]`: `None` for a level that is left out. In all `sum_l R_l sum_b prod_{k in b} I_k` numbers.

    Raises:
        NonFiniteError: `tensor` holds NaN or infinity.

    Reference:
        Rozada and Marques, "A multi-resolution low-rank tensor decomposition", 2406.18560. Differs: levels of two
        blocks are exact, where the authors' code runs alternating least squares from a random start.
    """
    require_finite(tensor, "The tensor")
    residual, levels = tensor.double(), [None] * len(partitions)
    places = [place for place, rank in enumerate(ranks) if rank > 0]
    if order == "fine_to_coarse":
        places.reverse()
    for sweep in range(1 + joint_sweeps):
        for place in places:
            start = None
            if sweep:
                residual = residual + levels[place].product(tensor.shape)
                start = levels[place].factors
            levels[place] = fit_level(
                residual, partitions[place], ranks[place], seed + place, start, tolerance, sweeps
            )
            residual = residual - levels[place].product(tensor.shape)
    return levels


class Terms:
    """A matrix that is a sum of levels over `(o1, o2, i1, i2)`; to a tensor it is added as any matrix.

    Args:
        levels (`list[Level]`): float64.
        sizes (`tuple[int]`): `(o1, o2, i1, i2)` of a matrix `(o1 o2, i1 i2)`.
    """

    def __init__(self, levels, sizes):
        self.levels = levels
        self.sizes = sizes

    def to_dense(self):
        """The matrix `(out, in)`."""
        total = sum(level.product(self.sizes) for level in self.levels)
        return total.reshape(self.sizes[0] * self.sizes[1], self.sizes[2] * self.sizes[3])

    def __radd__(self, matrix):
        return matrix + self.to_dense()

    def __rsub__(self, matrix):
        return matrix - self.to_dense()
