"""Options as files may hold them: numbers in quotes, lists and nothing are refused by name, in every method."""

import dataclasses

import pytest

from hf_lowrank import METHODS, ConfigError


OPTIONS = [(name, field.name) for name in METHODS.names() for field in dataclasses.fields(METHODS[name]) if field.init]
NUMBERS = [(name, option) for name, option in OPTIONS if type(getattr(METHODS[name](), option)) in (int, float)]


@pytest.mark.parametrize(("name", "option"), NUMBERS)
@pytest.mark.parametrize("value", ["0.1", "1e-3", [1], {"a": 1}, None, float("nan"), True], ids=repr)
def test_what_is_no_number_is_refused(name, option, value):
    with pytest.raises(ConfigError, match=f"`{option}`={value!r}".replace("[", r"\[")):
        METHODS.build({"name": name, option: value})


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("value", ["no such thing", 3.5, -1, ["a"], {"a": []}, print], ids=repr)
def test_whatever_an_option_is_the_refusal_is_ours(name, option, value):
    try:
        METHODS.build({"name": name, option: value})
    except ConfigError as error:
        assert f"`{option}`" in str(error)
