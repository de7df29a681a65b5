"""Which blocks, which projections, which ranks: the design space of low rank, one factor at a time.

    PYTHONPATH=examples python examples/benchmarks/design_space.py [--data DIR] [--ranks 1 64] [--windows 2]
        [--window 256] [--method tucker] [--smoke]

SmolLM2-135M on WikiText-2, nothing trained. Four questions, at each rank: each block alone; each projection alone, in
five spread blocks; two, four and eight blocks beside each other or spread; and, in five spread blocks, more ranks. All
numbers are rises of the negative log-likelihood, in nats a token, over the same tokens: a low rank in every block
leaves no language model to compare.

"Characterizing the accuracy-efficiency trade-off" (2405.06626) and what followed it advise against early and against
adjacent layers; the last lines say whether that holds here. Writes results/design_space.json measurement by
measurement, goes on where it was stopped, and puts the rows into results/design_space.csv and the maps into
results/design_space.png. Some 20 minutes on one core. `--smoke` takes a tiny random model, and leaves nothing.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from statistics import mean


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from benchmarks import setups
from benchmarks.quality import DATA, texts
from benchmarks.runs import save_figure
from hf_lowrank import SweepPoint, sweep
from hf_lowrank.blocks import block_names
from hf_lowrank.evaluation import perplexity
from hf_lowrank.provenance import command
from hf_lowrank.surgery import match_sites


RESULTS = Path(__file__).parent / "results"
MORE_RANKS = (4, 16, 128)
GROUPS = (2, 4, 8)
SPREAD = 5


class Space:
    """The choices for a model of `count` blocks, by question."""

    def __init__(self, count, projections, ranks):
        self.count, self.projections, self.ranks = count, projections, ranks
        few = f"spread:{min(SPREAD, count)}"
        self.blocks = {(rank, block): SweepPoint(rank, [block]) for rank in ranks for block in range(count)}
        self.parts = {(rank, name): SweepPoint(rank, few, [name]) for rank in ranks for name in projections}
        self.more = {rank: SweepPoint(rank, few) for rank in sorted({*ranks, *MORE_RANKS})}
        self.groups = {}
        for size in (size for size in GROUPS if 2 * size <= count):
            starts = {"first": 0, "middle": (count - size) // 2, "last": count - size}
            for rank in ranks:
                self.groups[rank, size, "spread"] = SweepPoint(rank, f"spread:{size}")
                for name, start in starts.items():
                    self.groups[rank, size, name] = SweepPoint(rank, list(range(start, start + size)))

    def points(self):
        """All of them; those of one block last, which are most."""
        return [*self.more.values(), *self.groups.values(), *self.parts.values(), *self.blocks.values()]


def rises(found, choices, count):
    """`{key: nats a token above the dense model}` of what was measured."""
    rows = {key: found.find(point, count) for key, point in choices.items()}
    return {key: math.log(row.score / found.dense) for key, row in rows.items()}


def claims(found, space):
    """Lines that say what the numbers do to the two statements."""
    lines = []
    blocks, groups = rises(found, space.blocks, space.count), rises(found, space.groups, space.count)
    quarter = max(1, space.count // 4)
    for rank in space.ranks:
        own = [blocks[rank, block] for block in range(space.count)]
        early, others = mean(own[:quarter]), mean(own[quarter:])
        worst = sorted(range(space.count), key=own.__getitem__, reverse=True)[:3]
        said = "confirmed" if early > others else "refuted"
        lines.append(
            f"rank {rank}: the first {quarter} blocks cost {early:.3f} nats each, the others {others:.3f}; worst are "
            f"{worst}: early blocks are worse: {said}"
        )
        for size in sorted({size for own_rank, size, _ in groups if own_rank == rank}):
            apart = groups[rank, size, "spread"]
            beside = {name: groups[rank, size, name] for name in ("first", "middle", "last")}
            worse = [name for name, value in beside.items() if value > apart]
            shown = ", ".join(f"{name} {value:.3f}" for name, value in beside.items())
            lines.append(
                f"rank {rank}, {size} blocks: spread {apart:.3f}, adjacent {shown}: adjacent blocks are worse: "
                + ("confirmed" if len(worse) == 3 else f"holds for {worse}" if worse else "refuted")
            )
    return lines


def draw(found, space, path, title):
    """Maps of blocks and of projections by rank; bars of blocks beside each other and spread."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    axes = above.subplots()
    blocks, parts = (rises(found, part, space.count) for part in (space.blocks, space.parts))
    least = 1e-3

    def map_of(axes, values, columns):
        grid = [[max(least, values[rank, column]) for column in columns] for rank in space.ranks]
        top = max(2 * least, max(map(max, grid)))
        image = axes.imshow(grid, aspect="auto", cmap="magma_r", norm=LogNorm(least, top))
        axes.set_yticks(range(len(space.ranks)), [f"rank {rank}" for rank in space.ranks])
        return image

    image = map_of(axes, blocks, range(space.count))
    axes.set_xticks(range(0, space.count, max(1, space.count // 15)))
    axes.set_title("one block, all its projections", fontsize=9)
    axes.set_xlabel("block", fontsize=8)
    above.colorbar(image, ax=axes, label="nats a token")
    left, *rest = below.subplots(1, 1 + len(space.ranks), width_ratios=[1.4, *[1] * len(space.ranks)])
    image = map_of(left, parts, space.projections)
    left.set_xticks(range(len(space.projections)), space.projections, rotation=40, ha="right", fontsize=7)
    left.set_title(f"one projection in {min(SPREAD, space.count)} spread blocks", fontsize=9)
    below.colorbar(image, ax=left, label="nats a token")
    groups = rises(found, space.groups, space.count)
    for axes, rank in zip(rest, space.ranks, strict=True):
        sizes = sorted({size for _, size, _ in groups})
        for shift, name in enumerate(("spread", "first", "middle", "last")):
            heights = [max(least, groups[rank, size, name]) for size in sizes]
            axes.bar([place + 0.2 * (shift - 1.5) for place in range(len(sizes))], heights, 0.18, label=name)
        axes.set_xticks(range(len(sizes)), [f"{size} blocks" for size in sizes])
        axes.set_yscale("log")
        axes.set_title(f"spread or adjacent, rank {rank}", fontsize=9)
    rest[-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def main():
    """Measure what is missing, draw, and say what it means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--method", default="tucker", help="JSON or a name")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    method = json.loads(asked.method) if asked.method.startswith("{") else asked.method
    with tempfile.TemporaryDirectory() as folder:
        if asked.smoke:
            where, name, results, task = setups.tiny(folder), "a random model", Path(folder), None
            ids, source, asked.window = torch.arange(3, 90).repeat(2), "numbers", 32
        else:
            (where, name), results = setups.smollm2(), RESULTS
            task = texts(asked.data, asked.window, asked.windows)["wikitext2"]
            ids, source = task.token_ids(AutoTokenizer.from_pretrained(where))
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        names = [site.name for site in match_sites(model)]
        blocks = block_names(model, names)
        projections = [n.rpartition(".")[2] for n in names if n.startswith(f"{blocks[0]}.")]
        space = Space(len(blocks), projections, asked.ranks)

        def measure(one):
            return perplexity(one, ids, asked.window, asked.windows).perplexity

        def told(row):
            where = f"blocks {row.layers}" + ("" if row.modules is None else f", {' '.join(row.modules)}")
            print(f"rank {row.rank}, {where}: perplexity {row.score:.4g}, {row.kept:.1%} kept", flush=True)

        about = {"model": name, "data": source, "window": asked.window, "windows": asked.windows, "seed": 0}
        path = results / "design_space.json"
        found = sweep(model, space.points(), measure, method, path=path, about=about, on_row=told)
        found.save(results / "design_space.csv")
        lines = claims(found, space)
        print(f"dense: perplexity {found.dense:.4g}")
        print("\n".join(lines))
        title = f"{name}, {source['data'] if isinstance(source, dict) else source}: what rank costs, nothing trained"
        draw(found, space, results / "design_space.png", title)
        print(f"drawn: {(results / 'design_space.png').stat().st_size} bytes, by {command()}")


if __name__ == "__main__":
    main()
