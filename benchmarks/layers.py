"""Where a training step's time goes: every kind of layer, forward and backward, and the work around the network.

    python benchmarks/layers.py                   # GPU: the full-size KL step at batch 32
    python benchmarks/layers.py --device cpu      # the demo's at batch 4

Each kind of layer of the real networks runs alone on random input of its shape; indented rows are its parts. Backward
is the time of forward and backward together minus the time of forward. Limit: for a convolution the larger of its
operations over the product rate and its bytes over the copy rate, both measured in this run; norm, SiLU and residual
sum add nothing to it, since they can be done while the convolution reads and writes. For the rest, bytes over the copy
rate. Bytes: every input read once and every result written once.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, plain, runs
from benchmarks.report import Column, Report, Table
from trellis.modules import conv, fused
from trellis.modules.blocks3d import DownsampleBlock3d, ResBlock3d, UpsampleBlock3d
from trellis.modules.losses import RECONSTRUCTION_LOSSES
from trellis.modules.quantizers.nearest import nearest_code
from trellis.modules.spatial import voxel_shuffle_3d
from trellis.trainers.basic import BasicTrainer
from trellis.utils.command import pick_device, run_command
from trellis.utils.config import load_config

HOST_STEPS = 10
INDENT = "– "  # in Markdown, before the name of a row that is a part of the row above
COLUMNS = (
    Column("layer", "key"),
    Column("times"),
    Column("forward ms"),
    Column("backward ms"),
    Column("GFLOP"),
    Column("GB"),
    Column("limit ms"),
    Column("of limit", "ratio"),
    Column("share of step"),
)


@dataclass
class Work:
    """Operations and bytes of one stage for one sample, each as (forward, backward)."""

    flops: tuple[float, float] = (0.0, 0.0)
    moved: tuple[float, float] = (0.0, 0.0)


@dataclass
class Part:
    """A row of the table."""

    name: str
    count: int
    """How often a KL training step has it; 0 for what only other kinds of training have."""
    forward: Callable[[], object]
    """The call to time."""
    inputs: list[Tensor] | None = None
    """Tensors that backward computes gradients for; None without a backward."""
    stages: list[Work] = field(default_factory=list)
    """Its work, one stage after the other."""
    dtype: torch.dtype = torch.float32
    inner: bool = False
    """Whether it is a part of the row above, and its time already in that row's."""


# --- work of layers --------------------------------------------------------------------------------------


def conv_work(
    convolution: nn.Conv3d, cells: int, sizes: tuple[int, int], *, extra: int = 0, input_grad: bool = True
) -> Work:
    """Return the work of a convolution over [C, cells, cells, cells].

    sizes: bytes per element of the input and of the output.
    extra: further bytes that forward reads, such as a residual.
    """
    out = cells // convolution.stride[0]
    flops = 2 * convolution.weight.numel() * out**3
    inputs, outputs = convolution.in_channels * cells**3 * sizes[0], convolution.out_channels * out**3 * sizes[1]
    backward = flops * (2 if input_grad else 1)
    return Work((flops, backward), (inputs + outputs + extra, outputs + inputs * (2 if input_grad else 1)))


def pass_work(elements: int, size: int) -> Work:
    """Return the work of an elementwise layer; its backward reads input and gradient and writes a gradient."""
    return Work((0, 0), (2 * elements * size, 3 * elements * size))


def limit_seconds(part: Part, batch: int, ceilings: common.Ceilings) -> float:
    """Return the least time for a part, forward and backward, on a batch."""
    directions = (0, 1) if part.inputs is not None else (0,)
    return sum(
        ceilings.seconds(batch * work.flops[direction], batch * work.moved[direction], part.dtype)
        for work in part.stages
        for direction in directions
    )


# --- the network -----------------------------------------------------------------------------------------


def blocks_of(trainer: BasicTrainer) -> Iterator[tuple[nn.Module, int]]:
    """Yield (block, cells along an axis of its input) in the order of execution, without first and last layers."""
    encoder, decoder = trainer.models["encoder"], trainer.models["decoder"]
    cells = trainer.dataset.resolution
    for block in (*encoder.blocks, *encoder.middle_block, *decoder.middle_block, *decoder.blocks):
        yield block, cells
        if isinstance(block, DownsampleBlock3d):
            cells //= 2
        elif isinstance(block, UpsampleBlock3d):
            cells *= 2


