"""What else is pushed: a trained model by Trainer, adapters, statistics."""

import re

import torch
from processes import run


TRAIN = """
from transformers import Trainer, TrainingArguments

def train(model, where, to):
    args = TrainingArguments(where, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                             hub_model_id=to)
    rows = [{"input_ids": list(range(3, 10)), "labels": list(range(3, 10))}] * 2
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    return trainer
"""
ADAPT = """
import peft
from torch import nn

def adapted(base, config):
    found = peft.get_peft_model(base, config)
    for parameter in found.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return found
"""


def test_trainer(hub, worker, tmp_path):
    worker.run(TRAIN)
    worker.run(f"trained = small(); train(trained, {str(tmp_path / 'one')!r}, 'me/small').push_to_hub()")
    worker.run("assert torch.equal(logits(load('me/small')), logits(trained))")
    worker.run("assert not torch.equal(logits(trained), logits(model))")
    assert hub.commits("me/small") == 1
    card = hub.card("me/small")
    assert card.text.index("Training hyperparameters") < card.text.index("## Low-rank factors")
    data = card.data.to_dict()
    assert set(data["tags"]) == {"generated_from_trainer", "hf-lowrank", "low-rank"}
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "quantized")
    assert data["license_name"] == "some"

    worker.run(f"train(load('me/small'), {str(tmp_path / 'two')!r}, 'me/tuned').push_to_hub()")
    data = hub.card("me/tuned").data.to_dict()
    assert data["base_model"] == "me/small", "Trainer knows what it was fine-tuned from"
    assert "base_model_relation" not in data

    worker.run(f"train(load('me/small'), {str(tmp_path / 'three')!r}, 'me/plain').push_to_hub(model_card=False)")
    assert "hf_lowrank" not in hub.card("me/plain").text
    worker.run(f"train(load('org/base'), {str(tmp_path / 'four')!r}, 'me/dense').push_to_hub()")
    assert "hf_lowrank" not in hub.card("me/dense").text


PULL = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
assert "hf_lowrank" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({base!r})
model = peft.PeftModel.from_pretrained(model, "me/adapter")
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 10)[None]).logits, {path!r})
"""


def test_an_adapter_on_a_factorized_model(hub, worker, tmp_path):
    worker.run(ADAPT)
    worker.run(f"""
small().push_to_hub("me/small")
found = adapted(load("me/small"), hf_lowrank.WaraConfig(r=3, wavelet="db2", target_modules=["q_proj", "down_proj"]))
found.push_to_hub("me/adapter")
torch.save(logits(found), {str(tmp_path / "pushed")!r})
""")
    done = run(PULL.format(base="me/small", path=str(tmp_path / "pulled")), **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "pulled"), torch.load(tmp_path / "pushed"))
    assert hub.commits("me/adapter") == 1
    card = hub.card("me/adapter")
    data = card.data.to_dict()
    assert data["tags"] == ["hf-lowrank", "low-rank", "wara"]
    assert (data["base_model"], data["base_model_relation"]) == ("me/small", "adapter")
    assert data["library_name"] == "peft"
    assert data["license_name"] == "some", "from the factorized model's own card"
    assert re.search(r"\| default \| WARA \| 3 \| down_proj, q_proj \| [\d,]+ \|", card.text)
    assert 'LlamaForCausalLM.from_pretrained("me/small")' in card.text


def test_a_mixed_rank_adapter(hub, worker, tmp_path):
    worker.run(ADAPT)
    worker.run(f"""
small().push_to_hub("me/small")
for base in ("org/base", "me/small"):
    found = adapted(load(base), hf_lowrank.MixedRankConfig(r=5, target_modules=["q_proj", "down_proj"]))
    found.push_to_hub("me/adapter-of-" + base.replace("/", "-"))
    torch.save(logits(found), {str(tmp_path)!r} + "/" + base.replace("/", "-"))
""")
    for base in ("org/base", "me/small"):
        own, pulled = base.replace("/", "-"), tmp_path / "pulled"
        code = PULL.format(base=base, path=str(pulled)).replace("me/adapter", f"me/adapter-of-{own}")
        done = run(code, **hub.environment(tmp_path / own.upper()))
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(pulled), torch.load(tmp_path / own))
        data = hub.card(f"me/adapter-of-{own}").data.to_dict()
        assert "mixed_rank" in data["tags"]
        assert (data["base_model"], data["base_model_relation"]) == (base, "adapter")


def test_which_adapters_need_the_package(hub, worker):
    worker.run(ADAPT)
    worker.run("""
lora = peft.LoraConfig(target_modules=["q_proj"])
adapted(small(), lora).push_to_hub("me/on-factors")
adapted(load("org/base"), hf_lowrank.WaraConfig(target_modules=["q_proj"])).push_to_hub("me/wara")
adapted(load("org/base"), lora).push_to_hub("me/lora")
inside = small()
inside.add_adapter(lora)
inside.push_to_hub("me/inside")
""")
    ours = {name: "hf_lowrank" in hub.card(f"me/{name}").text for name in ("on-factors", "wara", "inside", "lora")}
    assert ours == {"on-factors": True, "wara": True, "inside": True, "lora": False}
    assert "| default | LORA | 8 | q_proj |" in hub.card("me/inside").text


def test_statistics(hub, worker):
    printed = worker.run("""
from hf_lowrank import collect_statistics
batches = [{"input_ids": torch.randint(3, 90, (2, 30), generator=torch.Generator().manual_seed(0))}]
collect_statistics(load("org/base"), batches).push_to_hub("me/stats", "llama/kfac.safetensors", private=True)
def compressed(calibration):
    config = LowRankConfig(calibration=calibration)
    return load("org/base", lowrank_config=config)
pulled, direct = compressed("me/stats/llama/kfac.safetensors"), compressed(batches)
state = pulled.state_dict()
assert all(torch.equal(value, state[key]) for key, value in direct.state_dict().items())
print(pulled.config.quantization_config.recipe["calibration"]["tokens"])
""")
    assert printed.strip() == "60"
    assert set(hub.repositories["me/stats"]) == {"README.md", "llama/kfac.safetensors"}
    assert hub.commits("me/stats") == 1
    card = hub.card("me/stats")
    assert card.data.tags == ["hf-lowrank", "calibration"]
    assert 'calibration="me/stats/llama/kfac.safetensors"' in card.text
    assert "| statistics | gradient_gram, input_gram |" in card.text
    assert "| tokens | 60 |" in card.text

    before = dict(hub.repositories["me/stats"])
    hub.faults["commit"] = 1
    code = "collect_statistics(load('org/base'), batches, method='awsvd').push_to_hub('me/stats', 'other.safetensors')"
    assert "500" in worker.fail(code)
    assert dict(hub.repositories["me/stats"]) == before
    worker.run(code)
    after = hub.repositories["me/stats"]
    assert set(after) == {*before, "other.safetensors"}
    assert after["llama/kfac.safetensors"] == before["llama/kfac.safetensors"]
    assert "StatisticsError: `path_in_repo`='x'" in worker.fail(code.replace("other.safetensors", "x"))


def test_statistics_of_others_are_refused_by_the_hub(hub, worker):
    hub.put("me/stats", {"kept.safetensors": b"0"}, private=True)
    load = "load('org/base', token={!r}, lowrank_config=LowRankConfig(calibration='me/stats/kept.safetensors'))"
    assert "RepositoryNotFoundError: 401" in worker.fail(load.format(False))
    error = worker.fail("hf_lowrank.Statistics({}, {}, {}).push_to_hub('me/stats', token='hf_wrong')")
    assert "Invalid credentials in Authorization header" in error
