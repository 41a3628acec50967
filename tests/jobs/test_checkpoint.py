from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import StateError
from jobs import checkpoint as module
from jobs.checkpoint import MANIFEST, Checkpointer, PendingSave, SaveError, State, checkpoint_path, list_steps, verify
from jobs.collectives import LoneRank


class ThreadRanks:
    """The ranks of a run as threads of this process, with the collectives of the real ones."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank = rank
        self.world_size = len(board)
        self._barrier = barrier
        self._board = board

    def gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(count: int, action: Callable[[ThreadRanks], Any]) -> list[Any]:
    """Run `action` on `count` ranks at once; returns what each returned, or the error that it raised."""
    barrier, board = threading.Barrier(count, timeout=20), [None] * count
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = action(ThreadRanks(rank, barrier, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def state(step: int, *, rank: int = 0, size: int = 1000) -> State:
    weights = torch.arange(size, dtype=torch.float32) + step
    return State(
        step=step,
        replicated={"model": {"weights": weights}, "ema": {"weights": weights / 2}, "run": {"step": step}},
        own={"rank": rank, "random": torch.get_rng_state()},
        config={"seed": 1},
        config_digest="abc",
        data_fingerprint="f" * 64,
    )


def checkpointer(directory: Path, *, keep: int = 3) -> Checkpointer:
    made = Checkpointer(directory, LoneRank(), keep=keep)
    made.prepare()
    return made


def save(target: Checkpointer, *steps: int) -> None:
    for step in steps:
        target.save(state(step)).commit()


def damage(directory: Path, step: int, name: str = "model.pt") -> Path:
    """Flip one bit in the middle of a file."""
    path = checkpoint_path(directory, step) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    """Every part of the state comes back as it was given, with the manifest's facts."""
    save(checkpointer(tmp_path), 5)
    loaded = checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert loaded.own is not None
    assert torch.equal(loaded.replicated["model"]["weights"], state(5).replicated["model"]["weights"])
    assert loaded.replicated["run"] == {"step": 5}
    assert torch.equal(loaded.own["random"], torch.get_rng_state())
    assert (loaded.manifest.step, loaded.manifest.data_fingerprint) == (5, "f" * 64)


def test_an_empty_directory_has_nothing_to_load(tmp_path: Path) -> None:
    """The first attempt of a run starts from the beginning."""
    assert checkpointer(tmp_path / "new").load_newest() is None


def test_nothing_is_visible_before_the_commit(tmp_path: Path) -> None:
    """A save that was not committed is no checkpoint, and the next start removes it and nothing else."""
    target = checkpointer(tmp_path)
    save(target, 1)
    target.save(state(2))
    assert list_steps(tmp_path) == [1]
    (tmp_path / ".step-mine").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    removed = Checkpointer(tmp_path, LoneRank(), keep=3).prepare()
    assert len(removed) == 1
    assert removed[0].startswith(".step-00000002.tmp-")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-mine", "notes.txt", "step-00000001"]


def test_saving_before_preparing_is_refused(tmp_path: Path) -> None:
    """Ranks that have not agreed on a name would write in different places."""
    with pytest.raises(StateError, match="prepare"):
        Checkpointer(tmp_path, LoneRank(), keep=1).save(state(1))


