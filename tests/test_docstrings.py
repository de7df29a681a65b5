"""Every public name says what it is; methods and formats say where they come from."""

import inspect

import pytest

import hf_lowrank


PUBLIC = sorted([*hf_lowrank.__all__, *hf_lowrank.NEED_PEFT, *hf_lowrank.NEED_TRAINER])


@pytest.mark.parametrize("name", PUBLIC)
def test_documented(name):
    member = getattr(hf_lowrank, name)
    assert inspect.getdoc(member)
    if not inspect.isclass(member):
        return
    for key, value in vars(member).items():
        if key.startswith("_") or not (inspect.isfunction(value) or isinstance(value, (property, classmethod))):
            continue
        overrides = any(hasattr(base, key) for base in member.__mro__[1:])
        assert overrides or inspect.getdoc(getattr(member, key)), f"{name}.{key}"


@pytest.mark.parametrize("name", hf_lowrank.METHODS.names())
def test_methods_state_problem_shapes_and_reference(name):
    text = inspect.getdoc(hf_lowrank.METHODS[name])
    assert "min" in text
    assert "Shapes:" in text
    assert "Reference:" in text


def test_public_names_are_sorted_and_exist():
    assert hf_lowrank.__all__ == sorted(hf_lowrank.__all__, key=lambda n: (not n.isupper(), n.islower(), n))
    assert all(hasattr(hf_lowrank, name) for name in hf_lowrank.__all__)
