"""Three-dimensional experts of mixture-of-experts layers: one factor pair an expert, kept as parameters of the module.

transformers stores all experts of a layer in `gate_up_proj` (or `up_proj`) and `down_proj`, and renames on saving by
parameter name. Factors are therefore sibling parameters, `<name>_left` `(E, out, r)` and `<name>_right` `(E, r, in)`,
not sub-modules, and the module's class is exchanged for a subclass with a factorized forward.
"""

import functools
from contextlib import contextmanager

import torch
from torch import nn
from transformers.integrations.moe import _grouped_linear

from ..errors import CheckpointError, LowRankError
from ..kinds import LinearKind, Site, register_linear_kind


PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
FORMAT = "low_rank"


def experts_forward(module, hidden_states, top_k_index, top_k_weights, project):
    """What every experts module computes, with the two projections left to `project(name, rows, offsets, experts)`.

    Rows are routed tokens sorted by expert; `offsets` are the running counts, `experts` the expert of each row.
    """
    if module._is_expert_parallel:
        raise LowRankError("Factorized experts do not run expert-parallel; use tensor or data parallelism.")
    tokens, top_k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1))
    token_index = order // top_k
    # Not bincount: its output shape depends on the data, which torch.compile and CUDA graphs cannot have.
    countable = experts.float() if experts.device.type in ("cpu", "mps") else experts.int()
    counts = torch.histc(countable, bins=module.num_experts, min=0, max=module.num_experts - 1)
    offsets = counts.cumsum(0, dtype=torch.int32)
    rows = project("gate_up_proj" if module.has_gate else "up_proj", hidden_states[token_index], offsets, experts)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = project("down_proj", rows, offsets, experts)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return rows[back].view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _bias(module, name, experts):
    return getattr(module, f"{name}_bias")[experts] if module.has_bias else None


def _project(module, name, rows, offsets, experts):
    bias = _bias(module, name, experts)
    if name not in getattr(module, "lowrank_sites", ()):
        return _grouped_linear(rows, getattr(module, name), offsets, bias, module.is_transposed)
    inner = _grouped_linear(rows, getattr(module, f"{name}_right"), offsets)
    return _grouped_linear(inner, getattr(module, f"{name}_left"), offsets, bias)


def _low_rank_forward(self, hidden_states, top_k_index, top_k_weights):
    def project(name, rows, offsets, experts):
        return _project(self, name, rows, offsets, experts)

    return experts_forward(self, hidden_states, top_k_index, top_k_weights, project)


