"""Factorize a real encoder and write a report of it: `report.json`, and one page that shows it.

    python examples/report.py [--param-ratio 0.6] [--method svd] [--output report]

Open `report/report.html` in a browser. The default method needs no data; a language model gains from others.
"""

import argparse

from benchmarks.setups import minilm
from transformers import AutoModel

import hf_lowrank
from hf_lowrank import LowRankConfig


def main():
    """Write the report and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--param-ratio", type=float, default=0.6, help="fraction of the linears' parameters kept")
    parser.add_argument("--method", default="svd", help="how factors are computed")
    parser.add_argument("--output", default="report", help="folder to write to")
    arguments = parser.parse_args()

    where = minilm()
    dense = AutoModel.from_pretrained(where)
    config = LowRankConfig(method=arguments.method, param_ratio=arguments.param_ratio)
    model = AutoModel.from_pretrained(where, lowrank_config=config)
    report = hf_lowrank.report(model, dense=dense)
    report.save(arguments.output)
    print(f"{hf_lowrank.summary(model).line}\n{arguments.output}/report.html shows it, layer by layer")


if __name__ == "__main__":
    main()
