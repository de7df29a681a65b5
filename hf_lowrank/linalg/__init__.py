"""Matrix problems: tensors in, tensors out. Knows nothing of modules, models or files."""

from .blocks import times
from .pivoting import row_basis
from .psd import psd_safe_cholesky, psd_sqrt, shrink
from .sparse import flat_places, largest_entries, sparse_matrix
from .sparse_coding import best_atoms, pursue
from .svd import balanced, require_finite, singular_energies, truncated_svd
from .wavelet import band_names, band_sizes, orthogonal_wavelets, synthesize, wavelet_filters
from .weighted_svd import column_weighted, output_energies, output_optimal


__all__ = [
    "balanced",
    "band_names",
    "band_sizes",
    "best_atoms",
    "column_weighted",
    "flat_places",
    "largest_entries",
    "orthogonal_wavelets",
    "output_energies",
    "output_optimal",
    "psd_safe_cholesky",
    "psd_sqrt",
    "pursue",
    "require_finite",
    "row_basis",
    "shrink",
    "singular_energies",
    "sparse_matrix",
    "synthesize",
    "times",
    "truncated_svd",
    "wavelet_filters",
]
