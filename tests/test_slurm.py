"""From meshes to tokens through the batch scripts of scripts/slurm: jobs that are stopped in the middle go on, and the
results are those of an undisturbed run of each program alone."""

import json
import signal
import subprocess
from pathlib import Path

import fake_slurm
import pytest
from helpers import ROOT, VQ, ranks_of, tiny_config, wait_for

for package in ("trimesh", "numba", "pyarrow"):
    pytest.importorskip(package)

from dataset_toolkits import voxelize  # noqa: E402
from dataset_toolkits.shapes.make_shapes import make_shape, write_shape  # noqa: E402
from scripts import to_tokens  # noqa: E402

SLOW = range(2, 10)  # numbers of the meshes that take a while
MESHES = 24


def write_meshes(folder: Path) -> None:
    """Write small meshes, and large ones near the front, so that a signal after the first one comes in the middle."""
    import trimesh

    folder.mkdir()
    sphere = trimesh.creation.icosphere(subdivisions=5)
    for number in range(MESHES):
        path = folder / f"{number:02}.obj"
        if number in SLOW:
            sphere.apply_scale((1, 1, 1.1)).export(path)
        else:
            write_shape(make_shape(0, "train", number), path)


class Cluster:
    """Submits batch scripts in a folder that has the project's programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = fake_slurm.install(folder / "bin")
        for name in ("train.py", "dataset_toolkits", "scripts"):
            (folder / name).symlink_to(ROOT / name)

    def submit(self, script: str, *flags: str) -> subprocess.Popen:
        command = ["sbatch", fake_slurm.script(script), *flags]
        return subprocess.Popen(command, cwd=self.folder, env=self.environment)

    def run(self, script: str, *flags: str) -> None:
        assert self.submit(script, *flags).wait(120) == 0, self.logs()

    def stop_and_wait(self, process: subprocess.Popen, element: int, signum: int) -> None:
        """Stop an element of an array, which goes on in a second start; let the other end."""
        jobs = [fake_slurm.Job(self.folder, process.pid, number) for number in range(2)]
        jobs[element].signal(signum)
        assert process.wait(120) == 0, self.logs()
        assert [job.starts for job in jobs] == [1 + (number == element) for number in range(2)], self.logs()

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.folder / "jobs").glob("*.log")))


def files_of(folder: Path, without: str = "") -> dict[str, bytes]:
    """What a folder holds, by relative path; without a folder in it."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not without or not name.startswith(without)}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Cluster:
    monkeypatch.chdir(tmp_path)
    return Cluster(tmp_path)


def test_from_meshes_to_tokens(cluster, vae_run):
    """voxelize is preempted, which Slurm itself requeues; to_tokens meets its time limit, and asks to be requeued."""
    write_meshes(Path("meshes"))
    flags = ["--input", "meshes", "--resolution", "16", "--max_workers", "1"]
    job = cluster.submit("voxelize", *flags, "--output_dir", "voxels")
    assert wait_for(lambda: list(Path("voxels/voxels").glob("*.ply")), 60), cluster.logs()
    cluster.stop_and_wait(job, 0, signal.SIGTERM)
    assert voxelize.main([*flags, "--output_dir", "alone"]) == 0
    assert files_of(Path("voxels"), "records") == files_of(Path("alone"), "records")

    Path("config.json").write_text(json.dumps(tiny_config(VQ, max_steps=4, i_eval=100, i_save=4)))
    flags = ["--config", "config.json", "--data_dir", "voxels", "--output_dir", "run", "--load_dir", str(vae_run)]
    cluster.run("one_node", *flags, "--device", "cpu", "--auto_retry", "0")
    assert ranks_of(Path("run")) == [1]

    flags = ["--tokenizer", "run", "--data_dir", "voxels", "--device", "cpu", "--shard_size", "1"]
    job = cluster.submit("to_tokens", *flags, "--output_dir", "tokens")
    assert wait_for(lambda: list(Path("tokens").glob("*.parquet")), 60), cluster.logs()
    cluster.stop_and_wait(job, 1, signal.SIGUSR1)
    assert to_tokens.main([*flags, "--output_dir", "alone_tokens"]) == 0
    assert files_of(Path("tokens")) == files_of(Path("alone_tokens"))
    assert len(list(Path("tokens").glob("*.parquet"))) == MESHES
