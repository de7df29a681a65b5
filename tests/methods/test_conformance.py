import pytest

from hf_lowrank import METHODS
from hf_lowrank.testing import check_method


# The laws hold after any number of sweeps.
QUICK = {"cospadi": {"num_iters": 3}}


@pytest.mark.parametrize("name", METHODS.names())
def test_method(name):
    check_method(METHODS[name](**QUICK.get(name, {})))
