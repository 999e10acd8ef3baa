"""Serving a model over HTTP: OpenAI's routes over any engine (`local_server`)."""
