"""Publishing to a folder, and to a hub that runs here: what is put there is loaded from there."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch

import elsa  # noqa: F401  registers the models
from elsa.predict import load_predictor
from pipelines.commands.predict import Weights
from pipelines.commands.publish import publish
from pipelines.data.store import Dataset
from pipelines.data.weights import WeightsDescription, write_weights
from pipelines.errors import PipelineError
from pipelines.params import compose
from pipelines.paths import ROOT
from pipelines.tasks import TASKS, Prediction

CLASSES = ("cat", "dog", "cup")
COMMIT = "0" * 40


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    params = compose(["recipe=smoke", f"pretrain.num_classes={len(CLASSES)}"])
    task, folder = TASKS["classify"], tmp_path / "weights"
    what = Prediction(params, Dataset("imagenet", "", CLASSES, {}, ""))
    state = task.evaluation_model(what).state_dict()
    scores = {"top1": 81.25, "loss": 1.5}
    about = WeightsDescription(task.model(params), "abcdef123456", "run-1", scores, classes=CLASSES)
    write_weights(folder, state, about)
    task.write_model_config(folder, what)
    return folder


def test_a_folder_has_the_model_its_card_and_its_lineage(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "published/mine"
    publish(Weights(str(weights)), str(target), private=False)
    card = (target / "README.md").read_text()
    for part in ("library_name: timm", "| top1 | 81.25 |", "abcdef123456", "run-1", "local-dir:."):
        assert part in card
    assert "1.5" not in card  # a loss is no score
    published = load_predictor(target)
    assert published.classes == CLASSES
    before = load_predictor(weights)
    image = torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8).numpy()
    assert (published(image).probabilities == before(image).probabilities).all()
    publish(Weights(str(weights)), str(target), private=False)  # again: in its place


def test_what_can_not_be_published_is_told(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(PipelineError, match="holds no model"):
        publish(Weights(str(weights)), str(other), private=False)
    assert (other / "thesis.txt").read_text() == "precious"
    (weights / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(PipelineError, match=str(weights)):
        publish(Weights(str(weights)), str(tmp_path / "new"), private=False)
    assert not (tmp_path / "new").exists()


class Hub(BaseHTTPRequestHandler):
    """The part of a Hugging Face hub that takes and gives the files of one repository."""

    files: dict[str, bytes]
    asked: dict
    """For a new repository."""
    token = "Bearer hf_test"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != self.token:
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            type(self).asked = json.loads(body)
            self.answer(200, {"url": f"http://{self.headers['Host']}/me/mine", "name": "me/mine"})
        elif self.path.endswith("/preupload/main"):
            found = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.answer(200, {"files": found})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/me/mine/commit/{COMMIT}"
            self.answer(200, {"commitOid": COMMIT, "commitUrl": url})
        else:
            self.answer(200, {"errors": [], "warnings": []})  # it also looks at the card

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/me/mine"):
            files = [
                {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": name}
                for name, data in self.files.items()
            ]
            about = {"id": "me/mine", "sha": COMMIT, "siblings": files}
            self.answer(200, files if "/tree/" in self.path else about)
            return
        content = self.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hash(content) & 0xFFFFFFFF}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, value: dict | list) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("ThisHub", (Hub,), {"files": {}, "asked": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def run(words: list[str], url: str, home: Path, token: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": token}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=300)


def test_what_is_put_on_a_hub_is_loaded_from_there_by_timm_and_by_us(
    weights: Path, hub: tuple[str, type[Hub]], tmp_path: Path
) -> None:
    url, handler = hub
    words = ["-m", "pipelines", "publish", "--weights", str(weights), "--to", "hf-hub:me/mine"]
    refused = run(words, url, tmp_path, token="hf_wrong")
    assert refused.returncode == 1, refused.stderr
    assert refused.stderr.startswith("error: publish: --to hf-hub:me/mine: ")
    assert "Traceback" not in refused.stderr
    done = run([*words, "--private"], url, tmp_path, token="hf_test")
    assert done.returncode == 0, done.stderr
    assert handler.asked.get("private") or handler.asked.get("visibility") == "private"
    assert set(handler.files) >= {"model.safetensors", "config.json", "model.json", "README.md"}
    assert "hf-hub:me/mine" in handler.files["README.md"].decode()

    code = (
        "import timm, torch, elsa, sys\n"
        "model = timm.create_model('hf-hub:me/mine', pretrained=True).eval()\n"
        "torch.save(model(torch.ones(1, 3, 64, 64)), 'logits.pt')\n"
    )
    loaded = run(["-c", code], url, tmp_path, token="hf_test")
    assert loaded.returncode == 0, loaded.stderr
    own = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, own(torch.ones(1, 3, 64, 64)))

    (tmp_path / "photo.png").write_bytes(PIXEL)
    words = ["-m", "pipelines", "predict", "photo.png", "--weights", "hf-hub:me/mine"]
    predicted = run(words, url, tmp_path, token="hf_test")
    assert predicted.returncode == 0, predicted.stderr
    assert "1 pictures in predictions" in predicted.stdout


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
