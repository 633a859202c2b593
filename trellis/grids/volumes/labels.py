"""From labels to objects: tables of names, groups, connected components, and what is left out.

An object is the voxels of a label, of a group of labels, or of one connected component of them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...utils.errors import ConfigError, DataError
from .label_names import TABLES
from .volume import Volume, require

MIN_VOXELS = 27  # of the scan, 3^3; less has no shape
MOST_UNLISTED = 1000  # values that no table names; more are an image's
MANY_UNLISTED = 100  # from here on neighbors must be alike for a label map
MASK_VALUES = (1, 255)  # of masks of one organ
LARGEST_RANGE = 1 << 20  # labels that are counted by a table; those farther apart are sorted
SIDES = (("left", "right"), ("back", "front"), ("bottom", "top"))  # low and high end of x, y, z


class Labels(NamedTuple):
    """The objects that a scan is divided into.

    groups: {name of the object: its labels}.
    source: where they come from, for messages.
    """

    groups: dict[str, tuple[int, ...]]
    source: str


class LabelObject(NamedTuple):
    """The voxels of an object of a scan.

    mask: [X, Y, Z] bool, cropped to the object.
    offset: [3] ints, where the crop begins in the scan.
    affine, shape: those of the whole scan.
    """

    name: str
    labels: tuple[int, ...]
    mask: np.ndarray
    offset: tuple[int, ...]
    affine: np.ndarray
    shape: tuple[int, ...]
    notes: tuple[str, ...] = ()


class LeftOut(NamedTuple):
    """An object that a scan does not give, and why."""

    name: str
    reason: str


def load_labels(source: str) -> Labels:
    """Return the objects that a table of labels names.

    source: the name of a table in `label_names`, such as "totalsegmentator", or a JSON file. That holds one object,
        whose entries are `"1": "liver"` or `"liver": 1` or, for a group, `"lungs": [10, 11, 12]`. A name that is given
        to several labels groups them. nnU-Net's dataset.json is read too: its entry `labels`. Label 0 is the
        background and may be named only so. Two names for the same labels are refused.
    Raise ConfigError naming the file and the entry.
    """
    if source in TABLES:
        return Labels({name: (label,) for label, name in TABLES[source].items()}, source)
    try:
        table = json.loads(Path(source).read_bytes().decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except OSError as error:
        tables = ", ".join(TABLES)
        raise ConfigError(
            f"{source}: cannot be read ({error.strerror}). Give a JSON file or one of: {tables}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: is not a JSON table of labels ({error}). Mend it.") from error
    if isinstance(table, dict) and isinstance(table.get("labels"), dict):
        table = table["labels"]
    if not isinstance(table, dict):
        raise ConfigError(f'{source}: must be an object such as {{"1": "liver"}}, not {json.dumps(table)[:60]}.')
    groups: dict[str, tuple[int, ...]] = {}
    for key, value in table.items():
        name, labels = _entry(source, key, value)
        if 0 in labels:
            if name.lower() != "background" or len(labels) > 1:
                raise ConfigError(f"{source}: {key!r}: {value!r} names label 0, the background. Leave it out.")
            continue
        groups[name] = tuple(dict.fromkeys((*groups.get(name, ()), *labels)))
    names: dict[frozenset[int], str] = {}
    for name, labels in groups.items():
        other = names.setdefault(frozenset(labels), name)
        if other != name:
            which = f"label {labels[0]} has" if len(labels) == 1 else f"the labels {_some(list(labels))} have"
            raise ConfigError(f"{source}: {which} two names, {other!r} and {name!r}. Take one out.")
    if not groups:
        raise ConfigError(f'{source}: names no label. Write entries such as "1": "liver".')
    return Labels(groups, source)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return table


def _entry(source: str, key: str, value: object) -> tuple[str, tuple[int, ...]]:
    """Return the name and the labels of an entry of a table."""
    if isinstance(value, str) and key.strip().removeprefix("-").isdecimal():
        name, labels = value, [int(key)]
    elif isinstance(value, list) and value and all(type(label) is int for label in value):
        name, labels = key, value
    elif type(value) is int:  # true and false are ints too
        name, labels = key, [value]
    else:
        shown = json.dumps({key: value})[1:-1][:80]
        raise ConfigError(f'{source}: {shown} must be like "1": "liver", "liver": 1 or "lungs": [10, 11].')
    if not name.strip():
        raise ConfigError(f"{source}: the name of label {labels[0]} is empty. Give one.")
    return name.strip(), tuple(labels)


def objects_of(
    volume: Volume, labels: Labels | None, components: bool, file_name: str = ""
) -> Iterator[LabelObject | LeftOut]:
    """Yield each object of a scan, or why it is left out: the scan lacks it, or it has fewer than MIN_VOXELS voxels.

    labels: what to take. None takes every label but 0, with the name that the file gives it, else its number; a segment
        without voxels is left out. Of the tables in `label_names`, which name all that a body may have, what a scan
        lacks is passed over. An object of one label that the file calls otherwise has a note.
    components: take each connected part by itself (26 neighbors: voxels that share a corner are connected), as
        "liver_1", "liver_2" …, the largest first.
    file_name: without its suffix. A mask, which has no label but 1 or 255 and no names of its own, is the object that
        its file is named after, such as TotalSegmentator's liver.nii.gz: without labels always, else if they name it.
        A mask that they name by its number alone has a note.
    An object that reaches the border of the scan may be cut off: a note says on which side.
    Raise DataError if the scan has no label, or so many that it is an image, or if it may be a mask of any organ.
    """
    boxes = [_boxes(layer) for layer in volume.layers]
    present = sorted(set().union(*boxes))
    listed = {label for group in labels.groups.values() for label in group} if labels else set(volume.names)
    unlisted = [label for label in present if label not in listed]
    remedy = "name its labels with --labels"
    if labels:
        remedy = f"name all its labels in {'a JSON file' if labels.source in TABLES else labels.source}"
    if len(unlisted) > MOST_UNLISTED or len(unlisted) > MANY_UNLISTED and not any(map(_is_patchy, volume.layers)):
        raise DataError(
            f"has {len(present)} values, from {present[0]} to {present[-1]}: an image, not a label map. If it is one, "
            f"{remedy}"
        )
    if not present:
        raise DataError("has no label: every voxel is 0")
    groups = labels.groups if labels else _default_groups(volume, present)
    by_number = False
    if len(present) == 1 and present[0] in MASK_VALUES and not volume.names and file_name:
        name = _name_of_mask(file_name, present[0], labels)
        if labels and name and name not in groups:
            yield LeftOut(name, f"is a mask by the name of its file, of what {labels.source} does not name")
            return
        if name:
            groups, labels = {name: (present[0],)}, None
        by_number = labels is not None
    if labels and not any(label in listed for label in present):
        raise DataError(f"has the labels {_some(present)}, none of which {labels.source} names")
    there = set(present)
    for name, group in groups.items():
        found = [label for label in group if label in there]
        if not found:
            if labels is None or labels.source not in TABLES:
                text = f"label {group[0]}" if len(group) == 1 else f"any of the labels {_some(list(group))}"
                yield LeftOut(name, f"is not in this scan: no voxel has {text}")
            continue
        crop, mask = _mask(volume, boxes, found)
        called = volume.names.get(group[0], name) if labels and len(group) == 1 else name
        notes = () if _plain(called) == _plain(name) else (f"its file names label {group[0]} {called!r}",)
        if by_number:
            notes = (*notes, f"has only label {present[0]}, taken as {name}; the file is called {file_name}")
        if components:
            yield from _components(volume, name, tuple(found), crop, mask, notes)
        else:
            yield _checked(volume, name, tuple(found), crop, mask, notes)
    if labels and unlisted:
        some = f"label{'s' * (len(unlisted) > 1)} " + _some([volume.names.get(label, str(label)) for label in unlisted])
        yield LeftOut(some, f"{some} {'is' if len(unlisted) == 1 else 'are'} not in {labels.source}")


def _plain(name: str) -> str:
    """Return a name without what may differ between two spellings: case, spaces and signs."""
    return "".join(filter(str.isalnum, name.casefold()))


def organ_of_name(file_name: str, labels: Labels) -> str:
    """Return the object of labels, or of a table in `label_names`, that a file is named after; "" if it is after none.

    file_name: without its suffix.
    """
    known = {name.casefold(): name for table in TABLES.values() for name in table.values()}
    known.update((name.casefold(), name) for name in labels.groups)
    return known.get(file_name.casefold(), "")


def _name_of_mask(file_name: str, value: int, labels: Labels | None) -> str:
    """Return the object that a mask is by the name of its file, "" if its value says which.

    Raise DataError if neither says for sure.
    """
    name = file_name if labels is None else organ_of_name(file_name, labels)
    if not name and labels and labels.source in TABLES and value in TABLES[labels.source]:
        called = TABLES[labels.source][value]
        raise DataError(
            f"has no label but {value}, so it may be a mask of any organ, or {called} as {labels.source} numbers it. "
            f'Name the file after its organ, or give --labels a JSON file such as {{"{called}": {value}}}'
        )
    return name


def _is_patchy(layer: np.ndarray) -> bool:
    """Return whether most neighbors along an axis are equal, as in a label map, where neither is 0."""
    for axis in range(3):
        turned = np.moveaxis(layer, axis, 0)
        both = equal = 0
        for one, other in zip(turned[:-1], turned[1:], strict=True):
            inside = (one != 0) & (other != 0)
            both += int(np.count_nonzero(inside))
            equal += int(np.count_nonzero(inside & (one == other)))
        if 2 * equal > both:
            return True
    return False


def _default_groups(volume: Volume, present: list[int]) -> dict[str, tuple[int, ...]]:
    """Return an object for each label and each segment, by its name; one that is used twice gets the label's number."""
    empty = volume.names if volume.has_segments else ()
    names = {label: volume.names.get(label, str(label)) for label in {*empty, *present} - {0}}
    given = Counter(names.values())
    return {name if given[name] == 1 else f"{name}_{label}": (label,) for label, name in sorted(names.items())}


