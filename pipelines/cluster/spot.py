"""On a spot instance of AWS: tell Ray when it is to be taken away, and so what trains on it.

    python pipelines/cluster/spot.py       # on each worker node, beside Ray (cluster.yaml)

Training then writes a checkpoint and continues on other nodes; two minutes later it would lose what
came since its last one. The instance's metadata service is asked, and of an instance that is not
spot it never tells of a notice.
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException

METADATA = "169.254.169.254"
LOOK_S = 5.0
"""AWS asks to look every 5 seconds."""


def seconds_left(metadata: str) -> float | None:
    """Until this instance is taken away; None where nothing says that it will be.

    Args:
        metadata: host of the metadata service.

    Raises:
        OSError: it does not answer.
    """
    _, token = _ask(
        metadata, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    headers = {"X-aws-ec2-metadata-token": token}
    code, notice = _ask(metadata, "GET", "/latest/meta-data/spot/instance-action", headers)
    if code == 404:
        return None
    if code != 200:
        raise OSError(f"{metadata} answers with code {code}")
    when = datetime.fromisoformat(json.loads(notice)["time"])
    return max((when - datetime.now(UTC)).total_seconds(), 0.0)


def _ask(host: str, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
    connection = HTTPConnection(host, timeout=2)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


def drain(gcs: str, node_address: str, seconds: float) -> None:
    """Tell Ray that the node at an address goes away.

    Raises:
        CalledProcessError: Ray does not take it.
        OSError: no cluster is at `gcs`, or none of its nodes at `node_address`.
    """
    import ray

    ray.init(address=gcs, log_to_driver=False)
    alive = [node for node in ray.nodes() if node["Alive"]]
    ray.shutdown()
    ids = [node["NodeID"] for node in alive if node["NodeManagerAddress"] == node_address]
    if not ids:
        raise OSError(f"the cluster at {gcs} has no node {node_address}")
    command = [
        *("ray", "drain-node", "--address", gcs, "--node-id", ids[0]),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a spot notice"),
        *("--deadline-remaining-seconds", str(int(seconds))),
    ]
    subprocess.run(command, check=True)


def watch(metadata: str, gcs: str, node_address: str, look_s: float = LOOK_S) -> None:
    """Look until there is a notice, and tell Ray until it takes it."""
    while True:
        try:
            left = seconds_left(metadata)
            if left is not None:
                print(f"this node is taken away in {left:.0f} s", file=sys.stderr, flush=True)
                return drain(gcs, node_address, left)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"looking again in {look_s:g} s: {error}", file=sys.stderr, flush=True)
        time.sleep(look_s)


if __name__ == "__main__":
    watch(METADATA, f"{os.environ['RAY_HEAD_IP']}:6379", os.environ["ELSA_NODE"])
