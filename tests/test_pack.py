"""Packing loses nothing, either way round, and a failure leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset_toolkits.pack import pack, unpack  # noqa: E402
from trellis.datasets.metadata import common_setting, settings_of_data  # noqa: E402
from trellis.datasets.packed import FORMAT_VERSION, TEXT_ARRAYS, load_packed, save_packed  # noqa: E402
from trellis.datasets.sparse_structure import SparseStructure  # noqa: E402
from trellis.grids.voxels import pack_bits  # noqa: E402
from trellis.utils.errors import DataError  # noqa: E402
from trellis.utils.files import host_name  # noqa: E402

R = 8
SHA256 = ["%064x" % (number * 0x9E3779B97F4A7C15**4 % 2**256) for number in range(1, 8)]


def setting_of_data(roots: list[Path], name: str) -> str | None:
    return common_setting(settings_of_data(roots, name))


def arrays() -> dict[str, np.ndarray]:
    grids = np.random.default_rng(0).random((7, R, R, R)) < 0.2
    return {
        "bits": pack_bits(grids),
        "sha256": np.array(SHA256),
        "name": np.array(["a.glb", "b, c.glb", 'd "e".obj', "NA", "größe/椅子.stl", "null", "007"]),
        "source": np.array(["lab", "", "lab", "shop, inc.", "", "None", "1"]),
        "split": np.array(["train", "val", "train", "train", "val", "train", "train"]),
    }


@pytest.fixture
def packed(tmp_path) -> Path:
    np.savez(tmp_path / "a.npz", **arrays())
    return tmp_path / "a.npz"


def test_packed_to_folder_and_back_is_the_identity(packed, tmp_path):
    assert unpack(packed, tmp_path / "root") == 7
    assert pack(str(tmp_path / "root"), tmp_path / "b.npz", R) == 7
    with np.load(tmp_path / "b.npz", allow_pickle=False) as file:
        assert sorted(file.files) == sorted([*arrays(), "format"])
        assert file["format"].shape == () and file["format"] == 1
        for key, array in arrays().items():
            assert file[key].dtype.kind == array.dtype.kind and np.array_equal(file[key], array), key

    assert unpack(tmp_path / "b.npz", tmp_path / "again") == 7
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "root", tmp_path / "again")
    )
    assert first == second and len(first) == 8


def test_how_objects_were_turned_and_normalized_stays_known(packed, tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    for root, axis in zip(roots, "yz", strict=True):
        unpack(packed, root)
        table = pd.read_csv(root / "metadata.csv", dtype=str, keep_default_na=False)
        table.assign(up_axis=axis, normalization="cube").to_csv(root / "metadata.csv", index=False)
    pack(str(roots[0]), tmp_path / "a2.npz", R)
    unpack(tmp_path / "a2.npz", tmp_path / "again")
    for root in (roots[0], tmp_path / "a2.npz", tmp_path / "again"):
        assert setting_of_data([root], "up_axis") == "y" and setting_of_data([root], "normalization") == "cube"
    assert setting_of_data(roots, "up_axis") == "auto"  # they differ, and all grids are z-up
    assert setting_of_data(roots, "normalization") == "cube"
    for unknown in (packed, tmp_path / "gone", tmp_path / "gone.npz"):
        assert setting_of_data([unknown], "up_axis") is None
    assert setting_of_data([roots[0], packed], "up_axis") is None


def test_each_object_keeps_what_its_root_says_of_it(packed, tmp_path):
    """Also where roots differ, or some say nothing; and an organ's place in its scan."""
    unpack(packed, tmp_path / "all")
    table = pd.read_csv(tmp_path / "all" / "metadata.csv", dtype=str, keep_default_na=False)
    for part, root in enumerate("abc"):
        (tmp_path / root / "voxels").mkdir(parents=True)
        rows = table.iloc[part::3]
        for sha256 in rows["sha256"]:
            name = f"voxels/{sha256}.ply"
            (tmp_path / root / name).write_bytes((tmp_path / "all" / name).read_bytes())
        if root != "c":
            rows = rows.assign(up_axis={"a": "y", "b": "auto"}[root])
        if root == "b":
            rows = rows.assign(
                kind="bones", mm_per_cell="0.5", frame=[f'{{"center":[{i},0,0]}}' for i in range(len(rows))]
            )
        rows.to_csv(tmp_path / root / "metadata.csv", index=False)
    assert pack(",".join(str(tmp_path / root) for root in "abc"), tmp_path / "all.npz", R) == 7
    arrays = load_packed(tmp_path / "all.npz")
    assert arrays["up_axis"].tolist() == ["y"] * 3 + ["auto"] * 2 + [""] * 2
    assert arrays["kind"].tolist() == [""] * 3 + ["bones"] * 2 + [""] * 2
    assert arrays["mm_per_cell"].tolist() == [""] * 3 + ["0.5"] * 2 + [""] * 2
    assert arrays["frame"].tolist() == [""] * 3 + [f'{{"center":[{i},0,0]}}' for i in range(2)] + [""] * 2
    unpack(tmp_path / "all.npz", tmp_path / "again")
    assert pack(str(tmp_path / "again"), tmp_path / "again.npz", R) == 7
    again = load_packed(tmp_path / "again.npz")
    assert again.keys() == arrays.keys() and all(np.array_equal(again[key], arrays[key]) for key in arrays)


