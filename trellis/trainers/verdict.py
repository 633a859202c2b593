"""Whether a run made the models worse, and why.

The scores of the validation objects before step 1 and at the end are compared object by object: objects differ far more
from each other than one object from itself. A paired t-test (Student, The probable error of a mean, Biometrika 6, 1908)
tells a change from the spread over objects.
"""

import math
from typing import Any

from torch import Tensor

# A smaller difference between mean scores says nothing: as much lies between two runs of the same configuration.
SPREAD = 0.003
# A drop that large would come by chance with less than this probability.
SIGNIFICANCE = 1e-3
# A loss that ends at so many times its start has risen.
ROSE = 1.2
# Share of codes in use, of that before step 1, below which the codebook has collapsed.
COLLAPSED = 0.5


class Course:
    """The validations of a run that its end is judged by.

    by: the score that counts, of which each object's is known.
    """

    def __init__(self, by: str):
        self.by = by
        self.first: dict[str, float] = {}  # scores before step 1
        self.objects: Tensor | None = None  # [n], `by` of each object before step 1
        self.last: list[tuple[int, dict[str, float]]] = []  # (step, scores) of the last two validations
        self.now: Tensor | None = None  # [n], `by` of each object in the last validation

    def add(self, step: int, scores: dict[str, float], objects: Tensor | None) -> None:
        """Add a validation. objects: [n] float, `by` of each object, or None if the trainer does not tell."""
        objects = None if objects is None else objects.detach().cpu().float()
        if step == 0:
            self.first, self.objects = scores, objects
        self.last, self.now = [*self.last[-1:], (step, scores)], objects

    def last_scores(self) -> dict[str, float] | None:
        """Return {"step", score: value} of the last validation; None before any."""
        return {"step": self.last[-1][0], **self.last[-1][1]} if self.last else None

    def worse(self) -> tuple[int, int] | None:
        """Return on how many objects the score fell, and the number of all of them.

        None if the mean fell by no more than SPREAD, or not significantly, or if it is not known.
        """
        if self.objects is None or self.now is None or self.objects.shape != self.now.shape:
            return None
        change = (self.now.double() - self.objects.double()).nan_to_num(nan=-1.0)  # NaN is as bad as a score of 0
        if change.mean() >= -SPREAD or drop_by_chance(change) >= SIGNIFICANCE:
            return None
        return int((change < 0).sum()), len(change)

    def verdict(
        self,
        *,
        trained: list[str],
        lr: float,
        first_loss: float,
        last_loss: float,
        bad_steps: int,
    ) -> str | None:
        """Return the warning for a run that made its models worse, with the remedy for its cause; None for others.

        trained: names of the models. lr: the last rate. first_loss, last_loss: means over steps at both ends,
        NaN for fewer than two.
        """
        found = self.worse()
        if found is None:
            return None
        lower, objects = found
        before, now = self.first[self.by], self.last[-1][1][self.by]
        return (
            f"WARNING: this run made the models worse: {self.by} {before:.4f} before step 1, {now:.4f} now, lower on "
            f"{lower} of {objects} objects (paired t-test, p < {SIGNIFICANCE}). "
            f"{self._advice(trained, lr, first_loss, last_loss, bad_steps)} What it started from is kept as step 0 "
            "(--ckpt best, or 0)."
        )

    def _advice(self, trained: list[str], lr: float, first_loss: float, last_loss: float, bad_steps: int) -> str:
        used_before, used = (scores.get("codebook_usage", math.nan) for scores in (self.first, self.last[-1][1]))
        if used < COLLAPSED * used_before:
            return (
                f"The codebook has collapsed: {used:.0%} of its codes are in use, {used_before:.0%} before. Lower "
                f"trainer.args.optimizer.args.lr (now {lr:.3g}), or set trainer.args.revive_every."
            )
        lower = (
            f'lower trainer.args.optimizer.args.lr (now {lr:.3g}), warm it up, or set trainer.args.lr_scaling to "rms".'
        )
        bad = f", and {bad_steps} {'step was' if bad_steps == 1 else 'steps were'} not finite" if bad_steps else ""
        if math.isnan(first_loss):
            return f"It took fewer than two good steps since it was started{bad}: train for longer, or {lower}"
        if last_loss > ROSE * first_loss:
            return f"The loss went from {first_loss:.3g} to {last_loss:.3g}{bad}: {lower}"
        if len(self.last) == 2 and 0 < self.last[0][0] and self.last[-1][1][self.by] > self.last[0][1][self.by]:
            (step, earlier), (_, latest) = self.last
            return (
                f"The score still rises ({earlier[self.by]:.4f} at step {step}, {latest[self.by]:.4f} now): train for "
                "longer."
            )
        if trained == ["quantizer"]:
            return (
                "The codebook alone was trained and the loss fell, so its first codes, such as k-means finds, suit the "
                "decoder better than codes of a lower loss: start the next stage from step 0."
            )
        return (
            f"The loss went from {first_loss:.3g} to {last_loss:.3g}, so it does not measure what is scored, or the "
            "averaged weights lag behind: train for longer, or lower trainer.args.ema_rate."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "objects": self.objects, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.objects, self.last = state["first"], state["objects"], state["last"]


def drop_by_chance(change: Tensor) -> float:
    """Return the probability of a mean as low as this one's, if the true mean of the changes is not below 0.

    change: [n] float64. One-sided paired t-test. 1 for fewer than two objects, on which nothing can be said.
    """
    n = len(change)
    if n < 2:
        return 1.0
    mean, deviation = change.mean().item(), change.std().item()
    if deviation == 0:
        return 0.0 if mean < 0 else 1.0
    return student_tail(-mean / (deviation / math.sqrt(n)), n - 1)


def student_tail(t: float, degrees: int) -> float:
    """Return P(T > t) for Student's t with whole degrees of freedom.

    By the finite series in cos θ, tan θ = t/√ν (Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and
    26.7.4); the absolute error is about 1e-15 times the number of terms.
    """
    theta = math.atan(t / math.sqrt(degrees))
    square = math.cos(theta) ** 2
    odd = degrees % 2
    term = total = math.cos(theta) if odd else 1.0
    if degrees == 1:
        total = 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= square * (k - 1) / k
        total += term
    within = math.sin(theta) * total
    if odd:
        within = 2 / math.pi * (theta + within)
    return (1 - within) / 2
