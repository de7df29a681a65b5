"""Pushed to a hub over HTTP, pulled elsewhere: what arrives, who may, and what is left when something goes wrong."""

import re

import pytest
import torch
from hub import STRANGER
from processes import run


PULL = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "hf_lowrank" not in sys.modules
model, info = AutoModelForCausalLM.from_pretrained("me/small", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 10)[None]).logits, {path!r})
"""


def test_a_process_that_never_imports_the_package_pulls_what_was_pushed(hub, worker, tmp_path):
    worker.run(
        f"torch.save(logits(model), {str(tmp_path / 'pushed')!r}); model.push_to_hub('me/small', tags=['mine'])"
    )
    assert hub.commits("me/small") == 1
    assert sorted(hub.repositories["me/small"]) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    done = run(PULL.format(path=str(tmp_path / "pulled")), **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "pulled"), torch.load(tmp_path / "pushed"))
    data = hub.card("me/small").data.to_dict()
    assert data["tags"] == ["hf-lowrank", "low-rank", "mine"]
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "some", "LICENSE")
    assert data["language"] == ["en"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    text = hub.card("me/small").text
    assert text.index("pip install hf-lowrank") < text.index("import hf_lowrank") < text.index("from_pretrained")
    assert 'LlamaForCausalLM.from_pretrained("me/small")' in text


def test_pushed_on_from_a_repository_the_base_model_is_still_known(hub, worker):
    worker.run("model.push_to_hub('me/small'); load('me/small').push_to_hub('me/copy')")
    first, second = hub.repositories["me/small"], hub.repositories["me/copy"]
    assert hub.card("me/copy").data.base_model == "org/base"
    assert hub.card("me/copy").data.license_name == "some"
    assert second["model.safetensors"] == first["model.safetensors"]


def test_factorized_in_memory_from_a_folder(hub, worker, tmp_path):
    """A folder is no base model that anyone could follow; its README.md still says what the licence is."""
    worker.run(f"""
base = {str(tmp_path / "base")!r}
tiny_model("llama")[0].save_pretrained(base)
open(base + "/README.md", "w").write("---\\nlicense: mit\\n---\\n")
found = hf_lowrank.factorize(load(base), LowRankConfig(method="svd", rank=4))
found.push_to_hub("me/small")
assert torch.equal(logits(load("me/small")), logits(found))
""")
    data = hub.card("me/small").data.to_dict()
    assert data["license"] == "mit"
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert str(tmp_path) not in str(dict(hub.repositories["me/small"]))


def test_weights_of_an_earlier_push_do_not_win(hub, worker):
    worker.run("model.push_to_hub('me/small')")
    worker.run("other = small(6); other.push_to_hub('me/small', max_shard_size='60KB')")
    files = hub.repositories["me/small"]
    assert "model.safetensors" not in files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert hub.commits("me/small") == 2
    worker.run("assert torch.equal(logits(load('me/small')), logits(other))")
    worker.run("model.push_to_hub('me/small')")
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]


def test_a_branch_and_a_pull_request_leave_main_alone(hub, worker):
    worker.run("model.push_to_hub('me/small')")
    before = dict(hub.repositories["me/small"])
    hub.repositories["me/small"].commit(
        "v/2", {**before, "README.md": b"---\ntags: [own]\n---\nWords of the branch.\n"}
    )
    worker.run("other = small(6); other.push_to_hub('me/small', revision='v/2')")
    worker.run("print(other.push_to_hub('me/small', create_pr=True).pr_revision)")
    assert dict(hub.repositories["me/small"]) == before
    assert "Words of the branch." in hub.card("me/small", "v/2").text
    assert hub.card("me/small", "v/2").data.tags == ["own", "hf-lowrank", "low-rank"]
    for revision in ("v/2", "refs/pr/1"):
        worker.run(f"assert torch.equal(logits(load('me/small', revision={revision!r})), logits(other))")
    worker.run("assert torch.equal(logits(load('me/small')), logits(model))")
    worker.run("other.push_to_hub('me/small', revision='new')")
    assert "new" in hub.repositories["me/small"].branches
    assert dict(hub.repositories["me/small"]) == before


def test_an_upload_that_breaks_off_is_sent_again(hub, worker):
    hub.faults["upload"] = 1
    worker.run("other = small(5); other.push_to_hub('me/small')")
    assert sum(request.startswith("PUT") for request in hub.requests) == 2
    assert hub.commits("me/small") == 1
    worker.run("assert torch.equal(logits(load('me/small')), logits(other))")


def test_a_push_that_fails_leaves_what_was_there(hub, worker):
    worker.run("model.push_to_hub('me/small')")
    before = dict(hub.repositories["me/small"])
    hub.faults["commit"] = 1
    assert "500" in worker.fail("other = small(7); other.push_to_hub('me/small')")
    assert dict(hub.repositories["me/small"]) == before
    worker.run("assert torch.equal(logits(load('me/small')), logits(model))")
    worker.run("other.push_to_hub('me/small')")
    worker.run("assert torch.equal(logits(load('me/small')), logits(other))")


@pytest.mark.parametrize(
    ("token", "status", "message"),
    [
        (False, 401, "rights to write|authenticated"),
        ("hf_wrong", 401, "Invalid credentials in Authorization header"),
        (STRANGER, 403, "don't have the rights to write under the namespace 'me'"),
    ],
)
def test_who_may_not_push_is_told_by_the_hub(hub, worker, token, status, message):
    hub.put("me/small", {"config.json": "{}"}, private=True)
    error = worker.fail(f"model.push_to_hub('me/small', token={token!r})")
    assert str(status) in error
    assert re.search(message, error), error
    assert list(hub.repositories["me/small"]) == ["config.json"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (False, "is not a local folder and is not a valid model identifier"),
        (STRANGER, "is not a local folder and is not a valid model identifier"),
        ("hf_wrong", "Invalid credentials in Authorization header"),
    ],
)
def test_who_may_not_read_is_told_by_transformers(hub, worker, token, message):
    worker.run("model.push_to_hub('me/small', private=True)")
    assert hub.repositories["me/small"].private
    error = worker.fail(f"load('me/small', token={token!r})")
    assert error.startswith("OSError: ")
    assert message in error


OWN = """---
license: apache-2.0
pretty_name: Mine
---
# My model

