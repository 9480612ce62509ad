"""Programs of nodes: read and checked once, and bound to weights at each load."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from pathlib import Path
from typing import Any

from ..errors import FormatError
from . import codebooks
from .backends import Backend
from .manifest import Manifest, Node
from .storage import open_regular


class Programs:
    """Makes the nodes of the bundle in ``directory`` callable, by ``backend``."""

    def __init__(self, manifest: Manifest, backend: Backend, directory: Path) -> None:
        self._backend = backend
        self._directory = directory
        self._expanded = {
            node.path: codebooks.expanded_node(node) for node in manifest.nodes if "codebook" in node.extra
        }
        self._ready: dict[str, Any] = {}
        self._lock = threading.Lock()

    def bind(self, node: Node, buffer: mmap.mmap | None) -> Any:
        """``node`` with ``buffer`` as its weights.

        Raises:
            FormatError: its program is missing or altered, or the runtime cannot open it.
        """
        with self._lock:
            program = self._ready.get(node.path)
            if program is None:
                program = self._backend.program(node, self._read(node))
                self._ready[node.path] = program
        expanded = self._expanded.get(node.path)
        if expanded is not None and buffer is not None:
            node, buffer = expanded, codebooks.expand(node, expanded, buffer)
        return self._backend.bind(node, program, buffer)

    def clear(self) -> None:
        with self._lock:
            self._ready.clear()

    def _read(self, node: Node) -> bytes:
        name = f"artefact of node {node.path or 'root'!r} cannot be loaded: {node.program.file}"
        try:
            with os.fdopen(open_regular(self._directory / node.program.file), "rb") as file:
                data = file.read()
        except OSError as error:
            raise FormatError(f"{name}: {error.strerror}. Restore it or export again.") from error
        if len(data) != node.program.nbytes or hashlib.sha256(data).hexdigest() != node.program.sha256:
            raise FormatError(f"{name} does not match its sha256. Restore it or export again.")
        return data
