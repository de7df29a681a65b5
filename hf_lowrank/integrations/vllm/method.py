"""How vLLM applies a linear layer of which at least one module is factorized."""

import functools

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase

from .errors import ServingError
from .intake import Intake
from .pieces import CUTS
from .stacked import StackedLinear


class LowRankLinearMethod(LinearMethodBase):
    """One for each layer.

    While vLLM loads, the layer has an empty parameter under every name that the checkpoint may have for it
    (`right.weight`, `order`, ...), whose `weight_loader` hands what comes to an [`Intake`]. Afterwards these make room
    for one [`StackedLinear`]. Which outputs and inputs of a module belong to this process is asked of the layer's own
    `weight_loader`, which is given their numbers to load in the place of a weight.

    Args:
        specs (`dict[str, dict | None]`): the modules of the checkpoint in this layer, in vLLM's order.
        holders (`dict[str, LowRankLinearMethod]`): which method holds the module of a name; shared by all layers of a
            model, so that a module finds the basis that it borrows.
    """

    def __init__(self, specs, holders):
        self.specs = specs
        self.holders = holders
        holders.update(dict.fromkeys(specs, self))
        self.intake = None
        self.factors = None
        self.positions = {}

    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        loader = extra_weight_attrs["weight_loader"]
        columns = slice(0, input_size)
        if input_size_per_partition != input_size:
            columns = _columns(loader, input_size, input_size_per_partition)
        locate = functools.partial(_locate, loader, sum(output_partition_sizes))
        self.intake = Intake(self.specs, locate, input_size, columns)
        for leaf in self.intake.leaves():
            dtype = torch.int32 if leaf == "order" else params_dtype
            door = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            # Model classes that reorder the outputs of a fused projection as they load it look at these.
            for attribute, dimension in zip(("output_dim", "input_dim"), CUTS[leaf], strict=True):
                if dimension is not None:
                    setattr(door, attribute, dimension)
            door.weight_loader = self._loader(leaf)
            owner, _, name = leaf.rpartition(".")
            if owner and not hasattr(layer, owner):
                layer.add_module(owner, nn.Module())
            (layer.get_submodule(owner) if owner else layer).register_parameter(name, door)

    def _loader(self, leaf):
        def weight_loader(param, loaded_weight, loaded_shard_id=None):
            self.intake.take(leaf, loaded_weight, loaded_shard_id, param)

        return weight_loader

    def process_weights_after_loading(self, layer):
        if self.factors is not None:
            return
        found = self.intake.pieces(self._basis_of)
        self.positions = {arrivals.name: position for position, (_, arrivals) in enumerate(found)}
        self.factors = StackedLinear([piece for piece, _ in found])
        self._set_bias(layer, [arrivals for _, arrivals in found])
        for leaf in self.intake.leaves():
            name = leaf.partition(".")[0]
            if hasattr(layer, name):
                delattr(layer, name)
        layer.factors = self.factors
        self.intake = None

    def apply(self, layer, x, bias=None):
        return layer.factors(x, bias)

    def basis(self, name):
        """The basis of one of the modules, cut to this process."""
        if self.factors is not None:
            return self.factors.table(self.positions[name])
        arrivals = next(one for one in self.intake.arrivals if one.name == name)
        return arrivals.tensors.get("right.weight")

    def _basis_of(self, lender):
        basis = self.holders[lender].basis(lender) if lender in self.holders else None
        if basis is None:
            raise ServingError(
                f"{next(iter(self.specs))} borrows the basis of {lender}, which this process has not loaded; serve "
                "the model without pipeline parallelism, or dense (`hf_lowrank.to_dense(model)`)."
            )
        return basis

    def _set_bias(self, layer, arrivals):
        given = [one for one in arrivals if one.bias is not None]
        without = [one for one in arrivals if one.spec is not None and one.bias is None]
        if layer.bias is not None and without:
            raise ServingError(
                f"{without[0].name} has a bias in vLLM and none in the checkpoint; download or save it again."
            )
        if layer.bias is None and given:
            if layer.skip_bias_add:
                raise ServingError(
                    f"{given[0].name} has a bias that the architecture has no place for; factorize with a method that "
                    "adds none (`bias_correction=False`)."
                )
            outputs = sum(len(one.places) for one in arrivals)
            layer.bias = nn.Parameter(given[0].bias.new_zeros(outputs), requires_grad=False)
        for one in given:
            layer.bias.data[one.places.to(layer.bias.device)] = one.bias


def _locate(loader, local_outputs, outputs, shard):
    """Which of a module's `outputs` this process has, and where they stand in the layer.

    What `loader` puts where, if it is given the numbers of the outputs to load.
    """
    numbers = nn.Parameter(torch.full((local_outputs,), -1, device="cpu"), requires_grad=False)
    numbers.output_dim = 0
    _load(loader, numbers, torch.arange(outputs, device="cpu"), *([] if shard is None else [shard]))
    places = (numbers.data >= 0).nonzero().flatten()
    return numbers.data[places], places


def _columns(loader, inputs, local_inputs):
    numbers = nn.Parameter(torch.full((1, local_inputs), -1, device="cpu"), requires_grad=False)
    numbers.input_dim = 1
    _load(loader, numbers, torch.arange(inputs, device="cpu")[None])
    start = int(numbers.data[0, 0])
    return slice(start, start + local_inputs)


def _load(loader, numbers, loaded, *shard):
    try:
        loader(numbers, loaded, *shard)
    except (AssertionError, RuntimeError) as error:
        raise ServingError(
            f"vLLM cannot cut a weight of {loaded.numel()} outputs or inputs into parts of {numbers.numel()} in all: "
            f"{error}. The checkpoint and the config of the model do not agree; download or save it again."
        ) from error
