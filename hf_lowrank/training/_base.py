"""What callbacks share that work on the weights of a model in training: targets, refusals, and where state lives."""

import inspect
import json
import zlib
from typing import ClassVar

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import CheckpointError, ConfigError, TargetError
from ..sharding import refuse_fsdp, refuse_sharded
from ..surgery import match_sites


class WeightCallback(TrainerCallback, ExportableState):
    """Base of callbacks that keep state about weights of the model they train.

    The state lives in persistent buffers of the model, which `Trainer`'s checkpoints hold. They are added when
    `Trainer` is made, since it loads a checkpoint before training begins; they are filled when a run begins; and the
    callback takes them away when it ends. Of the callback itself, checkpoints hold the arguments, and where `Trainer`
    is asked to restore callbacks it makes a new one of them: a subclass finds everything anew in the model.

    Class attributes:
        prefix (`str`): what the names of its buffers begin with.
        writes (`bool`): whether it writes into weights or reads gradients between steps, of which DeepSpeed has copies
            of its own.
        replaces (`bool`): whether `register` puts other layers in the place of the model's, as its arguments say.
    """

    prefix: ClassVar[str]
    writes: ClassVar[bool] = True
    replaces: ClassVar[bool] = False

    def state(self):
        """What Trainer writes into a checkpoint: the arguments, and nothing else."""
        names = inspect.signature(type(self)).parameters
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def register(self, model):
        """Add what a checkpoint may fill: buffers, or modules."""
        raise NotImplementedError

    def start(self, model):
        """Fill what was registered, for a run that begins with its first step."""
        raise NotImplementedError

    def check_schedule(self, max_steps):
        """Refuse a schedule that does not fit a run of `max_steps` optimizer steps."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._register(args, state, model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        what = f"the weights of {type(self).__name__}"
        refuse_fsdp(model, what)
        refuse_sharded(dict(model.named_parameters()), what)
        self.check_schedule(state.max_steps)
        if state.global_step == 0:
            self._register(args, state, model)
            self.start(model)
            self._mark(model, 0)
        elif self._marked(model) != (state.global_step, self._fingerprint(model)):
            raise CheckpointError(
                f"The checkpoint of step {state.global_step} brought no state for {type(self).__name__}, or that of "
                "other layers. Resume with the arguments that the run began with, in a new Trainer that is given "
                "`model`, not `model_init`, and this callback among its `callbacks`."
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._mark(model, state.global_step)

    def _register(self, args, state, model):
        refuse_arguments(args, type(self))
        name = type(self).__name__
        if isinstance(state.stateful_callbacks.get(name), list):
            raise ConfigError(
                f"Several {name} in one Trainer would share their state; give one, with the targets of all."
            )
        arguments, before = self._arguments(), model._buffers.get(f"{self.prefix}_arguments")
        if before is not None and int(before) != arguments:
            if self.replaces:
                raise ConfigError(
                    f"The layers of this {type(model).__name__} were replaced for a {name} with other arguments, "
                    "perhaps for a run that was refused or broken off; load the model anew, or give the same ones."
                )
            before = None
        if before is None or self._marked(model) is None:
            # What an earlier run has left to be asked for is no part of this one's state.
            remove_buffers(model, self.prefix)
            self.register(model)
            add_buffer(model, model, f"{self.prefix}_run", torch.full((2,), -1, dtype=torch.int64))
            # Of this model in memory, and no part of a checkpoint.
            add_buffer(model, model, f"{self.prefix}_arguments", torch.tensor(arguments), persistent=False)

    def _arguments(self):
        """A number for the arguments."""
        return zlib.crc32(json.dumps(self.state()["args"], sort_keys=True, default=repr).encode())

    def _mark(self, model, step):
        run = model._buffers[f"{self.prefix}_run"]
        run.copy_(torch.tensor([step, self._fingerprint(model)]))

    def _marked(self, model):
        """`(step, fingerprint)` that a checkpoint has brought, or `None` where nothing is registered."""
        run = model._buffers.get(f"{self.prefix}_run")
        return None if run is None else tuple(run.tolist())

    def _fingerprint(self, model):
        """A number for the buffers that are registered: loading leaves those alone that a checkpoint lacks."""
        names = [name for name, _ in model.named_buffers() if name.rpartition(".")[2].startswith(f"{self.prefix}_")]
        names = [name for name in names if name != f"{self.prefix}_arguments"]
        return zlib.crc32("\n".join(sorted(names)).encode())


def refuse_arguments(args, callback):
    """Refuse `TrainingArguments` under which `callback`, a subclass of [`WeightCallback`], could not keep its word.

    Raises:
        ConfigError: fp16, or DeepSpeed where the callback writes weights.
    """
    if args.fp16:
        raise ConfigError(
            f"`fp16`=True of TrainingArguments scales gradients and skips the steps where they overflow, of which "
            f"{callback.__name__} is not told; use `bf16`=True or float32."
        )
    if callback.writes and args.deepspeed_plugin is not None:
        raise ConfigError(
            f"DeepSpeed steps on its own copies of weights and gradients, so that what {callback.__name__} writes "
            "would be lost; use DistributedDataParallel."
        )


def refuse_waiting(args, model, what):
    """Refuse several processes that would wait for gradients of `what`, which has none in some steps.

    Raises:
        ConfigError: `Trainer` does not let DistributedDataParallel look for parameters without a gradient.
    """
    looks = args.ddp_find_unused_parameters
    if looks is None:
        looks = not (args.activation_checkpointing or getattr(model, "is_activation_checkpointing", False))
    if args.world_size > 1 and not looks:
        raise ConfigError(
            f"Several processes would wait for gradients of {what}; give TrainingArguments "
            "`ddp_find_unused_parameters`=True, without gradient checkpointing or with a non-reentrant one."
        )


def trainable_sites(model, target_modules, exclude_modules):
    """The dense linears that a callback works on, as [`match_sites`] finds them, with their own gradients.

    Raises:
        TargetError: a pattern that matches nothing, nothing left, or a weight that is frozen or quantized.
    """
    sites = match_sites(model, target_modules, exclude_modules)
    if not sites:
        raise TargetError(
            f"`target_modules`={target_modules!r} leaves no dense linear layer of this {type(model).__name__} after "
            f"`exclude_modules`={exclude_modules!r}; widen the one or narrow the other."
        )
    for site in sites:
        weight = model.get_parameter(site.weight_name)
        if not (weight.requires_grad and weight.is_floating_point()):
            raise TargetError(
                f"`target_modules` names {site.name}, whose weight is frozen or quantized; train it "
                "(`requires_grad_(True)`), or leave it out with `exclude_modules`."
            )
    return sites


def buffer_name(site, prefix, name):
    """`(module, leaf)` of the buffer that holds `name` of a site; one module may hold several weights."""
    owner, _, leaf = site.weight_name.rpartition(".")
    return owner, f"{prefix}_{leaf}_{name}"


def add_site_buffer(model, site, prefix, name, tensor, persistent=True):
    """Register a buffer beside the weight of `site`, on its device; one that is not `persistent` is never saved."""
    owner, leaf = buffer_name(site, prefix, name)
    tensor = tensor.to(model.get_parameter(site.weight_name).device)
    add_buffer(model, model.get_submodule(owner), leaf, tensor, persistent)


def site_buffer(model, site, prefix, name):
    """What [`add_site_buffer`] registered, or `None`."""
    owner, leaf = buffer_name(site, prefix, name)
    return model.get_submodule(owner)._buffers.get(leaf)


def add_buffer(model, module, name, tensor, persistent=True):
    """Register a buffer in `module`, a part of `model`, that every process keeps by itself."""
    module.register_buffer(name, tensor, persistent)
    path = next(path for path, part in model.named_modules() if part is module)
    # DistributedDataParallel would send it around before every forward pass.
    _ignore(model, [*_ignored(model), f"{path}.{name}" if path else name])


def remove_buffers(model, prefix):
    """Take away all buffers whose names begin with `prefix`."""
    for module in model.modules():
        for name in [name for name in module._buffers if name.startswith(f"{prefix}_")]:
            delattr(module, name)
    _ignore(model, [name for name in _ignored(model) if not name.rpartition(".")[2].startswith(f"{prefix}_")])


def _ignored(model):
    return list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))


def _ignore(model, names):
    if names:
        model._ddp_params_and_buffers_to_ignore = names
    elif hasattr(model, "_ddp_params_and_buffers_to_ignore"):
        del model._ddp_params_and_buffers_to_ignore


@torch.no_grad()
def share(tensor):
    """Give every process the values that `tensor` has in the first: decompositions differ in last bits by hardware."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        # Broadcasting what is not contiguous mixes its values up, without an error.
        whole = tensor.contiguous()
        distributed.broadcast(whole, src=0)
        tensor.copy_(whole)
