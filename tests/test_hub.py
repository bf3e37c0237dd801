"""The Hub: what is published comes back to the byte, and what goes wrong is told and leaves nothing behind."""

import json
import multiprocessing
import pkgutil
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants, hf_api

import a2fpn
from a2fpn.cli.evaluate import evaluate
from a2fpn.errors import (
    CheckpointError,
    HubAccessError,
    HubCacheError,
    HubError,
    HubIntegrityError,
    HubNotFoundError,
    HubOfflineError,
    HubServerError,
)
from a2fpn.pretrained import hub as client
from a2fpn.pretrained.card import model_card
from a2fpn.pretrained.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_checkpoint
from a2fpn.pretrained.hub import download_checkpoint, push_to_hub
from a2fpn.pretrained.hub_client import Repo
from tests.coco_data import write_coco
from tests.helpers import at_once, run_hub, tiny_model
from tests.hub_server import HubServer, sha256

REPO = "alice/cells"
METADATA = {"metrics": {"bbox/ap": 0.5, "segm/ap": 0.25}, "data": "cells", "license": "cc0-1.0"}
FETCH = {"lfs": r"GET /alice/.*/resolve/.*safetensors", "xet": "GET /cas/data"}


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    server = HubServer()
    server.tokens |= {"hf_alice": "alice", "hf_bob": "bob"}
    yield server
    server.stop()


@pytest.fixture(params=["lfs", "xet"])
def transfer(request):
    return request.param


