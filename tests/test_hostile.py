"""Files and texts of strangers: whatever they hold ends in one error, soon, and takes no more memory than there is."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA, ROOT, VQ, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from benchmarks import fuzz
from benchmarks.common import tiny_models
from benchmarks.fuzz_targets import TARGETS, Finding, Target, attempt, mutated
from trellis import SparseStructureTokenizer
from trellis.datasets.metadata import read_metadata
from trellis.datasets.packed import load_packed, save_packed
from trellis.grids.meshes import mesh_to_grid
from trellis.grids.voxels import has_faces, pack_bits, read_ply
from trellis.models import build, from_pretrained, read_weights
from trellis.tokens import parquet
from trellis.tokens.sources import read_note
from trellis.tokens.text import SHAPELLM
from trellis.utils.config import MAX_BYTES, MAX_DEPTH, apply_override, load_config, parse_json
from trellis.utils.errors import CheckpointError, ConfigError, DataError, UserError
from trellis.utils.inputs import obstacle, require_file

SECONDS = 20  # that an error may take on a busy machine; most take milliseconds
EXAMPLES = {"config": 15, "folder": 30, "shapellm": 25, "parquet": 60, "weights": 50}  # of slow targets; else 100


@pytest.fixture(autouse=True)
def limit_of_time():
    """Interrupt a test that hangs."""

    def stop(signum, frame):
        raise TimeoutError("no error after many seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(6 * SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- what fuzzing covers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid(name, tmp_path):
    for number, data in enumerate(TARGETS[name].seeds()):
        (tmp_path / str(number)).mkdir()
        TARGETS[name].run(data, tmp_path / str(number))


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_end_in_one_error(name, tmp_path_factory):
    target, folder = TARGETS[name], tmp_path_factory.mktemp(name)
    seeds = target.seeds()

    @settings(
        max_examples=EXAMPLES.get(name, 100),
        derandomize=True,  # the long run explores; this one is the same everywhere
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=False), st.sampled_from(seeds))
    def end_well(rng: random.Random, data: bytes):
        for path in folder.iterdir():
            path.unlink()
        found = attempt(target, mutated(target, rng, data), folder, SECONDS)
        assert found is None, found.text

    end_well()


def _fail(error: type[BaseException]) -> Target:
    def run(data: bytes, folder: Path) -> None:
        raise error("a\nb")

    return Target(lambda: [b""], run, lambda rng, data: data)


def _spin(data: bytes, folder: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "target, kind",
    [
        (_fail(KeyError), "traceback"),
        (_fail(MemoryError), "memory"),
        (_fail(RecursionError), "traceback"),
        (_fail(DataError), "message"),
        (Target(lambda: [b""], _spin, lambda rng, data: data), "hang"),
    ],
)
def test_a_bad_end_is_found(target, kind, tmp_path):
    found = attempt(target, b"", tmp_path, 0.2)
    assert isinstance(found, Finding) and found.kind == kind


def test_findings_at_one_place_count_once(tmp_path):
    for text in (
        'File "a.py", line 3\nKeyError: 1',
        'File "a.py", line 3\nKeyError: 2',
        'File "a.py", line 4\nKeyError: 1',
    ):
        fuzz.record(tmp_path, "packed", text.encode(), "traceback", text)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", "", ".txt", ".txt"]


def test_what_a_reader_must_not_do_is_noted(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from benchmarks import fuzz\n"
        "inside, outside = Path('in'), Path('out')\n"
        "inside.mkdir(); acts = fuzz.guard(inside)\n"
        "(inside / 'a').write_text('x'); (inside / 'a').unlink(); open(os.devnull, 'w').close(); assert acts() == []\n"
        "outside.write_text('x'); os.system('true'); outside.unlink(); open('in/../b', 'w').close()\n"
        "found = acts(); assert len(found) == 4, found\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, check=True)


# --- what is no file -------------------------------------------------------------------------------------

READERS = {
    "c.json": lambda path: load_config(str(path)),
    "c.npz": load_packed,
    "p.ply": read_ply,
    "f.ply": has_faces,
    "m.ply": lambda path: mesh_to_grid(path, 16),
    "m.glb": lambda path: mesh_to_grid(path, 16),
    "w.pt": read_weights,
    "w.safetensors": read_weights,
    "n.safetensors": lambda path: read_note(path, "canary"),
    "t.parquet": parquet.count_rows,
    "metadata.csv": lambda path: read_metadata(str(path.parent)),
    "3DVQVAE.bin": SparseStructureTokenizer.from_shapellm,
    "grid.ply": lambda path: SparseStructureTokenizer(tiny_models(), 16).encode(path),
}


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a folder"])
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_and_a_device_are_refused_before_they_are_read(name, kind, tmp_path):
    path = tmp_path / name
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=f"{name}: is {kind} and not a file"):
        READERS[name](path)


def test_a_pipe_as_configuration_ends_the_program(tmp_path, capsys):
    os.mkfifo(tmp_path / "c.json")
    flags = ["--config", tmp_path / "c.json", "--output_dir", tmp_path / "run", "--data_dir", tmp_path]
    assert train.main(list(map(str, flags))) == 1
    assert "c.json: is a named pipe" in capsys.readouterr().err


def test_obstacles(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "good").symlink_to("file")
    (tmp_path / "broken").symlink_to("gone")
    assert obstacle(tmp_path / "file") is None and obstacle(tmp_path / "good") is None
    assert obstacle(tmp_path / "broken") == "is a link to what is not there"
    assert obstacle(tmp_path / "gone") == "cannot be read (No such file or directory)"
    assert "null" in (obstacle("a\0b") or "")
    require_file(tmp_path / "file", DataError, "give another", largest=1)
    (tmp_path / "file").write_text("x" * 1500)
    with pytest.raises(DataError, match="file: has 1.5 kB, and at most 1 bytes are read; give another"):
        require_file(tmp_path / "file", DataError, "give another", largest=1)


# --- JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "inside each other"),
        ("[" * 100_000 + "]" * 100_000, "inside each other"),
        ('{"a":' * 200 + "1" + "}" * 200, "inside each other"),
        ("{" + ",".join(f'"{n}": 1' for n in range(100_000)) + ', "7": 2}', "'7' is given twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": ' + "9" * 5000 + "}", "a number has 5000 digits"),
        ('{"' + "k" * 10_000 + '": 1}', "a key has 10000 characters"),
        ('{"a\\nb": 1}', r"the key 'a\\nb' has a line break"),
        ('{"a": 1', "not valid JSON"),
        ("[1]", "must hold one JSON object"),
        ("\ufeff{", "not valid JSON"),
        ('{"a": "' + "x" * MAX_BYTES + '"}', "at most 4.19 MB are read"),
    ],
)
def test_json_that_no_configuration_is(text, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 400
    assert time.monotonic() - started < SECONDS


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path):
    for name, read in (("c.json", lambda path: load_config(str(path))), ("w.pt", read_weights)):
        with open(tmp_path / name, "wb") as file:
            os.truncate(file.fileno(), 2**40)
        with pytest.raises(UserError, match=f"{name}: (has|takes) 1.1 TB"):
            read(tmp_path / name)
    with open(tmp_path / "m.stl", "wb") as file:
        os.truncate(file.fileno(), 2**40)
    with pytest.raises(DataError, match="m.stl: takes 1.1 TB of memory"):
        mesh_to_grid(tmp_path / "m.stl", 16)


def test_json_nests_as_deep_as_it_may():
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    parse_json(nested(MAX_DEPTH), "here")
    with pytest.raises(ConfigError, match=f"here: has more than {MAX_DEPTH}"):
        parse_json(nested(MAX_DEPTH + 1), "here")


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000])
def test_set_takes_no_more_than_a_file(value):
    with pytest.raises(ConfigError, match="^--set trainer.args.max_steps=") as caught:
        apply_override(tiny_config(), f"trainer.args.max_steps={value}")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("assignment", ["a\nb", "a\nb=1", "models.a\nb.c=1", "trainer.args.a\nb=1", "a\n.b=x\ny"])
def test_set_with_line_breaks_is_told_in_one_line(assignment):
    with pytest.raises(ConfigError) as caught:
        apply_override(tiny_config(), assignment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a" * 100_000, ".".join(["trainer"] * 10_000), "trainer." + "a" * 10_000])
def test_set_quotes_little(path):
    with pytest.raises(ConfigError) as caught:
        apply_override(tiny_config(), f"{path}.b=1" if "." not in path else f"{path}=1")
    assert len(str(caught.value)) < 450


# --- models that no machine holds ------------------------------------------------------------------------


def _encoder(**args) -> dict:
    sizes = {"in_channels": 1, "latent_channels": 4, "num_res_blocks": 1, "channels": [8, 8]}
    return {"name": "SparseStructureEncoder", "args": {**sizes, **args}}


def _model(name: str, **args) -> dict:
    return {"name": name, "args": args}


ABSURD = [
    (_encoder(num_res_blocks=2**31), "thousands of layers"),
    (_encoder(num_res_blocks_middle=2**31), "thousands of layers"),
    (_encoder(channels=[]), "channels has 0 levels"),
    (_encoder(channels=[1] * 100_000), "channels has 100000 levels"),
    (_encoder(channels=[2**40]), "no model can have these sizes"),
    (_encoder(channels=[2**20]), "of memory, and .* are free"),
    (_encoder(latent_channels=2**62), "no model can have these sizes"),
    (_encoder(latent_channels=2**63), "latent_channels is 9223372036854775808; .* and below 2\\^63"),
    (_encoder(channels=[8, 2**63]), "channels is .*and below 2\\^63"),
    (_model("VectorQuantizer", n_embed=2**40), "of memory, and .* are free"),
    (_model("EMAVectorQuantizer", n_embed=2**62), "no model can have these sizes"),
    (_model("ResidualVectorQuantizer", num_codes=2**31), "thousands of layers or codebooks"),
    (_model("LookupFreeQuantizer", n_embed=2**40), "of memory, and .* are free"),
    (_model("FiniteScalarQuantizer", levels=[3] * 20, n_embed=3**20), "of memory, and .* are free"),
    (_model("FiniteScalarQuantizer", levels=[3] * 100_000), "levels has 100000 dimensions"),
    (_model("CodebookTransformer", channels=4, lattice=[2**62] * 3), "no model can have these sizes"),
    (_model("CodebookTransformer", channels=4, lattice=[4, 4, 4], layers_after=2**31), "thousands of layers"),
    (_model("CodebookTransformer", channels=4, lattice=[4, 4, 4], width=2**20, heads=1), "of memory, and .* are free"),
]


@pytest.mark.parametrize("spec, message", ABSURD)
def test_absurd_sizes_end_before_memory_is_taken(spec, message):
    started, held = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=f"^m.args.*{message}"):
        build(spec, "m")
    assert time.monotonic() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 500_000  # KiB


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*/*.json")), ids=lambda path: path.stem)
def test_shipped_models_are_far_from_the_limits(file):
    from trellis import models

    for name, spec in load_config(str(file))["models"].items():
        cls = models.MODELS.get(spec["name"], name)
        counted = models._Counted(name)
        state = torch.get_rng_state()
        with torch.device("meta"), counted:
            cls(**spec["args"])
        assert counted.calls < models.MAX_CALLS / 20
        assert torch.equal(torch.get_rng_state(), state)  # a first look changes no fresh weight


def test_a_limit_of_the_shell_counts():
    """`ulimit -v` leaves less than the machine has."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from trellis.models import build\nfrom trellis.utils.errors import ConfigError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)\n"
        "try: build({'name': 'VectorQuantizer', 'args': {'n_embed': 2**28}})\n"
        "except ConfigError as error: assert 'of memory' in str(error); sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)]).returncode == 7


