"""Models for whoever may not import transformers."""

from transformers import AutoModelForCausalLM

from ..errors import EvaluationError, LowRankError


def load_causal(name, dtype=None):
    """A causal language model, dense or factorized.

    Args:
        name (`str`): folder or repository.
        dtype (`str`, *optional*): to load in; that of the checkpoint by default.

    Raises:
        EvaluationError: it is no causal language model.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, **({} if dtype is None else {"dtype": dtype}))
    except LowRankError:
        raise
    except ValueError as error:
        raise EvaluationError(f"{name} cannot be loaded as a causal language model: {error}") from error
