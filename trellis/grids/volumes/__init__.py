"""Organs out of label maps: scans in (`reading`), objects by label (`labels`), grids and the way back (`rasterize`).

`filling` fills surfaces on the way back. `arrays` reads occupancy without a scan: NumPy's files and binvox.
`convert` does it all for one file.
"""

from .arrays import ARRAY_SUFFIXES, read_occupancy, turn_mask_to_z_up
from .convert import ObjectGrid, grids_of_file
from .filling import fill_surface
from .labels import LabelObject, Labels, LeftOut, load_labels, objects_of, organ_of_name
from .rasterize import FILLS, Frame, rasterize_mask, rasterize_object, rasterize_occupancy, write_nifti
from .reading import Volume, read_volume, volume_suffix

__all__ = [
    "ARRAY_SUFFIXES",
    "FILLS",
    "Frame",
    "LabelObject",
    "Labels",
    "LeftOut",
    "ObjectGrid",
    "Volume",
    "fill_surface",
    "grids_of_file",
    "load_labels",
    "objects_of",
    "organ_of_name",
    "rasterize_mask",
    "rasterize_object",
    "rasterize_occupancy",
    "read_occupancy",
    "read_volume",
    "turn_mask_to_z_up",
    "volume_suffix",
    "write_nifti",
]
