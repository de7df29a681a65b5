"""What every measure needs of a model: evaluation mode, no gradients, the device and the length of its inputs."""

from contextlib import contextmanager

import torch

from ..errors import EvaluationError
from ..statistics.collect import device_of


@contextmanager
def inference(model):
    """Evaluation mode without gradients; yields the device of the model's inputs and restores the mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield device_of(model)
    finally:
        model.train(training)


def check_causal(model):
    """Refuse what predicts no next tokens from text alone, of which the numbers would mean nothing.

    Other than `integrations.calibration.is_causal`, it takes the text decoders of models that read images too.

    Raises:
        EvaluationError: no causal language model.
    """
    config = getattr(model, "config", None)
    generates = hasattr(model, "can_generate") and model.can_generate() and model.main_input_name == "input_ids"
    if not generates or config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise EvaluationError(
            f"hf_lowrank.evaluation measures causal language models, which {type(model).__name__} is not; give one, "
            "such as AutoModelForCausalLM loads, or measure this model by a score of its own task."
        )


def max_length(model):
    """Tokens that the model's positions allow, or `None` where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def mean_and_error(values):
    """`(mean, standard error)` of a sample: the error is std / sqrt(n) with n - 1 in std, `None` for one value."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    return mean, (sum((value - mean) ** 2 for value in values) / (count - 1) / count) ** 0.5
