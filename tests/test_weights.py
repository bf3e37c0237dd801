import hashlib
import http.server
import logging
import multiprocessing
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models._api as registry
from huggingface_hub.utils import enable_progress_bars
from torch import nn
from torchvision.models import Weights, WeightsEnum
from torchvision.models import detection as tv
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import a2fpn
from a2fpn import CheckpointError
from a2fpn.convert import graft, graft_model
from a2fpn.device import without_values
from a2fpn.errors import (
    HubAccessError,
    HubCacheError,
    HubIntegrityError,
    HubNotFoundError,
    HubOfflineError,
    HubServerError,
)
from a2fpn.necks import create_neck
from a2fpn.pretrained import torchvision as downloads
from a2fpn.pretrained.catalog import (
    PRETRAINED,
    EmbeddedWeights,
    GraftedWeights,
    HubWeights,
    TorchvisionWeights,
    find_weights,
)
from a2fpn.pretrained.checkpoint import Facts, read_checkpoint
from a2fpn.pretrained.hub import Downloaded
from a2fpn.pretrained.load import read_pretrained
from a2fpn.pyramid import PyramidSpec
from tests.helpers import at_once, largest_difference, tiny_model

BUILDER = "fasterrcnn_tiny_fpn"
NAME = "fasterrcnn_fpn_r18.tiny"
GRAFT = "fasterrcnn_a2fpn_lite_r18.tiny_graft"


def tiny(*, weights: Any = None, weights_backbone: Any = None, num_classes: int = 91) -> nn.Module:
    """A torchvision Faster R-CNN on ResNet-18, with heads of no size."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return tv.FasterRCNN(
        backbone,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=1, sampling_ratio=1),
        box_head=TwoMLPHead(256, 4),
        box_predictor=FastRCNNPredictor(4, num_classes),
        min_size=64,
        max_size=96,
        rpn_post_nms_top_n_test=20,
        box_score_thresh=0.0,
    )


class Site:
    """A folder served on loopback, with faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = 200
        self.cut = 0
        self.silence = 0.0
        self.requests: list[str] = []
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests.append(self.path)
                time.sleep(site.silence)
                if site.status != 200:
                    self.send_error(site.status)
                    return
                body = (site.folder / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) - site.cut])

            def log_message(self, *args: Any) -> None:
                """Tests are silent."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def publish(folder: Path, content: Any) -> str:
    """Saves something as torchvision publishes its weights, and returns the file's name."""
    path = folder / "content.pth"
    torch.save(content, path)
    name = f"tiny-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    path.rename(folder / name)
    return name


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return tiny().eval()


