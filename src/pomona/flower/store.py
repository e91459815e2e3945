"""What messages consist of, while they wait: large parts on disk, so that memory does not grow with sites."""

import shutil
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

_SMALL = 1 << 16
_ON_DISK = b"\0on disk"


class DiskStore(InMemoryObjectStore):
    """Flower's store of objects by their SHA-256, with the content of large ones in files of that name."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir(parents=True)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep an object that was announced; raises `ValueError` for one that is not what its name says."""
        super().put(object_id, object_content)
        if len(object_content) < _SMALL:
            return
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is not None and entry.content is not _ON_DISK:
                (self.folder / object_id).write_bytes(object_content)
                entry.content = _ON_DISK

    def get(self, object_id: str) -> bytes | None:
        """Return an object, empty while it has not come, None for one that nobody has announced."""
        with self.lock_store:
            content = super().get(object_id)
            return (self.folder / object_id).read_bytes() if content is _ON_DISK else content

    def delete(self, object_id: str) -> None:
        """Remove an object and what only it consists of."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                (self.folder / object_id).unlink(missing_ok=True)

    def complete(self, object_id: str) -> list[str] | None:
        """Return the names of all that an object consists of, None while a part has not come."""
        with self.lock_store:
            names = [
                part.object_id for part in iterate_object_tree(self.get_object_tree(object_id))
            ]
            return names if all(self.store[name].is_available for name in names) else None

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.folder, ignore_errors=True)
