"""Make PEFT know a tuner that does not come with it."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from ..registry import Registry


TUNERS = Registry("tuner")


def extend_peft_type(name):
    """The member of PEFT's closed enumeration of tuners called `name`, added if it is not there; idempotent.

    Args:
        name (`str`): in lower case.
    """
    value = name.upper()
    if value not in PeftType.__members__:
        # What EnumType does for a member when the class is made; there is no public way afterwards.
        member = str.__new__(PeftType, value)
        member._name_ = member._value_ = value
        member._sort_order_ = len(PeftType._member_names_)
        type.__setattr__(PeftType, value, member)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = PeftType._value2member_map_[value] = member
    return PeftType[value]


def saved_type(peft_type):
    """What `adapter_config.json` says under `peft_type`.

    PEFT looks the value up before it reads anything else, and quotes it in the KeyError of a type it does not know.
    So the file names its type by a sentence, which PEFT of a stack without this package shows, and which this package
    registers beside the plain type. It is the key of every adapter that was ever saved: another wording would be a
    further key, and this one stays.
    """
    return (
        f"{peft_type.value} is a tuner of hf_lowrank: run `pip install -U 'hf-lowrank[peft]'` and `import hf_lowrank` "
        "before this adapter is loaded"
    )


def register_tuner(name, config_cls, model_cls):
    """Enter a tuner into PEFT's tables, under its plain type and under what its files say; idempotent.

    Args:
        name (`str`): in lower case; names of the tuner's parameters start with it and an underscore.
        config_cls (`type`): a [`TargetConfig`].
        model_cls (`type`): a [`FactorTuner`].

    Raises:
        ConfigError: another class holds the name.
    """
    TUNERS.register(name)(config_cls)
    peft_type = extend_peft_type(name)
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) is not config_cls:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=f"{name}_")
    PEFT_TYPE_TO_CONFIG_MAPPING[saved_type(peft_type)] = config_cls
