"""The verb for pruning channels of a model in memory: data, flow, scores, narrower layers, and a record of it."""

import itertools

from ..checks import check_seed
from ..errors import CalibrationError
from ..passes import prune as passes
from ..readme import repository
from ..statistics.collect import collect
from ..surgery import factorized, outermost_pretrained
from ..versions import versions
from .calibration import as_calibration, check_calibration, make_batches, saved_statistics
from .config import LowRankConfig
from .progress import bar
from .quantizer import LowRankQuantizer, attach
from .verbs import refuse_offloaded, refuse_quantized, tokenizer_for


def prune_channels(
    model,
    param_ratio=0.8,
    calibration="self",
    tokenizer=None,
    channel_groups=passes.CHANNEL_GROUPS,
    keep_bottom=0.01,
    channel_multiple=1,
    seed=0,
):
    r"""Take the least important channels out of feed-forward layers, in place; what is left are narrower linears.

        s_c = | |gate[c, :]| * |X| |_2 + | |up[c, :]| * |X| |_2 + | |down[:, c]| * |H_c| |_2,

    with X the inputs of gate and up and H those of down. Of the channels by rising s, the first `keep_bottom` stay,
    since the paper found them to matter after all, `1 - param_ratio` after these go, and the rest stays. The model
    computes what it would with the channels that go at zero. It is saved with the widths of its layers and loads with
    plain `from_pretrained`; [`to_dense`] puts zeros in the place of what is gone.

    With attention factorized before by `method="awsvd"` and `allocation="lorap"`, these layers excluded, it is LoRAP,
    and the norms are those of activations that the compressed attention makes.

    Args:
        model (`PreTrainedModel`): in memory; its feed-forward layers dense, others may be factorized.
        param_ratio (`float`, defaults to 0.8): channels kept, and so parameters of these layers, in (0, 1].
        calibration (defaults to `"self"`): data, as `calibration` of [`LowRankConfig`]; not statistics saved before.
        tokenizer (*optional*): for texts; by default the one at `model.name_or_path`.
        channel_groups (`list`, defaults to `[[["gate_proj", "up_proj"], "down_proj"]]`): pairs of the names or dotted
            suffixes of linears that put channels out, and that of the linear that reads them. That these are read by
            it alone and channel by channel is tried, on the first batch.
        keep_bottom (`float`, defaults to 0.01): the part of all channels that is kept of the least important ones, in
            [0, `param_ratio`).
        channel_multiple (`int`, defaults to 1): the number of channels left is a multiple of it; rounded down.
        seed (`int`, defaults to 0): of sampling.

    Returns:
        The same model.

    Raises:
        ConfigError: an argument out of range.
        TargetError: no group is found, or one whose channels cannot be taken away; the model is as it was.
        CalibrationError: no data, or data that does not reach a group.
        NonFiniteError: a weight holds NaN or infinity, or a block puts them out; the model is as it was.

    Reference:
        LoRAP, ICML 2024, its pruning of the feed-forward layers. Differs: norms are means over tokens, one factor for
        all channels; all layers are scored before the first is pruned, not one after the other; biases do not count.
    """
    pruning = passes.Pruning(param_ratio, keep_bottom, channel_multiple)
    check_seed(seed)
    refuse_quantized(model)
    groups = passes.channel_groups(model, channel_groups)
    refuse_offloaded(model)
    calibration = as_calibration(calibration)
    if saved_statistics(calibration) is not None:
        raise CalibrationError(
            "`calibration` of prune_channels is statistics; give the data itself, on which is tried which layers read "
            "which channels."
        )
    check_calibration(calibration, model)
    batches, provenance = make_batches(calibration, model, tokenizer_for(model, tokenizer), seed)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise CalibrationError("`calibration` gave no batch; give at least one text or one batch.")
    passes.check_flow(model, groups, first)
    sites = [site for group in groups for site in group.sites]
    progress = {"progress": lambda iterable: bar(iterable, "Calibrating"), "seed": seed}
    statistics = collect(model, sites, (passes.STATISTIC,), itertools.chain([first], batches), provenance, **progress)
    kept = passes.prune_groups(model, groups, statistics, pruning)
    _describe(
        model,
        {
            "param_ratio": param_ratio,
            "keep_bottom": keep_bottom,
            "groups": len(kept),
            "calibration": statistics.provenance,
        },
    )
    return model


def _describe(model, record):
    """Let the transformers models in `model` be saved with the widths of their layers, and say how they came about."""
    for _, part in outermost_pretrained(model):
        if not factorized(part):
            continue
        if not isinstance(getattr(part, "hf_quantizer", None), LowRankQuantizer):
            config = LowRankConfig()
            config.recipe = {"versions": versions()}
            base = repository(getattr(part, "name_or_path", None))
            if base is not None:
                config.recipe["base_model"] = base
            attach(part, config)
        part.config.quantization_config.recipe = {
            **(part.config.quantization_config.recipe or {}),
            "channel_pruning": record,
        }
