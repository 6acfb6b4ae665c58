"""Two hosts on this machine, in namespaces, through the configuration for own machines.

`make test-cluster` runs this (minutes; root, Debian's openssh-server, iproute2 and rsync). Each
host has its own network, processes, /tmp and home; data/, storage/ and .runs/ are shared as by
NFS. Only the installation is left out: the hosts use this environment and its compiled operator.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "rsync")
MISSING = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not os.environ.get("ELSA_TEST_CLUSTER"), reason="run by make test-cluster"),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}"),
]

SUBMIT = "python -m pipelines.cli submit"
RECIPE = ("recipe=smoke", "scaling.cpus_per_worker=2", "pretrain.epochs=40")
"""Long enough for what happens meanwhile."""

HOST = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /tmp
mkdir -p /run/sshd
hostname {name}
mount --bind {base}/{name} {base}/home
for folder in data storage .runs; do
  mkdir -p {base}/home/elsa/$folder
  mount --bind {base}/shared/$folder {base}/home/elsa/$folder
done
mount --bind {base}/passwd /etc/passwd
ip link set lo up
until ip link show {link} >/dev/null 2>&1; do sleep 0.1; done
ip address add {address}/24 dev {link}
ip link set {link} up
exec "$(command -v sshd)" -D -e -f /dev/null -h {base}/hostkey \
  -o ListenAddress={address} -o AuthorizedKeysFile={base}/key.pub -o StrictModes=no \
  -o PidFile=none -o UsePAM=no -o PermitRootLogin=prohibit-password -o PasswordAuthentication=no
"""


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=True, **options)


def output(command: list[str], must_succeed: bool = True, **options) -> str:
    """All that a command prints."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, text=True, check=False, **streams, **options)
    if must_succeed:
        assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


class Hosts:
    """Two hosts at a bridge of this machine, and what `ray up` needs to reach them."""

    def __init__(self, base: Path) -> None:
        self.base, tag = base, secrets.token_hex(2)
        self.bridge, self.links = f"el{tag}", [f"el{tag}{i}" for i in range(2)]
        net = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(250)}"
        self.addresses = [f"{net}.{i + 1}" for i in range(2)]
        self.processes: list[subprocess.Popen] = []
        self.home, self.client = base / "home", base / "client"
        for folder in ("home", "client/.ray", "client/.mlflow", "client/.config/elsa"):
            (base / folder).mkdir(parents=True)
        for folder in ("data", "storage", ".runs"):
            (base / "shared" / folder).mkdir(parents=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(base / "key"))
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(base / "hostkey"))
        (base / "passwd").write_text(
            re.sub(
                r"(?m)^(root:[^:]*:0:0:[^:]*):[^:]*:.*$",
                rf"\1:{self.home}:/bin/bash",
                Path("/etc/passwd").read_text(),
            )
        )
        self._write_client_files()
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{net}.254/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        for i in range(2):
            self._start(i)

    def _write_client_files(self) -> None:
        (self.client / ".ray/auth_token").write_text(secrets.token_hex(32))
        (self.client / ".mlflow/credentials").write_text(
            "[mlflow]\nmlflow_tracking_username = elsa\n"
            f"mlflow_tracking_password = {secrets.token_hex(16)}\n"
        )
        (self.client / ".config/elsa/cluster.env").write_text("ELSA_MLFLOW_WORKERS=1\n")
        text = (ROOT / "pipelines/cluster/machines.yaml").read_text()
        for old, new in {
            "cluster_name: elsa": f"cluster_name: elsa-{self.bridge}",
            "192.0.2.1 ": f"{self.addresses[0]} ",
            "[192.0.2.2]": f"[{self.addresses[1]}]",
            "ssh_user: ubuntu": "ssh_user: root",
            "~/.ssh/id_ed25519": str(self.base / "key"),
            "/home/ubuntu": str(self.home),
            "bash ~/elsa/pipelines/cluster/setup.sh": f"bash {self.base}/setup.sh",
        }.items():
            assert old in text, old
            text = text.replace(old, new)
        self.config = self.base / "machines.yaml"
        self.config.write_text(text)
        (self.base / "setup.sh").write_text(
            f"set -e; cd ~/elsa; ln -sfn {sys.prefix} .venv; mkdir -p build\n"
            f"cp -rT {ROOT}/build/op build/op\n"
            f".venv/bin/python -m pipelines compose {' '.join(RECIPE)}\n"
            'checkout=$PWD; eval "$(tail -n 2 pipelines/cluster/setup.sh)"\n'  # ~/.bashrc
        )

    def _start(self, i: int) -> None:
        name = f"host{i}"
        (self.base / name).mkdir()
        script = HOST.format(
            name=name, base=self.base, link=self.links[i], address=self.addresses[i]
        )
        process = subprocess.Popen(
            [
                *("unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child"),
                *("bash", "-c", script),
            ],
            stdout=(self.base / f"{name}.log").open("w"),
            stderr=subprocess.STDOUT,
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
        self.processes.append(process)
        end = f"{self.links[i]}p"
        run("ip", "link", "add", end, "type", "veth", "peer", "name", self.links[i])
        inside = wait(lambda: self.inside(i), "its first process", 20)
        run("ip", "link", "set", self.links[i], "netns", str(inside))
        run("ip", "link", "set", end, "master", self.bridge, "up")

    def inside(self, i: int) -> int | None:
        """The host's first process, once its namespaces are made."""
        pid = self.processes[i].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None

    def connect(self, i: int, up: bool) -> None:
        """Plug the host's cable in or out."""
        run("ip", "link", "set", f"{self.links[i]}p", "up" if up else "down")

    def ray(self, *command: str) -> str:
        env = os.environ | {"HOME": str(self.client), "RAY_UP_enable_autoscaler_v2": "0"}
        return output(["ray", *command], timeout=600, cwd=ROOT, env=env)

    def on(self, i: int, command: str, check: bool = True) -> str:
        """Output of a shell command on a host, as over `ray attach`."""
        script = f"source ~/elsa/pipelines/cluster/env.sh; cd ~/elsa; {command}"
        ssh = [
            *("ssh", "-i", str(self.base / "key"), "-o", "StrictHostKeyChecking=no"),
            *("-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
            f"root@{self.addresses[i]}",
            f"bash -c {shlex.quote(script)}",
        ]
        return output(ssh, timeout=300, must_succeed=check)

    def close(self) -> None:
        for i, process in enumerate(self.processes):
            if inside := self.inside(i):
                os.kill(inside, signal.SIGKILL)  # the kernel ends all processes of its namespace
            process.kill()
            process.wait()
        for link in (*(f"{name}p" for name in self.links), self.bridge):
            subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)


