"""`optimum-cli lowrank`: the library from the command line, one file a command."""
