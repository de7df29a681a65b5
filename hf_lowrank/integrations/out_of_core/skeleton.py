"""The model without values between two checkpoints: what is made of what, and saved as what."""

import copy
import logging
import re
from dataclasses import dataclass, field

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...errors import CheckpointError
from ...surgery import specs
from ..checkpoint import Conversions
from ..progress import Progress
from ..quantizer import LowRankQuantizer
from .source import INSTEAD


logger = logging.getLogger(__name__)


@dataclass
class Unit:
    """What is read, worked on and saved together, and with nothing else.

    Args:
        name (`str`): of the first that is made of it.
        conversions (`list[str]`): of [`Conversions`].
        sites (`set[str]`): what becomes factors, by the names of the plan; empty for what is copied.
        saved (`tuple[str]`): the keys it has in the checkpoint that is written.
    """

    name: str
    conversions: list = field(default_factory=list)
    sites: set = field(default_factory=set)
    saved: tuple = ()


class Skeleton:
    """A planned model on the meta device, and the way of every tensor through it.

    Everything is decided and checked here, from names and shapes; only `make` reads values.

    Args:
        source ([`Source`]): the dense checkpoint.
        config ([`LowRankConfig`]): with a session that knows statistics and curves, as far as they are needed.
        work (`str`, *optional*): what will be done, for a progress bar; without, nothing but refuse what cannot work.

    Attributes:
        model (`PreTrainedModel`): with empty factors.
        units (`list[Unit]`): in the order of the model.
        layout (`dict[str, torch.Tensor]`): what is saved, on the meta device, in the order of saving.

    Raises:
        CheckpointError: the checkpoint lacks weights, or cannot be worked on one piece after the other.
    """

    def __init__(self, source, config, work=None):
        self.source = source
        self.model = source.rehearse(config).model
        dense = set(self.model.state_dict())
        # A copy: the quantizer writes into its configuration what the checkpoint will say.
        self.quantizer = LowRankQuantizer(copy.deepcopy(config), pre_quantized=False)
        self.quantizer.build_placeholders(self.model, source.files)
        if work is not None:
            self.quantizer.check_statistics()
        self._conversions = Conversions(self.model, source.keys)
        # What transformers remembers of a load, and saving goes back by.
        self.model._weight_conversions = self._conversions.used
        # Sites whose errors are in the model.
        self._known = set()
        self._warn_of_unexpected()
        doubled = self._tie(dense)
        self.units = self._units(doubled)
        self.layout = self._layout()
        if work is not None:
            self.quantizer.progress = Progress(len(self.plan.sites), work)

    @property
    def plan(self):
        """The [`Plan`] of the model."""
        return self.quantizer.plan

    def _warn_of_unexpected(self):
        known = self.model._keys_to_ignore_on_load_unexpected or ()
        names = [name for name in self._conversions.unexpected if not any(re.search(entry, name) for entry in known)]
        if names:
            logger.warning(
                "%d entries of the checkpoint, such as %s, are no part of a %s and are left out, as loading does.",
                *(len(names), names[0], type(self.model).__name__),
            )

    def _tie(self, dense):
        """Tie what loading would tie; returns what is stored beside the weight that it is tied to."""
        made = {name for conversion in self._conversions.keys for name in self._conversions.names(conversion)}
        tied = self.model.all_tied_weights_keys
        doubled = {target for target, origin in tied.items() if target in made and origin in made}
        for target in doubled:
            if not torch.equal(*(self._read(name) for name in (target, tied[target]))):
                raise CheckpointError(
                    f"The config ties {target} to {tied[target]}, and the checkpoint holds different weights for "
                    "them; set `tie_word_embeddings` in its config.json to what it is."
                )
        missing = (dense - made) | doubled
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        if missing:
            where = self.source.files[0] if len(self.source.files) == 1 else self.source.name
            raise CheckpointError(
                f"{where} does not hold {min(missing)} ({len(missing)} weights are missing), which loading would fill "
                f"with random numbers. Download or save it again; if it is meant to be so, {INSTEAD}."
            )
        return doubled

    def _read(self, name):
        (conversion,) = (c for c in self._conversions.keys if name in self._conversions.names(c))
        return self._conversions.convert(self.model, conversion, self.source.read)[name]

    def _units(self, doubled):
        """Units of conversions; those that a weight, or a group of weights, is made of are in one."""
        placeholders, parent, sites = self.quantizer.placeholders, {}, {}

        def root(name):
            while parent.setdefault(name, name) != name:
                name = parent[name]
            return name

        for conversion in self._conversions.keys:
            names = self._conversions.names(conversion)
            if not doubled.isdisjoint(names):
                continue
            found = {self.plan.unit(placeholders[name][0].name).name for name in names if name in placeholders}
            if found and conversion not in placeholders:
                raise self._entangled(conversion)
            sites[conversion] = found
            for site in found:
                parent[root(site)] = root(conversion)
        units = {}
        for conversion, found in sites.items():
            unit = units.setdefault(root(conversion), Unit(conversion))
            unit.conversions.append(conversion)
            unit.sites |= found
        return list(units.values())

    def _layout(self):
        """All that is saved; every unit learns its part."""
        model = self.model
        left_out = {*self.quantizer.placeholders, *(model._keys_to_ignore_on_save or ())}
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
        state = remove_tied_weights_from_state_dict(state, model)
        whole, apart = revert_weight_conversion(model, state), {}
        for unit in self.units:
            own = revert_weight_conversion(model, {name: state[name] for name in self._parameters(unit, state)})
            unit.saved = tuple(own)
            apart.update(own)
        different = {name for name in {*whole, *apart} if described(whole.get(name)) != described(apart.get(name))}
        if different:
            raise self._entangled(min(different))
        return whole

    def _parameters(self, unit, state):
        """What is in the finished model of all that a unit makes."""
        names = [name for conversion in unit.conversions for name in self._conversions.names(conversion)]
        for member in self._members(unit):
            names.extend(member.kind.stored(self.model, member.name, bias=True))
        return [name for name in names if name in state]

    def _members(self, unit):
        return [member for site in sorted(unit.sites) for member in self.plan.sites[site].members]

    def _entangled(self, name):
        return CheckpointError(
            f"{name} is read or saved together with weights that are factorized apart from it, so that "
            f"{type(self.model).__name__} cannot be worked on piece by piece; {INSTEAD}."
        )

    def convert(self, unit):
        """`{parameter: tensor}` of a unit, factorized or measured."""
        made = {}
        for conversion in unit.conversions:
            made.update(self._conversions.convert(self.model, conversion, self.source.read, self.quantizer))
        return made

    def make(self, unit):
        """`(tensors, errors)`: what a unit is saved as, and the relative error of each of its factorized weights."""
        made = revert_weight_conversion(self.model, self.convert(unit))
        self._known |= unit.sites
        modules = self.quantizer.quantization_config.modules
        errors = {member.name: modules[member.name]["relative_error"] for member in self._members(unit)}
        return {name: made[name] for name in unit.saved}, errors

    def restore(self, errors):
        """Note the errors of weights that are factorized already, by this run or an earlier one."""
        for site in self.plan.sites.values():
            if site.name not in errors or site.name in self._known:
                continue
            self._known.add(site.name)
            self.quantizer.progress.done()
            for member in site.members:
                member.kind.set_error(self.model, member.name, errors[member.name])

    def finish(self):
        """The model as if it were loaded, except for its values; its config describes what is saved."""
        for name in self.quantizer.placeholders:
            owner, _, leaf = name.rpartition(".")
            del self.model.get_submodule(owner)._parameters[leaf]
        self.model.hf_quantizer = self.quantizer
        self.quantizer.quantization_config.modules = specs(self.model)
        self.quantizer.postprocess_model(self.model)
        return self.model


def described(tensor):
    """`(dtype, shape)` of a tensor; `None` of none."""
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape))