@pytest.mark.parametrize("name", ["model.pt", "ema.pt", "run.pt", "rank-00000.pt"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """One flipped bit in any file is found; the message names the file, and the next older checkpoint is used."""
    save(checkpointer(tmp_path), 1, 2)
    damage(tmp_path, 2, name)
    loaded = checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert loaded.manifest.step == 1
    assert "step-00000002 is damaged" in caplog.text
    assert f"{name} has SHA-256" in caplog.text


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a full disk or a killed copy leaves is found by its size alone."""
    save(checkpointer(tmp_path), 1, 2)
    path = checkpoint_path(tmp_path, 2) / "model.pt"
    size = path.stat().st_size
    os.truncate(path, size - 7)
    loaded = checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert loaded.manifest.step == 1
    assert f"model.pt has {size - 7} bytes, {size} were written" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"format": 1}', b"[]", b"\xff"])
def test_a_checkpoint_without_a_sound_manifest_is_passed_over(tmp_path: Path, content: bytes | None) -> None:
    """No manifest, or one that cannot be read, makes a checkpoint damaged, not the run dead."""
    save(checkpointer(tmp_path), 1, 2)
    manifest = checkpoint_path(tmp_path, 2) / MANIFEST
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    loaded = checkpointer(tmp_path).load_newest()
    assert loaded is not None
    assert loaded.manifest.step == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is gone is a difference like any other."""
    save(checkpointer(tmp_path), 1)
    (checkpoint_path(tmp_path, 1) / "ema.pt").unlink()
    assert any(problem.startswith("ema.pt") for problem in verify(checkpoint_path(tmp_path, 1))[1])


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    """Weeks of training are not silently begun anew because a disk is bad."""
    save(checkpointer(tmp_path), 1, 2)
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    with pytest.raises(StateError, match="all 2 checkpoints"):
        checkpointer(tmp_path).load_newest()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """An older Muster does not guess at what a newer one wrote."""
    save(checkpointer(tmp_path), 1)
    path = checkpoint_path(tmp_path, 1) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(StateError, match="format 99"):
        checkpointer(tmp_path).load_newest()


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    """Only `keep` checkpoints stay, the newest ones."""
    save(checkpointer(tmp_path, keep=2), 1, 2, 3, 4)
    assert list_steps(tmp_path) == [4, 3]


def test_damaged_newer_ones_do_not_count_for_retention(tmp_path: Path) -> None:
    """With keep=1, after a fall-back to an older checkpoint, the one just committed stays although a damaged one is newer."""
    save(checkpointer(tmp_path), 10, 20)
    damage(tmp_path, 20)
    target = checkpointer(tmp_path, keep=1)
    loaded = target.load_newest()
    assert loaded is not None
    assert loaded.manifest.step == 10
    save(target, 15)
    assert list_steps(tmp_path) == [20, 15]
    assert verify(checkpoint_path(tmp_path, 15))[1] == []


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    """Once the run is back at the step of the damaged checkpoint, a sound one takes its place."""
    save(checkpointer(tmp_path), 10, 20)
    damage(tmp_path, 20)
    target = checkpointer(tmp_path)
    target.load_newest()
    save(target, 20)
    assert verify(checkpoint_path(tmp_path, 20))[1] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020"]


def test_saving_a_step_again_changes_nothing(tmp_path: Path) -> None:
    """A stop right after a periodic save costs no second one."""
    target = checkpointer(tmp_path)
    save(target, 1)
    before = (checkpoint_path(tmp_path, 1) / "model.pt").stat().st_mtime_ns
    save(target, 1)
    assert (checkpoint_path(tmp_path, 1) / "model.pt").stat().st_mtime_ns == before


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save fails with the system's own words, its remains are gone, the older checkpoint is untouched, and a later save works."""
    target = checkpointer(tmp_path)
    save(target, 1)
    real = module.os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        save(target, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.setattr(module.os, "fsync", real)
    save(target, 3)
    assert list_steps(tmp_path) == [3, 1]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_really_full_disk_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    """As above, on a file system of 300 kB that fills up in the middle of torch's writing."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", str(tmp_path).encode(), b"tmpfs", 0, b"size=300k") != 0:
        pytest.skip(f"mounting a tmpfs is not allowed here: {os.strerror(ctypes.get_errno())}")
    try:
        target = checkpointer(tmp_path)
        target.save(state(1, size=5000)).commit()
        with pytest.raises(SaveError, match="No space left on device"):
            target.save(state(2, size=200_000)).commit()
        assert list_steps(tmp_path) == [1]
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert verify(checkpoint_path(tmp_path, 1))[1] == []
        target.save(state(3, size=5000)).commit()
    finally:
        libc.umount2(str(tmp_path).encode(), 2)


def test_every_rank_writes_and_reads_its_own_part(tmp_path: Path) -> None:
    """Each rank's own state comes back to it; what all hold alike is written once, spread over the ranks."""

    def run(ranks: ThreadRanks) -> Any:
        target = Checkpointer(tmp_path, ranks, keep=3)
        target.prepare()
        target.save(state(7, rank=ranks.rank)).commit()
        loaded = target.load_newest()
        assert loaded is not None
        return loaded

    loaded = on_ranks(3, run)
    assert [result.own["rank"] for result in loaded] == [0, 1, 2]
    names = sorted(path.name for path in checkpoint_path(tmp_path, 7).iterdir())
    assert names == ["ema.pt", MANIFEST, "model.pt", "rank-00000.pt", "rank-00001.pt", "rank-00002.pt", "run.pt"]
    assert all(set(result.replicated) == {"model", "ema", "run"} for result in loaded)


def test_more_ranks_than_saved_have_no_own_part(tmp_path: Path) -> None:
    """A run that goes on with more ranks tells the new ones that nothing was saved for them."""
    save(checkpointer(tmp_path), 1)

    def load(ranks: ThreadRanks) -> Any:
        return Checkpointer(tmp_path, ranks, keep=3).load_newest()

    first, second = on_ranks(2, load)
    assert first.own is not None
    assert second.own is None
    assert second.replicated["run"] == {"step": 1}


@pytest.mark.parametrize("failing", [0, 1])
def test_one_rank_that_cannot_write_fails_the_save_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """No rank waits for ever and none believes in a checkpoint that is not there; the message names the rank."""
    real = module.write_file

    def write(path: Path, tree: Any) -> Any:
        if path.name == f"rank-{failing:05d}.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, tree)

    monkeypatch.setattr(module, "write_file", write)

    def run(ranks: ThreadRanks) -> Any:
        target = Checkpointer(tmp_path, ranks, keep=3)
        target.prepare()
        target.save(state(1, rank=ranks.rank)).commit()

    for error in on_ranks(2, run):
        assert isinstance(error, SaveError)
        assert f"rank {failing}: Input/output error" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_said_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0 looks; the others hear of it instead of waiting."""
    (tmp_path / "file").write_text("")
    for error in on_ranks(2, lambda ranks: Checkpointer(tmp_path / "file" / "inside", ranks, keep=3).prepare()):
        assert "checkpoints cannot be kept in" in str(error)


def test_a_save_can_be_pending(tmp_path: Path) -> None:
    """Saving and committing are two calls, so that one day the first may return before the files are written."""
    pending = checkpointer(tmp_path).save(state(1))
    assert isinstance(pending, PendingSave)
    assert pending.is_written
    assert pending.commit() == checkpoint_path(tmp_path, 1)