def point_to(url, monkeypatch):
    """Makes an address the Hub's."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", url)


@pytest.fixture
def hub(server, monkeypatch, tmp_path) -> HubServer:
    """An empty Hub that the real client talks to, with an empty cache, over LFS."""
    server.reset()
    server.repos.clear()
    server.large.clear()
    server.cas.by_sha256.clear()
    server.cas.files.clear()
    point_to(server.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.utils.disable_progress_bars()
    return server


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return tiny_model(categories=[{"id": 7, "name": "shape 7"}], num_classes=1).eval()


@pytest.fixture
def published(hub, model) -> str:
    """The commit of the model in a public repository."""
    commit = push_to_hub(model, REPO, token="hf_alice", metadata=METADATA)
    hub.reset()
    return commit


def same(a, b) -> bool:
    return a.config == b.config and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def cached_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("models--*/snapshots/*/*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_round_trip(hub, model, transfer, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "lfs")
    commit = push_to_hub(model, REPO, token="hf_alice", metadata=METADATA)
    assert sum("/commit/" in line for line in hub.requests) == 1
    assert any("/cas/" in line for line in hub.requests) == (transfer == "xet")
    assert set(hub.repos[REPO].commits[commit]) == {".gitattributes", CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    for name in (REPO, f"hf-hub:{REPO}", f"{REPO}@{commit}", f"hf-hub:{REPO}@main"):
        assert same(a2fpn.from_pretrained(name), model)
    assert same(a2fpn.create_model(f"hf-hub:{REPO}@{commit}", pretrained=True), model)


def test_requests_of_a_cached_model(hub, published):
    a2fpn.from_pretrained(REPO)
    assert sum("GET" in line and "resolve" in line for line in hub.requests) == 2
    hub.reset()
    a2fpn.from_pretrained(REPO)
    assert hub.requests == [f"GET /api/models/{REPO}"]
    hub.reset()
    a2fpn.from_pretrained(REPO, revision=published)
    a2fpn.from_pretrained(REPO, local_files_only=True)
    assert hub.requests == []


def test_loading_reads_hashes_and_builds_once(hub, published, monkeypatch):
    calls = []
    for name in ("hub.read_checkpoint", "hub.file_sha256", "checkpoint.file_sha256", "load.build_model"):
        place = f"a2fpn.pretrained.{name}"
        original = pkgutil.resolve_name(
            place.replace(".read", ":read").replace(".file", ":file").replace(".build", ":build")
        )
        monkeypatch.setattr(place, lambda *given, f=original, n=name: calls.append(n) or f(*given))
    for _ in range(2):  # downloaded, then from the cache
        calls.clear()
        a2fpn.from_pretrained(REPO)
        assert calls == ["hub.read_checkpoint", "hub.file_sha256", "load.build_model"]


def test_without_pretrained_only_the_config_is_downloaded(hub, published, model):
    fresh = a2fpn.create_model(f"hf-hub:{REPO}")
    assert fresh.config == model.config
    assert not same(fresh, model)
    assert not any("safetensors" in line for line in hub.requests)


def test_all_files_come_from_one_commit(hub, published, model, monkeypatch):
    download = client._download

    def download_and_commit(repo, name, *args, **options):
        path = download(repo, name, *args, **options)
        if name == CONFIG_FILE:
            hub.repos[REPO].commit({CONFIG_FILE: b"{}", WEIGHTS_FILE: b""})
        return path

    monkeypatch.setattr(client, "_download", download_and_commit)
    assert same(a2fpn.from_pretrained(REPO), model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tags_and_pull_requests_are_revisions(hub, published, model, transfer, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "lfs")
    hub.repos[REPO].refs["v1.0"] = published
    other = tiny_model("fasterrcnn_fpn")
    push_to_hub(other, REPO, token="hf_alice", create_pr=True)
    assert same(a2fpn.from_pretrained(f"{REPO}@refs/pr/1"), other)
    assert same(a2fpn.from_pretrained(REPO), model)
    assert same(a2fpn.from_pretrained(REPO, revision="v1.0"), model)
    with pytest.raises(ValueError, match="give one of them"):
        a2fpn.from_pretrained(f"{REPO}@v1.0", revision="main")


def test_folders_need_no_hub(hub, model, tmp_path):
    folder = a2fpn.save_pretrained(model, tmp_path / "saved")
    assert same(a2fpn.from_pretrained(folder), model)
    assert same(a2fpn.from_pretrained(f"local-dir:{folder}"), model)
    assert same(a2fpn.create_model(f"local-dir:{folder}", pretrained=True), model)
    assert hub.requests == []
    with pytest.raises(ValueError, match=r"is a file; give its folder.*never pickles"):
        a2fpn.from_pretrained(folder / WEIGHTS_FILE)
    with pytest.raises(HubNotFoundError, match=r"No local folder 'runs/cells', and: 'runs/cells' of http"):
        a2fpn.from_pretrained("runs/cells")


def test_private_and_gated(hub, model):
    push_to_hub(model, REPO, token="hf_alice", private=True)
    assert hub.repos[REPO].private
    assert same(a2fpn.from_pretrained(REPO, token="hf_alice"), model)
    for token in (False, "hf_bob"):
        with pytest.raises(HubNotFoundError, match=r"does not exist, or is private and this token has no access"):
            a2fpn.from_pretrained(REPO, token=token)
    hub.repos[REPO].private, hub.repos[REPO].gated = False, True
    with pytest.raises(HubAccessError, match=rf"is gated: ask for access at {hub.url}/{REPO}"):
        a2fpn.from_pretrained(f"hf-hub:{REPO}", token="hf_bob", cache_dir=constants.HF_HUB_CACHE + "2")


def test_what_does_not_exist(hub, published, model):
    with pytest.raises(HubNotFoundError, match=r"'alice/cells' of http://127.0.0.1:\d+ has no revision 'v9'"):
        a2fpn.from_pretrained(REPO, revision="v9")
    with pytest.raises(HubNotFoundError, match=r"has no revision '0{40}'"):
        a2fpn.from_pretrained(REPO, revision="0" * 40)
    with pytest.raises(HubNotFoundError, match=r"'alice/none' of .* does not exist"):
        a2fpn.from_pretrained("alice/none")
    with pytest.raises(HubAccessError, match=r"not accessible with this token \(the server answered 401\)"):
        a2fpn.from_pretrained(REPO, token="hf_revoked")
    assert same(a2fpn.from_pretrained(REPO, token=False), model)
    files = hub.repos[REPO].commits[published]
    hub.repos[REPO].commit({WEIGHTS_FILE: files[WEIGHTS_FILE]})
    with pytest.raises(HubNotFoundError, match=r"is not a checkpoint of a2fpn: it has no config.json"):
        a2fpn.from_pretrained(REPO)
    hub.repos[REPO].commit({CONFIG_FILE: files[CONFIG_FILE]})
    with pytest.raises(HubNotFoundError, match=r"has no model.safetensors; only safetensors"):
        a2fpn.from_pretrained(REPO)
    hub.repos[REPO].commit({CONFIG_FILE: files[CONFIG_FILE], "pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(
        HubNotFoundError, match=r"but pytorch_model.bin: pickles can run arbitrary code and are never loaded"
    ):
        a2fpn.from_pretrained(REPO)
    assert not any("pytorch_model.bin" in line for line in hub.requests)


def test_an_oversized_config_is_not_downloaded(hub, published):
    hub.repos[REPO].commit({CONFIG_FILE: b" " * (2**24 + 1), WEIGHTS_FILE: b""})
    with pytest.raises(CheckpointError, match=r"config.json of \d+ bytes, too large for a configuration"):
        a2fpn.from_pretrained(REPO)
    assert not any("resolve" in line for line in hub.requests)


def test_config_and_weights_of_two_models_are_refused(hub, published):
    files = hub.repos[REPO].commits[published]
    hub.repos[REPO].commit(files | {WEIGHTS_FILE: files[WEIGHTS_FILE] + b" "})
    with pytest.raises(CheckpointError, match=r"config.json expects"):
        a2fpn.from_pretrained(REPO)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_flipped_bit_is_repaired_once(hub, model, transfer, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "lfs")
    push_to_hub(model, REPO, token="hf_alice")
    hub.fault(FETCH[transfer], flip=-100)
    assert same(a2fpn.from_pretrained(REPO), model)
    hub.fault(FETCH[transfer], flip=-100, times=99)
    with pytest.raises((HubIntegrityError, HubServerError), match=r"downloading it again did not help|failed"):
        a2fpn.from_pretrained(REPO, cache_dir=tmp_path / "other")


def test_a_flipped_bit_in_the_config(hub, published, model):
    hub.fault(r"GET .*/resolve/.*config.json", flip=40)
    assert same(a2fpn.from_pretrained(REPO), model)


def test_a_damaged_cache_is_repaired_or_reported(hub, published, model):
    a2fpn.from_pretrained(REPO)
    (weights,) = Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{WEIGHTS_FILE}")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.resolve().write_bytes(data)
    with pytest.raises(HubIntegrityError, match=r"model.safetensors of 'alice/cells' .* is damaged.*load it once with"):
        a2fpn.from_pretrained(REPO, local_files_only=True)
    assert same(a2fpn.from_pretrained(REPO), model)
    assert same(a2fpn.from_pretrained(REPO, local_files_only=True), model)


def test_a_cache_without_links_is_checked_too(hub, published, model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr(huggingface_hub.file_download, "are_symlinks_supported", lambda *_: False)
    hub.fault(FETCH["lfs"], flip=-100)
    assert same(a2fpn.from_pretrained(REPO), model)
    assert not any(path.is_symlink() for path in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/*"))


@pytest.mark.parametrize("status", [500, 503])
def test_a_failing_server(hub, published, status, tmp_path):
    hub.fault("GET /api/models", status=status, times=99)
    with pytest.raises(HubServerError, match=rf"the server answered {status} "):
        a2fpn.from_pretrained(REPO)
    hub.reset()
    hub.fault(FETCH["lfs"].replace("GET", "^GET"), status=status, times=99)
    with pytest.raises(HubServerError, match=r"server"):
        a2fpn.from_pretrained(f"hf-hub:{REPO}", revision=published)
    assert cached_files(Path(constants.HF_HUB_CACHE)) in ([], [CONFIG_FILE])


def test_a_connection_cut_once_is_taken_up_again(hub, published, model):
    hub.fault(FETCH["lfs"], truncate=1000)
    assert same(a2fpn.from_pretrained(REPO), model)


def test_a_connection_cut_always_leaves_nothing(hub, published, model, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.fault("GET .*/resolve/.*safetensors", drop=True, times=99)
    with pytest.raises(HubServerError, match=r"the connection failed .*; no partial files were kept"):
        a2fpn.from_pretrained(REPO, revision=published)
    assert cached_files(Path(constants.HF_HUB_CACHE)) == [CONFIG_FILE]
    hub.reset()
    assert same(a2fpn.from_pretrained(REPO), model)


def test_offline_says_what_is_missing_and_how_to_get_it(hub, published, model, monkeypatch, tmp_path):
    expected = (
        rf"config.json and model.safetensors of 'alice/cells' at revision 'main' of {hub.url} are not in the cache"
    )
    command = f"run: hf download {REPO} config.json model.safetensors --revision main --cache-dir {tmp_path}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOfflineError, match=rf"{expected} .*, and offline mode is on .*{command}"):
        a2fpn.from_pretrained(f"{REPO}@main", cache_dir=tmp_path)
    with pytest.raises(HubOfflineError, match=r"local_files_only=True"):
        a2fpn.from_pretrained(REPO, local_files_only=True)
    with pytest.raises(HubOfflineError, match="Nothing was published"):
        push_to_hub(model, REPO, token="hf_alice")
    assert hub.requests == []


def test_no_network(hub, published, model, monkeypatch, tmp_path):
    a2fpn.from_pretrained(REPO)
    point_to("http://127.0.0.1:9", monkeypatch)  # nothing listens there
    assert same(a2fpn.from_pretrained(REPO), model)
    with at_once(lambda: a2fpn.from_pretrained(REPO, local_files_only=True)):
        for revision in (None, published):
            with pytest.raises(HubOfflineError, match=r"the Hub cannot be reached \(ConnectError"):
                a2fpn.from_pretrained(REPO, revision=revision, cache_dir=tmp_path / "empty")


def test_offline_the_cache_serves_without_a_request(hub, published, model, monkeypatch):
    a2fpn.from_pretrained(REPO)
    hub.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(a2fpn.from_pretrained(REPO), model)
    assert hub.requests == []


def test_a_network_that_swallows_packets(hub, published, model, monkeypatch, tmp_path):
    """A listener whose queue is full answers nothing, as a firewall does."""
    a2fpn.from_pretrained(REPO)

    def cached():
        a2fpn.from_pretrained(REPO, local_files_only=True)

    with socket.socket() as hole, socket.socket() as first, socket.socket() as second:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for filling in (first, second):
            filling.setblocking(False)
            filling.connect_ex(hole.getsockname())
        point_to(f"http://127.0.0.1:{hole.getsockname()[1]}", monkeypatch)
        with at_once(cached):
            assert same(a2fpn.from_pretrained(REPO), model)
        with (
            at_once(cached),
            pytest.raises(HubOfflineError, match=r"cannot be reached \(ConnectTimeout.*run: hf download alice/cells"),
        ):
            a2fpn.from_pretrained(REPO, cache_dir=tmp_path)
        (tmp_path / f"models--{REPO.replace('/', '--')}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--{REPO.replace('/', '--')}" / "refs" / "main").write_text(published)
        with at_once(cached), pytest.raises(HubOfflineError, match=r"cannot be reached \(ConnectTimeout"):
            a2fpn.from_pretrained(REPO, cache_dir=tmp_path)


def test_a_server_that_keeps_silent(hub, published, model, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(5)
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        with pytest.raises(HubServerError, match=r"the connection failed \(ReadTime"):
            a2fpn.from_pretrained(REPO)


def test_a_slow_connection_is_waited_for(hub, published, model):
    size = len(hub.repos[REPO].commits[published][WEIGHTS_FILE])
    hub.fault(FETCH["lfs"], throttle=2 * size)
    start = time.perf_counter()
    assert same(a2fpn.from_pretrained(REPO), model)
    assert time.perf_counter() - start > 0.4


def test_a_slow_connection_that_stops(hub, published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.5)))
    hub.fault(FETCH["lfs"].replace("GET", "^GET"), throttle=1, times=99)
    with pytest.raises(HubServerError, match=r"the connection failed .*; no partial files were kept"):
        a2fpn.from_pretrained(REPO, revision=published)
    assert cached_files(Path(constants.HF_HUB_CACHE)) == [CONFIG_FILE]


def in_process(function: Callable[[], str], results: "multiprocessing.Queue[str]") -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=lambda: results.put(function()))
    process.start()
    return process


def load_commit() -> str:
    return download_checkpoint(Repo(REPO)).folder.name


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and limits")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_full_disk(hub, model, transfer, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "lfs")
    push_to_hub(model, REPO, token="hf_alice")

    def load_on_a_full_disk() -> str:
        import resource

        # A limit of the size of files: to a program it is what a full disk is.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            return load_commit()
        except (HubCacheError, HubServerError) as error:  # hf_xet raises a RuntimeError for a full disk
            return str(error)

    results = multiprocessing.get_context("fork").Queue()
    process = in_process(load_on_a_full_disk, results)
    said = results.get(timeout=60)
    process.join()
    assert "File too large" in said
    assert cached_files(Path(constants.HF_HUB_CACHE)) == [CONFIG_FILE]
    assert same(a2fpn.from_pretrained(REPO), model)


def test_a_cache_that_cannot_be_written(hub, published, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        HubCacheError,
        match=r"cache .*file cannot be written \((Not a directory|File exists)\): give another cache_dir",
    ):
        a2fpn.from_pretrained(REPO, cache_dir=tmp_path / "file")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and kill")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_and_concurrent_downloads(hub, model, transfer, monkeypatch):
    """A process killed in mid-download leaves no half file, and two at once fetch the weights one time."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "lfs")
    published = push_to_hub(model, REPO, token="hf_alice")
    hub.reset()
    commits = multiprocessing.get_context("fork").Queue()
    hub.fault(FETCH[transfer], throttle=1000)
    killed = in_process(load_commit, commits)
    deadline = time.monotonic() + 60
    while not any(re.search(FETCH[transfer], line) for line in hub.requests):
        assert killed.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.join()
    assert WEIGHTS_FILE not in cached_files(Path(constants.HF_HUB_CACHE))
    assert list(Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*.incomplete"))
    hub.reset()
    both = [in_process(load_commit, commits), in_process(load_commit, commits)]
    assert [commits.get(timeout=60) for _ in both] == [published] * 2
    for process in both:
        process.join()
    assert sum(bool(re.search(FETCH[transfer], line)) for line in hub.requests) == 1
    assert same(a2fpn.from_pretrained(REPO), model)


def test_refused_pushes_publish_nothing(hub, published, model, tmp_path):
    for token, status in [("hf_bob", 403), ("hf_revoked", 401), (False, 403)]:
        with pytest.raises(HubAccessError, match=rf"'alice/cells' .* \(the server answered {status}\): run `hf auth"):
            push_to_hub(model, REPO, token=token)
    hub.fault("POST .*/commit/", status=500, times=99)
    with pytest.raises(HubServerError, match="answered 500"):
        push_to_hub(model, REPO, token="hf_alice")
    folder = a2fpn.save_pretrained(model, tmp_path / "saved")
    (tmp_path / "secret").write_text("password")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"README.md of .*saved' is a symlink, whose target would be published"):
        push_to_hub(folder, REPO, token="hf_alice")
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="has its own metadata"):
        push_to_hub(folder, REPO, token="hf_alice", metadata={"a": 1})
    (folder / WEIGHTS_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="is damaged"):
        push_to_hub(folder, REPO, token="hf_alice")
    assert hub.repos[REPO].refs["main"] == published


