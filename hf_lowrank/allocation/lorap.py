from dataclasses import dataclass

from ..checks import check_number
from ..errors import ConfigError
from .base import Allocator, register_allocator
from .rounding import largest_within, rank_at


@register_allocator("lorap")
@dataclass(frozen=True)
class Lorap(Allocator):
    r"""Attention's values and outputs keep a multiple of what its queries and keys keep.

        ratio_f / ratio_o = factor,    ratio_f D_f + ratio_o D_o = ratio (D_f + D_o),    ratio_f <= 1

    for the favoured weights (f), of dense cost D_f, and the others (o) beside them; at the cap, the favoured ones stay
    dense. Weights in neither group keep `ratio`, as with `uniform`. For square weights of size d and two factors these
    are the paper's ranks, k_f = min(2 k a / (1 + a), d / 2); costs instead of d serve grouped-query attention too.

    Args:
        favoured (`list[str]`, defaults to `("v_proj", "o_proj")`): names or dotted suffixes of the weights that keep
            more. The defaults are the names most decoders have; others need their own.
        over (`list[str]`, defaults to `("q_proj", "k_proj")`): names or dotted suffixes of those that keep less.
        factor (`float`, defaults to 3.0): how many times the kept fraction, at least 1.

    Raises:
        ConfigError: an option outside its range, or patterns that match none of the weights.

    Reference:
        LoRAP (ICML 2024), its allocation to the attention; its pruning of the feed-forward layers is not part of this.
    """

    favoured: tuple = ("v_proj", "o_proj")
    over: tuple = ("q_proj", "k_proj")
    factor: float = 3.0

    def __post_init__(self):
        check_number("factor", self.factor, 1, owner=self.name)
        for name in ("favoured", "over"):
            value = getattr(self, name)
            names = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
            if not names or not value:
                raise ConfigError(f"`{name}`={value!r} of lorap must be a list of module names or dotted suffixes.")

    def allocate(self, candidates, budget):
        ratio = budget / sum(candidate.dense_cost for candidate in candidates)
        favoured, over = self._matching("favoured", candidates), self._matching("over", candidates)
        high, low = (sum(candidate.dense_cost for candidate in group) for group in (favoured, over))
        share = ratio * (high + low)
        favoured_ratio = min(self.factor * share / (self.factor * high + low), 1.0)
        ratios = {candidate.name: (share - favoured_ratio * high) / low for candidate in over}
        ratios.update({candidate.name: favoured_ratio for candidate in favoured})

        def ranks_at(scale):
            return {c.name: rank_at(c, scale * ratios.get(c.name, ratio)) for c in candidates}

        return largest_within(candidates, ranks_at, budget, 1.0)

    def _matching(self, argument, candidates):
        patterns = getattr(self, argument)
        found = [c for c in candidates if any(c.name == p or c.name.endswith(f".{p}") for p in patterns)]
        if not found:
            raise ConfigError(
                f"`{argument}`={list(patterns)} of lorap matches none of the {len(candidates)} weights that share the "
                f"budget, such as {', '.join(c.name for c in candidates[:4])}; name this model's modules."
            )
        return found
