"""The design space of low rank: which blocks, which projections, which ranks, and what each choice costs."""

import copy
import csv
import json
import os
import re
from dataclasses import asdict, dataclass, field

from ..blocks import block_names
from ..checks import is_integer
from ..errors import CheckpointError, ConfigError, TargetError
from ..files import write_json, writing
from ..integrations import LowRankConfig, factorize
from ..provenance import environment
from ..reporting import summary
from ..reporting.table import aligned
from ..surgery import match_sites, matches


ALL = "all"
SPREAD = re.compile(r"spread:([1-9]\d*)")


@dataclass(frozen=True)
class SweepPoint:
    """One choice: these projections of these blocks become factors of this rank.

    Args:
        rank (`int`): of every factorized weight, at least 1; a weight that it would not make smaller stays dense.
        layers (`str` or `list[int]`, defaults to `"all"`): indices of blocks; `"all"`; or `"spread:3"`, the middles of
            three equal parts.
        modules (`list[str]`, *optional*): names or dotted suffixes of linears; all of a block by default.

    Raises:
        ConfigError: a value that is not allowed.
    """

    rank: int
    layers: object = ALL
    modules: object = None

    def __post_init__(self):
        if not is_integer(self.rank, 1):
            raise ConfigError(f"`rank`={self.rank!r} of a SweepPoint must be an integer of at least 1.")
        if isinstance(self.layers, (list, tuple)) and self.layers and all(is_integer(i, 0) for i in self.layers):
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        elif self.layers != ALL and not (isinstance(self.layers, str) and SPREAD.fullmatch(self.layers)):
            raise ConfigError(
                f"`layers`={self.layers!r} of a SweepPoint must be {ALL!r}, 'spread:3' or with another number, or a "
                "list of block indices from 0."
            )
        if self.modules is not None:
            if not isinstance(self.modules, (list, tuple)) or not all(isinstance(m, str) and m for m in self.modules):
                raise ConfigError(f"`modules`={self.modules!r} of a SweepPoint must be a list of names or suffixes.")
            object.__setattr__(self, "modules", tuple(self.modules))

    def indices(self, count):
        """The blocks it means, of `count`, rising.

        Raises:
            TargetError: more of them than there are.
        """
        if self.layers == ALL:
            return tuple(range(count))
        if isinstance(self.layers, tuple):
            found = self.layers
        else:
            parts = int(SPREAD.fullmatch(self.layers)[1])
            found = tuple((2 * part + 1) * count // (2 * parts) for part in range(parts))
        if len(found) > count or found[-1] >= count:
            raise TargetError(f"`layers`={self.layers!r} of a SweepPoint exceeds the {count} blocks of the model.")
        return found


@dataclass(frozen=True)
class SweepRow:
    """What one choice came to.

    Args:
        rank (`int`): as asked for.
        layers (`list[int]`): the blocks.
        modules (`list[str]`, *optional*): the projections; `None` for all.
        matrices (`int`): weights that became factors.
        kept (`float`): parameters of the whole model / those of the dense one.
        score (`float`): what was measured.
    """

    rank: int
    layers: list
    modules: list | None
    matrices: int
    kept: float
    score: float

    @property
    def key(self):
        """What tells it from other choices."""
        return self.rank, tuple(self.layers), None if self.modules is None else tuple(self.modules)


@dataclass
class Sweep:
    """A tidy table, one row a choice; `print` shows it.

    Args:
        dense (`float`): the score of the dense model.
        rows (`list[SweepRow]`): in the order in which they were measured.
        about (`dict`): JSON that says what was measured, from whoever asked.
        environment (`dict`): versions and processor.
    """

    dense: float
    rows: list
    about: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict, repr=False)

    def find(self, point, count):
        """The row of a [`SweepPoint`] in a model of `count` blocks, or `None`."""
        key = point.rank, point.indices(count), point.modules
        return next((row for row in self.rows if row.key == key), None)

    def to_json(self):
        """Everything as plain JSON."""
        return asdict(self)

    def save(self, path):
        """Write the table to `path`: rows alone if that ends in `.csv`, else everything, as JSON."""
        if not os.fspath(path).endswith(".csv"):
            write_json(path, self.to_json())
            return
        with writing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(SweepRow.__dataclass_fields__)
            for row in self.rows:
                modules = "all" if row.modules is None else " ".join(row.modules)
                layers = " ".join(map(str, row.layers))
                writer.writerow([row.rank, layers, modules, row.matrices, row.kept, row.score])

    def __str__(self):
        cells = [
            (
                str(row.rank),
                ", ".join(map(str, row.layers)),
                "all" if row.modules is None else ", ".join(row.modules),
                str(row.matrices),
                f"{row.kept:.1%}",
                f"{row.score:.4g}",
            )
            for row in self.rows
        ]
        lines = aligned([("rank", "blocks", "projections", "matrices", "kept", "score"), *cells])
        return "\n".join([*lines, f"dense: {self.dense:.4g}"])