def test_a_folder_is_pushed_with_its_own_card_and_nothing_else(hub, model, tmp_path):
    folder = a2fpn.save_pretrained(model, tmp_path / "saved")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (folder / "optimizer.bin").write_bytes(b"\x80\x04.")
    commit = push_to_hub(folder, REPO, token="hf_alice")
    files = hub.repos[REPO].commits[commit]
    assert set(files) == {".gitattributes", CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    assert b"# Mine" in files["README.md"]
    assert sha256(files[WEIGHTS_FILE]) == read_checkpoint(folder).sha256


def test_the_card(hub, published):
    card = ModelCard(hub.repos[REPO].commits[published]["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc0-1.0",
        "a2fpn",
        "image-segmentation",
    )
    results = {(r.task_type, r.metric_name, r.metric_value, r.dataset_name) for r in card.data.eval_results}
    assert results == {
        ("object-detection", "box AP", 0.5, "cells"),
        ("image-segmentation", "mask AP", 0.25, "cells"),
    }
    assert f'a2fpn.from_pretrained("{REPO}")' in card.text
    assert "Classes: shape 7\n" in card.text
    assert "1 class, made with" in card.text
    assert "Images keep their size." in card.text


@pytest.mark.parametrize(
    ("name", "metrics", "task", "tasks"),
    [
        ("htc_fpn", {"segm/ap": 0.5}, "image-segmentation", ["image-segmentation"]),
        ("keypointrcnn_fpn", {"keypoints/ap": 0.5}, "object-detection", ["keypoint-detection"]),
        ("fcos_fpn", {"bbox/ap": 0.5, "speed": 3}, "object-detection", ["object-detection"]),
    ],
)
def test_cards_of_other_detectors(name, metrics, task, tasks, tmp_path):
    facts = {"metrics": metrics, "license": "Creative Commons BY 4.0"}
    folder = a2fpn.save_pretrained(tiny_model(name, min_size=64, resize="at_least"), tmp_path, metadata=facts)
    card = ModelCard(model_card(read_checkpoint(folder), REPO))
    assert card.data.pipeline_tag == task
    assert [result.task_type for result in card.data.eval_results] == tasks
    assert (card.data.license, card.data.license_name) == ("other", "Creative Commons BY 4.0")
    assert card.data.base_model is None
    assert "by the rule `at_least`, min_size 64, max_size 1333." in card.text
    assert "No license of backbone weights is recorded." in card.text


def test_every_error_is_a_hub_error():
    children = [HubAccessError, HubCacheError, HubIntegrityError, HubNotFoundError, HubOfflineError, HubServerError]
    assert all(issubclass(child, HubError) for child in children)
    assert a2fpn.HubError is HubError


def test_the_command_line(hub, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    images, annotations = write_coco(tmp_path / "data", images=1, category_ids=[7])
    measured = tmp_path / "measured.json"
    folder = a2fpn.save_pretrained(model, tmp_path / "first")
    evaluate(model=[str(folder)], images=images, annotations=annotations, save=measured)
    metrics = {key: value for key, value in json.loads(measured.read_text()).items() if key.endswith("/ap")}
    for offset, outcome in [
        (0.0, None),
        (0.1, r"hub: error: 'alice/cells' does not reproduce its stated metrics: bbox/ap is "),
    ]:
        stated = {key: value + offset for key, value in metrics.items()}
        a2fpn.save_pretrained(model, folder, metadata={"metrics": stated})
        assert run_hub("push", str(folder), "--repo", REPO) is None
        assert f'a2fpn.from_pretrained("{REPO}", revision="{hub.repos[REPO].refs["main"]}")' in capsys.readouterr().out
        said = run_hub("verify", REPO, "--images", str(images), "--annotations", str(annotations))
        assert said is None if outcome is None else re.match(outcome, said)
        printed = capsys.readouterr().out
        assert (
            re.fullmatch(r"alice/cells: bbox/ap \S+, segm/ap \S+, as stated\.\n", printed)
            if said is None
            else not printed
        )
    capsys.readouterr()
    assert run_hub("card", str(folder), "--repo", REPO) is None
    card = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]["README.md"].decode()
    assert capsys.readouterr().out.strip() == card.strip()
    assert "is not a checkpoint folder" in run_hub("card", str(tmp_path), "--repo", REPO)


def test_timm_loads_a_backbone_from_the_hub(hub, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    saved, folder = a2fpn.save_pretrained(model, tmp_path / "saved"), tmp_path / "backbone"
    assert run_hub("backbone", str(saved), "--output", str(folder)) is None
    assert f'timm.create_model("local-dir:{folder}", pretrained=True' in capsys.readouterr().out
    huggingface_hub.create_repo("alice/backbone")
    huggingface_hub.upload_folder(repo_id="alice/backbone", folder_path=folder)
    x = torch.rand(1, 3, 64, 64)
    for name in ("hf-hub:alice/backbone", f"local-dir:{folder}"):
        body = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
        with torch.no_grad():
            for expected, got in zip(model.backbone(x).values(), body(x), strict=True):
                torch.testing.assert_close(got, expected)


def test_a_huge_card_is_never_read(hub, published, model):
    """A card that unpacks to gigabytes, in YAML here, harms nobody: loading asks for two files alone."""
    bomb = b"---\na: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(ord("a"), ord("j"))
    )
    files = hub.repos[REPO].commits[published]
    hub.repos[REPO].commit(files | {"README.md": bomb, "../../evil": b"x", "a2fpn.py": b"raise SystemExit"})
    assert same(a2fpn.from_pretrained(REPO), model)
    assert {line.rpartition("/")[2] for line in hub.requests if "resolve" in line} == {CONFIG_FILE, WEIGHTS_FILE}


def test_a_space_is_published_beside_its_model(hub, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    folder = a2fpn.save_pretrained(model, tmp_path / "cells")
    assert run_hub("push", folder, "--repo", "alice/cells", "--space") is None
    space = hub.repos["alice/cells-app"]
    files = space.commits[space.resolve("main")]
    assert {"app.py", "requirements.txt", "README.md"} <= set(files)
    assert b'MODEL = "alice/cells"' in files["app.py"]
    assert f"Try it:  {hub.url}/spaces/alice/cells-app" in capsys.readouterr().out
