import sys

import pytest

from hf_lowrank import ConfigError, residual_adapter, train_only


def test_without_peft_the_cure_is_named(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"residual_adapter needs PEFT: `pip install 'hf-lowrank\[peft\]'`"):
        residual_adapter(small(), small())
    with pytest.raises(ConfigError, match=r"train_only needs PEFT"):
        train_only(small())
    assert train_only(small(), "factors") is not None
