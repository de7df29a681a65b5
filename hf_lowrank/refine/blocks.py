from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from ..blocks import Chain, block_names, find_chains, in_dtype, record
from ..errors import ConfigError, NonFiniteError
from ..parts import Parts, digest_of_batches
from ..statistics.masks import has_decoder
from .base import Descent, in_training, read_part, register_refinement, token_mask


@register_refinement("blocks")
@dataclass(frozen=True)
class BlockRefinement(Descent):
    r"""Train each factorized block, alone and in order, to give what the dense block gave.

        min over all parameters of block'    mean_t |block'(x'_t) - block(x_t)|^2 / |block(x_t)|^2

    `x` comes from the dense blocks in front, `x'` from the compressed ones, so that every block also makes up for the
    errors before it. Factors, biases, norms, and weights that the budget has left dense are trained, in float32
    whatever they are stored in; what `exclude_modules` or `rank_pattern` keeps, and routers, stay as they are. One
    block is trained at a time: beside the dense model this takes its gradients and optimizer states, and two hidden
    states for every calibration token.

    Args:
        epochs (`int`, defaults to 6): passes over the calibration data for each block, at least 0.
        learning_rate (`float`, defaults to 1e-3): peak of the schedule (linear warm-up, then a cosine to zero), above
            0.
        batch_size (`int`, *optional*): sequences a step, at least 1; unset, those of a calibration batch.
        warmup_ratio (`float`, defaults to 0.1): fraction of the steps spent warming up, in [0, 1).
        max_grad_norm (`float`, defaults to 1.0): gradients are clipped to this norm, above 0.

    Raises:
        ConfigError: an option out of range; a model without repeated blocks, or one that runs a block twice.
        NonFiniteError: the loss of a block becomes NaN or infinite.
        CheckpointError: the folder holds finished blocks of another run.

    Reference:
        AA-SVD (2026, atulkumarin/AA-SVD). Differs: the error of each token is relative to the size of its target,
        since the few tokens with very large activations would otherwise be all that counts, and the next block
        normalizes what it reads; fewer steps, at a higher learning rate.
    """

    epochs: int = 6
    blockwise: ClassVar[bool] = True

    def check(self, model, sites, batches):
        if not block_names(model, [site.name for site in sites]):
            raise ConfigError(
                "`refine`='blocks' needs repeated blocks (an nn.ModuleList of layers) that hold factorized weights, "
                f"and {type(model).__name__} has none; leave `refine` unset."
            )

    def refine(self, model, sites, replace, batches, seed, folder=None, progress=None, teacher=None):
        self.check(model, sites, batches)
        batches = self.split(batches)
        names = block_names(model, [site.name for site in sites])
        inside = {name: [site for site in sites if site.name.startswith(f"{name}.")] for name in names}

        def runs():
            return [lambda batch=batch: model(**batch) for batch in batches]

        with torch.no_grad():
            chains = find_chains(model, names, runs()[0])
            dense = [record(model, Chain(chain.names), runs()) for chain in chains]
            for site in sites:
                if not any(site in block for block in inside.values()):
                    replace(site)
        fixed = set() if teacher is None else {id(p) for p in teacher.parameters()}
        steps = iter(progress(names) if progress else names)
        for chain, source in zip(chains, dense, strict=True):
            with torch.no_grad():
                record(model, chain, runs())
            masks = _masks(batches, chain.inputs, _in_decoder(model, chain.names[0]))
            for name in chain.names:
                next(steps)
                block = model.get_submodule(name)
                with torch.no_grad():
                    source.advance(block, name)
                    for site in inside[name]:
                        replace(site)
                calls = [calls[name] for calls in chain.calls]
                goal = _Goal(name, calls, chain.inputs, source.inputs, masks)
                self._refine_block(block, goal, fixed, seed, folder)
                with torch.no_grad():
                    chain.advance(block, name)
        next(steps, None)

    def _refine_block(self, block, goal, fixed, seed, folder):
        """Train one block, or take what an earlier call has saved of it."""
        if folder is None:
            self._train(block, goal, fixed, seed)
            return
        parts = Parts(folder, {})
        # Everything that decides what training gives: nothing else may be taken for its result.
        data = _numbered(goal.inputs, goal.targets)
        mark = digest_of_batches([asdict(self) | {"seed": seed}, block.state_dict(), *data])
        if goal.block in parts:
            with torch.no_grad():
                block.load_state_dict(read_part(parts, goal.block, mark)[0])
            return
        self._train(block, goal, fixed, seed)
        parts.write(goal.block, block.state_dict(), {"mark": mark})

    def _train(self, block, goal, fixed, seed):
        parameters = [p for p in block.parameters() if p.is_floating_point() and id(p) not in fixed]
        buffers = {key: buffer.dtype for key, buffer in block.named_buffers()}
        generator = torch.Generator().manual_seed(seed)
        with in_training(block, parameters):
            block.float()
            optimizer, schedule = self.optimizer(parameters, self.epochs * len(goal.inputs))
            try:
                for _ in range(self.epochs):
                    for index in torch.randperm(len(goal.inputs), generator=generator).tolist():
                        call, hidden = in_dtype(goal.calls[index], goal.inputs[index], torch.float32)
                        loss = _relative_error(call(block, hidden), goal.targets[index], goal.masks[index])
                        if not torch.isfinite(loss):
                            raise NonFiniteError(
                                f"The refinement of {goal.block} diverges: its loss is {loss.item()}; lower "
                                f"`learning_rate`={self.learning_rate:g}."
                            )
                        loss.backward()
                        self.step(parameters, optimizer, schedule)
            finally:
                for key, dtype in buffers.items():
                    owner, _, leaf = key.rpartition(".")
                    module = block.get_submodule(owner)
                    module._buffers[leaf] = module._buffers[leaf].to(dtype)


@dataclass(frozen=True)
class _Goal:
    """What the block of this name is called with, batch by batch, and has to give."""

    block: str
    calls: list
    inputs: list
    targets: list
    masks: list


def _relative_error(output, target, mask):
    target = target.to(output.device, torch.float32)
    error, size = (output - target).square().sum(-1), target.square().sum(-1)
    if mask is not None:
        error, size = error[mask], size[mask]
    return (error / size.clamp(min=torch.finfo(size.dtype).tiny)).mean()


def _in_decoder(model, name):
    if not has_decoder(model):
        return False
    block = model.get_submodule(name)
    return any(module is block for module in model.get_decoder().modules())


def _masks(batches, inputs, decoder):
    """For each batch the real tokens among the rows of the hidden state, or `None` where all are."""
    masks = [token_mask(batch, x.shape[:-1], decoder) for batch, x in zip(batches, inputs, strict=True)]
    return [None if m is None else m.to(x.device) for m, x in zip(masks, inputs, strict=True)]


def _numbered(*lists):
    return [{str(index): tensor for index, tensor in enumerate(tensors)} for tensors in lists]
