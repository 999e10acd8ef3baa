"""The picture processor, which SGLang finds here."""
