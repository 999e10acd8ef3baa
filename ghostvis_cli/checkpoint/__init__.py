"""Checkpoint files in nanochat's layout: finding them, reading their headers, loading them, their tokenizers."""
