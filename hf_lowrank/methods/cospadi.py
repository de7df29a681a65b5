from dataclasses import dataclass

import torch

from ..checks import check_choice, check_integer
from ..errors import ConfigError
from ..linalg import best_atoms, better_codes, pursue, refit_atoms
from ._whitened_dictionary import WhitenedDictionary, alternate_orthonormal, leading_atoms
from .base import register_method


SOLVERS = ("ksvd", "mod", "procrustes")
STARTS = ("svd", "rows")


@register_method("cospadi")
@dataclass(frozen=True)
class CoSpaDi(WhitenedDictionary):
    r"""A dictionary of any atoms, and few of them for every row of the weight as its inputs see it.

        min_{D, S} |(W - S D) L|_F^2 = |W L - S D_L|_F^2,    C = X^T X = L L^T,    D = D_L L^-1,
        every row of S with floor(r / rho) numbers

    In turn: the codes by orthogonal matching pursuit, of each row where they are better than those at hand, and the
    dictionary by one sweep of K-SVD ([`refit_atoms`]), by least squares (`solver="mod"`), or under the constraint
    `D_L D_L^T = I` (`solver="procrustes"`, which is [`Compot`]). No step makes the error larger. From the leading
    singular vectors it is never above that of [`WhitenedSVD`] at rank `floor(r / rho)`. The pursuit is greedy, and the
    error need not fall with every single rank. The rank of a layer is the number of its atoms.

    Args:
        rho (`float`, defaults to 2.0): as in [`Compot`], and so are `share_layers`, `joint_groups`, `accounting`,
            `curve_points`, and `coeff_bits`, but that its bound is for the numbers only: how much of it reaches the
            error depends on how far atoms cancel each other.
        num_iters (`int`, defaults to 60): how often both steps are made, 0 or more.
        solver (`str`, defaults to `"ksvd"`): or `"mod"` or `"procrustes"`, the fastest.
        power_iters (`int`, defaults to 8): of the power iteration that finds an atom of K-SVD, 0 or more.
        init (`str`, defaults to `"svd"`): the leading singular vectors of `W L`; or `"rows"`, random ones of its rows.
        seed (`int`, defaults to 42): of these.

    Shapes:
        As in [`Compot`].

    Raises:
        ConfigError: an option out of range, or `init="rows"` with `solver="procrustes"`.
        NonFiniteError: the weight or the Gram matrix holds NaN or infinity.
        NotPSDError: jitter up to 1e-4 of the mean diagonal of C does not help, of which every step warns with
            [`NumericalWarning`].

    Reference:
        CoSpaDi, https://arxiv.org/abs/2509.22075. Differs: codes of a row are kept where the pursuit finds worse ones;
        the start (columns of the weight there, which is `init="rows"` but for the whitening); rounding to 14 bits is
        to the nearest; the Gram of a group is a sum.
    """

    num_iters: int = 60
    solver: str = "ksvd"
    power_iters: int = 8
    init: str = "svd"
    seed: int = 42

    def __post_init__(self):
        super().__post_init__()
        check_choice("solver", self.solver, SOLVERS, self.name)
        check_choice("init", self.init, STARTS, self.name)
        if self.solver == "procrustes" and self.init == "rows":
            raise ConfigError(
                "`init`='rows' of cospadi gives atoms that are not orthonormal, as `solver`='procrustes' needs them; "
                "use `init`='svd'."
            )
        check_integer("power_iters", self.power_iters, 0, self.name)
        check_integer("seed", self.seed, 0, self.name)

    def learn(self, rows, rank, terms):
        if self.solver == "procrustes":
            return alternate_orthonormal(rows, rank, terms, self.num_iters)
        atoms = leading_atoms(rows, rank) if self.init == "svd" else self._some_rows(rows, rank)
        codes = pursue(rows, atoms, terms)
        for sweep in range(self.num_iters):
            if sweep:
                codes = better_codes(codes, pursue(rows, atoms, terms), atoms, rows)
            codes, atoms = self._refit(rows, codes, atoms)
        return codes, atoms

    def _refit(self, rows, codes, atoms):
        if self.solver == "ksvd":
            return refit_atoms(rows, codes, atoms, self.power_iters)
        used = (codes != 0).any(0)[:, None]
        return codes, torch.where(used, best_atoms(rows, codes), atoms)

    def _some_rows(self, rows, rank):
        generator = torch.Generator().manual_seed(self.seed)
        atoms = rows[torch.randperm(len(rows), generator=generator)[:rank].to(rows.device)]
        norms = atoms.norm(dim=1, keepdim=True)
        return torch.where(norms > 0, atoms / norms, 0.0)
