"""The GPU's nearest-code search against fp64 over all codes.

With a GPU the kernels run on it. Without one they run in Triton's interpreter, on fewer and smaller cases.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import exact_nearest
from torch import Tensor

pytest.importorskip("triton")

from trellis.modules.quantizers import nearest_triton  # noqa: E402
from trellis.modules.quantizers.nearest_triton import Sizes, nearest_code_cuda  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
# numpy's, from the interpreter, where vectors are not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Multiples of no block. Below, some tests have more vectors than one program scores.
N, K = 77, 301


def normal(D, n=N, k=K):
    return torch.randn(n, D), torch.randn(k, D)


def offset(D, n=N, k=K):
    """Far from the origin, fp32 cannot tell the distances apart."""
    return 1000 + 0.01 * torch.randn(n, D), 1000 + 0.01 * torch.randn(k, D)


def lattice(D, n=N, k=K):
    """Differences of a few units in the last place of fp32: many exact ties."""
    return 1000 + torch.randint(-3, 4, (n, D)) * 2.0**-14, 1000 + torch.randint(-3, 4, (k, D)) * 2.0**-14


def clusters(D, n=N, k=K):
    """Most vectors and codes alike, as latents of empty space are: several groups of codes come close."""
    vectors, codebook = normal(D, n, k)
    for x in (vectors, codebook):
        x[: 2 * len(x) // 3] = 1 + 0.003 * x[: 2 * len(x) // 3]
    return vectors, codebook


def duplicates(D, n=N, k=K):
    """Every code several times, in the same group and in others: the lowest index wins, and no vector is decided
    before all codes are tried."""
    vectors, codebook = normal(D, n, k)
    return vectors, codebook[torch.randint(max(1, k // 20), (k,))]


def small_codes(D, n=N, k=K):
    """A fresh codebook, uniform in ±1/K."""
    return torch.randn(n, D), torch.empty(k, D).uniform_(-1 / k, 1 / k)


def small_vectors(D, n=N, k=K):
    return 1e-6 * torch.randn(n, D), torch.randn(k, D)


def outliers(D, n=N, k=K):
    """Norms of all magnitudes, of vectors and of codes."""
    vectors, codebook = normal(D, n, k)
    return vectors * 10 ** (6 * torch.rand(n, 1) - 3), codebook * 10 ** (6 * torch.rand(k, 1) - 3)


def tiny(D, n=N, k=K):
    """Squares underflow in fp32."""
    return 1e-30 * torch.randn(n, D), 1e-30 * torch.randn(k, D)


def huge(D, n=N, k=K):
    """Squares, and the sum over codes, overflow in fp32."""
    return 1e37 * torch.randn(n, D), 1e37 * (1 + torch.rand(k, D))


ALL = [
    normal,
    offset,
    lattice,
    clusters,
    duplicates,
    small_codes,
    small_vectors,
    outliers,
    tiny,
    huge,
]


class Spy:
    """A kernel that keeps the arguments of its last launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | options
            self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def decide(monkeypatch) -> Spy:
    spy = Spy(nearest_triton._decide_kernel)
    monkeypatch.setattr(nearest_triton, "_decide_kernel", spy)
    return spy


def draw(case, *args) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    vectors, codebook = case(*args)
    return vectors.to(DEVICE), codebook.to(DEVICE)


# --- the answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ALL)
def test_is_the_exact_nearest_code(case):
    vectors, codebook = draw(case, 8)
    assert torch.equal(nearest_code_cuda(vectors, codebook), exact_nearest(vectors, codebook))


@pytest.mark.parametrize("case", [clusters, lattice])
@pytest.mark.parametrize("channels", [1, 3, 10, 32, 40, 50])
def test_any_number_of_channels(case, channels):
    """10 and 3 are not multiples of 16 or 8; from 42 on, one dot product does not hold all columns."""
    vectors, codebook = draw(case, channels)
    assert torch.equal(nearest_code_cuda(vectors, codebook), exact_nearest(vectors, codebook))


@pytest.mark.parametrize("n, k", [(0, 5), (1, 1), (5, 1), (260, 3), (3, 130), (20, 1100)])
def test_any_number_of_vectors_and_codes(n, k):
    vectors, codebook = draw(normal, 8, n, k)
    indices = nearest_code_cuda(vectors, codebook)
    assert indices.dtype == torch.int64 and indices.shape == (n,)
    assert torch.equal(indices, exact_nearest(vectors, codebook) if n else indices)


