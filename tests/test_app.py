"""The page in a real browser: pictures in, objects and files out, for two people at once."""

import csv
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

import a2fpn  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PICTURES = sorted(Path(a2fpn.__file__).parent.glob("assets/nuclei_demo/images/*.jpg"))
PATIENCE = 60.0  # seconds for what takes one

# Gradio is imported by the first test, since it takes seconds and every process of the suite collects this file.
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver is installed"),
    pytest.mark.skipif(not find_spec("gradio"), reason="gradio is not installed; it comes with the extra 'app'"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from a2fpn.app import launch

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = launch(prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def start_browser() -> Iterator[Callable[[], Any]]:
    """A browser takes seconds to start: tests share one, and open the page anew."""
    browsers: list[Any] = []

    def start() -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1500"):
            options.add_argument(argument)
        several = "profile.default_content_setting_values.automatic_downloads"
        options.add_experimental_option("prefs", {several: 1})
        browsers.append(webdriver.Chrome(options, webdriver.ChromeService(DRIVER)))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.quit()


@pytest.fixture(scope="module")
def shared_browser(start_browser: Callable[[], Any]) -> Any:
    return start_browser()


def opened(browser: Any, address: str, downloads: Path) -> Any:
    """The browser at the page as a newcomer finds it."""
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads), "eventsEnabled": False}
    )
    browser.get("about:blank")
    browser.get(address)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#pictures input[type=file]"))
    return browser


@pytest.fixture
def browser(shared_browser: Any, address: str, tmp_path: Path) -> Any:
    return opened(shared_browser, address, tmp_path)


def until(condition: Callable[[], Any]) -> Any:
    """Result of a condition once it holds."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if value := condition():
                return value
        except Exception:  # the page was drawn anew in between
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "the page did not change in time"
        time.sleep(0.1)


def upload(browser: Any, *files: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "#pictures input[type=file]").send_keys("\n".join(map(str, files)))
    until(lambda: all(file.stem in text(browser, "#pictures") for file in files))


def text(browser: Any, selector: str) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, selector).text)


def click(browser: Any, selector: str) -> None:
    browser.execute_script("arguments[0].click()", browser.find_element(By.CSS_SELECTOR, selector))


def objects(browser: Any) -> int:
    """Number of objects that the page tells of."""

    def told() -> str | None:
        first = (text(browser, "#status").split() or [""])[0]
        return first if first.isdigit() else None  # before that, Gradio's own words

    return int(until(told))


def shot(browser: Any, name: str) -> None:
    """Keep a picture of the page where A2FPN_SHOTS names a folder."""
    if folder := os.environ.get("A2FPN_SHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_upload_predict_slide_and_download(browser: Any, tmp_path: Path) -> None:
    shot(browser, "empty")
    upload(browser, PICTURES[0])
    click(browser, "#go button, button#go")
    before = objects(browser)
    assert before > 1
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#found img"))
    shot(browser, "found")
    slider = browser.find_element(By.CSS_SELECTOR, "#threshold input[type=range]")
    slider.send_keys(Keys.END)  # a score of 1
    until(lambda: objects(browser) < before)
    slider.send_keys(Keys.HOME)
    until(lambda: objects(browser) > before)
    every = objects(browser)
    click(browser, "#classes input[type=checkbox]")
    until(lambda: objects(browser) == 0)
    click(browser, "#classes input[type=checkbox]")
    until(lambda: objects(browser) == every)
    click(browser, "#prepare button, button#prepare")
    links = until(lambda: browser.find_elements(By.CSS_SELECTOR, "#downloads a[href]"))
    names = {link.get_attribute("download") or link.get_attribute("href").rpartition("/")[2] for link in links}
    stem = PICTURES[0].stem
    assert names == {f"{stem}.png", f"{stem}.geojson", "coco.json", "objects.csv"}
    shot(browser, "downloads")
    for link in links:
        browser.execute_script("arguments[0].click()", link)
    until(lambda: {path.name for path in tmp_path.iterdir()} >= names)
    coco = json.loads((tmp_path / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [PICTURES[0].name]
    assert len(coco["annotations"]) == every
    assert len(json.loads((tmp_path / f"{stem}.geojson").read_text())["features"]) == every
    with (tmp_path / "objects.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == every


def test_a_broken_file_is_a_sentence_and_spares_the_others(browser: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(PICTURES[0].read_bytes()[:300])
    upload(browser, broken)
    click(browser, "#go button, button#go")
    said = until(lambda: text(browser, ".toast-body, [data-testid=toast-body]"))
    assert "broken.png was skipped" in said
    assert "Traceback" not in said
    assert "/tmp" not in said
    shot(browser, "broken")
    browser.refresh()
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#pictures input[type=file]"))
    upload(browser, broken, PICTURES[1])
    click(browser, "#go button, button#go")
    assert objects(browser) > 1
    assert "broken.png was skipped" in text(browser, "#remarks")


def test_two_people_see_their_own_pictures(
    browser: Any, start_browser: Callable[[], Any], address: str, tmp_path: Path
) -> None:
    one, other = browser, opened(start_browser(), address, tmp_path)
    upload(one, PICTURES[0])
    upload(other, PICTURES[2])
    click(one, "#go button, button#go")
    click(other, "#go button, button#go")
    for browser, picture in ((one, PICTURES[0]), (other, PICTURES[2])):
        assert objects(browser) > 0
        until(lambda b=browser, p=picture: p.name in text(b, "#table"))
    assert PICTURES[2].name not in text(one, "#table")
    assert PICTURES[0].name not in text(other, "#table")


def test_several_pictures_are_counted_each_and_packed(browser: Any, tmp_path: Path) -> None:
    upload(browser, *PICTURES[4:6])
    click(browser, "#go button, button#go")
    assert "in 2 pictures" in until(lambda: text(browser, "#status"))
    until(lambda: all(name in text(browser, "#table") for name in (PICTURES[4].name, PICTURES[5].name, "all")))
    click(browser, "#prepare button, button#prepare")
    links = until(lambda: browser.find_elements(By.CSS_SELECTOR, "#downloads a[href]"))
    for link in links:
        browser.execute_script("arguments[0].click()", link)
    until(lambda: (tmp_path / "pictures.zip").is_file())
    shot(browser, "several")
    with zipfile.ZipFile(tmp_path / "pictures.zip") as packed:
        assert packed.namelist() == [f"{p.stem}.png" for p in PICTURES[4:6]]


def test_an_example_is_one_click(browser: Any) -> None:
    buttons = until(lambda: browser.find_elements(By.CSS_SELECTOR, "#examples button img"))
    assert len(buttons) == len(PICTURES)
    browser.execute_script("arguments[0].click()", buttons[3])
    assert objects(browser) > 0
    until(lambda: PICTURES[3].name in text(browser, "#table"))
    shot(browser, "example")


def test_a_space_runs_the_same_file() -> None:
    from a2fpn.app import space_files

    files = space_files("me/cells")
    compile(files["app.py"], "app.py", "exec")
    assert 'MODEL = "me/cells"' in files["app.py"]
    assert "a2fpn[app]" in files["requirements.txt"]
    assert "sdk: gradio" in files["README.md"]
