"""Two passes over one batch in a single call of the model, as what wraps it for several processes wants it."""

from contextlib import contextmanager

from torch import nn

from ..errors import ConfigError


class Computed(nn.Module):
    """Stands in for a model where `Trainer` computes a loss from outputs that another call has made."""

    def __init__(self, model, outputs):
        super().__init__()
        # Not registered: `Trainer` asks for the names of its class.
        self.__dict__.update(outputs=outputs, _get_name=lambda: _architecture(model)._get_name())

    def forward(self, **inputs):
        return self.outputs(**inputs)


def _architecture(model):
    """The transformers model inside an adapted one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def replaced_forward(module, replacement):
    """Inside, calling `module` calls `replacement(its forward, ...)`."""
    own = module.__dict__.get("forward")
    forward = module.forward
    module.forward = lambda *args, **kwargs: replacement(forward, *args, **kwargs)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def refuse_two_passes(trainer, instead):
    """Refuse what two passes with different layers cannot be made under; `instead` gives one pass.

    Raises:
        ConfigError: gradient checkpointing, or several GPUs in one process.
    """
    inner = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.args.activation_checkpointing or getattr(inner, "is_activation_checkpointing", False):
        raise ConfigError(
            "Gradient checkpointing recomputes the first of two passes after the second has drawn other branches; "
            f"turn it off, or give {instead}."
        )
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"One process drives {trainer.args.n_gpu} GPUs, whose copies of the model cannot make two passes each; "
            "start one process a GPU with `torchrun` or `accelerate launch`."
        )
