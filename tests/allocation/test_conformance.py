import dataclasses

import pytest

from hf_lowrank import ALLOCATORS, ConfigError
from hf_lowrank.allocation import allowed_ranks, round_down
from hf_lowrank.testing import check_allocator
from hf_lowrank.testing.allocators import make_candidates


# What an allocator cannot do without, for weights called layer.0 to layer.3; and fewer trials than a user would make.
# A factor of 3 would leave these small weights no multiple of 8; tests/allocation/test_lorap.py has the paper's ranks.
OPTIONS = {"lorap": {"favoured": ["0", "3"], "over": ["1"], "factor": 1.25}, "bayes": {"n_trials": 15}}


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_allocator(name):
    check_allocator(ALLOCATORS[name](**OPTIONS.get(name, {})))


@pytest.mark.parametrize(
    ("rank", "multiple", "least", "expected"),
    [
        (115, 8, 1, 112),
        (8, 8, 1, 8),
        (7, 8, 1, 4),
        (3, 8, 1, 2),
        (1, 8, 1, 1),
        (9, 1, 1, 9),
        (5, 8, 8, 8),
        (5, 3, 1, 3),
        (2, 3, 1, 1),
        (20, 24, 8, 8),
        (20, 48, 8, 8),
    ],
)
def test_round_down(rank, multiple, least, expected):
    assert round_down(rank, multiple, least) == expected


@pytest.mark.parametrize(
    ("multiple", "least", "break_even", "expected"),
    [
        (8, 1, 26, [1, 2, 4, 8, 16, 24]),
        (8, 1, 6, [1, 2, 4]),
        (8, 8, 26, [8, 16, 24]),
        (8, 8, 8, []),
        (12, 1, 26, [1, 3, 6, 12, 24]),
        (48, 8, 60, [8, 24, 48]),
        (8, 1, 99, [1, 2, 4, *range(8, 65, 8)]),
    ],
)
def test_allowed_ranks_are_what_rounding_gives(multiple, least, break_even, expected):
    (candidate,) = make_candidates([(64, 64)])
    candidate = dataclasses.replace(candidate, rank_multiple=multiple, least_rank=least, break_even=break_even)
    assert allowed_ranks(candidate) == expected
    rounded = {round_down(rank, multiple, least) for rank in range(1, min(break_even, 65))}
    assert sorted(rank for rank in rounded if rank < break_even) == expected


FIELDS = [
    (name, field.name, type(field.default) in (int, float))
    for name in ALLOCATORS.names()
    for field in dataclasses.fields(ALLOCATORS[name])
]


@pytest.mark.parametrize(("name", "option", "number"), FIELDS)
@pytest.mark.parametrize("value", ["1e-3", ["a"], {"a": "b"}, 3.5, -1, float("nan"), True, print], ids=repr)
def test_options_as_files_may_hold_them_are_refused_by_name(name, option, number, value):
    def build():
        return ALLOCATORS.build({"name": name, option: value})

    if number and (value is True or not isinstance(value, (int, float)) or value != value):
        with pytest.raises(ConfigError, match=f"`{option}`="):
            build()
    else:
        try:
            build()
        except ConfigError as error:
            assert f"`{option}" in str(error)
