"""An exported folder goes to the hub as it is, when asked to, and no token is seen."""

import hashlib
import json
from pathlib import Path

import pytest

from mistral_dist.errors import CheckpointError, RunError
from mistral_dist.export.push import push
from tests.unit.test_hub import Fetch, Handler, Hub, hub, json_reply, python  # noqa: F401 - fixtures

TOKEN = "hf_averysecrettoken"


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


class Taking(Handler):
    """Takes what is sent, as the hub does."""

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
            self.server.sent = [json.loads(line) for line in body.splitlines()]  # type: ignore[attr-defined]
            commit = {"commitUrl": f"{self.server.url}/me/my/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            status, headers, content = json_reply(commit)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


def test_without_being_asked_nothing_is_sent(exported: Path, hub: Hub, python: Fetch) -> None:  # noqa: F811
    done = python("-m", "mistral_dist.cli", "push", exported, "me/my", endpoint=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()[:4]] == ["README.md", "export.json", "model.safetensors", "SHA256SUMS"]
    assert f"{hub.url}/me/my: nothing was sent; --upload sends these 4 files" in done.stdout
    assert hub.asked == []


def test_what_was_exported_is_sent_and_nothing_else(exported: Path, hub: Hub, python: Fetch) -> None:  # noqa: F811
    hub.RequestHandlerClass = Taking
    done = python("-m", "mistral_dist.cli", "push", exported, "me/my", "--upload", endpoint=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/my: 4 files"
    sent = {line["value"]["path"] for line in hub.sent if line["key"] == "file"}  # type: ignore[attr-defined]
    assert sent == {"README.md", "export.json", "model.safetensors", "SHA256SUMS"}
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_one_line_without_the_token(exported: Path, hub: Hub, python: Fetch, status: int) -> None:  # noqa: F811
    hub.RequestHandlerClass = Taking
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
