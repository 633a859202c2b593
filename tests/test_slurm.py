"""From meshes to tokens through the batch scripts of scripts/slurm: jobs that are stopped in the middle go on, and the
results are those of an undisturbed run of each program alone."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import fake_slurm
import numpy as np
import pytest
from helpers import ROOT, VQ, ranks_of, tiny_config, wait_for

for package in ("trimesh", "numba", "pyarrow"):
    pytest.importorskip(package)

from dataset_toolkits import pack, voxelize  # noqa: E402
from dataset_toolkits.shapes.make_shapes import make_shape, write_shape  # noqa: E402
from scripts import to_tokens  # noqa: E402
from trellis.datasets.sparse_structure import SparseStructure  # noqa: E402

MESHES = 16
# A program stops here once until the test goes on: a worker before it reads a mesh, to_tokens before it names a file.
HOOK = """
import os, sys, time

def hold(event, arguments):
    if event in ("open", "os.rename") and any(os.environ["HELD"] in str(each) for each in arguments[:2]):
        if not os.path.exists("held"):
            os.mkdir("held")
            while not os.path.exists("held/go_on"):
                time.sleep(0.02)

command = str(sys.orig_argv)
if "HELD" in os.environ and ("multiprocessing-fork" in command or "to_tokens" in command):
    sys.addaudithook(hold)
"""


def write_meshes(folder: Path) -> None:
    folder.mkdir()
    for number in range(MESHES):
        write_shape(make_shape(0, "train", number), folder / f"{number:02}.obj")


class Cluster:
    """Submits batch scripts in a folder that has the project's programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = fake_slurm.install(folder / "bin")
        (folder / "bin/sitecustomize.py").write_text(HOOK)
        self.environment["PYTHONPATH"] += f":{folder / 'bin'}"
        for name in ("train.py", "dataset_toolkits", "scripts"):
            (folder / name).symlink_to(ROOT / name)

    def submit(self, script: str, *flags: str, held: str | None = None) -> subprocess.Popen:
        command = ["sbatch", fake_slurm.script(script), *flags]
        environment = self.environment | ({"HELD": held} if held else {})
        return subprocess.Popen(command, cwd=self.folder, env=environment)

    def run(self, script: str, *flags: str) -> None:
        assert self.submit(script, *flags).wait(120) == 0, self.logs()

    def run_and_stop(self, script: str, *flags: str, held: str, element: int, signum: int) -> str:
        """Run an array. Stop an element when its program comes to a file; it goes on in a second start.

        Return what that element printed.
        """
        process = self.submit(script, *flags, held=held)
        jobs = [fake_slurm.Job(self.folder, process.pid, number) for number in range(2)]
        marker = self.folder / "held"
        assert wait_for(marker.exists, 60), self.logs()
        jobs[element].signal(signum)
        time.sleep(0.5)  # until the signal is there
        (marker / "go_on").touch()
        assert process.wait(120) == 0, self.logs()
        assert [job.starts for job in jobs] == [1 + (number == element) for number in range(2)], self.logs()
        shutil.rmtree(marker)
        return jobs[element].log

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / "jobs").glob("*.log")))


def files_of(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def objects_of(root: str) -> dict[str, tuple]:
    """What shards hold, however objects are divided among them: by sha256, the grid, the split and other columns."""
    dataset = SparseStructure(root, resolution=16, split="all")
    indices = np.arange(len(dataset))
    columns = {name: values for name, values in dataset.columns_of(indices).items() if name != "split"}
    said = [{name: values[i] for name, values in columns.items() if values[i] is not None} for i in indices]
    bits = dataset.get_batch(indices)["bits"].numpy()
    entries = zip(dataset.entries, bits, said, strict=True)
    return {entry.sha256: (grid.tobytes(), entry.split, row) for entry, grid, row in entries}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    monkeypatch.chdir(tmp_path)
    return Cluster(tmp_path)


def test_from_meshes_to_tokens(cluster, vae_run):
    """voxelize is preempted, which Slurm itself requeues; to_tokens meets its time limit, and asks to be requeued."""
    write_meshes(Path("meshes"))
    flags = ["--input", "meshes", "--format", "shards", "--resolution", "16", "--max_workers", "1"]
    into = ("--output_dir", "grids")
    log = cluster.run_and_stop("voxelize", *flags, *into, held="06.obj", element=0, signum=signal.SIGTERM)
    assert re.search(r"8 meshes \(rank 0 of 2\): 3 new, 0 done already", log), log
    assert re.search(r"8 meshes \(rank 0 of 2\): 5 new, 3 done already", log), log
    assert voxelize.main([*flags, "--output_dir", "grids_alone"]) == 0
    assert len(list(Path("grids").glob("*.arrow"))) == 3 and len(objects_of("grids")) == MESHES
    assert objects_of("grids") == objects_of("grids_alone")

    flags = ["--input", "grids", "--resolution", "16", "--shard_size", "4", "--max_workers", "1"]
    cluster.run("pack", *flags, "--output", "packed")
    assert pack.main([*flags, "--output", "packed_alone"]) == 0
    assert files_of(Path("packed")) == files_of(Path("packed_alone")) and len(files_of(Path("packed"))) == MESHES // 4
    assert objects_of("packed") == objects_of("grids")

    Path("config.json").write_text(json.dumps(tiny_config(VQ, max_steps=4, i_eval=100, i_save=4)))
    flags = ["--config", "config.json", "--data_dir", "packed", "--output_dir", "run", "--load_dir", str(vae_run)]
    cluster.run("one_node", *flags, "--device", "cpu", "--auto_retry", "0")
    assert ranks_of(Path("run")) == [1]

    flags = ["--tokenizer", "run", "--data_dir", "packed", "--device", "cpu", "--shard_size", "1"]
    into = ("--output_dir", "tokens")
    log = cluster.run_and_stop("to_tokens", *flags, *into, held="shard-00005-", element=1, signum=signal.SIGUSR1)
    assert re.search(r"tokens: 8 objects, [56] of them new; shards: 8 \(rank 1 of 2\)", log), log
    assert to_tokens.main([*flags, "--output_dir", "alone_tokens"]) == 0
    assert files_of(Path("tokens")) == files_of(Path("alone_tokens"))
    assert len(list(Path("tokens").glob("*.parquet"))) == MESHES
