"""The design space of low rank: which blocks, which projections, which ranks, and what each choice costs."""

import copy
import csv
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from ..blocks import block_names
from ..checks import is_integer
from ..errors import CheckpointError, ConfigError, TargetError
from ..files import write_json, writing
from ..integrations import LowRankConfig, factorize
from ..integrations.verbs import refuse_offloaded, refuse_quantized
from ..linalg import require_finite
from ..plan import make_plan
from ..provenance import environment
from ..reporting import summary
from ..reporting.table import aligned
from ..statistics import Statistics
from ..surgery import factorized, match_sites, matches
from .output import check_output
from .swept import as_plain, checked, collected, facts_of


ALL = "all"
SPREAD = re.compile(r"spread:([1-9]\d*)")


@dataclass(frozen=True)
class SweepPoint:
    """One choice: these projections of these blocks become factors of this rank.

    Args:
        rank (`int`): of every factorized weight, at least 1; a weight that it would not make smaller stays dense.
        layers (`str` or `list[int]`, defaults to `"all"`): indices of blocks; `"all"`; or `"spread:3"`, the middles of
            three equal parts.
        modules (`list[str]`, *optional*): names or dotted suffixes of linears, in any order, at least one; all of a
            block by default.

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
            named = isinstance(self.modules, (list, tuple)) and all(isinstance(m, str) and m for m in self.modules)
            if not named or not self.modules:
                raise ConfigError(
                    f"`modules`={self.modules!r} of a SweepPoint must be a list of names or suffixes, at least one, "
                    "or None for all linears of a block."
                )
            object.__setattr__(self, "modules", tuple(sorted(set(self.modules))))

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
        modules = None if self.modules is None else tuple(sorted(set(self.modules)))
        return self.rank, tuple(self.layers), modules


@dataclass
class Sweep:
    """A tidy table, one row a choice; `print` shows it.

    Args:
        dense (`float`): the score of the dense model.
        rows (`list[SweepRow]`): in the order in which they were measured.
        about (`dict`): JSON that says what was measured, from whoever asked.
        environment (`dict`): versions and processor.
        facts (`dict`): JSON that says of which model and calibration data, from the library.
    """

    dense: float
    rows: list
    about: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict, repr=False)
    facts: dict = field(default_factory=dict, repr=False)

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
        points (`list[SweepPoint]`): the choices; of two with the same rank, blocks and modules, one is measured.
        measure (`Callable[[torch.nn.Module], float]`): a score of a model.
        method (`str` or [`Method`], defaults to `"tucker"`): how factors are computed.
        calibration (*optional*): as for [`factorize`], for methods that need it: statistics of all choices are
            collected once, in memory unless it is a [`Calibration`] with a `folder`, or given as [`Statistics`].
        path (`str`, *optional*): a JSON file in a folder that is there; it is written after every measurement, and
            from it goes on a sweep that was interrupted.
        about (`dict`, *optional*): JSON that says what is measured. A file of other facts is refused: these, the
            method, the model (class, name, dtype, names and shapes of its linears) and the calibration data. Of two
            models that differ in the values of their weights only, the name has to tell.
        on_row (`Callable[[SweepRow], None]`, *optional*): called after every measurement.

    Returns:
        [`Sweep`].

    Raises:
        ConfigError, TargetError, RankError: a choice that does not fit the model, a model that cannot be factorized,
            an `about` that is no JSON, or a `path` that cannot be written; before anything is measured, as the next
            ones.
        CalibrationError, StatisticsError: calibration data that the method cannot do with.
        NonFiniteError: a weight that holds NaN or infinity.
        CheckpointError: `path` was measured with other facts, or holds something else.

    Reference:
        The design space of Moar et al., 2405.06626: rank, layers, tensors. Differs: any method, and any score.
    """
    if path is not None and os.fspath(path).endswith(".csv"):
        raise ConfigError(
            f"`path`={os.fspath(path)!r} is to be a JSON file, from which a sweep can go on; save the table that is "
            "returned as CSV."
        )
    if path is not None:
        check_output(path, "`path`")
    about = _given(about)
    points = _listed(points)
    if factorized(model):
        raise ConfigError("The model is factorized already; call hf_lowrank.to_dense(model) first.")
    refuse_quantized(model)
    refuse_offloaded(model)
    sides = {site.name: min(site.out_features, site.in_features) for site in match_sites(model)}
    names = list(sides)
    blocks = block_names(model, names)
    chosen = {}
    for point in points:
        indices = point.indices(len(blocks))
        chosen[point.rank, indices, point.modules] = _targets(point, names, [blocks[index] for index in indices])
    recipe = LowRankConfig(method=method, rank=1, calibration=None)
    about["method"] = as_plain(recipe.to_json()["method"], "method")
    calibration, described = checked(model, recipe, calibration)
    configs, members = {}, {}
    for key, targets in chosen.items():
        targets = [name for name in targets if key[0] <= sides[name]]
        if targets:
            configs[key] = LowRankConfig(method=method, rank=key[0], target_modules=targets, calibration=None)
        members[key] = _planned(model, configs[key], calibration) if targets else {}
    for site in {name: site for planned in members.values() for name, site in planned.items()}.values():
        require_finite(site.kind.weight(model, site), f"The weight of {site.name}")
    facts = facts_of(model, described)
    found = _opened(path, about, facts)
    there = set() if found is None else {row.key for row in found.rows}
    needed = {name for key, planned in members.items() if key not in there for name in planned}
    if needed:
        calibration = collected(model, needed, recipe, calibration)
    if found is None:
        found = Sweep(float(measure(model)), [], about, environment(), facts)
        if path is not None:
            found.save(path)
    for key, planned in members.items():
        if key in there:
            continue
        rank, indices, modules = key
        made = factorize(copy.deepcopy(model), configs[key], calibration) if planned else model
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


