"""How long one layer takes, dense and factorized: measured once a shape, or read from a table."""

import functools
import itertools
import json
import os
import statistics
import time
from bisect import bisect_left
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .errors import ConfigError
from .formats import FORMATS
from .surgery import match_sites


# Runs before the clock counts, and runs of which the median counts.
WARMUP, REPEATS = 3, 15
VERSION = 1


@dataclass(frozen=True)
class Times:
    """Times of one shape.

    Args:
        dense (`int`): nanoseconds of the dense layer.
        ranks (`dict[int, int]`): nanoseconds of the factorized layer by rank.
    """

    dense: int
    ranks: dict

    def at(self, rank):
        """Nanoseconds at `rank`: the longest of all measured ranks up to the next one, so that they never fall."""
        known, longest = self._rising
        return longest[min(bisect_left(known, rank), len(known) - 1)]

    @functools.cached_property
    def _rising(self):
        known = sorted(self.ranks)
        return known, list(itertools.accumulate((self.ranks[rank] for rank in known), max))


class Latencies:
    """Times of layers by shape.

    Args:
        shapes (`dict[tuple[int, int], Times]`): by `(out, in)`.
        setup (`dict`): JSON that says how they were measured: device, dtype, format, rows.
    """

    def __init__(self, shapes, setup=None):
        self.shapes = shapes
        self.setup = setup or {}

    def of(self, out_features, in_features):
        """The [`Times`] of one shape.

        Raises:
            ConfigError: the table does not hold it.
        """
        if (out_features, in_features) not in self.shapes:
            raise ConfigError(
                f"The table of latencies has no shape {out_features} x {in_features}; it has {sorted(self.shapes)}. "
                "Measure it with the model at hand (`latencies=None`)."
            )
        return self.shapes[out_features, in_features]

    def save(self, path):
        """Write the table as JSON, so that later allocations come to the same ranks."""
        shapes = [
            {"out": rows, "in": columns, "dense": times.dense, "ranks": times.ranks}
            for (rows, columns), times in sorted(self.shapes.items())
        ]
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, "setup": self.setup, "nanoseconds": shapes}, file, indent=1)

    @staticmethod
    def load(path):
        """Read a table that [`Latencies.save`] wrote."""
        try:
            with open(path, encoding="utf-8") as file:
                table = json.load(file)
            if table["version"] != VERSION:
                raise ConfigError(f"{os.fspath(path)} has version {table['version']!r}, not {VERSION}.")
            shapes = {
                (entry["out"], entry["in"]): Times(entry["dense"], {int(r): t for r, t in entry["ranks"].items()})
                for entry in table["nanoseconds"]
            }
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"`latencies`={os.fspath(path)!r} is no table of latencies ({error}); write one with "
                "hf_lowrank.measure_latencies(...).save(path)."
            ) from error
        return Latencies(shapes, table["setup"])


def latencies_for(model, recipe, available=None, device=None):
    """What `recipe` has to know of the speed of its targets, or `None`.

    Args:
        model (`torch.nn.Module`): dense; tells shapes, dtypes and, in memory, devices.
        recipe ([`Recipe`]): targets, format, rank multiple, and an allocator with fields `latencies` and `rows`.
        available (*optional*): as for `make_plan`.
        device (*optional*): where to measure; by default where the first weight is.

    Raises:
        ConfigError: the table does not fit, or several processes would have to measure.
    """
    if not recipe.needs_latencies:
        return None
    if recipe.allocation.latencies is not None:
        return Latencies.load(recipe.allocation.latencies)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"`allocation`={recipe.allocation.name!r} would measure other latencies in every process, and so come to "
            "other ranks; measure once with hf_lowrank.measure_latencies(...).save(path) and give `latencies=path`."
        )
    sites = match_sites(model, recipe.target_modules, recipe.exclude_modules)
    sites = [site for site in sites if available is None or available(site)]
    shapes = [(site.out_features, site.in_features) for site in sites]
    weight = model.get_parameter(sites[0].weight_name)
    device = weight.device if device is None else torch.device(device)
    # Experts may be stored in another format; they are timed like a linear in this one.
    format = recipe.format or recipe.method.format
    options = {"device": device, "dtype": weight.dtype, "layout": recipe.method.layout}
    return measure_latencies(shapes, recipe.allocation.rows, recipe.rank_multiple, format, **options)


def measure_latencies(
    shapes, rows=1, rank_multiple=8, format="low_rank", device="cpu", dtype=torch.float32, layout=None
):
    """Time layers of some shapes on this machine, dense and at every rank multiple.

    Args:
        shapes (`Iterable[tuple[int, int]]`): `(out, in)`; every shape is measured once.
        rows (`int`, defaults to 1): inputs at a time: 1 is the decoding of one sequence.
        rank_multiple (`int`, defaults to 8): ranks are multiples of it, below break-even.
        format (`str`, defaults to `"low_rank"`): of the factorized layers.
        device (`str` or `torch.device`, defaults to `"cpu"`): where to measure.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the weights.
        layout (`Callable[[int, int, int], dict]`, *optional*): the `layout` of a method, which says what the spec of a
            layer holds beside its rank, by `(out, in, rank)`.

    Returns:
        [`Latencies`], medians of 15 runs each; `.save(path)` keeps them.
    """
    device, cls, found = torch.device(device), FORMATS[format], {}
    for rows_out, columns in dict.fromkeys(shapes):
        inputs = torch.randn(rows, columns, device=device, dtype=dtype)
        options = {"device": device, "dtype": dtype}
        dense = _median(torch.nn.Linear(columns, rows_out, bias=False, **options), inputs)
        limit, ranks = cls.break_even(rows_out, columns, layout), {}
        for rank in range(min(rank_multiple, max(limit - 1, 1)), max(limit, 2), rank_multiple):
            spec = {"format": format, "rank": rank, **({} if layout is None else layout(rows_out, columns, rank))}
            ranks[rank] = _median(cls.from_spec(spec, columns, rows_out, False, **options), inputs)
        found[rows_out, columns] = Times(dense, ranks)
    return Latencies(found, {"device": str(device), "dtype": str(dtype), "format": format, "rows": rows})


@torch.inference_mode()
def _median(layer, inputs):
    """Nanoseconds of one forward pass."""
    times = []
    for _ in range(WARMUP + REPEATS):
        begin = time.perf_counter_ns()
        layer(inputs)
        if inputs.device.type != "cpu":
            torch.accelerator.synchronize(inputs.device)
        times.append(time.perf_counter_ns() - begin)
    return int(statistics.median(times[WARMUP:]))
