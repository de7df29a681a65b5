"""The quantizer: what transformers calls while it builds, fills, saves and restores a factorized model."""

import copy
import os
import shutil
from pathlib import Path

import torch
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.accelerate import expand_device_map
from transformers.quantizers.auto import register_quantizer

from ..errors import CalibrationError, CheckpointError, ConfigError, ResourceError
from ..latency import latencies_for
from ..plan import Measured, make_plan
from ..surgery import all_sites, factorized, lend_bases, specs
from .checkpoint import Conversions, check_complete, check_integers, parameter_shapes, stored_keys
from .composite import CompositeQuantizer
from .config import QUANT_METHOD
from .densify import detach, multiply_out, refuse_adapters, unmark
from .guard import remove_guard
from .progress import Progress
from .session import Rehearsed, Session
from .streaming import Factorize


@register_quantizer(QUANT_METHOD)
class LowRankQuantizer(CompositeQuantizer):
    """Factorizes on the fly, or loads factors as they are; an inner quantizer may pack them on the way."""

    def __init__(self, quantization_config, **kwargs):
        self.session = quantization_config.session or Session()
        super().__init__(quantization_config, **kwargs)
        # Ordinary factors that are packed while they load are not `pre_quantized` for transformers.
        self.restores = self.pre_quantized or quantization_config.modules is not None
        self.placeholders = {}
        # By site, where a method shifts biases: the dense bias, or the shift, whichever came first.
        self.waiting = {}
        # By group, the weights of its members that have been read, while others are still to come.
        self.arrived = {}
        self.plan = None
        self.progress = None
        # Bytes of every parameter that will be filled; known once the skeleton stands.
        self._sizes = {}
        # Bytes of the largest dense weight in float32.
        self._largest = 0
        self._loaded_dtype = None

    def update_attn_implementation(self, config):
        # Called with the config before weight files are looked for, which is when the guard has to go.
        remove_guard(config)
        return super().update_attn_implementation(config)

    def update_dtype(self, dtype):
        self._loaded_dtype = super().update_dtype(dtype)
        return self._loaded_dtype

    def validate_environment(self, *args, device_map=None, **kwargs):
        # Called with the user's device map before the model is built, and with the automatic one afterwards.
        super().validate_environment(*args, device_map=device_map, **kwargs)
        if not self.restores and isinstance(device_map, dict):
            _refuse_meta(device_map)
        self._check_offload(device_map)

    def _check_offload(self, device_map):
        if self.restores or not isinstance(device_map, dict) or "disk" not in device_map.values():
            return
        folder = self.session.offload_folder
        if folder is None:
            raise ResourceError(
                "The device map sends weights to disk, and factors made on the fly have no file there yet; give "
                "`offload_folder`, more memory in `max_memory`, or factorize once and reload the saved factors."
            )
        devices = expand_device_map(device_map, self._sizes)
        needed = sum(size for name, size in self._sizes.items() if devices[name] == "disk")
        existing = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise ResourceError(
                f"`offload_folder`={os.fspath(folder)!r} has {free / 2**20:.0f} MiB free and {needed / 2**20:.0f} MiB "
                "are needed; free some space or offload elsewhere."
            )

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, device_map=None, **kwargs):
        dense = None
        if self.restores:
            dense = self._build_from_modules(model)
        else:
            self.build_placeholders(model, checkpoint_files, device_map)
            self.check_statistics()
            self._check_offload(device_map)
            self.progress = Progress(len(self.plan.sites), "Measuring" if self.session.measuring else "Factorizing")
        super()._process_model_before_weight_loading(
            model, checkpoint_files=checkpoint_files, device_map=device_map, **kwargs
        )
        # Only now the inner quantizer knows by which names it has stored what.
        if dense is not None:
            self._check_restored(model, dense, self._stored_shapes(model, checkpoint_files))

    def _check_restored(self, model, dense, shapes):
        config = self.quantization_config
        # Of a model whose other parts were factorized, one may be dense throughout.
        whole = config.modules and config.inner is None and any(site.weight_name in (shapes or ()) for site in dense)
        if not factorized(model) and not whole:
            raise CheckpointError(
                f"None of the {len(config.modules or {})} factorized modules of the checkpoint is in "
                f"{type(model).__name__}; it was saved from another architecture. Load the class it was saved from, "
                "and take the part you need."
            )
        if shapes is not None:
            check_complete(model, dense, shapes, packed=config.inner is not None)

    def _stored_shapes(self, model, checkpoint_files):
        """What the checkpoint holds, by the names of parameters of `model`; `None` if nobody can tell."""
        keys = self.session.given_keys if not checkpoint_files else stored_keys(checkpoint_files)
        return None if keys is None else parameter_shapes(model, keys, self.session.key_mapping, self)

    def _build_from_modules(self, model):
        """Put the layers in that the checkpoint describes; returns the sites that stay dense."""
        sites = {site.name: site for site in all_sites(model)}
        found = {}
        modules = self.quantization_config.modules or {}
        bases = {spec["basis"] for spec in modules.values() if "basis" in spec}
        places = self._places(model, {*modules, *bases}, sites)
        for name, spec in modules.items():
            if name in places:
                found[places[name]] = dict(spec)
                if "basis" in spec:
                    found[places[name]]["basis"] = places.get(spec["basis"], spec["basis"])
        for name, spec in found.items():
            sites[name].kind.skeleton(model, sites[name], spec, _dtype(model, sites[name]))
        lend_bases(model, found)
        return [site for name, site in sites.items() if name not in found]

    def _places(self, model, names, sites):
        """`{name in the checkpoint: name in model}` of those that are in the model."""
        # A base model and a model with a head differ by the base's prefix; a part and the whole by what transformers
        # renames when it loads weights of one into the other.
        prefix = f"{model.base_model_prefix}."
        places = {
            name: candidate
            for name in names
            for candidate in (f"{prefix}{name}", name.removeprefix(prefix), name)
            if candidate in sites
        }
        keys = {f"{name}{leaf}": name for name in names if name not in places for leaf in ("", ".weight")}
        if keys:
            by_weight = {site.weight_name: site.name for site in sites.values()}
            renamed = Conversions(model, keys, self.session.key_mapping).keys
            places.update({keys[renamed[w][0][0]]: name for w, name in by_weight.items() if w in renamed})
        return places

    def build_placeholders(self, model, checkpoint_files, device_map=None):
        """Plan, and give every weight that becomes factors an empty layer, which takes the dense weight too.

        Args:
            model (`PreTrainedModel`): dense, on the meta device.
            checkpoint_files (`list[str]`, *optional*): what will be loaded.
            device_map (*optional*): as of `from_pretrained`.
        """
        config = self.quantization_config
        names = self._stored_shapes(model, checkpoint_files)
        available = None if names is None else (lambda site: site.weight_name in names)
        _settle_dtypes(model, self._loaded_dtype)
        if self.session.rehearsing:
            raise Rehearsed(model, make_plan(model, config, available), checkpoint_files)
        measured = self.session.measured
        if measured.latencies is None:
            measured.latencies = latencies_for(model, config, available, _fastest(device_map))
        if self.session.measuring:
            measured = Measured(latencies=measured.latencies)
        self.plan = make_plan(model, config, available, measured)
        config.modules = self.plan.specs()
        config.record(model, self.session.provenance or None)
        self._largest = max((_dense_bytes(site) for site in self.plan.sites.values()), default=0)
        for site in self.plan.members.values():
            dtype = _dtype(model, site)
            site.kind.skeleton(model, site, config.modules[site.name], dtype)
            for name, role in site.kind.placeholders(model, site, dtype).items():
                if role == "bias" and names is not None and name not in names:
                    # Not in the checkpoint: initialised under its new name, as any other missing parameter.
                    del model.get_submodule(site.owner)._parameters["bias"]
                else:
                    self.placeholders[name] = (site, role)
        lend_bases(model, config.modules)
        self._sizes = {
            name: p.numel() * p.element_size() for name, p in model.named_parameters() if name not in self.placeholders
        }

    def check_statistics(self):
        """Raise [`CalibrationError`] or [`StatisticsError`] unless method and allocator find all that they read."""
        config, statistics = self.quantization_config, self.session.statistics
        if not config.needs_statistics or not self.plan.sites:
            return
        if statistics is None:
            raise CalibrationError(
                f"`method`={config.method.name!r} with `allocation`={config.allocation.name!r} needs "
                f"{list(config.statistics)}, but `calibration` gives none; pass data, saved statistics, or "
                "`method='svd'`."
            )
        statistics.check(self.plan.statistics_shapes(config.statistics))

    def param_needs_quantization(self, model, param_name, **kwargs):
        return param_name in self.placeholders or super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model, param_name, param):
        # A placeholder is never filled, so that the automatic device map counts the factors only.
        return 0 if param_name in self.placeholders else super().param_element_size(model, param_name, param)

    def adjust_max_memory(self, max_memory):
        max_memory = super().adjust_max_memory(max_memory)
        if self.restores:
            return max_memory
        # Room for one dense weight and its float64 workspace on whatever device computes it.
        reserve = 3 * self._largest
        return {
            device: size if device == "disk" or not isinstance(size, (int, float)) else max(0, size - reserve)
            for device, size in max_memory.items()
        }

    def get_quantize_ops(self):
        return Factorize(self)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self.quantization_config.session = None
        if self.waiting:
            raise CheckpointError(
                f"The checkpoint is damaged: of {next(iter(self.waiting))} only one of weight and bias was read. "
                "Download or save it again."
            )
        if self.arrived:
            name, weights = next(iter(self.arrived.items()))
            missing = sorted({member.name for member in self.plan.sites[name].members} - set(weights))
            raise CheckpointError(
                f"The checkpoint is damaged: {missing[0]} was not read, and {len(weights)} weights wait to be "
                "factorized with it. Download or save it again, or leave it out with `exclude_modules`."
            )
        if self.restores:
            check_integers(model)
        if not self.session.measuring:
            self.session.statistics = None
        if self.progress is not None:
            self.progress.close(None if self.session.measuring else _summary_line(self.plan, model))
            self.progress = None
        super()._process_model_after_weight_loading(model, **kwargs)
        if not factorized(model):
            detach(model)
        elif self.quantization_config.inner is None:
            unmark(model)

    def get_state_dict_and_metadata(self, model):
        # Ranks may have changed since loading; what is written must describe what is saved. This runs before the
        # config is written.
        if not getattr(model, "_hf_peft_config_loaded", False):
            refuse_adapters(model, "save the PEFT model, or call merge_and_unload()")
        self.quantization_config.modules = specs(model)
        return super().get_state_dict_and_metadata(model)

    def _dequantize(self, model, dtype=None):
        multiply_out(model)
        return model


