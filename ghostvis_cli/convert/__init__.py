"""A training checkpoint -> a directory that SGLang, vLLM and transformers load, with a certificate of parity."""
