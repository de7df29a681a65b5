import pytest

from hf_lowrank import METHODS
from hf_lowrank.testing import check_method


@pytest.mark.parametrize("name", METHODS.names())
def test_method(name):
    check_method(METHODS[name]())
