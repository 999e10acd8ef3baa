"""One module a subcommand, loaded by name from cli/registry.py and by nothing else."""
