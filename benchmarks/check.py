"""Compare the ratios of a new result with committed ones, and say what got worse.

    python benchmarks/nearest_code.py --output new.md     # also writes new.json
    python benchmarks/check.py new.json

Only ratios are compared: speed relative to plain PyTorch, and shares of the limit. Both are measured in one run, so
they hold on other machines of the same kind; times do not. A ratio got worse if it is lower than before by more than
the tolerance. Rows that only one of the two files has do not count.

By default a result is compared with every file benchmarks/results/*.json of the same benchmark, on the same kind of
device and with the same work (resolution, width of the networks, batch); --against names other files, such as one from
before a change.

Exit code: 0 if nothing got worse, 1 if something did, 2 if no file can be compared.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
SAME = ("benchmark", "device", "work")  # what two results must have in common
# The tolerance's default: see "Comparing with an earlier result" in README.md for the spread it was chosen from.
TOLERANCE = 0.2

Key = tuple[str, ...]


class NotComparable(Exception):
    """A file that is not a result, or two results that have nothing to compare."""


@dataclass(frozen=True)
class Result:
    """Ratios in the JSON file of a benchmark.

    same: the values of SAME.
    ratios: {(table, key of the row ..., column): ratio}.
    """

    path: Path
    same: dict[str, object]
    machine: str
    ratios: dict[Key, float]


def read(path: Path) -> Result:
    """Read a result. Raise NotComparable if it is not one, or if two of its rows have the same key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotComparable(f"{path}: {error}; give the JSON file that a benchmark wrote with --output") from error
    try:
        ratios: dict[Key, float] = {}
        for table in content["tables"]:
            kinds = [column["kind"] for column in table["columns"]]
            names = [column["name"] for column in table["columns"]]
            keys = set()
            for row in table["rows"]:
                cells = list(zip(kinds, names, row, strict=True))
                key = (table["title"], *(str(value) for kind, _, value in cells if kind == "key"))
                if key in keys:
                    raise NotComparable(f"{path}: two rows are called {', '.join(key[1:])}")
                keys.add(key)
                for kind, name, value in cells:
                    if kind == "ratio" and value is not None:
                        ratios[(*key, name)] = float(value)
        return Result(path, {name: content[name] for name in SAME}, content["machine"], ratios)
    except (KeyError, TypeError, ValueError) as error:
        raise NotComparable(f"{path} is not a benchmark's result: {type(error).__name__}: {error}") from error


def common_ratios(new: Result, old: Result) -> list[Key]:
    """Return the keys to compare. Raise NotComparable with the reason if there is none."""
    for name in SAME:
        if new.same[name] != old.same[name]:
            raise NotComparable(f"{old.path}: {name} is {old.same[name]}, but {new.same[name]} in {new.path}")
    keys = [key for key in new.ratios if key in old.ratios]
    if not keys:
        raise NotComparable(f"{old.path} and {new.path} have no ratio in common")
    return keys


def worse(new: Result, old: Result, keys: list[Key], tolerance: float) -> list[str]:
    """Return a line for each ratio that fell by more than the tolerance, or is not a number."""
    lines = []
    for key in keys:
        before, after = old.ratios[key], new.ratios[key]
        if not after >= before * (1 - tolerance):
            name = ", ".join(part for part in key[:-1] if part)
            lines.append(f"worse: {name}: {key[-1]} {before:.3g} -> {after:.3g} ({after / before - 1:+.0%})")
    return lines


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("result", type=Path, help="JSON file of a new run")
    flags.add_argument(
        "--against",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="results to compare with (default: benchmarks/results/*.json)",
    )
    flags.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"share that a ratio may fall by (default: {TOLERANCE:g})"
    )
    args = flags.parse_args(argv)
    if not 0 <= args.tolerance < 1:
        flags.error(f"--tolerance is {args.tolerance:g}; it must be in [0, 1)")
    paths = args.against or sorted(RESULTS.glob("*.json"))
    compared, lost, reasons = 0, 0, []
    try:
        new = read(args.result)
        for path in paths:
            if path.resolve() == args.result.resolve():
                continue
            old = read(path)
            if not args.against and old.same["benchmark"] != new.same["benchmark"]:
                continue
            try:
                keys = common_ratios(new, old)
            except NotComparable as reason:
                reasons.append(str(reason))
                continue
            found = worse(new, old, keys, args.tolerance)
            compared, lost = compared + len(keys), lost + len(found)
            print(f"{path}, measured on {old.machine}: {len(keys)} ratios compared, {len(found)} worse")
            print("".join(f"  {line}\n" for line in found), end="")
    except NotComparable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not compared:
        error = f"error: no result of {new.same['benchmark']} compares with {args.result}"
        print(error, *reasons, sep="\n  ", file=sys.stderr)
        return 2
    print(f"{lost} of {compared} ratios fell by more than {args.tolerance:.0%}" if lost else "nothing got worse")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
