"""README.md of a repository: what is kept, what is replaced, what is taken over."""

import re
from importlib.resources import files
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_lowrank.readme import MARKED, inherited, merged, repository


PART = "<!-- hf_lowrank: written -->\nnew\n<!-- /hf_lowrank -->"
CARD = f"""---
license: mit
base_model: org/base
base_model_relation: quantized
tags:
- hf-lowrank
---

# Title

{PART}
"""


def card(metadata="", text=""):
    return ModelCard(f"---\n{metadata}\n---\n{text}")


def test_nothing_there():
    assert merged(None, ModelCard(CARD)).content == ModelCard(CARD).content


def test_metadata_alone_is_no_text():
    """As of a repository that was made on the Hub's own pages, with a licence chosen there."""
    found = merged(card("license: apache-2.0", "\n"), ModelCard(CARD))
    assert found.text == ModelCard(CARD).text
    assert found.data.license == "apache-2.0"


@pytest.mark.parametrize("text", ["Mine.\n", "Mine.\r\n\r\nWindows.\r\n", "---\nA rule.\n"])
def test_text_stays_and_the_part_comes_behind_it(text):
    found = merged(card("x: 1", text), ModelCard(CARD))
    assert found.text == f"{text.rstrip()}\n\n{PART}\n"


def test_the_part_is_replaced_where_it_is_and_once():
    old = "Above \\1.\n<!-- hf_lowrank: older words -->\nold\n<!-- /hf_lowrank -->\nBelow.\n"
    first = merged(card("x: 1", old), ModelCard(CARD))
    assert first.text == f"Above \\1.\n{PART}\nBelow.\n"
    assert merged(first, ModelCard(CARD)).content == first.content


def test_metadata_of_the_user_wins_and_gaps_are_filled():
    own = card("license: other\nlicense_name: mine\ntags: [b, a]\nmodel-index:\n- name: x\n  results: []", "Mine.")
    data = merged(own, ModelCard(CARD)).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "mine")
    assert data["tags"] == ["b", "a", "hf-lowrank"]
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    assert data["model-index"] == [{"name": "x", "results": []}]


def test_a_licence_and_a_base_model_keep_what_belongs_to_them():
    named = card("license: other\nlicense_name: theirs\nbase_model: org/base\nbase_model_relation: quantized")
    data = merged(card("license: mit\nbase_model: org/other", "Mine."), named).data.to_dict()
    assert "license_name" not in data, "the name of another licence"
    assert "base_model_relation" not in data, "the relation to another model"
    same = merged(card("base_model: org/base", "Mine."), named).data
    assert same.base_model_relation == "quantized"
    chosen = merged(named, card("license: mit", "Mine."), prefer_card=True).data.to_dict()
    assert chosen["license"] == "mit"
    assert "license_name" not in chosen
    assert chosen["base_model_relation"] == "quantized"


def test_neither_card_is_changed():
    own, new = card("license: mit", "Mine."), ModelCard(CARD)
    before = own.content, new.content
    merged(own, new)
    assert (own.content, new.content) == before


def test_licence_and_language_of_a_folder(tmp_path):
    assert inherited(None) == {}
    assert inherited(str(tmp_path)) == {}
    assert inherited("owner/offline") == {}
    readme = tmp_path / "README.md"
    for broken in ("no metadata", "---\n- a list\n---\n", "---\nlicense: [\n---\n"):
        readme.write_text(broken)
        assert inherited(str(tmp_path)) == {}
    readme.write_bytes(b"\xff\xfe")
    assert inherited(str(tmp_path)) == {}
    readme.write_text("---\nlicense: mit\nlanguage: [en, de]\ntags: [x]\nbase_model: org/older\n---\n", "utf-8-sig")
    assert inherited(str(tmp_path)) == {"license": "mit", "language": ["en", "de"]}


def test_what_can_be_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner", "folder").mkdir(parents=True)
    assert repository("owner/name") == "owner/name"
    assert repository("name") == "name"
    for other in (None, "", "owner/folder", str(tmp_path), "/gone/away", "./gone", "a/b/c"):
        assert repository(other) is None


def test_an_installed_package_finds_its_templates():
    """They lie in the package, whose folder a wheel holds whole; `model_cards/template.md` shows one of them."""
    for name in ("model", "adapter", "statistics"):
        text = (files("hf_lowrank") / "templates" / f"{name}.md").read_text(encoding="utf-8")
        assert len(MARKED.findall(text)) == 1
        first = re.search(r"```\w+\n(.*)", text)[1]
        assert first.startswith("pip install"), "the first line of code installs the package"
    root = Path(__file__).resolve().parents[1]
    assert (root / "model_cards" / "template.md").samefile(root / "hf_lowrank" / "templates" / "model.md")