# --- configurations --------------------------------------------------------------------------------------

MISFITS = {
    "models.decoder.args.channels=[8, 4]": "has 2 levels, but the encoder's has 3",
    "models.decoder.args.latent_channels=8": "models.decoder.args.latent_channels is 8",
    "models.quantizer.args.latent_channels=2": "models.quantizer.args.latent_channels is 2",
    "models.encoder.args.in_channels=2": "set both to 1",
    "models.decoder.args.out_channels=3": "set both to 1",
    "models.encoder.args.channels=[]": "channels has 0 levels",
    "models.decoder.args.channels=[8, 8, 4, 4]": "has 4 levels, but the encoder's has 3",
    "models.encoder.args.num_res_blocks=2147483648": "thousands of layers",
    "models.encoder.args.latent_channels=9223372036854775808": "below 2^63",
    "dataset.args.resolution=17": "use a multiple of 4",
}


@pytest.mark.parametrize("assignment, message", MISFITS.items())
@pytest.mark.parametrize("tryrun", [True, False])
def test_models_that_do_not_meet_end_a_run_at_once(
    assignment, message, tryrun, write_config, tmp_path, data_dir, capsys
):
    config = write_config(tiny_config(VQ))
    flags = ["--config", config, "--output_dir", str(tmp_path / "run"), "--data_dir", data_dir, "--set", assignment]
    assert train.main([*flags, *(["--tryrun"] if tryrun else [])]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


# --- tokenizers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    SparseStructureTokenizer(tiny_models(), 16).save_pretrained(folder / "saved")
    return folder / "saved"


def _swap(config: dict) -> None:
    models = config["models"]
    models["encoder"], models["decoder"] = models["decoder"], models["encoder"]


def _set(path: str, value):
    def change(config: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            config = config[key]
        config[last] = value

    return change


TOKENIZERS = {
    "models a list": (_set("models", [1]), "config.json: models has type list"),
    "models a text": (_set("models", "x"), "config.json: models has type string"),
    "models empty": (_set("models", {}), "models.encoder is missing"),
    "info a list": (_set("info", [1]), "config.json: info has type list"),
    "model without name": (lambda config: config["models"]["encoder"].pop("name"), "models.encoder.name is missing"),
    "model null": (_set("models.encoder", None), "models.encoder has type null"),
    "name a list": (_set("models.encoder.name", ["a"]), "models.encoder.name is missing"),
    "args a list": (_set("models.encoder.args", [1]), "models.encoder.args has type list"),
    "exchanged": (_swap, "models.encoder.name is 'SparseStructureDecoder', which is not an encoder"),
    "quantizer no quantizer": (_set("models.quantizer", _encoder()), "which is not a quantizer"),
    "transformer no transformer": (_set("models.transformer", _encoder()), "not one around a codebook"),
    "channels empty": (_set("models.encoder.args.channels", []), "channels has 0 levels"),
    "blocks without end": (_set("models.encoder.args.num_res_blocks", 2**31), "thousands of layers"),
    "codes without end": (_set("models.quantizer.args.n_embed", 2**45), "of memory, and"),
    "many codes": (_set("models.quantizer.args.n_embed", 2**26), "quantizer.embeddings.weight is .32, 4. there"),
    "two input channels": (_set("models.encoder.args.in_channels", 2), "set both to 1"),
    "another latent": (_set("models.decoder.args.latent_channels", 5), "models.decoder.args.latent_channels is 5"),
    "another level": (_set("models.decoder.args.channels", [8, 4]), "has 2 levels, but the encoder's has 3"),
    "resolution a text": (_set("resolution", "16"), "resolution is '16'"),
    "resolution true": (_set("resolution", True), "resolution is True"),
    "resolution odd": (_set("resolution", 17), "use a multiple of 4"),
    "resolution absurd": (_set("resolution", 2**40), "a grid takes .* of memory"),
    "up axis a list": (_set("up_axis", ["y"]), "up_axis ..y..: must be one of"),
    "normalization null": (_set("normalization", None), "normalization None: must be one of"),
    "another key": (_set("code", "x"), "config.json: has code, so save_pretrained did not write it"),
}


@pytest.mark.parametrize("change, message", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_strange_tokenizer_is_one_error_that_names_it(change, message, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=message) as caught:
        SparseStructureTokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 500_000  # KiB


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length(length, saved, tmp_path):
    data = (saved / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    for read in (read_weights, lambda path: read_note(path, "canary")):
        with pytest.raises(CheckpointError, match="model.safetensors: not a readable weights file"):
            read(path)


@pytest.mark.parametrize("note", ["[" * 100_000, "[1]", "3", '{"resolution": NaN}', '{"resolution": 16}', "{", '"x"'])
def test_a_damaged_note_in_weights(note, saved, tmp_path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(saved / "model.safetensors"), tmp_path / "model.safetensors", {"canary": note})
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="model.safetensors: "):
        SparseStructureTokenizer.load(tmp_path)


def test_an_exported_pair_with_absurd_sizes_names_its_file(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "encoder.json").write_text(json.dumps(_encoder(num_res_blocks=2**31)))
    save_file({"a": torch.zeros(1)}, tmp_path / "encoder.safetensors")
    with pytest.raises(ConfigError, match="encoder.json.args: the model has thousands of layers"):
        from_pretrained(str(tmp_path / "encoder"))


@pytest.fixture(scope="module")
def shapellm(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("shapellm") / "a.bin"
    torch.manual_seed(0)
    SparseStructureTokenizer(tiny_models(), 64, "shapellm", "y").export_shapellm(path)
    return torch.load(path, weights_only=True)


TABLE, INPUT, NORM = "vq.embeddings.weight", "Encoder.input_layer.weight", "Encoder.blocks.0.norm1.weight"
WEIGHTS = {
    "a list": (lambda state: [state], "holds a list, not tensors by name"),
    "a tensor": (lambda state: state[TABLE], "holds a Tensor, not tensors by name"),
    "nothing": (lambda state: None, "holds a NoneType"),
    "empty": (lambda state: {}, "holds nothing"),
    "inside": (lambda state: {"state_dict": state}, "'state_dict' is no dense tensor"),
    "numbers": (lambda state: {**state, TABLE: 3}, f"'{TABLE}' is no dense tensor"),
    "number as key": (lambda state: {**state, 3: state[TABLE]}, "3 is no dense tensor"),
    "table of one axis": (lambda state: {**state, TABLE: state[TABLE][0]}, f"{TABLE} is .4.; .* has 2 axes there"),
    "table of three": (lambda state: {**state, TABLE: state[TABLE][None]}, "has 2 axes there"),
    "table without rows": (lambda state: {**state, TABLE: state[TABLE][:0]}, "is .0, 4."),
    "table of a scalar": (lambda state: {**state, TABLE: torch.tensor(1.0)}, r"is \[\]; "),
    "table without end": (lambda state: {**state, TABLE: torch.zeros(1).expand(2**45, 4)}, "make no tokenizer"),
    "input of a scalar": (lambda state: {**state, INPUT: torch.tensor(1.0)}, "has 5 axes there"),
    "norm of two axes": (lambda state: {**state, NORM: torch.ones(2, 2)}, "has 1 axes there"),
    "sparse": (lambda state: {**state, TABLE: state[TABLE].to_sparse()}, "is no dense tensor"),
    "meta": (lambda state: {**state, TABLE: state[TABLE].to("meta")}, "is no dense tensor"),
    "complex": (lambda state: {**state, TABLE: state[TABLE].to(torch.complex64)}, "is no dense tensor of real numbers"),
    "block of many digits": (
        lambda state: {**state, f"Encoder.blocks.{'9' * 5000}.norm1.weight": torch.ones(4)},
        "does not fit|make no tokenizer",
    ),
    "one less": (
        lambda state: {key: value for key, value in state.items() if key != INPUT},
        "input_layer.weight is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change, message", WEIGHTS.values(), ids=WEIGHTS)
def test_strange_weights_in_shapellms_layout(change, message, shapellm, tmp_path):
    path = tmp_path / "3DVQVAE.bin"
    torch.save(change(dict(shapellm)), path)
    with pytest.raises(CheckpointError, match=f"3DVQVAE.bin.*({message})"):
        SparseStructureTokenizer.load(path)


def test_a_compressed_pt_file_is_no_bomb(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2**22)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert (tmp_path / "w.pt").stat().st_size < 2**17
    with pytest.raises(CheckpointError, match="w.pt: is compressed or damaged"):
        read_weights(tmp_path / "w.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_no_pickle_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "w.pt")
    np.savez("a.npz", bits=np.array([Evil()], dtype=object))
    for read in (lambda: read_weights("w.pt"), lambda: load_packed(Path("a.npz"))):
        with pytest.raises(UserError):
            read()
    assert not Path("executed").exists()


# --- packed grids ----------------------------------------------------------------------------------------


def _zip(path: Path, *members: tuple[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _patched(path: Path, place: int, value: int) -> None:
    """Change a byte of the first member's two headers. place: in the local one; the central one has it two later."""
    data = bytearray(path.read_bytes())
    data[place] = value
    data[data.index(b"PK\x01\x02") + place + 2] = value
    path.write_bytes(bytes(data))


GOOD = pack_bits(np.ones((2, 16, 16, 16)))
PACKED = {
    "encrypted": lambda path: _patched(path, 6, 1),
    "version 10.1": lambda path: _patched(path, 4, 101),
    "unknown compression": lambda path: _patched(path, 8, 77),
    "lzma that is none": lambda path: _patched(path, 8, 14),
    "bzip2 that is none": lambda path: _patched(path, 8, 12),
    "no header": lambda path: _zip(path, ("bits.npy", b"x" * 100)),
    "no array": lambda path: _zip(path, ("bits.npy", b"")),
    "text beside": lambda path: _zip(path, ("bits.npy", _npy(GOOD)), ("sha256.npy", b"plain text")),
    "twice": lambda path: _zip(path, ("bits.npy", _npy(GOOD)), ("bits.npy", _npy(GOOD[:1]))),
    "format a list": lambda path: _zip(path, ("bits.npy", _npy(GOOD)), ("format.npy", _npy(np.zeros(9)))),
    "objects": lambda path: np.savez(path, bits=np.array([{}], dtype=object)),
    "shape without end": lambda path: _zip(
        path, ("bits.npy", _npy(GOOD).replace(b"(2, 512), }", b"(2, 2" + b"0" * 15 + b"), }"))
    ),
    "header of brackets": lambda path: _zip(path, ("bits.npy", b"\x93NUMPY\x01\x00\xf0\x1f" + b"[" * 8176)),
    "one array": lambda path: path.write_bytes(_npy(GOOD)),
    "nothing": lambda path: path.write_bytes(b""),
    "other bytes": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", PACKED.values(), ids=PACKED)
def test_damaged_packed_files(make, tmp_path):
    path = tmp_path / "a.npz"
    save_packed(path, GOOD, {})
    assert (load_packed(path)["bits"] == GOOD).all()
    make(path)
    with pytest.raises(DataError, match="a.npz: ") as caught:
        load_packed(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_packed_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("trellis.utils.inputs.available_memory", lambda: 2**20)
    np.savez_compressed(tmp_path / "a.npz", bits=np.zeros((2**12, 512), np.uint8))
    assert (tmp_path / "a.npz").stat().st_size < 2**14
    with pytest.raises(DataError, match="a.npz: takes 2.1 MB of memory, and 1.05 MB are free"):
        load_packed(tmp_path / "a.npz")


# --- token files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    pytest.importorskip("pyarrow")
    path = tmp_path_factory.mktemp("tokens") / "a.parquet"
    path.write_bytes(TARGETS["parquet"].seeds()[0])
    return path


def _column(name: str, values, kind=None):
    def change(table):
        import pyarrow as pa

        return table.set_column(table.schema.names.index(name), name, pa.array(values, kind and kind(pa)))

    return change


def _meta(key: str, value: str | bytes):
    return lambda table: table.replace_schema_metadata({**(table.schema.metadata or {}), key.encode(): value})


IDS = [[0] * 64] * 3
TABLES = {
    "a column twice": (lambda table: table.append_column("name", table.column("name")), "the column name twice"),
    "tokens twice": (lambda table: table.append_column("tokens", table.column("tokens")), "the column tokens twice"),
    "a column less": (lambda table: table.drop_columns(["num_voxels"]), "has no column num_voxels"),
    "names of bytes": (_column("name", [b"a"] * 3), "its column name is binary, not text"),
    "names of numbers": (_column("name", [1] * 3), "its column name is int64, not text"),
    "a name missing": (_column("name", ["a", None, "c"]), "name of row 1 is missing"),
    "sha256 missing": (_column("sha256", [None] * 3, lambda pa: pa.string()), "sha256 of row 0 is missing"),
    "tokens of text": (_column("tokens", [["a"]] * 3), "tokens is list.*, not lists of whole numbers"),
    "tokens of floats": (_column("tokens", [[0.5] * 64] * 3), "not lists of whole numbers"),
    "tokens in lists": (_column("tokens", [[[0] * 64]] * 3), "not lists of whole numbers"),
    "tokens missing": (_column("tokens", [IDS[0], None, IDS[0]]), "tokens of row 1 is missing"),
    "an id missing": (_column("tokens", [[None, *IDS[0][1:]]] * 3), "an id outside"),
    "an id too large": (_column("tokens", [[2**40, *IDS[0][1:]]] * 3), "an id outside"),
    "too few ids": (_column("tokens", [[0] * 63] * 3), "has 63 ids"),
    "a bomb": (_column("tokens", [[0] * 10**6] * 3), "has 3000000 ids in 3 rows, where an object has at most 64"),
    "voxels of text": (_column("num_voxels", ["a"] * 3), "num_voxels is string, not whole numbers"),
    "iou of text": (_column("iou", ["a"] * 3), "iou is string, not numbers"),
    "iou missing": (_column("iou", [1.0, None, 1.0]), "iou of row 1 is missing"),
    "lattice a number": (_meta("lattice", "4"), "no valid lattice"),
    "lattice of two": (_meta("lattice", "[8, 8]"), "no valid lattice"),
    "lattice of text": (_meta("lattice", '["4", "4", "4"]'), "no valid lattice"),
    "lattice without end": (_meta("lattice", "[1000000, 1000000, 1000000]"), "at most 16777216 are read"),
    "lattice of brackets": (_meta("lattice", "[" * 100_000), "no valid lattice"),
    "n_embed of digits": (_meta("n_embed", "9" * 5000), "no valid n_embed"),
    "hash no text": (_meta("tokenizer_hash", b"\xff\xfe"), "no valid tokenizer_hash"),
    "a form that is none": (_meta("form", "x"), "its metadata are damaged"),
    "version of digits": (_meta("format_version", "9" * 5000), "format version"),
    "left_out no JSON": (_meta("left_out", "{"), "no valid left_out"),
    "left_out a number": (_meta("left_out", "3"), "no valid left_out"),
    "left_out of numbers": (_meta("left_out", "[1]"), "no valid left_out"),
    "left_out without reason": (_meta("left_out", '[{"file": "a", "sha256": "b"}]'), "no valid left_out"),
    "left_out of brackets": (_meta("left_out", "[" * 100_000), "no valid left_out"),
    "made_from of brackets": (_meta("made_from", "[" * 100_000), "no valid made_from"),
    "data a list": (_meta("made_from", '{"data": [1]}'), "no valid made_from"),
}


@pytest.mark.parametrize("change, message", TABLES.values(), ids=TABLES)
def test_strange_token_files(change, message, shards, tmp_path):
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(change(pq.read_table(shards)), path)
    with pytest.raises(DataError, match=f"a.parquet: .*{message}"):
        list(parquet.read_shards(path))
        list(parquet.read_names(path))
        parquet.read_left_out(path)
        parquet.read_data_key(path)


def test_token_files_as_they_are_written_are_read(shards):
    rows = list(parquet.read_shards(shards))
    assert [row["sha256"] for row in rows] == ["a", "b", "c"]
    assert np.array_equal(np.stack([row["tokens"] for row in rows]), np.arange(192).reshape(3, 64) % 32)
    assert list(parquet.read_names(shards)) == [("a", "x"), ("b", "y"), ("c", "z")]
    assert parquet.read_left_out(shards) == [{"file": "c", "sha256": "3", "reason": "why"}]
    assert parquet.read_data_key(shards) == {"a": 1}
    assert parquet.read_column(shards, "iou").tolist() == [1, 1, 1]


def test_a_text_of_100_megabytes():
    text, started = "<mesh1>" * (100_000_000 // 7), time.monotonic()
    for strict in (True, False):
        with pytest.raises(DataError, match="the text has 99999998 characters, and at most 4194304 are read"):
            SHAPELLM.from_text(text, 1024, strict=strict)
    assert time.monotonic() - started < SECONDS


# --- meshes ----------------------------------------------------------------------------------------------


def test_a_chain_of_thousands_of_nodes(tmp_path):
    tree = json.loads(TARGETS["gltf"].seeds()[0])
    number = 3000
    tree["nodes"] = [{"children": [n + 1]} for n in range(number)] + [{"mesh": 0}]
    path = tmp_path / "chain.gltf"
    path.write_text(json.dumps(tree))
    tree["nodes"] = [{"mesh": 0}]
    (tmp_path / "flat.gltf").write_text(json.dumps(tree))
    started = time.monotonic()
    grids = SparseStructureTokenizer(tiny_models(), 16)._to_grids([path, tmp_path / "flat.gltf"])
    assert torch.equal(grids[0], grids[1]) and grids.any()
    assert time.monotonic() - started < SECONDS


# --- what fuzzing found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((DATA / "fuzz").glob("*")), ids=lambda path: path.name)
def test_findings_end_well(path, tmp_path):
    found = attempt(TARGETS[path.name.partition("-")[0]], path.read_bytes(), tmp_path, SECONDS)
    assert found is None, found.text
