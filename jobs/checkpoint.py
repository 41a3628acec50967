"""Checkpoints that are there whole or not at all.

    checkpoints/
      step-00000500/            committed: this name appears by one rename, after everything in it is on disk
        manifest.json           step, files with sizes and SHA-256, world size, configuration, data fingerprint; written last
        model.pt  ema.pt ...    what all ranks hold alike ("replicated"), spread over the ranks for writing
        rank-00000.pt ...       what each rank holds for itself
      .step-00001000.tmp-1f2e3d4c/   a save under way, or killed: removed at the next start

A file is hashed on its way to the disk, so a checkpoint costs one pass over its bytes. What is damaged later is found by the
same hashes when it is loaded, named, and passed over for the next older one.

Saving is two calls: `save` takes the state and writes this rank's files, `commit` brings the ranks together and renames. Only
`commit` needs all ranks at one time, so an asynchronous save is another `save`: one that copies the state to host memory,
returns, writes from a thread, and is committed at a later step boundary, when `PendingSave.is_written` says so on every rank. A
sharded one gives each rank's shards as its own state instead of the replicated one; nothing else changes, because the manifest
lists files of any rank.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from cluster.errors import OutsideError, StateError
from jobs.collectives import Ranks, on_rank_0

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_COMMITTED = re.compile(r"step-(\d{8,})")
_OURS = re.compile(r"\.step-\d{8,}\.(?:tmp|old)-[0-9a-f]{8}")
_READ_BYTES = 1 << 20


class SaveError(OutsideError):
    """A checkpoint could not be written. Nothing of it is left, and earlier ones are untouched."""


@dataclass(frozen=True)
class FileRecord:
    """A file of a checkpoint as it was written."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    world_size: int
    config: Mapping[str, Any]
    """The whole training configuration."""
    config_digest: str
    data_fingerprint: str
    files: tuple[FileRecord, ...]
    format: int = _FORMAT


@dataclass(frozen=True)
class State:
    """What one rank gives to be saved: trees of tensors, numbers, strings, lists and dicts."""

    step: int
    replicated: Mapping[str, Any]
    """By file name without suffix; the same names, and equal values, on every rank."""
    own: Mapping[str, Any]
    """This rank's own."""
    config: Mapping[str, Any] = field(default_factory=dict)
    config_digest: str = ""
    data_fingerprint: str = ""


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint gave back to this rank."""

    manifest: Manifest
    path: Path
    replicated: Mapping[str, Any]
    own: Mapping[str, Any] | None
    """None where the run that saved had no such rank."""


class PendingSave:
    """A save whose files may still be on their way."""

    def __init__(self, commit: Callable[[], Path]) -> None:
        self._commit = commit

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing left to write, so that `commit` would not wait for it."""
        return True

    def commit(self) -> Path:
        """Make the checkpoint be there; returns its directory. A collective call.

        Raises:
            SaveError: On every rank alike, if any rank failed; the message says which and why.
        """
        return self._commit()


