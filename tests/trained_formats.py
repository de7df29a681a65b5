"""A method for every format whose numbers a refinement can train."""

FORMATS = [
    {"method": "svd", "format": "pivoted"},
    {"method": "compot"},
    {"method": "sparse_low_rank"},
    {"method": "hybrid"},
    {"method": "multi_resolution"},
    {"method": "tensor_train"},
    {"method": {"name": "basis_sharing", "share_layers": 2}},
]
