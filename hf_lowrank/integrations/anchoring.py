"""Block after block, each weight factorized on what the compressed model in front of it puts out."""

import logging
from contextlib import ExitStack

from ..blocks import Chain, block_names, find_chains, record
from ..errors import CalibrationError
from ..replace import put
from ..statistics.collect import call_arguments, prepared
from ..statistics.cross_gram import CrossGram
from ..statistics.input_gram import InputGram
from ..statistics.masks import UNALIGNED, Masks
from .progress import bar
from .twin import twin_of


logger = logging.getLogger(__name__)


class _Read(Exception):  # noqa: N818 (nothing went wrong)
    """Ends a block as soon as the input of a linear is known."""


def anchored(model, plan, make, batches):
    """Factors of everything in `plan`, made in the order in which the model runs.

    Args:
        model (`torch.nn.Module`): dense, in memory; left as it is.
        plan ([`Plan`]): what is factorized.
        make (`Callable[[Site, dict | None], dict[str, Made]]`): the factors of one weight or group, by member; given
            what the comparison of the two models says about its inputs.
        batches (`list[dict]`): calibration data.

    Returns:
        `dict[str, Made]`: by member.

    Raises:
        ResourceError: the model is split over processes.
        CalibrationError: padding cannot be told from tokens.
    """
    members = list(plan.members.values())
    names = block_names(model, [site.name for site in members])
    twin = twin_of(model)
    made = {}
    with ExitStack() as stack:
        for one in (model, twin):
            stack.enter_context(prepared(one, False))
        walk = _Walk(model, twin, plan, batches)
        for name in bar(walk.blocks(names), "Anchoring"):
            for units in walk.stages(name):
                anchors = walk.compare(name, units[0])
                for unit in units:
                    found = make(unit, anchors)
                    made.update(found)
                    for member in unit.members:
                        put(twin, member, found[member.name])
            walk.advance(name)
    plain = [unit for unit in plan.sites.values() if unit.name not in made]
    if plain:
        logger.warning(
            "%d weights, such as %s, are factorized without an anchor: they are in no repeated block, run more than "
            "once in it, or are experts.",
            len(plain),
            plain[0].name,
        )
    for unit in plain:
        made.update(make(unit, None))
    return made


class _Walk:
    """The dense model and its twin, at the same block."""

    def __init__(self, model, twin, plan, batches):
        self.model = model
        self.twin = twin
        self.units = list(plan.sites.values())
        self.batches = [call_arguments(model, batch) for batch in batches]
        self._chain = {}

    def blocks(self, names):
        """The blocks in the order in which they run; what enters a chain is recorded when it begins."""
        if not names:
            return
        chains = find_chains(self.model, names, self._runs(self.model)[0], "use 'kfac_svd'")
        for chain in chains:
            source, compressed = (record(one, Chain(chain.names), self._runs(one)) for one in (self.model, self.twin))
            for name in chain.names:
                self._chain = {"model": source, "twin": compressed}
                yield name

    def _runs(self, model):
        return [lambda batch=batch: model(**batch) for batch in self.batches]

    def stages(self, name):
        """The units inside the block, in the order in which they run, those that read the same tensor together."""
        inside = {
            unit.members[0].name: unit
            for unit in self.units
            if unit.copies == 1 and all(member.name.startswith(f"{name}.") for member in unit.members)
        }
        order = []
        with ExitStack() as stack:
            for unit in inside.values():
                first = unit.members[0]
                stack.enter_context(
                    first.kind.watch(self.model, [first], lambda site, x, *_: order.append((site, x, x._version)))
                )
            self._call(self.model, name, 0)
        seen = [site for site, _, _ in order]
        found, last = [], None
        for site, tensor, version in order:
            if seen.count(site) > 1:
                continue
            if last is None or tensor is not last[0] or version != last[1]:
                found.append([])
            last = tensor, version
            found[-1].append(inside[site])
        return found

    def compare(self, name, unit):
        """`compressed_gram` and `cross_gram` at the input of `unit`."""
        site, masks = unit.members[0], Masks(self.model)
        gram = cross = None
        for index, batch in enumerate(self.batches):
            masks.start_batch(batch)
            dense, compressed = (self._input(one, name, site, index) for one in (self.model, self.twin))
            rows = masks.chooser(site.name, dense)
            if rows is UNALIGNED:
                raise CalibrationError(
                    f"The inputs of {site.name} cannot be matched with the attention mask, so that padding would "
                    "count; calibrate without padding (equal lengths), or leave it out with `exclude_modules`."
                )
            dense, compressed = (x.reshape(-1, x.shape[-1]) for x in (dense, compressed))
            if rows is not None:
                dense, compressed = (x[rows.to(x.device)] for x in (dense, compressed))
            if gram is None:
                gram, cross = (kind(dense.shape[-1], dense.device) for kind in (InputGram, CrossGram))
            gram.update(compressed)
            cross.update(dense, compressed.to(dense.device))
        return {"compressed_gram": gram.result(), "cross_gram": cross.result()}

    def _input(self, model, name, site, index):
        """What `site` reads in one batch."""
        found = []

        def observe(_, inputs, *rest):
            found.append(inputs)
            raise _Read

        with site.kind.watch(model, [site], observe):
            try:
                self._call(model, name, index)
            except _Read:
                pass
        return found[0]

    def _call(self, model, name, index):
        chain = self._chain["model" if model is self.model else "twin"]
        return chain.calls[index][name](model.get_submodule(name), chain.inputs[index])

    def advance(self, name):
        """Go on to the next block in both models."""
        for key, model in (("model", self.model), ("twin", self.twin)):
            self._chain[key].advance(model.get_submodule(name), name)
