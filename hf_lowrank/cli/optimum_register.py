"""Makes `optimum-cli lowrank` known; installed into `optimum.commands.register`, which is read at every start."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class LowRankListCommand(BaseOptimumCLICommand):
    """Prints the registered methods, formats, allocators and statistics."""

    COMMAND = CommandInfo(name="list", help="List methods, formats, allocators and statistics.")

    def run(self):
        """Run the command."""
        # Imported here: optimum reads this file for every command, and torch is slow to import.
        from hf_lowrank.cli.list import print_registries

        print_registries()


class LowRankCommand(BaseOptimumCLICommand):
    """Parent of the low-rank commands."""

    COMMAND = CommandInfo(name="lowrank", help="Make models smaller by factorizing their weights.")
    SUBCOMMANDS = (
        CommandInfo(name="list", help=LowRankListCommand.COMMAND.help, subcommand_class=LowRankListCommand),
    )


REGISTER_COMMANDS = [LowRankCommand]
