"""One setting for all grids of a folder, also if several runs start in it at once.

`records/settings.json` says which settings the folder has. It is made by one run alone, since the system makes a file
only once. A run also has a file `records/active_<run>.json` while it is active. Where no grid has been made yet, a run
may replace settings of another that has ended, such as one with a mistaken flag.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trellis.utils.errors import DataError
from trellis.utils.files import atomic_write, host_name, is_running

from .records import SETTINGS, Known, Row, Settings, active_file, flags_of, go_together, known_grids

PATIENCE = 5  # seconds for another run that is just about to give up, or to write its claim


@contextmanager
def claimed(root: Path, settings: Settings, run: str) -> Iterator[tuple[Known, dict[str, Row]]]:
    """Hold a folder for runs with these settings, and give what `known_grids` finds in it.

    run: as in the name of the run's record file.
    Raise DataError if it has grids of other settings, or if another active run has other settings.
    """
    known = known_grids(root, settings)
    path = active_file(root, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"host": host_name(), "pid": os.getpid(), "settings": settings}))
    try:
        _claim(root, settings, path)
        yield known
    finally:
        path.unlink(missing_ok=True)


def _claim(root: Path, settings: Settings, own: Path) -> None:
    # Each run has made its own active file before it reads those of others. So of two runs at least one sees the
    # other, and a claim is replaced only by a run that sees none with other settings.
    path = root / "records" / "settings.json"
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(settings, file)
            return
        except FileExistsError:
            found = _read(path)
        rivals = {
            other: values
            for other, values in _active(root, own).items()
            if not values or not go_together(values, settings)
        }
        fits = found is not None and go_together(found, settings)
        if found is not None and fits and not rivals:
            complete = tuple(old or new for old, new in zip(found, settings, strict=True))
            if complete != found:  # the first run with volumes
                with atomic_write(path) as partial:
                    partial.write_text(json.dumps(complete), encoding="utf-8")
            return
        if found is not None and not fits:
            for other, values in rivals.items():
                raise _refusal(root, settings, values, other)
            known_grids(root, settings)
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(settings), encoding="utf-8")
            return
        if time.monotonic() > deadline:
            for other, values in rivals.items():
                raise _refusal(root, settings, values, other)
            path.unlink(missing_ok=True)  # what a run that was killed has left of its claim
        time.sleep(0.05)


def _read(path: Path) -> Settings | None:
    """Return the settings of a claim, None if it is not complete or gone."""
    try:
        return _complete(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _complete(values: list[str]) -> Settings:
    """Return settings that were read; earlier versions wrote fewer. Raise ValueError or TypeError for others."""
    if not 4 <= len(values) <= len(SETTINGS) or not all(isinstance(value, str) for value in values):
        raise ValueError
    return (*values, *[""] * (len(SETTINGS) - len(values)))


def _active(root: Path, own: Path) -> dict[Path, Settings]:
    """Return the settings of the other active runs by file, and remove the files of killed ones of this machine."""
    found = {}
    for path in (root / "records").glob("active_*.json"):
        if path == own:
            continue
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            if run["host"] == host_name() and not is_running(run["pid"]):
                path.unlink(missing_ok=True)
            else:
                found[path] = _complete(run["settings"])
        except FileNotFoundError:  # it has just ended
            continue
        except (ValueError, TypeError, KeyError):
            found[path] = ()
    return found


def _refusal(root: Path, own: Settings, theirs: Settings, path: Path) -> DataError:
    what = f"with {flags_of(theirs)}" if theirs else "with settings that cannot be read"
    return DataError(
        f"{root}: another run is active there {what}, and this one has {flags_of(own)}. Give its values or another "
        f"--output_dir. If it does not run any more, delete {path}."
    )
