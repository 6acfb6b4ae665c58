"""A spot notice reaches Ray. With a metadata service as AWS documents it; not run on AWS."""

import json
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.cluster import spot


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2: no answer without a token, which only PUT gives."""

    notice: str | None = None
    asked = 0

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "secret")

    def do_GET(self) -> None:
        Metadata.asked += 1
        if self.headers["X-aws-ec2-metadata-token"] != "secret":
            self.answer(401, "")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.notice:
            self.answer(200, json.dumps({"action": "terminate", "time": self.notice}))
        else:
            self.answer(404, "")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Metadata, "notice", None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_notice_drains_the_node_with_the_time_that_is_left(metadata, monkeypatch) -> None:
    drained = []
    monkeypatch.setattr(spot, "drain", lambda *arguments: drained.append(arguments))
    assert spot.seconds_left(metadata) is None
    thread = threading.Thread(target=spot.watch, args=(metadata, "head:6379", "10.0.0.2", 0.05))
    thread.start()
    before = Metadata.asked
    while Metadata.asked < before + 3:
        assert not drained
    Metadata.notice = f"{datetime.now(UTC) + timedelta(seconds=120):%Y-%m-%dT%H:%M:%SZ}"
    thread.join(timeout=30)
    [(gcs, node, seconds)] = drained
    assert (gcs, node) == ("head:6379", "10.0.0.2")
    assert 100 < seconds <= 120


def test_what_fails_is_told_and_tried_again(monkeypatch, capfd) -> None:
    looks = iter([OSError("refused"), None, 7.0, 6.0])
    answers = iter([subprocess.CalledProcessError(1, ["ray", "drain-node"]), None])

    def left(metadata: str) -> float | None:
        found = next(looks)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(spot, "seconds_left", left)

    def drain(*arguments: object) -> None:
        if error := next(answers):
            raise error

    monkeypatch.setattr(spot, "drain", drain)
    spot.watch("nowhere", "head:6379", "10.0.0.2", 0.01)
    told = capfd.readouterr().err
    assert "looking again in 0.01 s: refused" in told
    assert "drain-node" in told
    assert "taken away in 6 s" in told
