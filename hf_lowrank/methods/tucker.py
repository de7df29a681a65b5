from dataclasses import dataclass
from typing import ClassVar

from ..linalg import singular_energies, truncated_svd
from ._groups import check_share_layers, checked_groups
from .base import Factors, Method, register_method


@register_method("tucker")
@dataclass(frozen=True)
class Tucker(Method):
    r"""Tucker decomposition of a weight, or of several stacked on each other; needs no data.

        min |W - U_1 G U_2^T|_F^2,    U_1 (out, r), U_2 (in, r) orthonormal,    G = U_1^T W U_2,
        minimum = sum_{i > r} s_i^2

    Of one weight this is the truncated SVD, with G diagonal: it is folded into the left factor, and nothing is stored
    for it. Of a stack of K weights `(K, out, in)`, the decomposition is truncated in the mode of the inputs alone,

        min sum_k |W_k - H_k U_2^T|_F^2,    H_k = W_k U_2 (out, r),

    which is what `"shared_basis"` holds exactly: `U_2` once, and an `H_k` for each weight. To truncate the outputs too
    would cost accuracy, and save nothing there. The weights of a stack may have different numbers of outputs.

    A language model does not survive low ranks in all its layers without training; see [`sweep`] for which it does.

    Args:
        joint_groups (`list[list[str]]`, *optional*): names or dotted suffixes of linears with one input that are
            stacked, such as `[["q_proj", "k_proj", "v_proj"]]`.
        share_layers (`int`, defaults to 1): how many neighbouring blocks are stacked, weight by weight (those of one
            name and shape); 1 stacks none.

    Shapes:
        weight `(out, in)`, that of a stack `(sum_k out_k, in)`, left `(out, r)`, right `(r, in)`. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: a weight holds NaN or infinity.

    Reference:
        Moar et al., "Characterizing the Accuracy-Efficiency Trade-off of Low-Rank Decomposition in Language Models",
        2405.06626 (its abstract). Differs: the core is folded; stacks of several weights.
    """

    nested: ClassVar[bool] = True
    joint_groups: tuple = ()
    share_layers: int = 1

    def __post_init__(self):
        object.__setattr__(self, "joint_groups", checked_groups(self))
        check_share_layers(self, "factor")

    def factorize(self, weight, rank, stats):
        # Of what is truncated in the mode of the inputs, U_2 and all H_k are one SVD.
        return Factors.from_energies(*truncated_svd(weight, rank))

    def objective(self, difference, stats):
        return difference.square().sum()

    def energies(self, weight, stats):
        return singular_energies(weight)