def sweep(model, points, measure, method="tucker", calibration=None, path=None, about=None, on_row=None):
    """Factorize copies of a model, one choice at a time, and measure each.

    Args:
        model (`torch.nn.Module`): dense, in memory; it is left alone, and there is a copy of it beside it.
        points (`list[SweepPoint]`): the choices; of two that mean the same, one is measured.
        measure (`Callable[[torch.nn.Module], float]`): a score of a model.
        method (`str` or [`Method`], defaults to `"tucker"`): how factors are computed.
        calibration (*optional*): as for [`factorize`]; [`Statistics`] collected once are best.
        path (`str`, *optional*): a JSON file that is written after every measurement, and from which a sweep goes on
            that was interrupted.
        about (`dict`, *optional*): JSON that says what is measured; a file of other facts is refused.
        on_row (`Callable[[SweepRow], None]`, *optional*): called after every measurement.

    Returns:
        [`Sweep`].

    Raises:
        ConfigError, TargetError: a choice that does not fit the model, or a `path` that is no JSON file, before
            anything is measured.
        CheckpointError: `path` was measured with other facts, or holds something else.

    Reference:
        The design space of Moar et al., 2405.06626: rank, layers, tensors. Differs: any method, and any score.
    """
    if path is not None and os.fspath(path).endswith(".csv"):
        raise ConfigError(
            f"`path`={os.fspath(path)!r} is to be a JSON file, from which a sweep can go on; save the table that is "
            "returned as CSV."
        )
    sides = {site.name: min(site.out_features, site.in_features) for site in match_sites(model)}
    names = list(sides)
    blocks = block_names(model, names)
    chosen = {}
    for point in points:
        indices = point.indices(len(blocks))
        chosen[point.rank, indices, point.modules] = _targets(point, names, [blocks[index] for index in indices])
    recipe = LowRankConfig(method=method, rank=1, calibration=None)
    about = {**(about or {}), "method": recipe.to_json()["method"]}
    found = _opened(path, about)
    if found is None:
        found = Sweep(float(measure(model)), [], about)
    there = {row.key for row in found.rows}
    for key, targets in chosen.items():
        if key in there:
            continue
        rank, indices, modules = key
        targets = [name for name in targets if rank <= sides[name]]
        made = model
        if targets:
            config = LowRankConfig(method=method, rank=rank, target_modules=targets, calibration=None)
            made = factorize(copy.deepcopy(model), config, calibration)
        table = summary(made)
        kept = table.parameters / table.dense_parameters
        row = SweepRow(rank, list(indices), modules and list(modules), len(table.rows), kept, float(measure(made)))
        del made
        found.rows.append(row)
        found.environment = environment()
        if path is not None:
            found.save(path)
        if on_row is not None:
            on_row(row)
    return found


def _targets(point, names, blocks):
    """Full names of the linears that a point means."""
    inside = [name for name in names if any(name.startswith(f"{block}.") for block in blocks)]
    for module in point.modules or ():
        if not any(matches([module], name) for name in inside):
            raise TargetError(
                f"`modules` of a SweepPoint names {module!r}, which matches no linear of its {len(blocks)} blocks; "
                f"they have {len(inside)}, such as {', '.join(inside[:3]) or 'none at all'}."
            )
    found = [name for name in inside if point.modules is None or matches(point.modules, name)]
    if not found:
        raise TargetError("The model has no repeated blocks with linear layers, so that there is nothing to sweep.")
    return found


def _opened(path, about):
    """The sweep in a file, or `None` where there is none."""
    if path is None or not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        rows = [SweepRow(**row) for row in found["rows"]]
        before, dense, made_with = found["about"], found["dense"], found["environment"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"`path`={os.fspath(path)!r} holds no sweep ({type(error).__name__}: {error}); give another path."
        ) from error
    if before != about:
        raise CheckpointError(
            f"`path`={os.fspath(path)!r} holds a sweep of {before}, and this one is of {about}; give another path, or "
            "remove it to measure again."
        )
    return Sweep(dense, rows, about, made_with)