def wait(found: Callable[[], object], what: str, seconds: float) -> object:
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(1)
    return result


@pytest.fixture(scope="module")
def hosts(compiled_library: Path) -> Iterator[Hosts]:
    if not (ROOT / "build/op/build.json").is_file():
        shutil.copytree(compiled_library, ROOT / "build/op")
    base = Path(f"/var/tmp/elsa-hosts-{os.getpid()}")  # /tmp is each host's own
    base.mkdir(mode=0o755)
    made = None
    try:
        made = Hosts(base)
        yield made
    finally:
        if made:
            made.close()
        shutil.rmtree(base, ignore_errors=True)


def test_ray_up_joins_both_hosts_and_the_doctor_finds_nothing_to_mend(hosts: Hosts) -> None:
    hosts.ray("up", "--yes", str(hosts.config))
    status = "RAY_ADDRESS=auto ray status"
    wait(lambda: "4.0 CPU" in hosts.on(0, status, check=False), "both hosts", 240)
    report = hosts.on(0, "RAY_ADDRESS=auto python -m pipelines.cli doctor", check=False)
    assert "fails" not in report, report
    for address in hosts.addresses:
        assert report.count(address) >= 4, report
    hosts.on(0, "RAY_ADDRESS=auto python -m pipelines.prepare")


