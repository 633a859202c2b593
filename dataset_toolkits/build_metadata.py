"""Make `metadata.csv` and `failed.csv` from the records of all ranks, as voxelize.py does when a rank ends.

    python dataset_toolkits/build_metadata.py --output_dir data/voxels

Useful after ranks were killed, or while others still run. Columns and rows of your own are kept.
A folder of shards gets `failed.csv` alone.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from dataset_toolkits import records
from trellis.datasets.shards import shards_in
from trellis.utils.command import run_command
from trellis.utils.errors import DataError


def build_metadata(root: Path) -> str:
    """Bring both tables up to date and return a summary. Raise DataError if there are neither it nor records."""
    in_shards = bool(shards_in(root))
    if not in_shards and not (root / "metadata.csv").exists() and not records.read_records(root).grids:
        raise DataError(f"{root}: has neither metadata.csv nor records nor shards. Run voxelize.py first.")
    records.check_failed(root)
    rows, failures = records.update_tables(root, shards=in_shards)
    done = [row for row in rows.values() if records.is_voxelized(row)]
    splits = Counter(row["split"] for row in done if row.get("split"))
    detail = "".join(f", {split} {count}" for split, count in sorted(splits.items()))
    left_out = f", {len(failures)} files left out, see failed.csv" if failures else ""
    return (
        f"{root if in_shards else root / 'metadata.csv'}: {len(rows)} objects, {len(done)} voxelized{detail}{left_out}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", required=True, help="the folder that voxelize.py wrote")
    return run_command(lambda args: print(build_metadata(Path(args.output_dir))), parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
