"""Models whose attention, pooling or head is of low rank, for transformers' Auto classes, Trainer and Hub."""

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from .lama import LamaConfig, LamaForSequenceClassification, LamaModel, LamaPooler
from .linformer import (
    LinformerConfig,
    LinformerForMaskedLM,
    LinformerForSequenceClassification,
    LinformerModel,
)
from .shared_basis_head import SharedBasisHead, SharedBasisHeadConfig
from .zero_shot import text_features, zero_shot_head


for _config, _model in (
    (LinformerConfig, LinformerModel),
    (LamaConfig, LamaModel),
    (SharedBasisHeadConfig, SharedBasisHead),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
AutoModelForSequenceClassification.register(LamaConfig, LamaForSequenceClassification, exist_ok=True)
AutoModelForMaskedLM.register(LinformerConfig, LinformerForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(LinformerConfig, LinformerForSequenceClassification, exist_ok=True)

__all__ = [
    "LamaConfig",
    "LamaForSequenceClassification",
    "LamaModel",
    "LamaPooler",
    "LinformerConfig",
    "LinformerForMaskedLM",
    "LinformerForSequenceClassification",
    "LinformerModel",
    "SharedBasisHead",
    "SharedBasisHeadConfig",
    "text_features",
    "zero_shot_head",
]