class Checkpointer:
    """Saves and loads the state of a run in one directory, which all ranks see.

    All ranks call the same methods in the same order.
    """

    def __init__(self, directory: Path, ranks: Ranks, *, keep: int) -> None:
        self._directory = directory
        self._ranks = ranks
        self._keep = keep
        self._token: str | None = None
        self._good: set[int] = set()
        """Steps whose checkpoints this process has committed, or verified by their hashes."""
        self._damaged: set[int] = set()

    def prepare(self) -> list[str]:
        """Make the directory and remove what killed saves left in it; returns their names. A collective call, the first.

        Raises:
            OutsideError: The directory cannot be made or written.
        """
        removed: list[str]
        self._token, removed = on_rank_0(self._ranks, self._prepare)
        return removed

    def save(self, state: State) -> PendingSave:
        """Write this rank's files beside the place of the checkpoint.

        A failure does not raise here but in `commit`, where all ranks learn of it together.
        """
        if self._token is None:
            raise StateError("Checkpointer.prepare() comes first: it agrees on the name that all ranks write under")
        if state.step in self._good and self._path(state.step).is_dir():
            return PendingSave(lambda: self._path(state.step))
        temporary = self._directory / f".{self._path(state.step).name}.tmp-{self._token}"
        files: list[FileRecord] = []
        problem: str | None = None
        try:
            temporary.mkdir(exist_ok=True)  # whichever rank comes first
            for name, tree in self._files_of_this_rank(state).items():
                files.append(write_file(temporary / name, tree))
        except OSError as error:
            problem = f"rank {self._ranks.rank}: {_explain(error)}"
        except RuntimeError as error:  # torch wraps what the file raised, and has failures of its own
            problem = f"rank {self._ranks.rank}: {_explain(error.__cause__ or error.__context__ or error)}"
        return PendingSave(lambda: self._commit(state, temporary, files, problem))

    def load_newest(self) -> LoadedState | None:
        """Load the newest checkpoint whose every file is as it was written, or return None if there is none.

        Each damaged one is named in the log, with the file and what is wrong with it. Rank 0 decides for all.

        Raises:
            StateError: There are checkpoints, but all are damaged; or one has a newer format.
        """
        found = on_rank_0(self._ranks, self._find_newest)
        if found is None:
            return None
        manifest, path = found
        self._good.add(manifest.step)
        replicated = {}
        own = None
        for record in manifest.files:
            kind, name = _kind_of(record.name)
            if kind == "own" and name != str(self._ranks.rank):
                continue
            tree = _load_tree(path / record.name)
            if kind == "own":
                own = tree
            else:
                replicated[name] = tree
        return LoadedState(manifest, path, replicated, own)

    def steps(self) -> list[int]:
        """Return the steps of committed checkpoints, newest first, damaged ones too."""
        return list_steps(self._directory)

    def _path(self, step: int) -> Path:
        return checkpoint_path(self._directory, step)

    def _files_of_this_rank(self, state: State) -> dict[str, Any]:
        mine = {
            f"{name}.pt": tree
            for number, (name, tree) in enumerate(sorted(state.replicated.items()))
            if number % self._ranks.world_size == self._ranks.rank
        }
        return {**mine, f"rank-{self._ranks.rank:05d}.pt": state.own}

    def _prepare(self) -> tuple[str, list[str]]:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            left = sorted(entry for entry in self._directory.iterdir() if _OURS.fullmatch(entry.name))
            for entry in left:
                shutil.rmtree(entry)
        except OSError as error:
            raise OutsideError(f"checkpoints cannot be kept in {self._directory}: {_explain(error)}") from error
        return secrets.token_hex(4), [entry.name for entry in left]

    def _commit(self, state: State, temporary: Path, files: list[FileRecord], problem: str | None) -> Path:
        reports = self._ranks.gather((files, problem))
        problems = [said for _, said in reports if said is not None]
        if not problems:
            outcome = self._ranks.broadcast(self._finish(state, temporary, reports) if self._ranks.rank == 0 else None)
            problems = [outcome] if outcome else []
        if problems:
            raise self._give_up(temporary, problems)
        self._good.add(state.step)
        self._damaged.discard(state.step)
        if self._ranks.rank == 0:
            self._remove_old()
        return self._path(state.step)

    def _finish(self, state: State, temporary: Path, reports: list[tuple[list[FileRecord], str | None]]) -> str:
        """Write the manifest and rename; returns what went wrong, or nothing."""
        manifest = Manifest(
            step=state.step,
            world_size=self._ranks.world_size,
            config=state.config,
            config_digest=state.config_digest,
            data_fingerprint=state.data_fingerprint,
            files=tuple(record for files, _ in reports for record in files),
        )
        final = self._path(state.step)
        try:
            _write_bytes(temporary / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
            _sync_directory(temporary)
            aside = self._aside(final)
            if final.exists():  # a damaged one of the same step: out of the way first, as a rename cannot replace it
                final.rename(aside)
            temporary.rename(final)
            _sync_directory(self._directory)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError as error:
            return f"rank 0: {_explain(error)}"
        return ""

    def _give_up(self, temporary: Path, problems: list[str]) -> SaveError:
        if self._ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # what remains is removed at the next start
        return SaveError(
            f"the checkpoint in {self._directory} could not be written: {'; '.join(problems)}. Earlier checkpoints are "
            "untouched; make room or restore the file system"
        )

    def _find_newest(self) -> tuple[Manifest, Path] | None:
        steps = self.steps()
        for step in steps:
            path = self._path(step)
            manifest, problems = verify(path)
            if manifest is not None and not problems:
                return manifest, path
            self._damaged.add(step)
            logger.warning("checkpoint %s is damaged and passed over: %s", path, "; ".join(problems))
        if steps:
            raise StateError(
                f"all {len(steps)} checkpoints in {self._directory} are damaged (see the warnings above); restore one from a "
                f"backup, or remove them to start from step 0"
            )
        return None

    def _remove_old(self) -> None:
        """Keep the newest `keep` not known to be damaged. Called right after a commit, so at least one is known to be good."""
        sound = [step for step in self.steps() if step not in self._damaged]
        newest_good = max(self._good)
        old = [*sound[self._keep :], *(step for step in self._damaged if step < newest_good)]
        for step in old:
            if step == newest_good:
                continue
            aside = self._aside(self._path(step))
            try:
                self._path(step).rename(aside)  # a kill while deleting then leaves no half checkpoint behind
                shutil.rmtree(aside)
            except OSError as error:
                logger.warning("the old checkpoint %s could not be removed: %s", self._path(step), _explain(error))
            self._good.discard(step)
            self._damaged.discard(step)

    def _aside(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return where the checkpoint of `step` stands in a directory of checkpoints."""
    return directory / f"step-{step:08d}"


def list_steps(directory: Path) -> list[int]:
    """Return the steps of committed checkpoints in a directory, newest first; nothing if it does not exist."""
    if not directory.is_dir():
        return []
    names = (_COMMITTED.fullmatch(entry.name) for entry in directory.iterdir())
    return sorted((int(match[1]) for match in names if match), reverse=True)


def verify(path: Path) -> tuple[Manifest | None, list[str]]:
    """Compare a checkpoint's files with its manifest.

    Returns:
        The manifest, if it could be read, and every difference in words: file, expected and actual.
    """
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, [f"{MANIFEST} cannot be read ({error})"]
    problems = []
    for record in manifest.files:
        file = path / record.name
        try:
            size = file.stat().st_size
            if size != record.size:
                problems.append(f"{record.name} has {size} bytes, {record.size} were written")
                continue
            digest = _digest_of(file)
            if digest != record.sha256:
                problems.append(f"{record.name} has SHA-256 {digest[:12]}..., {record.sha256[:12]}... was written")
        except OSError as error:
            problems.append(f"{record.name}: {_explain(error)}")
    return manifest, problems


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint at `path`.

    Raises:
        StateError: A newer Muster wrote it.
        OSError, ValueError, KeyError, TypeError: It is missing or damaged.
    """
    raw = json.loads((path / MANIFEST).read_bytes())
    if raw["format"] > _FORMAT:
        raise StateError(
            f"{path} has checkpoint format {raw['format']}, this Muster knows {_FORMAT}; go on with the version that wrote it"
        )
    return Manifest(**{**raw, "files": tuple(FileRecord(**record) for record in raw["files"])})


def load_part(path: Path, name: str) -> Any:
    """Load one replicated part (`model`, `ema`) of the checkpoint at `path`, onto the CPU."""
    return _load_tree(path / f"{name}.pt")


def write_file(path: Path, tree: Any) -> FileRecord:
    """Write a tree with torch.save, hashed on its way, and wait until it is on disk.

    Raises:
        OSError: It cannot be written; ENOSPC where the disk is full.
    """
    import torch

    with path.open("wb", buffering=0) as file:
        writer = _HashingWriter(file)
        try:
            torch.save(tree, cast(Any, writer))
        except Exception as error:
            # torch's writer turns what the file raised into a RuntimeError of its own.
            raise (writer.error or error) from error
        writer.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, writer.size, writer.sha256.hexdigest())


class _HashingWriter:
    """A file to write to that knows the hash of what went through. Write-only, as torch.save never goes back."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._buffer = bytearray()
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Take bytes; small ones are gathered."""
        view = memoryview(data).cast("B")
        self._buffer += view
        if len(self._buffer) >= _READ_BYTES:
            self.flush()
        return view.nbytes

    def flush(self) -> None:
        """Hand everything to the operating system."""
        data, self._buffer = bytes(self._buffer), bytearray()
        self.sha256.update(data)
        self.size += len(data)
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error
            raise


def _kind_of(file_name: str) -> tuple[str, str]:
    """Return (`own`, rank) or (`replicated`, name) of a file of a checkpoint."""
    match = re.fullmatch(r"rank-(\d+)\.pt", file_name)
    return ("own", str(int(match[1]))) if match else ("replicated", file_name.removesuffix(".pt"))


def _load_tree(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make names in a directory last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
