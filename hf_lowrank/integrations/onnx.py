"""What an exported ONNX model of factors needs beyond what transformers' exporter does."""

import sys

from ..errors import MissingPackageError


def share_initializers(exported):
    """Store each weight of an exported ONNX model once, and compute once what several layers compute from one input.

    The exporter transposes a weight for every layer that uses it, and stores each transposed copy: a basis that three
    layers share is written three times, and multiplied with the same input three times.

    Args:
        exported (`transformers.exporters.ExportedModel`): from `OnnxExporter`; changed in place, before it is saved
            or called.

    Returns:
        The same.

    Raises:
        MissingPackageError: the packages of the exporter are not installed.
    """
    try:
        from onnx_ir.passes import common
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "share_initializers needs onnx and onnxscript: `pip install 'hf-lowrank[export]'`."
        ) from error
    for component in exported.components.values():
        # Not by hashes, which fail on transposed views.
        common.DeduplicateInitializersPass(size_limit=sys.maxsize)(component.program)
        common.CommonSubexpressionEliminationPass()(component.program)
    return exported
