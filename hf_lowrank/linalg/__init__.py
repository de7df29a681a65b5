"""Matrix problems: tensors in, tensors out. Knows nothing of modules, models or files."""

from .blocks import difference_energy, times
from .nonnegative import nonnegative, semi_nonnegative
from .pivoting import row_basis
from .projection import energy_rank, low_rank_projection
from .psd import psd_safe_cholesky, psd_sqrt, shrink
from .selection import largest
from .sparse import flat_places, largest_entries, sparse_matrix
from .sparse_coding import best_atoms, pursue
from .svd import (
    balanced,
    product_singular_values,
    randomized_svd,
    require_finite,
    singular_energies,
    truncated_svd,
)
from .wavelet import band_names, band_sizes, orthogonal_wavelets, synthesize, wavelet_filters
from .weighted_svd import column_weighted, output_energies, output_optimal


__all__ = [
    "balanced",
    "band_names",
    "band_sizes",
    "best_atoms",
    "column_weighted",
    "difference_energy",
    "energy_rank",
    "flat_places",
    "largest",
    "largest_entries",
    "low_rank_projection",
    "nonnegative",
    "orthogonal_wavelets",
    "output_energies",
    "output_optimal",
    "product_singular_values",
    "psd_safe_cholesky",
    "psd_sqrt",
    "pursue",
    "randomized_svd",
    "require_finite",
    "row_basis",
    "semi_nonnegative",
    "shrink",
    "singular_energies",
    "sparse_matrix",
    "synthesize",
    "times",
    "truncated_svd",
    "wavelet_filters",
]
