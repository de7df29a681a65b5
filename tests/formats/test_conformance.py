import pytest

from hf_lowrank import FORMATS
from hf_lowrank.testing import check_format


@pytest.mark.parametrize("name", FORMATS.names())
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_format(name, shape):
    check_format(FORMATS[name], *shape)
