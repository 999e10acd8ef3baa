"""Prints the JSON Schema: python -m ghostvis_cli.profile > docs/profile.schema.json"""

import sys

from ghostvis_cli.profile.schema import as_text

sys.stdout.write(as_text())
