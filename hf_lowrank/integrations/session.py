"""What one `from_pretrained` call has to remember beside its config, and how it can end early."""

from dataclasses import dataclass, field

from ..plan import Measured


@dataclass
class Session:
    """What one `from_pretrained` call knows beside its config.

    Args:
        statistics ([`Statistics`], *optional*): for methods that need them.
        key_mapping (`dict`, *optional*): as given to `from_pretrained`.
        given_keys (`list`, *optional*): of the `state_dict` given to `from_pretrained` in place of files.
        offload_folder (`str`, *optional*): as given to `from_pretrained`.
        measured ([`Measured`]): what allocators want to know, as far as earlier passes have found it out.
        measuring (`bool`): whether this pass collects error curves and throws the model away.
        rehearsing (`bool`): whether this pass ends as soon as the plan stands.
        provenance (`dict`): JSON that describes the calibration.
    """

    statistics: object = None
    key_mapping: dict | None = None
    given_keys: list | None = None
    offload_folder: str | None = None
    measured: Measured = field(default_factory=Measured)
    measuring: bool = False
    rehearsing: bool = False
    provenance: dict = field(default_factory=dict)

    def __deepcopy__(self, memo):
        # transformers copies configs at will; they all belong to the same call.
        return self


class Rehearsed(Exception):  # noqa: N818 (nothing went wrong)
    """Ends a load before any weight is read; never leaves `from_pretrained`.

    Only transformers knows what it will load: dtypes, names and shapes depend on files and arguments alike.

    Args:
        model (`PreTrainedModel`): the dense skeleton, on the meta device.
        plan ([`Plan`]): what would happen to it.
        files (`list[str]`, *optional*): what would be read; `None` where it is not files.
    """

    def __init__(self, model, plan, files):
        super().__init__("rehearsed")
        self.model = model
        self.plan = plan
        self.files = files


class Stopped(BaseException):  # noqa: N818 (what went wrong is `failure`)
    """Ends a load as soon as a factorization fails; never leaves `from_pretrained`.

    transformers collects what is an `Exception`, and goes on loading.

    Args:
        failure (`Exception`): what `from_pretrained` raises.
    """

    def __init__(self, failure):
        super().__init__("stopped")
        self.failure = failure
