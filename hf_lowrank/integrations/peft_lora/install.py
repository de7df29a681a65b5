"""Make PEFT take a factorized layer for the linear layer it stands for.

PEFT decides by `isinstance(layer, nn.Linear)` what it can adapt. While a model carries adapters, its factorized layers
pass for linears (`formats/_face.py`), so that every PEFT method finds them under the names of the dense model, and
PEFT's own layers wrap them. Only what writes weights is replaced: merging (`merging.py`).

Four public methods of PEFT's `BaseTuner` are wrapped, what it and transformers do with biases (`biases.py`), and the
function behind `target_modules="all-linear"`.
"""

import functools
import sys
from contextlib import ExitStack, contextmanager

from ...errors import ComputedWeightError, ConfigError
from ...formats import FormatLinear, put_face_on, take_face_off
from ..autoload import after_import
from .biases import wrap_biases, wrap_load_adapter
from .merging import MERGED, make_mergeable


TARGET = "peft.tuners.tuners_utils"
# Beginnings of the values of LoraConfig's `init_lora_weights` that subtract the adapter from the weight.
WRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def install_when_imported():
    """Patch PEFT now if it is imported already, else right after its import; idempotent."""
    if TARGET in sys.modules:
        install(sys.modules[TARGET])
    else:
        after_import(TARGET, install)


def install(tuners_utils):
    """Wrap what decides about layers in the module `peft.tuners.tuners_utils`."""
    tuner, layer_class = tuners_utils.BaseTuner, tuners_utils.BaseTunerLayer
    if hasattr(tuner, "lowrank_installed"):
        return
    tuner.lowrank_installed = True

    def wrap(name, *contexts):
        original = getattr(tuner, name)

        @functools.wraps(original)
        def wrapped(self, *args, **kwargs):
            # Only the constructor has no model yet, and injection is given it too.
            model = self.model if hasattr(self, "model") else args[0] if args else kwargs["model"]
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context(model, layer_class))
                return original(self, *args, **kwargs)

        setattr(tuner, name, wrapped)

    wrap("__init__", adapting)
    wrap("inject_adapter", adapting, whole_or_not_at_all)
    wrap("merge_and_unload", adapting)
    wrap("unload", adapting)
    wrap_biases(tuner)
    wrap_load_adapter()

    all_linear = tuners_utils._maybe_include_all_linear_layers

    @functools.wraps(all_linear)
    def include_all_linear(peft_config, model):
        wanted = getattr(peft_config, "target_modules", None)
        config = all_linear(peft_config, model)
        if isinstance(wanted, str) and wanted != config.target_modules:
            config.target_modules = config.target_modules - inner_names(model)
        check_targets(model, config, tuners_utils.check_target_module_exists)
        return config

    # Some methods have imported it by name, if PEFT was imported first.
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"]:
        if vars(module).get(all_linear.__name__) is all_linear:
            setattr(module, all_linear.__name__, include_all_linear)


@contextmanager
def adapting(model, layer_class):
    """While open, all factorized layers in `model` pass for linears; afterwards, those with adapters do."""
    layers = [module for module in model.modules() if isinstance(module, FormatLinear)]
    for layer in layers:
        put_face_on(layer)
    try:
        yield
    finally:
        wrapped = [module for module in model.modules() if isinstance(module, layer_class)]
        bases = {id(module.get_base_layer()) for module in wrapped}
        for layer in layers:
            if id(layer) not in bases:
                take_face_off(layer)
            if not wrapped:
                vars(layer).pop(MERGED, None)
        lenders = tuple(layer for layer in layers if hasattr(layer, "lender"))
        for module in wrapped:
            if isinstance(module.get_base_layer(), FormatLinear):
                make_mergeable(module, lenders)


@contextmanager
def whole_or_not_at_all(model, layer_class):
    """A PEFT method that writes the weight of a factorized layer ends here; a model without adapters stays one."""
    adapted = any(isinstance(module, layer_class) for module in model.modules())
    try:
        yield
    except ComputedWeightError as error:
        for name, module in list(model.named_modules()):
            if not adapted and isinstance(module, layer_class):
                model.set_submodule(name, module.get_base_layer())
        raise ComputedWeightError(
            f"This PEFT method changes the weights it adapts, and those of factorized layers are computed ({error}) "
            "Use another method or initialization, or adapt the factors themselves "
            "(`target_modules=['left', 'right']`)."
        ) from error


def inner_names(model):
    """Full names of all modules inside factorized layers: parts of a linear layer, not linear layers of the model."""
    return {
        f"{name}.{inner}"
        for name, layer in model.named_modules()
        if isinstance(layer, FormatLinear)
        for inner, _ in layer.named_modules()
        if inner
    }


def check_targets(model, config, is_target):
    """Refuse what cannot be adapted, before anything is.

    Args:
        model (`torch.nn.Module`): has factorized layers or not.
        config (`PeftConfig`): of the adapter to be.
        is_target (`Callable[[PeftConfig, str], bool]`): whether it adapts the module of a name.

    Raises:
        ConfigError: an initialization that writes the weight; a layer and one of its factors at once; a layer whose
            tuner admits no other around it.
    """
    if not getattr(config, "target_modules", None):
        return
    for name, module in model.named_modules():
        only = getattr(module, "only_tuner", None)
        if only not in (None, config.peft_type) and is_target(config, name):
            raise ConfigError(
                f"{name} carries a {only} adapter, which takes the place of the weight that this {config.peft_type} "
                "adapter would change; call `merge_and_unload()` or `unload()` first."
            )
    layers = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if isinstance(m, FormatLinear)}
    names = [name for name in layers if is_target(config, name)]
    init = getattr(config, "init_lora_weights", None)
    if names and isinstance(init, str) and init.lower().startswith(WRITING_INITS):
        raise ConfigError(
            f"`init_lora_weights`={init!r} takes the adapter out of the weight of {names[0]}, which is factorized: "
            "what is left of it has no place there. Use True, 'gaussian', 'orthogonal', 'eva' or 'mica'."
        )
    for name in names:
        for inner, _ in layers[name].named_modules():
            if inner and is_target(config, f"{name}.{inner}"):
                raise ConfigError(
                    f"`target_modules` names {name} and its factor {name}.{inner}; adapt the layer as a whole, or "
                    "its factors."
                )
