"""A layer's place follows from its name, whatever the architecture."""

import re

import pytest

from hf_lowrank.reporting.places import Place, places
from hf_lowrank.surgery import match_sites
from hf_lowrank.testing import ARCHITECTURES, tiny_model


def test_the_last_part_of_a_name_is_the_projection():
    names = [f"model.layers.{b}.self_attn.{p}_proj" for b in (0, 11) for p in "qk"]
    assert places(names) == {
        "model.layers.0.self_attn.q_proj": Place("model.layers", 0, "q_proj"),
        "model.layers.0.self_attn.k_proj": Place("model.layers", 0, "k_proj"),
        "model.layers.11.self_attn.q_proj": Place("model.layers", 11, "q_proj"),
        "model.layers.11.self_attn.k_proj": Place("model.layers", 11, "k_proj"),
    }


def test_more_of_the_name_where_one_part_says_too_little():
    endings = ("attention.output.dense", "attention.self.query", "intermediate.dense", "output.dense")
    found = places([f"encoder.layer.0.{ending}" for ending in endings])
    assert [place.projection for place in found.values()] == [
        "attention.output.dense", "query", "intermediate.dense", "output.dense",
    ]  # fmt: skip


def test_stacks_do_not_disturb_each_other():
    names = [
        "encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
    ]  # fmt: skip
    assert list(places(names).values()) == [
        Place("encoder.block", 1, "q"),
        Place("decoder.block", 1, "SelfAttention.q"),
        Place("decoder.block", 1, "EncDecAttention.q"),
    ]


def test_further_numbers_do_not_count():
    found = places([f"layers.0.mlp.experts.{e}.up" for e in range(3)])
    assert set(found.values()) == {Place("layers", 0, "up")}


def test_layers_outside_of_blocks_and_layers_that_are_blocks():
    found = places(["pooler.dense", "head.dense", "net.0", "net.2", "7"])
    assert list(found.values()) == [
        Place("", None, "pooler.dense"), Place("", None, "head.dense"), Place("net", 0, "net"),
        Place("net", 2, "net"), Place("", 7, "layer"),
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_numbers_tell_layers_of_one_place_apart(architecture):
    names = [site.name for site in match_sites(tiny_model(architecture)[0])]
    found = places(names)
    assert any(place.block == 1 for place in found.values())
    for name, place in found.items():
        for other in names:
            if found[other] == place:
                assert re.sub(r"\d+", "", other) == re.sub(r"\d+", "", name)
