"""Where curves and pictures of a run go beside log.txt: TensorBoard, and Weights & Biases if it is asked for.

None of them may stop training: the first error of one is said, and it gets nothing more.
"""

import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..utils.config import matches
from ..utils.errors import ConfigError
from ..utils.files import atomic_write
from ..utils.registry import did_you_mean

# Arguments of wandb.init that a configuration may give; the others belong to the run folder and to train.py.
WANDB_ARGS = {
    "project": str, "entity": str, "name": str, "group": str, "job_type": str, "notes": str, "tags": list[str],
    "mode": str,
}  # fmt: skip
WANDB_MODES = ("online", "offline")
CLOSING = 120.0  # seconds
WANDB_ID = "wandb_id.json"  # in the run folder: a run that goes on stays the same run there


class Sink(Protocol):
    """A place for curves and pictures. Every method may raise anything: see `Sinks`."""

    name: str  # for messages

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write values by name."""

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, [H, W, 3] uint8."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """TensorBoard's event files in `tb_logs` of a run folder. Entries after `step` are hidden."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tb_logs"), purge_step=step + 1)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run continues.

    spec: arguments for wandb.init.
    config: shown beside the curves.
    If the service cannot be reached, the run is written to `wandb` in the run folder, for `wandb sync`.
    """

    name = "Weights & Biases"

    def __init__(self, run_dir: Path, spec: dict[str, Any], config: dict, say: Callable[[str], None]):
        import wandb

        self.wandb, self.say = wandb, say
        path = run_dir / WANDB_ID
        try:
            known = json.loads(path.read_text(encoding="utf-8"))["id"]
        except (OSError, ValueError, KeyError, TypeError):
            known = secrets.token_hex(4)  # a damaged file costs no more than a second run there
            with atomic_write(path) as partial:
                partial.write_text(json.dumps({"id": known}) + "\n", encoding="utf-8")
        common = {"dir": str(run_dir), "config": config, "id": known, "resume": "allow"}
        try:
            self.run = wandb.init(**spec, **common)
        except Exception as error:  # wandb has errors of its own for the network, the account and the service
            if spec.get("mode") == "offline":
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(
                f"Weights & Biases cannot be used now ({first}); curves go to {run_dir / 'wandb'}, and "
                "`wandb sync` sends them"
            )
            wandb.teardown()  # of the attempt, which else holds the id
            self.run = wandb.init(**{**spec, "mode": "offline"}, **common)
        # A run that went back to a checkpoint repeats steps, which wandb's own counter would refuse.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        self.run.log({name: self.wandb.Image(picture), "step": step})

    def close(self) -> None:
        """Send what is left, for CLOSING seconds at most: a run that has ended must not wait for a network."""
        sending = threading.Thread(target=self.run.finish, name="wandb", daemon=True)
        sending.start()
        sending.join(CLOSING)
        if sending.is_alive():
            self.say(f"Weights & Biases has not got everything after {CLOSING:.0f} s; `wandb sync` sends the rest")


def check_wandb(spec: dict | None, where: str) -> None:
    """Raise ConfigError for a wrong argument of Weights & Biases, or if the package is missing."""
    if spec is None:
        return
    for key, value in spec.items():
        if key not in WANDB_ARGS:
            raise ConfigError(f"{where}.{key} is unknown{did_you_mean(key, WANDB_ARGS)}")
        if not matches(value, WANDB_ARGS[key]) or not value:
            kind = "a list of texts" if key == "tags" else "a text"
            raise ConfigError(f"{where}.{key} is {json.dumps(value)}; it must be {kind} that is not empty")
    if "project" not in spec:
        raise ConfigError(f'{where}.project is missing; give the project\'s name, such as {{"project": "shapes"}}')
    if spec.get("mode", WANDB_MODES[0]) not in WANDB_MODES:
        raise ConfigError(f"{where}.mode is {spec['mode']!r}; it must be {' or '.join(WANDB_MODES)}")
    try:
        from wandb import init  # noqa: F401 - of a folder named wandb, which Python imports too, this fails
    except ImportError as error:
        raise ConfigError(f"{where}: a Python package is missing ({error}): pip install wandb") from error


class Sinks:
    """All sinks of a run. One that fails is left out from then on, with a line."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.open: list[Sink] = []

    def add(self, name: str, build: Callable[[], Sink]) -> None:
        """Open a sink and add it, unless that fails."""
        try:
            self.open.append(build())
        except ImportError as error:
            package = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
            self.say(f"{name} gets nothing, since it cannot be imported ({error}){package}; log.txt has all numbers")
        except Exception as error:  # whatever a package raises, and a full disk: curves are not worth a run
            self._give_up(name, "nothing", error)

    def _give_up(self, name: str, what: str, error: Exception) -> None:
        first = (str(error).strip().splitlines() or [""])[0]
        self.say(f"{name} gets {what} ({type(error).__name__}: {first}); training goes on, and log.txt has all numbers")

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self.open):
            try:
                call(sink)
            except Exception as error:  # see `add`
                self.open.remove(sink)
                self._give_up(sink.name, "nothing more", error)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write values by name to all."""
        self._each(lambda sink: sink.scalars(values, step))

    def image(self, name: str, picture: np.ndarray, step: int) -> None:
        """Write a picture, [H, W, 3] uint8, to all."""
        self._each(lambda sink: sink.image(name, picture, step))

    def close(self) -> None:
        """Write what is left, and close all."""
        self._each(lambda sink: sink.close())
        self.open = []