def test_names_that_look_like_numbers_stay_text(tmp_path):
    names = np.array(["007", "1e3", "1.0", "-0", "00", "1.10", "12"])
    np.savez(tmp_path / "a.npz", **arrays() | {"name": names, "source": names[::-1]})
    unpack(tmp_path / "a.npz", tmp_path / "root")
    entries = SparseStructure(str(tmp_path / "root"), resolution=R, split="all").entries
    assert [(entry.name, entry.source) for entry in entries] == list(zip(names, names[::-1], strict=True))


def test_the_folder_has_the_layout_that_the_dataset_reads(packed, tmp_path):
    unpack(packed, tmp_path / "root")
    metadata = pd.read_csv(tmp_path / "root" / "metadata.csv", dtype=str, keep_default_na=False)
    bits = np.unpackbits(arrays()["bits"], axis=1)
    assert metadata["sha256"].tolist() == SHA256 and metadata["voxelized"].tolist() == ["True"] * 7
    assert metadata["num_voxels"].astype(int).tolist() == bits.sum(1).tolist()
    datasets = [SparseStructure(str(path), resolution=R, split="all") for path in (packed, tmp_path / "root")]
    entries = [[entry._replace(root="") for entry in dataset.entries] for dataset in datasets]
    assert entries[0] == entries[1]
    for mine, theirs in zip(*datasets, strict=True):
        assert mine["ss"].equal(theirs["ss"])


def test_the_split_of_a_file_name_or_hash_is_kept(tmp_path):
    for name in ("a_val.npz", "a.npz"):
        np.savez(tmp_path / name, bits=arrays()["bits"], sha256=arrays()["sha256"])
        before = SparseStructure(str(tmp_path / name), resolution=R, split="all")
        unpack(tmp_path / name, tmp_path / name[:-4])
        pack(str(tmp_path / name[:-4]), tmp_path / "again_train.npz", R)
        after = SparseStructure(str(tmp_path / "again_train.npz"), resolution=R, split="all")
        assert [entry.split for entry in before.entries] == [entry.split for entry in after.entries]
        assert [entry.name for entry in after.entries] == SHA256
        (tmp_path / "again_train.npz").unlink()


def test_files_of_before_there_was_a_format_are_format_1_and_newer_ones_are_refused(packed, tmp_path):
    """`packed` has no array `format`, as the files of earlier versions."""
    old = load_packed(packed)
    save_packed(tmp_path / "new.npz", old["bits"], {name: old[name] for name in TEXT_ARRAYS if name in old})
    new = load_packed(tmp_path / "new.npz")
    assert old.keys() == new.keys() == arrays().keys()
    assert all(np.array_equal(old[key], new[key]) for key in old)

    newer = tmp_path / "newer.npz"
    np.savez(newer, format=FORMAT_VERSION + 1, **arrays())
    readers = [
        lambda: load_packed(newer),
        lambda: setting_of_data([newer], "up_axis"),
        lambda: SparseStructure(str(newer), resolution=R),
        lambda: unpack(newer, tmp_path / "root"),
    ]
    refused = f"newer.npz: its format version is {FORMAT_VERSION + 1}, .*up to {FORMAT_VERSION}; install a newer"
    for read in readers:
        with pytest.raises(DataError, match=refused):
            read()
    assert not (tmp_path / "root").exists()
    for wrong in (0, -1, 1.0, [1], "1", True):
        np.savez(newer, format=wrong, **arrays())
        with pytest.raises(DataError, match="newer.npz: its format version is .* whole number of at least 1"):
            load_packed(newer)


