"""Releases on the Hub, against a stand-in of its API on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from sophon.checkpoint import write_checkpoint
from tests.cli_helpers import refused, sophon
from tests.models.test_adapter_contract import CASES
from tests.test_checkpoint import MANIFEST, model_of

REPO = "pets/cats"
PUSH = ("push", "checkpoint=release", f"repo={REPO}")


class Hub(BaseHTTPRequestHandler):
    """What `push` asks of the Hub: does a repository exist, make it, how are files sent, take a commit."""

    server: Any

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        exists = REPO in self.server.repositories and self.path == f"/api/models/{REPO}"
        self._answer({"id": REPO} if exists else {"error": "Repository not found"}, 200 if exists else 404)

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_good":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.server.repositories[REPO] = json.loads(body)
            self._answer({"url": f"{constants.ENDPOINT}/{REPO}", "name": REPO})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer({"files": [{**each, "uploadMode": "regular", "shouldIgnore": False} for each in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{constants.ENDPOINT}/{REPO}/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            self._answer({"errors": [], "warnings": []})  # of the card's header

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.files, server.asked = {}, {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "release", model_of("timm"), CASES["timm"].spec, MANIFEST)
    (tmp_path / "release" / ".hidden").write_text("not for others")
    return tmp_path


def test_a_dry_run_is_the_default_and_asks_nobody(hub: Any, folder: Path) -> None:
    result = sophon(folder, *PUSH)
    assert result.code == 0, result
    assert "dry run: would upload 4 files" in result.out
    assert "sophon.json" in result.out
    assert "not audited" in result.err
    assert not hub.asked


@pytest.mark.parametrize("there", [False, True])
def test_a_checkpoint_is_uploaded_whole_and_a_new_repository_is_private(hub: Any, folder: Path, there: bool) -> None:
    if there:
        hub.repositories[REPO] = {}
    result = sophon(folder, *PUSH, "dry_run=false")
    assert result.code == 0, result
    assert hub.repositories[REPO].get("visibility") == (None if there else "private")
    release = folder / "release"
    assert hub.files == {path.name: path.read_bytes() for path in release.iterdir() if path.name != ".hidden"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["repo=null"], "repo: '' is not allowed; give ORGANISATION/NAME"),
        (["repo=cats"], "repo: 'cats' is not allowed"),
        (["repo=pets/c--ats"], "repo: 'pets/c--ats' is not allowed"),
        (["checkpoint=reference"], "is the unprotected reference; give a protected checkpoint"),
        (["dry_run=false"], "repo: not uploaded (.*401.*); log in with `hf auth login`"),
    ],
)
def test_what_is_not_released_is_said_in_one_line(
    hub: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    write_checkpoint(folder / "reference", model_of("timm"), CASES["timm"].spec, {**MANIFEST, "verb": "pretrain"})
    said = refused(folder, *PUSH, *changes)
    for words in message.split(".*"):
        assert words in said
    assert not hub.files
