"""Factorize a language model from the command line: look at it, calibrate once, try two sizes, measure, push.

    python examples/factorize_from_command_line.py [--model FOLDER_OR_ID] [--folder OUT] [--push OWNER/NAME] [--smoke]

Each step prints the command that it runs, which can be typed as it is. A step that was interrupted goes on where it
was when the same command is run again. No data set is needed: text is sampled from the model itself.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.setups import english, smollm2


def lowrank(*arguments):
    """Run `optimum-cli lowrank`, show its command, and return what it says as JSON."""
    program = Path(sys.executable).with_name("optimum-cli")
    print(f"\n$ {shlex.join(['optimum-cli', 'lowrank', *map(str, arguments)])}", flush=True)
    command = [sys.executable, program, "lowrank", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def tiny(folder):
    """A random model with a tokenizer, for a smoke test."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_lowrank.testing import tiny_model

    tiny_model("llama")[0].save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w95"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w95").save_pretrained(folder)
    return folder


def main():
    """Run the whole path and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="by default a 135M language model out of the cache of `make quickstart`")
    parser.add_argument("--folder", help="where results are kept; by default they are not")
    parser.add_argument("--push", metavar="OWNER/NAME", help="push the smaller checkpoint to the Hub")
    parser.add_argument(
        "--smoke", action="store_true", help="a random model and tiny sizes, to see that everything runs"
    )
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = arguments.model or (tiny(folder / "dense") if arguments.smoke else smollm2()[0])
        sizes = ["--calibration-samples", "4", "--calibration-length", "32"] if arguments.smoke else []
        windows = ["--max-windows", "1" if arguments.smoke else "8"]
        text = folder / "english.txt"
        text.write_text(english()[:65536], encoding="utf-8")

        for entry in lowrank("inspect", model)["types"]:
            print(f"{entry['type']:<16} {entry['energy_share']:.0%} of its rank keeps 90 % of its energy")
        statistics = folder / "statistics.safetensors"
        lowrank("calibrate", model, statistics, *sizes)
        rows = []
        for ratio in ("0.8",) if arguments.smoke else ("0.9", "0.8"):
            out = folder / f"kept-{ratio}"
            made = lowrank("factorize", model, out, "--param-ratio", ratio, "--calibration", statistics)
            measured = lowrank("evaluate", out, "--perplexity", text, *windows)
            rows.append((ratio, made["line"], measured["perplexity"]["english"]["perplexity"]))
        dense = lowrank("evaluate", model, "--perplexity", text, *windows)["perplexity"]["english"]["perplexity"]
        if arguments.push:
            print(lowrank("push", out, arguments.push)["url"])

    print(f"\n{'kept':<6} {'perplexity':>10}\n{'dense':<6} {dense:>10.2f}")
    for ratio, line, perplexity in rows:
        print(f"{ratio:<6} {perplexity:>10.2f}  {line}")


if __name__ == "__main__":
    main()
