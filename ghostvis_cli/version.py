"""The version of this package and of what it writes. Imports nothing, so that everything may import it."""

__version__ = "0.1.0"
SCHEMA_VERSION = 1  # of every JSON record and file; each says it in its field schema_version
