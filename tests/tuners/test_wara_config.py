"""Which configurations of WaRA are refused, and which is a LoRA in disguise."""

import warnings

import pytest

from hf_lowrank import ConfigError, WaraConfig


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"share_subbands": True}, True),
        ({"share_subbands": True, "wavelet": "db1", "subband_gains": {"L:L": 2.0, "H1:H1": 2.0}}, True),
        ({"share_subbands": True, "subband_gains": {"L:L": 1.0, "H1:H1": -1.0}}, True),
        ({"share_subbands": True, "wavelet": "db2"}, False),
        ({"share_subbands": True, "subband_gains": {"L:L": 2.0}}, False),
        ({}, False),
    ],
)
def test_a_lora_in_disguise_is_warned_of(options, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WaraConfig(**options)
    assert [w.filename for w in caught if "LoRA in disguise" in str(w.message)] == [__file__] * warns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r`=0 must be an integer of at least 1"),
        ({"r": True}, "`r`=True must be"),
        ({"lora_alpha": 0}, "`lora_alpha`=0 must be a number above 0"),
        ({"lora_dropout": 1.0}, r"`lora_dropout`=1.0 must be in \[0, 1\)"),
        ({"bias": "lora_only"}, r"`bias`='lora_only' must be one of \('none', 'all', 'wara_only'\)"),
        ({"target_modules": []}, r"`target_modules`=\[\] must be a regular expression, or a non-empty"),
        ({"target_modules": "("}, r"`target_modules`='\(' is not a regular expression"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "`layers_to_transform` goes with a list of"),
        ({"rank_pattern": {"(": 2}}, r"`rank_pattern` key '\(' is not a regular expression"),
        ({"rank_pattern": {"q": 0}}, r"`rank_pattern`\['q'\]=0 must be an integer of at least 1"),
        ({"rank_pattern": {"q": {"L:H2": 1}}}, r"`rank_pattern`\['q'\] has the keys \['L:H2'\]; .* 'H1:H1'\] here"),
        ({"alpha_pattern": {"q": -1}}, r"`alpha_pattern`\['q'\]=-1 must be a number above 0"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save`='lm_head' must be a list of names"),
        ({"layers_to_transform": "0"}, "`layers_to_transform`='0' must be the index of a layer"),
        ({"layers_to_transform": [0, True]}, r"`layers_to_transform`=\[0, True\] must be"),
        ({"layers_pattern": 3}, "`layers_pattern`=3 must be the name of a list of layers"),
        ({"use_rslora": "no"}, "`use_rslora`='no' must be True or False"),
        ({"wavelet": ["haar"]}, r"`wavelet`=\['haar'\] must be the name of a wavelet"),
        ({"wavelet": "bior2.2"}, "`wavelet`='bior2.2' is not an orthogonal wavelet of PyWavelets; choose one of"),
        ({"levels": 0}, "`levels`=0 must be an integer of at least 1"),
        ({"mode": "tokens"}, "`mode`='tokens' must be 'weight'"),
        ({"subband_ranks": {"L": 2}}, r"`subband_ranks` has the keys \['L'\]; output band, colon, input band are"),
        ({"subband_ranks": {"L:L": -1}}, r"`subband_ranks`\['L:L'\]=-1 must be an integer of at least 0"),
        ({"subband_ranks": dict.fromkeys(("L:L", "L:H1", "H1:L", "H1:H1"), 0)}, "leaves out every pair"),
        ({"subband_gains": {"L:L": 0}}, r"`subband_gains`\['L:L'\]=0 must be a number other than 0; .* rank 0 in"),
        ({"subband_gains": [2.0]}, "must be a dict whose keys are among"),
        ({"share_subbands": True, "levels": 2}, "`levels`=2 with `share_subbands`=True: .* use levels=1"),
        ({"share_subbands": True, "subband_ranks": {"L:L": 2}}, "contradicts `share_subbands`=True"),
        ({"share_subbands": 1}, "`share_subbands`=1 must be True or False"),
    ],
)
def test_refused_when_the_config_is_made(options, message):
    with pytest.raises(ConfigError, match=message):
        WaraConfig(**options)