def network_parts(trainer: BasicTrainer, batch: int) -> list[Part]:
    """Return every kind of layer once, each followed by its parts."""
    device, dtype = trainer.device, trainer.precision.dtype
    size, resolution = dtype.itemsize, trainer.dataset.resolution

    def random(channels: int, cells: int, of: torch.dtype = dtype) -> Tensor:
        x = torch.randn(batch, channels, cells, cells, cells, device=device, dtype=of)
        return x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()

    def run(function: Callable, x: Tensor) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with trainer.precision.autocast():
                return function(x)

        return forward

    groups: dict[tuple, list[nn.Module]] = {}
    for block, cells in blocks_of(trainer):
        shape = tuple(next(block.parameters()).shape if isinstance(block, ResBlock3d) else block.conv.weight.shape)
        groups.setdefault((type(block), shape, cells), []).append(block)

    parts = []
    for name, model in (("encoder", trainer.models["encoder"]), ("decoder", trainer.models["decoder"])):
        first, last = model.input_layer, model.out_layer[2]
        cells = resolution if name == "encoder" else resolution // trainer.models["encoder"].downsampling
        other = resolution // trainer.models["encoder"].downsampling if name == "encoder" else resolution
        grid = random(first.in_channels, cells, torch.float32).detach().requires_grad_(name == "decoder")
        parts.append(
            Part(
                f"first layer, {name}",
                1,
                run(model._first, grid),
                [*_own(grid), *first.parameters()],
                [conv_work(first, cells, (4, size), input_grad=grid.requires_grad)],
                dtype,
            )
        )
        h = random(last.in_channels, other)
        parts.append(
            Part(
                f"last layer, {name}",
                1,
                run(model._last, h),
                [h, *model.out_layer.parameters()],
                [conv_work(last, other, (size, 4))],
                dtype,
            )
        )

    for (kind, _, cells), blocks in groups.items():
        block = blocks[0]
        convolution = block.conv1 if kind is ResBlock3d else block.conv
        channels = convolution.in_channels
        x = random(channels, cells)
        elements = channels * cells**3
        whole = Part(
            f"{kind.__name__} {channels} at {cells}³", len(blocks), run(block, x), [x, *block.parameters()], dtype=dtype
        )
        parts.append(whole)
        if kind is ResBlock3d:
            extra = elements * size
            at = f"{channels} at {cells}³"
            whole.stages = [
                conv_work(block.conv1, cells, (size, size)),
                conv_work(block.conv2, cells, (size, size), extra=extra),
            ]
            parts += convolution_parts(block.conv1, x, 2 * len(blocks), dtype, at)
            parts.append(norm_part(trainer, block, x, 2 * len(blocks), at))
            continue
        whole.stages = [conv_work(convolution, cells, (size, size))]
        if kind is UpsampleBlock3d:
            y = random(convolution.out_channels, cells)
            parts.append(
                Part(
                    f"shuffle, {convolution.out_channels} at {cells}³",
                    len(blocks),
                    lambda y=y: voxel_shuffle_3d(y, 2),
                    [y],
                    [pass_work(convolution.out_channels * cells**3, size)],
                    dtype,
                    inner=True,
                )
            )
    return parts


def _own(x: Tensor) -> list[Tensor]:
    return [x] if x.requires_grad else []


def convolution_parts(convolution: nn.Conv3d, x: Tensor, count: int, dtype: torch.dtype, at: str) -> list[Part]:
    """Return a residual block's convolution and its two gradients, each alone."""
    x, weight = x.detach(), convolution.weight.detach().to(dtype)
    grad, size = torch.randn_like(x), dtype.itemsize
    work = conv_work(convolution, x.shape[-1], (size, size))
    one = Work((work.flops[0], 0), (work.moved[0], 0))
    calls = {
        f"convolution, {at}": lambda: conv.forward(x, weight),
        f"input gradient, {at}": lambda: conv.input_grad(grad, weight),
        f"weight gradient, {at}": lambda: conv.weight_grad(x, grad, weight),
    }
    return [Part(name, count, call, None, [one], dtype, inner=True) for name, call in calls.items()]


def norm_part(trainer: BasicTrainer, block: ResBlock3d, x: Tensor, count: int, at: str) -> Part:
    """Return norm and SiLU, forward and backward, as the block runs them."""
    elements, size = x[0].numel(), x.element_size()
    work = pass_work(elements, size)
    if not fused.usable(x):
        inputs = [x, *block.norm1.parameters()]
        return Part(f"norm and SiLU, {at}", count, lambda: F.silu(block.norm1(x)), inputs, [work], inner=True)
    from trellis.modules.kernels.norm_silu import norm_silu, norm_silu_backward

    gamma, beta, eps = block.norm1.weight.detach(), block.norm1.bias.detach(), block.norm1.eps
    x, grad = x.detach(), torch.randn_like(x)

    def both() -> None:
        norm_silu(x, None, gamma, beta, eps)
        norm_silu_backward(x, None, gamma, beta, eps, grad)

    return Part(
        f"norm and SiLU, forward and backward, {at}",
        count,
        both,
        None,
        [Work((0, 0), (sum(work.moved), 0))],
        inner=True,
    )


# --- around the network ----------------------------------------------------------------------------------