def test_what_would_not_be_read_is_not_written(tmp_path):
    bits = arrays()["bits"]
    for wrong, texts, message in (
        (bits.astype(bool), {}, "bits is bool"),
        (np.concatenate([bits, 0 * bits[:1]]), {}, "row 7 of bits has no occupied voxel"),
        (bits, {"name": np.array(["a", "b"])}, r"name is .*text \[7\]"),
        (bits, {"name": np.arange(7)}, "name is int64"),
    ):
        with pytest.raises(DataError, match=f"a.npz: {message}"):
            save_packed(tmp_path / "a.npz", wrong, texts)
    with pytest.raises(DataError, match="--resolution 5: .*even"):
        pack(str(tmp_path), tmp_path / "a.npz", 5)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(packed, tmp_path):
    unpack(packed, tmp_path / "root")
    before = packed.read_bytes()
    with pytest.raises(DataError, match="a.npz: exists already"):
        pack(str(tmp_path / "root"), packed, R)
    with pytest.raises(DataError, match="root: exists already"):
        unpack(packed, tmp_path / "root")
    with pytest.raises(DataError, match="b.zip: the name of a packed file ends in .npz"):
        pack(str(tmp_path / "root"), tmp_path / "b.zip", R)
    assert packed.read_bytes() == before


def test_a_failure_half_way_leaves_nothing_behind(packed, tmp_path, monkeypatch):
    unpack(packed, tmp_path / "root")
    last = tmp_path / "root" / "voxels" / f"{SHA256[-1]}.ply"
    last.write_bytes(last.read_bytes()[:-1])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=f"{last.name}: .*truncated"):
        pack(str(tmp_path / "root"), tmp_path / "b.npz", R)

    written = []

    def fill_the_disk(path, points):
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"")

    monkeypatch.setattr("dataset_toolkits.pack.write_ply", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        unpack(packed, tmp_path / "other")
    assert len(written) == 4 and sorted(tmp_path.iterdir()) == before


def test_what_a_killed_unpacking_has_left_is_removed_by_the_next(packed, tmp_path):
    """That of a process which still runs, or of another folder, stays."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + (
        "import os\nfrom pathlib import Path\nfrom dataset_toolkits import pack\n"
        "def kill(path, points):\n    path.write_bytes(b'half')\n    os._exit(9)\n"
        "pack.write_ply = kill\npack.unpack(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    for name in ("root", "other"):
        done = subprocess.run([sys.executable, "-c", code, str(packed), str(tmp_path / name)], capture_output=True)
        assert done.returncode == 9, done.stderr
    running = tmp_path / f".root.{host_name()}.{os.getpid()}.00000000.tmp"
    running.mkdir()
    assert len(list(tmp_path.glob(".root.*.tmp"))) == 2 and len(list(tmp_path.glob(".other.*.tmp"))) == 1
    unpack(packed, tmp_path / "root")
    assert list(tmp_path.glob(".root.*.tmp")) == [running] and len(list(tmp_path.glob(".other.*.tmp"))) == 1


def run(*flags: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "dataset_toolkits" / "pack.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_program_works_from_any_folder_and_fails_with_one_line(packed, tmp_path):
    done = run("--unpack", "a.npz", "--output_dir", "root", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "root: 7 grids\n"), done.stderr
    failed = run("--input", "root", "--output", "b.npz", cwd=tmp_path)  # resolution 64 is the default
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: root/voxels/") and failed.stderr.count("\n") == 1
    assert not (tmp_path / "b.npz").exists()
    misused = run("--input", "root", "--output_dir", "b", cwd=tmp_path)
    assert misused.returncode == 2 and "--input goes with --output" in misused.stderr
