"""hf_lowrank: make Hugging Face models smaller by factorizing their weights.

Importing this package registers everything with transformers; `from_pretrained(..., lowrank_config=LowRankConfig())`
then factorizes while it loads. The names in `NEED_PEFT` are imported with PEFT, those in `NEED_TRAINER` with
transformers' `Trainer`, on first use.
"""

from .allocation import ALLOCATORS, Allocator, Candidate, Probe, register_allocator
from .errors import (
    CalibrationError,
    CheckpointError,
    ComputedWeightError,
    ConfigError,
    EvaluationError,
    LowRankError,
    MissingPackageError,
    NonFiniteError,
    NotPSDError,
    NumericalWarning,
    RankError,
    ResourceError,
    StatisticsError,
    TargetError,
    UnknownNameError,
)
from .evaluation import (
    Evaluation,
    MultipleChoiceTask,
    PerplexityTask,
    Sweep,
    SweepPoint,
    evaluate,
    sweep,
    text_samples,
)
from .formats import (
    FORMATS,
    DenseLinear,
    DenseSparseLinear,
    FormatLinear,
    HybridRowsLinear,
    LowRankConv,
    LowRankLinear,
    MultiResolutionLinear,
    PivotedLinear,
    SharedBasisLinear,
    SparseLowRankLinear,
    TensorTrainLinear,
    WeightedBasesLinear,
    register_format,
)
from .integrations import (
    Calibration,
    FactorizedCheckpoint,
    LowRankConfig,
    LowRankQuantizer,
    auto_fact,
    calibrate_checkpoint,
    collect_statistics,
    factorize,
    factorize_checkpoint,
    model_card,
    prune_channels,
    residual_adapter,
    share_initializers,
    to_dense,
    train_only,
)
from .integrations.autoload import register_tuners
from .latency import Latencies, measure_latencies
from .methods import METHODS, Factors, Method, register_method
from .models import (
    LamaConfig,
    LamaForSequenceClassification,
    LamaModel,
    LamaPooler,
    LinformerConfig,
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerModel,
    SharedBasisHead,
    SharedBasisHeadConfig,
    text_features,
    zero_shot_head,
)
from .passes import fold_order, merge_linear
from .recipe import Recipe
from .reporting import RankProfile, Report, Sample, Summary, rank_profile, report, summary
from .statistics import STATISTICS, Statistic, Statistics, register_statistic
from .truncate import truncate


__version__ = "0.1.0.dev0"

__all__ = [
    "ALLOCATORS",
    "FORMATS",
    "METHODS",
    "STATISTICS",
    "Allocator",
    "Calibration",
    "CalibrationError",
    "Candidate",
    "CheckpointError",
    "ComputedWeightError",
    "ConfigError",
    "DenseLinear",
    "DenseSparseLinear",
    "Evaluation",
    "EvaluationError",
    "FactorizedCheckpoint",
    "Factors",
    "FormatLinear",
    "HybridRowsLinear",
    "LamaConfig",
    "LamaForSequenceClassification",
    "LamaModel",
    "LamaPooler",
    "Latencies",
    "LinformerConfig",
    "LinformerForMaskedLM",
    "LinformerForSequenceClassification",
    "LinformerModel",
    "LowRankConfig",
    "LowRankConv",
    "LowRankError",
    "LowRankLinear",
    "LowRankQuantizer",
    "Method",
    "MissingPackageError",
    "MultiResolutionLinear",
    "MultipleChoiceTask",
    "NonFiniteError",
    "NotPSDError",
    "NumericalWarning",
    "PerplexityTask",
    "PivotedLinear",
    "Probe",
    "RankError",
    "RankProfile",
    "Recipe",
    "Report",
    "ResourceError",
    "Sample",
    "SharedBasisHead",
    "SharedBasisHeadConfig",
    "SharedBasisLinear",
    "SparseLowRankLinear",
    "Statistic",
    "Statistics",
    "StatisticsError",
    "Summary",
    "Sweep",
    "SweepPoint",
    "TargetError",
    "TensorTrainLinear",
    "UnknownNameError",
    "WeightedBasesLinear",
    "auto_fact",
    "calibrate_checkpoint",
    "collect_statistics",
    "evaluate",
    "factorize",
    "factorize_checkpoint",
    "fold_order",
    "measure_latencies",
    "merge_linear",
    "model_card",
    "prune_channels",
    "rank_profile",
    "register_allocator",
    "register_format",
    "register_method",
    "register_statistic",
    "report",
    "residual_adapter",
    "share_initializers",
    "summary",
    "sweep",
    "text_features",
    "text_samples",
    "to_dense",
    "train_only",
    "truncate",
    "zero_shot_head",
]

NEED_PEFT = ("MixedRankConfig", "MixedRankModel", "WaraConfig", "WaraModel")
NEED_TRAINER = (
    "BasisSelectionCallback",
    "DimensionSqueezingCallback",
    "FirstOrderPruningCallback",
    "MaestroCallback",
    "MaestroTrainer",
    "MixedRankCallback",
    "MixedRankTrainer",
    "SequentialFreezingCallback",
    "StraightThroughFactorizerCallback",
    "TrainedRankPruningCallback",
    "keep_leading",
    "maestro_ranks",
)

register_tuners()


def __getattr__(name):
    if name in NEED_TRAINER:
        from . import training

        return getattr(training, name)
    if name not in NEED_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import tuners
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingPackageError(
            f"{name} needs PEFT, which is not installed: `pip install 'hf-lowrank[peft]'`."
        ) from error
    return getattr(tuners, name)


def __dir__():
    return sorted({*globals(), *NEED_PEFT, *NEED_TRAINER})
