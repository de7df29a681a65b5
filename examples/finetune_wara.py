"""Fine-tune a factorized model with WaRA, low-rank updates in the domain of a wavelet, and serve it as a plain LoRA.

    python examples/finetune_wara.py [--model FACTORIZED] [--text FILE] [--r 4] [--wavelet haar] [--steps 50]
        [--output FOLDER] [--smoke]

FACTORIZED is a folder or a repository with a factorized model, such as `examples/push_and_pull.py` makes; without it,
SmolLM2-135M-Instruct is factorized first. Leaves `adapter` (WaRA), `lora` (the same update, exactly, for whatever
serves LoRA) and `merged` in the output folder.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
from benchmarks.setups import english, smollm2, tiny
from continue_from_hub import blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import hf_lowrank
from hf_lowrank import Calibration, LowRankConfig, WaraConfig


def factorized(arguments, folder):
    """Where a factorized model and its tokenizer are, made if none is given."""
    if arguments.model:
        return arguments.model
    where = tiny(f"{folder}/tiny") if arguments.smoke else smollm2()[0]
    calibration = Calibration(samples=4, length=32) if arguments.smoke else "self"
    config = LowRankConfig(param_ratio=0.8, calibration=calibration)
    model = AutoModelForCausalLM.from_pretrained(where, lowrank_config=config)
    model.save_pretrained(f"{folder}/factorized")
    AutoTokenizer.from_pretrained(where).save_pretrained(f"{folder}/factorized")
    return f"{folder}/factorized"


@torch.no_grad()
def logits(model, row):
    """Of `model` on one row, in eval mode."""
    return model.eval()(input_ids=row["input_ids"][None]).logits


def main():
    """Train the adapter, and show that all that is saved is one update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a factorized model")
    parser.add_argument("--text", help="text file to train on; Python's own language reference by default")
    parser.add_argument("--r", type=int, default=4, help="rank of each pair of bands")
    parser.add_argument("--wavelet", default="haar")
    parser.add_argument("--steps", type=int, default=50, help="of 8 rows of 256 tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", help="where to save; by default it is thrown away")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(arguments, folder)


def run(arguments, folder):
    """Everything, with a folder for what is temporary."""
    where, output = factorized(arguments, folder), arguments.output or folder
    tokenizer = AutoTokenizer.from_pretrained(where)
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else english()
    if arguments.smoke:
        text, arguments.steps = text[:4096], min(arguments.steps, 8)
    rows = blocks(text, tokenizer, 32 if arguments.smoke else 256)
    held_out, rows = rows[-16:], rows[:-16]

    config = WaraConfig(r=arguments.r, wavelet=arguments.wavelet, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(where), config)
    model.print_trainable_parameters()
    settings = TrainingArguments(
        folder,
        max_steps=arguments.steps,
        per_device_train_batch_size=8,
        learning_rate=arguments.learning_rate,
        logging_steps=max(1, arguments.steps // 5),
        save_strategy="no",
        report_to=[],
    )
    data = {"train_dataset": rows, "eval_dataset": held_out, "data_collator": default_data_collator}
    trainer = Trainer(model, settings, **data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out perplexity: {math.exp(before):.2f} -> {math.exp(trainer.evaluate()['eval_loss']):.2f}")

    expected = logits(model, held_out[0])
    model.save_pretrained(f"{output}/adapter")
    hf_lowrank.tuners.save_as_lora(f"{output}/lora", model)
    for kind in ("adapter", "lora"):
        again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(where), f"{output}/{kind}")
        difference = (logits(again, held_out[0]) - expected).abs().max()
        print(f"{kind}: {again.peft_type.value}, logits differ by at most {difference:.1e}")
    # Exact: what was learned is appended to the factors, whose ranks grow.
    merged = model.merge_and_unload()
    merged.save_pretrained(f"{output}/merged")
    print(f"merged: logits differ by at most {(logits(merged, held_out[0]) - expected).abs().max():.1e}")
    print(hf_lowrank.summary(merged).line)


if __name__ == "__main__":
    main()
