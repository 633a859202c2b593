"""Pictures of grids: every voxel where it belongs, near ones before far ones, errors in their colors."""

import numpy as np
import pytest
import torch
from helpers import RESOLUTION, run, tiny_config
from PIL import Image

from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids import preview
from trellis.grids.preview import BACKGROUND, contact_sheet, render_difference, render_voxels, save_png
from trellis.models import build, load_weights
from trellis.runs.open import open_run
from trellis.trainers.vae import sparse_structure_vae

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def grid_of(voxels, resolution: int = 64) -> np.ndarray:
    grid = np.zeros((resolution,) * 3, dtype=bool)
    grid[tuple(np.array(voxels).T)] = True
    return grid


def drawn(image: np.ndarray) -> np.ndarray:
    return (image != np.array(BACKGROUND)).any(-1)


def paint(voxels, colors, resolution: int = 64) -> np.ndarray:
    """The picture of voxels in one color each."""
    palette = np.zeros((resolution,) * 3 + (3,))
    palette[tuple(np.array(voxels).T)] = colors
    return render_voxels(grid_of(voxels, resolution), palette)


def of_hue(image: np.ndarray, channel: int) -> np.ndarray:
    """Whether a pixel's channel is well above both others."""
    others = np.delete(image.astype(int), channel, axis=2)
    return image[..., channel] > others.max(-1) + 60


def test_an_empty_grid_is_background_and_the_input_stays_as_it_was():
    image = render_voxels(np.zeros((64,) * 3, dtype=bool))
    assert image.shape == (342, 299, 3) and image.dtype == np.uint8 and not drawn(image).any()
    grid = grid_of([(1, 2, 3)]).astype(np.uint8)
    before = grid.copy()
    render_voxels(grid)
    assert np.array_equal(grid, before)


@pytest.mark.parametrize("axis, right, down", [(0, 7, 4), (1, 7, -4), (2, 0, -8)])
def test_three_cells_along_an_axis_move_the_picture_by_whole_pixels(axis, right, down):
    voxels = np.array([(20, 20, 20), (21, 20, 20), (20, 20, 22)])
    image = render_voxels(grid_of(voxels))
    moved = render_voxels(grid_of(voxels + 3 * np.eye(3, dtype=int)[axis]))
    assert drawn(image).sum() > 20
    assert np.array_equal(moved, np.roll(image, (down, right), axis=(0, 1)))


def test_a_cell_shows_a_bright_top_a_middling_left_and_a_dark_right_side():
    image = render_voxels(grid_of([(0, 0, 0)], 1)).astype(int).sum(-1)
    height, width = image.shape
    top, left, right = (image[int(v * height), int(u * width)] for u, v in ((0.5, 0.25), (0.25, 0.62), (0.75, 0.62)))
    assert top > left + 30 and left > right + 30
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == sum(BACKGROUND)).all()
    assert drawn(render_voxels(grid_of([(0, 0, 0)], 1))).mean() == pytest.approx(0.75, abs=0.02)  # a hexagon


def test_the_nearer_of_two_cells_hides_the_other_whichever_is_drawn_first():
    view = np.array((1, -1, 1))
    for back in ((20, 40, 20), (0, 63, 0)):
        front = back + 15 * view
        both = paint([back, front], [RED, BLUE])
        assert of_hue(both, 2).any() and not of_hue(both, 0).any()
        assert np.array_equal(both, paint([front], [BLUE]))
        assert not of_hue(paint([back, front], [BLUE, RED]), 2).any()
    beside = paint([(20, 40, 20), (40, 40, 20)], [RED, BLUE])
    assert of_hue(beside, 0).sum() > 5 and of_hue(beside, 2).sum() > 5


