"""Reading label maps: NIfTI, NRRD (also Slicer's .seg.nrrd), MetaImage, DICOM-SEG, and arrays without a scan.

NIfTI is nibabel's, NRRD pynrrd's and DICOM highdicom's; each is imported where it is used. They check compressed data,
which SimpleITK, one package for the first three, does not: it reads damaged ones as other labels.
Axes end as RAS: x to the patient's right, y to the front, z up. The affine is taken as it is, oblique or sheared.
"""

import gzip
import logging
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from ...utils.errors import DataError
from ..formats import FORMATS, VOLUME_SUFFIXES, suffix_of
from .arrays import read_array
from .metaimage import read_metaimage
from .volume import (
    DEFLATE_RATIO,
    LPS_TO_RAS,
    Volume,
    affine_of,
    as_labels,
    as_volume_shape,
    check_affine,
    check_size,
    is_singular,
    reasons,
    require,
    times,
    unit_in_mm,
)

NIFTI_UNITS = {1: 1000.0, 2: 1.0, 3: 1e-3}  # xyzt_units: meter, millimeter, micron
DIFFERENCE = 1e-3  # voxels; sform and qform that differ by more are told
# Signs that turn a space of NRRD into RAS (https://teem.sourceforge.net/nrrd/format.html, section 5).
SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
BZIP2_RATIO = 50_000  # a block of 900 kB of zeros becomes about 40 bytes
LONGEST_LINE = 1 << 20  # bytes of a line of an NRRD header
MAX_SPARSE = 100_000  # voxels for a byte of a DICOM file: empty slices may be left out, frames compressed
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")  # DICOM: Segmentation, Label Map

__all__ = ["Volume", "read_volume", "volume_suffix"]


def volume_suffix(path: Path) -> str:
    """Return the suffix of a label map or array in lower case, ".nii.gz" too, or "" for a file of another kind."""
    suffix = suffix_of(path, FORMATS)
    return suffix if suffix in VOLUME_SUFFIXES else ""


def read_volume(path: Path) -> Volume:
    """Read the label map of a scan, by the suffix of its name.

    Arrays (.npy, .npz, .binvox) have no scan: their voxels are cubes of 1 mm, and their axes run right, front and up.
    Raise DataError with the reason, which does not name the file, ConfigError if a package is missing.
    """
    suffix = volume_suffix(path)
    if not suffix:
        raise DataError(f"is not one of {' '.join(VOLUME_SUFFIXES)}. Convert it to one of them")
    if path.stat().st_size == 0:
        raise DataError("the file is empty (0 bytes)")
    with reasons():
        if suffix in (".nii", ".nii.gz"):
            return _read_nifti(path)
        if suffix in (".nrrd", ".nhdr"):
            return _read_nrrd(path)
        if suffix in (".mha", ".mhd"):
            return read_metaimage(path)
        if suffix == ".dcm":
            return _read_dicom(path)
        note = "has no scan: its voxels are taken as cubes"
        return Volume((as_labels(read_array(path)),), np.eye(4), {}, (note,))


def _read_nifti(path: Path) -> Volume:
    """Read NIfTI-1 or -2, compressed or not (https://nifti.nimh.nih.gov/nifti-1)."""
    nibabel = require("nibabel")
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else open(path, "rb") as stream:
        start = stream.read(540)
        stream.seek(0)
        if start[344:347] == b"ni1":
            raise DataError("is a NIfTI header without its voxels (.hdr and .img): save it as .nii.gz")
        is_second = start[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # 540 bytes of header
        kind = nibabel.Nifti2Image if is_second else nibabel.Nifti1Image
        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it mends what it reports, such as qfac 0
        image = kind.from_stream(stream)
        header = image.header
        dtype = header.get_data_dtype()
        stored = image.dataobj  # nibabel clears the header's own offset, slope and intercept
        there = path.stat().st_size
        there = there * DEFLATE_RATIO if packed else there - stored.offset
        check_size(header.get_data_shape(), dtype.itemsize, there)
        labels = as_labels(as_volume_shape(stored.get_unscaled()), float(stored.slope), float(stored.inter))
        while stream.read(1 << 20):  # to the end, where gzip has its checksum
            pass
    affine, notes = _nifti_affine(header)
    given = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)["pixdim"][1:4]
    if header["sform_code"] <= 0 and not (given > 0).all():  # nibabel mends these
        notes.append(f"says that its voxels are {times(given)} large: signs are ignored, and 0 is taken as 1")
    names, name_notes = _nifti_names(header)
    return Volume((labels,), check_affine(affine), names, (*notes, *name_notes))


