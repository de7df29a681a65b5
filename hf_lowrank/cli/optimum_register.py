"""Makes `optimum-cli lowrank` known; installed into `optimum.commands.register`, which is read at every start."""

from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


# Everything else is imported when a command is chosen: optimum reads this file for all, and torch is slow to import.
COMMANDS = {
    "factorize": "Factorize a checkpoint into another one, with the memory of one weight.",
    "calibrate": "Collect what a method has to know of the data, into a file.",
    "inspect": "Show ranks and sizes of the weights in a checkpoint.",
    "evaluate": "Measure a language model: perplexity, multiple choice, size.",
    "to-dense": "Multiply the factors of a checkpoint out.",
    "report": "Write a page about a factorized checkpoint: budget, ranks, spectra, errors, quality.",
    "push": "Upload a factorized checkpoint to the Hub, with a model card.",
    "list": "List methods, formats, allocators, refinements and statistics.",
}


class LazyParser(ArgumentParser):
    """A parser that gets its options when it is asked to parse, from the library."""

    command = None

    def parse_known_args(self, *args, **kwargs):
        if self.command is not None:
            from hf_lowrank.cli.terminal import add_arguments

            command, self.command = self.command, None
            add_arguments(command, self)
        return super().parse_known_args(*args, **kwargs)


class LowRankSubcommand(BaseOptimumCLICommand):
    """One of `COMMANDS`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parser.command = self.COMMAND.name

    def run(self):
        """Run the command."""
        from hf_lowrank.cli.terminal import run

        run(self.COMMAND.name, self.args)


class LowRankCommand(BaseOptimumCLICommand):
    """Parent of the low-rank commands."""

    COMMAND = CommandInfo(name="lowrank", help="Make models smaller by factorizing their weights.")
    SUBCOMMANDS = tuple(
        CommandInfo(name=name, help=help, subcommand_class=LowRankSubcommand) for name, help in COMMANDS.items()
    )

    @BaseOptimumCLICommand.subparsers.getter
    def subparsers(self):
        """Where the parsers of the commands are made."""
        if getattr(self, "_subparsers", None) is None:
            self._subparsers = self.parser.add_subparsers(parser_class=LazyParser)
        return self._subparsers


REGISTER_COMMANDS = [LowRankCommand]
