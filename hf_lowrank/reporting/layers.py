"""Every target of a recipe as one record: what a report says about a layer."""

from dataclasses import asdict, dataclass, replace

from ..errors import LowRankError, TargetError
from ..linalg import difference_energy, product_singular_values, singular_energies
from ..surgery import all_sites, factorized, selected_sites, specs
from .places import places
from .spectrum import Spectrum, spectrum_of
from .summary import Row, summary


DENSE = "dense"


@dataclass(frozen=True)
class Layer(Row):
    """A [`Row`] of [`Summary`], or a target that was left dense, whose format is `"dense"`.

    Args:
        full_rank (`int`): `min(out, in)`.
        stack (`str`): see [`Place`].
        block (`int`, *optional*): see [`Place`].
        projection (`str`): see [`Place`].
        basis (`str`, *optional*): the layer that stores the factor this one shares, if that is another.
        error_share (`float`, *optional*): of the sum over layers of n e^2, with the recorded relative error e and the
            n numbers of the dense weight: what the layer contributes if all weights are as large, number by number.
        weight_error (`float`, *optional*): |W - W'|_F / |W|_F, where the dense model was given.
        spectrum ([`Spectrum`], *optional*): of the factorized weight as it is stored.
        dense_spectrum ([`Spectrum`], *optional*): of the dense weight, where the dense model was given.
    """

    rank: int | None
    break_even: int | None
    full_rank: int
    stack: str
    block: int | None
    projection: str
    basis: str | None = None
    error_share: float | None = None
    weight_error: float | None = None
    spectrum: Spectrum | None = None
    dense_spectrum: Spectrum | None = None

    @property
    def kept(self):
        """Numbers stored / numbers of the dense weight."""
        return self.parameters / self.dense_parameters


def layers_of(model, recipe=None, dense=None, spectra=True):
    """Every layer that is factorized, and every target of `recipe` that is not, in the order of the model.

    Args:
        model (`torch.nn.Module`): factorized.
        recipe (`dict`, *optional*): as in its config; tells what was targeted, all linears by default.
        dense (`torch.nn.Module`, *optional*): what it was made from.
        spectra (`bool`, defaults to `True`): whether to compute singular values.

    Returns:
        `list[Layer]`.

    Raises:
        TargetError: `dense` is another model, or factorized.
        LowRankError: singular values of weights that are not in memory.
    """
    rows = {row.name: row for row in summary(model).rows}
    sites = _still_dense(model, recipe or {}, rows)
    rows |= {name: _dense_row(model, site) for name, site in sites.items()}
    names = _in_order(model, rows)
    kinds, described, where = factorized(model), specs(model), places(names)
    references = _references(dense, names)
    total = sum(_weighted_error(row) or 0.0 for row in rows.values())
    found = []
    for name in names:
        row, site = rows[name], sites.get(name)
        shape = kinds[name].dense_shape(model, name) if site is None else (1, site.out_features, site.in_features)
        error = _weighted_error(row)
        layer = Layer(
            **asdict(row),
            **asdict(where[name]),
            full_rank=min(shape[1:]),
            basis=described.get(name, {}).get("basis"),
            error_share=None if error is None or not total else error / total,
        )
        reference = references.get(name)
        if site is None and (spectra or reference is not None):
            layer = _with_values(layer, _factors(model, kinds[name], name), dense, reference, spectra)
        found.append(layer)
    return found


def _still_dense(model, recipe, inside):
    """Targets of `recipe` that are not factorized, by name; the linears `inside` factorized layers are no targets."""
    patterns = {key: recipe[key] for key in ("target_modules", "exclude_modules") if key in recipe}
    sites = selected_sites(model, **patterns)
    return {site.name: site for site in sites if not any(site.name.startswith(f"{name}.") for name in inside)}


def _dense_row(model, site):
    weight = model.get_parameter(site.weight_name)
    numbers, size = weight.numel(), weight.numel() * weight.element_size()
    shape = f"{site.out_features} x {site.in_features}"
    shape = shape if site.copies == 1 else f"{site.copies} x {shape}"
    return Row(site.name, DENSE, None, shape, numbers, numbers, size, size, None, None)


def _in_order(model, names):
    # Of weights that one module holds together, the module tells the order.
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(names, key=lambda name: order.get(name, order.get(name.rpartition(".")[0])))


def _weighted_error(row):
    return None if row.relative_error is None else row.dense_parameters * row.relative_error**2


def _references(dense, names):
    """The dense sites of the layers, by name."""
    if dense is None:
        return {}
    sites = {site.name: site for site in all_sites(dense)}
    missing = [name for name in names if name not in sites]
    if missing:
        raise TargetError(
            f"`dense` has no dense linear layer {missing[0]} ({len(missing)} of {len(names)} are missing); give the "
            "model that this one was made from, as it was."
        )
    return {name: sites[name] for name in names}


def _factors(model, kind, name):
    if any(tensor.is_meta for tensor in kind.stored(model, name).values()):
        raise LowRankError(
            f"The factors of {name} are on disk or on the meta device; load the model without offloading, or leave "
            "out what needs them with `spectra=False` and without `dense`."
        )
    return kind.factors(model, name)


def _with_values(layer, factors, dense, site, spectra):
    """`layer` with what its factors, and the dense weight, tell."""
    if spectra:
        values = [product_singular_values(*pair).cpu() for pair in factors]
        layer = replace(layer, spectrum=spectrum_of(values))
    if site is None:
        return layer
    weights = site.kind.weight(dense, site)
    if weights.shape[0] != len(factors) or weights.shape[1:] != (len(factors[0][0]), factors[0][1].shape[1]):
        raise TargetError(f"`dense` has {layer.name} of another shape, {tuple(weights.shape)}, not {layer.shape}.")
    weights = [weight.to(left.device) for weight, (left, _) in zip(weights, factors, strict=True)]
    lost = sum(difference_energy(weight, *pair) for weight, pair in zip(weights, factors, strict=True))
    whole = sum(weight.double().square().sum().item() for weight in weights)
    layer = replace(layer, weight_error=(lost / whole) ** 0.5 if whole else None)
    if spectra:
        values = [singular_energies(weight).sqrt().cpu() for weight in weights]
        layer = replace(layer, dense_spectrum=spectrum_of(values))
    return layer
