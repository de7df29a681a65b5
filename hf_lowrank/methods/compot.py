from dataclasses import dataclass

from ._whitened_dictionary import WhitenedDictionary, alternate_orthonormal
from .base import register_method


@register_method("compot")
@dataclass(frozen=True)
class Compot(WhitenedDictionary):
    r"""An orthonormal dictionary, and few atoms for every row of the weight as its inputs see it.

        min_{D, S} |(W - S D) L|_F^2 = |W L - S D_L|_F^2,    C = X^T X = L L^T,    D = D_L L^-1,
        D_L D_L^T = I,    every row of S with floor(r / rho) numbers

    From the leading right singular vectors of `W L`, in turn: the best codes, which are the largest entries of
    `W L D_L^T` in every row, and the best dictionary, `P Q^T` of `svd(S^T W L) = P Sigma Q^T`. Both are exact, so that
    no step makes the error larger, and it is never above that of [`WhitenedSVD`] at rank `floor(r / rho)`; with
    `rho=1` it is that. The rank of a layer is the number of its atoms.

    As [`CoSpaDi`] of the same size it leaves a little more, and is many times faster.

    Args:
        rho (`float`, defaults to 2.0): atoms for each that a row has, at least 1.
        num_iters (`int`, defaults to 20): how often both steps are made, 0 or more.
        share_layers (`int`, defaults to 1): how many neighbouring blocks share a dictionary, weight by weight, on the
            sum of the Grams of their inputs, an approximation.
        joint_groups (`list[list[str]]`, *optional*): names or dotted suffixes of linears beside each other that share
            a dictionary, as in [`BasisSharing`]; they should read the same input.
        coeff_bits (`int`, defaults to 16): 14 rounds every number of S, once, to the nearest of which the two lowest
            of 16 bits are zero; those of float16 for float16 weights, else those of bfloat16. The relative change of a
            number is at most 2^-9 and 2^-6, and so is what the relative error grows by. They are stored in 16 bits
            all the same: this is for comparison with `accounting="effective"`.
        accounting (`str`, defaults to `"mask"`): what `param_ratio` and `target_params` count, in numbers of two
            bytes: `"mask"` all that is stored, `r (in + out / rho + out / 16)`; `"effective"` the papers'
            `r (in + out / rho)`, as if the bits that tell the atoms of a row took no room. They would take none in
            the bits that `coeff_bits=14` frees at `rho=2`, which no format here uses. `target_bytes` always counts
            the file.
        curve_points (`int`, defaults to 8): ranks, evenly spaced, at which an error curve is measured for allocators
            that ask for one (`knapsack`, `lems`, `energy`), at the cost of a factorization each; between them,
            logarithms of errors are interpolated. Weights with at most 32 ranks are measured at each.

    Shapes:
        weight `(out, in)`, statistic `input_gram` `(in, in)`, left `(out, r)`, right `(r, in)`, `r <= min(out, in)`
        of a weight or of the stacked weights of a group. Computed in float64.

    Raises:
        ConfigError: an option out of range.
        NonFiniteError: the weight or the Gram matrix holds NaN or infinity.
        NotPSDError: jitter up to 1e-4 of the mean diagonal of C does not help, of which every step warns with
            [`NumericalWarning`].

    Reference:
        COMPOT, 2602.15200, from a secondary summary. Differs: uniform ranks by default; rounding to 14 bits is to the
        nearest.
    """

    num_iters: int = 20

    def learn(self, rows, rank, terms):
        return alternate_orthonormal(rows, rank, terms, self.num_iters)