def test_every_pixel_shows_the_nearest_cell_on_its_ray():
    """Against a search over all voxels for each of many points of the picture."""
    rng = np.random.default_rng(0)
    resolution, enlarge = 6, round(64 / 6)
    voxels = np.argwhere(rng.random((resolution,) * 3) < 0.15)
    hues = rng.integers(0, 3, len(voxels))
    image = paint(voxels, np.eye(3)[hues] * 255, resolution)
    scale = enlarge / preview.SAMPLES
    half, depth, height = (length * scale for length in preview.VOXEL)
    x, y, z = voxels.T
    center_u = (x + y + 1) * half
    center_v = (x - y + resolution) * depth + (resolution - 1 - z) * height + height / 2

    compared = {"voxel": 0, "background": 0}
    for v, u in rng.integers(0, image.shape[:2], (3000, 2)):
        du, dv = np.abs(u + 0.5 - center_u), np.abs(v + 0.5 - center_v)
        inside = np.minimum(half - du, depth + height / 2 - dv - du / half * depth)  # > 0 in the outline
        if (np.abs(inside) < 1.5).any():  # the pixel may show two voxels
            continue
        hit = np.flatnonzero(inside > 0)
        if not hit.size:
            assert tuple(image[v, u]) == BACKGROUND or image[v, u].min() > 150  # or the outline beside a voxel
            compared["background"] += 1
        else:
            nearest = hit[np.argmax((x - y + z)[hit])]
            assert image[v, u].argmax() == hues[nearest] and np.delete(image[v, u], hues[nearest]).max() == 0
            compared["voxel"] += 1
    assert min(compared.values()) > 100


def test_a_cell_without_a_visible_face_changes_nothing():
    box = np.zeros((16,) * 3, dtype=bool)
    box[4:12, 4:12, 4:12] = True
    palette = np.zeros((16, 16, 16, 3)) + RED
    palette[5:11, 5:11, 5:11] = BLUE
    assert not of_hue(render_voxels(box, palette), 2).any()


@pytest.mark.parametrize("resolution", [1, 2, 5, 16, 48, 128])
def test_pictures_of_any_resolution_hold_the_whole_cube(resolution):
    image = render_voxels(np.ones((resolution,) * 3))
    assert drawn(image).mean() == pytest.approx(0.75, abs=0.03)
    assert 220 <= image.shape[1] <= 340 and image.shape[0] == pytest.approx(image.shape[1] * 8 / 7, abs=2)


def test_a_grid_that_is_no_cube_is_refused():
    with pytest.raises(ValueError, match=r"\[4, 4, 5\]"):
        render_voxels(np.zeros((4, 4, 5)))


# --- difference ---


def shell(resolution: int = 32) -> np.ndarray:
    axis = np.arange(resolution) - resolution / 2 + 0.5
    radius = np.linalg.norm(np.stack(np.meshgrid(axis, axis, axis, indexing="ij")), axis=0)
    return (radius < resolution * 0.4) & (radius > resolution * 0.4 - 1.5)


def test_missing_cells_are_red_and_extra_cells_blue():
    target = shell()
    assert drawn(render_difference(target, target)).any()
    same = render_difference(target, target).astype(int)
    assert (same.max(-1) - same.min(-1)).max() < 20  # gray

    broken = target.copy()
    broken[:, :16] = False  # the half that is seen
    missing, extra = render_difference(target, broken), render_difference(broken, target)
    assert of_hue(missing, 0).sum() > 1000 and not of_hue(missing, 2).any()
    assert of_hue(extra, 2).sum() > 1000 and not of_hue(extra, 0).any()
    assert np.array_equal(drawn(missing), drawn(extra))
    assert (of_hue(missing, 0) == of_hue(extra, 2)).mean() > 0.99


def test_a_wrong_cell_behind_others_shines_through_faintly():
    target = shell()
    hidden = target.copy()
    hidden[15:17, 15:17, 15:17] = True  # inside
    seen, plain = render_difference(target, hidden).astype(int), render_difference(target, target).astype(int)
    assert not of_hue(seen, 2).any()
    tinted = (seen != plain).any(-1)
    assert 20 < tinted.sum() < 2000
    assert (seen - plain)[tinted, 2].mean() > (seen - plain)[tinted, 0].mean() + 15