def test_a_vector_between_two_codes_gets_the_lower_index():
    codebook = torch.full((K, 2), 9.0)
    for first, second in ((3, 290), (64, 65), (128, 0), (200, 10)):
        codes = codebook.clone()
        codes[first], codes[second] = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.5])
        vectors = torch.tensor([[0.0, 0.0], [2.0**-20, 0.0], [-(2.0**-20), 0.0]])
        expected = [min(first, second), first, second]
        assert nearest_code_cuda(vectors.to(DEVICE), codes.to(DEVICE)).tolist() == expected


def test_equal_codes_of_all_blocks_give_the_lowest_index():
    vectors, codebook = draw(normal, 8, 20, nearest_triton.EXHAUST_CODES)
    expected = exact_nearest(vectors, codebook)
    assert torch.equal(nearest_code_cuda(vectors, codebook.repeat(3, 1)), expected)


def test_strides_do_not_matter():
    vectors, codebook = draw(normal, 8)
    expected = nearest_code_cuda(vectors, codebook)
    wide = torch.stack([vectors, vectors + 1], 2)[..., 0]
    assert torch.equal(nearest_code_cuda(wide, codebook.T.contiguous().T), expected)
    assert torch.equal(nearest_code_cuda(vectors[1:], codebook), expected[1:])


@pytest.mark.parametrize("case", [normal, clusters])
def test_a_vectors_code_does_not_depend_on_the_others(case):
    vectors, codebook = draw(case, 8, N, 1000)
    at_once = nearest_code_cuda(vectors, codebook)
    order = torch.randperm(N)
    assert torch.equal(nearest_code_cuda(vectors[order], codebook), at_once[order])
    some = range(0, N, 1 if GPU else 25)
    assert [nearest_code_cuda(vectors[i : i + 1], codebook).item() for i in some] == at_once[list(some)].tolist()


def test_many_vectors_go_in_portions(monkeypatch):
    vectors, codebook = draw(clusters, 8, 300, 100)
    monkeypatch.setattr(nearest_triton, "COLUMN_ELEMENTS", 1)
    assert torch.equal(nearest_code_cuda(vectors, codebook), exact_nearest(vectors, codebook))


