"""The page that runs an exported model in a browser: it finds what the detector finds, also without a network."""

import functools
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

import a2fpn
from a2fpn.detectors import Detector
from a2fpn.evaluation import evaluate_coco
from tests.helpers import torch_from

pytestmark = torch_from(2, 11, "the oldest whose exporter has been tried")
pytest.importorskip("onnx")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By  # noqa: E402

from tests.test_export_model import detector, noise  # noqa: E402

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


def site(folder: Path, model: Detector) -> Path:
    """What `make web` makes, with a model of one's own."""
    for pattern in ("*.html", "*.css", "*.js", "*.mjs"):
        for file in (ROOT / "docs" / "web").glob(pattern):
            shutil.copy(file, folder)
    for file in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(RUNTIME / file, folder)
    a2fpn.export_model(model, folder / "model.onnx")
    return folder


class Small(NamedTuple):
    folder: Path
    model: Detector
    pictures: list[Path]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    model = detector("maskrcnn_a2fpn")
    folder = site(tmp_path_factory.mktemp("web"), model)
    (folder / "pictures").mkdir()
    pictures = [folder / "pictures" / f"noise {n}.png" for n in range(2)]
    for n, (picture, size) in enumerate(zip(pictures, [(64, 96), (97, 31)], strict=True)):
        Image.fromarray(noise(size, n).permute(1, 2, 0).numpy()).save(picture)
    (folder / "pictures.txt").write_text("".join(f"{picture.name}\n" for picture in pictures))
    return Small(folder, model, pictures)


@pytest.fixture(scope="module")
def page(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(small.folder, tmp_path_factory.mktemp("downloads"))
    yield page
    page.close()


def check_equal(document: dict[str, Any], result: a2fpn.Result) -> None:
    """Compare a page's COCO document with a detector's result: the same objects, boxes, scores and masks."""
    wanted = result.to_coco(image_id=1)
    found = document["annotations"]
    assert len(found) == len(wanted)
    assert (document["images"][0]["height"], document["images"][0]["width"]) == result.size
    # Objects of equal scores may have changed places.
    pairs = [(min(found, key=lambda other: distance(other, one)), one) for one in wanted]
    assert len({other["id"] for other, _ in pairs}) == len(wanted)
    for other, one in pairs:
        assert distance(other, one) < 0.1
        assert other["score"] == pytest.approx(one["score"], abs=1e-3)
        assert other["category_id"] == one["category_id"]
        masks = [{**x["segmentation"], "counts": x["segmentation"]["counts"].encode()} for x in (other, one)]
        assert other["area"] == mask_utils.area(masks[0])
        assert mask_utils.iou(masks[:1], masks[1:], [0])[0, 0] > 0.98 or not mask_utils.area(masks[1])


def decisive(scores: Any) -> float:
    """The hundredth between best and worst score that is farthest from all, so that rounding decides nothing."""
    hundredths = np.arange(101) / 100
    inner = hundredths[(hundredths > scores.min()) & (hundredths < scores.max())]
    return float(inner[np.abs(inner[:, None] - scores).min(1).argmax()])


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of two boxes, pixels."""
    return float(np.abs(np.subtract(one["bbox"], other["bbox"])).max())


def test_it_finds_what_the_detector_finds(page: Page, small: Small) -> None:
    for picture in small.pictures:
        said = page.choose(picture)
        assert picture.name in said
        everything = a2fpn.Predictor(small.model, score_threshold=small.model.rule.score_threshold)(picture)
        threshold = decisive(everything.scores)
        above = everything.scores > threshold
        assert page.slide(threshold) == above.sum()
        check_equal(json.loads(page.save("coco", f"{picture.stem}_objects.json")), everything[above])
        with Image.open(io.BytesIO(page.save("png", f"{picture.stem}_objects.png"))) as saved:
            assert saved.size == (everything.size[1], everything.size[0])
            colored = np.asarray(saved.convert("RGB")) != np.asarray(Image.open(picture))
        assert everything.masks is not None
        covered = everything.masks[above].any(0)
        assert not colored.any(-1)[~covered].any()
        assert colored.any(-1)[covered].mean() > 0.9
        assert page.slide(1) == 0
        assert page.slide(0) == len(everything)


def test_a_packaged_picture_is_one_click(page: Page, small: Small) -> None:
    buttons = page.browser.find_elements(By.CSS_SELECTOR, "#pictures button")
    assert len(buttons) == len(small.pictures)
    buttons[1].click()
    until(lambda: f"in {small.pictures[1].name}" in page.text("status"))


def test_files_are_dropped(page: Page, small: Small, tmp_path: Path) -> None:
    """A picture, and a model whose objects have other names."""
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
    assert "words.png: this browser can't read it as a picture." in page.answer()
    page.browser.execute_async_script(script, "pictures/noise 0.png", "dropped.png")
    until(lambda: "in dropped.png" in page.text("status"))
    page.browser.execute_async_script(script, "model.onnx", "again.onnx")
    until(lambda: page.text("model").startswith("Model: again.onnx finds shape 7, shape 23, shape 90."))
    page.browser.execute_async_script(script, "ort-wasm-simd-threaded.wasm", "alien.onnx")
    assert page.answer() == "alien.onnx: This is no file of `a2fpn export`."
    assert page.text("model").startswith("Model: again.onnx")


def test_it_works_without_a_network(small: Small, tmp_path: Path) -> None:
    page = Page(small.folder, tmp_path)
    try:
        assert page.browser.execute_script("return crossOriginIsolated")  # else there is one thread
        page.unplug()
        page.browser.refresh()
        page.wait_until_ready()
        assert "finds shape 7" in page.text("model")
        assert small.pictures[0].name in page.choose(small.pictures[0])
    finally:
        page.close()


def test_no_model(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(small.folder, folder, ignore=shutil.ignore_patterns("*.onnx", "pictures*"))
    page = Page(folder, tmp_path)
    try:
        assert page.text("model").startswith("There is no model beside this page")
        assert "The model is not here yet" in page.choose(small.pictures[0])
    finally:
        page.close()


@pytest.mark.slow
def test_the_nuclei_model(tmp_path: Path) -> None:
    """As many objects at 0.5 as the detector finds on the packaged pictures, and the same AP."""
    model = a2fpn.from_pretrained(NUCLEI)
    (tmp_path / "site").mkdir()
    page = Page(site(tmp_path / "site", model), tmp_path)
    predictor = a2fpn.Predictor(model, score_threshold=model.rule.score_threshold)
    truth = json.loads((DEMO / "annotations.json").read_text())
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    try:
        for image in truth["images"]:
            picture = DEMO / "images" / image["file_name"]
            said = page.choose(picture)
            wanted = predictor(picture)
            assert int(said.split()[0]) == (wanted.scores >= 0.5).sum(), said
            page.slide(0)
            found = json.loads(page.save("coco", f"{picture.stem}_objects.json"))["annotations"]
            theirs += [{**one, "image_id": image["id"]} for one in found]
            ours += wanted.to_coco(image["id"])
    finally:
        page.close()
    expected, seen = (evaluate_coco(truth, records, max_detections=500) for records in (ours, theirs))
    for kind in ("bbox/ap", "segm/ap"):
        assert seen.to_dict()[kind] == pytest.approx(expected.to_dict()[kind], abs=1e-3)
        assert seen.to_dict()[kind] > 0.5
