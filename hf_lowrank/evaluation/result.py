"""The result of an evaluation, as data."""

from dataclasses import asdict, dataclass, field

from ..files import write_json
from .multiple_choice import MultipleChoice
from .perplexity import Perplexity
from .size import Size


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on one model, and what it takes to measure it again; `print` shows the numbers.

    Args:
        perplexity (`dict[str, Perplexity]`): by the name of the text.
        multiple_choice (`dict[str, MultipleChoice]`): by the name of the task.
        size ([`Size`]): parameters and bytes.
        model (`dict`): its name, class and dtype, and the recipe it was factorized with.
        data (`dict`): by the same names, what was read and its sha256.
        environment (`dict`): versions and processor.
        preset (`str`, *optional*): the protocol.
        command (`str`): the command line.
        seconds (`float`): of measuring.
    """

    perplexity: dict[str, Perplexity]
    multiple_choice: dict[str, MultipleChoice]
    size: Size
    model: dict = field(repr=False)
    data: dict = field(repr=False)
    environment: dict = field(repr=False)
    preset: str | None
    command: str = field(repr=False)
    seconds: float

    @property
    def mean_accuracy(self):
        """Unweighted mean over tasks of `acc_norm`, or of `acc` where a task has no other; `None` without tasks."""
        values = [task.value for task in self.multiple_choice.values()]
        return sum(values) / len(values) if values else None

    def to_json(self):
        """The result as plain JSON."""
        return {**asdict(self), "mean_accuracy": self.mean_accuracy}

    def save(self, path):
        """Write the JSON to `path`, where it appears when it is complete."""
        write_json(path, self.to_json())

    def __str__(self):
        lines = [f"{self.size.parameters / 1e6:.1f}M parameters, {self.size.bytes / 2**20:.1f} MiB"]
        for name, text in self.perplexity.items():
            lines.append(f"{name}: perplexity {text.perplexity:.2f} over {text.windows} x {text.window} tokens")
        for name, task in self.multiple_choice.items():
            error = "" if task.stderr is None else f" ± {task.stderr:.3f}"
            lines.append(f"{name}: {task.metric} {task.value:.3f}{error} over {task.items} items")
        if len(self.multiple_choice) > 1:
            lines.append(f"mean accuracy {self.mean_accuracy:.3f}")
        return "\n".join(lines)
