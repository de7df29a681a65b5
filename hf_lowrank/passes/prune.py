from dataclasses import dataclass

import torch

from ..blocks import block_names, first_calls
from ..checks import check_integer, check_number, is_number
from ..errors import CalibrationError, ConfigError, NonFiniteError, TargetError
from ..formats import DenseLinear
from ..replace import Made, put
from ..statistics.collect import call_arguments, prepared
from ..surgery import all_sites, matches
from ._linears import check_arguments, fixed_parameters, linear_maps, shape_of
from ._trial import Trial, connected, holds


# The statistic of the inputs that the scores read.
STATISTIC = "input_norm"
# What most decoders call the linears of their feed-forward layers.
CHANNEL_GROUPS = ((("gate_proj", "up_proj"), "down_proj"),)


@dataclass(frozen=True)
class ChannelGroup:
    """Linears with channels in common.

    Args:
        producers (`tuple[Site]`): put the channels out.
        consumer ([`Site`]): reads them, after nothing but elementwise operations.
    """

    producers: tuple
    consumer: object

    @property
    def sites(self):
        """All of them."""
        return (*self.producers, self.consumer)


@dataclass(frozen=True)
class Pruning:
    """How many channels go, and which are safe.

    Args:
        param_ratio (`float`): channels kept of those there are, in (0, 1], rounded to the nearest whole number; so
            are parameters of these layers.
        keep_bottom (`float`, defaults to 0.01): the least important channels that are kept all the same, in
            [0, `param_ratio`).
        channel_multiple (`int`, defaults to 1): what the number of channels left is a multiple of, rounded down where
            there are so many.

    Raises:
        ConfigError: a value out of range.
    """

    param_ratio: float
    keep_bottom: float = 0.01
    channel_multiple: int = 1

    def __post_init__(self):
        if not is_number(self.param_ratio) or not 0 < self.param_ratio <= 1:
            raise ConfigError(
                f"`param_ratio`={self.param_ratio!r} must be in (0, 1]: the fraction of the channels that is *kept*."
            )
        check_number("keep_bottom", self.keep_bottom, 0, 1, open_high=True)
        if self.keep_bottom >= self.param_ratio:
            raise ConfigError(
                f"`keep_bottom`={self.keep_bottom} must be below `param_ratio`={self.param_ratio}: of the channels "
                "that are kept, none but the least important would be left; lower it."
            )
        check_integer("channel_multiple", self.channel_multiple, 1)

    def kept(self, scores):
        """The channels that are left, rising, of those with `scores` `(channels,)`; of equal ones the first goes.

        By rising score, the first `keep_bottom` are kept, what follows goes, and the rest is kept, one at least.
        """
        count = max(1, round(self.param_ratio * len(scores)))
        if count >= self.channel_multiple:
            count -= count % self.channel_multiple
        # Rounding may not leave the least important channels alone.
        safe = min(round(self.keep_bottom * len(scores)), count - 1)
        order = scores.sort(stable=True).indices
        return torch.cat([order[:safe], order[len(scores) - count + safe :]]).sort().values