class ExpertsKind(LinearKind):
    """Modules that hold the experts of a layer as 3-D parameters, recognised by what transformers' decorator sets."""

    single = False
    # grouped_mm wants rows of 16 bytes: 8 numbers in bf16, which also covers float32.
    min_rank_multiple = 8
    formats = (FORMAT,)
    takes_shift = False

    def __init__(self):
        super().__init__(None)

    def matches(self, module):
        return hasattr(module, "is_transposed") and hasattr(module, "num_experts") and hasattr(module, "has_gate")

    def sites(self, name, module):
        found = []
        for projection in PROJECTIONS:
            weight = module._parameters.get(projection)
            if weight is not None and weight.ndim == 3:
                rows, columns = weight.shape[:0:-1] if module.is_transposed else weight.shape[1:]
                full = f"{name}.{projection}" if name else projection
                found.append(Site(full, self, rows, columns, copies=weight.shape[0]))
        return found

    def weight_name(self, name):
        return name

    def weight(self, model, site):
        module, projection = _owner(model, site.name)
        weight = getattr(module, projection).detach()
        return weight.transpose(1, 2) if module.is_transposed else weight

    def oriented(self, model, site, weight):
        module, _ = _owner(model, site.name)
        return weight.transpose(1, 2) if module.is_transposed else weight

    def skeleton(self, model, site, spec, dtype):
        if spec["format"] not in self.formats:
            raise CheckpointError(
                f"The checkpoint stores {site.name} as {spec['format']!r}; experts can be {list(self.formats)}."
            )
        module, projection = _owner(model, site.name)
        rank = spec["rank"]
        for suffix, shape in (("left", (site.out_features, rank)), ("right", (rank, site.in_features))):
            empty = torch.empty(site.copies, *shape, device="meta", dtype=dtype)
            module.register_parameter(f"{projection}_{suffix}", nn.Parameter(empty))
        del module._parameters[projection]
        _mark(module, projection, self, spec.get("relative_error"))

    def placeholders(self, model, site, dtype):
        module, projection = _owner(model, site.name)
        shape = (site.copies, site.out_features, site.in_features)
        if module.is_transposed:
            shape = (site.copies, site.in_features, site.out_features)
        module._parameters[projection] = nn.Parameter(torch.empty(shape, device="meta", dtype=dtype))
        return {site.name: "weight"}

    def tensors(self, site, format, factors, dtype):
        return {
            f"{site.name}_left": torch.stack([f.left.to(dtype) for f in factors]),
            f"{site.name}_right": torch.stack([f.right.to(dtype) for f in factors]),
        }

    def bias(self, model, site):
        return None

    def spec(self, model, name):
        module, projection = _owner(model, name)
        return {"format": FORMAT, "rank": getattr(module, f"{projection}_right").shape[1]}

    def relative_error(self, model, name):
        module, projection = _owner(model, name)
        return module.lowrank_sites[projection]

    def stored(self, model, name, bias=False):
        module, projection = _owner(model, name)
        return {f"{name}_{side}": getattr(module, f"{projection}_{side}") for side in ("left", "right")}

    def set_error(self, model, name, error):
        module, projection = _owner(model, name)
        module.lowrank_sites[projection] = error

    def added_bias(self, model, name):
        return False

    def factors(self, model, name):
        left, right = self.stored(model, name).values()
        return list(zip(left.detach().double(), right.detach().double(), strict=True))

    def dense_shape(self, model, name):
        left, right = self.stored(model, name).values()
        return left.shape[0], left.shape[1], right.shape[2]

    def to_dense(self, model, name):
        module, projection = _owner(model, name)
        left, right = (getattr(module, f"{projection}_{side}").detach() for side in ("left", "right"))
        wide = torch.promote_types(left.dtype, torch.float32)
        trainable = getattr(module, f"{projection}_left").requires_grad
        dense = torch.stack([(a.to(wide) @ b.to(wide)).to(left.dtype) for a, b in zip(left, right, strict=True)])
        if module.is_transposed:
            dense = dense.transpose(1, 2).contiguous()
        del module._parameters[f"{projection}_left"], module._parameters[f"{projection}_right"]
        module.register_parameter(projection, nn.Parameter(dense, requires_grad=trainable))
        del module.lowrank_sites[projection]
        if not module.lowrank_sites:
            module.__class__ = type(module).__bases__[0]
            del module.lowrank_sites, module.lowrank_kind

    @contextmanager
    def watch(self, model, sites, observe):
        module, _ = _owner(model, sites[0].name)
        names = {site.name.rpartition(".")[2]: site.name for site in sites}

        def forward(hidden_states, top_k_index, top_k_weights):
            tokens, top_k = top_k_index.shape
            token_index = torch.sort(top_k_index.reshape(-1))[1] // top_k

            def project(name, rows, offsets, experts):
                projected = _project(module, name, rows, offsets, experts)
                if name in names:
                    observe(names[name], rows, projected, (token_index, tokens, experts))
                return projected

            return experts_forward(module, hidden_states, top_k_index, top_k_weights, project)

        # Where accelerate has wrapped the forward, its hook calls `_old_forward`.
        attribute = "_old_forward" if "_old_forward" in vars(module) else "forward"
        before = vars(module).get(attribute)
        setattr(module, attribute, forward)
        try:
            yield
        finally:
            delattr(module, attribute)
            if before is not None:
                setattr(module, attribute, before)


def _owner(model, name):
    owner, _, projection = name.rpartition(".")
    return model.get_submodule(owner), projection


@functools.cache
def _low_rank_class(cls):
    """The subclass of an experts class that runs on factors; made on demand, so that copies name its base."""

    def reduce(self, protocol):
        return _revive, (cls,), self.__dict__

    return type(f"LowRank{cls.__name__}", (cls,), {"forward": _low_rank_forward, "__reduce_ex__": reduce})


def _revive(cls):
    low_rank = _low_rank_class(cls)
    return low_rank.__new__(low_rank)


def _mark(module, projection, kind, error):
    if not hasattr(module, "lowrank_sites"):
        module.__class__ = _low_rank_class(type(module))
        module.lowrank_sites = {}
        module.lowrank_kind = kind
        # Initialisation code of models reads the dense parameters, which are gone; the factors are never random.
        module._is_hf_initialized = True
    module.lowrank_sites[projection] = error


register_linear_kind(ExpertsKind())
