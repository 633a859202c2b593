"""Make `metadata.csv` of the records of all ranks, as voxelize.py does when a rank ends.

    python dataset_toolkits/build_metadata.py --output_dir data/voxels

Of use when ranks were killed, or while others still run. Columns and rows that others added stay.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from dataset_toolkits import records
from trellis.utils.errors import DataError, UserError


def build_metadata(root: Path) -> str:
    """Bring metadata.csv up to date and return a summary. Raises DataError where there is nothing."""
    if not (root / "metadata.csv").exists() and not records.read_records(root):
        raise DataError(f"{root}: has neither metadata.csv nor records. Run voxelize.py first.")
    rows = records.update_metadata(root)
    done = [row for row in rows.values() if records.is_voxelized(row)]
    splits = Counter(row["split"] for row in done if row.get("split"))
    detail = "".join(f", {split} {count}" for split, count in sorted(splits.items()))
    return f"{root / 'metadata.csv'}: {len(rows)} objects, {len(done)} voxelized{detail}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", required=True, help="the folder that voxelize.py wrote")
    try:
        print(build_metadata(Path(parser.parse_args(argv).output_dir)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
