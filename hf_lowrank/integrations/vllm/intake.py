"""What a checkpoint holds for one layer, taken tensor by tensor and cut on arrival, until its pieces can be made."""

from dataclasses import dataclass, field

import torch

from .errors import ServingError
from .pieces import BIASES, CUTS, cut, make_piece, outputs_of, possible, stored


# vLLM names the parts of a fused attention layer by letters, those of others by number.
LETTERS = {"q": 0, "k": 1, "v": 2}


@dataclass
class Arrivals:
    """What has come for one module.

    Args:
        name (`str`): in the checkpoint.
        spec (`dict`, *optional*): what the checkpoint says of it; `None` if it is dense.
        shard (`str` or `int`, *optional*): what vLLM calls it; known from its first tensor on.
        outputs (`int`, *optional*): of the whole module; known from the first tensor on that tells.
        rows (`torch.Tensor`, *optional*): which of the module's outputs this process has.
        places (`torch.Tensor`, *optional*): where they stand in the output of the layer, consecutive.
        tensors (`dict[str, torch.Tensor]`): cut.
    """

    name: str
    spec: dict | None
    shard: object = None
    outputs: int | None = None
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    tensors: dict = field(default_factory=dict)

    @property
    def bias(self):
        """The bias of a factorized module, cut; `None` without one. vLLM itself loads that of a dense module."""
        return next((self.tensors[leaf] for leaf in BIASES if leaf in self.tensors), None)


class Intake:
    """Takes the tensors of all modules of one layer.

    Args:
        specs (`dict[str, dict | None]`): the modules, in vLLM's order.
        locate (`Callable`): `(outputs of the whole module, shard) -> (rows, places)`, both int64: which outputs of a
            module this process has, and where they stand in the output of the layer.
        in_features (`int`): inputs of the whole layer.
        columns (`slice`): which of them this process has.
    """

    def __init__(self, specs, locate, in_features, columns):
        self.arrivals = [Arrivals(name, spec) for name, spec in specs.items()]
        self.locate = locate
        self.in_features = in_features
        self.columns = columns

    def leaves(self):
        """Every name, in its module, under which a tensor may come, in a fixed order."""
        found = [leaf for arrivals in self.arrivals for leaf in possible(arrivals.spec)]
        return list(dict.fromkeys(found))

    def take(self, leaf, tensor, shard, like):
        """Keep a copy of this process's part of a tensor of the checkpoint.

        Args:
            leaf (`str`): its name in the module.
            tensor (`torch.Tensor`): all of it.
            shard (`str` or `int`, *optional*): vLLM's name of the module among those of the layer.
            like (`torch.Tensor`): has the device and the dtype to keep it in.

        Raises:
            ServingError: a tensor of no module here, or of a shape that the module cannot have.
        """
        arrivals = self._of(shard)
        self._check(arrivals, leaf, tensor)
        arrivals.shard = shard
        outputs = outputs_of(leaf, tensor, arrivals.spec and arrivals.spec["rank"])
        if outputs is not None and arrivals.outputs is None:
            arrivals.outputs = outputs
            arrivals.rows, arrivals.places = self.locate(outputs, shard)
        if outputs not in (None, arrivals.outputs):
            raise ServingError(
                f"{arrivals.name}.{leaf} is of a module with {outputs} outputs, what came before it of one with "
                f"{arrivals.outputs}; download or save the checkpoint again."
            )
        part = cut(leaf, tensor, arrivals.rows, self.columns)
        # Coefficients are cut once the order is known, and wait where they are: there is room for the whole model.
        waits = leaf == "coefficients.weight"
        arrivals.tensors[leaf] = part.clone() if waits else part.to(like.device, like.dtype, copy=True)

    def pieces(self, basis_of):
        """One [`Piece`] for each module, and its [`Arrivals`], in the order of their outputs.

        Args:
            basis_of (`Callable`): gives the basis of a module by its name, for those that borrow it.

        Raises:
            ServingError: something is missing.
        """
        for arrivals in self.arrivals:
            self._check_complete(arrivals)
            if arrivals.rows is None:
                # Of full rank and pivots first: nothing but a basis.
                arrivals.rows, arrivals.places = self.locate(arrivals.spec["rank"], arrivals.shard)
            if arrivals.spec is not None and "basis" in arrivals.spec:
                arrivals.tensors["right.weight"] = basis_of(arrivals.spec["basis"])
        self.arrivals.sort(key=lambda arrivals: int(arrivals.places[0]))
        places = torch.cat([arrivals.places for arrivals in self.arrivals])
        if not torch.equal(places, torch.arange(len(places), device="cpu")):
            raise ServingError(
                f"vLLM interleaves the outputs of {' and '.join(self.names())}, which this plugin cannot; factorize "
                "the model without them (`exclude_modules`)."
            )
        return [(make_piece(one.spec, one.tensors, one.rows), one) for one in self.arrivals]

    def names(self):
        """The modules, by their names in the checkpoint."""
        return [arrivals.name for arrivals in self.arrivals]

    def _of(self, shard):
        index = 0 if shard is None and len(self.arrivals) == 1 else LETTERS.get(shard, shard)
        if not isinstance(index, int) or not 0 <= index < len(self.arrivals):
            raise ServingError(
                f"vLLM loads part {shard!r} of a layer made of {self.names()}, a layout this plugin does not know; "
                "factorize the model without these (`exclude_modules`)."
            )
        return self.arrivals[index]

    def _check(self, arrivals, leaf, tensor):
        spec, name = arrivals.spec, f"{arrivals.name}.{leaf}"
        if leaf not in possible(spec):
            raise ServingError(
                f"The checkpoint holds {name}, which its config does not speak of; download or save it again."
            )
        inputs = tensor.shape[-1] if CUTS[leaf][1] == 1 else self.in_features
        rank = spec and spec["rank"]
        ranks = {"right.weight": 0, "basis.weight": 0, "left.weight": -1, "coefficients.weight": -1}
        if inputs != self.in_features or (leaf in ranks and tensor.shape[ranks[leaf]] != rank):
            raise ServingError(
                f"{name} has shape {tuple(tensor.shape)}, with {self.in_features} inputs and rank {rank}. A model "
                "class of vLLM that rearranges what it loads (as for GPT-2, whose weights lie the other way round) "
                "cannot be served; otherwise download or save the checkpoint again."
            )

    def _check_complete(self, arrivals):
        missing = [leaf for leaf in stored(arrivals.spec) if leaf not in arrivals.tensors]
        pivoted = arrivals.tensors.get("basis.weight")
        if pivoted is not None and arrivals.rows is not None and "coefficients.weight" not in arrivals.tensors:
            rank = arrivals.spec["rank"]
            order = arrivals.tensors.get("order", arrivals.rows)
            missing += ["coefficients.weight"] if len(order) and int(order.max()) >= rank else []
        if missing:
            raise ServingError(
                f"{arrivals.name}.{missing[0]} is not among the weights that vLLM has loaded; download or save the "
                "checkpoint again. (`--load-format dummy` cannot be used.)"
            )
