"""What is asked of a dense model in memory before it is factorized: statistics, curves, probes, and so its ranks."""

from dataclasses import dataclass, field

from ..errors import CalibrationError
from ..factorize import measure_site
from ..latency import Latencies, latencies_for
from ..linalg import require_finite
from ..plan import Measured, make_plan
from ..statistics import STATISTICS
from ..statistics.collect import collect
from ..statistics.sequential import collect_sequentially
from .calibration import Labelled, as_calibration, check_calibration, make_batches, saved_statistics
from .probe import Keeping, probing
from .progress import Progress, bar


@dataclass
class Gathered:
    """What calibration data told.

    Args:
        statistics ([`Statistics`], *optional*): for methods that need them.
        batches (`list[dict]`): kept for allocators that probe the model, and for refinements.
        provenance (`dict`, *optional*): JSON that describes the data.
    """

    statistics: object = None
    batches: list = field(default_factory=list)
    provenance: dict | None = None


def gather(model, sites, recipe, calibration, tokenizer, token=None):
    """Read or make whatever calibration data `recipe` needs at `sites`; arguments as for `collect_for`."""
    calibration = as_calibration(calibration)
    if not recipe.needs_statistics and not recipe.samples_kept:
        return Gathered()
    saved = saved_for(recipe, calibration, token)
    if saved is not None:
        return Gathered(saved, provenance=saved.provenance)
    if recipe.needs_statistics:
        keeping = Keeping((), recipe.samples_kept)
        statistics = collect_for(model, sites, recipe, calibration, tokenizer, keeping)
        return Gathered(statistics, keeping.kept, statistics.provenance)
    check_calibration(calibration, model)
    batches, provenance = make_batches(calibration, model, tokenizer, recipe.seed)
    keeping = Keeping(batches, recipe.samples_kept)
    keeping.take()
    return Gathered(None, keeping.kept, provenance)


def saved_for(recipe, calibration, token=None):
    """The [`Statistics`] that `calibration` names, or `None` where it is data.

    Raises:
        CalibrationError: the allocator, the method or the refinement needs data itself, or what data cannot give.
    """
    saved = saved_statistics(calibration, token)
    if saved is None:
        refuse_uncollectable(recipe, calibration)
    if saved is not None or calibration.data is None:
        given = "None" if saved is None else "saved statistics"
        if recipe.needs_probe:
            raise CalibrationError(
                f"`allocation`={recipe.allocation.name!r} compares outputs of the model on calibration data, and "
                f"`calibration` is {given}; give the data, or use an allocation that does without, such as 'knapsack'."
            )
        if recipe.method.anchored:
            raise CalibrationError(
                f"`method`={recipe.method.name!r} compares the dense and the compressed model on calibration data, "
                f"and `calibration` is {given}; give the data, or use a method that does without, such as 'kfac_svd'."
            )
        if recipe.refine is not None:
            raise CalibrationError(
                f"`refine`={recipe.refine.name!r} trains on calibration data, and `calibration` is {given}; give the "
                "data, or leave `refine` unset."
            )
    return saved


def check_latencies(recipe):
    """Read the table of latencies that `recipe` names, if any, before anything else is done.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if recipe.needs_latencies and recipe.allocation.latencies is not None:
        Latencies.load(recipe.allocation.latencies)


def refuse_uncollectable(recipe, calibration):
    """Refuse what no data, or not this data, can tell: what training leaves behind, and gradients on the model's text.

    Raises:
        CalibrationError: naming the statistics and the cure.
    """
    names = [name for name in recipe.statistics if STATISTICS[name].needs_labels]
    if names and calibration.drawn:
        raise CalibrationError(
            f"`allocation`={recipe.allocation.name!r} reads {names}, and on text sampled from the model itself the "
            "gradient of its loss is noise about zero; give real text or labelled batches as `calibration`."
        )
    names = [name for name in recipe.statistics if not STATISTICS[name].collected]
    if names:
        raise CalibrationError(
            f"`method`={recipe.method.name!r} with these options reads {names}, which no pass over data collects. "
            "Give what training has left, `FirstOrderPruningCallback(keep_scores=True).statistics(model)` or a file "
            "of it, as `calibration`; or use an option or a method that reads no such statistic."
        )


def collect_for(model, sites, recipe, calibration, tokenizer, keeping=None, processes=None):
    """The statistics that `recipe` needs at `sites`.

    Args:
        model (`PreTrainedModel`): dense, in memory or dispatched.
        sites (`list[Site]`): where to collect.
        recipe ([`Recipe`]): method and seed.
        calibration ([`Calibration`]): the data.
        tokenizer (`Callable[[], PreTrainedTokenizer]`): called if text has to be read.
        keeping ([`Keeping`], *optional*): what is to keep some of the batches that pass.
        processes ([`Processes`], *optional*): that share the data out.
    """
    check_calibration(calibration, model)
    for site in sites:
        weight = model.get_parameter(site.weight_name)
        if weight.device.type != "meta":
            require_finite(weight.detach(), f"The weight of {site.name}")
    batches, provenance = make_batches(calibration, model, tokenizer, recipe.seed, processes)
    if any(STATISTICS[name].needs_labels for name in recipe.statistics):
        batches = Labelled(model, batches)
    if keeping is not None:
        keeping.batches = batches
        batches = keeping
    needed = model, sites, recipe.statistics, batches
    options = {
        "provenance": provenance,
        "progress": lambda iterable: bar(iterable, "Calibrating"),
        "seed": recipe.seed,
    }
    if calibration.folder is None:
        return collect(*needed, **options, processes=processes)
    return collect_sequentially(*needed, calibration.folder, **options)


def informed_plan(model, recipe, gathered, available=None):
    """The plan of a dense model in memory, with all that the allocator wants to know measured first.

    Args:
        model (`torch.nn.Module`): dense, in memory.
        recipe ([`Recipe`]): what to do.
        gathered ([`Gathered`]): from calibration data.
        available (*optional*): as for `make_plan`.
    """
    plan = make_plan(model, recipe, available)
    if not (recipe.needs_curves or recipe.needs_probe or recipe.needs_latencies):
        return plan
    measured = Measured(latencies=latencies_for(model, recipe, available))
    if recipe.needs_curves:
        measured.curves = _curves(model, plan.sites, recipe, gathered.statistics)
    if not recipe.needs_probe:
        return make_plan(model, recipe, available, measured)
    with probing(model, plan.sites, recipe, gathered.statistics, gathered.batches) as measured.probe:
        return make_plan(model, recipe, available, measured)


def _curves(model, sites, recipe, statistics):
    progress, curves = Progress(len(sites), "Measuring"), {}
    for site in sites.values():
        progress.start(site.name)
        curves[site.name] = measure_site(site, site.kind.weight(model, site), recipe, statistics)
        progress.done()
    progress.close()
    return curves