def channel_groups(model, patterns=CHANNEL_GROUPS):
    """The linears of `model` that have channels in common, by name and shape.

    Args:
        model (`torch.nn.Module`): dense where groups are.
        patterns (`list`): pairs of the names or dotted suffixes of linears that put out the channels, and that of the
            one that reads them; those with the same prefix are a group.

    Returns:
        `list[ChannelGroup]`, in the order of the model.

    Raises:
        ConfigError: `patterns` are not such pairs.
        TargetError: no group; a member that is missing, factorized, of another width, tied, or in two groups.
    """
    patterns = _checked(patterns)
    sites = {site.name: site for site in all_sites(model) if site.kind.single}
    modules, fixed, found, taken = dict(model.named_modules()), fixed_parameters(model), [], {}
    for name in modules:
        for producers, consumer in patterns:
            prefix = name[: len(name) - len(consumer)]
            if not matches([consumer], name) or not any(prefix + entry in modules for entry in producers):
                continue
            members = [*(prefix + entry for entry in producers), name]
            for member in members:
                _check_member(member, sites, modules, fixed)
                if member in taken:
                    raise TargetError(
                        f"`channel_groups` puts {member} into two groups, {taken[member]} and {members}."
                    )
                taken[member] = members
            widths = {member: sites[member].out_features for member in members[:-1]}
            widths[name] = sites[name].in_features
            if len(set(widths.values())) > 1:
                raise TargetError(
                    f"`channel_groups` takes linears together that have no channels in common: {widths} of them."
                )
            found.append(ChannelGroup(tuple(sites[member] for member in members[:-1]), sites[name]))
    if not found:
        some = ", ".join(list(sites)[:3]) or "none that is dense"
        raise TargetError(
            f"`channel_groups`={patterns!r} matches no linears of this model, which has {len(sites)}, such as {some}; "
            "name those that put out the channels of a feed-forward layer, and the one that reads them, such as "
            '[[["intermediate.dense"], "output.dense"]].'
        )
    return found


def _checked(patterns):
    good = isinstance(patterns, (list, tuple)) and len(patterns) > 0
    for pattern in patterns if good else ():
        pair = isinstance(pattern, (list, tuple)) and len(pattern) == 2 and isinstance(pattern[1], str) and pattern[1]
        names = pattern[0] if pair and isinstance(pattern[0], (list, tuple)) else ()
        good = good and len(names) > 0 and all(isinstance(name, str) and name for name in names)
    if not good:
        raise ConfigError(
            f"`channel_groups`={patterns!r} must be a list of pairs: names of the linears that put out channels, and "
            'the name of the one that reads them, such as [[["gate_proj", "up_proj"], "down_proj"]].'
        )
    return [[list(producers), consumer] for producers, consumer in patterns]


def _check_member(name, sites, modules, fixed):
    if name not in sites:
        what = "is no dense linear layer" if name in modules else "is not there"
        raise TargetError(
            f"`channel_groups` needs {name}, which {what}; factorize other layers only, with `exclude_modules`, and "
            "prune each group once, or change `channel_groups`."
        )
    if sites[name].weight_name in fixed:
        raise TargetError(f"{name} is tied to another module, whose channels would go too; leave it out.")


def check_flow(model, groups, inputs):
    """Raise unless running `model` on `inputs` shows that the channels of `groups` are read by their consumer alone.

    A change of some channels has to reach the same channels of the consumer's input and no others (a norm in between
    would carry it on), from these producers only; and a permutation that is undone in front of the consumer has to
    leave all that a block puts out unchanged. Needs memory for a float32 copy of one block.

    Args:
        model (`torch.nn.Module`): in memory.
        groups (`list[ChannelGroup]`): of it.
        inputs (`dict`): one batch; a few tokens are enough.

    Raises:
        CalibrationError: `inputs` is no batch, or does not reach a group.
        TargetError: a group whose channels are read otherwise.
        NonFiniteError: a weight of a group, or what a block puts out, holds NaN, of which nothing can be tried.
    """
    check_arguments(model, inputs)
    for group in groups:
        for site in group.sites:
            _check_finite(site, site.kind.weight(model, site))
    blocks = block_names(model, [group.consumer.name for group in groups]) or [""]
    with prepared(model, backward=False):
        calls = first_calls(model, blocks, lambda: model(**call_arguments(model, inputs)))
    for group in groups:
        prefix = next((b for b in blocks if not b or group.consumer.name.startswith(f"{b}.")), None)
        if prefix is None or prefix not in calls:
            raise CalibrationError(
                f"The calibration data does not reach {group.consumer.name}, of whose channels nothing is known then; "
                "leave it out of `channel_groups`, or give data that does."
            )
        cut = len(prefix) + 1 if prefix else 0
        names = [site.name[cut:] for site in group.producers]
        if not _flows(model.get_submodule(prefix), prefix, calls[prefix], names, group.consumer.name[cut:]):
            raise TargetError(
                f"What {', '.join(site.name for site in group.producers)} put out is not read, channel by channel, by "
                f"{group.consumer.name} alone, so that channels cannot be taken away; change `channel_groups`."
            )


