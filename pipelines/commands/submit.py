"""Run a command on the head of a cluster, as a Ray job that outlives this terminal.

The job runs in the checkout on the head (`ELSA_CHECKOUT` there, else this checkout's path) with
RAY_ADDRESS set, so that its stages use the cluster. To resume what was stopped or failed, submit
the same command again: a run resumes from its last checkpoint.
"""

import asyncio
import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import PipelineError
from pipelines.paths import ROOT

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
PROGRAM = "elsa submit"


def connect(address: str | None) -> "JobSubmissionClient":
    """A client of the head's dashboard, with the token of RAY_AUTH_TOKEN(_PATH) or ~/.ray.

    Raises:
        PipelineError: nothing answers there, or it rejects the token.
    """
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / ".ray/auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise PipelineError(
            f"the cluster at {address} rejects this token",
            "Copy its token to ~/.ray/auth_token (mode 600), or name the file in"
            " RAY_AUTH_TOKEN_PATH",
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PipelineError(
            f"no Ray dashboard to submit to at {address}: {_last_line(error)}",
            f"On the head it is {ADDRESS}; from elsewhere open a tunnel to it first (`ray"
            " dashboard cluster.yaml`)",
        ) from error


def entrypoint(command: list[str]) -> str:
    """The job's shell line: the command in the checkout on the head."""
    return f'cd "${{ELSA_CHECKOUT:-{ROOT}}}" && exec {shlex.join(command)}'


def follow(client: "JobSubmissionClient", job: str) -> int:
    """Print the job's log from its start until it ends; the exit code for this process."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    again = f"follow it again: {PROGRAM} --logs {job}"
    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        print(f"\ndetached; {job} keeps running. To {again}\nTo end it: {PROGRAM} --stop {job}")
        return 130
    except Exception as error:  # a lost tunnel has a class of its own in each library
        raise PipelineError(
            f"lost the connection to {job}: {_last_line(error)}", f"It keeps running; to {again}"
        ) from error
    status = _ended(client, job)
    print(f"{job} {status.lower()}")
    if status == "FAILED":
        why, _, _ = (client.get_job_info(job).message or "").partition(", last available logs")
        print(f"{why}. To resume, submit the same command again")
    return 0 if status == "SUCCEEDED" else 1


def _ended(client: "JobSubmissionClient", job: str) -> str:
    """The final status; the log ends a moment before the job counts as ended."""
    status = client.get_job_status(job)
    while not status.is_terminal():
        time.sleep(0.5)
        status = client.get_job_status(job)
    return str(status.value)


def stop(client: "JobSubmissionClient", job: str) -> None:
    """End a job and wait until it has ended."""
    client.stop_job(job)
    print(f"{job} {_ended(client, job).lower()}; to resume, submit the same command again")


def list_jobs(client: "JobSubmissionClient") -> None:
    """Print the jobs that were submitted, the newest first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "status", "started", "took", "command")
    jobs = [job for job in client.list_jobs() if job.submission_id]
    for job in sorted(jobs, key=lambda one: one.start_time or 0, reverse=True):
        started = (job.start_time or 0) / 1000
        took = (job.end_time / 1000 if job.end_time else time.time()) - started
        table.add_row(
            job.submission_id,
            str(job.status.value).lower(),
            datetime.fromtimestamp(started).astimezone().strftime("%Y-%m-%d %H:%M"),
            f"{int(took) // 3600}:{int(took) % 3600 // 60:02d}:{int(took) % 60:02d}",
            (job.entrypoint or "").partition(" && exec ")[2] or job.entrypoint,
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")[:300]


@dataclass(frozen=True)
class Request:
    """What to do with jobs: submit one, follow or stop one, or list all."""

    address: str | None = None
    command: tuple[str, ...] = ()
    logs: str | None = None
    stop: str | None = None
    list: bool = False
    detach: bool = False


def handle(request: Request) -> int:
    """Do what is asked for; the exit code.

    Raises:
        PipelineError: the cluster can't be reached or rejects the token, or has no such job.
    """
    return _run(connect(request.address), request)


def _run(client: "JobSubmissionClient", arguments: Request) -> int:
    if arguments.list:
        list_jobs(client)
        return 0
    job = arguments.logs or arguments.stop or ""
    if job and job not in [one.submission_id for one in client.list_jobs()]:
        raise PipelineError(f"no job {job} on this cluster; see {PROGRAM} --list")
    if arguments.stop:
        stop(client, job)
        return 0
    if not job:
        try:
            job = client.submit_job(entrypoint=entrypoint(list(arguments.command)))
        except RuntimeError as error:
            raise PipelineError(
                f"the head took no job: {_last_line(error)}. Its dashboard agent must run, on a"
                " port that no other Ray of that machine has"
                " (`ray start --dashboard-agent-listen-port`)"
            ) from error
        print(f"{job} submitted; Ctrl-C leaves it running", flush=True)
        if arguments.detach:
            return 0
    return follow(client, job)