def _nifti_affine(header: Any) -> tuple[np.ndarray, list[str]]:
    """Return the affine in mm: the sform if its code is set, else the qform, else what nibabel takes."""
    notes = []
    affine = header.get_best_affine()
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if has_sform and has_qform:
        try:
            qform = header.get_qform()
        except ValueError:  # a quaternion longer than 1; the sform does without it
            qform = None
        if qform is None or is_singular(qform):
            notes.append("its qform is damaged: the sform is taken")
        elif is_singular(affine):
            affine = qform
            notes.append("its sform is singular: the qform is taken")
        else:
            corners = np.array(np.meshgrid(*[(0, size - 1) for size in header.get_data_shape()[:3]]))
            corners = np.concatenate([corners.reshape(3, -1), np.ones((1, corners[0].size))])
            difference = np.abs(np.linalg.solve(affine, qform @ corners) - corners).max()
            if difference > DIFFERENCE:
                notes.append(f"its sform and qform differ by up to {difference:.3g} voxels: the sform is taken")
    if not has_sform and not has_qform:
        notes.append("does not say where its axes run (sform_code and qform_code are 0): x is taken to run to the left")
    scale = NIFTI_UNITS.get(int(header["xyzt_units"]) & 7, 1.0)
    return np.diag([scale, scale, scale, 1.0]) @ affine, notes


def _nifti_names(header: Any) -> tuple[dict[int, str], list[str]]:
    """Return the names of labels in a header extension in Workbench's XML, which TotalSegmentator writes too."""
    names: dict[int, str] = {}
    for extension in header.extensions:
        content = extension.get_content()
        text = content if isinstance(content, bytes) else str(content).encode()
        if b"<CaretExtension" not in text:
            continue
        try:
            tree = xml.etree.ElementTree.fromstring(text.strip(b"\0 \r\n"))
            found = {int(label.attrib["Key"]): (label.text or "").strip() for label in tree.iter("Label")}
        except (xml.etree.ElementTree.ParseError, KeyError, ValueError) as error:
            return {}, [f"its names of labels cannot be read ({error})"]
        names.update({label: name for label, name in found.items() if name and label != 0})
    return names, []


def _read_nrrd(path: Path) -> Volume:
    """Read NRRD, attached or with a data file (https://teem.sourceforge.net/nrrd/format.html)."""
    nrrd = require("nrrd")
    with open(path, "rb") as file:
        lines = []
        while (line := file.readline(LONGEST_LINE)).strip():
            lines.append(_header_line(line))
        if not lines or not lines[0].startswith("NRRD"):
            raise DataError("is not an NRRD file: it does not begin with NRRD")
        header = nrrd.read_header(lines)
        for field in ("type", "dimension", "sizes", "encoding"):
            if field not in header:
                raise DataError(f"its header has no {field}")
        _check_nrrd_size(path, header, file.tell())
        array = nrrd.read_data(header, file, str(path))

    steps, origin, spatial, notes = _nrrd_axes(header, array.shape)
    others = [axis for axis in range(array.ndim) if axis not in spatial]
    array = array.transpose(*spatial, *others)
    segments = _segments(header)
    layers = [array]
    if segments and len(others) == 1:
        layers = [array[..., layer] for layer in range(array.shape[3])]
    represented = header.get("Segmentation_SourceRepresentation", header.get("Segmentation_MasterRepresentation", ""))
    if represented.lower().startswith("fractional"):
        raise DataError("holds fractions of segments, not labels: threshold them in Slicer and save it again")
    if segments and array[..., 0].size == 1:
        raise DataError("has no segments: Slicer writes a single voxel then")
    labels = [as_labels(as_volume_shape(layer)) for layer in layers]
    labels, names, more = _number_segments(labels, segments)
    return Volume(tuple(labels), check_affine(affine_of(steps, origin)), names, (*notes, *more), has_segments=True)


