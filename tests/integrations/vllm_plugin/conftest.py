import sys

import pytest
import vllm_stand_in


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in under the name of vLLM, our method registered."""
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    from hf_lowrank.integrations.vllm import register

    register()
    return vllm_stand_in
