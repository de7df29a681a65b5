"""A second model beside the dense one, which becomes the compressed model without a copy of the large weights."""

import copy

from ..errors import ResourceError


def twin_of(model, sites, names):
    """A copy of `model` that shares every parameter but the small ones inside its blocks, which may be trained.

    Args:
        model (`torch.nn.Module`): dense.
        sites (`list[Site]`): what will be replaced in the twin, and is shared until then.
        names (`list[str]`): the blocks.

    Raises:
        ResourceError: the model is split over processes.
    """
    if getattr(model, "_device_mesh", None) is not None:
        raise ResourceError(
            "`refine` and anchored methods run whole blocks of the dense and the compressed model side by side, and "
            "this model is split over processes; factorize on one device, save, and load the result in parallel."
        )
    dense = {site.weight_name for site in sites}
    memo = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if name in dense or not any(name.startswith(f"{block}.") for block in names)
    }
    return copy.deepcopy(model, memo)
