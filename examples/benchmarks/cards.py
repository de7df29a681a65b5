"""The cards in `model_cards`, made from committed results.

    PYTHONPATH=examples python examples/benchmarks/cards.py

No number in them comes from elsewhere.
"""

import json

import hf_lowrank
from benchmarks.setups import SMOLLM2
from benchmarks.table import RESULTS, ROOT


FOLDER = ROOT / "model_cards"
# What the base model's own card says; it is not read here, so that a card can be made again without the Hub.
BASE = {"base_model": SMOLLM2, "license": "apache-2.0", "language": ["en"]}
# By the name of the card: the file in `results/quality`, and what makes the model (`make quickstart` keeps no file).
CARDS = {
    "smollm2-135m-instruct-lowrank-0.9": ("kfac_svd-0.9-self", "make quickstart"),
    "smollm2-135m-instruct-lowrank-0.8": (
        "kfac_svd-0.8-self",
        "python examples/factorize_from_command_line.py --folder DIR",
    ),
}


def card(name):
    """The `huggingface_hub.ModelCard` of one of `CARDS`."""
    variant, command = CARDS[name]
    result, dense = (json.loads((RESULTS / f"{each}.json").read_text(encoding="utf-8")) for each in (variant, "dense"))
    evaluation = result["evaluation"]
    found = hf_lowrank.model_card(None, f"me/{name}", evaluation, dense["evaluation"], command, **BASE)
    note = (
        f"`{command}` makes this model, in float32; all numbers below are of weights stored in bfloat16. The base "
        f"model it was made from, and is compared with, is {result['base']}.\n\n"
    )
    found.text = found.text.replace("<!-- hf_lowrank:", f"{note}<!-- hf_lowrank:", 1)
    return found


def main():
    """Write all of them."""
    for name in CARDS:
        card(name).save(FOLDER / f"{name}.md")


if __name__ == "__main__":
    main()
