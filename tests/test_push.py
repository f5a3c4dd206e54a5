"""Uploading an adapter to the hub: real requests of huggingface_hub, to a stand-in on this machine."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from veneer.core.config import CONFIG_NAME
from veneer.train import push

from . import room
from .test_train import base, run  # noqa: F401 (fixtures)

pytestmark = pytest.mark.filterwarnings("ignore")
SECRET = "hf_" + "x" * 34


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that knows one token and keeps what is committed."""

    files: dict[str, bytes] = {}
    created: list[dict] = []
    role = "write"
    full = False

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {SECRET}":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path.startswith("/api/whoami"):
            who = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": Hub.role}}}
            self.answer(200, {"type": "user", **who})
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        body = self.body()
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            Hub.created.append(json.loads(body))
            self.answer(200, {"url": f"{url}/me/adapter", "id": "me/adapter", "name": "me/adapter"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer(200, {"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path and Hub.full:
            self.answer(403, {"error": "Private storage is full"})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = "0" * 40
            self.answer(200, {"commitUrl": f"{url}/me/adapter/commit/{oid}", "commitOid": oid, "hookOutput": ""})
        else:
            self.answer(200, {})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(autouse=True)
def empty():
    Hub.files, Hub.created, Hub.role, Hub.full = {}, [], "write", False


def veneer(hub: str, where: Path, *arguments: str, token: str = SECRET) -> subprocess.CompletedProcess[str]:
    """`veneer ARGUMENTS` in a process whose hub is the stand-in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub, "PYTHONPATH": room.PYTHONPATH, "HF_HOME": str(where / "hf"), "COLUMNS": "300"}
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "veneer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=room.SECONDS)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:  # noqa: F811
    where = tmp_path_factory.mktemp("trained")
    (where / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 3)
    run(base, str(where / "rows.jsonl"), where / "my-adapter", max_steps=1)
    return where / "my-adapter"


def is_private(request: dict) -> bool:
    """What a request to create a repository asks for, in the words of huggingface_hub's versions."""
    return request.get("visibility") == "private" or request.get("private") is True


def digests(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_ends_on_the_hub(hub, base, trained, tmp_path):  # noqa: F811
    """Private, with card and report; no path of this machine is in it."""
    data = trained.parent / "rows.jsonl"
    flags = ["--model", base, "--data", str(data), "--output", str(tmp_path / "out"), "--max-steps", "1"]
    done = veneer(hub, tmp_path, "train", *flags, "--push-to-hub", "me/adapter")
    assert done.returncode == 0 and "uploaded to" in done.stderr and "me/adapter" in done.stderr, done.stderr
    assert is_private(Hub.created[0]) and Hub.created[0]["name"] == "adapter"
    out = tmp_path / "out"
    assert Hub.files["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()
    assert {"README.md", "report.html", "report.json", CONFIG_NAME, "probe.safetensors"} <= Hub.files.keys()
    for name in Hub.files.keys() - {"adapter_model.safetensors", "probe.safetensors"}:
        text = Hub.files[name].decode()
        assert str(tmp_path) not in text and str(trained.parent) not in text and base not in text, name
        assert SECRET not in text
    report = json.loads(Hub.files["report.json"])
    assert report["recipe"]["output"] == "me/adapter" and report["first_rows"][0]["place"] == "rows.jsonl:1"
    assert "me/adapter" in ModelCard(Hub.files["README.md"].decode()).text
    assert json.loads((out / "report.json").read_text())["recipe"]["output"] == str(out)
    assert str(tmp_path) in (out / "recipe.yaml").read_text() and SECRET not in (out / "recipe.yaml").read_text()


def test_a_failure_to_upload_loses_nothing_and_says_how_to_try_again(hub, base, trained, tmp_path):  # noqa: F811
    data = trained.parent / "rows.jsonl"
    flags = ["--model", base, "--data", str(data), "--output", str(tmp_path / "out"), "--max-steps", "1"]
    Hub.full = True
    done = veneer(hub, tmp_path, "train", *flags, "--push-to-hub", "me/adapter", "--set", "hub_private=false")
    assert done.returncode == 2 and "Private storage is full" in done.stderr and "Traceback" not in done.stderr
    again = f"veneer push {tmp_path / 'out'} me/adapter --public"
    assert again in done.stderr and not Hub.files
    kept = digests(tmp_path / "out")
    assert json.loads(kept[str(tmp_path / "out" / "report.json")])["verified"] is True
    Hub.full = False
    done = veneer(hub, tmp_path, *again.split()[1:])
    assert done.returncode == 0 and done.stdout.strip().endswith("me/adapter"), done.stderr
    assert "adapter_model.safetensors" in Hub.files and not is_private(Hub.created[-1])
    assert digests(tmp_path / "out") == kept


@pytest.mark.parametrize(
    ("token", "role", "repository", "words"),
    [
        ("", "write", "me/adapter", "needs a token of the Hugging Face hub; `hf auth login`"),
        ("hf_wrong", "write", "me/adapter", "refuses the token"),
        (SECRET, "read", "me/adapter", "may only read"),
        (SECRET, "write", "they/adapter", "belongs to 'me', which cannot write to 'they/adapter'"),
    ],
)
def test_a_token_that_cannot_upload_is_told_before_training(hub, tmp_path, token, role, repository, words):
    """In one line, before the model and the data are looked for."""
    Hub.role = role
    flags = ["--model", "no/model", "--data", "no.jsonl", "--output", str(tmp_path / "out")]
    done = veneer(hub, tmp_path, "train", *flags, "--push-to-hub", repository, token=token)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists() and not Hub.created


def test_an_organisation_of_the_user_and_an_adapter_of_other_origin(hub, trained, tmp_path):
    """Without a report: the card is written."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter_model.safetensors", CONFIG_NAME):
        shutil.copy(trained / name, other / name)
    done = veneer(hub, tmp_path, "push", str(other), "us/adapter")
    assert done.returncode == 0 and Hub.created[0]["organization"] == "us", done.stderr
    assert set(Hub.files) == {"adapter_model.safetensors", CONFIG_NAME, "README.md"}
    assert json.loads(Hub.files[CONFIG_NAME])["base_model_name_or_path"] is None
    empty = veneer(hub, tmp_path, "push", str(tmp_path), "me/adapter")
    assert empty.returncode == 2 and "it has no adapter_model.safetensors" in empty.stderr
    wrong = veneer(hub, tmp_path, "push", str(other), "adapter")
    assert wrong.returncode == 2 and "must be OWNER/NAME" in wrong.stderr


def test_the_stages_before_an_adapter_are_uploaded_with_it(hub, base, trained, tmp_path):  # noqa: F811
    """What the hub has of it loads and gives the same, and names no path of this machine."""
    from veneer import AutoPeftModelForCausalLM

    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1?", "answer": "one"}\n')
    run(base, str(data), tmp_path / "second", start_from=str(trained), start_mode="merge", max_steps=1)
    done = veneer(hub, tmp_path, "push", str(tmp_path / "second"), "me/second")
    assert done.returncode == 0, done.stderr
    assert {f"start/{name}" for name in (CONFIG_NAME, "adapter_model.safetensors")} <= Hub.files.keys()
    for name, content in Hub.files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert str(tmp_path).encode() not in content and str(trained.parent).encode() not in content, name
    settings = json.loads((tmp_path / "downloaded" / CONFIG_NAME).read_text())
    (tmp_path / "downloaded" / CONFIG_NAME).write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    ids = torch.tensor([[3, 4, 5, 6]])
    there, here = (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)(input_ids=ids).logits
        for name in ("downloaded", "second")
    )
    torch.testing.assert_close(there, here)


def test_a_hub_that_cannot_be_reached_does_not_stop_the_run(monkeypatch):
    """The token is checked as far as that is possible; the upload is tried at the end."""
    import huggingface_hub
    from huggingface_hub import constants

    def whoami(self):
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: SECRET)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    push.check_token("me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(push.ConfigError, match="HF_HUB_OFFLINE is set"):
        push.check_token("me/adapter")


def test_paths_are_left_out_wherever_they_are():
    content = {
        "model": "/home/me/models/base",
        "recipe": {
            "model": "/home/me/models/base",
            "output": "/home/me/runs/one",
            "chat_template": "~/t.jinja",
            "data": [{"path": "/data/set"}, {"path": "rows/here.jsonl"}],
            "eval_data": [{"path": "../up.csv"}],
        },
        "data": {"examples": ["/data/set/train.jsonl:3", "rows/here.jsonl:4"]},
        "count": 3,
    }
    found = push.without_paths(content, "me/it")
    assert "/home" not in json.dumps(found) and "/data/" not in json.dumps(found) and "~" not in json.dumps(found)
    assert found["data"]["examples"] == ["set/train.jsonl:3", "rows/here.jsonl:4"] and found["count"] == 3
    assert found["recipe"]["output"] == "me/it" and content["recipe"]["output"] == "/home/me/runs/one"
