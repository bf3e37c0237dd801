"""A Hub on loopback, in memory: the part of the Hub's HTTP interface that publishing and loading models uses.

It speaks commits, pull requests, git-LFS and Xet (CAS version 1), tokens, private and gated repositories, and breaks
requests on demand. Hashes are the true ones: git-sha1 of regular files, sha256 of large ones.
"""

import base64
import dataclasses
import hashlib
import json
import re
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, bytes]


def is_large(path: str) -> bool:
    """Whether a file goes through LFS or Xet."""
    return path.endswith((".safetensors", ".bin", ".pth"))


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclasses.dataclass
class Repo:
    """Commits by id, and references (branches, tags, ``refs/pr/1``) to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main") -> str:
        sha = hashlib.sha1(f"{ref} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Answer(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
        return sha

    def pull_request(self) -> str:
        ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in self.refs) + 1}"
        self.refs[ref] = self.refs["main"]
        return ref


class Answer(Exception):  # noqa: N818
    """An answer that ends the request, usually an error in the Hub's own shape."""

    def __init__(self, status: int, body: Any = None, *, code: str = "", message: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {key: value for key, value in headers.items() if value}
        self.status, self.body = status, {"error": message} if body is None else body


@dataclasses.dataclass
class Fault:
    """What happens to the next ``times`` requests whose ``METHOD /path`` matches.

    ``status`` answers with it; ``drop`` closes without an answer; ``truncate`` closes after so many bytes of the body;
    ``flip`` inverts a bit of that byte of the body; ``throttle`` sends so many bytes a second.
    """

    match: str
    times: int = 1
    status: int = 0
    drop: bool = False
    truncate: int | None = None
    flip: int | None = None
    throttle: float = 0


class HubServer:
    """The server. ``requests`` lists ``METHOD /path`` of every request, ``faults`` what is to go wrong."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.large: dict[str, bytes] = {}
        self.cas = Cas()
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def reset(self) -> None:
        """Forgets requests and faults."""
        self.requests.clear()
        self.faults.clear()

    def fault(self, match: str, **what: Any) -> None:
        self.faults.append(Fault(match, **what))

    def large_file(self, oid: str) -> bytes:
        """Content of a large file; one that came over Xet is put together once."""
        if oid not in self.large:
            self.large[oid] = self.cas.assemble(oid, f"{self.url}/cas")
        return self.large[oid]


class Cas:
    """Xet's content-addressed store: files are terms, ranges of chunks of xorbs."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[tuple[str, int, int, int]]] = {}  # xorb, bytes, first and last chunk + 1
        self.by_sha256: dict[str, str] = {}

    def chunks(self, xorb: str) -> list[tuple[int, int, int]]:
        """Offset, stored length and unpacked length of each chunk."""
        data, at, found = self.xorbs[xorb], 0, []
        while at + 8 <= len(data) and data[at] == 0:  # a chunk's header; the footer begins with "XETBLOB"
            stored = 8 + int.from_bytes(data[at + 1 : at + 4], "little")
            found.append((at, stored, int.from_bytes(data[at + 5 : at + 8], "little")))
            at += stored
        return found

    def add_shard(self, data: bytes) -> None:
        """Reads the file section: records of 48 bytes, ended by one of ones."""

        def read_hash(at: int) -> str:  # four little-endian words, also for a sha256
            return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data[at : at + 32]))

        at = 48
        while data[at : at + 32] != b"\xff" * 32:
            name, (flags, terms) = read_hash(at), struct.unpack("<II", data[at + 32 : at + 40])
            self.files[name] = []
            for _ in range(terms):
                at += 48
                _, size, first, end = struct.unpack("<IIII", data[at + 32 : at + 48])
                self.files[name].append((read_hash(at), size, first, end))
            at += 48 + 48 * terms * (flags >> 31 & 1)  # verification entries
            if flags >> 30 & 1:
                self.by_sha256[read_hash(at)] = name
                at += 48

    def reconstruction(self, name: str, url: str, wanted: tuple[int, int] | None) -> dict[str, Any]:
        """Terms that cover the wanted bytes, and where to fetch them."""
        if name not in self.files:
            raise Answer(404)
        first, last = wanted or (0, sum(term[1] for term in self.files[name]) - 1)
        position, skipped, terms, fetch = 0, None, [], {}
        for xorb, _, start, end in self.files[name]:
            chunks, kept = self.chunks(xorb), []
            for index in range(start, end):
                if position <= last and position + chunks[index][2] > first:
                    skipped = first - position if skipped is None else skipped
                    kept.append(index)
                position += chunks[index][2]
            if kept:
                span = {"start": kept[0], "end": kept[-1] + 1}
                terms.append({"hash": xorb, "unpacked_length": sum(chunks[i][2] for i in kept), "range": span})
                stored = {"start": chunks[kept[0]][0], "end": sum(chunks[kept[-1]][:2]) - 1}
                place = {"range": span, "url": f"{url}/cas/data/{xorb}", "url_range": stored}
                fetch.setdefault(xorb, []).append(place)
        if not terms:
            raise Answer(416)
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch}

    def assemble(self, oid: str, url: str) -> bytes:
        """Downloads a file from this very store, which also checks what was uploaded."""
        import hf_xet

        if oid not in self.by_sha256:
            raise Answer(400, message=f"There is no object {oid}.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file"
            size = sum(term[1] for term in self.files[self.by_sha256[oid]])
            session = hf_xet.XetSession()
            expiry = int(time.time()) + 3600
            with session.new_file_download_group(endpoint=url, token="t", token_expiry_unix_secs=expiry) as group:
                group.start_download_file(hf_xet.XetFileInfo(self.by_sha256[oid], size), str(path))
            data = path.read_bytes()
        assert sha256(data) == oid
        return data


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorator(function: Callable[..., None]) -> Callable[..., None]:
        expanded = pattern.replace("ID", "(?P<repo_id>[^/]+/[^/]+)").replace("REV", "(?P<revision>[^/]+)")
        ROUTES.append((method, re.compile(expanded.replace("HASH", "(?P<name>[0-9a-f]{64})")), function))
        return function

    return decorator


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        line = f"{self.command} {url.path}"
        self.body = self.read_body()
        self.fault = Fault("")
        with self.hub.lock:
            self.hub.requests.append(line)
            for fault in self.hub.faults:
                if fault.times and re.search(fault.match, line):
                    fault.times -= 1
                    self.fault = fault
                    break
        try:
            if self.fault.drop:
                raise ConnectionAbortedError
            if self.fault.status:
                raise Answer(self.fault.status, message="injected fault")
            method = "GET" if self.command == "HEAD" else self.command
            for expected, pattern, function in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and method == expected:
                    function(self, **{key: unquote(value) for key, value in match.groupdict(default="main").items()})
                    return
            raise Answer(404)
        except Answer as answer:
            self.answer(answer.body, status=answer.status, headers=answer.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body: Any = b"", *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        first, last = self.range() or (0, len(data) - 1)
        partial = isinstance(body, bytes) and self.range() is not None
        extra = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if partial else {}
        data = data[first : last + 1] if partial else data
        self.send_response(206 if partial else status)
        for key, value in {"Content-Length": str(len(data)), **extra, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault.flip is not None:
            data = bytearray(data)
            data[self.fault.flip % len(data)] ^= 1
        if self.fault.truncate is not None:
            data, self.close_connection = data[: self.fault.truncate], True
        step = 2**15 if self.fault.throttle else max(1, len(data))
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            time.sleep(step / self.fault.throttle if self.fault.throttle else 0)

    def range(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        return (int(match[1]), int(match[2])) if match else None

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Answer(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repo(self, repo_id: str, *, write: bool = False, files: bool = False) -> Repo:
        user, repo = self.user(), self.hub.repos.get(repo_id)
        owner = user == repo_id.partition("/")[0]
        if repo is None or (repo.private and not owner):
            raise Answer(404 if user else 401, code="RepoNotFound", message="Repository not found")
        if files and repo.gated and not owner:
            raise Answer(403, code="GatedRepo", message="Access to model is restricted.")
        if write and not owner:
            raise Answer(403, message="You must use a write token to perform this action")
        return repo

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.S)
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            raise Answer(400, {"errors": [{"message": str(error)}]}) from error
        self.answer({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if user is None or user != repo_id.partition("/")[0]:
            raise Answer(403, message="You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repos:
            raise Answer(409, url)
        self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        self.hub.repos[repo_id].commit({".gitattributes": b""})
        self.answer(url)

    @route("GET", "/api/models/ID(/revision/REV)?")
    def model_info(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        siblings = [{"rfilename": path, "size": len(data)} for path, data in repo.commits[sha].items()]
        self.answer({"id": repo_id, "sha": sha, "siblings": siblings, "tags": []})

    @route("POST", "/api/models/ID/discussions")
    def open_pull_request(self, repo_id: str) -> None:
        self.answer({"num": int(self.repo(repo_id).pull_request().rpartition("/")[2])})

    @route("GET", r"/api/models/ID/discussions/(?P<number>\d+)")
    def discussion(self, repo_id: str, number: str) -> None:
        fields = {"title": "", "num": int(number), "author": {"name": "a"}, "status": "draft", "isPullRequest": True}
        fields |= {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": repo_id, "type": "model"}, "diff": ""}
        self.answer(fields | {"events": [], "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}})

    @route("POST", "/api/(?:models|spaces)/ID/preupload/REV")
    def preupload(self, repo_id: str, revision: str) -> None:
        self.repo(repo_id)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {False: "regular", True: "lfs"}
        self.answer({"files": [{"path": p, "uploadMode": modes[is_large(p)], "shouldIgnore": False} for p in paths]})

    @route("POST", r"/ID\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}"}
            entry |= {} if entry["oid"] in self.hub.large else {"actions": {"upload": upload}}
        self.answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs/HASH")
    def lfs_upload(self, name: str) -> None:
        if sha256(self.body) != name:
            raise Answer(400, message="BadDigest")
        self.hub.large[name] = self.body
        self.answer()

    @route("POST", "/api/(?:models|spaces)/ID/commit/REV")
    def commit(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=not (revision.startswith("refs/pr/") or "create_pr" in self.query))
        revision = repo.pull_request() if "create_pr" in self.query else revision
        files = dict(repo.commits[repo.resolve(revision)])
        for operation in [json.loads(line) for line in self.body.splitlines()][1:]:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.large_file(value["oid"])
        sha, url = repo.commit(files, revision), f"{self.hub.url}/{repo_id}"
        pull_request = f"{url}/discussions/{revision.rpartition('/')[2]}"
        body = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        self.answer(body | ({"pullRequestUrl": pull_request} if "create_pr" in self.query else {}))

    @route("GET", "/ID/resolve/REV/(?P<path>.+)")
    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.repo(repo_id, files=True)
        sha = repo.resolve(revision)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        data = repo.commits[sha].get(path)
        if data is None:
            raise Answer(404, code="EntryNotFound", message="Entry not found")
        headers["ETag"] = f'"{sha256(data) if is_large(path) else git_sha1(data)}"'
        if sha256(data) in self.hub.cas.by_sha256:
            token = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": self.hub.cas.by_sha256[sha256(data)], "Link": f'<{token}>; rel="xet-auth"'}
        self.answer(data, headers=headers)

    @route("GET", "/api/models/ID/xet-(read|write)-token/REV")
    def xet_token(self, repo_id: str, revision: str) -> None:
        url, expiry = f"{self.hub.url}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(expiry)}
        self.answer({"casUrl": url, "exp": expiry, "accessToken": "t"}, headers=headers)

    @route("POST", "/cas/v1/xorbs/default/HASH")
    def put_xorb(self, name: str) -> None:
        self.hub.cas.xorbs[name] = self.body
        self.answer({"was_inserted": True})

    @route("POST", "/cas/v1/shards")
    def put_shard(self) -> None:
        self.hub.cas.add_shard(self.body)
        self.answer({"result": 1})

    @route("GET", "/cas/v1/reconstructions/HASH")
    def reconstruction(self, name: str) -> None:
        self.answer(self.hub.cas.reconstruction(name, self.hub.url, self.range()))

    @route("GET", "/cas/data/HASH")
    def xorb(self, name: str) -> None:
        self.answer(self.hub.cas.xorbs[name])
