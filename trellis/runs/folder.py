"""What a run folder records about itself: config.json, and command.txt with every start."""

import json
import shlex
import shutil
import sys
import time

from ..utils import dist_utils
from ..utils.environment import versions
from ..utils.errors import ConfigError
from ..utils.files import atomic_write
from .checkpoint import Checkpoints


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
    checkpoints.clean()
    later = checkpoints.set_aside(after=step)
    if later is not None:
        if (folder / "log.txt").exists():
            shutil.copy(folder / "log.txt", later)
        print(f"later checkpoints and the log so far are kept in {later}", flush=True)

    path, text = folder / "config.json", json.dumps(config, indent=4) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        path.rename(folder / f"config_until_step{step:07d}_{time.strftime('%Y%m%d_%H%M%S')}.json")
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    facts = {**versions(), **facts, "ranks": dist_utils.world_size()}
    with open(folder / "command.txt", "a", encoding="utf-8") as file:
        file.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {json.dumps(facts)}\npython {shlex.join(sys.argv)}\n")
