"""Built-in profiles. Each YAML file opens with a comment on its use."""
