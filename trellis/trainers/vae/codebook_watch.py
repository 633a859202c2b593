"""Codebook usage over windows of steps, and the revival of dead codes.

A code that no vector chooses gets no gradient and does not move: it is dead. At the end of a window dead codes are
moved to latent vectors with a large quantization error, from tokens with occupied voxels. The optimizer's moments and
the averages of their rows start afresh (random restarts as in Jukebox, arXiv:2005.00341, Sec. 3.1, which draws from
the last batch and ignores the error). With several codebooks, each one's dead codes are moved to vectors that it has to
quantize: parts of latents, or the residuals that the codebooks before it leave.

A code is dead if no rank chose it in any step of the window. A rarely chosen code is not dead: most tokens are empty
and use few codes, so codes of rare shapes are chosen far less often than the mean. A window in which a codebook
quantized too few vectors to tell goes on.

Memory: the sample has a vector for each code, 64 MiB for four codebooks of 65,536 codes of 64 channels.

Axes: B batch, C latent channels, X Y Z latent cells, R voxels along an axis, L tokens of an object, D channels of a
token, d channels of a code, K codes of a codebook, Q codes of a token, N vectors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...evaluation.metrics import occupied_blocks
from ...modules.quantizers.base import Quantized, Quantizer
from ...utils import dist_utils
from ...utils.random_utils import derive_seed, sample_noise
from ..part import Part
from ..skip import put_back

# Steps of a window if no codes are revived.
WINDOW = 100
# Vectors per code that a window needs. A code chosen a third as often as the mean is then missed in one window of 28.
VECTORS_PER_CODE = 10
# Share of codes chosen in a window below which the user is warned.
LOW_USAGE = 0.5


class CodebookWatch(Part):
    """Counts of the codes chosen in windows of steps, each ending at a multiple of `every`.

    every: steps of a window, which lasts several times as many if it sees few vectors; 0 for WINDOW and no revival.
    last_step: last step at which codes are revived.
    trained: whether the quantizer is trained.
    seed: of the vectors drawn for revival.
    forget: resets optimizer state and averages of the rows [n] int64 of the state-dict keys that it is given.
    say: prints a line.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        *,
        every: int,
        last_step: float,
        trained: bool,
        seed: int,
        forget: Callable[[tuple[str, ...], Tensor], None],
        say: Callable[[str], None],
        device: torch.device,
    ):
        self.quantizer, self.forget, self.say = quantizer, forget, say
        self.window = every or WINDOW
        self.can_revive = trained and bool(quantizer.code_rows)
        self.last_step = last_step if every and self.can_revive else 0
        self.seed = derive_seed("revival", seed)
        self.warned = False
        Q, K = quantizer.codes_per_token, quantizer.codebook_size
        self.counts = torch.zeros(Q, K, dtype=torch.int64, device=device)
        self.usage = torch.full((), torch.nan, device=device)  # of the last window that ended
        self.before: list[Tensor] = []  # what `undo` goes back to
        channels = quantizer.code_channels()
        self.samples = [_Sample(K, channels, device) for _ in range(Q)] if self.last_step else []

    # --- in a step ---

    def end_of_window(self, step: int) -> int:
        """Return the first step from `step` on at which the window may end."""
        return -(-step // self.window) * self.window

    @torch.no_grad()
    def observe(
        self, step: int, counts: Tensor, z: Tensor, quantized: Quantized, ss: Tensor | None, sample_ids: Tensor
    ) -> None:
        """Count the codes that a micro-batch of step `step` chose, and sample its vectors for revival.

        counts: [Q, codebook_size] int64, over all ranks.
        z: [B, C, X, Y, Z], which was quantized.
        ss: [B, 1, R, R, R], or None if unknown; then vectors of empty tokens are sampled too, if they have codes.
        sample_ids: [B] int64 on the CPU.

        Vectors are drawn without replacement, with a probability in proportion to their squared error: the ones with
        the smallest keys x / error, x from an exponential distribution (Efraimidis and Spirakis, Inf. Process. Lett.
        97, 2006). The keys depend on the seed and the sample alone, so ranks and interruptions change no draw.
        """
        self.counts = self.counts + counts
        if self.end_of_window(step) > self.last_step:
            return
        quantizer = self.quantizer
        vectors, codes = (quantizer.to_vectors(values.float()) for values in (z, quantized.codes))
        rows = (quantized.indices - quantizer.first_code).clamp(min=0)  # those of empty tokens are masked out below
        chosen = quantizer.occupied(quantized.indices).flatten(1) if quantizer.empty_code else None
        if chosen is None and ss is not None:
            chosen = occupied_blocks(ss, vectors.shape[1:4]).flatten(1)
        B, L = len(vectors), vectors.shape[1:4].numel()
        noise = sample_noise(sample_ids, (len(self.samples), L), self.seed, vectors.device)
        for place, (own, code) in enumerate(quantizer.parts(vectors, codes, rows)):
            error = (own - code).square().sum(-1).view(B, L)
            # A step with an overflow, which fp16 skips, must add nothing to the sample.
            keys = torch.where(error.isfinite(), -torch.special.log_ndtr(noise[:, place]) / error, torch.inf)
            if chosen is not None:
                keys = torch.where(chosen, keys, torch.inf)
            self.samples[place].keep(keys.flatten(), own.flatten(0, -2))

    def remember(self) -> None:
        # None of these tensors is changed in place.
        self.before = [self.counts, *(value for sample in self.samples for value in (sample.keys, sample.vectors))]

    def undo(self, skip: Tensor) -> None:
        counts, *samples = self.before
        self.counts = put_back(skip, counts, self.counts)
        for sample, keys, vectors in zip(self.samples, samples[::2], samples[1::2], strict=True):
            sample.keys = put_back(skip, keys, sample.keys)
            sample.vectors = put_back(skip, vectors, sample.vectors)

    # --- after a step ---

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, Tensor]:
        """Return usage; at the end of a window warn, revive dead codes and begin the next window.

        codebook_window_usage: share of codes chosen in the last window; in the first window, so far.
        codes_revived: number of codes revived at this step.
        """
        so_far = (self.counts > 0).float().mean()
        revived = torch.zeros_like(so_far)
        if step == self.end_of_window(step) and self._has_seen_enough():
            self.usage = so_far
            self._warn(step)
            if step <= self.last_step:
                revived += self._revive(step)
            self.counts = torch.zeros_like(self.counts)
            for sample in self.samples:
                sample.empty()
        status = {"codebook_window_usage": torch.where(self.usage.isnan(), so_far, self.usage)}
        return status | {"codes_revived": revived} if self.can_revive else status

    def _has_seen_enough(self) -> bool:
        return bool(self.counts[0].sum() >= VECTORS_PER_CODE * self.counts.shape[1])

    def _warn(self, step: int) -> None:
        usage = self.usage.item()
        if usage >= LOW_USAGE or self.warned:
            return
        self.warned = True
        if step <= self.last_step:
            now = "The others are revived now. If that does not last:"
        elif self.can_revive:
            now = "Set trainer.args.revive_every (and revive_until, which may end too soon), and:"
        else:
            now = "To do:"
        self.say(
            f"WARNING: the codebook collapses. Only {usage:.0%} of {self.counts.numel()} codes were chosen by the last "
            f"{self.counts[0].sum()} tokens. {now} lower trainer.args.optimizer.args.lr or warm it up, start from "
            'k-means (models.quantizer.args.init "kmeans"), raise lambda_entropy if the quantizer has an entropy loss, '
            "or give it a smaller n_embed."
        )

    def _revive(self, step: int) -> int:
        """Move dead codes to sampled vectors, the same on all ranks. Return how many were moved."""
        Q, K = self.counts.shape
        keys = self.quantizer.code_rows
        revived = 0
        for place, sample in enumerate(self.samples):
            dead = (self.counts[place] == 0).nonzero()[:, 0]
            vectors = _distinct(sample.merged()[1])[: len(dead)]
            rows = dead[: len(vectors)]
            if not len(rows):
                continue
            self.quantizer.replace_codes(place * K + rows, vectors)
            self.forget(keys[place * len(keys) // Q : (place + 1) * len(keys) // Q], rows)
            which = f"{K} codes" if Q == 1 else f"{K} codes in place {place + 1} of a token"
            self.say(f"step {step}  codebook: {len(rows)} of {which} were dead and are revived")
            revived += len(rows)
        return revived

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Tensor]:
        """Return counts and samples. Rank 0 takes over the samples of all ranks, so that the state is one rank's."""
        state = {"counts": self.counts, "usage": self.usage}
        for place, sample in enumerate(self.samples):
            keys, vectors = sample.merged()
            state |= {_key("keys", place): keys, _key("vectors", place): vectors}
            sample.empty()
        self._take_over(state)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = {name: value.to(self.counts.device) for name, value in state.items()}
        self.counts, self.usage = state["counts"], state["usage"]
        self._take_over(state)

    def _take_over(self, state: dict[str, Tensor]) -> None:
        for place, sample in enumerate(self.samples if dist_utils.is_main() else ()):
            if _key("keys", place) in state:  # absent if that run revived no codes
                sample.keep(state[_key("keys", place)], state[_key("vectors", place)])


def _key(name: str, place: int) -> str:
    """Return a state-dict key of a place's sample; the first one's is that of a single codebook."""
    return f"{name}.{place}" if place else name


class _Sample:
    """A sample of vectors on one rank, as many as codes can be dead: those with the smallest keys."""

    def __init__(self, size: int, channels: int, device: torch.device):
        self.keys = torch.full((size,), torch.inf, device=device)
        self.vectors = torch.zeros(size, channels, device=device)

    def empty(self) -> None:
        self.keys = torch.full_like(self.keys, torch.inf)
        self.vectors = torch.zeros_like(self.vectors)

    def keep(self, keys: Tensor, vectors: Tensor) -> None:
        """Take vectors [N, d] with keys [N] into the sample if their keys are among the smallest."""
        keys, vectors = torch.cat([self.keys, keys]), torch.cat([self.vectors, vectors])
        self.keys, kept = keys.topk(len(self.keys), largest=False)
        self.vectors = vectors[kept]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return the sample over all ranks, the same on every rank: keys [N] ascending, vectors [N, d]."""
        own = torch.cat([self.keys[:, None], self.vectors], 1)
        slots = own.new_zeros(dist_utils.world_size(), *own.shape)
        slots[dist_utils.rank()] = own
        merged = dist_utils.all_sum(slots).flatten(0, 1)
        merged = merged[merged[:, 0].argsort(stable=True)[: len(own)]]
        merged = merged[merged[:, 0].isfinite()]
        return merged[:, 0], merged[:, 1:]


def _distinct(vectors: Tensor) -> Tensor:
    """Return the distinct rows of vectors [N, D], in order of first appearance: an object that was seen twice must not
    give two equal codes."""
    unique, which = vectors.unique(dim=0, return_inverse=True)
    row = torch.arange(len(vectors), device=vectors.device)
    first = row.new_full((len(unique),), len(vectors)).scatter_reduce(0, which, row, "amin")
    return vectors[first.sort().values]
