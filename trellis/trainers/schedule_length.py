"""How long a learning-rate schedule lasts, and whether that suits the length of the run.

The *steps left* are those after the warm-up, at least one.
"""

from collections.abc import Iterator
from typing import Any

LENGTHS = {
    "CosineAnnealingLR": "T_max",
    "LinearLR": "total_iters",
    "OneCycleLR": "total_steps",
    "PolynomialLR": "total_iters",
}
"""{schedule: its argument that says over how many steps it runs}. Where none is given it is the steps left."""


def with_length(spec: dict[str, Any] | None, max_steps: int) -> dict[str, Any] | None:
    """Return a schedule's spec with its length filled in, if it has one that is missing or null.

    What else may be wrong with the spec is found where it is built.
    """
    args = (spec or {}).get("args", {})
    key = LENGTHS.get(spec["name"]) if spec and isinstance(spec.get("name"), str) else None
    if spec is None or key is None or not isinstance(args, dict) or args.get(key) is not None:
        return spec
    if spec["name"] == "OneCycleLR" and (args.get("epochs") is not None or args.get("steps_per_epoch") is not None):
        return spec  # the two give its length
    return {**spec, "args": {**args, key: _steps_left(spec, max_steps)}}


def misfit(spec: dict[str, Any] | None, max_steps: int, where: str) -> tuple[str, str] | None:
    """Return what is wrong with the length of a schedule in a run of max_steps, and the remedy; None if nothing is.

    spec: one that builds a schedule.
    where: its path.
    """
    if spec is None:
        return None
    name, args, left = spec["name"], spec.get("args", {}), _steps_left(spec, max_steps)
    warm_up = f" after a warm-up of {spec['warmup_steps']}" if spec.get("warmup_steps") else ""
    leaves = f"trainer.args.max_steps {max_steps} leaves {left}{warm_up}"
    if name == "CosineAnnealingWarmRestarts":
        if args["T_0"] <= left:
            return None
        return f"{where}.args.T_0 is {args['T_0']}, but {leaves}: lr never restarts", f"set T_0 to at most {left}"
    key = LENGTHS.get(name)
    if key is None:
        return None
    length = args.get(key)
    if length is None:  # of OneCycleLR
        key, length = "epochs times steps_per_epoch", args["epochs"] * args["steps_per_epoch"]
    if length == left:
        return None
    if length > left:
        outcome = "the training would end before it does"
    elif name == "CosineAnnealingLR":
        outcome = "lr would rise again"
    elif name == "OneCycleLR":
        outcome = "it has no lr for the steps after them"
    elif name == "PolynomialLR" or args.get("end_factor") == 0:
        outcome = "lr would be 0 for the rest"
    else:
        return None  # a LinearLR that stays at its last rate
    return (
        f"{where}.args: {name} lasts {length} steps ({key}), but {leaves}: {outcome}",
        f"leave {key} out, so that it lasts to the end of any max_steps, or set it to {left}",
    )


def notes(spec: dict[str, Any] | None, max_steps: int) -> Iterator[str]:
    """Yield what a user may not expect of a schedule in a run of max_steps.

    spec: one that builds a schedule.
    """
    if spec is None:
        return
    name, args, left = spec["name"], spec.get("args", {}), _steps_left(spec, max_steps)
    warm_up = max(spec.get("warmup_steps", 0), args["warmup_steps"] if name == "LinearWarmupLRScheduler" else 0)
    if warm_up > max_steps:
        yield f"the warm-up of lr has {warm_up} steps, more than the {max_steps} of the run, which ends during it"
    elif spec.get("warmup_steps") == max_steps:
        yield f"the warm-up of lr has {warm_up} steps, all of the run: {name} after it changes nothing"
    if name == "StepLR" and args["step_size"] >= left:
        yield f"StepLR changes lr every {args['step_size']} steps, but has {left}: lr stays as it is"
    if name == "ConstantLR" and args.get("total_iters", 5) >= left:
        yield f"ConstantLR multiplies lr by its factor to the end: it has {left} steps"
    if name == "MultiStepLR":
        late = sorted(milestone for milestone in set(args["milestones"]) if milestone >= left)
        if late:
            some = ", ".join(map(str, late))
            yield f"MultiStepLR has {left} steps and does not reach {some} of its milestones"
    if name == "CosineAnnealingWarmRestarts":
        begin, cycle = 0, args["T_0"]
        while begin + cycle <= left:
            begin, cycle = begin + cycle, cycle * args.get("T_mult", 1)
        if begin < left:
            yield f"the last cycle of CosineAnnealingWarmRestarts is cut off after {left - begin} of {cycle} steps"


def _steps_left(spec: dict[str, Any], max_steps: int) -> int:
    warm_up = spec.get("warmup_steps", 0)
    return max(1, max_steps - warm_up) if isinstance(warm_up, int) else max_steps
