import pytest
import torch

from hf_lowrank import ConfigError, TargetError
from hf_lowrank.testing import check_tuner
from hf_lowrank.tuners import TUNERS, MixedRankConfig, MixedRankModel, WaraConfig, WaraModel, _layer
from hf_lowrank.tuners.wara import WaraLinear


# What each tuner is checked with beside its defaults.
VARIANTS = {
    "mixed_rank": [
        {"train_full": False, "r": 8},
        {"keep_zeros": False, "method": {"name": "svd"}, "param_ratio": 0.4},
    ],
    "wara": [
        {"wavelet": "db2", "levels": 2, "r": 2, "subband_ranks": {"H1:H1": 0}, "subband_gains": {"L:L": 2.0}},
        {"wavelet": "sym4", "share_subbands": True},
    ],
}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in TUNERS.names() for options in [{}, *VARIANTS.get(name, [])]],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "defaults",
)
def test_laws(name, options):
    check_tuner(TUNERS[name], **options)


def nonzero(layer, monkeypatch):
    plain = WaraLinear.update_layer

    def update_layer(self, adapter_name, module_name, config):
        plain(self, adapter_name, module_name, config)
        torch.nn.init.ones_(self.wara_B[adapter_name]["L"])

    monkeypatch.setattr(WaraLinear, "update_layer", update_layer)


def lost(layer, monkeypatch):
    monkeypatch.setattr(layer, "merge_into", lambda base, left, right: None)


def rounded(layer, monkeypatch):
    plain = layer.unmerge_from

    def unmerge_from(base):
        plain(base)
        base.weight.data = base.weight.data * (1 + 1e-7)

    monkeypatch.setattr(layer, "unmerge_from", unmerge_from)


def doubled(layer, monkeypatch):
    plain = WaraLinear.get_delta_weight
    monkeypatch.setattr(WaraLinear, "get_delta_weight", lambda self, adapter: 2 * plain(self, adapter))


def forgotten(layer, monkeypatch):
    monkeypatch.setattr(WaraConfig, "to_dict", lambda self: {"peft_type": "WARA", "target_modules": ["q_proj"]})


def detached(layer, monkeypatch):
    plain = WaraLinear.factors
    monkeypatch.setattr(WaraLinear, "factors", lambda self, name: tuple(f.detach() for f in plain(self, name)))


def refusing(layer, monkeypatch):
    def merge(self, safe_merge=False, adapter_names=None):
        raise TargetError("not into this one")

    monkeypatch.setattr(WaraLinear, "merge", merge)


@pytest.mark.parametrize("broken", [nonzero, lost, rounded, doubled, forgotten, detached, refusing])
def test_the_suite_catches_a_broken_tuner(broken, monkeypatch):
    broken(_layer, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, TargetError)):
        check_tuner(WaraConfig)


@pytest.mark.parametrize(
    ("config_cls", "model_cls", "name", "value"),
    [
        (MixedRankConfig, MixedRankModel, "identity_at_start", True),
        (MixedRankConfig, MixedRankModel, "additive", True),
        (MixedRankConfig, MixedRankModel, "branches", ()),
        (MixedRankConfig, MixedRankModel, "branches", (False,)),
        (WaraConfig, WaraModel, "identity_at_start", False),
        (WaraConfig, WaraModel, "additive", False),
        (WaraConfig, WaraModel, "merges_into_factors", False),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", repr(value)),
)
def test_the_suite_catches_a_wrong_declaration(config_cls, model_cls, name, value, monkeypatch):
    monkeypatch.setattr(model_cls, name, value)
    with pytest.raises((AssertionError, ConfigError)):
        check_tuner(config_cls)
