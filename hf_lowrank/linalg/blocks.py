"""Products with a weight that is never converted to float64 as a whole, only some rows at a time.

Factorizing while loading should need little more memory than the factors; a float64 copy of a large weight would be
four times its bfloat16 size.
"""

import torch


# Rows converted at once: large enough for the matrix product to run at full speed.
ROWS = 512


def row_blocks(matrix):
    """`(slice, rows as float64)` of `matrix`, block by block."""
    for start in range(0, matrix.shape[0], ROWS):
        rows = slice(start, min(start + ROWS, matrix.shape[0]))
        yield rows, matrix[rows].double()


def columns_gram(matrix):
    """`matrix.T @ matrix`, float64."""
    gram = matrix.new_zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    for _, block in row_blocks(matrix):
        gram.addmm_(block.T, block)
    return gram


def rows_gram(matrix, metric=None):
    """`matrix @ metric @ matrix.T`, float64, for a symmetric `metric` or its diagonal, the identity by default."""
    gram = matrix.new_empty(matrix.shape[0], matrix.shape[0], dtype=torch.float64)
    for rows, block in row_blocks(matrix):
        if metric is None:
            image = block
        else:
            image = block * metric if metric.ndim == 1 else block @ metric
        for others, other in row_blocks(matrix[: rows.stop]):
            product = image @ other.T
            gram[rows, others] = product
            gram[others, rows] = product.T
    return gram


def times(matrix, right):
    """`matrix @ right`, float64, for a float64 `right`."""
    product = right.new_empty(matrix.shape[0], right.shape[1])
    for rows, block in row_blocks(matrix):
        torch.mm(block, right, out=product[rows])
    return product


def transposed_times(left, matrix):
    """`left.T @ matrix`, float64, for a float64 `left`."""
    product = left.new_zeros(left.shape[1], matrix.shape[1])
    for rows, block in row_blocks(matrix):
        product.addmm_(left[rows].T, block)
    return product


def difference_energy(matrix, left, right):
    """`|matrix - left @ right|_F^2`, a `float`, for float64 factors."""
    return sum((block - left[rows] @ right).square().sum().item() for rows, block in row_blocks(matrix))
