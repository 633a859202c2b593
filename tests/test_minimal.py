"""What works without the optional packages, and what an import pulls in."""

import json
import os
import subprocess
import sys

import torch
from helpers import ROOT, tiny_config

# Needed for training, data or the Hub, but neither to look at the package nor to run a published model.
OPTIONAL = (
    "pandas",
    "plyfile",
    "PIL",
    "tensorboard",
    "easydict",
    "tqdm",
    "huggingface_hub",
    "trimesh",
    "open3d",
    "numba",
    "DracoPy",
    "mapbox_earcut",
    "nibabel",
    "nrrd",
    "highdicom",
    "pydicom",
    "scipy",
    "skimage",
    "pyarrow",
    "dash",
    "matplotlib",
    "ray",
)

BLOCK = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            raise ImportError(f"{{name}} is blocked in this test")
sys.meta_path.insert(0, Blocked())
"""


def python(code: str, *args: str) -> str:
    """Standard output of a fresh interpreter that sees the package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def outside(statement: str) -> set[str]:
    """Packages from outside the standard library that a statement loads beyond numpy, torch and what torch loads."""
    return set(
        json.loads(
            python(f"""
import json, sys
import numpy, torch
before = set(sys.modules)
{statement}
names = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(names - set(sys.stdlib_module_names) - {{"numpy", "torch", "sympy", "mpmath"}})))
""")
        )
    )


def test_import_trellis_loads_nothing_but_torch_and_numpy():
    assert outside("import trellis") == {"trellis"}
    assert outside(
        "import trellis.models, trellis.modules.quantizers.vq, trellis.modules.losses, trellis.utils.config"
        ", trellis.evaluation.metrics, trellis.trainers, trellis.datasets"
    ) == {"trellis"}


def test_import_trellis_is_light():
    """No subpackage, and no torch, until something is asked for."""
    code = "import sys, trellis; print([name for name in sys.modules if name.startswith(('trellis', 'torch'))])"
    assert python(code).strip() == "['trellis']"


def test_models_quantizers_and_published_weights_need_no_optional_package(tmp_path):
    from safetensors.torch import save_file

    from trellis.models import build, model_spec

    torch.manual_seed(0)
    specs = tiny_config("SparseStructureVqVaeTrainer")["models"]
    models = {name: build(spec) for name, spec in specs.items()}
    for name, model in models.items():
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.json").write_text(model_spec(specs[name]))
    ss = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)).round()
    with torch.no_grad():
        want = models["quantizer"](models["encoder"](ss)).indices
    output = python(
        BLOCK
        + """
import torch
import trellis
from trellis.models import SparseStructureDecoder, SparseStructureEncoder, VectorQuantizer, from_pretrained
models = {name: from_pretrained(f"{sys.argv[1]}/{name}") for name in ("encoder", "quantizer", "decoder")}
assert [type(model) for model in models.values()] == [SparseStructureEncoder, VectorQuantizer, SparseStructureDecoder]
assert not any(model.training for model in models.values())
ss = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)).round()
with torch.no_grad():
    quantized = models["quantizer"](models["encoder"](ss))
assert models["decoder"](quantized.codes).shape == ss.shape
assert torch.equal(models["quantizer"].lookup(quantized.indices), quantized.codes)
print(quantized.indices.tolist())
""",
        str(tmp_path),
    )
    assert json.loads(output) == want.tolist()


def test_a_missing_local_pair_is_an_error_without_the_hub_client():
    output = python(
        BLOCK
        + """
from trellis.models import from_pretrained
from trellis.utils.errors import CheckpointError
try:
    from_pretrained("gone/encoder")
except CheckpointError as error:
    print(error)
"""
    )
    assert "gone/encoder" in output and "not a Hub path" in output


def test_a_configuration_is_checked_without_data_packages(tmp_path):
    """Grid data and pictures wait until a run starts; the check needs neither."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config()))
    code = BLOCK + "from trellis.utils.config import load_config; from trellis.models import build\n"
    code += "print(sorted(type(build(spec)).__name__ for spec in load_config(sys.argv[1])['models'].values()))"
    assert python(code, str(path)).strip() == "['SparseStructureDecoder', 'SparseStructureEncoder']"


def test_no_module_needs_an_extra():
    """What extras bring is optional; everything in the package but the viewer imports without it."""
    python("""
import sys
EXTRAS = '''trimesh open3d numba DracoPy mapbox_earcut nibabel nrrd highdicom pydicom skimage scipy pyarrow dash plotly
matplotlib'''
for name in EXTRAS.split():
    sys.modules[name] = None
import importlib, pkgutil, trellis
for module in pkgutil.walk_packages(trellis.__path__, "trellis."):
    if not module.name.startswith("trellis.viewer."):
        importlib.import_module(module.name)
""")
