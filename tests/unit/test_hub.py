"""The hub's own client against a hub of ours on this machine: each refusal is one line with a URL and a remedy."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mistral_dist.errors import CheckpointError, ModelError, RunError
from mistral_dist.export.push import push

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_averysecrettoken"
NAME = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "mistral"}',
    "tokenizer.json": b"{}",
    "tokenizer.model.v3": b"pieces",
    "model.safetensors": b"weights",
    # what every model on the hub has, and `fetch` leaves there
    ".gitattributes": b"*.safetensors filter=lfs",
    "README.md": b"# tiny",
    "consolidated.safetensors": b"weights again",
    "pytorch_model.bin": b"pickle",
}
WANTED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model.v3"]

Reply = tuple[int, dict[str, str], bytes]
Fetch = Callable[..., "subprocess.CompletedProcess[str]"]


class Hub(ThreadingHTTPServer):
    """Answers with what the hub answers; a reply in `refuse` goes before, by what its request's path begins with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse: dict[str, Reply] = {}
        self.heals_after = 10**6
        """So many refusals are given, then the answer."""
        self.asked: list[str] = []
        self.sent: list[dict[str, Any]] = []
        """Of a commit, line by line."""
        self.pushed: list[str] = []
        """What lies in the repository me/my."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def reply(self, path: str) -> Reply:
        self.asked.append(path)
        for start, reply in self.refuse.items():
            if path.startswith(start) and self.heals_after > 0:
                self.heals_after -= 1
                return reply
        if path.startswith(f"/api/models/{NAME}/tree/"):
            return json_reply([{"type": "file", "path": name, "size": len(body), "oid": oid(body)} for name, body in FILES.items()])
        if path.startswith("/api/models/me/my/tree/"):
            return json_reply([{"type": "file", "path": name, "size": 7, "oid": oid(name.encode())} for name in self.pushed])
        if path.startswith(f"/api/models/{NAME}"):
            return json_reply({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        body = FILES.get(path.rpartition("/")[2])
        if body is None or not path.startswith(f"/{NAME}/resolve/"):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{oid(body)}"', "X-Repo-Commit": COMMIT}, body


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        status, headers, body = self.server.reply(self.path)
        if status == 0:  # the connection breaks
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        self.server.asked.append(self.path)
        if self.path in self.server.refuse:
            status, headers, content = self.server.refuse[self.path]
        elif self.path == "/api/repos/create":
            assert json.loads(body)["visibility"] == "private"
            status, headers, content = json_reply({"url": f"{self.server.url}/me/my", "name": "me/my", "id": "me/my"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            status, headers, content = json_reply(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        else:
            self.server.sent = [json.loads(line) for line in body.splitlines()]
            commit = {"commitUrl": f"{self.server.url}/me/my/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            status, headers, content = json_reply(commit)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def json_reply(content: object) -> Reply:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def refusal(status: int, code: str = "", message: str = "") -> Reply:
    return status, {"X-Error-Code": code, "X-Error-Message": message} if code else {}, b"{}"


def oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\ntask: {{kind: chat}}\ndata: {{sources: [{{path: x.jsonl}}], dir: {tmp_path}/d}}\nmodel: {{name: {NAME}}}\n"
    )
    return path


@pytest.fixture
def python(tmp_path: Path) -> Fetch:
    """Run Python with a hub's cache of its own: the library reads its settings when it is imported."""

    def start(*words: str | Path, endpoint: str, offline: bool = False, **environment: str) -> "subprocess.CompletedProcess[str]":
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING")) and "proxy" not in key.lower()}
        ours |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT), "NO_PROXY": "*", **environment}
        ours |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # progress is no message
        if offline:
            ours["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, text=True, timeout=120, check=False)

    return start


@pytest.fixture
def fetch(python: Fetch, recipe: Path) -> Fetch:
    def start(*overrides: str, endpoint: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        impatient = "from mistral_dist import hub, cli; hub.PATIENCE = 2.0; cli.main()"
        return python("-c", impatient, "fetch", recipe, *overrides, endpoint=endpoint, **environment)

    return start


def the_line(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line that a refused fetch leaves."""
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown
    assert done.returncode == 2, shown
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, shown
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("path", "reply", "words"),
    [
        (
            f"/api/models/{NAME}",
            refusal(403, "GatedRepo", "Access to model is restricted"),
            ["gated; accept its terms", "log in", "HF_TOKEN"],
        ),
        (f"/{NAME}/resolve", refusal(403, "GatedRepo", "Access to model is restricted"), ["gated; accept its terms", "log in", "HF_TOKEN"]),
        (f"/{NAME}/resolve", refusal(401, "GatedRepo", "Access to model is restricted"), ["gated; accept its terms", "log in", "HF_TOKEN"]),
        (f"/api/models/{NAME}", refusal(401), ["log in", "HF_TOKEN"]),
        (f"/api/models/{NAME}", refusal(404, "RepoNotFound", "Repository not found"), ["no such model", "check model.name"]),
        (f"/api/models/{NAME}", refusal(404, "RevisionNotFound", "Invalid rev id"), ["no revision 'main'", "set model.revision"]),
        (f"/api/models/{NAME}", refusal(403), ["refused", "403", "log in"]),
        (f"/api/models/{NAME}", refusal(0), ["cannot be reached", "model.path"]),
        (f"/{NAME}/resolve", refusal(0), ["cannot be reached", "model.path"]),
    ],
)
def test_a_refusal_is_one_line_with_url_and_remedy(hub: Hub, fetch: Fetch, path: str, reply: Reply, words: list[str]) -> None:
    hub.refuse[path] = reply
    line = the_line(fetch(endpoint=hub.url))
    for word in [f"{hub.url}/{NAME}", *words]:
        assert word in line


@pytest.mark.parametrize("status", [0, 503, 429])
def test_what_heals_is_waited_for(hub: Hub, fetch: Fetch, status: int) -> None:
    hub.refuse[f"/api/models/{NAME}"] = refusal(status)
    hub.heals_after = 1
    done = fetch(endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert hub.heals_after == 0


def test_what_does_not_heal_is_not_asked_for_again(hub: Hub, fetch: Fetch) -> None:
    hub.refuse[f"/api/models/{NAME}"] = refusal(404, "RepoNotFound", "Repository not found")
    the_line(fetch(endpoint=hub.url))
    assert len(hub.asked) == 1


def test_who_has_a_token_is_not_told_to_log_in(hub: Hub, fetch: Fetch) -> None:
    hub.refuse[f"/api/models/{NAME}"] = refusal(403, "GatedRepo")
    line = the_line(fetch(endpoint=hub.url, HF_TOKEN="hf_test"))
    assert "use a token that may read it" in line
    assert "no token on this machine" not in line


def test_a_hub_that_does_not_answer_is_one_line_with_url_and_remedy(fetch: Fetch) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused at once, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        line = the_line(fetch(endpoint=url))
    for word in [f"{url}/{NAME}", "cannot be reached", "model.path"]:
        assert word in line


def test_a_name_that_the_hub_cannot_have_is_refused(hub: Hub, fetch: Fetch) -> None:
    line = the_line(fetch("model.name=a/b/c", endpoint=hub.url))
    assert "model.name" in line
    assert "a/b/c" in line
    assert hub.asked == []


def test_a_missing_data_set_is_one_line_with_url_and_remedy(hub: Hub, fetch: Fetch, recipe: Path) -> None:
    hub.refuse["/api/datasets/org/rows"] = refusal(404, "RepoNotFound")
    recipe.write_text(recipe.read_text().replace("path: x.jsonl", "name: org/rows"))
    line = the_line(fetch(endpoint=hub.url))
    for word in [f"{hub.url}/datasets/org/rows", "data.sources.name", "data.sources.path"]:
        assert word in line


def test_what_was_fetched_is_found_without_a_network(hub: Hub, fetch: Fetch, python: Fetch, tmp_path: Path) -> None:
    done = fetch(endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    hub.shutdown()
    asked = len(hub.asked)
    code = f"from mistral_dist.config import Model; from mistral_dist.hub import local_path; print(local_path(Model(name={NAME!r})))"
    found = python("-c", code, endpoint=hub.url, offline=True)
    assert found.returncode == 0, found.stderr
    folder = Path(found.stdout.strip())
    assert sorted(file.name for file in folder.iterdir()) == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert f"{NAME}: {folder}" in done.stdout
    assert len(hub.asked) == asked


def test_weights_are_never_fetched_as_a_pickle_or_twice(hub: Hub, fetch: Fetch) -> None:
    assert fetch(endpoint=hub.url).returncode == 0
    assert sorted({path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}) == WANTED


def test_a_model_that_was_not_fetched_names_the_command(python: Fetch, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"messages": []}\n')
    line = the_line(python("-m", "mistral_dist.cli", "prepare", recipe, endpoint="http://127.0.0.1:9", offline=True))
    for word in [NAME, "mistral-dist fetch", "model.path"]:
        assert word in line


@pytest.mark.parametrize("listening", [True, False])
def test_the_doctor_sees_whether_the_hub_answers(hub: Hub, python: Fetch, listening: bool) -> None:
    if not listening:
        hub.shutdown()
        hub.server_close()
    found = python("-c", "from mistral_dist.hub import is_reachable; print(is_reachable())", endpoint=hub.url)
    assert found.stdout.strip() == str(listening), found.stderr


# an exported folder -> the hub


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    files = {"README.md": "# my", "export.json": "{}", "model.safetensors": "weights"}
    for name, text in files.items():
        (folder / name).write_text(text)
    sums = "".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in files.items())
    (folder / "SHA256SUMS").write_text(sums)
    (folder / "mine.txt").write_text("of the user")
    return folder


def test_without_being_asked_nothing_is_sent(exported: Path, hub: Hub, python: Fetch) -> None:
    done = python("-m", "mistral_dist.cli", "push", exported, "me/my", endpoint=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[:4]] == ["README.md", "export.json", "model.safetensors", "SHA256SUMS"]
    assert f"{hub.url}/me/my: nothing was sent; --upload sends these 4 files" in done.stdout
    assert hub.asked == []


def test_what_was_exported_is_sent_and_nothing_else(exported: Path, hub: Hub, python: Fetch) -> None:
    done = python("-m", "mistral_dist.cli", "push", exported, "me/my", "--upload", endpoint=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/my: 4 files"
    sent = {line["value"]["path"] for line in hub.sent if line["key"] == "file"}
    assert sent == {"README.md", "export.json", "model.safetensors", "SHA256SUMS"}
    assert TOKEN not in done.stdout + done.stderr


def test_an_earlier_export_in_the_repository_is_replaced_whole(exported: Path, hub: Hub, python: Fetch) -> None:
    """Or its adapter would be loaded instead of the new model."""
    old = ["adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    hub.pushed = [*old, ".gitattributes", "README.md", "images/loss.png", "LICENSE"]
    done = python("-m", "mistral_dist.cli", "push", exported, "me/my", "--upload", endpoint=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert {line["value"]["path"] for line in hub.sent if line["key"] == "deletedFile"} == set(old)
    assert "README.md" in {line["value"]["path"] for line in hub.sent if line["key"] == "file"}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_one_line_without_the_token(exported: Path, hub: Hub, python: Fetch, status: int) -> None:
    hub.refuse["/api/repos/create"] = (status, {}, b"{}")
    done = python("-m", "mistral_dist.cli", "push", exported, "me/my", "--upload", endpoint=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {hub.url}/me/my: {'refused' if status < 500 else 'cannot be reached'} (")
    assert status == 500 or "use a token that may write it" in line
    assert TOKEN not in done.stdout + done.stderr


def test_what_is_not_as_it_was_exported_stays_here(exported: Path, tmp_path: Path) -> None:
    told: list[str] = []
    (exported / "model.safetensors").write_text("weight?")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not as it was exported \(SHA256SUMS\)"):
        push(exported, "me/my", told.append, upload=True)
    with pytest.raises(RunError, match="no exported folder"):
        push(tmp_path, "me/my", told.append, upload=True)
    assert told == []


@pytest.mark.parametrize("name", ["me/", "/my", "me/m y", "me/-x", "me/my.git", "a/b/c", "my", ""])
def test_a_name_that_no_repository_could_have_is_refused(exported: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is no name on the hub; give owner and model, as in me/exported"):
        push(exported, name, print, upload=False)
