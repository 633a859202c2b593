"""The viewer as a visitor meets it, in headless Chromium; skipped where Chromium, its driver or selenium is absent."""

import base64
import json
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
from trellis.viewer import page_state
from trellis.viewer.backend import Backend
from trellis.viewer.code_usage import UsageCounter
from trellis.viewer.uploads import Opener

for name in ("selenium", "dash", "numba", "trimesh", "skimage"):
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

    def drop(self, path: Path) -> None:
        self.driver.execute_script(
            """
            const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], arguments[0]));
            const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
            document.getElementById("drop").dispatchEvent(event);
            """,
            path.name,
            base64.b64encode(path.read_bytes()).decode(),
        )

    def check_requests_and_console(self, url: str) -> None:
        """Nothing was asked for elsewhere, and nothing went wrong unseen. Empties both logs."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            urlsplit(entry["params"]["request"]["url"])
            for entry in entries
            if entry["method"] == "Network.requestWillBeSent"
        ]
        hosts = {each.netloc for each in asked if each.scheme not in ("data", "blob", "chrome")}
        assert hosts == {urlsplit(url).netloc}
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert [error for error in errors if "/upload?" not in error] == []  # a refused upload has status 400

    def saved(self, kind: str, name: str) -> Path:
        self.find(f"save-{kind}").click()
        path = self.downloads / name
        self.wait(path.is_file, f"{name} is not downloaded")
        return path


@pytest.fixture(scope="module")
def backend(data_dir, tmp_path_factory) -> Backend:
    run = tmp_path_factory.mktemp("run")
    (run / "log.txt").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25, "lr": 0.1}\n')
    data = SparseStructure(data_dir, resolution=RESOLUTION, split="all")
    return Backend(make_tokenizer(), data, run, "tiny")


@contextmanager
def served(backend: Backend) -> Iterator[str]:
    """The address of a page."""
    from werkzeug.serving import make_server

    from trellis.viewer.app import create_app

    opener, usage = Opener(workers=1), UsageCounter(backend, 5).start()
    server = make_server("127.0.0.1", 0, create_app(backend, usage, opener).server, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        opener.close()


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

    facts = json.loads(page.saved("tokens", "bracket_tokens.json").read_text())
    assert facts["tokens"] == edited(code).tolist()
    voxels = points_to_occupancy(read_ply(page.saved("voxels", "bracket_voxels.ply")), RESOLUTION)[0].numpy() > 0
    assert np.array_equal(voxels, after)
    faces = len(backend.tokenizer.to_mesh(torch.from_numpy(edited(code))).faces)
    for kind in ("glb", "ply"):
        assert len(trimesh.load(page.saved(kind, f"bracket_decoded.{kind}"), force="mesh").faces) == faces

    # The edit is taken back.
    page.find("edit-undo").click()
    page.wait(lambda: page.text("legend-reconstruction") == "", "the edit is still there")
    assert page.text("caption-reconstruction") == f"{before.sum():,} voxels"

    # Files that are damaged, or of another kind, are answered with a sentence, and the page goes on.
    for name, content, words in (
        ("broken.glb", path.read_bytes()[:200], "broken.glb: "),
        ("notes.txt", b"hello", "notes.txt: is not one of .glb"),
    ):
        (tmp_path / name).write_bytes(content)
        page.drop(tmp_path / name)
        page.wait(lambda words=words: page.text("message").startswith(words), f"{name} goes unanswered")
        assert "Traceback" not in page.text("message")
    page.find("next-object").click()
    second = page_state.new_object(backend, backend.object(held_out), "", "", "z")
    count = page_state.open_object(backend, second, None).grid.sum()
    page.wait(lambda: page.text("caption-voxels").startswith(f"{count:,} of "), "no object after the upload")
    assert page.text("message") == ""

    # The curves.
    page.driver.find_element("xpath", "//*[text()='Training curves']").click()
    names = PLOT + "const gd = plot('curves'); return gd && gd.data ? gd.data.map((trace) => trace.name) : []"
    page.wait(lambda: page.driver.execute_script(names) == ["loss", "lr"], "no curves")

    page.check_requests_and_console(url)


def test_a_page_without_data_takes_meshes(page, tmp_path):
    with served(Backend(make_tokenizer())) as url:
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