def _check_finite(site, tensor):
    if not torch.isfinite(tensor).all():
        raise NonFiniteError(
            f"The weight of {site.name} holds NaN or infinite values; repair it, or leave it out of `channel_groups`."
        )


def _flows(block, name, call, producers, consumer):
    shapes = {name: shape_of(layer) for name, layer in linear_maps(block).items()}
    width = shapes[consumer][1]
    readers = [name for name in shapes if shapes[name][1] == width]
    with torch.no_grad():
        trial = Trial(block, *call, readers)
        before = trial.run()
        # NaN differs from itself, and so would look like a change that reaches everything.
        if any(tensor.isnan().any() for tensor in before[0]):
            raise NonFiniteError(
                f"{name or 'The model'} puts out NaN on the calibration data; repair the weights there, or before it."
            )
        # All that could have a part in these channels, whatever `producers` says.
        possible = [name for name in shapes if shapes[name][0] == width]
        joined = next((g for g in connected(trial, before, possible, shapes) if consumer in g[1]), ([], []))
        order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
        return (
            set(joined[0]) == set(producers)
            and list(joined[1]) == [consumer]
            and holds(trial, before, producers, [consumer], order)
        )


def channel_scores(model, group, statistics):
    r"""How much each channel of a group matters, `(channels,)`, float64.

        s_c = sum_P | |P[c, :]| * |X| |_2 + | |D[:, c]| * |H_c| |_2

    over producers P with inputs X, and for the consumer D with inputs H; `|X|` are the norms of the input channels,
    root mean squares here, which is one factor for all.

    Args:
        model (`torch.nn.Module`): in memory.
        group ([`ChannelGroup`]): of it.
        statistics ([`Statistics`]): with `input_norm` at its linears.

    Raises:
        NonFiniteError: a weight holds NaN or infinity.
    """
    total = 0
    for site in group.sites:
        weight = site.kind.weight(model, site)[0].double()
        norms = statistics.get(site.name, [STATISTIC])[STATISTIC][1].to(weight.device)
        weighed = (weight * norms).square()
        scores = weighed.sum(0 if site is group.consumer else 1).sqrt()
        _check_finite(site, scores)
        total = total + scores.to(total.device if isinstance(total, torch.Tensor) else scores.device)
    return total


def prune_groups(model, groups, statistics, pruning):
    """Take channels away, in place: narrower linears in the place of the groups'.

    Args:
        model (`torch.nn.Module`): in memory, dense where groups are.
        groups (`list[ChannelGroup]`): of it, checked by [`check_flow`].
        statistics ([`Statistics`]): with `input_norm` at their linears.
        pruning ([`Pruning`]): how many go.

    Returns:
        `dict[str, torch.Tensor]`: the channels that are left, by the name of the consumer.

    Raises:
        NonFiniteError: a weight holds NaN or infinity; the model is as it was.
    """
    # All is known before the first layer is touched.
    kept = {group.consumer.name: pruning.kept(channel_scores(model, group, statistics)) for group in groups}
    for group in groups:
        channels = kept[group.consumer.name]
        if len(channels) == group.consumer.in_features:
            continue
        for site in group.sites:
            _narrow(model, site, channels, inputs=site is group.consumer)
    return kept


@torch.no_grad()
def _narrow(model, site, channels, inputs):
    """Put a linear with some of the inputs of `site`, or of its outputs, into its place."""
    weight, bias = site.kind.weight(model, site)[0], site.kind.bias(model, site)
    channels = channels.to(weight.device)
    weight = weight.index_select(1 if inputs else 0, channels).contiguous()
    rows, columns = weight.shape
    spec = {"format": DenseLinear.name, "rank": min(rows, columns), "out_features": rows, "in_features": columns}
    narrowed = None if inputs or bias is None else bias.detach().index_select(0, channels.to(bias.device))
    put(model, site, Made(spec, {f"{site.name}.linear.weight": weight}, narrowed))
