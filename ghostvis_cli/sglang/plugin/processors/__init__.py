"""The image processor, which SGLang finds here."""
