"""What the user asks for: method, budget, targets. Plain data, checked when it is made."""

import math
import re
from dataclasses import dataclass, field, fields

import torch

from .allocation import ALLOCATORS
from .checks import check_integer, check_seed, is_integer, is_number
from .errors import ConfigError
from .formats import FORMATS
from .methods import METHODS
from .refine import REFINEMENTS
from .statistics import STATISTICS
from .statistics.base import GRADIENTS


DENSE = "dense"
BUDGETS = ("param_ratio", "target_params", "target_bytes", "rank", "energy")


@dataclass
class Recipe:
    """How to factorize a model.

    Args:
        method (`str`, `dict` or [`Method`], defaults to `"kfac_svd"`): how factors are computed; a registered name,
            `{"name": ..., **options}`, or an instance.
        param_ratio (`float`, *optional*): parameters kept / parameters of the targeted linears, in (0, 1]. Defaults
            to 0.8 where no other budget is given. Biases do not count, except those a method adds. Where `allocation`
            counts latency: time taken / time of the dense linears.
        target_params (`int`, *optional*): parameters the targeted linears may keep, those of `rank_pattern` apart, at
            least 1.
        target_bytes (`int`, *optional*): bytes of the whole model's safetensors files, everything counted; met from
            below, to within one rank step of one weight. Where factors are quantized too, of those before that.
        rank (`int`, *optional*): the same rank for every target; at break-even and above a weight stays dense.
        energy (`float`, *optional*): share of the squared weight, in the method's metric, that every weight keeps at
            least, in (0, 1]; there is no budget then, and `allocation` is not asked.
        rank_pattern (`dict[str, int | "dense"]`, *optional*): module name, dotted suffix or regular expression ->
            rank; wins over every budget. Ratios and `target_params` are of the other weights; `target_bytes` is of
            all. Of weights that a method factorizes as one, a rank for any is the rank of all.
        allocation (`str`, `dict` or [`Allocator`], *optional*): who gets how much of the budget; by default what
            suits the method: `"knapsack"` for `kfac_svd` and `anchored_svd`, whose errors compare between
            layers, else `"uniform"`.
        format (`str`, *optional*): how factors are stored; by default the method's own format, or one that the layer
            can take (experts are always `"low_rank"`, weights that share a factor `"shared_basis"`, those that share
            a dictionary `"dense_sparse"`).
        rank_multiple (`int`, defaults to 8): allocated ranks are multiples of it, at least 1; where a weight or the
            budget has no room for these, of its half, and so on.
        target_modules (`str` or `list[str]`, defaults to `"all-linear"`): every linear but embeddings, output heads
            and tied weights; `"all-layers"`, convolutions too; or a regular expression for full names; or a list of
            names or dotted suffixes.
        exclude_modules (`str` or `list[str]`, *optional*): what to leave dense, by the same rule.
        calibration (*optional*, defaults to `"self"`): where statistics come from, for methods that need them:
            `"self"` (text sampled from the model itself), a data set id, a `.jsonl` or `.txt` file, a list of texts,
            a list of batches or a dataloader, a `.safetensors` file of saved statistics (local, or
            `owner/repository/file.safetensors` on the Hub), a [`Calibration`] with sizes, or `None`.
        refine (`str`, `dict` or [`Refinement`], *optional*): what happens to the factors after they are computed;
            `"blocks"` trains each block to give what the dense one gave, `"logits"` all of them to predict what the
            dense model predicts. Needs calibration data, and the dense model in memory.
        compute_device (`str`, *optional*): where factors are computed; by default where the weight is.
        seed (`int`, defaults to 0): seeds everything that is random, in 0 .. 2**32 - 1.

    Raises:
        ConfigError: a value that is not allowed; the message names argument, value, allowed set and cure.
    """

    method: object = "kfac_svd"
    param_ratio: float | None = None
    target_params: int | None = None
    target_bytes: int | None = None
    rank: int | None = None
    energy: float | None = None
    rank_pattern: dict = field(default_factory=dict)
    allocation: object = None
    format: str | None = None
    rank_multiple: int = 8
    target_modules: object = "all-linear"
    exclude_modules: object = None
    calibration: object = "self"
    refine: object = None
    compute_device: str | None = None
    seed: int = 0

    def __post_init__(self):
        self.method = METHODS.build(self.method)
        self.allocation = ALLOCATORS.build(self.method.allocation if self.allocation is None else self.allocation)
        if self.format is not None:
            FORMATS.listed(self.format)
            if self.method.only_format and self.format != self.method.format:
                raise ConfigError(
                    f"`format`={self.format!r} cannot hold what `method`={self.method.name!r} makes, which is "
                    f"{self.method.format!r}; leave `format` unset, or choose another method."
                )
        if self.refine is not None:
            self.refine = REFINEMENTS.build(self.refine)
            if self.refine.blockwise and self.method.share_layers > 1:
                raise ConfigError(
                    f"`refine`={self.refine.name!r} trains one block after the other, and {self.method.name!r} with "
                    f"share_layers={self.method.share_layers} ties blocks to each other; use share_layers=1, with "
                    "`joint_groups` inside the blocks, or `refine`='logits'."
                )
        self._check_budget()
        self._check_start()
        self._check_first_order()
        self._check_patterns()
        check_integer("rank_multiple", self.rank_multiple, 1)
        check_seed(self.seed)
        if self.compute_device is not None:
            try:
                device = torch.empty(0, device=self.compute_device).device
            except (RuntimeError, AssertionError, TypeError) as error:
                raise ConfigError(f"`compute_device`={self.compute_device!r} cannot be used here: {error}") from error
            if device.type == "meta":
                raise ConfigError("`compute_device`='meta' computes nothing; give one that does, such as 'cpu'.")
            # A torch.device is no JSON, which the recipe of a checkpoint is.
            self.compute_device = str(self.compute_device)

    def _check_budget(self):
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"Give one budget, not {given}; single layers are set apart with `rank_pattern`.")
        if not given:
            self.param_ratio = 0.8
        for name, meaning in (
            ("param_ratio", "the fraction of the targeted parameters that is *kept*; 0.8 makes them 1.25x smaller"),
            ("energy", "the share of the squared weight that every layer keeps at least; 0.9 is a usual value"),
        ):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value <= 1):
                raise ConfigError(f"`{name}`={value!r} must be in (0, 1]: {meaning}.")
        for name in ("target_params", "target_bytes", "rank"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        for name in ("target_params", "target_bytes"):
            if self.allocation.cost == "latency" and getattr(self, name) is not None:
                raise ConfigError(
                    f"`{name}` counts what is stored, and `allocation`={self.allocation.name!r} with cost='latency' "
                    "counts time; give `param_ratio`, which is then the fraction of the dense linears' time."
                )
        if self.target_bytes is not None and self.allocation.needs_latencies:
            raise ConfigError(
                f"`target_bytes` spends what `allocation`={self.allocation.name!r} with rounding='latency' leaves; "
                "give `param_ratio` or `target_params`."
            )

    def _check_start(self):
        if not self.method.initialises:
            return
        for name, given in (
            ("energy", self.energy is not None),
            ("allocation", self.needs_curves or self.needs_probe),
            ("refine", self.refine is not None),
        ):
            if given:
                value = getattr(self, name)
                raise ConfigError(
                    f"`{name}`={getattr(value, 'name', value)!r} compares with the dense weights, which `method`="
                    f"{self.method.name!r} does not approximate but replaces, to train from scratch; leave it out."
                )

    def _check_first_order(self):
        if not self.first_order:
            return
        named = f"`allocation`={self.allocation.name!r} with `method`={self.method.name!r}"
        if not self.method.nested:
            raise ConfigError(
                f"{named}: what a rank more does is known only where the factors at one rank begin with those at a "
                "lower one; use 'whitened_svd' or 'svd', or another allocation."
            )
        losses = {STATISTICS[name].of_labels for name in self.statistics if GRADIENTS in STATISTICS[name].sees}
        if len(losses) > 1:
            raise ConfigError(
                f"{named}: the first reads gradients of the loss on the labels in the data, the second those of "
                "labels drawn from the model, and one pass collects one of them; use method='whitened_svd', or "
                "allocation='knapsack'."
            )

    def _check_patterns(self):
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None and name == "exclude_modules":
                continue
            entries = [value] if isinstance(value, str) else value
            if (
                not isinstance(entries, (list, tuple, set))
                or not entries
                or not all(isinstance(e, str) and e for e in entries)
            ):
                raise ConfigError(
                    f"`{name}`={value!r} must be a regular expression, or a non-empty list of names or suffixes."
                )
            if not isinstance(value, str):
                setattr(self, name, sorted(value) if isinstance(value, set) else list(value))
        if not isinstance(self.rank_pattern, dict):
            raise ConfigError(f"`rank_pattern`={self.rank_pattern!r} must be a dict from module names to ranks.")
        for pattern, rank in self.rank_pattern.items():
            if not isinstance(pattern, str):
                raise ConfigError(f"`rank_pattern` key {pattern!r} must be a module name, a suffix or an expression.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"`rank_pattern` key {pattern!r} is not a regular expression: {error}.") from error
            if rank != DENSE and not is_integer(rank, 1):
                raise ConfigError(
                    f"`rank_pattern`[{pattern!r}]={rank!r} must be an integer of at least 1, or {DENSE!r}."
                )

    @property
    def rank_step(self):
        """What every rank has to be a multiple of, whatever `rank_multiple` is."""
        return 1

    @property
    def needs_statistics(self):
        """Whether the method or the allocator reads calibration statistics."""
        return bool(self.statistics)

    @property
    def statistics(self):
        """Those that the method reads, and those that the allocator does."""
        return tuple(dict.fromkeys((*self.method.statistics, *(self.allocation.statistics if self.allocates else ()))))

    @property
    def first_order(self):
        """Whether ranks depend on the changes of the loss that its gradient predicts."""
        return self.allocates and self.allocation.first_order

    @property
    def allocates(self):
        """Whether the allocator is asked at all."""
        return self.energy is None and self.rank is None

    @property
    def needs_curves(self):
        """Whether ranks depend on the error curves of the weights."""
        return self.energy is not None or (self.allocates and self.allocation.needs_curves)

    @property
    def compares(self):
        """Whether the dense and the compressed model run side by side, for which both have to be in memory."""
        return self.refine is not None or self.method.anchored

    @property
    def samples_kept(self):
        """Calibration sequences that are needed again after statistics are collected."""
        if self.compares:
            return math.inf
        return self.allocation.search_samples if self.needs_probe else 0

    @property
    def needs_probe(self):
        """Whether ranks depend on what the model puts out with some weights factorized."""
        return self.allocates and self.allocation.needs_probe

    @property
    def needs_latencies(self):
        """Whether ranks depend on how fast factorized layers run."""
        return self.allocates and self.allocation.needs_latencies

    def to_json(self):
        """The recipe as plain JSON, defaults included; the calibration is described by whoever resolved it."""
        described = {f.name: getattr(self, f.name) for f in fields(Recipe) if f.name != "calibration"}
        described["method"] = METHODS.describe(self.method)
        described["allocation"] = ALLOCATORS.describe(self.allocation)
        if self.refine is not None:
            described["refine"] = REFINEMENTS.describe(self.refine)
        return {name: value for name, value in described.items() if value is not None and value != {}}
