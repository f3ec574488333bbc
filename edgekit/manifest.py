"""The bundle's table of contents: what is written, and what is checked when it is read.

History of :data:`SCHEMA`:

1. first form: runs and exits.
2. gates.
3. constants that gates compare scores with, parts that mix rows, proposals of policies.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from edgekit.data import Preprocess
from edgekit.errors import BundleError, DataError
from edgekit.plan import Plan

__all__ = ["MANIFEST", "SCHEMA", "FileEntry", "Manifest", "encode_manifest", "lies_inside", "read_manifest"]

SCHEMA = 3
MANIFEST = "manifest.json"


class FileEntry(msgspec.Struct, frozen=True):
    """Digest and size of one file of a bundle."""

    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle's table of contents.

    Attributes:
        schema: :data:`SCHEMA` when written.
        name: of the network.
        created: UTC, ISO 8601.
        plan: stages and steps.
        artifacts: path of each stage's artifact, by target and stage.
        policies: path of each policy, by name.
        proposals: path of each proposal of policies to test, by name.
        files: every other file, by path relative to the bundle.
        preprocess: how images become inputs, when known.
        classes: class names in label order, when known.
        capture: route taken, why earlier ones failed, and what became of each value that could have been a gate's.
        parity: what was compared with the eager model, and the largest differences found.
        notes: what whoever reads ``inspect`` should know, as outputs left out.
        versions: of the libraries that made it.
    """

    schema: int = SCHEMA
    name: str
    created: str
    plan: Plan
    artifacts: dict[str, dict[str, str]]
    policies: dict[str, str] = {}
    proposals: dict[str, str] = {}
    files: dict[str, FileEntry] = {}
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()
    capture: dict[str, Any] = {}
    parity: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}


class _SchemaOnly(msgspec.Struct):
    schema: int


def encode_manifest(manifest: Manifest) -> bytes:
    """As it is written."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def read_manifest(folder: Path, shown: Path) -> Manifest:
    """The manifest in a folder, when everything that it names is there.

    Args:
        folder: that holds it.
        shown: what the user calls the bundle, for messages.

    Raises:
        BundleError: it is missing, damaged, of a newer schema, points outside the folder, or a file is not as it says.
    """
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(f"{shown}: has no readable {MANIFEST} ({error.strerror}); is it a bundle?") from error
    manifest = _decoded(raw, shown)
    listed = (*manifest.policies.values(), *manifest.proposals.values())
    for name in (*manifest.files, *listed, *_artifact_paths(manifest)):
        if not lies_inside(name, folder):
            raise BundleError(f"{shown}: {MANIFEST} names '{name}', which is outside the bundle; do not use it")
    for name in (*listed, *_artifact_paths(manifest)):
        if name not in manifest.files:
            raise BundleError(f"{shown}: {MANIFEST} names '{name}' but lists no digest for it; export again")
    for target, stages in manifest.artifacts.items():
        missing = [stage.name for stage in manifest.plan.stages if stage.name not in stages]
        if missing:
            raise BundleError(f"{shown}: target '{target}' has no artifact of stage '{missing[0]}'; export again")
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{shown}: {name} is missing; copy the whole bundle, or export again")
        if path.stat().st_size != entry.size_bytes:
            raise BundleError(
                f"{shown}: {name} has {path.stat().st_size} bytes instead of {entry.size_bytes}; "
                "copy the whole bundle, or export again"
            )
    return manifest


def _decoded(raw: bytes, shown: Path) -> Manifest:
    damaged = f"{shown}: {MANIFEST} is damaged"
    try:
        schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
    except (msgspec.DecodeError, RecursionError) as error:
        raise BundleError(f"{damaged} ({error}); copy the whole bundle, or export again") from error
    if schema > SCHEMA:
        raise BundleError(
            f"{shown}: bundle schema {schema} is newer than this edgekit knows ({SCHEMA}); upgrade edgekit"
        )
    try:
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, RecursionError, BundleError, DataError) as error:
        raise BundleError(f"{damaged} ({error}); copy the whole bundle, or export again") from error


def _artifact_paths(manifest: Manifest) -> list[str]:
    return [path for stages in manifest.artifacts.values() for path in stages.values()]


def lies_inside(name: str, folder: Path) -> bool:
    """Whether a path stays in a folder, on any system and through links."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        return False
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL in the name
        return False