@pytest.fixture(scope="module")
def folder(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish(folder, module.state_dict())
    return folder


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    site = Site(folder)
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's cache, empty, with leave to download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def listed(site: Site, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Weights of :func:`tiny` among torchvision's and ours; returns their address."""
    url = f"{site.url}/{next(site.folder.glob('tiny-*.pth')).name}"
    list_as(url, monkeypatch)
    return url


def list_as(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = {"_metrics": {"COCO-val2017": {"box_map": 12.3}}, "categories": []}
    published = WeightsEnum("Tiny_Weights", {"COCO_V1": Weights(url=url, transforms=nn.Identity, meta=meta)})
    tiny.__annotations__["weights"] = published | None
    monkeypatch.setitem(registry.BUILTIN_MODELS, BUILDER, tiny)
    monkeypatch.setitem(PRETRAINED, NAME, TorchvisionWeights(BUILDER, frozen_eps=1e-5))
    monkeypatch.setitem(PRETRAINED, GRAFT, GraftedWeights(NAME, "a2fpn_lite"))


# What there is


def test_rows_say_what_the_sources_say() -> None:
    rows = {row.name: row for row in a2fpn.list_pretrained()}
    assert list(rows) == a2fpn.list_models(pretrained=True)
    mask = rows["maskrcnn_fpn_r50.tv_coco_v2"]
    published = tv.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1
    assert mask.origin == published.url
    assert (mask.source, mask.trained, mask.keypoint_ap) == ("torchvision", True, None)
    assert (mask.box_ap, mask.mask_ap) == (0.474, 0.418)
    assert mask.measured == "COCO-val2017, published by torchvision"
    assert "not stated by torchvision" in mask.license
    assert rows["keypointrcnn_fpn_r50.tv_coco"].keypoint_ap == 0.65
    nuclei = rows["maskrcnn_a2fpn_lite0.nuclei"]
    assert (nuclei.source, nuclei.trained, nuclei.license) == ("embedded", True, "Apache-2.0")
    assert nuclei.mask_ap == pytest.approx(0.6845, abs=1e-4)


def test_grafts_are_not_passed_off_as_trained() -> None:
    for row in a2fpn.list_pretrained("*_graft"):
        weights = PRETRAINED[row.name]
        assert isinstance(weights, GraftedWeights)
        assert not row.trained
        assert row.measured.endswith(f", of {weights.base} before the graft")
        assert row.box_ap == a2fpn.list_pretrained(weights.base)[0].box_ap
    assert all(row.trained for row in a2fpn.list_pretrained("*.tv_coco*") if not row.name.endswith("_graft"))


@pytest.mark.parametrize("detector", ["maskrcnn", "fasterrcnn", "keypointrcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("neck", ["a2fpn", "a2fpn_lite", "pafpn", "pafpn_mgc", "carafe_fpn"])
def test_every_neck_of_the_family_has_weights(detector: str, neck: str) -> None:
    found = find_weights(f"{detector}_{neck}_r50")
    assert found == (f"{detector}_{neck}_r50.tv_coco_graft", GraftedWeights(f"{detector}_fpn_r50.tv_coco", neck))


@pytest.mark.parametrize("name", PRETRAINED)
def test_listed_names_are_names_of_models(name: str) -> None:
    config, state, *_ = read_pretrained(PRETRAINED[name], load=False)
    assert config.architecture == name.partition(".")[0]
    assert len(config.categories) == config.num_classes
    assert state is None


@pytest.mark.parametrize("name", a2fpn.list_models("*_graft", pretrained=True))
def test_every_graft_can_be_made(name: str) -> None:
    config, *_ = read_pretrained(PRETRAINED[name], load=False)
    base, *_ = read_pretrained(PRETRAINED[PRETRAINED[name].base], load=False)
    with without_values():
        strides = base.backbone.strides
        fpn = create_neck(
            "fpn", PyramidSpec.from_channels([64 * s for s in strides], strides=strides), **base.neck.args
        )
        neck = create_neck(config.neck.name, fpn.in_spec, **config.neck.args)
    state = {f"neck.{key}": torch.zeros(x.shape) for key, x in fpn.state_dict().items()}
    grafted = graft(state, target=config.neck.name, **base.neck.args)
    assert {key: x.shape for key, x in grafted.items()} == {f"neck.{k}": x.shape for k, x in neck.state_dict().items()}


@pytest.mark.parametrize("detector", ["retinanet", "fcos", "keypointrcnn"])
@torch.no_grad()
def test_grafts_of_all_kinds_compute_what_their_base_does(detector: str) -> None:
    """Exactly so where only context and a bottom-up path are added."""
    model = tiny_model(f"{detector}_fpn").eval()
    batch = model.preprocess([torch.rand(3, 90, 70)])
    expected = model.features(batch)
    assert largest_difference(graft_model(model, target="pafpn_mgc").features(batch), expected) == 0
    got = graft_model(model, target="a2fpn").features(batch)
    error = max(((got[p] - expected[p]).square().mean().sqrt() / expected[p].std()).item() for p in expected)
    assert 0 < error < 0.02


@pytest.mark.parametrize("name", [name for name in PRETRAINED if isinstance(PRETRAINED[name], TorchvisionWeights)])
def test_file_names_end_with_their_hash(name: str) -> None:
    weights = PRETRAINED[name]
    assert isinstance(weights, TorchvisionWeights)
    assert weights.published.url.startswith("https://download.pytorch.org/models/")
    assert re.search(r"-[0-9a-f]{8}\.pth$", weights.file.name)


# Loading


def test_torchvision_weights_are_fetched_once_and_converted(
    listed: str, site: Site, home: Path, module: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    enable_progress_bars()
    model = a2fpn.create_model(NAME, pretrained=True)
    assert not model.training
    assert model.config.backbone.norm == "frozen"
    assert model.config.heads.unused_outputs == 10
    weight = module.state_dict()["backbone.body.layer3.0.conv1.weight"]
    assert torch.equal(model.backbone.body.layer3[0].conv1.weight, weight)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err
    assert [path.name for path in home.iterdir()] == [listed.rpartition("/")[2]]
    again = a2fpn.from_pretrained(NAME)
    assert again.config == model.config
    assert largest_difference(again.state_dict(), model.state_dict()) == 0
    assert len(site.requests) == 1
    assert "100%" not in capsys.readouterr().err


def test_what_is_fetched_computes_what_torchvision_does(listed: str, module: nn.Module) -> None:
    model = a2fpn.create_model("fasterrcnn_fpn_r18", pretrained=True)
    batch = model.preprocess([torch.rand(3, 64, 64)])
    with torch.no_grad():
        theirs, ours = module.backbone(batch.tensor), model.features(batch)
    for their, our in zip(theirs.values(), ours.values(), strict=True):
        torch.testing.assert_close(their, our)


@pytest.mark.parametrize("name", [NAME, GRAFT])
def test_another_number_of_classes_renews_the_predictor_alone(
    name: str, listed: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = a2fpn.create_model(name, pretrained=True, num_classes=5)
    same = a2fpn.create_model(name, pretrained=True, num_classes=80)
    assert (model.config.num_classes, model.config.heads.unused_outputs, model.config.categories) == (5, 0, ())
    assert same.config.heads.unused_outputs == 10
    before, after = same.state_dict(), model.state_dict()
    renewed = {k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])}
    layers = ("cls_score.weight", "cls_score.bias", "bbox_pred.weight", "bbox_pred.bias")
    assert renewed == {f"roi_heads.box_predictor.{layer}" for layer in layers}
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
    assert all(key in caplog.text for key in renewed)
    assert caplog.text.count("re-initialized tensors") == 1


def test_a_graft_says_so(listed: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="a2fpn"):
        model = a2fpn.create_model("fasterrcnn_a2fpn_lite_r18", pretrained=True)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("The neck a2fpn_lite is grafted, not trained: it is initialized from")
    assert line.endswith(f"For the trained detector itself: create_model('{NAME}', pretrained=True).")
    assert model.config.neck.name == "a2fpn_lite"
    assert model.config.architecture == "fasterrcnn_a2fpn_lite_r18"
    base = a2fpn.from_pretrained(NAME)
    assert len(caplog.records) == 1
    batch = base.preprocess([torch.rand(3, 64, 96)])
    with torch.no_grad():
        expected, got = base.features(batch), model.features(batch)
    error = max((got[p] - expected[p]).square().mean().sqrt() / expected[p].std() for p in expected)
    assert 0 < error < 0.01


def test_a_tag_without_pretrained_fetches_nothing(listed: str, site: Site, caplog: pytest.LogCaptureFixture) -> None:
    assert a2fpn.create_model(GRAFT).training
    assert a2fpn.create_model(NAME, num_classes=2).config.num_classes == 2
    assert site.requests == []
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_published_checkpoints_go_before_grafts(
    listed: str, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = a2fpn.save_pretrained(tiny_model("fasterrcnn_fpn"), tmp_path / "repo")
    asked: list[Any] = []

    def download(repo: Any, *, weights: bool) -> Downloaded:
        asked.append((repo.id, repo.revision, weights))
        return Downloaded(saved, read_checkpoint(saved))

    monkeypatch.setattr("a2fpn.pretrained.load.download_checkpoint", download)
    digest = read_checkpoint(saved).sha256
    name = "fasterrcnn_a2fpn_lite_r18.coco"
    row = HubWeights("acme/cells", "c0ffee", digest, Facts({"bbox/ap": 0.4}, license="Apache-2.0"))
    published = {name: row, **PRETRAINED}
    for module in ("a2fpn.pretrained.load.PRETRAINED", "a2fpn.pretrained.catalog.PRETRAINED"):
        monkeypatch.setattr(module, published)
    model = a2fpn.create_model("fasterrcnn_a2fpn_lite_r18", pretrained=True)
    assert model.config == a2fpn.from_pretrained(saved).config
    assert asked == [("acme/cells", "c0ffee", True)]
    (listing,) = a2fpn.list_pretrained(name)
    assert (listing.source, listing.origin, listing.trained) == ("hub", "acme/cells@c0ffee", True)
    assert (listing.box_ap, listing.license) == (0.4, "Apache-2.0")
    published[name] = HubWeights("acme/cells", "c0ffee", "0" * 64, Facts())
    with pytest.raises(
        HubIntegrityError, match=f"'acme/cells' at revision 'c0ffee' does not match .*{digest}, expected 000"
    ):
        a2fpn.create_model(name, pretrained=True)


# What goes wrong


@pytest.mark.parametrize(
    ("status", "kind"), [(404, HubNotFoundError), (403, HubAccessError), (503, HubServerError), (429, HubServerError)]
)
def test_a_server_that_refuses(status: int, kind: type[Exception], listed: str, site: Site, home: Path) -> None:
    site.status = status
    with pytest.raises(kind) as raised:
        a2fpn.create_model(NAME, pretrained=True)
    file = home / listed.rpartition("/")[2]
    assert str(raised.value).startswith(
        "The weights of torchvision's fasterrcnn_tiny_fpn, COCO_V1 are not in torch.hub's"
    )
    assert f"could not be downloaded from {listed}: the server answered {status}" in str(raised.value)
    assert str(raised.value).endswith(f"Download this file elsewhere and put it at {file}")
    assert list(home.iterdir()) == []


def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_as("http://127.0.0.1:9/tiny-00000000.pth", monkeypatch)
    reason = r"127\.0\.0\.1:9/tiny-00000000\.pth: it cannot be reached .*put it at"
    with at_once(lambda: a2fpn.create_model(NAME)), pytest.raises(HubOfflineError, match=reason):
        a2fpn.from_pretrained(NAME)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_asks_nobody(how: str, listed: str, site: Site, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, reason = {"local_files_only": True}, "local_files_only=True"
    if how == "environment":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        options, reason = {}, r"offline mode is on \(HF_HUB_OFFLINE\)"
    with pytest.raises(HubOfflineError, match=f"could not be downloaded from {listed}: {reason}"):
        a2fpn.from_pretrained(NAME, **options)
    # A file that was put where the message says is taken.
    home.mkdir(parents=True)
    name = listed.rpartition("/")[2]
    (home / name).write_bytes((site.folder / name).read_bytes())
    assert a2fpn.from_pretrained(NAME, **options).config.num_classes == 80
    assert site.requests == []


def test_a_file_with_another_hash_is_fetched_again(listed: str, site: Site, home: Path) -> None:
    home.mkdir(parents=True)
    name = listed.rpartition("/")[2]
    (home / name).write_bytes(b"half a file")
    assert a2fpn.from_pretrained(NAME).config.num_classes == 80
    assert len(site.requests) == 1
    (home / name).write_bytes(b"half a file")
    with pytest.raises(HubOfflineError, match=r"are damaged in torch\.hub's cache, and could not be downloaded"):
        a2fpn.from_pretrained(NAME, local_files_only=True)


def test_a_download_with_another_hash_is_refused(
    site: Site, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.folder = tmp_path / "elsewhere"
    site.folder.mkdir()
    (site.folder / "tiny-00000000.pth").write_bytes(b"something else")
    list_as(f"{site.url}/tiny-00000000.pth", monkeypatch)
    with pytest.raises(HubIntegrityError, match=r"another hash \(sha256 [0-9a-f]{64}, expected 00000000"):
        a2fpn.from_pretrained(NAME)
    assert list(home.iterdir()) == []


def test_a_connection_that_breaks_leaves_nothing(listed: str, site: Site, home: Path) -> None:
    site.cut = 1000
    with pytest.raises((HubIntegrityError, HubServerError), match="could not be downloaded from"):
        a2fpn.from_pretrained(NAME)
    assert list(home.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and limits")
def test_a_full_disk(listed: str, home: Path) -> None:
    def load() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            a2fpn.from_pretrained(NAME)
        except HubCacheError as error:
            said.put(str(error))

    context = multiprocessing.get_context("fork")
    said = context.Queue()
    process = context.Process(target=load)
    process.start()
    assert re.search(r"could not be downloaded from .*: File too large", said.get(timeout=60))
    process.join()
    assert list(home.iterdir()) == []


def test_a_silent_server_is_given_up(listed: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PATIENCE", 0.2)
    site.silence = 5.0
    with pytest.raises((HubServerError, HubOfflineError), match=r"could not be downloaded from .*(timed out|Timeout)"):
        a2fpn.from_pretrained(NAME)


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch", "bare", "list", "number", "text"])
def test_a_file_that_holds_more_than_tensors_is_refused(
    kind: str, site: Site, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.folder = tmp_path / "hostile"
    site.folder.mkdir()
    fuse = tmp_path / "exploded"
    if kind in ("bare", "text"):
        content = pickle.dumps(Bomb(fuse)) if kind == "bare" else b"no pickle at all"
        name = f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        (site.folder / name).write_bytes(content)
    else:
        contents = {"torch": {"weight": Bomb(fuse)}, "list": [torch.zeros(1)], "number": {"weight": 3}}
        name = publish(site.folder, contents[kind])
    list_as(f"{site.url}/{name}", monkeypatch)
    with pytest.raises(CheckpointError, match=r"holds (more than tensors, or is damaged|no state dict)"):
        a2fpn.from_pretrained(NAME)
    assert not fuse.exists()


def test_weights_of_another_model_are_an_error(
    site: Site, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.folder = tmp_path / "other"
    site.folder.mkdir()
    list_as(f"{site.url}/{publish(site.folder, {'backbone.body.conv1.weight': torch.zeros(1)})}", monkeypatch)
    with pytest.raises(CheckpointError, match=r"The weights do not match the model: tensors missing \(\d+\): "):
        a2fpn.from_pretrained(NAME)


def test_a_folder_in_the_package_is_described() -> None:
    assert all(w.folder.is_dir() for w in PRETRAINED.values() if isinstance(w, EmbeddedWeights))
