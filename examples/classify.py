"""An encoder for classification with Trainer: fine-tune, factorize by what the task needs, fine-tune the factors.

    python examples/classify.py [--task sst2] [--data DIR] [--method fwsvd] [--param-ratio 0.5] [--steps 150]
        [--output FOLDER] [--smoke]

MiniLM on a task of GLUE. `fwsvd` weighs every input of a layer by what the loss on labelled batches says about it;
any other method of `optimum-cli lowrank list` works as well. `--data` is a folder with
`glue/<task>/{train,validation}.jsonl`; `--smoke` runs a tiny random model on made-up sentences.
"""

import argparse
import os
import tempfile
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks import made_up
from benchmarks.tasks import DATA, GLUE, INSIDE, Classification, train
from transformers import AutoModelForSequenceClassification, set_seed

from hf_lowrank import LowRankConfig, factorize, summary


def main():
    """Fine-tune, factorize, fine-tune, and say after each how good the model is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2", choices=list(GLUE))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--method", default="fwsvd")
    parser.add_argument("--param-ratio", type=float, default=0.5, help="of the encoder's linear parameters, kept")
    parser.add_argument("--steps", type=int, default=150, help="batches of 32 sentences, of each fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", help="where to save the result; by default it is thrown away")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        where = None
        if asked.smoke:
            where, asked.data = made_up.encoder(f"{folder}/model"), made_up.sentiment(folder)
            asked.steps, asked.learning_rate = 60, 3e-3
        task = Classification(asked.task, asked.data, where=where)
        model = task.dense()
        train(task, model, asked.learning_rate, 0, asked.steps, folder)
        print(f"fine-tuned: accuracy {task.score(model):.3f}")
        config = LowRankConfig(asked.method, asked.param_ratio, target_modules=INSIDE)
        factorize(model, config, calibration=task.batches(256, 16, labels=True))
        print(summary(model).line)
        print(f"factorized: accuracy {task.score(model):.3f}")
        train(task, model, asked.learning_rate / 2, 0, asked.steps, folder)
        accuracy = task.score(model)
        print(f"factors fine-tuned: accuracy {accuracy:.3f}")
        output = asked.output or f"{folder}/small"
        model.save_pretrained(output)
        task.tokenizer.save_pretrained(output)
        again = AutoModelForSequenceClassification.from_pretrained(output)
        print(f"loaded again: accuracy {task.score(again):.3f}, the same: {task.score(again) == accuracy}")


if __name__ == "__main__":
    main()
