"""Several weights factorized as one: which they are, and how they are taken apart again."""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from .blocks import block_names
from .errors import ConfigError, TargetError
from .formats import DenseSparseLinear, SharedBasisLinear
from .kinds import LinearKind, Site
from .surgery import all_sites, matches


@dataclass(frozen=True)
class Group(Site):
    """Sites whose weights, stacked along out, are factorized as one; it has the name of the first, which lends.

    Args:
        members (`tuple[Site]`): in the order in which their weights are stacked.
    """

    members: tuple = ()


class GroupKind(LinearKind):
    """How a [`Group`] is read and written: member by member.

    Args:
        members (`tuple[Site]`): as in the group.
    """

    single = False
    formats = (SharedBasisLinear.name, DenseSparseLinear.name)
    # A shift belongs to one bias.
    takes_shift = False

    def __init__(self, members):
        super().__init__(None)
        self.members = members

    def weight_name(self, name):
        return self.members[0].weight_name

    def weight(self, model, site):
        return self.joined([member.kind.weight(model, member) for member in self.members])

    def joined(self, weights):
        return torch.cat([weight.to(weights[0].device) for weight in weights], dim=1)

    def parts(self, site, factors):
        (joint,) = factors
        lefts = joint.left.split([member.out_features for member in self.members])
        return [(member, [replace(joint, left=left)]) for member, left in zip(self.members, lefts, strict=True)]


def group_sites(model, sites, method):
    """What is factorized as one, by the options of the method.

    Args:
        model (`torch.nn.Module`): dense; may be on the meta device.
        sites (`list[Site]`): the targets.
        method ([`Method`]): `joint_groups` and `share_layers`.

    Returns:
        `list[Site]`: sites that are in no group, and [`Group`]s in the place of their first members.

    Raises:
        TargetError: an entry of `joint_groups` that matches no linear, a group without two linears beside each other
            anywhere in the model, or linears that cannot share a basis.
        ConfigError: a linear that is in two groups.
    """
    _check_entries(model, method.joint_groups)
    units = _join(sites, method.joint_groups)
    _check_neighbours(model, method.joint_groups)
    units = _share_layers(model, units, method.share_layers)
    return [unit[0] if len(unit) == 1 else _group(model, unit) for unit in units]


def _check_entries(model, groups):
    names = [site.name for site in all_sites(model) if site.kind.single] if groups else []
    for entry in (entry for group in groups for entry in group):
        if not any(matches([entry], name) for name in names):
            raise TargetError(
                f"`joint_groups` names {entry!r}, which matches no linear layer; the model has {len(names)}, such as "
                f"{', '.join(names[:3])}."
            )


def _check_neighbours(model, groups):
    # Of all linears: what is left out of the targets may take a group apart.
    names = [site.name for site in all_sites(model) if site.kind.single] if groups else []
    for group in groups:
        found = {entry: [name for name in names if matches([entry], name)] for entry in group}
        parents = Counter(_parent(name, entry) for entry in group for name in found[entry])
        if max(parents.values()) < 2:
            some = ", ".join(entries[0] for entries in found.values())
            raise TargetError(
                f"`joint_groups` takes {list(group)} together, of which no two stand beside each other anywhere in "
                f"this model ({some}), so that nothing would be shared; a group is of linears in one module that read "
                "one input, such as ['q_proj', 'k_proj', 'v_proj']."
            )


def _parent(name, entry):
    return name[: len(name) - len(entry)]


def _join(sites, groups):
    """Lists of sites; those of one pattern and one parent in one list."""
    units = {}
    for site in sites:
        found = [
            (index, _parent(site.name, entry), position)
            for index, group in enumerate(groups)
            for position, entry in enumerate(group)
            if site.kind.single and matches([entry], site.name)
        ]
        if len(found) > 1:
            raise ConfigError(f"`joint_groups` names {site.name} {len(found)} times; a weight can be in one group.")
        key, position = (found[0][:2], found[0][2]) if found else (site.name, 0)
        units.setdefault(key, []).append((position, site))
    return [[site for _, site in sorted(unit, key=lambda entry: entry[0])] for unit in units.values()]


def _share_layers(model, units, count):
    """Units of `count` neighbouring blocks in one, where names and shapes agree."""
    if count == 1:
        return units
    blocks = block_names(model, [site.name for unit in units for site in unit])
    alike, merged = {}, []
    for unit in units:
        key = _key(model, unit, blocks)
        if key is None:
            merged.append(unit)
            continue
        neighbours = alike.setdefault(key, [])
        if not neighbours or len(neighbours[-1]) == count * len(unit):
            neighbours.append([])
            merged.append(neighbours[-1])
        neighbours[-1].extend(unit)
    return merged


def _key(model, unit, blocks):
    """What units have in common that may share a basis; `None` for one that is in no block, or in several."""
    block = next((b for b in blocks if all(site.name.startswith(f"{b}.") for site in unit)), None)
    if block is None or not all(site.kind.single for site in unit):
        return None
    shapes = tuple(
        (site.name.removeprefix(block), site.out_features, site.in_features, _dtype(model, site)) for site in unit
    )
    return block.rpartition(".")[0], shapes


def _group(model, unit):
    first = unit[0]
    for site in unit[1:]:
        if site.in_features != first.in_features or _dtype(model, site) != _dtype(model, first):
            raise TargetError(
                f"{first.name} ({first.in_features} inputs, {_dtype(model, first)}) and {site.name} "
                f"({site.in_features} inputs, {_dtype(model, site)}) cannot share a basis; change `joint_groups`."
            )
    members = tuple(unit)
    rows = sum(site.out_features for site in members)
    bias = all(site.bias for site in members)
    return Group(first.name, GroupKind(members), rows, first.in_features, bias, members=members)


def _dtype(model, site):
    return model.get_parameter(site.weight_name).dtype
