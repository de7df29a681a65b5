"""What became of a model: a table of its factorized layers, and totals of the whole."""

from dataclasses import dataclass

from ..formats import FORMATS
from ..sizes import numbers, tensor_bytes
from ..surgery import check_model, factorized, specs
from .table import aligned


@dataclass(frozen=True)
class Row:
    """One factorized layer.

    Args:
        name (`str`): the module.
        format (`str`): how it is stored.
        rank (`int`): of its factors.
        shape (`str`): `out x in`, with the number of copies in front where there are several.
        parameters (`int`): numbers stored; a bias only where the dense layer had none.
        dense_parameters (`int`): numbers the dense weight would store.
        bytes (`int`): bytes of these.
        dense_bytes (`int`): bytes of the dense weight in the dtype of the factors.
        break_even (`int`): the lowest rank at which the format would save nothing.
        relative_error (`float`, *optional*): recorded when it was factorized, in its method's metric.
    """

    name: str
    format: str
    rank: int
    shape: str
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int
    break_even: int
    relative_error: float | None


@dataclass(frozen=True)
class Summary:
    """The table and the totals; `print(summary)` shows both.

    Args:
        rows (`list[Row]`): factorized layers in the order of the model.
        parameters (`int`): of the whole model, as it stands.
        dense_parameters (`int`): of the whole model, if nothing were factorized.
        bytes (`int`): of the whole model's parameters.
        dense_bytes (`int`): of the whole model's parameters, if nothing were factorized.
    """

    rows: list
    parameters: int
    dense_parameters: int
    bytes: int
    dense_bytes: int

    @property
    def line(self):
        """One line: parameters, bytes, and how many times smaller the whole model is."""
        return (
            f"{len(self.rows)} factorized layers, {self.dense_parameters / 1e6:.1f}M -> {self.parameters / 1e6:.1f}M "
            f"parameters, {self.dense_bytes / 2**20:.1f} -> {self.bytes / 2**20:.1f} MiB, "
            f"{self.dense_bytes / max(self.bytes, 1):.2f}x smaller"
        )

    def __str__(self):
        head = ("module", "format", "rank", "shape", "parameters", "kept", "MiB", "error")
        rows = [
            (
                row.name,
                row.format,
                str(row.rank),
                row.shape,
                str(row.parameters),
                f"{row.parameters / row.dense_parameters:.1%}",
                f"{row.bytes / 2**20:.2f}",
                "" if row.relative_error is None else f"{row.relative_error:.4f}",
            )
            for row in self.rows
        ]
        return "\n".join([*aligned([head, *rows]), self.line])


def summary(model):
    """Tabulate the factorized layers of `model`.

    Args:
        model (`torch.nn.Module`): factorized in memory, at load, or reloaded.

    Returns:
        [`Summary`]; print it, or read its `rows`.
    """
    check_model(model)
    rows, saved_numbers, saved_bytes = [], 0, 0
    tensors = {id(p): p for p in model.parameters()}
    counted = {*tensors, *(id(b) for b in model.buffers())}
    described = specs(model)
    for name, kind in factorized(model).items():
        spec = described[name]
        copies, out_features, in_features = kind.dense_shape(model, name)
        own = list(kind.stored(model, name).values())
        # Orders and masks are buffers, and stored like the weights.
        tensors.update((id(t), t) for t in own)
        stored, size = _count(own, counted)
        dense = copies * out_features * in_features
        # The order of a pivoted layer is of integers, and packed weights may be, whatever the dtype of the weight was.
        found = (t for t in (*own, *model.parameters()) if id(t) in counted and t.is_floating_point())
        dense_size = dense * next(found, own[0]).element_size()
        shape = f"{out_features} x {in_features}" if copies == 1 else f"{copies} x {out_features} x {in_features}"
        edge = FORMATS[spec["format"]].break_even(out_features, in_features)
        error = spec.get("relative_error")
        rows.append(Row(name, spec["format"], spec["rank"], shape, stored, dense, size, dense_size, edge, error))
        saved_numbers += dense - stored
        saved_bytes += dense_size - size
    parameters, size = _count(tensors.values(), counted)
    return Summary(rows, parameters, parameters + saved_numbers, size, size + saved_bytes)


def _count(tensors, counted):
    """`(numbers, bytes)` of some tensors; scales that a quantizer stores beside them are not among the `counted`."""
    return sum(numbers(t) for t in tensors if id(t) in counted), sum(tensor_bytes(t) for t in tensors)