def step_parts(trainer: BasicTrainer, batch: int) -> list[Part]:
    """Return loss, codebook and updates. The trainer must have taken a step, so that there are gradients."""
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    resolution, device = trainer.dataset.resolution, trainer.device
    logits = torch.randn(batch, 1, *(resolution,) * 3, device=device, requires_grad=True)
    target = (torch.rand(logits.shape, device=device) < 0.04).to(torch.uint8)
    voxels = resolution**3
    loss = RECONSTRUCTION_LOSSES[trainer.loss_type]
    book = load_config(runs.config_path("vqvae_stage2" if device.type == "cuda" else "demo_stage2"))["models"]
    codes = book["quantizer"]["args"]["n_embed"]
    tokens = plain.tokens_per_sample(book, resolution)
    vectors, codebook = torch.randn(batch * tokens, 8, device=device), torch.randn(codes, 8, device=device)

    def updates(moved: int) -> list[Work]:
        """Return the work of moving this many bytes per parameter, divided by samples as `limit_seconds` expects."""
        return [Work((0, 0), (moved * parameters / batch, 0))]

    return [
        Part(
            f"loss, {trainer.loss_type}",
            1,
            lambda: loss(logits, target),
            [logits],
            [Work((0, 0), (5 * voxels, 9 * voxels))],
        ),
        Part(
            f"nearest code, {len(vectors)} × {codes} × 8",
            0,
            lambda: nearest_code(vectors, codebook),
            None,
            [Work((plain.nearest_flops(tokens, codes, 8), 0), (tokens * 8 * 4, 0))],
        ),
        Part("gradient norm and clipping", 1, lambda: trainer.clipper(trainer.parameters), None, updates(4)),
        Part("optimizer", 1, trainer.optimizer.step, None, updates(28)),
        Part("averages", 1, lambda: trainer.ema.update(1), None, updates(12)),
    ]


def host_seconds(trainer: BasicTrainer, batch: dict[str, Tensor]) -> float:
    """Return the mean time until a step is enqueued while the GPU has nothing else to do."""
    total = 0.0
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize(trainer.device)
        started = time.perf_counter()
        trainer.run_step(batch)
        total += time.perf_counter() - started
    torch.cuda.synchronize(trainer.device)
    return total / HOST_STEPS


# --- table -----------------------------------------------------------------------------------------------


def measured_row(
    part: Part, batch: int, step: float, seconds: float, device: torch.device, ceilings: common.Ceilings
) -> list:
    """Return a part's row.

    step: seconds of a whole training step.
    seconds: to spend on each measurement.
    """
    forward = both = common.median_seconds(part.forward, device, budget=seconds)
    if part.inputs is not None:
        grad = torch.randn_like(part.forward())
        both = common.median_seconds(
            lambda: torch.autograd.grad(part.forward(), part.inputs, grad), device, budget=seconds
        )
    directions = slice(0, 2 if part.inputs is not None else 1)
    flops = batch * sum(sum(work.flops[directions]) for work in part.stages)
    moved = batch * sum(sum(work.moved[directions]) for work in part.stages)
    limit = limit_seconds(part, batch, ceilings)
    backward = (both - forward) * 1e3 if part.inputs is not None else None
    share = part.count * both / step if part.count else None
    name = f"{INDENT}{part.name}" if part.inner else part.name
    return [name, part.count, forward * 1e3, backward, flops / 1e9, moved / 1e9, limit * 1e3, limit / both, share]


def main(argv: list[str] | None = None) -> None:
    flags = common.parser(__doc__)
    flags.add_argument("--batch_size", type=int, help="default: 32 on a GPU, 4 on a CPU")
    flags.add_argument("--seconds", type=float, default=0.5, help="seconds to spend on each measurement (default: 0.5)")
    args = flags.parse_args(argv)
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    batch_size = args.batch_size or (32 if cuda else 4)
    path = runs.config_path("ss_vae_conv3d_16l8_fp16" if cuda else "demo_vae")
    config = load_config(path)
    channels = config["models"]["encoder"]["args"]["channels"]
    work = {"resolution": args.resolution, "channels": channels, "batch": batch_size}
    report = Report("Layers", __file__, argv, device, args.output, work)
    ceilings = common.measure_ceilings(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_dir = common.data_for(args, folder)
        weights = common.random_weights(config["models"], common.packed_rows(data_dir), folder, device)
        settings = runs.steady_settings(weights, 1, 1) | runs.batch_setting(config, batch_size)
        settings["dataset.args.resolution"] = args.resolution
        trainer = runs.build_trainer(runs.arguments(path, device, data_dir, folder / "run", settings), device)
        trainer.build_training_state()
        batch = next(trainer.batches())
    step = common.median_seconds(lambda: trainer.run_step(batch), device, budget=4 * args.seconds)
    summary = f"{path.stem}, batch {batch_size}: {step * 1e3:.1f} ms a step, {batch_size / step:.1f} samples/s."
    if cuda:
        summary += f" The host enqueues a step in {host_seconds(trainer, batch) * 1e3:.1f} ms."
    parts = [*network_parts(trainer, batch_size), *step_parts(trainer, batch_size)]
    rows = [measured_row(part, batch_size, step, args.seconds, device, ceilings) for part in parts]
    total = sum(row[-1] for part, row in zip(parts, rows, strict=True) if part.count and not part.inner)
    summary += f" The rows that are not indented add up to {total:.0%} of it."
    print(report.write(f"Ceilings: {ceilings}.", summary, Table(COLUMNS, rows)))


if __name__ == "__main__":
    sys.exit(run_command(main, None))
