"""Organs out of label maps: every format and way of storing a scan gives the same organ, in its place, unmirrored."""

import bz2
import gzip
import io
import itertools
import json
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from trellis.grids import volumes
from trellis.grids.volumes import (
    Frame,
    LabelObject,
    LeftOut,
    Volume,
    load_labels,
    objects_of,
    rasterize_mask,
    rasterize_object,
    rasterize_occupancy,
    read_occupancy,
    read_volume,
    turn_mask_to_z_up,
    write_nifti,
)
from trellis.utils.errors import ConfigError, DataError

nibabel = pytest.importorskip("nibabel")
nrrd = pytest.importorskip("nrrd")
ndimage = pytest.importorskip("scipy.ndimage")

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


# --- a scan: oblique, of unequal spacing, a little sheared, the second axis backwards ---


def turn(axis: int, degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = sorted({0, 1, 2} - {axis})
    matrix = np.eye(3)
    matrix[[a, a, b, b], [a, b, a, b]] = cos, -sin, sin, cos
    return matrix


def oblique_affine() -> np.ndarray:
    affine = np.eye(4)
    shear = np.array([[1, 0.003, 0], [0, 1, 0.002], [0, 0, 1]])
    affine[:3, :3] = turn(2, 12) @ turn(0, -7) @ shear @ np.diag([0.8, -0.9, 2.5])
    affine[:3, 3] = (-20, 35, -40)
    return affine.astype(np.float32).astype(np.float64)  # what NIfTI keeps


SHAPE = (70, 64, 30)
# Center in voxels of the scan, half axes in mm along axes of their own, in world coordinates.
ELLIPSOIDS = {1: ((25, 30, 14), (15.0, 9.0, 20.0), turn(1, 25)), 5: ((57, 40, 17), (6.0, 10.0, 8.0), turn(2, 40))}


def ellipsoid_distance(points: np.ndarray, label: int, affine: np.ndarray) -> np.ndarray:
    """Below 1 inside: |axes^-1 (p - c) / half| of points [..., 3] in mm."""
    center, half, axes = ELLIPSOIDS[label]
    middle = affine[:3, :3] @ center + affine[:3, 3]
    return np.linalg.norm((points - middle) @ axes / half, axis=-1)


def make_scan() -> tuple[np.ndarray, np.ndarray]:
    affine = oblique_affine()
    world = np.moveaxis(np.indices(SHAPE), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    labels = np.zeros(SHAPE, np.uint8)
    for label in ELLIPSOIDS:
        labels[ellipsoid_distance(world, label, affine) <= 1] = label
    return labels, affine


SCAN, AFFINE = make_scan()


def nrrd_bytes(
    array: np.ndarray, affine: np.ndarray, encoding="gzip", space="left-posterior-superior", fields=(), data_file=None
) -> bytes:
    """An NRRD file as the format says, written without a library."""
    signs = {"l": -1, "r": 1}[space[0]], {"a": 1, "p": -1}["ap"["posterior" in space or space == "lps"]], 1
    columns = affine[:3] * np.array(signs)[:, None]
    vectors = ["(" + ",".join(repr(float(v)) for v in columns[:, k]) + ")" for k in range(4)]
    others = ["none"] * (array.ndim - 3)
    lines = [
        "NRRD0005",
        "# a comment",
        f"type: {({'u1': 'unsigned char', 'i2': 'short', 'f4': 'float', 'i4': 'int'})[array.dtype.str[1:]]}",
        f"dimension: {array.ndim}",
        f"space: {space}",
        f"sizes: {' '.join(map(str, array.shape))}",
        f"space directions: {' '.join([*others, *vectors[:3]])}",
        f"kinds: {' '.join(['list'] * len(others) + ['domain'] * 3)}",
        "endian: little",
        f"encoding: {encoding}",
        f"space origin: {vectors[3]}",
        *fields,
        *([f"data file: {data_file}"] if data_file else []),
    ]
    return "\n".join(lines).encode() + b"\n\n" + (b"" if data_file else nrrd_data(array, encoding))


def nrrd_data(array: np.ndarray, encoding: str) -> bytes:
    raw = array.tobytes(order="F")
    text = " ".join(map(str, array.ravel(order="F"))).encode()
    return {"raw": lambda: raw, "gzip": lambda: gzip.compress(raw), "bzip2": lambda: bz2.compress(raw),
            "ascii": lambda: text}[encoding]()  # fmt: skip


def metaimage_bytes(
    array: np.ndarray, affine: np.ndarray, packed=False, text=False, data_file="LOCAL", **more
) -> bytes:
    lps = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    kind = {"u1": "MET_UCHAR", "i2": "MET_SHORT", "f4": "MET_FLOAT", "i4": "MET_INT"}[array.dtype.str[1:]]
    raw = array.tobytes(order="F")
    data = zlib.compress(raw) if packed else raw
    if text:
        data = " ".join(map(str, array.ravel(order="F"))).encode()
    fields = {
        "ObjectType": "Image",
        "NDims": array.ndim,
        "BinaryData": not text,
        "BinaryDataByteOrderMSB": array.dtype.str[0] == ">",
        "CompressedData": packed,
        "TransformMatrix": " ".join(repr(float(v)) for v in (lps[:3, :3] / spacing).T.ravel()),
        "Offset": " ".join(repr(float(v)) for v in lps[:3, 3]),
        "ElementSpacing": " ".join(repr(float(v)) for v in spacing),
        "DimSize": " ".join(map(str, array.shape)),
        "ElementType": kind,
        **more,
        "ElementDataFile": data_file,
    }
    text_part = "".join(f"{name} = {value}\n" for name, value in fields.items()).encode()
    return text_part + (data if data_file == "LOCAL" else b"")


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray, kind=None, header=None, **fields) -> Path:
    image = (kind or nibabel.Nifti1Image)(array, affine, header=header, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    for name, value in fields.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def write_nii(folder: Path) -> Path:
    return save_nifti(folder / "scan.nii", SCAN, AFFINE)


def write_gz(folder: Path) -> Path:
    return save_nifti(folder / "scan.nii.gz", SCAN.astype(np.int16), AFFINE)


def write_second(folder: Path) -> Path:
    return save_nifti(folder / "scan.nii", SCAN.astype(np.int64), AFFINE, nibabel.Nifti2Image)


def write_big_endian(folder: Path) -> Path:
    header = nibabel.Nifti1Header(endianness=">")
    return save_nifti(folder / "scan.nii", SCAN.astype(">i2"), AFFINE, header=header)


def write_floats(folder: Path) -> Path:
    noise = np.random.default_rng(0).uniform(-9e-4, 9e-4, SHAPE)
    return save_nifti(folder / "scan.nii.gz", (SCAN + noise).astype(np.float32), AFFINE)


def write_scaled(folder: Path) -> Path:
    """Stored as 3 v - 1, with slope 1/3."""
    path = folder / "scan.nii"
    image = nibabel.Nifti1Image(SCAN.astype(np.int16) * 3 - 3, AFFINE)
    image.header.set_slope_inter(1, 0)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([1 / 3, 1], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    return path


def write_trailing_ones(folder: Path) -> Path:
    return save_nifti(folder / "scan.nii.gz", SCAN[..., None, None], AFFINE)


def write_misnamed(folder: Path) -> Path:
    """Compressed, though the name does not say so."""
    path = folder / "scan.nii"
    path.write_bytes(gzip.compress(nibabel.Nifti1Image(SCAN, AFFINE).to_bytes()))
    return path


def write_nrrd_kind(encoding: str, space: str):
    def write(folder: Path) -> Path:
        path = folder / "scan.nrrd"
        path.write_bytes(nrrd_bytes(SCAN.astype("<i2"), AFFINE, encoding, space))
        return path

    return write


def write_nhdr(folder: Path) -> Path:
    (folder / "voxels.raw.gz").write_bytes(nrrd_data(SCAN, "gzip"))
    (folder / "scan.nhdr").write_bytes(nrrd_bytes(SCAN, AFFINE, data_file="voxels.raw.gz"))
    return folder / "scan.nhdr"


def write_nrrd_meters(folder: Path) -> Path:
    affine = np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE
    (folder / "scan.nrrd").write_bytes(nrrd_bytes(SCAN, affine, fields=['space units: "m" "m" "m"']))
    return folder / "scan.nrrd"


def write_mha(packed: bool, text: bool, dtype: str):
    def write(folder: Path) -> Path:
        (folder / "scan.mha").write_bytes(metaimage_bytes(SCAN.astype(dtype), AFFINE, packed, text))
        return folder / "scan.mha"

    return write


def write_mhd(folder: Path) -> Path:
    (folder / "scan.raw").write_bytes(b"header!" + SCAN.tobytes(order="F"))
    (folder / "scan.mhd").write_bytes(metaimage_bytes(SCAN, AFFINE, data_file="scan.raw", HeaderSize=7))
    return folder / "scan.mhd"


def write_mhd_at_the_end(folder: Path) -> Path:
    (folder / "scan.raw").write_bytes(b"of any length" + SCAN.tobytes(order="F"))
    (folder / "scan.mhd").write_bytes(metaimage_bytes(SCAN, AFFINE, data_file="scan.raw", HeaderSize=-1))
    return folder / "scan.mhd"


WRITERS = {
    "nii": write_nii,
    "nii.gz int16": write_gz,
    "nifti-2 int64": write_second,
    "nii big-endian": write_big_endian,
    "nii.gz float32": write_floats,
    "nii scaled": write_scaled,
    "nii 5D": write_trailing_ones,
    "nii compressed": write_misnamed,
    "nrrd gzip LPS": write_nrrd_kind("gzip", "left-posterior-superior"),
    "nrrd raw RAS": write_nrrd_kind("raw", "right-anterior-superior"),
    "nrrd bzip2 LAS": write_nrrd_kind("bzip2", "left-anterior-superior"),
    "nrrd ascii RAS": write_nrrd_kind("ascii", "RAS".lower()),
    "nhdr": write_nhdr,
    "nrrd in meters": write_nrrd_meters,
    "mha": write_mha(False, False, "u1"),
    "mha compressed": write_mha(True, False, "<i2"),
    "mha big-endian": write_mha(False, False, ">i2"),
    "mha text": write_mha(False, True, "u1"),
    "mha float": write_mha(True, False, "<f4"),
    "mhd": write_mhd,
    "mhd at the end": write_mhd_at_the_end,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_labels_and_places(kind, tmp_path):
    volume = read_volume(WRITERS[kind](tmp_path))
    assert len(volume.layers) == 1 and volume.shape == SHAPE
    assert volume.layers[0].dtype.kind in "iu" and volume.layers[0].dtype.isnative
    assert np.array_equal(volume.layers[0], SCAN)
    np.testing.assert_allclose(volume.affine, AFFINE, rtol=0, atol=1e-6)
    assert volume.names == {} and volume.notes == ()


# --- NIfTI's affines ---


@pytest.mark.parametrize("unit, scale", [("meter", 1000), ("mm", 1), ("micron", 1e-3), ("unknown", 1)])
def test_units_of_nifti_become_mm(unit, scale, tmp_path):
    image = nibabel.Nifti1Image(SCAN, AFFINE)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "scan.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "scan.nii").affine, np.diag([scale] * 3 + [1]) @ AFFINE)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_qform_alone_is_taken_with_its_qfac(flipped, tmp_path):
    affine = np.eye(4)
    affine[:3, :3] = turn(2, 30) @ turn(1, 200) @ np.diag([0.7, 0.9, -2 if flipped else 2])
    affine[:3, 3] = (4, -5, 6)
    image = nibabel.Nifti1Image(SCAN, None)
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    assert image.header["pixdim"][0] == (-1 if flipped else 1)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert np.linalg.det(volume.affine[:3, :3]) * (-1 if flipped else 1) > 0
    assert volume.notes == ()


def with_both(path: Path, sform: np.ndarray, qform: np.ndarray) -> Volume:
    image = nibabel.Nifti1Image(SCAN, None)
    image.set_sform(sform, code=2)
    image.set_qform(qform, code=1)
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = sform[:3]
    path.write_bytes(image.to_bytes())
    return read_volume(path)


def test_the_sform_goes_before_the_qform_and_a_difference_is_told(tmp_path):
    straight = np.diag([1.0, 2, 3, 1])
    assert with_both(tmp_path / "same.nii", straight, straight).notes == ()
    moved = straight.copy()
    moved[0, 3] = 0.5
    volume = with_both(tmp_path / "moved.nii", straight, moved)
    np.testing.assert_array_equal(volume.affine, straight)
    assert volume.notes == ("its sform and qform differ by up to 0.5 voxels: the sform is taken",)
    volume = with_both(tmp_path / "singular.nii", np.diag([0.0, 0, 0, 1]), straight)
    np.testing.assert_allclose(volume.affine, straight)
    assert volume.notes == ("its sform is singular: the qform is taken",)
    image = nibabel.Nifti1Image(SCAN, straight)
    image.header["qform_code"], image.header["quatern_b"], image.header["quatern_c"] = 1, 2, 2
    (tmp_path / "longer.nii").write_bytes(image.to_bytes())
    volume = read_volume(tmp_path / "longer.nii")
    np.testing.assert_array_equal(volume.affine, straight)
    assert volume.notes == ("its qform is damaged: the sform is taken",)


def test_a_nifti_without_either_says_so(tmp_path):
    image = nibabel.Nifti1Image(SCAN, None)
    image.header["sform_code"], image.header["qform_code"] = 0, 0
    nibabel.save(image, tmp_path / "scan.nii")
    assert "does not say where its axes run" in read_volume(tmp_path / "scan.nii").notes[0]


@pytest.mark.parametrize("sizes, code, noted", [((1, -1, 2), 1, True), ((1, 1, 0), 0, True), ((1, 1, 2), 1, False)])
def test_a_nifti_of_impossible_voxels_says_how_it_is_taken(sizes, code, noted, tmp_path):
    content = bytearray(nibabel.Nifti1Image(SCAN, None).to_bytes())
    content[80:92], content[252:256] = np.array(sizes, "<f4").tobytes(), np.array([code, 0], "<i2").tobytes()
    (tmp_path / "scan.nii").write_bytes(content)
    volume = read_volume(tmp_path / "scan.nii")
    assert np.allclose(np.abs(np.diag(volume.affine)[:3]), np.abs(np.where(sizes, sizes, 1)))
    notes = [note for note in volume.notes if "its voxels are" in note]
    assert notes == [f"says that its voxels are {sizes[0]}.0 x {sizes[1]}.0 x {sizes[2]}.0 large: signs are ignored, "
                     "and 0 is taken as 1"] * noted  # fmt: skip


def test_names_in_a_nifti_header_are_read(tmp_path):
    table = (
        '<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0"><LabelTable>'
        '<Label Key="0">???</Label><Label Key="1" Red="1"><![CDATA[liver]]></Label><Label Key="5">Milz ä</Label>'
        "</LabelTable></VolumeInformation></CaretExtension>"
    )
    for number, (text, names) in enumerate([(table, {1: "liver", 5: "Milz ä"}), (table[:-9], {}), ("<other/>", {})]):
        image = nibabel.Nifti1Image(SCAN, AFFINE)
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, text.encode()))
        nibabel.save(image, tmp_path / f"{number}.nii.gz")
        volume = read_volume(tmp_path / f"{number}.nii.gz")
        assert volume.names == names
        assert len(volume.notes) == (number == 1)  # damaged


def test_empty_segments_are_told_and_unused_names_of_a_table_are_not():
    volume = volume_of(SCAN, names={1: "liver", 5: "spleen", 7: "heart"})
    assert [item.name for item in objects_of(volume, None, False)] == ["liver", "spleen"]
    *_, heart = objects_of(volume._replace(has_segments=True), None, False)
    assert heart == LeftOut("heart", "is not in this scan: no voxel has label 7")


# --- NRRD's spaces and segments ---


def test_every_type_of_nrrd_has_its_name():
    from trellis.grids.volumes.reading import _nrrd_type

    types = {name: kind for name, kind in nrrd.reader._TYPEMAP_NRRD2NUMPY.items() if name != "block"}
    assert len(types) > 30 and {name: _nrrd_type(name) for name in types} == types
    with pytest.raises(DataError, match="the type 'block'"):
        _nrrd_type("block")


def test_names_of_nrrd_fields_may_have_capitals(tmp_path):
    header, data = nrrd_bytes(SCAN, AFFINE, "raw", fields=["Segment0_Name:=A: B"]).split(b"\n\n", 1)
    header = re.sub(rb"(?m)^[a-z ]+(?=: )", lambda found: found[0].title(), header)
    assert b"\nSpace Directions: " in header
    (tmp_path / "scan.nrrd").write_bytes(header + b"\n\n" + data)
    volume = read_volume(tmp_path / "scan.nrrd")
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert np.array_equal(volume.layers[0], SCAN) and volume.names == {1: "A: B"} and volume.notes == ()


def test_a_nrrd_without_a_space_says_so(tmp_path):
    path = tmp_path / "scan.nrrd"
    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 70 64 30\nspacings: 1 2 3\nencoding: raw\n\n"
    path.write_bytes(head.encode() + SCAN.tobytes(order="F"))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.affine, np.diag([-1, -2, 3, 1]))
    assert volume.notes == ("does not say where its axes run (space: none): left-posterior-superior is taken",)
    path.write_bytes(head.replace("spacings", "space: 3D-left-handed\nspacings").encode() + SCAN.tobytes(order="F"))
    with pytest.raises(DataError, match="3D-left-handed"):
        read_volume(path)


SEGMENTS = ["Segment0_Name:=Leber rechts ä", "Segment0_LabelValue:=1", "Segment0_Layer:=0"]


def test_slicers_segments_have_their_names(tmp_path):
    fields = [*SEGMENTS, "Segment1_Name:=spleen", "Segment1_LabelValue:=5", "Segment1_Layer:=0"]
    (tmp_path / "a.seg.nrrd").write_bytes(nrrd_bytes(SCAN, AFFINE, fields=fields))
    volume = read_volume(tmp_path / "a.seg.nrrd")
    assert volume.names == {1: "Leber rechts ä", 5: "spleen"} and np.array_equal(volume.layers[0], SCAN)
    assert [item.name for item in objects_of(volume, None, False)] == ["Leber rechts ä", "spleen"]


def test_an_old_file_of_slicer_with_one_segment(tmp_path):
    (tmp_path / "a.seg.nrrd").write_bytes(nrrd_bytes((SCAN > 0) * np.uint8(1), AFFINE, fields=["Segment3_Name:=trunk"]))
    (trunk,) = objects_of(read_volume(tmp_path / "a.seg.nrrd"), None, False)
    assert trunk.name == "trunk" and trunk.mask.sum() == np.count_nonzero(SCAN)


@pytest.mark.parametrize(
    "unit, scale", [("um", 1e-3), ("microns", 1e-3), ("Centimetres", 10), ("mm", 1), ("inch", None)]
)
def test_units_of_nrrd_and_metaimage(unit, scale, tmp_path):
    (tmp_path / "a.nrrd").write_bytes(nrrd_bytes(SCAN, AFFINE, fields=["space units: " + f'"{unit}" ' * 3]))
    (tmp_path / "b.mha").write_bytes(metaimage_bytes(SCAN, AFFINE, DistanceUnits=unit))
    for path in tmp_path.iterdir():
        volume = read_volume(path)
        np.testing.assert_allclose(volume.affine, np.diag([scale or 1] * 3 + [1]) @ AFFINE)
        assert volume.notes == (() if scale else ("its unit 'inch' is not known: millimeters are taken",))


@pytest.mark.parametrize("kind", ["shared values", "own values", "old"])
def test_slicers_overlapping_segments_are_layers(kind, tmp_path):
    """Two layers that overlap: the second segment is the first one and more."""
    first = (SCAN == 1).astype(np.uint8)
    second = (SCAN > 0) * np.uint8(2 if kind == "own values" else 1)
    fields = SEGMENTS if kind != "old" else SEGMENTS[:1]
    fields = [*fields, "Segment1_Name:=trunk"]
    if kind != "old":
        fields += [f"Segment1_LabelValue:={second.max()}", "Segment1_Layer:=1"]
    (tmp_path / "a.seg.nrrd").write_bytes(nrrd_bytes(np.stack([first, second]), AFFINE, fields=fields))
    volume = read_volume(tmp_path / "a.seg.nrrd")
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.names == {1: "Leber rechts ä", 2: "trunk"}
    assert [np.count_nonzero(layer) for layer in volume.layers] == [first.sum(), np.count_nonzero(second)]
    assert [np.unique(layer).tolist() for layer in volume.layers] == [[0, 1], [0, 2]]
    assert len(volume.notes) == (kind != "own values")
    liver, trunk = objects_of(volume, None, False)
    assert (liver.mask.sum(), trunk.mask.sum()) == (first.sum(), np.count_nonzero(second))


# --- DICOM ---


def dicom_segmentation(folder: Path, masks: np.ndarray, affine: np.ndarray, names: list[str]) -> Path:
    """Write masks [S, X, Y, Z] as a segmentation of a CT, whose slices are those along Z."""
    highdicom, pydicom = pytest.importorskip("highdicom"), pytest.importorskip("pydicom")
    lps = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series, study, frame = (pydicom.uid.generate_uid() for _ in range(3))
    slices = []
    for k in range(masks.shape[3]):
        image = pydicom.Dataset()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        image.SeriesInstanceUID, image.StudyInstanceUID, image.FrameOfReferenceUID = series, study, frame
        image.Modality, image.PatientID, image.PatientName = "CT", "1", "one"
        for name in ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
            setattr(image, name, "")
        image.PositionReferenceIndicator, image.SeriesNumber, image.InstanceNumber = "", 1, k + 1
        image.Columns, image.Rows = masks.shape[1], masks.shape[2]
        image.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        image.SliceThickness = float(spacing[2])
        # Rows run along the first axis, columns along the second.
        image.ImageOrientationPatient = [round(float(v), 9) for v in (lps[:3, :2] / spacing[:2]).T.ravel()]
        image.ImagePositionPatient = [round(float(v), 6) for v in lps[:3, 3] + lps[:3, 2] * k]
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelRepresentation, image.SamplesPerPixel = 15, 0, 1
        image.PhotometricInterpretation = "MONOCHROME2"
        image.PixelData = bytes(2 * image.Rows * image.Columns)
        slices.append(image)
    slices[0].save_as(folder / "ct.dcm", enforce_file_format=True)
    code = pydicom.sr.codedict.codes.SCT
    segments = [
        highdicom.seg.SegmentDescription(
            number, name, code.Organ, code.Liver, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL
        )
        for number, name in enumerate(names, 1)
    ]
    segmentation = highdicom.seg.Segmentation(
        slices, masks.transpose(3, 2, 1, 0).astype(np.uint8), "BINARY", segments, pydicom.uid.generate_uid(), 2,
        pydicom.uid.generate_uid(), 1, "maker", "model", "1", "serial",
    )  # fmt: skip
    segmentation.save_as(folder / "organs.dcm")
    return folder / "organs.dcm"


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_dicom_segmentation_lies_where_its_images_do(overlapping, tmp_path):
    affine = AFFINE.copy()
    affine[:3, :3] = turn(2, 12) @ turn(0, -7) @ np.diag([0.75, -0.75, 2.5])  # DICOM's axes are orthogonal
    masks = np.stack([SCAN == 1, (SCAN > 0) if overlapping else SCAN == 5])
    volume = read_volume(dicom_segmentation(tmp_path, masks, affine, ["liver", "trunk"]))
    assert volume.names == {1: "liver", 2: "trunk"} and len(volume.layers) == 1 + overlapping
    found = [item for item in objects_of(volume, None, False) if isinstance(item, LabelObject)]
    for item, mask in zip(found, masks, strict=True):
        voxels, frame = rasterize_object(item, 32)
        expected, expected_frame = rasterize_mask(mask, affine, 32)
        np.testing.assert_allclose(frame.center, expected_frame.center, atol=1e-3)
        assert abs(frame.mm_per_cell - expected_frame.mm_per_cell) < 1e-4
        assert len(set(map(tuple, voxels)) ^ set(map(tuple, expected))) <= 0.005 * len(expected)
    with pytest.raises(DataError, match="CT Image Storage.*not a segmentation"):
        read_volume(tmp_path / "ct.dcm")


# --- what is refused ---


def cut(content: bytes, number: int = 400) -> bytes:
    return content[:-number]


def packed_nifti(array: np.ndarray, affine: np.ndarray = AFFINE) -> bytes:
    return gzip.compress(nibabel.Nifti1Image(array, affine).to_bytes())


def claim(content: bytes, place: int, value: int) -> bytes:
    """A NIfTI header with another number at a place."""
    return content[:place] + np.array([value], "<i2").tobytes() + content[place + 2 :]


def with_value(value: float) -> np.ndarray:
    array = SCAN.astype(np.float32)
    array[10, 4, 3] = value
    return array


def spoil(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :]


NII = nibabel.Nifti1Image(SCAN, AFFINE).to_bytes()
RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
NOISE = np.random.default_rng(0).integers(0, 2, SHAPE).astype(np.uint8)  # hardly packs, so that damage hits data
PACKED_NRRD, PACKED_MHA = nrrd_bytes(NOISE, AFFINE), metaimage_bytes(NOISE, AFFINE, True)
FLAT = AFFINE @ np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
REFUSED = {
    "fraction.nii": (lambda: nibabel.Nifti1Image(with_value(0.37), AFFINE).to_bytes(), r"\(10, 4, 3\) is 0.37.*image"),
    "nan.nii.gz": (lambda: packed_nifti(with_value(np.nan)), r"voxel \(10, 4, 3\) is nan"),
    "inf.nii.gz": (lambda: packed_nifti(with_value(np.inf)), r"voxel \(10, 4, 3\) is inf"),
    "fraction.nrrd": (lambda: nrrd_bytes(with_value(0.5).astype("<f4"), AFFINE), r"\(10, 4, 3\) is 0.5"),
    "fraction.mha": (lambda: metaimage_bytes(with_value(0.5).astype("<f4"), AFFINE), r"\(10, 4, 3\) is 0.5"),
    "rgb.nii": (lambda: nibabel.Nifti1Image(RGB, AFFINE).to_bytes(), "RGB"),
    "complex.nii": (lambda: nibabel.Nifti1Image(SCAN.astype(np.complex64), AFFINE).to_bytes(), "complex numbers"),
    "rgb.mha": (lambda: metaimage_bytes(SCAN, AFFINE, ElementNumberOfChannels=3), "3 numbers for each voxel"),
    "times.nii.gz": (lambda: packed_nifti(np.stack([SCAN, SCAN], -1)), "70 x 64 x 30 x 2"),
    "vectors.nrrd": (lambda: nrrd_bytes(np.stack([SCAN, SCAN]), AFFINE), "70 x 64 x 30 x 2"),
    "flat.nii": (lambda: nibabel.Nifti1Image(SCAN[:, :, 0], AFFINE).to_bytes(), "70 x 64.*three axes"),
    "singular.nrrd": (lambda: nrrd_bytes(SCAN, FLAT), "singular"),
    "singular.mha": (
        lambda: metaimage_bytes(SCAN, AFFINE, TransformMatrix="1 0 0 1 0 0 0 0 1"), "singular"),
    "nan.mha": (lambda: metaimage_bytes(SCAN, AFFINE, Offset="nan 0 0"), "not finite"),
    "cut.nii": (lambda: cut(NII), "truncated"),
    "one_byte_less.nii": (lambda: cut(NII, 1), "promises"),
    "cut.nii.gz": (lambda: cut(packed_nifti(NOISE)), "truncated"),
    "cut.nrrd": (lambda: cut(nrrd_bytes(SCAN, AFFINE, "raw")), "truncated"),
    "cut_packed.nrrd": (lambda: cut(PACKED_NRRD), "cannot be read"),
    "cut.mha": (lambda: cut(metaimage_bytes(SCAN, AFFINE)), "truncated"),
    "cut_packed.mha": (lambda: cut(PACKED_MHA), "truncated"),
    "cut_text.mha": (lambda: cut(metaimage_bytes(SCAN, AFFINE, text=True)), "truncated"),
    "damaged.nii.gz": (lambda: spoil(packed_nifti(NOISE), 9000), "cannot be read|truncated"),
    "damaged.nrrd": (lambda: spoil(PACKED_NRRD, -300), "truncated or damaged"),
    "damaged.mha": (lambda: spoil(PACKED_MHA, -300), "damaged"),
    "huge.nii": (lambda: claim(claim(NII, 42, 20_000), 44, 20_000), "more than|promises"),
    "large.nii": (lambda: claim(NII, 42, 1000), "promises 1920000 bytes"),
    "large.nii.gz": (lambda: gzip.compress(claim(claim(NII, 42, 30_000), 44, 1_000)), "promises"),
    "large.nrrd": (lambda: PACKED_NRRD.replace(b"sizes: 70 64 30", b"sizes: 7000 640 300"), "promises"),
    "huge.nrrd": (lambda: PACKED_NRRD.replace(b"sizes: 70 64 30", b"sizes: 70000 64000 30000"), "more than"),
    "large.mha": (lambda: PACKED_MHA.replace(b"DimSize = 70", b"DimSize = 70000"), "promises"),
    "none.mha": (lambda: PACKED_MHA.replace(b"DimSize = 70", b"DimSize = 0"), "no voxel"),
    "negative.nrrd": (lambda: PACKED_NRRD.replace(b"sizes: 70", b"sizes: -70"), "no voxel"),
    "gone.mhd": (lambda: metaimage_bytes(SCAN, AFFINE, data_file="gone.raw"), "gone.raw, which is not there"),
    "list.mhd": (lambda: metaimage_bytes(SCAN, AFFINE, data_file="LIST"), "several files"),
    "gone.nhdr": (lambda: nrrd_bytes(SCAN, AFFINE, data_file="gone.raw"), "gone.raw, which is not there"),
    "list.nhdr": (lambda: nrrd_bytes(SCAN, AFFINE, data_file="LIST"), "several files"),
    "pattern.nhdr": (lambda: nrrd_bytes(SCAN, AFFINE, data_file="s%03d.raw 1 30 1"), "several files"),
    "fractional.seg.nrrd": (
        lambda: nrrd_bytes(SCAN, AFFINE, fields=[*SEGMENTS, "Segmentation_SourceRepresentation:=Fractional labelmap"]),
        "fractions"),
    "empty.seg.nrrd": (lambda: nrrd_bytes(SCAN[:1, :1, :1], AFFINE, fields=SEGMENTS), "no segments"),
    "units.nrrd": (lambda: nrrd_bytes(SCAN, AFFINE, fields=['space units: "mm" "mm" "cm"']), "different units"),
    "layer.seg.nrrd": (
        lambda: nrrd_bytes(SCAN, AFFINE, fields=[*SEGMENTS[:2], "Segment0_Layer:=3"]), "layer that is not there"),
    "text.nii": (lambda: b"this is no scan" * 100, "cannot be read"),
    "text.nii.gz": (lambda: b"this is no scan", "cannot be read"),
    "text.nrrd": (lambda: b"this is no scan", "begin with NRRD"),
    "text.mha": (lambda: b"this is no scan", "no ElementDataFile"),
    "text.dcm": (lambda: b"this is no scan", "not a DICOM file"),
    "text.npy": (lambda: b"this is no scan", "cannot be read"),
    "text.npz": (lambda: b"this is no scan", "cannot be read"),
    "text.binvox": (lambda: b"this is no scan", "not a binvox file"),
    "nothing.nrrd": (lambda: b"", "0 bytes"),
    "scan.png": (lambda: b"png", "is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_label_map_is_refused_with_the_reason(name, tmp_path):
    make, reason = REFUSED[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match=reason) as caught:
        read_volume(tmp_path / name)
    assert name not in str(caught.value) and not str(caught.value).endswith(".")


# --- labels ---


def table(tmp_path: Path, text: str) -> str:
    (tmp_path / "labels.json").write_text(text)
    return str(tmp_path / "labels.json")


@pytest.mark.parametrize(
    "text, groups",
    [
        ('{"1": "liver", "5": "spleen"}', {"liver": (1,), "spleen": (5,)}),
        ('{"liver": 1, "both": [1, 5, 1]}', {"liver": (1,), "both": (1, 5)}),
        ('{"0": "background", "10": "lungs", "11": "lungs", "-1": "ignored"}', {"lungs": (10, 11), "ignored": (-1,)}),
        ('{"labels": {"background": 0, "liver": 1}, "channel_names": {"0": "CT"}}', {"liver": (1,)}),
    ],
)
def test_tables_of_labels(text, groups, tmp_path):
    assert load_labels(table(tmp_path, "\ufeff" + text)).groups == groups


@pytest.mark.parametrize(
    "text, word",
    [
        ("[1, 2]", "must be an object"),
        ("{", "not a JSON table"),
        ("[" * 100_000, "not a JSON table"),
        ('{"1": "a", "1": "b"}', "'1' is given twice"),
        ('{"liver": 1.5}', '"liver": 1.5'),
        ('{"liver": true}', '"liver": true'),
        ('{"liver": []}', '"liver": '),
        ('{"liver": "one"}', '"liver": "one"'),
        ('{"1": " "}', "empty"),
        ('{"air": 0}', "background"),
        ('{"liver": 1, "1": "spleen"}', "label 1 has two names, 'liver' and 'spleen'"),
        ('{"liver": 1, "organ": [1]}', "label 1 has two names, 'liver' and 'organ'"),
        ('{"lungs": [2, 3], "2": "both", "3": "both"}', "the labels 2, 3 have two names"),
        ("{}", "names no label"),
    ],
)
def test_a_wrong_table_is_named(text, word, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_labels(table(tmp_path, text))
    assert word in str(caught.value) and "labels.json" in str(caught.value)


def test_known_tables():
    groups = load_labels("totalsegmentator").groups
    assert len(groups) == 117 and {label for group in groups.values() for label in group} == set(range(1, 118))
    ends = {"spleen": 1, "lung_lower_lobe_right": 14, "vertebrae_S1": 26, "vertebrae_C1": 50, "heart": 51, "skull": 91,
            "rib_left_1": 92, "rib_right_12": 115, "costal_cartilages": 117}  # fmt: skip
    assert {name: groups[name][0] for name in ends} == ends
    assert len(load_labels("totalsegmentator_mr").groups) == 50
    with pytest.raises(ConfigError, match="totalsegmentator"):
        load_labels("totalsegmenter")


def volume_of(labels: np.ndarray, affine: np.ndarray = AFFINE, names: dict[int, str] | None = None) -> Volume:
    return Volume((labels,), affine, names or {})


def test_objects_are_labels_and_groups(tmp_path):
    volume = volume_of(SCAN)
    by_number = list(objects_of(volume, None, False))
    assert [item.name for item in by_number] == ["1", "5"]
    labels = load_labels(table(tmp_path, '{"both": [1, 5], "liver": 1, "heart": 7, "lungs": [8, 9]}'))
    both, liver, heart, lungs = objects_of(volume, labels, False)
    for item, mask in ((both, SCAN > 0), (liver, SCAN == 1)):
        whole = np.zeros(SHAPE, bool)
        crop = tuple(slice(start, start + size) for start, size in zip(item.offset, item.mask.shape, strict=True))
        whole[crop] = item.mask
        assert np.array_equal(whole, mask) and item.shape == SHAPE
        for axis in range(3):  # the crop is tight
            assert item.mask.any(axis=tuple({0, 1, 2} - {axis}))[[0, -1]].all()
    assert heart == LeftOut("heart", "is not in this scan: no voxel has label 7")
    assert lungs == LeftOut("lungs", "is not in this scan: no voxel has any of the labels 8, 9")


def test_what_a_scan_lacks_of_a_known_table_is_no_news():
    spleen, liver = objects_of(volume_of(SCAN), load_labels("totalsegmentator"), False)
    assert (spleen.name, liver.name) == ("spleen", "liver")


def test_what_the_table_does_not_name_is_told(tmp_path):
    *_, rest = objects_of(volume_of(SCAN), load_labels(table(tmp_path, '{"liver": 1}')), False)
    assert rest == LeftOut("label 5", f"label 5 is not in {tmp_path / 'labels.json'}")
    others = np.where(SCAN > 0, SCAN + 1, 0)
    others[0, 0, 0] = 1
    labels = volumes.Labels({"liver": (1,)}, "bad.json")
    *_, rest = objects_of(volume_of(others), labels, False)
    assert rest == LeftOut("labels 2, 6", "labels 2, 6 are not in bad.json")
    with pytest.raises(DataError, match="has the labels 1, 5, none of which"):
        list(objects_of(volume_of(SCAN), load_labels(table(tmp_path, '{"liver": 2}')), False))
    with pytest.raises(DataError, match="every voxel is 0"):
        list(objects_of(volume_of(np.zeros_like(SCAN)), None, False))


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("values", [(-3, 7), (200, 255), (11101, 12175), (-(2**31), 2**31 - 1), (10, 2**40)], ids=str)
def test_labels_of_any_size_are_found(values, order):
    labels = np.zeros(SHAPE, np.int64)
    for old, new in zip((1, 5), values, strict=True):
        labels[SCAN == old] = new
    dtype = np.min_scalar_type(values[1]) if values[0] > 0 else np.int64
    found = list(objects_of(volume_of(np.asarray(labels, dtype, order=order)), None, False))
    assert [item.name for item in found] == [str(value) for value in values]
    assert [item.mask.sum() for item in found] == [(SCAN == 1).sum(), (SCAN == 5).sum()]


def test_an_image_is_no_label_map(tmp_path):
    image = np.random.default_rng(0).integers(-1000, 3000, SHAPE).astype(np.int16)
    with pytest.raises(DataError, match="from -1000 to 2999: an image, not a label map"):
        list(objects_of(volume_of(image), None, False))


def test_a_label_that_the_file_calls_otherwise_has_a_note(tmp_path):
    volume = volume_of(SCAN, names={1: "Lung vessels", 5: "LIVER"})
    for source in ("totalsegmentator", table(tmp_path, '{"spleen": 1, "liver": 5, "all": [1, 5]}')):
        spleen, liver, *others = objects_of(volume, load_labels(source), False)
        assert spleen.notes == ("its file names label 1 'Lung vessels'",)
        assert all(item.notes == () for item in (liver, *others))


@pytest.mark.parametrize("levels", [150, 256])
def test_an_image_of_few_values_is_no_label_map(levels):
    image = np.random.default_rng(0).integers(0, levels, (30, 30, 30)).astype(np.uint8)
    table = volumes.Labels({"liver": (1,)}, "labels.json")
    for labels, remedy in ((None, "name its labels with --labels"), (table, "name all its labels in labels.json")):
        with pytest.raises(DataError, match=f"an image, not a label map. If it is one, {remedy}$"):
            list(objects_of(volume_of(image), labels, False))


def test_a_label_map_of_many_labels_is_no_image():
    blocks = np.arange(1, 217, dtype=np.uint8).reshape(6, 6, 6).repeat(3, 0).repeat(3, 1).repeat(3, 2)
    assert [item.name for item in objects_of(volume_of(blocks), None, False)] == [str(i) for i in range(1, 217)]


@pytest.mark.parametrize("value", [1, 255])
def test_a_mask_is_the_organ_that_its_file_is_named_after(value, tmp_path):
    mask = np.where(SCAN == 1, value, 0).astype(np.uint8)
    for name, labels, expected in (
        ("liver", None, "liver"),
        ("lung_vessels", None, "lung_vessels"),
        ("liver", "totalsegmentator", "liver"),
        ("Kidney_left", "totalsegmentator", "kidney_left"),
        ("liver", table(tmp_path, '{"Liver": 5, "spleen": 1}'), "Liver"),
    ):
        save_nifti(tmp_path / f"{name}.nii.gz", mask, AFFINE)
        (found,) = volumes.grids_of_file(tmp_path / f"{name}.nii.gz", 16, labels and load_labels(labels))
        assert (found.name, found.labels) == (expected, (value,))
    (part,) = volumes.grids_of_file(tmp_path / "lung_vessels.nii.gz", 16, components=True)
    assert part.name == "lung_vessels_1"


def test_a_mask_is_never_taken_for_another_organ(tmp_path):
    mask = (SCAN == 1).astype(np.uint8)
    asked = load_labels(table(tmp_path, '{"spleen": 1, "liver": 5}'))
    total = load_labels("totalsegmentator")
    for name in ("aorta", "body"):
        save_nifti(tmp_path / f"{name}.nii", mask, AFFINE)
    (aorta,) = volumes.grids_of_file(tmp_path / "aorta.nii", 16, asked)
    assert aorta == LeftOut("aorta", f"is a mask by the name of its file, of what {asked.source} does not name")
    reason = r'may be a mask of any organ, or spleen as totalsegmentator .*such as \{"spleen": 1\}$'
    with pytest.raises(DataError, match=reason):
        list(volumes.grids_of_file(tmp_path / "body.nii", 16, total))


def test_a_label_map_with_one_label_keeps_its_meaning(tmp_path):
    asked = load_labels(table(tmp_path, '{"spleen": 1, "liver": 5}'))
    save_nifti(tmp_path / "case_1.nii", (SCAN == 1).astype(np.uint8), AFFINE)
    spleen, missing = volumes.grids_of_file(tmp_path / "case_1.nii", 16, asked)
    assert spleen.name == "spleen" and missing.name == "liver"
    assert spleen.notes == ("has only label 1, taken as spleen; the file is called case_1",)
    save_nifti(tmp_path / "spleen.nii", (SCAN == 1).astype(np.uint8), AFFINE)
    (spleen,) = volumes.grids_of_file(tmp_path / "spleen.nii", 16, asked)
    assert (spleen.name, spleen.notes) == ("spleen", ())
    save_nifti(tmp_path / "case_2.nii", np.where(SCAN == 5, 5, 0).astype(np.uint8), AFFINE)
    assert [found.name for found in volumes.grids_of_file(tmp_path / "case_2.nii", 16)] == ["5"]
    (named,) = objects_of(volume_of((SCAN == 1).astype(np.uint8), names={1: "cyst"}), None, False, "case_1")
    assert named.name == "cyst"


def test_names_that_are_used_twice_get_the_label():
    found = objects_of(volume_of(SCAN, names={1: "organ", 5: "organ"}), None, False)
    assert [item.name for item in found] == ["organ_1", "organ_5"]
    found = objects_of(volume_of(SCAN, names={1: "5"}), None, False)
    assert [item.name for item in found] == ["5_1", "5_5"]


def test_components_are_those_of_26_neighbors_the_largest_first():
    labels = np.zeros((30, 20, 20), np.uint8)
    labels[2:5, 2:5, 2:5] = 1
    labels[5:9, 5:9, 5:9] = 1  # they share a corner
    labels[15:20, 2:7, 2:8] = 1
    labels[12, 15, 15] = labels[24, 15, 15] = 1
    first, second, rest = objects_of(volume_of(labels, names={1: "cyst"}), None, True)
    assert (first.name, first.mask.sum(), first.offset) == ("cyst_1", 150, (15, 2, 2))
    assert (second.name, second.mask.sum(), second.offset) == ("cyst_2", 27 + 64, (2, 2, 2))
    assert rest == LeftOut("cyst", "2 of its 4 components have fewer than 27 voxels, 1 the smallest")


def test_stray_voxels_that_enlarge_the_cells_are_told(tmp_path):
    labels = np.zeros((60, 30, 30), np.uint8)
    labels[2:22, 5:15, 5:15] = 1
    save_nifti(tmp_path / "a.nii", labels, np.diag([2.0, 2, 2, 1]))
    assert [found.notes for found in volumes.grids_of_file(tmp_path / "a.nii", 16)] == [()]
    for places, text in (
        ([22], None),
        ([41], "1 stray voxel that makes its cells 5 mm instead of 2.5: --components leaves it out"),
        ([40, 41], "2 stray voxels that make its cells 5 mm instead of 2.5: --components leaves them out"),
    ):
        labels[22:] = 0
        labels[places, 10, 10] = 1
        save_nifti(tmp_path / "a.nii", labels, np.diag([2.0, 2, 2, 1]))
        (found,) = volumes.grids_of_file(tmp_path / "a.nii", 16)
        assert found.notes == ((f"has {text}",) if text else ())
        part = next(volumes.grids_of_file(tmp_path / "a.nii", 16, components=True))
        assert part.notes == ()


def test_small_and_cut_objects_are_told():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:8, 5:8, 5:8] = 1
    labels[10:13, 10:13, 10:13] = 2
    labels[10, 10, 10] = 0
    labels[17:, 0:5, 5:9] = 3
    turned = np.diag([-1.0, 1, 2, 1])
    whole, small, cut_off = objects_of(volume_of(labels, turned), None, False)
    assert whole.notes == ()
    assert small == LeftOut("2", "has 26 voxels of the scan, fewer than 27")
    assert cut_off.notes == ("reaches the scan's border (left, back) and may be cut off",)


# --- the grid ---


def as_grid(voxels: np.ndarray, resolution: int) -> np.ndarray:
    grid = np.zeros((resolution,) * 3, bool)
    grid[tuple(voxels.T)] = True
    return grid


def corner_box(mask: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box in mm of all eight corners of all voxels."""
    corners = (np.argwhere(mask)[:, None] + np.array(list(itertools.product((-0.5, 0.5), repeat=3)))).reshape(-1, 3)
    world = corners @ affine[:3, :3].T + affine[:3, 3]
    return world.min(axis=0), world.max(axis=0)


def slow_grid(mask: np.ndarray, affine: np.ndarray, resolution: int) -> np.ndarray:
    """Reference: the rule cell by cell and voxel by voxel, in world coordinates."""
    low, high = corner_box(mask, affine)
    edge, center = (high - low).max() / resolution, (low + high) / 2
    grid = np.zeros((resolution,) * 3, bool)
    for cell in np.ndindex(grid.shape):
        point = center + (np.array(cell) + 0.5 - resolution / 2) * edge
        index = np.rint(np.linalg.solve(affine, [*point, 1])[:3]).astype(int)
        grid[cell] = (index >= 0).all() and (index < mask.shape).all() and mask[tuple(index)]
    for voxel in np.argwhere(mask):
        point = affine[:3, :3] @ voxel + affine[:3, 3]
        grid[tuple(np.floor((point - center) / edge + resolution / 2).astype(int))] = True
    return grid


def hook() -> np.ndarray:
    """A shape without any symmetry."""
    mask = np.zeros((9, 8, 7), bool)
    mask[1:8, 2:4, 1:3] = mask[1:3, 2:7, 1:3] = mask[6:8, 2:4, 1:6] = mask[1, 6, 3] = True
    return mask


@pytest.mark.parametrize("resolution", [5, 16, 24])  # cells larger and smaller than voxels
def test_a_solid_grid_follows_the_rule(resolution):
    voxels, frame = rasterize_mask(hook(), AFFINE, resolution, "solid")
    assert voxels.dtype == np.int64 and np.array_equal(voxels, np.unique(voxels, axis=0))
    assert np.array_equal(as_grid(voxels, resolution), slow_grid(hook(), AFFINE, resolution))
    low, high = corner_box(hook(), AFFINE)
    np.testing.assert_allclose(frame.center, (low + high) / 2, atol=1e-9)
    np.testing.assert_allclose(frame.mm_per_cell, (high - low).max() / resolution, rtol=1e-12)


def test_a_surface_is_the_solid_cells_with_an_empty_side():
    solid = np.pad(as_grid(rasterize_mask(SCAN == 1, AFFINE, 32, "solid")[0], 32), 1)
    surface = as_grid(rasterize_mask(SCAN == 1, AFFINE, 32, "surface")[0], 32)
    expected = solid & ~ndimage.binary_erosion(solid)
    assert np.array_equal(surface, expected[1:-1, 1:-1, 1:-1]) and surface.sum() < solid.sum() / 2


@pytest.mark.parametrize("label", ELLIPSOIDS)
@pytest.mark.parametrize("resolution", [16, 64])
def test_an_ellipsoid_is_where_its_equation_says(label, resolution):
    """Of an oblique, anisotropic scan: within half a voxel's and half a cell's diagonal, in volume and in middle."""
    (item,) = [item for item in objects_of(volume_of(SCAN), None, False) if item.labels == (label,)]
    voxels, frame = rasterize_object(item, resolution, "solid")
    grid = as_grid(voxels, resolution)
    cells = np.moveaxis(np.indices(grid.shape), 0, -1)
    points = frame.center + (cells + 0.5 - resolution / 2) * frame.mm_per_cell
    _, half, axes = ELLIPSOIDS[label]
    middle = AFFINE[:3, :3] @ ELLIPSOIDS[label][0] + AFFINE[:3, 3]
    # The cells that must be full, and those that may be: the ellipsoid moved in and out by the reach of a voxel, and
    # out by that of a cell whose corner holds a voxel's center.
    voxel = np.linalg.norm(AFFINE[:3, :3] @ np.array(list(itertools.product((-0.5, 0.5), repeat=3))).T, axis=0).max()
    cell = np.sqrt(3) / 2 * frame.mm_per_cell
    local = (points - middle) @ axes
    assert grid[np.linalg.norm(local / (np.array(half) - voxel), axis=-1) < 1].all()
    assert not grid[np.linalg.norm(local / (np.array(half) + max(voxel, cell)), axis=-1) > 1].any()
    volume = grid.sum() * frame.mm_per_cell**3
    exact = 4 / 3 * np.pi * np.prod(half)
    assert abs(volume / exact - 1) < (0.02 if resolution == 64 else 0.35)  # large cells are full if a voxel is in them
    assert np.linalg.norm(points[grid].mean(axis=0) - middle) < (0.1 if resolution == 64 else 0.3)  # mm
    extent = np.sqrt(((axes * half) ** 2).sum(axis=1))  # of the ellipsoid's box, half
    assert abs(frame.mm_per_cell * resolution - 2 * extent.max()) < 2 * voxel
    assert np.abs(frame.center - middle).max() < voxel


STORAGES = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


def stored(mask: np.ndarray, affine: np.ndarray, order, signs) -> tuple[np.ndarray, np.ndarray]:
    """The same organ in the same place, with the scan's axes in another order and other directions."""
    mask, columns, origin = mask.transpose(order), affine[:3, list(order)].copy(), affine[:3, 3].copy()
    for axis, sign in enumerate(signs):
        if sign < 0:
            mask, origin = np.flip(mask, axis), origin + columns[:, axis] * (mask.shape[axis] - 1)
            columns[:, axis] *= -1
    return mask, np.vstack([np.column_stack([columns, origin]), [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "affine",
    [
        pytest.param(AFFINE, id="oblique"),
        pytest.param(np.diag([0.7, 0.7, 2.1, 1]), id="ties"),  # centers of voxels on borders of cells
        pytest.param(np.block([[turn(2, 45), np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]), id="45 degrees"),
    ],
)
def test_the_grid_does_not_depend_on_how_the_scan_is_stored(affine):
    """Neither mirrored nor turned, to the last cell, by any of the 48 ways to store a scan."""
    expected = {fill: rasterize_mask(hook(), affine, 12, fill) for fill in ("surface", "solid")}
    for order, signs in STORAGES:
        mask, other = stored(hook(), affine, order, signs)
        for fill, (voxels, frame) in expected.items():
            found, found_frame = rasterize_mask(mask, other, 12, fill)
            assert np.array_equal(found, voxels), (order, signs, fill)
            np.testing.assert_allclose(found_frame.center, frame.center, atol=1e-9)
            assert found_frame.mm_per_cell == frame.mm_per_cell


@pytest.mark.parametrize("order, signs", STORAGES[::5])
def test_files_of_other_storage_give_the_same_grid(order, signs, tmp_path):
    """Through NIfTI, NRRD and MetaImage: an organ on the patient's right stays there."""
    labels, affine = stored(hook().astype(np.uint8), AFFINE, order, signs)
    save_nifti(tmp_path / "a.nii.gz", labels, affine)
    (tmp_path / "b.nrrd").write_bytes(nrrd_bytes(labels, affine, space="right-anterior-superior"))
    (tmp_path / "c.mha").write_bytes(metaimage_bytes(labels, affine, True))
    expected, frame = rasterize_mask(hook(), AFFINE, 20)
    for path in sorted(tmp_path.iterdir()):
        (item,) = objects_of(read_volume(path), None, False)
        voxels, found = rasterize_object(item, 20)
        assert np.array_equal(voxels, expected), path.name
        np.testing.assert_allclose(found.center, frame.center, atol=1e-4)


def test_x_is_right_y_is_front_and_z_is_up():
    """The tip of a hook: at the patient's right, front and top, in a scan whose indices run to the left and back."""
    mask = np.zeros((10, 10, 10), bool)
    mask[2:8, 2:8, 2:4] = mask[2, 2, 2:8] = True
    grid = as_grid(rasterize_mask(mask, np.diag([-1.0, -1, 1, 1]), 6, "solid")[0], 6)
    assert np.array_equal(np.argwhere(grid[:, :, 5]), [[5, 5]])


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 0.5, 5)])
def test_a_thin_vessel_does_not_vanish_in_large_cells(spacing):
    mask = np.zeros((200, 40, 40), bool)
    mask[np.arange(200), 20, np.arange(200) // 10] = True
    grid = as_grid(rasterize_mask(mask, np.diag([*spacing, 1.0]), 16)[0], 16)
    assert grid.any(axis=(1, 2)).all() and ndimage.label(grid, np.ones((3, 3, 3)))[1] == 1


def test_aspect_is_kept_and_the_longest_edge_fills_the_cube():
    mask = np.ones((40, 20, 10), bool)
    voxels, frame = rasterize_mask(mask, np.diag([1.0, 1, 1, 1]), 20, "solid")
    assert (np.ptp(voxels, axis=0) + 1).tolist() == [20, 10, 6]  # 5 cells, in the middle of 20: a half on each side
    assert frame.mm_per_cell == 2 and frame.center == (19.5, 9.5, 4.5)


def test_wrong_arguments():
    with pytest.raises(DataError, match="empty"):
        rasterize_mask(np.zeros((3, 3, 3), bool), AFFINE, 8)
    with pytest.raises(DataError, match="singular"):
        rasterize_mask(hook(), FLAT, 8)
    with pytest.raises(ConfigError, match="fill 'full'"):
        rasterize_mask(hook(), AFFINE, 8, "full")


def voxel_faces(mask: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh of a mask's border: two triangles for each voxel's side that has no voxel behind it."""
    padded, quads = np.pad(mask, 1), []
    for axis in range(3):
        square = np.array(list(itertools.product((0, 1), repeat=2)))[[0, 1, 3, 2]]
        corners = np.insert(square, axis, 0, axis=1)
        for shift, place in ((1, 0), (-1, 1)):
            border = np.argwhere(padded & ~np.roll(padded, shift, axis)) - 1
            quads.append(border[:, None] + corners + np.eye(3, dtype=int)[axis] * place - 0.5)
    corners = np.concatenate(quads)  # [Q, 4, 3]
    numbers = np.arange(4 * len(corners)).reshape(-1, 4)
    world = corners.reshape(-1, 3) @ affine[:3, :3].T + affine[:3, 3]
    return world, np.concatenate([numbers[:, [0, 1, 2]], numbers[:, [0, 2, 3]]])


@pytest.mark.parametrize("label", ELLIPSOIDS)
@pytest.mark.parametrize("resolution", [16, 64])
def test_an_organ_as_mesh_and_as_label_map_agrees(label, resolution):
    """The border of its voxels as a mesh in world coordinates fills the same cube.

    Cells that the mesh does not meet are wholly inside or outside, so there both grids are the same.
    """
    pytest.importorskip("numba")
    from trellis.grids.meshes import voxelize_mesh
    from trellis.grids.placing import normalize_cube

    mask = SCAN == label
    vertices, faces = voxel_faces(mask, AFFINE)
    shell = as_grid(voxelize_mesh(normalize_cube(vertices), faces, resolution), resolution)
    whole = ndimage.binary_fill_holes(shell)
    surface, solid = (as_grid(rasterize_mask(mask, AFFINE, resolution, fill)[0], resolution) for fill in volumes.FILLS)
    assert not (solid & ~whole).any() and not (whole & ~shell & ~solid).any()
    iou = (whole & solid).sum() / whole.sum()
    assert iou > (0.89 if resolution == 64 else 0.74), iou
    # Every cell of the surface is met by the mesh or beside such a cell.
    assert ndimage.binary_dilation(shell, np.ones((3, 3, 3)))[surface].all()


@pytest.mark.parametrize("label", ELLIPSOIDS)
def test_an_organ_by_marching_cubes_agrees(label, tmp_path):
    """A smooth mesh, from where voxels meet: its surface is that of the label map within two cells, compared in mm."""
    pytest.importorskip("numba")
    measure = pytest.importorskip("skimage.measure")
    from trellis.grids.meshes import voxelize_mesh
    from trellis.grids.placing import normalize_cube

    vertices, faces, _, _ = measure.marching_cubes(np.pad(SCAN == label, 1).astype(np.float32), 0.5)
    world = (vertices - 1) @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    low, high = world.min(axis=0), world.max(axis=0)
    grid = as_grid(voxelize_mesh(normalize_cube(world), faces, 64), 64)
    _, by_label = rasterize_mask(SCAN == label, AFFINE, 64)
    by_mesh = Frame(tuple((low + high) / 2), float((high - low).max() / 64), "surface", AFFINE, SHAPE)
    write_nifti(tmp_path / "mesh.nii.gz", grid, by_mesh)
    assert abs(by_mesh.mm_per_cell / by_label.mm_per_cell - 1) < 0.05
    back = read_volume(tmp_path / "mesh.nii.gz").layers[0] == 1
    assert dice(back, SCAN == label) > 0.95


# --- the way back ---


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("name", ["back.nii", "back.nii.gz"])
@pytest.mark.parametrize("fill, resolution, least", [("solid", 64, 1), ("surface", 64, 1), ("surface", 16, 0.85)])
def test_a_grid_goes_back_into_its_scan(fill, resolution, least, name, tmp_path):
    for item in objects_of(volume_of(SCAN), None, False):
        voxels, frame = rasterize_object(item, resolution, fill)
        write_nifti(tmp_path / name, as_grid(voxels, resolution), Frame.from_json(frame.to_json()))
        image = nibabel.load(tmp_path / name)
        assert image.shape == SHAPE and image.header["sform_code"] > 0
        np.testing.assert_array_equal(image.affine, AFFINE)
        back = read_volume(tmp_path / name)
        assert set(np.unique(back.layers[0])) == {0, 1} and back.notes == ()
        assert dice(back.layers[0] == 1, SCAN == item.labels[0]) >= least


def test_a_frame_is_one_line_of_json():
    _, frame = rasterize_mask(hook(), AFFINE, 16, "solid")
    text = frame.to_json()
    assert "\n" not in text and json.loads(text)["mm_per_cell"] == frame.mm_per_cell
    again = Frame.from_json(text)
    assert again._replace(affine=None) == frame._replace(affine=None) and np.array_equal(again.affine, frame.affine)
    values = json.loads(text)
    for field, value in [("shape", [70, 64, 0]), ("shape", [10**6] * 3), ("shape", [1, 2]), ("mm_per_cell", -1),
                         ("center", [1, 2]), ("fill", "half"), ("affine", [1, 2]), ("affine", None)]:  # fmt: skip
        with pytest.raises(DataError):
            Frame.from_json(json.dumps({**values, field: value}))
    with pytest.raises(DataError, match="cannot be read"):
        Frame.from_json("{}")
    with pytest.raises(ConfigError, match="as .nii or .nii.gz"):
        write_nifti(Path("a.nrrd"), hook(), frame)


# --- surfaces with holes ---


CELLS = np.indices((64,) * 3) - 31.5  # [3, 64, 64, 64]
FROM_AXIS = np.hypot(CELLS[0], CELLS[1])
BODIES = {
    "ellipsoid": (CELLS[0] / 31.9) ** 2 + (CELLS[1] / 22) ** 2 + (CELLS[2] / 14) ** 2 <= 1,
    "box": (abs(CELLS[0]) < 32) & (abs(CELLS[1]) < 20) & (abs(CELLS[2]) < 10),
    "torus": (FROM_AXIS - 10) ** 2 + CELLS[2] ** 2 <= 64,  # its hole is four cells wide
    "vessel": (CELLS[1] - 6 * np.sin(CELLS[0] / 8)) ** 2 + CELLS[2] ** 2 <= 9,
}


def surface_of(solid: np.ndarray) -> np.ndarray:
    return solid & ~ndimage.binary_erosion(solid)


@pytest.mark.parametrize("missing", [0, 1, 80])
@pytest.mark.parametrize("name", BODIES)
def test_a_surface_with_small_holes_is_filled(name, missing, tmp_path):
    surface = surface_of(BODIES[name])
    cells = np.argwhere(surface)
    surface[tuple(np.random.default_rng(0).permutation(cells)[:missing].T)] = False
    filled, closed = volumes.fill_surface(surface)
    assert closed and dice(filled, BODIES[name]) >= 0.97 and (filled & ~BODIES[name]).sum() <= 2
    frame = Frame((31.5,) * 3, 1, "surface", np.eye(4), (64,) * 3)
    assert write_nifti(str(tmp_path / "a.nii"), surface, frame)
    assert np.array_equal(nibabel.load(tmp_path / "a.nii").get_fdata() == 1, filled)


def test_a_closed_surface_is_filled_as_it_is():
    for solid in BODIES.values():
        assert np.array_equal(volumes.fill_surface(surface_of(solid))[0], solid)


@pytest.mark.parametrize("width, filled", [(4, True), (8, False), (12, False)])
def test_a_surface_with_a_large_hole_stays_open_and_says_so(width, filled, tmp_path):
    solid = BODIES["box"]
    surface = surface_of(solid)
    middle = slice(32 - width // 2, 32 + width // 2)
    surface[middle, middle, 40:] = False
    found, closed = volumes.fill_surface(surface)
    assert closed == filled and (dice(found, solid) > 0.97) == filled
    frame = Frame((31.5,) * 3, 1, "surface", np.eye(4), (64,) * 3)
    assert write_nifti(tmp_path / "a.nii", surface, frame) == filled
    assert write_nifti(tmp_path / "b.nii", surface, frame._replace(fill="solid"))
    if not filled:
        assert np.array_equal(found, surface)


def vessels() -> np.ndarray:
    """Return twenty winding branches, two cells thick, with narrow spaces between them."""
    mask, random = np.zeros((64,) * 3, bool), np.random.default_rng(0)
    for _ in range(20):
        place, step = np.array([2.0, 32, 32]), np.array([1.0, 0, 0])
        while (place >= 2).all() and (place < 62).all() and mask.mean() < 0.2:
            mask[tuple(slice(int(p) - 1, int(p) + 1) for p in place)] = True
            step = step + random.normal(0, 0.3, 3)
            step /= np.linalg.norm(step)
            place = place + step
    return mask


def test_the_space_between_thin_parts_stays_empty():
    ring = (FROM_AXIS - 24) ** 2 + CELLS[2] ** 2 <= 2
    bar = np.isin(np.arange(64) % 8, (4, 5))  # a cage, with windows of six cells
    cage = sum(part.astype(int) for part in np.ix_(bar, bar, bar)) >= 2
    for solid in (ring, vessels(), cage):
        found, _ = volumes.fill_surface(surface_of(solid))
        assert np.array_equal(found, ndimage.binary_fill_holes(surface_of(solid)))
    assert volumes.fill_surface(ring)[1] and volumes.fill_surface(vessels())[1]


# --- arrays and binvox ---


def binvox_bytes(grid: np.ndarray, version: int = 1, more: str = "translate 0 0 0\nscale 1\n") -> bytes:
    """Runs along y, then z, then x."""
    flat = grid.transpose(0, 2, 1).ravel().astype(np.uint8)
    runs = bytearray()
    place = 0
    while place < len(flat):
        length = 1
        while length < 255 and place + length < len(flat) and flat[place + length] == flat[place]:
            length += 1
        runs += bytes([flat[place], length])
        place += length
    x, y, z = grid.shape
    return f"#binvox {version}\ndim {x} {z} {y}\n{more}data\n".encode() + bytes(runs)


def save_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def save_npz(packed: bool = True, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, **arrays)
    return file.getvalue()


ARRAYS = {
    "bool.npy": lambda: save_npy(hook()),
    "fortran.npy": lambda: save_npy(np.asfortranarray(hook())),
    "255.npy": lambda: save_npy(hook() * np.uint8(255)),
    "float.npy": lambda: save_npy(hook() * np.float32(0.9999)),
    "batch.npy": lambda: save_npy(hook()[None, None]),
    "channel.npy": lambda: save_npy(hook()[..., None]),
    "one.npz": lambda: save_npz(grid=hook(), spacing=np.ones(3), name=np.array("hook")),
    "stored.npz": lambda: save_npz(False, grid=hook()),
    "a.binvox": lambda: binvox_bytes(hook()),
    "plain.binvox": lambda: binvox_bytes(hook(), more=""),
    "second.binvox": lambda: binvox_bytes(hook() * 7, 2),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_occupancy_is_read_from_arrays(name, tmp_path):
    (tmp_path / name).write_bytes(ARRAYS[name]())
    occupied = read_occupancy(tmp_path / name)
    assert occupied.dtype == bool and np.array_equal(occupied, hook())
    volume = read_volume(tmp_path / name)
    assert np.array_equal(volume.layers[0] != 0, hook()) and np.array_equal(volume.affine, np.eye(4))
    assert len(volume.notes) == 1


class Pickled:
    pass


REFUSED_ARRAYS = {
    "labels.npy": (lambda: save_npy(SCAN), "the values 1 and 5 beside 0.*--labels"),
    "empty.npy": (lambda: save_npy(np.zeros((4, 4, 4))), "no occupied voxel"),
    "sized0.npy": (lambda: save_npy(np.zeros((4, 0, 4))), "no voxel"),
    "fraction.npy": (lambda: save_npy(hook() * 0.5), r"is 0.5, not a whole number"),
    "points.npy": (lambda: save_npy(np.zeros((50, 3))), "50 x 3"),
    "times.npy": (lambda: save_npy(np.zeros((2, 3, 4, 5))), "2 x 3 x 4 x 5"),
    "objects.npy": (lambda: save_npy(np.array([Pickled()], dtype=object)), "Python objects"),
    "cut.npy": (lambda: save_npy(hook())[:-20], "truncated"),
    "large.npy": (lambda: save_npy(hook()).replace(b"(9, 8, 7), }", b"(900,800,70)}"), "promises 50400000 bytes"),
    "huge.npy": (lambda: save_npy(hook()).replace(b"(9, 8, 7), }   ", b"(9999,999,999)}"), "more than"),
    "several.npz": (lambda: save_npz(a=hook(), b=SCAN), r"2 arrays.*a \(9 x 8 x 7\), b \(70 x 64 x 30\)"),
    "packed.npz": (lambda: save_npz(bits=np.zeros((2, 8), np.uint8)), "packed file of grids"),
    "cut.npz": (lambda: save_npz(grid=SCAN)[:-40], "cannot be read"),
    "damaged.npz": (lambda: spoil(save_npz(grid=NOISE), 3000), "cannot be read"),
    "places.npz": (lambda: save_npz(grid=SCAN)[50:], "cannot be read"),
    "cut.binvox": (lambda: binvox_bytes(hook())[:-2], "runs make"),
    "odd.binvox": (lambda: binvox_bytes(hook())[:-1], "runs make"),
    "huge.binvox": (lambda: binvox_bytes(hook()).replace(b"dim 9", b"dim 99999999"), "runs make"),
    "dim.binvox": (lambda: binvox_bytes(hook()).replace(b"dim", b"dom"), "no line dim"),
    "nothing.npz": (lambda: b"", "0 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_ARRAYS)
def test_an_array_that_is_no_occupancy_is_refused(name, tmp_path):
    make, reason = REFUSED_ARRAYS[name]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match=reason):
        read_occupancy(tmp_path / name)


def test_a_zip_that_claims_more_than_it_holds_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("grid.npy", save_npy(hook()).replace(b"(9, 8, 7), }", b"(900,900,90)}"))
    with pytest.raises(DataError, match="promises 72900000 bytes"):
        read_occupancy(tmp_path / "bomb.npz")


def test_an_array_fills_the_cube_unless_it_is_a_grid_already():
    small = np.pad(hook(), 5)
    assert np.array_equal(rasterize_occupancy(small, 16), rasterize_mask(hook(), np.eye(4), 16)[0])
    grid = np.zeros((16, 16, 16), bool)
    grid[2:5, 3:7, 4:9] = True
    assert np.array_equal(rasterize_occupancy(grid, 16, "solid"), np.argwhere(grid))
    surface = grid.copy()
    surface[3:4, 4:6, 5:8] = False
    assert np.array_equal(rasterize_occupancy(grid, 16), np.argwhere(surface))
    with pytest.raises(DataError, match="no occupied voxel"):
        rasterize_occupancy(np.zeros((16, 16, 16), bool), 16)


def test_a_file_becomes_the_grids_of_its_objects(tmp_path):
    path = write_gz(tmp_path)
    labels = load_labels(table(tmp_path, '{"liver": 1, "heart": 7, "all": [1, 5]}'))
    liver, heart, both = volumes.grids_of_file(path, 32, labels, fill="solid")
    for found, mask in ((liver, SCAN == 1), (both, SCAN > 0)):
        voxels, frame = rasterize_mask(mask, AFFINE, 32, "solid")
        assert np.array_equal(found.voxels, voxels)
        assert found.frame.to_json() == frame.to_json()
    assert (liver.name, liver.labels, both.labels) == ("liver", (1,), (1, 5)) and isinstance(heart, LeftOut)
    parts = [found for found in volumes.grids_of_file(path, 32, components=True)]
    assert [part.name for part in parts] == ["1_1", "5_1"]


def test_an_array_is_occupancy_or_labels(tmp_path):
    (tmp_path / "a.npy").write_bytes(save_npy(np.pad(hook(), 3)))
    (whole,) = volumes.grids_of_file(tmp_path / "a.npy", 16)
    assert (whole.name, whole.frame, whole.notes) == ("", None, ())
    assert np.array_equal(whole.voxels, rasterize_mask(hook(), np.eye(4), 16)[0])
    (turned,) = volumes.grids_of_file(tmp_path / "a.npy", 16, y_up=True)
    assert np.array_equal(turned.voxels, rasterize_mask(turn_mask_to_z_up(hook()), np.eye(4), 16)[0])
    (tmp_path / "b.npy").write_bytes(save_npy(SCAN))
    one, five = volumes.grids_of_file(tmp_path / "b.npy", 16, components=True, y_up=True)
    assert (one.frame, five.name, len(one.notes)) == (None, "5_1", 1)
    assert np.array_equal(one.voxels, rasterize_mask(turn_mask_to_z_up(SCAN == 1), np.eye(4), 16)[0])


def test_turning_a_mask_is_turning_its_points():
    from trellis.grids.placing import turn_voxels_to_z_up

    mask = np.random.default_rng(0).random((8, 8, 8)) < 0.3
    turned = turn_mask_to_z_up(mask)
    assert set(map(tuple, np.argwhere(turned))) == set(map(tuple, turn_voxels_to_z_up(np.argwhere(mask), 8)))
    assert turn_mask_to_z_up(np.zeros((2, 3, 4))).shape == (2, 4, 3)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    import sys

    for package, install, name in [("nibabel", "nibabel", "a.nii"), ("nrrd", "pynrrd", "a.nrrd"),
                                   ("highdicom", "highdicom", "a.dcm")]:  # fmt: skip
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_bytes(NII)
        with pytest.raises(ConfigError, match=f"pip install {install}"):
            read_volume(tmp_path / name)


def test_suffixes():
    suffixes = {
        "a.NII.GZ": ".nii.gz",
        "a.nii": ".nii",
        "b.seg.nrrd": ".nrrd",
        "a.gz": "",
        "nii": "",
        "c.Binvox": ".binvox",
    }
    assert {name: volumes.volume_suffix(Path(name)) for name in suffixes} == suffixes
