"""A second model beside the dense one, which becomes the compressed model without a copy of the large weights."""

import copy

from ..errors import ResourceError


def twin_of(model, own=()):
    """A copy of `model` that shares every parameter but some.

    Args:
        model (`torch.nn.Module`): dense.
        own (`Iterable[str]`): full names of the parameters that the twin has copies of, which may be trained.

    Raises:
        ResourceError: the model is split over processes.
    """
    if getattr(model, "_device_mesh", None) is not None:
        raise ResourceError(
            "`refine` and anchored methods run whole blocks of the dense and the compressed model side by side, and "
            "this model is split over processes; factorize on one device, save, and load the result in parallel."
        )
    copied = {id(model.get_parameter(name)) for name in own}
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in copied}
    return copy.deepcopy(model, shared)
