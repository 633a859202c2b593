"""--ray: two nodes' processes on this machine give what a local run gives, also if workers and nodes are lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, free_port, save_tokenizer, solid_grids, tetrahedron, wait_for

ray = pytest.importorskip("ray")
pytest.importorskip("numba")
pytest.importorskip("pyarrow")
nibabel = pytest.importorskip("nibabel")
trimesh = pytest.importorskip("trimesh")

from ray.cluster_utils import Cluster  # noqa: E402

from dataset_toolkits import hashing, voxelize  # noqa: E402
from scripts import to_tokens, token_work  # noqa: E402
from trellis.datasets.shards import Shard  # noqa: E402
from trellis.grids import mesh_cluster, mesh_pool  # noqa: E402
from trellis.utils import ray_cluster  # noqa: E402
from trellis.utils.errors import ConfigError, DataError  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the cluster is two nodes of one Linux machine")

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
TASKS = '''
import os, signal, time
def act(path, what):
    """Do a task, in a process of a pool, whose parent is the worker."""
    marker = path + what
    if what == "die" or (what == "die once" and not os.path.exists(marker)):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "lose" or (what == "lose once" and not os.path.exists(marker)):
        open(marker, "w").close()
        os.kill(os.getppid(), signal.SIGKILL)
    if what == "fail":
        raise KeyError(what)
    return what
def end(slot):
    os._exit(1)
def gpu(slot):
    return lambda task: time.sleep(0.2) or os.environ["CUDA_VISIBLE_DEVICES"]
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "ray_tasks.py").write_text(TASKS)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    nodes = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": HEALTH})
    nodes.add_node(**NODE)
    yield nodes
    nodes.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def meshes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    for number in range(30):
        trimesh.creation.box((1, 1 + number / 30, 2)).export(folder / f"{number}.stl")
    (folder / "copy.stl").write_bytes((folder / "7.stl").read_bytes())
    (folder / "damaged.obj").write_text("v 0 0\n")
    return folder


@pytest.fixture(scope="module")
def command(meshes) -> list[str]:
    """Flags of voxelize.py, with a file that is tried once more in the end, since its 720 MB do not fit in the memory,
    and a scan of several organs."""
    header = b"ply\nformat binary_little_endian 1.0\nelement vertex 60000000\n"
    header += b"".join(b"property float %c\n" % axis for axis in b"xyz") + b"end_header\n"
    large = meshes.parent / "large.ply"
    with open(large, "wb") as file:
        file.write(header)
        file.truncate(len(header) + 720_000_000)  # a sparse file: it takes no disk
    scan = np.zeros((24, 20, 16), np.uint8)
    scan[2:10, 4:12, 3:9], scan[14:20, 4:12, 3:9], scan[12, 0, :3] = 1, 2, 5
    nibabel.save(nibabel.Nifti1Image(scan, np.diag([1, 1, 2, 1])), meshes.parent / "scan.nii.gz")
    return [
        "--input",
        str(meshes),
        str(large),
        str(meshes.parent / "scan.nii.gz"),
        "--points",
        "--memory",
        "0.2",
        "--max_workers",
        "1",
        "--output_dir",
    ]


@pytest.fixture(scope="module")
def local(command, tmp_path_factory) -> Path:
    """The folder of a local run."""
    folder = tmp_path_factory.mktemp("local") / "voxels"
    assert voxelize.main([*command, str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder but the records, which name runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "records" not in path.parts
    }


def disturb(monkeypatch, action: Callable[[int], None], node: str = "") -> list[int]:
    """Call action(pid) once, for a worker that has tasks, after two answers. Return a list that gets its pid.

    node: id of the worker's node; then work begins only when it is ready.
    """
    pids: dict[ray_cluster._Worker, int] = {}
    disturbed: list[int] = []
    take, answers = ray_cluster._Run._take, []

    def take_and_disturb(run: ray_cluster._Run, worker: ray_cluster._Worker, call: object) -> None:
        starting = call is worker.starting
        take(run, worker, call)
        if starting and worker in run.workers:
            pids[worker] = run.cluster.processes[-1].pid
        elif not starting:
            answers.append(call)
            busy = [pids[each] for each in run.workers if each.calls and node in ("", each.node.id)]
            if len(answers) >= 2 and busy and not disturbed:
                disturbed.append(busy[-1])
                action(busy[-1])

    give_out = ray_cluster._Run._give_out

    def give_out_later(run: ray_cluster._Run) -> None:
        if node == "" or disturbed or node in {worker.node.id for worker in pids}:
            give_out(run)

    monkeypatch.setattr(ray_cluster._Run, "_give_out", give_out_later)
    monkeypatch.setattr(ray_cluster._Run, "_take", take_and_disturb)
    return disturbed


def test_voxelize_makes_what_a_local_run_makes_though_a_worker_is_killed(
    cluster, command, local, tmp_path, monkeypatch, capsys
):
    killed = disturb(monkeypatch, lambda pid: os.kill(pid, signal.SIGKILL))
    assert voxelize.main([*command, str(tmp_path / "ray"), "--ray", cluster.address]) == 0
    said = capsys.readouterr().out
    assert len(killed) == 1
    assert contents(tmp_path / "ray") == contents(local)
    assert "needs more memory than the limit of 0.2 GiB" in (tmp_path / "ray" / "failed.csv").read_text()
    assert "34 files: 32 new grids, 0 files done already, 1 duplicate, 2 files and 1 object left out; " in said
    assert not ray.is_initialized()


def test_shards_hold_the_objects_of_a_local_run(cluster, meshes, tmp_path):
    """Their order is that in which workers end."""
    command = ["--input", str(meshes), "--resolution", "16", "--format", "shards", "--output_dir"]
    assert voxelize.main([*command, str(tmp_path / "local")]) == 0
    assert voxelize.main([*command, str(tmp_path / "ray"), "--ray", cluster.address]) == 0
    objects = []
    for name in ("local", "ray"):
        shards = [Shard(path) for path in (tmp_path / name).glob("*.arrow")]
        objects.append(
            sorted((row for shard in shards for row in shard.batch.to_pylist()), key=lambda row: row["sha256"])
        )
    assert objects[0] == objects[1] and len(objects[0]) == 30
    assert (tmp_path / "ray" / "failed.csv").read_bytes() == (tmp_path / "local" / "failed.csv").read_bytes()


def test_a_signal_ends_it_and_the_same_command_goes_on(cluster, command, local, tmp_path):
    program = [sys.executable, ROOT / "dataset_toolkits" / "voxelize.py", *command, tmp_path, "--ray", cluster.address]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: process.poll() is not None or list(tmp_path.glob("voxels/*.ply")), 60)
        process.terminate()
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors.splitlines()[-1] == voxelize.INTERRUPTED and "Traceback" not in errors
    assert not [path for path in contents(tmp_path) if path.endswith(".tmp")]
    assert voxelize.main([*command, str(tmp_path)]) == 0
    assert contents(tmp_path) == contents(local)


def test_to_tokens_makes_what_a_local_run_makes_though_a_node_is_lost(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tokenizer(tmp_path / "tokenizer", 0)
    bits = np.packbits(solid_grids(48, 16, 0).reshape(48, -1), axis=1)
    names = np.array([f"object {number}" for number in range(48)])
    np.savez(tmp_path / "objects.npz", bits=bits, name=names)
    command = ["--tokenizer", "tokenizer", "--data_dir", "objects.npz", "--iou", "--shard_size", "3", "--sharegpt"]
    command += ["--device", "cpu"]
    assert to_tokens.main([*command, "--output_dir", "local/tokens"]) == 0
    local = capsys.readouterr().out
    node = cluster.add_node(**NODE)
    lost = disturb(monkeypatch, lambda pid: cluster.remove_node(node, allow_graceful=False), node.node_id)
    assert to_tokens.main([*command, "--output_dir", "ray/tokens", "--ray", cluster.address, "--verify", "5"]) == 0
    there = capsys.readouterr().out
    assert len(lost) == 1
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert local.splitlines()[0].replace("local/", "ray/") in there.splitlines() and "verified 5 objects" in there


def test_to_tokens_of_meshes_does_a_killed_worker_s_shard_again(cluster, meshes, tmp_path, monkeypatch):
    save_tokenizer(tmp_path / "tokenizer", 0)
    command = ["--tokenizer", str(tmp_path / "tokenizer"), "--meshes", str(meshes), "--shard_size", "8"]
    command += ["--device", "cpu"]
    assert to_tokens.main([*command, "--output_dir", str(tmp_path / "local" / "tokens")]) == 0
    killed = disturb(monkeypatch, lambda pid: os.kill(pid, signal.SIGKILL))
    there = ["--output_dir", str(tmp_path / "ray" / "tokens"), "--ray", cluster.address]
    assert to_tokens.main([*command, *there]) == 0
    assert len(killed) == 1
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.fixture(scope="class")
def joined(cluster) -> Iterator[ray_cluster.Cluster]:
    with ray_cluster.joined(cluster.address, ("trellis", "dataset_toolkits")) as joined:
        yield joined


class TestTasks:
    """They share one time of being joined."""

    def test_those_that_end_their_process_or_worker_are_tried_again_and_then_listed(self, joined, tmp_path):
        import ray_tasks

        whats = ["die", "die once", "lose", "lose once", *map(str, range(50))]
        paths = [tmp_path / str(number) for number in range(len(whats))]
        for path in paths:
            path.touch()
        results = {}
        tasks = [(str(path), what) for path, what in zip(paths, whats, strict=True)]
        mesh_cluster.run_on_cluster(
            joined, ray_tasks.act, iter(tasks), lambda task, result: results.update({task[1]: result}), None, 60
        )
        died, lost = results.pop("die"), results.pop("lose")
        assert isinstance(died, mesh_pool.LostTask) and "its process died (SIGKILL)" in str(died)
        assert isinstance(lost, DataError) and "its worker was lost 2 times" in str(lost)
        assert results == {what: what for what in whats if what not in ("die", "lose")}

    def test_workers_that_cannot_start_are_an_error_that_says_why(self, joined, monkeypatch):
        import ray_tasks

        monkeypatch.setattr(ray_cluster, "STARTS", 1)
        with pytest.raises(ConfigError, match="workers cannot start: .*died"):
            joined.run_tasks(ray_tasks.end, partial(mesh_cluster.slots_of_node, None), [1], print)
        with pytest.raises(ConfigError, match=r"no node can take this work: \S+ \(1 CPUs, 0 GPUs\)"):
            joined.run_tasks(ray_tasks.end, lambda node: [ray_cluster.Slot(0, 1, 1)] * node.gpus, [1], print)

    def test_each_worker_has_a_gpu_of_its_own_also_on_a_node_that_joins_later(self, cluster, joined, monkeypatch):
        """Ray takes the number of GPUs of a node as it is told."""
        import ray_tasks

        monkeypatch.setattr(ray_cluster, "LOOK_SECONDS", 0.2)
        nodes, shown = [cluster.add_node(**NODE, num_gpus=1)], set()

        def tasks() -> Iterator[int]:
            for number in range(1000):
                if len(shown) < 2:
                    yield number

        def finish(task: int, result: str) -> None:
            shown.add(result)
            if len(nodes) == 1:
                nodes.append(cluster.add_node(**NODE, num_gpus=2))

        joined.run_tasks(ray_tasks.gpu, partial(token_work.slots_of_node, -1, True), tasks(), finish)
        for node in nodes:
            cluster.remove_node(node)
        assert shown == {"0", "1"}

    def test_workers_wait_for_nodes_that_others_have_taken(self, joined, tmp_path, monkeypatch):
        monkeypatch.setattr(ray_cluster, "LOOK_SECONDS", 0.2)
        monkeypatch.setattr(ray_cluster, "NOTE_SECONDS", 0.5)

        class Holder:
            def hold(self) -> None: ...

        holders = [ray.remote(Holder).options(num_cpus=1).remote() for _ in range(2)]
        ray.get([holder.hold.remote() for holder in holders])
        notes, results = [], []

        def note(text: str, file: object) -> None:
            notes.append(text)
            for holder in holders:
                ray.kill(holder)

        monkeypatch.setattr(ray_cluster, "print", note, raising=False)
        mesh_cluster.run_on_cluster(joined, str, [(tmp_path,)], lambda task, result: results.append(result), None, 60)
        assert results == [str(tmp_path)]
        assert len(notes) == 1 and "no worker has started for 0.5 s; awaited: 1 CPUs and 0 GPUs of" in notes[0]

    def test_a_bug_ends_the_run(self, joined, tmp_path):
        import ray_tasks

        with pytest.raises(KeyError, match="fail"):
            mesh_cluster.run_on_cluster(joined, ray_tasks.act, [(str(tmp_path), "fail")], print, None, 60)

    def test_a_file_that_a_node_does_not_see_is_an_error_that_names_both(self, joined, meshes, tmp_path, monkeypatch):
        """Files are hashed on the nodes as they are here."""
        gone = tmp_path / "gone.stl"
        paths = [*sorted(meshes.iterdir()), gone, tmp_path]
        results, steps = [], []
        mesh_cluster.run_on_cluster(joined, print, [(gone,)], lambda task, result: results.append(result), 1, 60)
        there = hashing.hash_on_cluster(joined, paths, (), None, lambda: steps.append(1))
        here = hashing.hash_here(paths, (), 1, lambda: None)
        found = [
            [result.strerror if isinstance(result, OSError) else result for result in each] for each in (there, here)
        ]
        assert found[0] == found[1] and found[0][-2:] == ["No such file or directory", "Is a directory"]
        assert [*map(str, results)] == ["cannot be read: No such file or directory"] and len(steps) == len(paths)
        monkeypatch.setattr(mesh_cluster.os.path, "lexists", lambda path: True)
        with pytest.raises(ConfigError, match=rf"node \S+ does not see {gone}, as this machine does"):
            hashing.hash_on_cluster(joined, paths, (), None, lambda: None)


def test_what_cannot_run_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    tetrahedron().export(tmp_path / "mesh.stl")
    command = ["--input", str(tmp_path / "mesh.stl"), "--output_dir", str(tmp_path / "out"), "--ray"]
    assert voxelize.main([*command, "auto", "--rank", "1", "--world_size", "2"]) == 1
    assert voxelize.main([*command, "--dry_run"]) == 1
    assert voxelize.main([*command, "ray://head:10001"]) == 1
    assert voxelize.main([*command, f"localhost:{free_port()}"]) == 1
    assert voxelize.main([*command, "localhost:99999"]) == 1
    assert voxelize.main([*command, "nonsense"]) == 1
    monkeypatch.setitem(sys.modules, "ray", None)
    assert voxelize.main(command) == 1
    errors = capsys.readouterr().err.splitlines()
    messages = ["--rank and --world_size", "--dry_run", "auto or host:port", "no Ray cluster is there"]
    messages += ["no Ray cluster is there", "cannot join the cluster", "pip install ray"]
    for error, message in zip(errors, messages, strict=True):
        assert error.startswith("error: --") and message in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        to_tokens.parse_args(["--tokenizer", "t", "--meshes", "m", "--output_dir", "o", "--ray", "--world_size", "2"])
    assert "--ray does not go with --rank" in capsys.readouterr().err


def test_workers_stand_where_their_node_has_room():
    """No worker on a node without CPUs, and of a node no more than it has."""
    found = []
    fake = SimpleNamespace(address="auto", run_tasks=lambda make, slots, *rest, **more: found.append(slots))
    mesh_cluster.run_on_cluster(fake, print, [], print, None, 1)
    mesh_cluster.run_on_cluster(fake, print, [], print, 4, 1)
    nodes = [ray_cluster.Node("", "", cpus, 0) for cpus in (0, 2, 64)]
    assert [found[0](node) for node in nodes] == [[], [(2, 0, 2)], [(64, 0, 64)]]
    assert [found[2](node) for node in nodes] == [[], [(2, 0, 4)], [(4, 0, 4)]]
    assert [found[3](node) for node in nodes] == [[], [(2, 0, 1)], [(4, 0, 1)]]
    wanted = {(-1, True): [[], [(8, 1, 1)] * 2], (1, True): [[], [(16, 1, 1)]], (8, True): [[], [(8, 1, 1)] * 2]}
    wanted |= {(-1, False): [[(4, 0, 1)], [(16, 0, 1)]], (3, False): [[(1, 0, 1)] * 3, [(5, 0, 1)] * 3]}
    nodes = [ray_cluster.Node("", "", 4, 0), ray_cluster.Node("", "", 16, 2)]
    assert {key: [token_work.slots_of_node(*key, node) for node in nodes] for key in wanted} == wanted
    assert token_work.slots_of_node(3, False, ray_cluster.Node("", "", 0, 0)) == []
