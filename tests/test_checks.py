"""What is no integer, number, boolean or choice is refused by name, with what is allowed; nothing else is."""

import pytest

from hf_lowrank import ConfigError
from hf_lowrank.checks import (
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_seed,
    is_integer,
    is_number,
)


NONE_AT_ALL = ["1", "1e-3", None, [1], {"a": 1}, 1j, float("nan"), float("inf"), True]


@pytest.mark.parametrize("value", NONE_AT_ALL, ids=repr)
def test_what_is_no_number_is_neither(value):
    assert not is_number(value)
    assert not is_integer(value, 0)
    with pytest.raises(ConfigError, match="`size`=.* of box must be a number of at least 0"):
        check_number("size", value, 0, owner="box")
    with pytest.raises(ConfigError, match="`size`=.* must be an integer of at least 0"):
        check_integer("size", value, 0)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, 1.0, True, "1"])
def test_seeds_are_what_every_generator_takes(seed):
    with pytest.raises(ConfigError, match=r"`seed`=.* must be an integer in 0 \.\. 2\*\*32 - 1"):
        check_seed(seed)
    check_seed(2**32 - 1)


def test_bounds():
    assert is_integer(3, 3, 3)
    assert not is_integer(4, 0, 3)
    assert not is_integer(2.0, 0)
    check_integer("size", 2, 2)
    check_number("size", 0, 0, 1)
    check_number("size", 1, 0, 1, open_low=True)
    check_number("size", 0, 0, 1, open_high=True)
    check_number("size", 1e300, 0, open_low=True)


@pytest.mark.parametrize(
    ("value", "bounds", "allowed"),
    [
        (1.1, {"low": 0, "high": 1}, r"in \[0, 1\]"),
        (0, {"low": 0, "high": 1, "open_low": True}, r"in \(0, 1\]"),
        (1, {"low": 0, "high": 1, "open_high": True}, r"in \[0, 1\)"),
        (-1, {"low": 0}, "of at least 0"),
        (0, {"low": 0, "open_low": True}, "above 0"),
    ],
)
def test_the_message_has_the_interval(value, bounds, allowed):
    with pytest.raises(ConfigError, match=rf"^`size`={value} must be a number {allowed}\.$"):
        check_number("size", value, **bounds)


def test_numbers_that_yaml_reads_as_strings_are_explained():
    with pytest.raises(ConfigError, match=r"`size`='1e-3' must be .* string: YAML reads 1e-3 as one, and 1.0e-3 as"):
        check_number("size", "1e-3", 0)


def test_booleans_and_choices():
    check_boolean("open", False)
    with pytest.raises(ConfigError, match="`open`=0 of box must be True or False"):
        check_boolean("open", 0, "box")
    check_choice("kind", "a", ("a", "b"))
    for value in ("c", ["a"], {}, None):
        with pytest.raises(ConfigError, match=r"`kind`=.* must be one of \['a', 'b'\]"):
            check_choice("kind", value, {"a": 1, "b": 2})
