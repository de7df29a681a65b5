"""Matrix problems: tensors in, tensors out. Knows nothing of modules, models or files."""

from .blocks import difference_energy, times
from .cp import cp_als, cp_product
from .kronecker import merge_modes, middle_factors, split_modes
from .multi_resolution import Level, Terms, fit_level, multi_resolution
from .nonnegative import nonnegative, semi_nonnegative
from .pivoting import row_basis
from .precision import shortened
from .projection import energy_rank, low_rank_projection
from .psd import psd_safe_cholesky, psd_sqrt, shrink
from .selection import largest
from .sparse import flat_places, largest_entries, sparse_matrix
from .sparse_coding import best_atoms, better_codes, orthonormal_atoms, pursue, refit_atoms, strongest
from .svd import (
    balanced,
    product_singular_values,
    randomized_svd,
    require_finite,
    singular_energies,
    truncated_svd,
)
from .tensor_train import (
    balanced_modes,
    bond_cores,
    centred,
    full_bonds,
    joined_cores,
    lowered_bond,
    tensor_train,
    train_matrix,
)
from .wavelet import band_names, band_sizes, orthogonal_wavelets, synthesize, wavelet_filters
from .weighted_svd import column_weighted, output_energies, output_optimal


__all__ = [
    "Level",
    "Terms",
    "balanced",
    "balanced_modes",
    "band_names",
    "band_sizes",
    "best_atoms",
    "better_codes",
    "bond_cores",
    "centred",
    "column_weighted",
    "cp_als",
    "cp_product",
    "difference_energy",
    "energy_rank",
    "fit_level",
    "flat_places",
    "full_bonds",
    "joined_cores",
    "largest",
    "largest_entries",
    "low_rank_projection",
    "lowered_bond",
    "merge_modes",
    "middle_factors",
    "multi_resolution",
    "nonnegative",
    "orthogonal_wavelets",
    "orthonormal_atoms",
    "output_energies",
    "output_optimal",
    "product_singular_values",
    "psd_safe_cholesky",
    "psd_sqrt",
    "pursue",
    "randomized_svd",
    "refit_atoms",
    "require_finite",
    "row_basis",
    "semi_nonnegative",
    "shortened",
    "shrink",
    "singular_energies",
    "sparse_matrix",
    "split_modes",
    "strongest",
    "synthesize",
    "tensor_train",
    "times",
    "train_matrix",
    "truncated_svd",
    "wavelet_filters",
]