class Pretraining:
    """The stage on both hosts, as a submitted job that has written a checkpoint."""

    def __init__(self, hosts: Hosts, *changes: str) -> None:
        self.hosts = hosts
        hosts.on(0, f"python -m pipelines compose {' '.join((*RECIPE, *changes))}")
        storage = hosts.base / "shared/storage"
        before = {str(run) for run in storage.glob("pretrain-*")}
        command = f"{SUBMIT} --detach -- python -m pipelines.pretrain --force"
        self.job = hosts.on(0, command).split()[0]

        def first_checkpoint() -> bool:
            runs = [run for run in storage.glob("pretrain-*") if str(run) not in before]
            return any(any(run.glob("checkpoint_*")) for run in runs)

        wait(lambda: first_checkpoint() or self.state() == "failed", "the first checkpoint", 300)
        workers = [hosts.on(i, "pgrep -fc [R]ayTrainWorker || true").strip() for i in range(2)]
        assert workers == ["1", "1"], self.log()

    def state(self) -> str:
        row = re.search(rf"{self.job} │ (\w+)", self.hosts.on(0, f"{SUBMIT} --list"))
        return row[1] if row else ""

    def log(self) -> str:
        return self.hosts.on(0, f"timeout 20 {SUBMIT} --logs {self.job} || true", check=False)

    def end(self) -> str:
        """Its whole log, once it has ended well, with each epoch once."""
        wait(lambda: self.state() not in ("running", "pending"), "the end of the training", 600)
        log = self.hosts.on(0, f"{SUBMIT} --logs {self.job}", check=False)
        assert self.state() == "succeeded", log[-6000:]
        run_id = json.loads(self.hosts.on(0, "cat lineage/pretrain.json"))["mlflow_run_id"]
        count = (
            "from pipelines.run.tracking import metric_history;"
            f" losses = metric_history('{run_id}')['train_loss'];"
            " print([step for step, _ in losses])"
        )
        shown = self.hosts.on(0, f"python -c {shlex.quote(count)}")
        steps = json.loads(shown.splitlines()[-1])
        assert steps == list(range(len(steps)))
        return log


def test_pretraining_across_both_goes_on_after_one_was_cut_off(hosts: Hosts) -> None:
    training = Pretraining(hosts)
    hosts.connect(1, up=False)
    time.sleep(60)  # until the head counts the host as lost
    assert training.state() == "running"
    hosts.connect(1, up=True)
    training.end()
    metrics = json.loads(hosts.on(0, "cat metrics/pretrain.json"))
    assert 0 <= metrics["top1"] <= 100


def test_a_hang_is_told_with_host_and_stack_by_whoever_waits_and_training_resumes(
    hosts: Hosts,
) -> None:
    """A process that stands still answers nobody, neither the others nor itself."""
    training = Pretraining(hosts, "scaling.hang_s=20")
    hosts.on(1, "kill -STOP $(pgrep -f [R]ayTrainWorker)")
    log = training.end()
    hangs = r"worker \d on host0 \(process \d+\) hangs: nothing for \d+ s \(scaling.hang_s\) since"
    told = re.search(hangs + r" \d+ of \d+ img. It is in (\w+) \((\w+).py:\d+\)", log)
    assert told, log[-6000:]
    assert "training resumes from the last checkpoint" in log


def test_training_leaves_a_host_that_gets_notice(hosts: Hosts) -> None:
    """As of a spot instance. The other one goes on alone, or with what `ray up` brings back."""
    training = Pretraining(hosts, "scaling.min_workers=1")
    node = (
        "import ray; ray.init(address='auto', logging_level='ERROR');"
        " print(next(n['NodeID'] for n in ray.nodes()"
        f" if n['Alive'] and n['NodeManagerAddress'] == '{hosts.addresses[1]}'))"
    )
    found = hosts.on(0, f"python -c {shlex.quote(node)}").split()[-1]
    hosts.on(
        0,
        f"ray drain-node --address {hosts.addresses[0]}:6379 --node-id {found}"
        " --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'a spot notice'"
        " --deadline-remaining-seconds 30",
    )
    log = training.end()
    assert f"node {found[:8]} is about to be taken away" in log
    assert "failed" not in log  # it left before the host was gone
    assert "hangs" not in log


def test_ray_down_leaves_no_ray_on_the_hosts(hosts: Hosts) -> None:
    hosts.ray("down", "--yes", str(hosts.config))

    def raylets(i: int) -> str:
        return hosts.on(i, "pgrep -fc [r]aylet/raylet || true").strip()

    assert raylets(0) == "0"
    # Ray itself stops the head only; a worker ends when it has lost it for a minute.
    wait(lambda: raylets(1) == "0", "the worker's end", 180)