def _header_line(line: bytes) -> str:
    """Return a line of an NRRD header as text, a name of a field in lower case: case makes no difference there."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("latin-1")
    name, colon, value = text.partition(":")
    is_field = colon and not value.startswith("=") and not name.startswith("#")
    return name.lower() + colon + value if is_field else text


def _check_nrrd_size(path: Path, header: dict, start: int) -> None:
    """Raise DataError if the data are missing or shorter than the header claims."""
    name = header.get("data file", header.get("datafile"))
    if name is not None and ("%" in name or name.split()[0] == "LIST"):
        raise DataError("keeps its voxels in several files: save it as one .nrrd")
    source = path if name is None else path.parent / name
    if not source.is_file():
        raise DataError(f"its voxels are in {name}, which is not there")
    there = source.stat().st_size - (start if name is None else 0)
    itemsize = np.dtype(_nrrd_type(header["type"])).itemsize
    encoding = header["encoding"].lower()
    ratio = {"raw": 1, "gzip": DEFLATE_RATIO, "gz": DEFLATE_RATIO, "bzip2": BZIP2_RATIO, "bz2": BZIP2_RATIO}
    check_size(tuple(header["sizes"]), itemsize, there * ratio.get(encoding, itemsize))  # text: a byte a number


def _nrrd_type(name: str) -> str:
    """Return numpy's name of an NRRD type (section 5 of the format), or raise DataError."""
    words = name.removesuffix("_t").removesuffix(" int").split()
    unsigned = words[0] in ("unsigned", "uchar", "ushort", "uint", "ulonglong") or words[0].startswith("uint")
    rest = " ".join(words[1:] if words[0] in ("signed", "unsigned") else words).removeprefix("u") or "int"
    sizes = {
        "char": 1,
        "int8": 1,
        "short": 2,
        "int16": 2,
        "int": 4,
        "int32": 4,
        "longlong": 8,
        "long long": 8,
        "int64": 8,
    }
    if rest in ("float", "double"):
        return {"float": "f4", "double": "f8"}[rest]
    if rest not in sizes:
        raise DataError(f"its voxels have the type {name!r}: a label map has whole numbers")
    return f"{'u' if unsigned else 'i'}{sizes[rest]}"


def _nrrd_axes(header: dict, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, list[int], list[str]]:
    """Return the steps [3, 3] (columns) and origin [3] in RAS mm, the three axes of space, and notes."""
    notes = []
    if "space directions" in header:
        rows = np.asarray(header["space directions"], dtype=np.float64)
        if rows.shape != (len(shape), 3):
            raise DataError(f"its space directions are {times(rows.shape)} numbers, not {len(shape)} x 3")
        spatial = [axis for axis in range(len(shape)) if not np.isnan(rows[axis]).all()]
    else:
        spacings = np.asarray(header.get("spacings", [1.0] * len(shape)), dtype=np.float64)
        spatial = [axis for axis in range(len(shape)) if not np.isnan(spacings[axis])][:3]
        rows = np.zeros((len(shape), 3))
        for place, axis in enumerate(spatial):
            rows[axis, place] = spacings[axis]
    if len(spatial) != 3:
        raise DataError(f"has {len(spatial)} axes in space and the shape {times(shape)}: a label map has three")
    origin = np.asarray(header.get("space origin", (0.0, 0.0, 0.0)), dtype=np.float64)
    space = header.get("space", "none").lower().removesuffix("-time")
    space = {"rast": "ras", "last": "las", "lpst": "lps"}.get(space, space)
    if space == "3d-left-handed":
        raise DataError("its space is 3D-left-handed: what is left and right is not said. Save it in RAS or LPS")
    if space not in SPACES:
        notes.append(f"does not say where its axes run (space: {space}): left-posterior-superior is taken")
    signs = np.array(SPACES.get(space, SPACES["lps"]))
    units = header.get("space units") or [header.get("units", [""] * len(shape))[axis] for axis in spatial]
    if len(set(units)) != 1:
        raise DataError(f"its axes have different units, {' '.join(units)}")
    scale, unit_notes = unit_in_mm(units[0])
    factor = signs * scale
    return (rows[spatial] * factor).T, origin * factor, spatial, [*notes, *unit_notes]