def _given(about):
    """A copy of `about` as it comes back from a file."""
    if about is not None and not isinstance(about, dict):
        raise ConfigError(f"`about`={about!r:.200} must be a dict that says what is measured, or None.")
    return as_plain(about or {}, "about")


def _listed(points):
    """`points` as a list."""
    listed = list(points) if isinstance(points, Iterable) else [points]
    if not isinstance(points, Iterable) or not all(isinstance(point, SweepPoint) for point in listed):
        raise ConfigError(f"`points`={points!r:.200} must be a list of SweepPoint, such as [SweepPoint(8)].")
    return listed


def _planned(model, config, calibration):
    """`{name: site}` of what becomes factors; refuses what cannot."""
    plan = make_plan(model, config)
    if isinstance(calibration, Statistics):
        calibration.check(plan.statistics_shapes(config.statistics))
    return plan.members


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


def _opened(path, about, facts):
    """The sweep in a file, or `None` where there is none."""
    if path is None or not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        rows = [SweepRow(**row) for row in found["rows"]]
        before, dense, made_with = found["about"], found["dense"], found["environment"]
        # Without facts, nothing says which model the file is of.
        others = dict(found.get("facts", {}))
        hash(tuple(row.key for row in rows))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"`path`={os.fspath(path)!r} holds no sweep ({type(error).__name__}: {error}); give another path."
        ) from error
    if before != about:
        raise CheckpointError(
            f"`path`={os.fspath(path)!r} holds a sweep of {before}, and this one is of {about}; give another path, or "
            "remove it to measure again."
        )
    different = sorted(name for name in {*others, *facts} if others.get(name) != facts.get(name))
    if different:
        raise CheckpointError(
            f"`path`={os.fspath(path)!r} holds a sweep of another model or other calibration data: it says "
            f"{ {name: others.get(name) for name in different} }, and this one is of "
            f"{ {name: facts.get(name) for name in different} }; give another path, or remove it to measure again."
        )
    return Sweep(dense, rows, about, made_with, facts)
