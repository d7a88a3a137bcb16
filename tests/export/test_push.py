"""Uploads to the Hub: the real client against a server on loopback; nothing of this machine leaves it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lora_accel.cli import main
from lora_accel.errors import ArtifactError, ConfigError
from lora_accel.export.push import push_folder

HUB_ID = "owner/base"


class Hub:
    """A stub of the Hub's API that records the requests of huggingface_hub."""

    def __init__(self) -> None:
        hub = self
        self.requests: list[tuple[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                lines = [json.loads(line) for line in body.splitlines()] if b"\n" in body else json.loads(body)
                hub.requests.append((self.path, lines))
                answer = json.dumps(hub.answer(self.path, lines)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: Any) -> dict[str, Any]:
        if path.endswith("/repos/create"):
            return {"url": f"{self.url}/{body['organization']}/{body['name']}"}
        if "/preupload/" in path:
            files = [{"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in body["files"]]
            return {"files": files}
        return {"commitUrl": f"{self.url}/me/adapter/commit/1", "commitOid": "1", "errors": [], "warnings": []}

    @property
    def files(self) -> dict[str, bytes]:
        """Return the uploaded files."""
        ((_, lines),) = [request for request in self.requests if "/commit/" in request[0]]
        files = [line["value"] for line in lines if line["key"] == "file"]
        return {file["path"]: base64.b64decode(file["content"]) for file in files}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "the-token-of-the-user")
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Return a folder like that of an adapter whose base and data were in local folders."""
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    files: dict[str, Any] = {
        "adapter_config.json": {"base_model_name_or_path": str(tmp_path / "base"), "r": 4},
        "provenance.json": {
            "base": {"name_or_path": str(tmp_path / "base"), "revision": None, "sha256": {}},
            "data": [{"path": str(tmp_path / "rows.jsonl")}],
            "config": {"output_dir": "/srv/runs/one/", "data": {"cache_dir": "~/cache"}, "seed": 0},
        },
        "manifest.json": {"files": {}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "adapter_model.safetensors").write_bytes(b"\0\xff" * 50)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# LoRA adapter\n")
    return folder


def test_the_client_uploads_a_folder_without_paths_of_this_machine(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    pushed = push_folder(adapter, "me/adapter", base=HUB_ID, private=True)
    bodies = dict(hub.requests)
    create = bodies["/api/repos/create"]
    assert (create["name"], create["organization"]) == ("adapter", "me")
    assert create.get("private") or create.get("visibility") == "private"  # before and since huggingface_hub 2
    assert "/api/models/me/adapter/preupload/main" in bodies
    assert hub.requests[-1][0] == "/api/models/me/adapter/commit/main"
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json"]
    assert hub.files["adapter_model.safetensors"] == b"\0\xff" * 50
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == HUB_ID
    assert b"base_model: owner/base\n" in hub.files["README.md"]
    provenance = json.loads(hub.files["provenance.json"])
    assert provenance["base"]["name_or_path"] == HUB_ID
    assert provenance["data"] == [{"path": "rows.jsonl"}]
    assert provenance["config"] == {"output_dir": "one", "data": {"cache_dir": "cache"}, "seed": 0}
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())
    assert pushed["url"] == f"{hub.url}/me/adapter"
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_a_dry_run_lists_the_files_and_sends_nothing(
    hub: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lora-accel", "push", str(adapter), "me/adapter", "--base", HUB_ID, "--dry-run"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert hub.requests == []
    output = capsys.readouterr().out
    assert "            100  adapter_model.safetensors\n" in output
    assert "provenance.json  (paths of this machine removed)" in output
    assert "bytes in 4 files would be uploaded to me/adapter" in output


def test_the_state_of_a_checkpoint_is_not_uploaded(hub: Hub, adapter: Path) -> None:
    """Only its run resumes from it, and state.json names folders of this machine."""
    for name in ("optimizer.safetensors", "state.json"):
        (adapter / name).write_text("{}")
    pushed = push_folder(adapter, "me/a", base=HUB_ID, dry_run=True)
    assert pushed["left_out"] == ["optimizer.safetensors", "state.json"]
    assert not {"optimizer.safetensors", "state.json"} & {file["name"] for file in pushed["files"]}


HF_TOKEN = "hf_" + "abcDEF123" * 4


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("README.md", "\nuse {home}/models/x\n", r"README.md:2: contains a path of this machine, .*/models/x"),
        ("README.md", "see /home/ann/rows.jsonl", "README.md:1: contains a path of this machine, /home/ann/rows.jsonl"),
        ("notes.txt", r"C:\Users\ann\rows", "contains a path of this machine"),
        ("README.md", f"login with {HF_TOKEN}", "README.md:1: contains an access token of the Hub; remove it"),
        ("training.yaml", "key: sk-" + "a1" * 20, "training.yaml:1: contains an API key"),
        ("x.json", '{"url": "https://ann:secret@host/x"}', "x.json:1: contains a password in a URL"),
        ("x.md", "the-token-of-the-user", "x.md:1: contains an access token of the Hub"),
        ("id", "-----BEGIN OPENSSH PRIVATE KEY-----", "id:1: contains a private key"),
    ],
)
def test_a_path_or_a_secret_in_a_text_is_an_error(hub: Hub, adapter: Path, name: str, text: str, problem: str) -> None:
    (adapter / name).write_text(text.replace("{home}", str(Path.home())))
    with pytest.raises(ArtifactError, match=problem) as error:
        push_folder(adapter, "me/adapter", base=HUB_ID)
    assert HF_TOKEN not in str(error.value)
    assert hub.requests == []


def test_ordinary_texts_are_no_paths(hub: Hub, adapter: Path) -> None:
    (adapter / "README.md").write_text("see https://host/home/x, </data/tool>, ./tmp/x, a/data/b and 1/root of 2\n")
    push_folder(adapter, "me/adapter", base=HUB_ID)
    assert b"</data/tool>" in hub.files["README.md"]


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (lambda x: {"base": None}, ArtifactError, "names its base by a path of this machine, .*; pass --base HUB_ID"),
        (lambda x: {"base": "base"}, ConfigError, "--base=base: is not a Hub id"),
        (lambda x: {"repo_id": "adapter"}, ConfigError, "REPO_ID=adapter: is not a Hub id, such as my-name/my-adapter"),
        (lambda x: {"folder": x / "none"}, ArtifactError, "none: is not a folder"),
        (lambda x: {"folder": x.parent.parent}, ArtifactError, "is neither an adapter"),
        (
            lambda x: (x.parent / "plan.json").write_text("{}") and {"folder": x.parent},
            ArtifactError,
            "push .*/adapter",
        ),
        (lambda x: (x / "link").symlink_to(x.parent.parent) or {}, ArtifactError, "link: is a link to"),
    ],
)
def test_what_cannot_be_uploaded_is_an_error(
    hub: Hub, adapter: Path, change: Callable[[Path], dict[str, Any]], error: type[Exception], problem: str
) -> None:
    arguments = {"folder": adapter, "repo_id": "me/adapter", "base": HUB_ID} | change(adapter)
    with pytest.raises(error, match=problem):
        push_folder(arguments["folder"], arguments["repo_id"], base=arguments["base"])
    assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_one_message(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(ArtifactError, match=r"me/adapter: cannot be uploaded to: .*; log in with `hf auth login`"):
        push_folder(adapter, "me/adapter", base=HUB_ID)
