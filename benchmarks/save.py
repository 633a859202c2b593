"""How long a checkpoint stops training, and how much it slows training while it is written.

    python benchmarks/save.py                              # GPU: full size; CPU: the demo's networks
    python benchmarks/save.py --config recipe_vae --every 50

Trains with train.py's own loop and waits for the device after each step. The pause of a save is by how much the step
after it ends later than usual: the copy to the host, what is logged, and the wait for a checkpoint before, if that is
not written yet. Every second checkpoint is written while training waits, as all were before there was a background.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, runs
from benchmarks.report import Column, Report, Table
from trellis.trainers.basic import BasicTrainer
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config

COLUMNS = (
    Column("step", "key"),
    Column("written", "key"),
    Column("pause, s"),
    Column("in save(), s"),
    Column("writing, s"),
    Column("steps meanwhile"),
    Column("step meanwhile / alone"),
)


@dataclass
class Save:
    """One checkpoint, with times in s."""

    step: int
    waited: bool  # whether training waited until it was written
    begun: float
    in_save: float
    written: float = 0.0  # when


class Clock:
    """The times at which the steps and checkpoints of a trainer end."""

    def __init__(self, trainer: BasicTrainer):
        self.trainer, self.ends, self.saves = trainer, {}, []
        self._run_step, self._save, self._written = trainer.run_step, trainer.save, trainer.saver.written
        trainer.run_step, trainer.save, trainer.saver.written = self.run_step, self.save, self.written

    def synchronize(self) -> None:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)

    def run_step(self, batch):
        result = self._run_step(batch)
        self.synchronize()
        self.ends[self.trainer.step + 1] = time.perf_counter()
        return result

    def save(self) -> None:
        waited = len(self.saves) % 2 == 1
        save = Save(self.trainer.step, waited, time.perf_counter(), 0.0)
        self.saves.append(save)
        self._save()
        save.in_save = time.perf_counter() - save.begun
        if waited:
            self.trainer.saver.wait()

    def written(self, step: int) -> None:
        next(save for save in self.saves if save.step == step).written = time.perf_counter()
        self._written(step)

    def rows(self) -> list[list[object]]:
        """Return a row for each checkpoint but those before the first and after the last step."""
        steps = [step for step in sorted(self.ends) if step - 1 in self.ends]
        lasted = {step: self.ends[step] - self.ends[step - 1] for step in steps}
        after_save = {save.step + 1 for save in self.saves}
        meanwhile = {
            save.step: [
                step for step in steps if step not in after_save and save.begun < self.ends[step] < save.written
            ]
            for save in self.saves
        }
        busy = after_save.union(*meanwhile.values())
        busy |= {step + 1 for step in busy}  # during which a write ends
        usual = statistics.median(lasted[step] for step in steps[len(steps) // 10 :] if step not in busy)
        return [
            [
                save.step,
                "while training waits" if save.waited else "in the background",
                lasted[save.step + 1] - usual,
                save.in_save,
                save.written - save.begun,
                len(during),
                statistics.mean(lasted[step] for step in during) / usual if during else None,
            ]
            for save in self.saves
            if save.step + 1 in lasted
            for during in [meanwhile[save.step]]
        ]


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--config", help="a shipped configuration (default: ss_vae_conv3d_16l8_fp16; CPU: demo_vae)")
    flags.add_argument("--batch_size", type=int, help="samples per step (default: 16; CPU: 2)")
    flags.add_argument("--every", type=int, help="steps between checkpoints (default: 40; CPU: 4)")
    flags.add_argument("--saves", type=int, default=6, help="checkpoints (default: 6)")
    flags.add_argument("--folder", help="write the run below this folder (default: the system's temporary folder)")
    args = flags.parse_args(argv)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    path = runs.config_path(args.config or ("ss_vae_conv3d_16l8_fp16" if cuda else "demo_vae"))
    batch, every = args.batch_size or (16 if cuda else 2), args.every or (40 if cuda else 4)
    work = {"resolution": args.resolution, "config": path.stem, "batch": batch}
    report = Report("Saving", __file__, argv, device, args.output, work)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        settings = runs.steady_settings(None, every * (args.saves + 1) - 1, every)
        settings |= runs.batch_setting(load_config(path), batch)
        settings |= {"trainer.args.i_save": every, "trainer.args.keep_last": 1}
        settings["dataset.args.resolution"] = args.resolution
        command = runs.arguments(path, device, common.data_for(args, folder), folder / "run", settings)
        trainer = runs.build_trainer(command, device)
        clock = Clock(trainer)
        trainer.run()
        parameters = sum(value.numel() for model in trainer.models.values() for value in model.parameters())
        files = [path.stat().st_size for path in trainer.checkpoints.folder.glob(f"*_step{trainer.max_steps:07d}.pt")]
    rows = clock.rows()
    pauses = [row[2] for row in rows if row[1] == "in the background"]
    note = (
        f"{path.stem}, {parameters / 1e6:.0f} million parameters, batch {batch}: {sum(files) / 1e9:.2f} GB in "
        f"{len(files)} files, a checkpoint every {every} steps. Longest pause in the background: {max(pauses):.2f} s."
    )
    print(report.write(note, Table(COLUMNS, rows)))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
