"""The command line's frame: registry, options, output, signals. Commands themselves live in commands/."""