def attach(model, config):
    """Make a model factorized in memory save like one that was loaded factorized."""
    config = copy.copy(config)
    config.session = config.calibration = None
    config.modules = specs(model)
    quantizer = LowRankQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.config.quantization_config = config


def _refuse_meta(device_map):
    name = next((name for name, device in device_map.items() if str(device) == "meta"), None)
    if name is not None:
        raise ConfigError(
            f"`device_map` puts {repr(name) if name else 'the model'} on 'meta', where there are no weights to "
            "factorize; give a device that holds them, such as 'cpu'."
        )


def _dtype(model, site):
    owner, _, leaf = site.weight_name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).dtype


def _fastest(device_map):
    """Where speed matters: the first accelerator of a device map, or the CPU."""
    if isinstance(device_map, str):
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    devices = [torch.device(device) for device in (device_map or {}).values() if device != "disk"]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _settle_dtypes(model, dtype):
    """Give a skeleton the dtypes that loading will: some models keep some parameters in float32."""
    kept = model._get_dtype_plan(dtype)
    if not kept:
        return
    pattern, globs, _ = build_glob_alternation(list(kept))
    for name, parameter in model.named_parameters():
        match = pattern.search(name)
        if match is not None:
            parameter.data = parameter.data.to(kept[globs[match.lastgroup]])


def _dense_bytes(site):
    return site.copies * site.out_features * site.in_features * torch.float32.itemsize


def _summary_line(plan, model):
    before = sum(site.copies * site.out_features * site.in_features for site in plan.sites.values())
    after = sum(t.numel() for site in plan.members.values() for t in site.kind.stored(model, site.name).values())
    kept = f" ({len(plan.dense)} left dense)" if plan.dense else ""
    return f"Factorized {len(plan.members)} matrices{kept}: {before / 1e6:.1f}M -> {after / 1e6:.1f}M parameters"
