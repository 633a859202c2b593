"""The viewer as a visitor meets it, in headless Chromium; skipped where Chromium, its driver or selenium is absent.

$TRELLIS_TEST_ARTIFACTS is a folder for pictures of the page at each width, to look at.
"""

import base64
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from helpers import RESOLUTION, make_tokenizer

from trellis.datasets.sparse_structure import SparseStructure
from trellis.grids.meshes import mesh_to_grid
from trellis.grids.voxels import points_to_occupancy, read_ply
from trellis.runs.status import RunStatus
from trellis.viewer import page_state
from trellis.viewer.backend import Backend
from trellis.viewer.code_usage import UsageCounter
from trellis.viewer.uploads import Opener

for name in ("selenium", "dash", "waitress", "numba", "trimesh", "skimage"):
    pytest.importorskip(name)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("needs Chromium and chromedriver", allow_module_level=True)

PANELS = ("mesh", "voxels", "reconstruction", "difference")
PLOT = "const plot = (name) => document.querySelector(`#${name} .js-plotly-plot`);"
SECONDS = 60  # to wait for a picture: without a GPU, drawing is slow


class Page:
    """The page in one browser, driven with as little JavaScript as there can be."""

    def __init__(self, url: str, downloads: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader",
            "--window-size=1400,1000",
            "--hide-scrollbars",
            "--disable-background-networking",
        ):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.downloads = downloads
        self.driver.get(url)

    def find(self, name: str):
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        return self.driver.execute_script(f"return document.getElementById('{name}')?.textContent ?? ''")

    def wait(self, condition, what: str):
        """The first true value of condition()."""
        end = time.monotonic() + SECONDS
        while not (value := condition()):
            assert time.monotonic() < end, f"{what}; the page says: {self.text('message')!r}"
            time.sleep(0.1)
        return value

    def meshes(self, name: str) -> int:
        """How many traces of triangles a panel has on the screen; 0 before it is drawn."""
        return self.driver.execute_script(
            PLOT
            + f"""const gd = plot('panel-{name}');
            const scene = gd && gd._fullLayout && gd._fullLayout.scene && gd._fullLayout.scene._scene;
            return gd && gd.linked && scene && scene.glplot
                ? gd._fullData.filter((trace) => trace.type === 'mesh3d').length : 0"""
        )

    def wait_for_panels(self) -> None:
        for name in (*PANELS, "lattice"):
            self.wait(lambda name=name: self.meshes(name), f"panel {name} is not drawn")

    def cameras(self) -> list[tuple]:
        eyes = self.driver.execute_script(
            PLOT
            + f"""return {json.dumps([*PANELS, "lattice"])}.map((name) => {{
            const eye = plot('panel-' + name)._fullLayout.scene._scene.getCamera().eye;
            return [eye.x, eye.y, eye.z]; }})"""
        )
        return [tuple(np.round(eye, 6)) for eye in eyes]

    def drop(self, *paths: Path) -> None:
        self.driver.execute_script(
            """
            const transfer = new DataTransfer();
            for (const [name, content] of arguments[0]) {
                const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
            document.getElementById("drop").dispatchEvent(event);
            """,
            [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths],
        )

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def keep_picture(self, name: str) -> None:
        """Write the whole page, to be looked at, if somebody wants to."""
        if folder := os.environ.get("TRELLIS_TEST_ARTIFACTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            picture = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(picture["data"]))

    def boxes(self, selector: str) -> list[tuple[float, float, float, float]]:
        """Left, top, right and bottom of what a selector finds, in pixels of the page."""
        return self.driver.execute_script(
            """return Array.from(document.querySelectorAll(arguments[0])).map((part) => {
            const box = part.getBoundingClientRect();
            return [box.left, box.top + scrollY, box.right, box.bottom + scrollY]; })""",
            selector,
        )

    def cut(self, selector: str) -> list[str]:
        """Texts of what does not fit into its box."""
        return self.driver.execute_script(
            """return Array.from(document.querySelectorAll(arguments[0])).filter((part) =>
            part.scrollWidth > part.clientWidth || part.scrollHeight > part.clientHeight + 1)
            .map((part) => part.textContent)""",
            selector,
        )

    def corners(self, name: str) -> np.ndarray:
        """Where a panel shows the eight corners of the cube, [8, 2]; the picture goes from -1 to 1."""
        *matrices, scale = self.driver.execute_script(
            PLOT
            + f"""const scene = plot('panel-{name}')._fullLayout.scene._scene;
            const {{model, view, projection}} = scene.glplot.cameraParams;
            return [projection, view, model, scene.dataScale].map((numbers) => Array.from(numbers))"""
        )
        cube = np.array(np.meshgrid(*[[0, RESOLUTION]] * 3)).reshape(3, 8) * np.array(scale)[:, None]
        matrix = np.linalg.multi_dot([np.reshape(each, (4, 4), order="F") for each in matrices])
        x, y, _, w = matrix @ np.vstack([cube, np.ones(8)])
        return np.stack([x / w, y / w], 1)

    def check_requests_and_console(self, url: str) -> None:
        """Nothing was asked for elsewhere, and nothing went wrong unseen. Empties both logs."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            urlsplit(entry["params"]["request"]["url"])
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
        ]
        asked = [each for each in asked if each.scheme not in ("data", "blob", "chrome")]
        assert {each.netloc for each in asked} == {urlsplit(url).netloc}
        assert all(each.path.startswith(urlsplit(url).path) for each in asked)
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert [error for error in errors if "/upload?" not in error] == []  # a refused upload has status 400

    def open_curves(self) -> None:
        self.driver.find_element("xpath", "//*[text()='Training curves']").click()
        self.wait(lambda: self.plots() and all(self.plots()), "no curves")

    def plots(self) -> list[list[str]]:
        """Names of the curves of each plot."""
        return self.driver.execute_script(
            """return Array.from(document.querySelectorAll("#curves .js-plotly-plot")).map((gd) =>
            gd._fullData ? gd._fullData.map((trace) => trace.name) : [])"""
        )

    def saved(self, kind: str, name: str) -> Path:
        self.find(f"save-{kind}").click()
        path = self.downloads / name
        self.wait(path.is_file, f"{name} is not downloaded")
        return path


@pytest.fixture(scope="module")
def backend(data_dir, tmp_path_factory) -> Backend:
    run = tmp_path_factory.mktemp("run")
    names = ("loss", "bce_iou", "commit", "grad_norm", "lr", "codebook_usage", "codebook_window_usage")
    names += ("codebook_perplexity", "val/iou", "val/precision", "val/recall", "val/codebook_usage")
    lines = [{"step": 1000 * step, **{name: 0.5 / step for name in names}} for step in range(1, 9)]
    (run / "log.txt").write_text("\n".join(map(json.dumps, lines)))
    with RunStatus(run, shown=False) as status:
        status.set(state="finished", step=8000, max_steps=8000)
    data = SparseStructure(data_dir, resolution=RESOLUTION, split="all")
    return Backend(make_tokenizer(), data, run, "tiny")


@contextmanager
def served(backend: Backend, url_prefix: str = "/") -> Iterator[str]:
    """The address of a page."""
    from trellis.viewer.app import create_app
    from trellis.viewer.serve import listen, make_server

    opener, usage = Opener(workers=1), UsageCounter(backend, 5).start()
    with listen("127.0.0.1", 0) as listener:
        server = make_server(create_app(backend, usage, opener, url_prefix=url_prefix).server, listener, url_prefix)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.effective_port}{url_prefix}"
        finally:
            server.trigger.pull_trigger(server.close)  # in its own thread
            usage.stop()
            opener.close()
            thread.join(10)
            server.task_dispatcher.shutdown()


@pytest.fixture(scope="module")
def url(backend):
    with served(backend) as address:
        yield address


@pytest.fixture(scope="module")
def page(url, tmp_path_factory):
    page = Page(url, tmp_path_factory.mktemp("downloads"))
    yield page
    page.driver.quit()


def bracket(path: Path) -> Path:
    """A mesh that looks different from every side."""
    import trimesh

    parts = [trimesh.creation.box((1, 0.5, 0.15)), trimesh.creation.box((0.15, 0.5, 0.6))]
    parts[1].apply_translation((-0.4, 0, 0.35))
    trimesh.util.concatenate(parts).export(path)
    return path


def test_a_visit(page, url, backend, tmp_path):
    """One visit from the first look to the downloads: the parts build on each other, and a browser is slow to start."""
    from selenium.webdriver.common.action_chains import ActionChains

    # It starts with an object of the data set.
    page.wait_for_panels()
    held_out = next(i for i in range(30) if backend.dataset.entries[i].split == "val")
    assert page.text("caption-voxels").startswith(f"{backend.object(held_out).sum():,} of ")
    page.wait(lambda: "over 5 objects" in page.text("progress"), "codes are not counted")

    # A mesh is dropped.
    path = bracket(tmp_path / "bracket.glb")
    grid = mesh_to_grid(path, RESOLUTION, "z")[0].numpy() > 0
    ids = backend.encode(grid)
    page.drop(path)
    caption = "bracket.glb: 24 triangles; says that y is up, but was taken as z-up"
    page.wait(lambda: page.text("caption-mesh") == caption, "the mesh is not shown")
    page.wait(lambda: page.text("caption-voxels").startswith(f"{grid.sum():,} of "), "its voxels are not shown")
    before = backend.decode(ids)
    page.wait(lambda: page.text("caption-reconstruction") == f"{before.sum():,} voxels", "no reconstruction")
    wrong = f"{(grid & ~before).sum():,} missing, {(before & ~grid).sum():,} extra"
    page.wait(lambda: page.text("caption-difference") == wrong, "no difference")
    page.wait_for_panels()
    assert [page.meshes(name) for name in PANELS] == [1, 1, 1, 3]
    scores = page.text("scores")
    assert f"{backend.scores(grid, before)['iou']:.4f}" in scores and f"{len(ids)}" in scores

    # One panel is turned, and all follow.
    assert len(set(page.cameras())) == 1
    home = page.cameras()[0]
    panel = page.find("panel-voxels")
    ActionChains(page.driver).move_to_element(panel).click_and_hold().move_by_offset(30, 10).release().perform()
    page.wait(lambda: page.cameras()[0] != home and len(set(page.cameras())) == 1, "the cameras are not linked")
    page.find("reset-view").click()
    page.wait(lambda: set(page.cameras()) == {home}, "the view is not reset")

    # A token is clicked in the layer, and gets the code that changes most.
    layer = int(page.text("caption-layer").split()[2])
    token = int(np.ravel_multi_index((1, 2, layer), backend.lattice))
    x, y = page.driver.execute_script(
        PLOT
        + """const gd = plot('layer'), box = gd.getBoundingClientRect();
        const {xaxis, yaxis} = gd._fullLayout;
        return [xaxis.l2p(1) + xaxis._offset - box.width / 2, yaxis.l2p(2) + yaxis._offset - box.height / 2]"""
    )
    mouse = ActionChains(page.driver)
    mouse.move_to_element_with_offset(page.find("layer"), int(x), int(y)).pause(0.3).click().perform()
    page.wait(lambda: page.text("caption-token") == f"number {token}: x 1, y 2, z {layer}", "no token is chosen")
    assert str(ids[token]) in page.text("token")

    def edited(code: int) -> np.ndarray:
        changed = ids.copy()
        changed[token] = code
        return changed

    code = max(range(backend.n_embed), key=lambda code: (backend.decode(edited(code)) ^ before).sum())
    after = backend.decode(edited(code))
    assert (after ^ before).any()
    field = page.wait(lambda: (item := page.find("code")).is_displayed() and item, "no field for the code")
    field.send_keys("\ue009a\ue000", str(code))  # control a
    page.find("edit-set").click()
    text = f"{(after & ~before).sum():,} added by edits{(before & ~after).sum():,} removed"
    page.wait(lambda: page.text("legend-reconstruction") == text, "the edit is not shown")
    assert page.text("caption-reconstruction") == f"{after.sum():,} voxels"
    kinds = 1 + bool((after & ~before).any()) + bool((before & ~after).any())
    page.wait(lambda: page.meshes("reconstruction") == kinds, "the edit is not drawn")
    page.wait(lambda: "the encoder chose" in page.text("token"), "the token does not tell of the edit")
    field.send_keys("\ue009a\ue000", "99999")
    page.find("edit-set").click()
    wrong = f"the code is 99999; it must be a whole number from 0 to {backend.n_embed - 1}"
    page.wait(lambda: page.text("message") == wrong, "a code that is none goes unanswered")

    # Another tab knows nothing of it.
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    page.driver.get(url)
    page.wait(lambda: page.text("caption-reconstruction"), "the second tab is empty")
    assert page.text("caption-voxels").startswith(f"{backend.object(held_out).sum():,} of ")
    assert page.text("legend-reconstruction") == ""
    page.driver.close()
    page.driver.switch_to.window(first)

    # Downloads are of the edited object.
    import trimesh

    facts = json.loads(page.saved("tokens", "bracket_edited_tokens.json").read_text())
    assert facts["tokens"] == edited(code).tolist()
    voxels = points_to_occupancy(read_ply(page.saved("voxels", "bracket_edited_voxels.ply")), RESOLUTION)[0].numpy() > 0
    assert np.array_equal(voxels, after)
    faces = len(backend.tokenizer.to_mesh(torch.from_numpy(edited(code))).faces)
    for kind in ("glb", "ply"):
        assert len(trimesh.load(page.saved(kind, f"bracket_edited_decoded.{kind}"), force="mesh").faces) == faces

    # The edit is taken back.
    page.find("edit-undo").click()
    page.wait(lambda: page.text("legend-reconstruction") == "", "the edit is still there")
    assert page.text("caption-reconstruction") == f"{before.sum():,} voxels"

    # Files that are damaged, or of another kind, are answered with a sentence, and the page goes on.
    for name, content, words in (
        ("broken.glb", path.read_bytes()[:200], "broken.glb: "),
        ("notes.txt", b"hello", "notes.txt: is not one of .glb"),
        ("nothing.glb", b"", "nothing.glb: the file is empty"),
    ):
        (tmp_path / name).write_bytes(content)
        page.drop(tmp_path / name)
        page.wait(lambda words=words: page.text("message").startswith(words), f"{name} goes unanswered")
        assert "Traceback" not in page.text("message")
    more = [tmp_path / name for name in ("broken.glb", "notes.txt", "nothing.glb")]
    page.drop(bracket(tmp_path / "one.glb"), *more)
    page.wait(lambda: page.text("caption-mesh").startswith("one.glb: 24 triangles"), "the first is not shown")
    assert page.text("message") == "4 files came at once: only one.glb was taken."
    page.find("next-object").click()
    second = page_state.new_object(backend, backend.object(held_out), "", "", "z")
    count = page_state.open_object(backend, second, None).grid.sum()
    page.wait(lambda: page.text("caption-voxels").startswith(f"{count:,} of "), "no object after the upload")
    assert page.text("message") == ""

    # The curves.
    page.open_curves()
    assert page.plots()[0] == ["loss", "bce_iou", "commit"] and len(page.plots()) == 6
    assert page.text("state") == "finished, step 8,000 of 8,000"

    page.check_requests_and_console(url)


SIZES = ((420, 900), (1280, 900), (1920, 1080))


def check_layout(page: Page, width: int) -> list:
    """Nothing is cut, lies beside its place or is wider than the window. Where everything is."""
    assert page.driver.execute_script("return document.documentElement.scrollWidth") == width
    assert page.cut(".tile, .tile b, .tile .label, .tile .change, button, .heading, h2, .legend, .token") == []
    tiles = page.boxes(".tile")
    for part in (".label", "b", ".change"):
        parts = zip(page.boxes(f".tile {part}"), tiles, strict=True)
        assert len({round(box[1] - tile[1]) for box, tile in parts}) == 1
    for name in (*PANELS, "lattice"):
        assert np.abs(page.corners(name)).max() < 1, f"{name}: the cube is cut"
    return page.boxes(".panels .panel, .tile, .tokens .panel:not(.wide), .panel .graph")


def test_the_page_fits_its_window_and_an_edit_moves_nothing(page, url):
    page.resize(*SIZES[0])
    page.driver.get(url)
    page.wait_for_panels()
    page.wait(lambda: page.find("code").is_displayed() and page.boxes(".tile"), "no token, no scores")
    page.wait(lambda: "over 5 objects" in page.text("progress"), "codes are not counted")
    drawn = (
        PLOT + "return ['panel-mesh', 'panel-lattice', 'layer'].every((name) => Math.abs(plot(name)._fullLayout.width"
    )
    drawn += " - plot(name).getBoundingClientRect().width) < 1)"
    changes = (
        "return Array.from(document.querySelectorAll('.tile .change')).slice(0, 5).some((part) => part.textContent)"
    )
    for width, height in SIZES:
        page.resize(width, height)
        page.wait(lambda: page.driver.execute_script(drawn), "the panels do not follow the window")
        before = check_layout(page, width)
        page.keep_picture(f"object_{width}")
        if width >= 1280:  # the window is filled, and not more
            assert height - 40 < max(box[3] for box in page.boxes(".panel")) <= height
            assert page.driver.execute_script("return document.documentElement.scrollHeight") == height
        page.find("edit-similar").click()
        page.wait(lambda: page.driver.execute_script(changes), "no score changes")
        page.wait(lambda: page.text("legend-reconstruction"), "the edit is not shown")
        page.keep_picture(f"edited_{width}")
        assert check_layout(page, width) == before
        page.find("edit-reset").click()
        page.wait(lambda: not page.driver.execute_script(changes), "the edit is not taken back")

    # What is cut says itself in full.
    page.driver.execute_script(
        """const caption = document.getElementById("caption-mesh");
        caption.textContent = "a long sentence about a mesh; ".repeat(9);
        caption.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}))"""
    )
    assert page.find("caption-mesh").get_attribute("title") == "a long sentence about a mesh; " * 9

    page.open_curves()
    for width, height in SIZES:
        page.resize(width, height)
        drawn = "return Array.from(document.querySelectorAll('#curves .js-plotly-plot')).every((gd) => Math.abs("
        drawn += "gd._fullLayout.width - gd.getBoundingClientRect().width) < 1)"
        page.wait(lambda drawn=drawn: page.driver.execute_script(drawn), "the curves do not follow the window")
        page.keep_picture(f"curves_{width}")
        panels, plots, legends = (page.boxes(f"#curves {part}") for part in (".panel", ".nsewdrag", ".legend"))
        assert len(panels) == 6 and len({box[0] for box in panels}) == (1 if width == 420 else 3)
        for panel, plot, legend in zip(panels, plots, legends, strict=True):
            assert plot[2] - plot[0] > 250 and plot[3] - plot[1] > 130
            assert panel[0] < legend[0] and legend[2] < panel[2] and legend[3] <= plot[1] + 1
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == width
        if width >= 1280:
            assert height - 40 < max(box[3] for box in panels) <= height


def test_a_page_without_data_takes_meshes_also_behind_a_prefix(page, tmp_path):
    with served(Backend(make_tokenizer()), "/user/jane%40x.org/proxy/8050/") as url:
        page.driver.get_log("performance")  # of the tests before
        page.driver.get(url)
        page.wait(lambda: page.text("caption-mesh") == "drop one to begin", "no page")
        page.find("save-glb").click()
        page.wait(lambda: page.text("message").startswith("there is no object yet"), "no sentence")
        page.driver.execute_script("document.getElementById('file').hidden = false")
        page.find("file").send_keys(str(bracket(tmp_path / "bracket.stl")))
        page.wait(lambda: page.text("caption-mesh") == "bracket.stl: 24 triangles", "the mesh is not shown")
        page.wait_for_panels()
        page.wait(lambda: "there is no data set" in page.text("token"), "no token is shown")
        page.check_requests_and_console(url)
