"""The page that runs an exported model in a browser: what it shows and saves, also without a network."""

import functools
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import a2fpn
from a2fpn.config import Category
from a2fpn.data import decode_rle, encode_box_masks
from a2fpn.evaluation import evaluate_coco
from tests.helpers import torch_from

onnx = pytest.importorskip("onnx")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By  # noqa: E402

ROOT = Path(__file__).parent.parent
RUNTIME = ROOT / "build" / "npm" / "node_modules" / "onnxruntime-web" / "dist"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NUCLEI = "maskrcnn_a2fpn_lite0.nuclei"
DEMO = Path(a2fpn.__file__).parent / "assets" / "nuclei_demo"
PATIENCE = 120.0  # seconds for what takes few

if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium with its driver is installed", allow_module_level=True)
if not RUNTIME.is_dir():
    pytest.skip("npm's packages are not here: `make web` brings them", allow_module_level=True)


class Handler(SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, *_: Any) -> None:
        pass


class Page:
    """The page in a browser, and the server that it came from."""

    def __init__(self, folder: Path, downloads: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1000,1200"):
            options.add_argument(argument)
        several = "profile.default_content_setting_values.automatic_downloads"
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads), several: 1})
        self.downloads = downloads
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.browser.get(f"http://127.0.0.1:{self.server.server_port}/")
        self.wait_until_ready()

    def unplug(self) -> None:
        """Stop the server, so that nothing can be fetched."""
        self.server.shutdown()
        self.server.server_close()

    def close(self) -> None:
        self.browser.quit()
        self.unplug()

    def wait_until_ready(self) -> None:
        until(lambda: self.browser.find_elements(By.CSS_SELECTOR, "body[data-ready]"))

    def text(self, identity: str) -> str:
        return str(self.browser.find_element(By.ID, identity).text)

    def choose(self, *files: Path) -> str:
        """Choose a file, and return what the page says of it."""
        for file in files:
            self.browser.find_element(By.ID, "file").send_keys(str(file))
        return self.answer()

    def answer(self) -> str:
        return str(until(lambda: (said := self.text("status")) and not said.startswith("Looking") and said))

    def slide(self, threshold: float) -> int:
        """Move the slider, and return how many objects the page tells of."""
        self.browser.execute_script(
            "const slider = document.getElementById('threshold'); slider.value = arguments[0];"
            "slider.dispatchEvent(new Event('input'))",
            threshold,
        )
        return int(self.text("status").split()[0])

    def save(self, button: str, name: str) -> bytes:
        self.browser.find_element(By.ID, button).click()
        path = self.downloads / name
        until(path.is_file)
        data = path.read_bytes()
        path.unlink()
        return data


