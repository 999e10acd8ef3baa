"""Named settings: what a run is set to and where each value came from. Stops at the engine's door.

settings   the dataclasses and the table of keys       values   one value, strictly
document   a YAML file with its lines                  files    where profiles lie, one as written
resolve    the order of the layers                     show     printing, the starter file
secrets    refused, redacted, read                     schema   for editors
"""

from ghostvis_cli.profile.files import Origin
from ghostvis_cli.profile.resolve import Resolved, resolve
from ghostvis_cli.profile.secrets import read_api_key, redact
from ghostvis_cli.profile.settings import EngineSettings, ModelSettings, Profile

__all__ = [
    "EngineSettings",
    "ModelSettings",
    "Origin",
    "Profile",
    "Resolved",
    "read_api_key",
    "redact",
    "resolve",
]
