"""What a run folder records about itself: config.json, and command.txt with every start."""

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from ..utils import dist_utils
from ..utils.environment import versions
from ..utils.errors import ConfigError
from ..utils.files import LEFTOVER, atomic_write, host_name, naming
from .checkpoint import Checkpoints
from .lock import require_lock


def prepare_run_folder(checkpoints: Checkpoints, config: dict, step: int, facts: dict) -> None:
    """Prepare a run folder for training after `step`: write config.json, and append to command.txt.

    An earlier config.json that differs is kept beside it. Later checkpoints move to a sub-folder, with a copy of the
    log.
    facts: what command.txt records besides versions, number of ranks and the command line.
    Raise ConfigError if the folder cannot be made.
    """
    folder = checkpoints.run_dir
    try:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be made ({error.strerror})") from error
    require_lock(folder)
    for leftover in folder.glob(".*.tmp"):
        found = LEFTOVER.fullmatch(leftover.name)
        own = found and found["host"] == host_name() and int(found["pid"]) == os.getpid()  # of status.json, perhaps
        if found and not own:
            leftover.unlink(missing_ok=True)
    checkpoints.clean()
    later = checkpoints.set_aside(after=step)
    if later is not None:
        if (folder / "log.txt").is_file():
            shutil.copy(folder / "log.txt", later)
        print(f"later checkpoints and the log so far are kept in {later}", flush=True)

    path, text = folder / "config.json", (json.dumps(config, indent=4) + "\n").encode()
    if path.is_dir() or (path.exists() and path.read_bytes() != text):
        kept = folder / f"config_until_step{step:07d}_{time.strftime('%Y%m%d_%H%M%S')}.json"
        path.rename(kept)
        if not _is_json(kept):
            print(f"{path} is damaged; what it holds is kept as {kept}, and it is written anew", flush=True)
    with atomic_write(path) as partial:
        partial.write_bytes(text)
    facts = {**versions(), **facts, "ranks": dist_utils.world_size()}
    with naming(folder / "command.txt"), open(folder / "command.txt", "a", encoding="utf-8") as file:
        file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {json.dumps(facts)}\npython {shlex.join(sys.argv)}\n")


def write_best(folder: Path, best: dict) -> None:
    """Write best.json: {"step", "by", "score"} of the best validation."""
    with atomic_write(folder / "best.json") as partial:
        partial.write_text(json.dumps(best) + "\n", encoding="utf-8")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # also bytes that are no UTF-8
        return False
    return True
