"""A vision model: train a small ViT on handwritten digits, factorize it by what images make its layers see.

    python examples/vision.py [--data DIR] [--param-ratio 0.4] [--epochs 12] [--output FOLDER] [--smoke]

No text and no tokenizer: `calibration` takes batches of any modality. `--data` is a folder with
`digits8x8/{train,test}.jsonl`, 64 pixels of 0 to 16 and a label a row, the digits of scikit-learn; without it, and
where scikit-learn is installed, they come from there.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from benchmarks.tasks import DATA
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig, set_seed

from hf_lowrank import LowRankConfig, factorize, summary


def digits(data):
    """`(train, test)`, lists of `{"pixel_values": (1, 8, 8), "labels": int}`."""
    folder = data / "digits8x8"
    if folder.is_dir():
        parts = [
            [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "test")
        ]
    else:
        from sklearn.datasets import load_digits

        found = load_digits()
        rows = [{"pixels": p.tolist(), "label": int(y)} for p, y in zip(found.data, found.target, strict=True)]
        parts = [rows[:1437], rows[1437:]]
    return [
        [{"pixel_values": torch.tensor(row["pixels"]).view(1, 8, 8) / 8 - 1, "labels": row["label"]} for row in part]
        for part in parts
    ]


@torch.no_grad()
def accuracy(model, rows):
    """Of `model` on `rows`."""
    model.eval()
    logits = model(pixel_values=torch.stack([row["pixel_values"] for row in rows])).logits
    return (logits.argmax(-1) == torch.tensor([row["labels"] for row in rows])).double().mean().item()


def main():
    """Train, factorize with and without looking at images, save, load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--param-ratio", type=float, default=0.4, help="of the linear parameters of its layers, kept")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--output", help="where to save the result; by default it is thrown away")
    parser.add_argument("--smoke", action="store_true", help="a short training")
    asked = parser.parse_args()
    set_seed(0)
    train, test = digits(asked.data)
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = AutoModelForImageClassification.from_config(ViTConfig(**shape, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=4 if asked.smoke else asked.epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            warmup_steps=30,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, settings, train_dataset=train).train()
        print(f"dense: accuracy {accuracy(model, test):.3f}")
        images = [
            {"pixel_values": torch.stack([row["pixel_values"] for row in train[i : i + 32]])}
            for i in range(0, 512, 32)
        ]
        for method, data in (("svd", None), ("kfac_svd", images)):
            smaller = copy.deepcopy(model)
            factorize(smaller, LowRankConfig(method, asked.param_ratio), calibration=data)
            print(f"{method}: accuracy {accuracy(smaller, test):.3f} ({summary(smaller).line})")
        output = asked.output or f"{folder}/small"
        smaller.save_pretrained(output)
        again = AutoModelForImageClassification.from_pretrained(output)
        print(f"loaded again, the same: {accuracy(again, test) == accuracy(smaller, test)}")


if __name__ == "__main__":
    main()