def _some(values: list, shown: int = 8) -> str:
    return ", ".join(map(str, values[:shown])) + (f" and {len(values) - shown} more" if len(values) > shown else "")


def _boxes(layer: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """Return the box of each label but 0."""
    ndimage = require("scipy.ndimage")
    turned = layer.flags.f_contiguous and not layer.flags.c_contiguous
    array = layer.T if turned else layer  # nine times as fast along memory
    values = _values(array)
    if not len(values):
        return {}
    if values[0] < 0 or values[-1] >= LARGEST_RANGE:  # find_objects lists all numbers from 1 to the largest
        places = np.empty(array.shape, np.int32)
        for part, target in zip(array, places, strict=True):
            target[...] = np.searchsorted(values, part) + 1
            target[part == 0] = 0
        found = dict(zip(values.tolist(), ndimage.find_objects(places), strict=True))
    else:
        every = ndimage.find_objects(array if array.dtype.itemsize < 8 else array.astype(np.int32))
        found = {int(value): every[value - 1] for value in values}
    return {label: tuple(reversed(box)) if turned else tuple(box) for label, box in found.items()}


def _values(array: np.ndarray) -> np.ndarray:
    """Return the labels but 0 of an array, sorted."""
    low, high = int(array.min()), int(array.max())
    if high - low < LARGEST_RANGE:
        seen = np.zeros(high - low + 1, dtype=bool)
        for part in array:  # in parts: indices take eight bytes a voxel
            seen[part.astype(np.int64).ravel() - low] = True
        values = np.flatnonzero(seen) + low
    else:
        values = np.unique(np.concatenate([np.unique(part) for part in array]))
    return values[values != 0]


def _mask(
    volume: Volume, boxes: list[dict[int, tuple[slice, ...]]], labels: list[int]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """Return the box of some labels that are there, and their mask in it."""
    found = [box[label] for box in boxes for label in labels if label in box]
    crop = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*found, strict=True))
    mask = np.zeros([axis.stop - axis.start for axis in crop], dtype=bool)
    for layer, box in zip(volume.layers, boxes, strict=True):
        here = [label for label in labels if label in box]
        if len(here) == 1:
            mask |= layer[crop] == here[0]
        elif here:
            mask |= np.isin(layer[crop], here)
    return crop, mask


