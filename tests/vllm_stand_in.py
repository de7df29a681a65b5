"""As much of vLLM as our plugin touches: names, signatures and sharding of vLLM 0.33.0, on one CPU.

The ranks of a tensor-parallel group are built one after the other, `with rank_of(rank, size)`, and their outputs are
put together by whoever holds them all. Not here: kernels, processes, caches, everything that serves.
"""

import sys
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import nn


WORLD = {"rank": 0, "size": 1}


@contextmanager
def rank_of(rank, size):
    before = dict(WORLD)
    WORLD.update(rank=rank, size=size)
    try:
        yield
    finally:
        WORLD.update(before)


# vllm.model_executor.layers.quantization.base_config


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class QuantizationConfig(ABC):
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    def apply_vllm_mapper(self, hf_to_vllm_mapper):  # noqa: B027 (as in vLLM)
        pass


# vllm.model_executor.layers.quantization

QUANTIZATION_METHODS = []
CONFIGS = {}


def register_quantization_config(quantization):
    def wrapper(cls):
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("not a QuantizationConfig")
        QUANTIZATION_METHODS.append(quantization)
        CONFIGS[quantization] = cls
        return cls

    return wrapper


# vllm.model_executor.layers.linear


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer, x, bias=None): ...


class UnquantizedLinearMethod(LinearMethodBase):
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
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = nn.Parameter(torch.full(shape, torch.nan, dtype=params_dtype), requires_grad=False)
        layer.register_parameter("weight", mark(weight, input_dim=1, output_dim=0, **extra_weight_attrs))

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


def mark(parameter, **attributes):
    for name, value in attributes.items():
        assert not hasattr(parameter, name)
        setattr(parameter, name, value)
    return parameter


class LinearBase(nn.Module):
    def __init__(
        self,
        input_size,
        output_size,
        bias=False,
        skip_bias_add=False,
        params_dtype=None,
        quant_config=None,
        prefix="",
        *,
        return_bias=True,
        disable_tp=False,
        tp_rank=None,
        tp_size=None,
    ):
        super().__init__()
        self.input_size, self.output_size, self.has_bias = input_size, output_size, bias
        self.skip_bias_add, self.return_bias, self.disable_tp = skip_bias_add, return_bias, disable_tp
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.quant_config, self.prefix = quant_config, prefix
        self.quant_method = UnquantizedLinearMethod()
        if quant_config is not None:
            self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        if self.quant_method is None:
            raise ValueError("All linear layers should support quant method.")
        self.tp_rank = WORLD["rank"] if tp_rank is None else tp_rank
        self.tp_size = WORLD["size"] if tp_size is None else tp_size

    def build(self, input_size_per_partition, output_partition_sizes, bias):
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size_per_partition,
            output_partition_sizes=output_partition_sizes,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )
        if not bias:
            self.register_parameter("bias", None)
            return
        empty = torch.full((sum(output_partition_sizes),), torch.nan, dtype=self.params_dtype)
        self.bias = mark(nn.Parameter(empty, requires_grad=False), output_dim=0, weight_loader=self.weight_loader)

    def returned(self, output):
        return (output, self.bias if self.skip_bias_add else None) if self.return_bias else output


class ReplicatedLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=True, **options):
        super().__init__(input_size, output_size, bias, **options)
        self.build(input_size, [output_size], bias)

    def weight_loader(self, param, loaded_weight):
        assert param.size() == loaded_weight.size()
        param.data.copy_(loaded_weight)

    def forward(self, x):
        return self.returned(self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias))


class ColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=True, gather_output=False, **options):
        sizes = getattr(self, "output_sizes", [output_size])
        super().__init__(input_size, output_size, bias, **options)
        assert all(size % self.tp_size == 0 for size in sizes)
        self.output_partition_sizes = [size // self.tp_size for size in sizes]
        self.build(input_size, self.output_partition_sizes, bias)

    def weight_loader(self, param, loaded_weight):
        self.load_part(param, loaded_weight, 0, param.data.shape[0], self.tp_rank)

    @staticmethod
    def load_part(param, loaded_weight, offset, size, rank):
        dimension = getattr(param, "output_dim", None)
        assert dimension is not None
        there = param.data.narrow(dimension, offset, size)
        part = loaded_weight.narrow(dimension, rank * size, size)
        assert there.shape == part.shape
        there.copy_(part)

    def forward(self, input_):
        return self.returned(self.quant_method.apply(self, input_, None if self.skip_bias_add else self.bias))

    def load_weights(self, weights):
        """What `AutoWeightsLoader` calls on fused layers, whose subclasses have `weight_loader` with a shard."""
        for name, loaded_weight in weights:
            shard_id = getattr(loaded_weight, "shard_id", None)
            owner, _, leaf = name.rpartition(".")
            param = getattr(self.get_submodule(owner) if owner else self, leaf, self)
            param.weight_loader(param, loaded_weight, *([] if type(self) is ColumnParallelLinear else [shard_id]))
            yield name


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, input_size, output_sizes, bias=True, gather_output=False, **options):
        self.output_sizes = output_sizes
        super().__init__(input_size, sum(output_sizes), bias, gather_output, **options)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        if loaded_shard_id is None or isinstance(loaded_shard_id, tuple):
            shards = range(len(self.output_sizes)) if loaded_shard_id is None else loaded_shard_id
            parts = loaded_weight.split([self.output_sizes[shard] for shard in shards], param.output_dim)
            for shard, part in zip(shards, parts, strict=True):
                self.weight_loader(param, part, shard)
            return
        offset = sum(self.output_partition_sizes[:loaded_shard_id])
        self.load_part(param, loaded_weight, offset, self.output_partition_sizes[loaded_shard_id], self.tp_rank)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(self, hidden_size, head_size, total_num_heads, total_num_kv_heads=None, bias=True, **options):
        size = WORLD["size"]
        kv = total_num_kv_heads or total_num_heads
        self.num_heads, self.num_kv_heads = total_num_heads // size, max(1, kv // size)
        self.num_kv_head_replicas = max(1, size // kv)
        self.total = [total_num_heads * head_size, kv * head_size, kv * head_size]
        self.output_sizes = [heads * head_size * size for heads in (self.num_heads, *[self.num_kv_heads] * 2)]
        super().__init__(hidden_size, sum(self.output_sizes), bias, **options)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        if loaded_shard_id is None:
            for shard, part in zip("qkv", loaded_weight.split(self.total, param.output_dim), strict=True):
                self.weight_loader(param, part, shard)
            return
        index = "qkv".index(loaded_shard_id)
        rank = self.tp_rank if index == 0 else self.tp_rank // self.num_kv_head_replicas
        offset = sum(self.output_partition_sizes[:index])
        self.load_part(param, loaded_weight, offset, self.output_partition_sizes[index], rank)


class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, bias=True, input_is_parallel=True, reduce_results=True, **options):
        super().__init__(input_size, output_size, bias, **options)
        self.build(input_size // self.tp_size, [output_size], bias)

    def weight_loader(self, param, loaded_weight):
        dimension = getattr(param, "input_dim", None)
        if dimension is not None:
            size = param.data.shape[dimension]
            loaded_weight = loaded_weight.narrow(dimension, self.tp_rank * size, size)
        assert param.data.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)

    def forward(self, input_):
        """This rank's summand; whoever holds all ranks reduces."""
        bias = None if self.tp_rank > 0 or self.skip_bias_add else self.bias
        return self.returned(self.quant_method.apply(self, input_, bias))