My words.
"""


def test_what_the_user_wrote_stays(hub, worker):
    hub.put("me/small", {"README.md": OWN})
    worker.run("model.push_to_hub('me/small')")
    first = hub.card("me/small")
    assert first.text.startswith("# My model\n\nMy words.\n\n<!-- hf_lowrank")
    data = first.data.to_dict()
    assert (data["license"], data["pretty_name"], data["base_model"]) == ("apache-2.0", "Mine", "org/base")
    assert "license_name" not in data
    end = "<!-- /hf_lowrank -->"
    edited = first.content.replace("My words.", "My new words.").replace(end, f"{end}\n\nMore.")
    hub.put("me/small", {"README.md": edited})
    worker.run("small(6).push_to_hub('me/small')")
    second = hub.card("me/small").text
    assert second.startswith("# My model\n\nMy new words.\n\n<!-- hf_lowrank")
    assert second.endswith("<!-- /hf_lowrank -->\n\nMore.\n")
    assert second.count("## Low-rank factors") == 1
    assert "rank=6" in second
    assert "rank=4" not in second


def test_a_readme_that_cannot_be_read_is_not_overwritten(hub, worker):
    hub.put("me/small", {"README.md": OWN})
    hub.faults["readme"] = 100
    assert worker.fail("model.push_to_hub('me/small')")
    assert dict(hub.repositories["me/small"]) == {"README.md": OWN.encode()}


def test_opting_out_and_a_card_of_ones_own(hub, worker):
    worker.run("model.push_to_hub('me/plain', model_card=False)")
    assert "hf_lowrank" not in hub.card("me/plain").text
    assert sorted(hub.repositories["me/plain"])[1] == "config.json"
    worker.run("""
ids = list(range(3, 67)) * 2
measured = [hf_lowrank.evaluate(found, perplexity={"count": ids}) for found in (load("org/base"), model)]
mine = hf_lowrank.model_card(model, "me/small", evaluation=measured[1], dense=measured[0], license="mit")
mine.data.language = "fr"
mine.text = mine.text.replace("# small", "# My title")
model.push_to_hub("me/small", model_card=mine)
""")
    text, data = hub.card("me/small").text, hub.card("me/small").data.to_dict()
    assert "# My title" in text
    assert "| count, perplexity over 2 x 64 tokens |" in text
    assert (data["license"], data["language"]) == ("mit", "fr")
    assert "license_name" not in data
    assert hub.commits("me/small") == 1
    worker.run("mine.data.license = 'bsd'; model.push_to_hub('me/small', model_card=mine)")
    assert hub.card("me/small").data.license == "bsd", "a card that is given wins over what is there"
    assert "`model_card`='no'" in worker.fail("model.push_to_hub('me/small', model_card='no')")


def test_a_card_that_the_hub_refuses_is_refused_before_anything_is_sent(hub, worker):
    worker.run("model.push_to_hub('me/small')")
    before = dict(hub.repositories["me/small"])
    hub.requests.clear()
    code = (
        "other = small(3); other.push_to_hub('me/small', model_card=hf_lowrank.model_card(other, base_model='a/b/c'))"
    )
    assert '"base_model" with value "a/b/c" is not valid' in worker.fail(code)
    assert dict(hub.repositories["me/small"]) == before
    assert not any("/objects/" in request for request in hub.requests)


def test_a_tokenizer_goes_in_the_same_commit(hub, worker):
    worker.run("""
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w95"))
model.push_to_hub("me/small", tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w95"))
assert AutoTokenizer.from_pretrained("me/small").vocab_size == 96
""")
    assert hub.commits("me/small") == 1


def test_saving_and_pushing_in_one_call(hub, worker, tmp_path):
    (tmp_path / "unrelated.txt").write_text("not new")
    worker.run(f"model.save_pretrained({str(tmp_path)!r}, push_to_hub=True, repo_id='me/small')")
    assert "unrelated.txt" not in hub.repositories["me/small"]
    assert "## Low-rank factors" in hub.card("me/small").text
    worker.run("assert torch.equal(logits(load('me/small')), logits(model))")


def test_a_dense_model_is_pushed_as_ever(hub, worker):
    worker.run("load('org/base').push_to_hub('me/dense')")
    assert "hf_lowrank" not in str(dict(hub.repositories["me/dense"]))