@pytest.mark.parametrize("codes", [1, K])
def test_what_is_not_finite_stays_in_range_and_leaves_others_alone(codes):
    vectors, codebook = draw(normal, 8, N, codes)
    expected = exact_nearest(vectors, codebook)
    for value in (torch.nan, -torch.inf):
        broken = vectors.clone()
        broken[::3, 0] = value
        broken[1::3] = value
        indices = nearest_code_cuda(broken, codebook)
        assert torch.equal(indices[2::3], expected[2::3])
        assert ((indices >= 0) & (indices < codes)).all()
        codes_broken = codebook.clone()
        codes_broken[codes // 2] = value
        indices = nearest_code_cuda(vectors, codes_broken)
        assert ((indices >= 0) & (indices < codes)).all()


# --- what makes it exact, and quick ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [normal, offset, clusters, small_codes, small_vectors, outliers, tiny])
@pytest.mark.parametrize("channels", [8, 32, 50])
def test_no_score_exceeds_its_bound(case, channels, decide):
    """lowest·scale <= d/2 + limit for every code of a slot, and others·scale likewise for those outside its group.
    On a GPU this holds only if the tensor core cuts off no more than the bound allows for."""
    n, k = (2000, 3000) if GPU else (40, 300)
    vectors, codebook = draw(case, channels, n, k)
    nearest_code_cuda(vectors, codebook)
    seen = {name.removesuffix("_ptr"): value for name, value in decide.arguments.items()}
    tile_codes = Sizes.of(channels).codes
    place = torch.arange(k, device=DEVICE) % tile_codes
    slot = place // (4 * seen["GROUP"]) * 4 + place % 8 // 2
    tile = torch.arange(k, device=DEVICE) // tile_codes
    distance = (vectors.double()[:, None] - codebook.double()).square().sum(2)
    bound = distance / 2 + seen["limit"][:, None]
    scale = seen["scale"][:, None]
    assert (seen["lowest"].double()[:, slot] * scale <= bound).all()
    outside = seen["tile_of_lowest"][:, slot] != tile
    assert outside.any()
    assert (seen["others"].double()[:, None] * scale <= bound)[outside].all()


@pytest.mark.parametrize("case, share", [(normal, 0), (offset, 0), (small_codes, 0), (duplicates, 1), (huge, 1)])
def test_all_codes_are_tried_only_where_they_must(case, share, decide):
    vectors, codebook = draw(case, 8)
    nearest_code_cuda(vectors, codebook)
    assert decide.arguments["count_ptr"].tolist() == [share * N]


class Compiler:
    """Stands in for a kernel: compiles it for an H200 from the arguments of each launch, and checks the code."""

    POINTERS = {
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps=4, num_stages=3, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = dict.fromkeys(self.kernel.arg_names, "constexpr")
        for name, value in zip(self.kernel.arg_names, args, strict=False):
            signature[name] = self.POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        compiled = triton.compile(
            ASTSource(self.kernel, signature, constants, aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        # Two programs of each kernel fit the 228 KiB of a multiprocessor, each with the 1 KiB that is reserved.
        assert compiled.metadata.shared <= 113 * 1024
        if self.kernel.__name__ == "_score_kernel":
            self.check_scores(compiled.asm["ptx"], **constants)

    @staticmethod
    def check_scores(ptx: str, BLOCK_N: int, BLOCK_K: int, **_):
        """What follows the dot product of a tile: the minima of its groups, without exchange between threads."""
        loop = ptx[ptx.rindex("wgmma.wait_group") :]
        loop = loop[: loop.index("bra")]
        assert "shfl" not in loop
        per_thread = BLOCK_N * BLOCK_K // 128
        group = BLOCK_K // 8
        assert loop.count("min.f32") + loop.count("max.f32") == per_thread // group * (group + 2)


def compile_kernels():
    for name in [name for name in vars(nearest_triton) if name.endswith("_kernel")]:
        setattr(nearest_triton, name, Compiler(getattr(nearest_triton, name)))
    for channels in (3, 8, 32, 50):
        nearest_code_cuda(torch.zeros(N, channels), torch.zeros(K, channels))
        print("compiled for", channels, "channels")


def test_kernels_compile_for_an_h200():
    """In a process of its own: this one may have Triton's interpreter in place of its compiler."""
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    command = [sys.executable, "-c", "import test_nearest_triton; test_nearest_triton.compile_kernels()"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled for") == 4


# --- full size ---------------------------------------------------------------------------------------------------

FULL = [(8, 131072, 8192), (32, 32768, 8192)]


@needs_gpu
@pytest.mark.parametrize("size", FULL)
@pytest.mark.parametrize("case", ALL)
def test_full_size_is_exact(case, size):
    vectors, codebook = draw(case, *size)
    assert torch.equal(nearest_code_cuda(vectors, codebook), exact_nearest(vectors, codebook))


@needs_gpu
@pytest.mark.parametrize("size", [(8, 700_001, 65537), (512, 3000, 70_000), (1, 100_000, 100_000)])
def test_more_than_one_portion_and_many_codes(size):
    vectors, codebook = draw(normal, *size)
    some = torch.randperm(len(vectors), device=DEVICE)[:20_000]
    assert torch.equal(nearest_code_cuda(vectors, codebook)[some], exact_nearest(vectors[some], codebook))


@needs_gpu
def test_full_size_does_not_depend_on_the_batch():
    vectors, codebook = draw(clusters, *FULL[0])
    at_once = nearest_code_cuda(vectors, codebook)
    order = torch.randperm(len(vectors), device=DEVICE)
    assert torch.equal(nearest_code_cuda(vectors[order], codebook), at_once[order])
    in_parts = torch.cat([nearest_code_cuda(part, codebook) for part in vectors.split(4099)])
    assert torch.equal(in_parts, at_once)


@needs_gpu
@pytest.mark.parametrize("size", FULL)
def test_memory_is_small(size):
    vectors, codebook = draw(normal, *size)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nearest_code_cuda(vectors, codebook)
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20


@needs_gpu
def test_nothing_waits_for_the_device():
    vectors, codebook = draw(clusters, 8)
    nearest_code_cuda(vectors, codebook)
    torch.cuda.set_sync_debug_mode("error")
    try:
        nearest_code_cuda(vectors, codebook)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_vectors_device():
    vectors, codebook = draw(normal, 8)
    elsewhere = nearest_code_cuda(vectors.to("cuda:1"), codebook.to("cuda:1"))
    assert elsewhere.device.index == 1
    assert torch.equal(elsewhere.to(DEVICE), nearest_code_cuda(vectors, codebook))
