import math
from contextlib import contextmanager
from dataclasses import dataclass

from ..checks import check_choice, check_integer, check_number
from ..errors import ConfigError, MissingPackageError
from .base import Allocator, register_allocator
from .rounding import largest_within, rank_at


SAMPLERS = ("gp", "tpe")
OBJECTIVES = ("ppl+kl", "kl")


@register_allocator("bayes")
@dataclass(frozen=True)
class Bayes(Allocator):
    r"""One kept fraction for each type of weight, found by Bayesian optimization on what the model puts out.

        min over x of  exp(loss(r)) + kl_weight * KL(r),    r_l = rank at ratio min(1, s x_type(l)),
        s the largest scale at which the budget holds

    The type of a weight is the last part of its module's name (`q_proj`). Every trial factorizes all weights and runs
    the model over the search samples; the first trial is the same fraction for all, so the result is never worse than
    that on these samples. Needs optuna: `pip install "hf-lowrank[search]"`.

    Args:
        n_trials (`int`, defaults to 50): trials, at least 1.
        search_samples (`int`, defaults to 32): calibration sequences that every trial is judged by, at least 1.
        objective (`str`, defaults to `"ppl+kl"`): perplexity and divergence from the dense model, or `"kl"`, the
            divergence alone, for models without a loss.
        kl_weight (`float`, defaults to 1e-3): weight of the divergence beside the perplexity, at least 0.
        least_ratio (`float`, defaults to 0.2): lower bound of x, in (0, 1); its upper bound is 1.
        initial (`dict[str, float]`, *optional*): a first guess of x, by type; types that are missing are drawn.
        sampler (`str`, defaults to `"gp"`): `"gp"`, a Gaussian process, or `"tpe"`, Parzen estimators.

    Raises:
        ConfigError: an option outside its range, or a type in `initial` that no weight has.
        MissingPackageError: optuna is not installed.

    Reference:
        Bolaco (2405.10616, EMNLP Findings 2024). Differs: its trials may keep up to 0.1 less than the budget, while
        here the ratios of a trial are scaled to the budget, so that none is infeasible; no type is kept dense by hand.
    """

    needs_probe = True
    n_trials: int = 50
    search_samples: int = 32
    objective: str = "ppl+kl"
    kl_weight: float = 1e-3
    least_ratio: float = 0.2
    initial: dict | None = None
    sampler: str = "gp"

    def __post_init__(self):
        check_integer("n_trials", self.n_trials, 1, self.name)
        check_integer("search_samples", self.search_samples, 1, self.name)
        check_choice("objective", self.objective, OBJECTIVES, self.name)
        check_choice("sampler", self.sampler, SAMPLERS, self.name)
        check_number("kl_weight", self.kl_weight, 0, owner=self.name)
        check_number("least_ratio", self.least_ratio, 0, 1, self.name, open_low=True, open_high=True)
        if self.initial is not None and not isinstance(self.initial, dict):
            raise ConfigError(f"`initial`={self.initial!r} of bayes must be a dict, from types of weights to ratios.")
        for kind, value in (self.initial or {}).items():
            check_number(f"initial[{kind!r}]", value, self.least_ratio, 1, self.name)
        _optuna()

    def check(self, candidates):
        types = _types(candidates)
        unknown = sorted(set(self.initial or ()) - set(types))
        if unknown:
            raise ConfigError(f"`initial` of bayes names {unknown}, but the types of the weights are {types}.")

    def allocate(self, candidates, budget, probe):
        optuna = _optuna()
        self.check(candidates)
        types = _types(candidates)
        samplers = {"gp": optuna.samplers.GPSampler, "tpe": optuna.samplers.TPESampler}
        seen = {}
        with _quiet(optuna):
            study = optuna.create_study(sampler=samplers[self.sampler](seed=probe.seed))
            study.enqueue_trial(dict.fromkeys(types, 1.0))
            if self.initial:
                study.enqueue_trial(self.initial)
            for _ in range(self.n_trials):
                trial = study.ask()
                weights = {kind: trial.suggest_float(kind, self.least_ratio, 1.0) for kind in types}
                ranks = _scaled(candidates, weights, budget)
                key = tuple(ranks.values())
                if key not in seen:
                    seen[key] = self._value(ranks, probe), ranks
                study.tell(trial, seen[key][0])
        return min(seen.values(), key=lambda found: found[0])[1]

    def _value(self, ranks, probe):
        factorized = {name: rank for name, rank in ranks.items() if rank is not None}
        divergence = probe.divergence(factorized)
        if self.objective == "kl":
            return divergence
        # The exponential of a larger loss is no number any more; the order of such trials does not matter.
        return math.exp(min(probe.loss(factorized), 700.0)) + self.kl_weight * divergence


def _types(candidates):
    return sorted({_type(candidate) for candidate in candidates})


def _type(candidate):
    return candidate.name.rpartition(".")[2]


def _scaled(candidates, weights, budget):
    """Ranks at the largest common multiple of the types' ratios that fits the budget."""

    def ranks_at(scale):
        return {c.name: rank_at(c, scale * weights[_type(c)]) for c in candidates}

    return largest_within(candidates, ranks_at, budget, 1 / min(weights.values()))


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError(
            "`allocation`='bayes' needs optuna: `pip install \"hf-lowrank[search]\"`; 'lems' and 'knapsack' do not."
        ) from error
    return optuna


@contextmanager
def _quiet(optuna):
    """optuna reports every trial on its own logger; the progress bar does so here."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
