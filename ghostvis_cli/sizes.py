"""Amounts of bytes as people read them."""

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def shown(nbytes: float) -> str:
    """ "8.21 GB", "17.0 MB", "0 bytes": three digits, in the unit that fits."""
    for unit, name in UNITS:
        if nbytes >= unit:
            value = nbytes / unit
            return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {name}"
    return f"{nbytes:.0f} bytes"
