"""`optimum-cli lowrank evaluate`."""

from ..errors import ConfigError
from ..evaluation import evaluate
from ..evaluation.output import check_output
from ..integrations.out_of_core import load_model
from .options import add_parameters, documentation, given, labelled


OPTIONS = ("preset", "max_windows", "limit", "batch_tokens")


def add_arguments(parser):
    """Arguments of the command."""
    documented = documentation(evaluate)
    parser.add_argument("model", help="folder or repository, dense or factorized")
    for name, what in (("perplexity", "[NAME=]FILE"), ("multiple_choice", "NAME[=FILE]")):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            nargs="+",
            action="extend",
            metavar=what,
            help=f"{what}, as often as wanted; {documented[name].text}".replace("%", "%%"),
        )
    parser.add_argument("--output", metavar="FILE", help="write the result to a JSON file too")
    parser.add_argument("--dtype", help="load in this dtype; that of the checkpoint by default")
    add_parameters(parser, evaluate, OPTIONS)


def run(arguments):
    """Run the command; returns the [`Evaluation`]."""
    if arguments.output is not None:
        check_output(arguments.output, "`--output`")
    perplexity = None if arguments.perplexity is None else labelled(arguments.perplexity)
    multiple_choice = _tasks(arguments.multiple_choice)
    dtype = {} if arguments.dtype is None else {"dtype": arguments.dtype}
    model = load_model(arguments.model, **dtype)
    result = evaluate(model, perplexity=perplexity, multiple_choice=multiple_choice, **given(arguments, OPTIONS))
    if arguments.output is not None:
        result.save(arguments.output)
    return result


def _tasks(entries):
    """`{name: data}`, or a list of names that are known."""
    if entries is None or not any("=" in entry for entry in entries):
        return entries
    plain = [entry for entry in entries if "=" not in entry]
    if plain:
        raise ConfigError(
            f"`--multiple-choice` gives {plain} no file, and others one; give all of them files, or none."
        )
    return labelled(entries)