def _segments(header: dict) -> list[tuple[str, int, int]]:
    """Return (name, layer, label value) of Slicer's segments, in the order of their numbers.

    Files of Slicer before 4.11 have neither layers nor label values: the first segment is the first layer, of ones.
    """
    numbers = sorted(
        {int(key[7:].partition("_")[0]) for key in header if key[:7] == "Segment" and key[7:8].isdigit() and "_" in key}
    )
    found = []
    for place, number in enumerate(numbers):
        name = header.get(f"Segment{number}_Name", header.get(f"Segment{number}_ID", f"segment {number}"))
        has_value = f"Segment{number}_LabelValue" in header
        layer = int(header.get(f"Segment{number}_Layer", 0 if has_value else place))
        found.append((name, layer, int(header.get(f"Segment{number}_LabelValue", 1))))
    return found


def _number_segments(
    layers: list[np.ndarray], segments: list[tuple[str, int, int]]
) -> tuple[list[np.ndarray], dict[int, str], list[str]]:
    """Return layers in which every segment has a label of its own, its names, and notes.

    Slicer counts label values in each layer anew. Then segments are numbered through, from 1, in the file's order.
    """
    missing = [name for name, layer, _ in segments if not 0 <= layer < len(layers)]
    if missing:
        raise DataError(f"its segment {missing[0]!r} is in a layer that is not there (of {len(layers)})")
    values = [value for _, _, value in segments]
    if len(set(values)) == len(values):
        if len(layers) > 1:  # what belongs to no segment could share a label with another layer
            layers = [_keep(layer, {v: v for _, place, v in segments if place == n}) for n, layer in enumerate(layers)]
        return layers, {value: name for name, _, value in segments}, []
    numbered = [
        _keep(layer, {v: new for new, (_, place, v) in enumerate(segments, 1) if place == n})
        for n, layer in enumerate(layers)
    ]
    note = f"its layers share label values: its segments are numbered 1 to {len(segments)}"
    return numbered, {new: name for new, (name, _, _) in enumerate(segments, 1)}, [note]


def _keep(layer: np.ndarray, new_of: dict[int, int]) -> np.ndarray:
    """Return a layer with these labels renamed and all others 0."""
    kept = np.zeros_like(layer, dtype=np.int32)
    for old, new in new_of.items():
        kept[layer == old] = new
    return kept


def _read_dicom(path: Path) -> Volume:
    """Read a DICOM segmentation (DICOM PS3.3, A.51): each segment is a label, numbered as in the file."""
    highdicom, pydicom = require("highdicom"), require("pydicom")
    try:
        dataset = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError as error:
        raise DataError("is not a DICOM file") from error
    kind = getattr(dataset, "SOPClassUID", None)
    if kind not in SEGMENTATIONS:
        name = getattr(kind, "name", "unnamed")
        raise DataError(f"is a DICOM file of the class {name!r}, not a segmentation. Give segmentations, or NIfTI")
    if dataset.get("SegmentationType") == "FRACTIONAL":
        raise DataError("is a fractional segmentation: threshold it, and save it as a binary one")
    segmentation = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
    geometry = segmentation.get_volume_geometry(allow_missing_positions=True)
    if geometry is None:
        raise DataError("its frames are not evenly spaced parallel slices: resample it to a volume")
    check_size(geometry.spatial_shape, 1, MAX_SPARSE * path.stat().st_size)
    numbers = [int(number) for number in segmentation.segment_numbers]
    names = {number: str(segmentation.get_segment_description(number).segment_label) for number in numbers}
    try:
        volumes = [segmentation.get_volume(combine_segments=True)]
    except RuntimeError:  # segments overlap
        volumes = []
    if not volumes:  # a layer for each; the first reading still holds its tables, so another is needed
        segmentation = highdicom.seg.Segmentation.from_dataset(pydicom.dcmread(path), copy=False)
        volumes = [segmentation.get_volume(segment_numbers=[number], combine_segments=True) for number in numbers]
    layers = tuple(as_labels(as_volume_shape(volume.array)) for volume in volumes)
    return Volume(layers, check_affine(LPS_TO_RAS @ volumes[0].affine), names, has_segments=True)
