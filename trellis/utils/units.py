"""Numbers of bytes and seconds in words."""


def size(count: float) -> str:
    """Return a number of bytes, such as "1.5 GB"."""
    if count < 1000:
        return f"{count:.0f} bytes"
    units = ("kB", "MB", "GB", "TB", "PB", "EB")
    power = min((len(str(round(count))) - 1) // 3, len(units))
    return f"{count / 1000**power:.3g} {units[power - 1]}"


def duration(seconds: float) -> str:
    """Return a time in the two largest of its units, such as "3 h 20 min"."""
    left = max(0, round(seconds))
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min"
    if left < 86400:
        return f"{left // 3600} h {left % 3600 // 60} min"
    return f"{left // 86400} d {left % 86400 // 3600} h"
