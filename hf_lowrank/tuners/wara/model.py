from .._model import FactorTuner
from .layer import WaraLinear


class WaraModel(FactorTuner):
    """A model with WaRA adapters; made by `peft.get_peft_model(model, WaraConfig(...))`.

    Args:
        model (`torch.nn.Module`): the model that gets adapters.
        config ([`WaraConfig`]): what they are.
        adapter_name (`str`): the name of the first.
    """

    prefix = "wara_"
    tuner_layer_cls = WaraLinear
