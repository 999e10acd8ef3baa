"""Engines: one protocol (`base`), several ways to run a model behind it."""
