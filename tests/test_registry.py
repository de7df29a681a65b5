from dataclasses import dataclass

import pytest

from hf_lowrank import METHODS, ConfigError, LowRankConfig, UnknownNameError
from hf_lowrank.registry import Registry


def make():
    table = Registry("method")

    @table.register("one")
    @dataclass(frozen=True)
    class One:
        size: int = 3

    return table, One


def test_names_dicts_and_instances():
    table, One = make()
    assert table.build("one") == One()
    assert table.build({"name": "one", "size": 4}) == One(4)
    assert table.build(One(5)) == One(5)
    assert table.describe(One()) == "one"
    assert table.describe(One(4)) == {"name": "one", "size": 4}
    assert "one" in table
    assert table.names() == ["one"]


def test_one_class_a_name():
    table, One = make()
    table.register("one")(One)
    with pytest.raises(ConfigError, match="method 'one' is already registered by"):
        table.register("one")(int)


def test_what_is_not_listed_is_found_and_not_offered():
    table, One = make()

    @table.register("inner", listed=False)
    class Inner:
        pass

    assert table["inner"] is Inner
    assert "inner" in table
    assert table.names() == ["one"]
    assert table.listed("one") is One
    with pytest.raises(UnknownNameError, match=r"method 'inner' cannot be chosen; choose one of \['one'\]"):
        table.listed("inner")


def test_messages_name_the_allowed():
    table, _ = make()
    with pytest.raises(UnknownNameError, match=r"Unknown method 'two'; choose one of \['one'\]"):
        table["two"]
    with pytest.raises(ConfigError, match=r"method 'one' has no option \['scale'\]; its options are \['size'\]"):
        table.build({"name": "one", "scale": 2})
    with pytest.raises(ConfigError, match=r"has no option \[2, 'scale'\]"):
        table.build({"name": "one", "scale": 2, 2: 3})


@pytest.mark.parametrize("name", [["one"], {"one": 1}, None, 3], ids=repr)
def test_what_is_no_name_is_an_unknown_one(name):
    table, _ = make()
    assert name not in table
    for look_up in (table.__getitem__, table.listed):
        with pytest.raises(UnknownNameError, match=r"Unknown method .*; choose one of \['one'\]"):
            look_up(name)
    with pytest.raises(UnknownNameError, match=r"Unknown method .*; choose one of \['one'\]"):
        table.build({"name": name})
    with pytest.raises(UnknownNameError, match="Unknown format"):
        LowRankConfig(format=["low_rank"])


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_survives_json(name):
    instance = METHODS[name]()
    assert METHODS.build(METHODS.describe(instance)) == instance