# --- contact sheet and file ---


def test_a_sheet_holds_the_pictures_of_all_objects():
    target, broken = shell(), shell() & (np.indices((32,) * 3)[2] < 20)
    sheet = contact_sheet([(target, broken, "a ball"), (broken, broken, "half a ball")])
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    for picture in (
        render_voxels(target),
        render_voxels(broken),
        render_difference(target, broken),
        render_difference(broken, broken),
    ):
        rows, columns = np.nonzero(drawn(picture))
        part = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        windows = np.lib.stride_tricks.sliding_window_view(sheet, part.shape)[:, :, 0]
        probe = ((windows[:, :, 40, 40] == part[40, 40]) & (windows[:, :, 60, 50] == part[60, 50])).all(-1)
        assert any(np.array_equal(windows[place], part) for place in map(tuple, np.argwhere(probe)))


def test_many_objects_stand_two_by_two_and_all_are_captioned():
    rows = [(grid_of([(4, 4, z)], 16), grid_of([(4, 4, z)], 16), "") for z in range(5)]
    four, five = contact_sheet(rows[:4]), contact_sheet(rows)
    assert five.shape[1] == 2 * four.shape[1] and five.shape[0] < four.shape[0]
    named = contact_sheet([(target, reconstruction, "name") for target, reconstruction, _ in rows])
    changed = (named != five).any(-1)
    lines = np.flatnonzero(np.diff(np.concatenate([[0], changed.any(1), [0]])) == 1)
    assert len(lines) == 3 and changed[:, : four.shape[1]].any() and changed[:, four.shape[1] :].any()
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_a_long_caption_loses_its_middle_and_leaves_the_counts_alone():
    shorten = preview._shorten
    assert shorten("two\n lines", lambda text: True) == "two lines"
    assert shorten("abcdefghij", lambda text: len(text) <= 6) == "abc…ij"
    assert shorten("abcdefghij", lambda text: len(text) <= 10) == "abcdefghij"

    target = shell()
    short, long = (contact_sheet([(target, target, text)]) for text in ("", "very long " * 40))
    changed = np.flatnonzero((short != long).any((0, 2)))
    assert short.shape == long.shape and changed.size
    text = np.flatnonzero((short[-40:] != np.array(BACKGROUND)).any((0, 2)))
    assert changed.max() < text[text > 500].min() and changed.min() < 20


def test_a_saved_picture_comes_back_and_a_failure_leaves_the_old_one(tmp_path):
    image = render_voxels(shell())
    save_png(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as file:
        assert file.format == "PNG" and np.array_equal(np.asarray(file), image)
    with pytest.raises(TypeError):
        save_png(tmp_path / "a.png", image.astype(np.complex64))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as file:
        assert np.array_equal(np.asarray(file), image)


@torch.no_grad()
def test_a_run_draws_held_out_objects_as_its_averaged_models_reconstruct_them(
    data_dir, write_config, tmp_path, monkeypatch
):
    """With real pictures, which conftest.py replaces in the runs of other tests."""
    monkeypatch.setattr(sparse_structure_vae, "contact_sheet", contact_sheet)
    config = write_config(tiny_config(max_steps=1))
    with torch.enable_grad():
        assert run("--config", config, "--data_dir", data_dir, "--output_dir", tmp_path) == 0
    opened, dataset = open_run(tmp_path), SparseStructure(data_dir, resolution=RESOLUTION, split="val")
    encoder, decoder = (build(opened.config["models"][name]) for name in ("encoder", "decoder"))
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        load_weights(model, opened.weight_file(name))
        model.eval()
    rows = []
    for index in range(len(dataset)):
        ss = dataset[index]["ss"][None]
        occupied = decoder(encoder(ss.float()))[0, 0] > 0
        rows.append((ss[0, 0].numpy(), occupied.numpy(), dataset.name(index)))
    picture = np.asarray(Image.open(tmp_path / "samples" / "reconstruction_step0000001.png"))
    assert np.array_equal(picture, contact_sheet(rows))
