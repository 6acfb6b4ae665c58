"""Whether all nodes see the same storage, and can write it."""

import shutil
import uuid
from pathlib import Path
from typing import Any

from pipelines.data import store
from pipelines.run.finding import Finding, short

NEEDED_DISK = 256 * 2**20


class Mark:
    """A file that the driver leaves in the storage, and that every other node must find there."""

    def __init__(self, storage: str) -> None:
        self.storage = storage
        self.name = f".preflight-{uuid.uuid4().hex}"

    def leave(self, node: str) -> Finding:
        """Write it, from the driver."""
        try:
            if "://" not in self.storage:
                Path(self.storage).mkdir(parents=True, exist_ok=True)
            self._write(self.name)
        except OSError as error:
            return self._rejected(node, error)
        free = None if "://" in self.storage else shutil.disk_usage(self.storage).free
        if free is not None and free < NEEDED_DISK:
            fix = (
                f"A run's checkpoints need {NEEDED_DISK / 2**20:.0f} MiB at the least: delete runs"
                " that are finished, or set storage.path to another disk"
            )
            found = f"{self.storage} has {free / 2**20:.0f} MiB left"
            return Finding("storage", node, found, fix)
        return Finding("storage", node, f"writes {self._shown()}")

    def find(self, node: str) -> Finding:
        """Read the driver's and write another, from another node."""
        try:
            fs, folder = self._open()
            if fs.get_file_info(f"{folder}/{self.name}").size != len(self.name):
                fix = (
                    "Set storage.path to a bucket (s3://...) or to a folder that all nodes mount"
                    " at the same path"
                )
                found = f"{self._shown()} is another folder than the driver's"
                return Finding("storage", node, found, fix)
            own = f"{self.name}-{uuid.uuid4().hex}"
            self._write(own)
            fs.delete_file(f"{folder}/{own}")
        except OSError as error:
            return self._rejected(node, error)
        return Finding("storage", node, f"writes {self._shown()}")

    def remove(self) -> None:
        """Delete the driver's."""
        try:
            fs, folder = self._open()
            fs.delete_file(f"{folder}/{self.name}")
        except OSError:
            pass  # that it can't be written is a finding already

    def _open(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

        found, path = FileSystem.from_uri(self.storage)
        return found, str(path)

    def _write(self, name: str) -> None:
        fs, folder = self._open()
        with fs.open_output_stream(f"{folder}/{name}") as file:
            file.write(self.name.encode())

    def _shown(self) -> str:
        return store.public_url(self.storage)

    def _rejected(self, node: str, error: OSError) -> Finding:
        fix = (
            "Make storage.path writable there (free space, mount options, permissions; for a"
            " bucket its credentials), or set it to another place"
        )
        return Finding("storage", node, f"{self._shown()} can't be written: {short(error)}", fix)
