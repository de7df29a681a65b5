"""Factorize tensor by tensor while a checkpoint streams in, on the device each tensor is mapped to."""

import contextlib
import ctypes
import sys

import torch
from transformers.core_model_loading import ConversionOps

from ..factorize import factorize_site, measure_site, shifted_bias
from ..formats import FORMATS
from .parallel import agreed, local_part
from .session import Stopped


def release_freed_memory():
    """Give the heap's free pages back to the system, where the C library can.

    glibc keeps what was freed; small factors between large temporaries then fragment the heap, and it grows to a
    multiple of the model. One call a matrix costs about a millisecond.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def _naming_full_memory(unit, weight):
    """What the errors of torch and Python about full memory do not say: the weight at work, and the cure."""
    where = f"while {unit.name} of shape {tuple(weight.shape)} was factorized"
    try:
        yield
    except torch.OutOfMemoryError as full:
        raise torch.OutOfMemoryError(f"{full} ({where}; `compute_device='cpu'` needs no memory there)") from full
    except MemoryError as full:
        raise MemoryError(f"{full} ({where})") from full


class Stopping:
    """Ends the load with the first error inside, which `from_pretrained` raises as it is.

    Args:
        progress ([`Progress`], *optional*): ends with it.
        collected (`bool`): whether transformers would collect the error.
    """

    def __init__(self, progress, collected):
        self.progress, self.collected = progress, collected

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            return
        if self.progress is not None:
            self.progress.close()
        if self.collected and isinstance(error, Exception):
            raise Stopped(error)


class Factorize(ConversionOps):
    """Turns a dense tensor whose name is a placeholder into the parameters of the factorized layer."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, model=None, missing_keys=None, **kwargs):
        with Stopping(self.quantizer.progress, collected=missing_keys is not None):
            converted = self._converted(input_dict, model, missing_keys)
            if self.quantizer.session.measuring:
                return converted
            return self.quantizer.pack(converted, model, missing_keys=missing_keys, **kwargs)

    def _converted(self, input_dict, model, missing_keys):
        """The tensors under their new names, factors in the place of dense weights."""
        converted = {}
        for name in list(input_dict):
            tensor = input_dict.pop(name)
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            site, role = self.quantizer.placeholders.pop(name, (None, None))
            if site is None:
                converted[name] = tensor
                continue
            owner, _, leaf = name.rpartition(".")
            del model.get_submodule(owner)._parameters[leaf]
            if missing_keys is not None:
                missing_keys.discard(name)
            made = self._bias(site, tensor) if role == "bias" else self._factors(model, site, tensor)
            converted.update({key: local_part(model, key, value) for key, value in made.items()})
        return converted

    def _bias(self, site, tensor):
        """The bias under its new name; nothing yet if the weight, which decides on its shift, is still to come."""
        quantizer, name = self.quantizer, self._bias_name(site)
        if not quantizer.quantization_config.method.shifts or quantizer.session.measuring:
            return {name: tensor}
        if site.weight_name in quantizer.placeholders:
            quantizer.waiting[site.name] = tensor
            return {}
        return {name: shifted_bias(site, tensor, quantizer.waiting.pop(site.name), tensor.dtype)}

    def _shifted(self, site, shift, dtype):
        """The shifted bias; nothing yet if the dense bias is still to come, and the shift alone if there is none."""
        quantizer = self.quantizer
        if shift is None:
            return {}
        if f"{site.owner}.bias" in quantizer.placeholders:
            quantizer.waiting[site.name] = shift
            return {}
        bias = quantizer.waiting.pop(site.name, None)
        dtype = dtype if bias is None else bias.dtype
        return {self._bias_name(site): shifted_bias(site, bias, shift, dtype)}

    def _bias_name(self, site):
        return site.kind.bias_name(site, FORMATS[self.quantizer.plan.formats[self._unit(site).name]])

    def _unit(self, site):
        return self.quantizer.plan.unit(site.name)

    def _factors(self, model, site, tensor):
        """The factors of all that `site` is factorized with; nothing yet if a weight of these is still to come."""
        quantizer, unit = self.quantizer, self._unit(site)
        arrived = quantizer.arrived.setdefault(unit.name, {})
        arrived[site.name] = site.kind.oriented(model, site, tensor)
        if len(arrived) < len(unit.members):
            return {}
        del quantizer.arrived[unit.name]
        quantizer.progress.start(unit.name)
        weight = unit.kind.joined([arrived[member.name] for member in unit.members])
        made = self._measure if quantizer.session.measuring else self._factorize
        tensors = {}
        with _naming_full_memory(unit, weight):
            factors = made(model, unit, weight, tensor.dtype)
        for name, own in factors.items():
            # Members of a group may belong on different devices.
            tensors.update({key: value.to(arrived[name].device) for key, value in own.items()})
        quantizer.progress.done()
        release_freed_memory()
        return tensors

    def _factorize(self, model, unit, weight, dtype):
        """`{full name: tensor}` by member."""
        quantizer = self.quantizer
        config, statistics = quantizer.quantization_config, quantizer.session.statistics
        rank = quantizer.plan.ranks[unit.name]
        tensors, shift, error = factorize_site(unit, weight, rank, config, statistics, dtype)
        tensors[unit.name].update(self._shifted(unit, shift, dtype))
        for member in unit.members:
            member.kind.set_error(model, member.name, error)
            config.modules[member.name]["relative_error"] = error
        return tensors

    def _measure(self, model, unit, weight, dtype):
        """Note the error curve; the factors of this pass are empty and will be thrown away."""
        session = self.quantizer.session
        curve = measure_site(unit, weight, self.quantizer.quantization_config, session.statistics)
        session.measured.curves[unit.name] = agreed(model, curve)
        empty = {member.name: member.kind.stored(model, member.name) for member in unit.members}
        return {
            name: {key: torch.zeros(t.shape, dtype=t.dtype, device=weight.device) for key, t in own.items()}
            for name, own in empty.items()
        }

    @property
    def reverse_op(self):
        raise NotImplementedError("Factors are saved as they are; `hf_lowrank.to_dense` multiplies them out.")