def until(condition: Callable[[], Any]) -> Any:
    """Result of a condition once it holds."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not change in time"
        time.sleep(0.05)
    return value


def site(folder: Path) -> Path:
    """The page as `make web` makes it, without a model and pictures."""
    for pattern in ("*.html", "*.css", "*.js", "*.mjs"):
        for file in (ROOT / "docs" / "web").glob(pattern):
            shutil.copy(file, folder)
    for file in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(RUNTIME / file, folder)
    return folder


SIZE = (256, 320)
BOXES = [
    *([10.3, 20.7, 60.2, 50.9], [-3.0, 0.0, 40.5, 256.0], [100.5, 100.0, 320.0, 256.0]),
    *([5.6, 5.6, 5.9, 5.9], [200.0, 10.0, 330.0, 90.0]),
]
"""Inside, over borders and of full height, at two borders, between pixel centers, beyond a border."""
SCORES = [0.9, 0.61, 0.5, 0.49, 0.2]
LABELS = [0, 1, 1, 0, 1]
CATEGORIES = (Category(7, "spot"), Category(23, "patch"))


def found_in_masks() -> torch.Tensor:
    """Probabilities with ragged edges; those of the second object are full."""
    masks = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    masks[1] = 1
    return masks


def save_constant(path: Path) -> None:
    """A file like those of `a2fpn export` that finds the same objects in every picture: what is tested is the page."""
    outputs = {
        "image_index": np.zeros(5, np.int64),
        "boxes": np.array(BOXES, np.float32),
        "scores": np.array(SCORES, np.float32),
        "labels": np.array(LABELS, np.int64),
        "masks": found_in_masks()[:, 0].numpy(),
    }
    tensors = {name: onnx.numpy_helper.from_array(x, name) for name, x in outputs.items()}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], [name], value=x) for name, x in tensors.items()],
        "constant",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["N", 3, "H", "W"])],
        [onnx.helper.make_tensor_value_info(name, x.data_type, list(x.dims)) for name, x in tensors.items()],
    )
    program = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    facts = {
        "categories": json.dumps([category.name for category in CATEGORIES]),
        "category_ids": json.dumps([category.id for category in CATEGORIES]),
        "input": "uint8",
        "score_threshold": "0.05",
    }
    onnx.helper.set_model_props(program, facts)
    onnx.save(program, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = site(tmp_path_factory.mktemp("web"))
    save_constant(folder / "model.onnx")
    (folder / "pictures").mkdir()
    for name, seed in (("one.png", 1), ("another one.png", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / name)
    (folder / "pictures.txt").write_text("one.png\nanother one.png\n")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(folder, tmp_path_factory.mktemp("downloads"))
    yield page
    page.close()


def test_masks_count_and_files(page: Page, folder: Path) -> None:
    picture = folder / "pictures" / "one.png"
    assert page.choose(picture).startswith("3 objects in one.png, found in ")
    document = json.loads(page.save("coco", "one_objects.json"))
    assert document["images"] == [{"id": 1, "file_name": "one.png", "height": SIZE[0], "width": SIZE[1]}]
    assert document["categories"] == [{"id": category.id, "name": category.name} for category in CATEGORIES]
    masks = encode_box_masks(found_in_masks(), torch.tensor(BOXES), SIZE)
    for n, found in enumerate(document["annotations"]):
        assert found["segmentation"] == masks[n]
        assert found["area"] == decode_rle(masks[n : n + 1]).sum()
        assert found["score"] == pytest.approx(SCORES[n])
        assert found["category_id"] == CATEGORIES[LABELS[n]].id
        x0, y0, x1, y1 = BOXES[n]
        assert found["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)
    with Image.open(io.BytesIO(page.save("png", "one_objects.png"))) as saved:
        colored = (np.asarray(saved.convert("RGB")) != np.asarray(Image.open(picture))).any(-1)
    covered = decode_rle(masks[:3]).any(0)
    assert not colored[~covered].any()
    assert colored[covered].mean() > 0.99
    assert [page.slide(threshold) for threshold in (1, 0.85, 0.55, 0.5, 0.4, 0)] == [0, 1, 2, 3, 4, 5]
    document = json.loads(page.save("coco", "one_objects.json"))
    assert [found["segmentation"] for found in document["annotations"]] == masks


def test_a_packaged_picture_is_one_click(page: Page) -> None:
    buttons = page.browser.find_elements(By.CSS_SELECTOR, "#pictures button")
    assert len(buttons) == 2
    buttons[1].click()
    until(lambda: "in another one.png" in page.text("status"))


def test_files_are_dropped(page: Page) -> None:
    """A picture, a model, and what is neither."""
    script = """
        const [address, name, done] = arguments;
        const load = new DataTransfer();
        fetch(address).then((answer) => answer.blob()).then((blob) => {
            load.items.add(new File([blob], name));
            document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: load, bubbles: true, cancelable: true}));
            done();
        });
    """
    page.browser.execute_async_script(script, "pictures.txt", "words.png")
    assert page.answer() == "words.png: this browser can't read it as a picture."
    page.browser.execute_async_script(script, "pictures/one.png", "dropped.png")
    until(lambda: "in dropped.png" in page.text("status"))
    page.browser.execute_async_script(script, "model.onnx", "again.onnx")
    until(lambda: page.text("model") == "Model: again.onnx finds spot, patch.")
    page.browser.execute_async_script(script, "ort-wasm-simd-threaded.wasm", "alien.onnx")
    assert page.answer() == "alien.onnx: `a2fpn export` did not make this file."
    assert page.text("model").startswith("Model: again.onnx")


def test_it_works_without_a_network(folder: Path, tmp_path: Path) -> None:
    page = Page(folder, tmp_path)
    try:
        assert page.browser.execute_script("return crossOriginIsolated")  # else there is one thread
        page.unplug()
        page.browser.refresh()
        page.wait_until_ready()
        assert page.text("model") == "Model: model.onnx finds spot, patch."
        assert page.choose(folder / "pictures" / "one.png").startswith("3 objects")
    finally:
        page.close()


def test_no_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    page = Page(site(tmp_path / "bare"), tmp_path)
    try:
        assert page.text("model").startswith("There is no model beside this page")
        assert "The model is not here yet" in page.choose(folder / "pictures" / "one.png")
    finally:
        page.close()


@pytest.mark.slow
@torch_from(2, 11, "the oldest whose exporter has been tried")
def test_the_nuclei_model(tmp_path: Path) -> None:
    """As many objects at 0.5 as the detector finds on the packaged pictures, and the same AP."""
    model = a2fpn.from_pretrained(NUCLEI)
    (tmp_path / "site").mkdir()
    a2fpn.export_model(model, site(tmp_path / "site") / "model.onnx")
    page = Page(tmp_path / "site", tmp_path)
    predictor = a2fpn.Predictor(model, score_threshold=model.rule.score_threshold)
    truth = json.loads((DEMO / "annotations.json").read_text())
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    try:
        for image in truth["images"]:
            picture = DEMO / "images" / image["file_name"]
            page.choose(picture)
            wanted = predictor(picture)
            assert page.slide(0.5) == (wanted.scores >= 0.5).sum(), picture.name
            assert page.slide(0) == len(wanted)
            found = json.loads(page.save("coco", f"{picture.stem}_objects.json"))["annotations"]
            theirs += [{**one, "image_id": image["id"]} for one in found]
            ours += wanted.to_coco(image["id"])
    finally:
        page.close()
    expected, seen = (evaluate_coco(truth, records, max_detections=500) for records in (ours, theirs))
    for kind in ("bbox/ap", "segm/ap"):
        assert seen.to_dict()[kind] == pytest.approx(expected.to_dict()[kind], abs=1e-3)
        assert seen.to_dict()[kind] > 0.5
