import pytest

from hf_lowrank.testing import check_tuner
from hf_lowrank.tuners import TUNERS


# What each tuner is checked with beside its defaults.
VARIANTS = {
    "wara": [{"wavelet": "db2", "levels": 2, "r": 2, "subband_ranks": {"H1:H1": 0}, "subband_gains": {"L:L": 2.0}}],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in TUNERS.names() for options in [{}, *VARIANTS.get(name, [])]],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_laws(name, options):
    check_tuner(TUNERS[name], **options)