class RoutedExperts(nn.Module):
    """vllm.model_executor.layers.fused_moe"""


class ParallelLMHead(nn.Module):
    """vllm.model_executor.layers.vocab_parallel_embedding"""


# vllm.model_executor.models.utils


@dataclass
class WeightsMapper:
    orig_to_new_stacked: dict = field(default_factory=dict)
    orig_to_new_prefix: dict = field(default_factory=dict)

    def apply(self, weights):
        for name, data in weights:
            shard_id = None
            for part, (new, shard) in self.orig_to_new_stacked.items():
                if part in name:
                    name, shard_id = name.replace(part, new, 1), shard
            name = self.renamed(name)
            if name is not None:
                if shard_id is not None:
                    data.shard_id = shard_id
                yield name, data

    def renamed(self, name):
        for prefix, new in self.orig_to_new_prefix.items():
            if name.startswith(prefix):
                return None if new is None else new + name.removeprefix(prefix)
        return name

    def apply_list(self, values):
        return [name for name in map(self.renamed, values) if name is not None]

    def get_rename_mapper(self):
        kept = {prefix: new for prefix, new in self.orig_to_new_prefix.items() if new is not None}
        return replace(self, orig_to_new_stacked={}, orig_to_new_prefix=kept)


def auto_load(model, weights, mapper):
    """`AutoWeightsLoader`: down the tree, by modules that load themselves, then by parameters."""
    loaded = set()
    for name, tensor in mapper.apply(weights):
        parts = name.split(".")
        module, done = model, 0
        while done < len(parts) - 1 and parts[done] in dict(module.named_children()):
            module, done = module.get_submodule(parts[done]), done + 1
            if hasattr(module, "load_weights"):
                break
        rest = ".".join(parts[done:])
        if hasattr(module, "load_weights"):
            loaded.update(f"{'.'.join(parts[:done])}.{leaf}" for leaf in module.load_weights([(rest, tensor)]))
        elif rest in dict(module.named_parameters(recurse=False)):
            param = getattr(module, rest)
            param.weight_loader(param, tensor)
            loaded.add(name)
        elif not name.endswith(".bias"):
            raise ValueError(f"There is no module or parameter named {name!r}")
    return loaded


def load_by_name(model, weights, stacked):
    """What model classes of vLLM did themselves before, and some still do."""
    parameters, loaded = dict(model.named_parameters()), set()
    for name, tensor in weights:
        shard = []
        for part, (new, shard_id) in stacked.items():
            if part in name:
                name, shard = name.replace(part, new), [shard_id]
                break
        if name.endswith(".bias") and name not in parameters:
            continue
        param = parameters[name]
        param.weight_loader(param, tensor, *shard)
        loaded.add(name)
    return loaded


def process_weights_after_loading(model):
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
            module.quant_method.process_weights_after_loading(module)


NAMES = {
    "vllm": [],
    "vllm.model_executor": [],
    "vllm.model_executor.layers": [],
    "vllm.model_executor.layers.fused_moe": [RoutedExperts],
    "vllm.model_executor.layers.linear": [LinearBase, LinearMethodBase, UnquantizedLinearMethod],
    "vllm.model_executor.layers.quantization": [register_quantization_config],
    "vllm.model_executor.layers.quantization.base_config": [QuantizationConfig],
}


def modules():
    """`{name: module}` to put into `sys.modules`, with nothing registered yet."""
    QUANTIZATION_METHODS.clear()
    found = {}
    for name, members in NAMES.items():
        found[name] = ModuleType(name)
        found[name].__path__ = []
        for member in members:
            setattr(found[name], member.__name__, member)
    found["vllm.model_executor.layers.quantization"].QUANTIZATION_METHODS = QUANTIZATION_METHODS
    return found


def install():
    """For a process of its own."""
    sys.modules.update(modules())