def _components(
    volume: Volume,
    name: str,
    labels: tuple[int, ...],
    crop: tuple[slice, ...],
    mask: np.ndarray,
    notes: tuple[str, ...],
) -> Iterator[LabelObject | LeftOut]:
    """Yield the connected parts of a mask, the largest first, then one LeftOut for all that are too small."""
    ndimage = require("scipy.ndimage")
    parts, number = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=number + 1)[1:]
    found = ndimage.find_objects(parts)
    order = [int(part) for part in np.argsort(-sizes, kind="stable") if sizes[part] >= MIN_VOXELS]
    for place, part in enumerate(order, 1):
        box = found[part]
        inside = tuple(
            slice(outer.start + inner.start, outer.start + inner.stop) for outer, inner in zip(crop, box, strict=True)
        )
        yield _checked(volume, f"{name}_{place}", labels, inside, parts[box] == part + 1, notes)
    if len(order) < number:
        small = number - len(order)
        reason = f"{small} of its {number} components have fewer than {MIN_VOXELS} voxels, {sizes.min()} the smallest"
        yield LeftOut(name, reason)


def _checked(
    volume: Volume,
    name: str,
    labels: tuple[int, ...],
    crop: tuple[slice, ...],
    mask: np.ndarray,
    notes: tuple[str, ...],
) -> LabelObject | LeftOut:
    """Return an object with a note on where the scan cuts it, or why it is too small."""
    voxels = int(np.count_nonzero(mask))
    if voxels < MIN_VOXELS:
        return LeftOut(name, f"has {voxels} voxels of the scan, fewer than {MIN_VOXELS}")
    sides = []
    for axis, (part, size) in enumerate(zip(crop, volume.shape, strict=True)):
        step = volume.affine[:3, axis]
        world = int(np.abs(step).argmax())
        low, high = SIDES[world] if step[world] > 0 else SIDES[world][::-1]
        sides += [low] * (part.start == 0) + [high] * (part.stop == size)
    if sides:
        notes = (*notes, f"reaches the scan's border ({', '.join(sides)}) and may be cut off")
    return LabelObject(name, labels, mask, tuple(part.start for part in crop), volume.affine, volume.shape, notes)
