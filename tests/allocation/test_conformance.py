import dataclasses

import pytest

from hf_lowrank import ALLOCATORS, ConfigError
from hf_lowrank.allocation import allowed_ranks, round_down, within_reach
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
        (8, 1, 26, [8, 16, 24]),
        (8, 1, 6, [4]),
        (8, 8, 26, [8, 16, 24]),
        (8, 8, 8, []),
        (12, 1, 26, [12, 24]),
        (48, 8, 40, [24]),
        (8, 1, 99, list(range(8, 65, 8))),
    ],
)
def test_allowed_ranks(multiple, least, break_even, expected):
    (candidate,) = make_candidates([(64, 64)])
    candidate = dataclasses.replace(candidate, rank_multiple=multiple, least_rank=least, break_even=break_even)
    assert allowed_ranks(candidate) == expected


def test_multiples_are_kept_as_far_as_the_budget_has_room_for_them():
    candidates = make_candidates([(64, 64)] * 4, rank_multiple=8)
    assert within_reach(candidates, 4 * candidates[0].cost(8)) is candidates
    for ranks, expected in ((7, 4), (2, 2), (0.5, 1)):
        found = within_reach(candidates, 4 * ranks * candidates[0].cost(1))
        assert [candidate.rank_multiple for candidate in found] == [expected] * 4
    kernel = [dataclasses.replace(candidates[0], least_rank=8), *candidates[1:]]
    assert [candidate.rank_multiple for candidate in within_reach(kernel, 0)] == [8, 1, 1, 1]


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
