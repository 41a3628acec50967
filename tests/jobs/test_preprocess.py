"""Tests of the preprocessing job: what it makes, and that no interruption changes it."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import InterruptedRunError, JobError, OutsideError, StateError
from jobs.data import ShardDataset
from jobs.preparation import available_cpus
from jobs.preprocess import Summary, main, preprocess
from jobs.preprocess_output import ItemList, PreprocessOutput
from jobs.preprocess_settings import OpenMojiSource, PreprocessConfig, load_preprocess_config
from jobs.process_group import read_rank_info
from jobs.shard_index import TEMPORARY_PREFIX

ALONE = read_rank_info({})


class NoStop:
    """Never asked to stop."""

    def raise_if_requested(self, where: str = "") -> None:
        """Do nothing."""


class StopAfter:
    """Asked to stop at the n-th look."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    def raise_if_requested(self, where: str = "") -> None:
        """Count down, then raise as StopSignals does."""
        self._left -= 1
        if self._left < 0:
            raise InterruptedRunError(f"stopped {where}")


def run(config: PreprocessConfig, *, stop: Any = None, rank: int = 0, world_size: int = 1) -> Summary:
    environ = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    return preprocess(config, ALONE if world_size == 1 else read_rank_info(environ), stop=stop or NoStop())


def config_for(output: Path, source: dict[str, Any], **options: Any) -> PreprocessConfig:
    return PreprocessConfig.model_validate(
        {
            "output": str(output),
            "source": source,
            "samples_per_shard": 4,
            "image": {"size_px": 8},
            "workers": 1,
            **options,
        }
    )


def make_folder(folder: Path, count: int = 18) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (12, 9), (number * 10, 255 - number * 10, 99)).save(folder / f"picture_{number:02d}.png")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eighteen small pictures: five shards of four."""
    return make_folder(tmp_path / "pictures")


def folder_config(output: Path, folder: Path, **options: Any) -> PreprocessConfig:
    return config_for(output, {"kind": "folder", "path": str(folder)}, **options)


def content(directory: Path) -> dict[str, bytes]:
    """Return every file of a finished set that must not depend on how it came about."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith(".muster-")}


def test_openmoji_becomes_a_set_with_captions_and_terms(tmp_path: Path) -> None:
    """Drawings, captions, and the attribution that the licence asks for, beside the shards and in the manifest."""
    summary = run(config_for(tmp_path / "out", {"kind": "openmoji", "groups": ["smileys"], "limit": 6}))
    assert (summary.samples, summary.shards, summary.bad, summary.finished) == (6, 2, 0, True)
    dataset = ShardDataset(tmp_path / "out", max_bad=0)
    assert dataset[0].key == "00000000-1F600"
    assert dataset[0].caption == "grinning face"
    assert dataset[0].image.shape == (8, 8, 3)
    assert "CC BY-SA 4.0" in dataset.manifest.licence
    terms = (tmp_path / "out" / "ATTRIBUTION").read_text(encoding="utf-8")
    assert "OpenMoji" in terms
    assert "scaled and re-encoded" in terms
    assert summary.fingerprint == dataset.fingerprint


def test_a_zoomed_drawing_fills_more_of_the_picture(tmp_path: Path) -> None:
    """Zoom cuts the white margin: fewer white pixels, the same size."""
    white = []
    for zoom in (1.0, 1.4):
        run(
            config_for(
                tmp_path / str(zoom), {"kind": "openmoji", "ranges": ["1F600"], "zoom": zoom}, image={"size_px": 24}
            )
        )
        image = ShardDataset(tmp_path / str(zoom), max_bad=0)[0].image
        assert image.shape == (24, 24, 3)
        white.append((image == 255).all(axis=2).sum())
    assert white[1] < white[0] / 2


def test_webdataset_reads_what_the_job_wrote(tmp_path: Path, folder: Path) -> None:
    """The shards are WebDataset's, not merely like it."""
    import warnings

    import webdataset

    run(folder_config(tmp_path / "out", folder))
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        captions = [text for (text,) in webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("txt")]
    assert captions == [f"picture {number:02d}" for number in range(18)]


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_photographs_may_be_stored_compressed(tmp_path: Path, folder: Path, image_format: str) -> None:
    """JPEG and WebP shards are read as PNG ones are, with colours near the original."""
    run(folder_config(tmp_path / "out", folder, image={"size_px": 16, "format": image_format}))
    image = ShardDataset(tmp_path / "out", max_bad=0)[5].image
    assert abs(image[8, 8].astype(int) - [50, 205, 99]).max() < 8


def test_existing_shards_are_scaled_into_new_ones(tmp_path: Path, folder: Path) -> None:
    """The output of one run is a source of the next: same samples, other size, captions kept."""
    run(folder_config(tmp_path / "one", folder, image={"size_px": 32}))
    summary = run(config_for(tmp_path / "two", {"kind": "shards", "path": str(tmp_path / "one")}, samples_per_shard=7))
    assert (summary.samples, summary.shards) == (18, 3)
    dataset = ShardDataset(tmp_path / "two", max_bad=0)
    assert dataset[17].caption == "picture 17"
    assert dataset[17].image.shape == (8, 8, 3)


def spoil(folder: Path) -> set[str]:
    """Put files of every wrong kind among the pictures; return their names."""
    noise = os.urandom(3 * 64 * 64)
    whole = folder / "whole.png"
    Image.frombytes("RGB", (64, 64), noise).save(whole)
    (folder / "a_cut.png").write_bytes(whole.read_bytes()[:4000])
    (folder / "b_empty.png").touch()
    (folder / "c_text.jpg").write_text("not a picture")
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 99)]
    frames[0].save(folder / "d_animated.gif", save_all=True, append_images=frames[1:])
    Image.new("1", (1100, 1000)).save(folder / "e_large.png")
    Image.new("F", (4, 4)).save(folder / "f_float.tiff")
    os.mkfifo(folder / "g_pipe.png")
    (folder / "h_captioned.txt").write_bytes(b"\xff\xff")
    Image.new("RGB", (4, 4)).save(folder / "h_captioned.png")
    whole.unlink()
    return {
        "a_cut.png",
        "b_empty.png",
        "c_text.jpg",
        "d_animated.gif",
        "e_large.png",
        "f_float.tiff",
        "g_pipe.png",
        "h_captioned.png",
    }


def test_every_bad_picture_is_counted_and_named(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The good ones are used, and each bad one stands in bad.jsonl and in the log with its reason."""
    bad = spoil(folder)
    with caplog.at_level(logging.WARNING):
        summary = run(folder_config(tmp_path / "out", folder, max_bad=8, image={"size_px": 8, "max_megapixels": 1}))
    assert (summary.samples, summary.bad) == (18, 8)
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == bad
    assert all(line["reason"] for line in lines)
    assert all(name in caplog.text for name in bad)
    dataset = ShardDataset(tmp_path / "out", max_bad=0)  # judged already: training may be strict
    assert len(dataset) == 18
    assert dataset.manifest.bad == 8


@pytest.mark.parametrize("max_bad", [7, 0, 0.3, 0.01])
def test_too_many_bad_pictures_stop_the_run(tmp_path: Path, folder: Path, max_bad: float) -> None:
    """The message has the count, the limit, the first names and the way out; the run can go on after that."""
    spoil(folder)
    config = folder_config(tmp_path / "out", folder, max_bad=max_bad, image={"size_px": 8, "max_megapixels": 1})
    with pytest.raises(
        JobError, match=r"of 26 pictures are bad, more than the \d .*raise max_bad(.|\n)*a_cut\.png: damaged"
    ):
        run(config)
    assert not (tmp_path / "out" / "shards.json").exists()
    assert "a_cut.png" in (tmp_path / "out" / "bad.jsonl").read_text()
    assert run(config.model_copy(update={"max_bad": 0.31})).bad == 8


def test_a_shard_of_bad_pictures_only_is_no_file(tmp_path: Path, folder: Path) -> None:
    """webdataset stumbles over an empty tar file, so there is none; the pictures are named all the same."""
    for number in range(4, 8):
        (folder / f"picture_{number:02d}.png").write_bytes(b"")
    summary = run(folder_config(tmp_path / "out", folder, max_bad=4))
    assert (summary.samples, summary.shards, summary.bad) == (14, 4, 4)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [
        f"shard-00000{n}.tar" for n in (0, 2, 3, 4)
    ]
    assert [sample.caption for sample in ShardDataset(tmp_path / "out", max_bad=0)][4] == "picture 08"
    assert run(folder_config(tmp_path / "out", folder, max_bad=4)).images_made == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(files=st.lists(st.binary(max_size=60) | st.just(b"good"), min_size=1, max_size=12), per_shard=st.integers(1, 5))
def test_every_file_is_a_sample_or_is_named(
    tmp_path_factory: pytest.TempPathFactory, files: list[bytes], per_shard: int
) -> None:
    """Whatever bytes the pictures have: samples and bad ones add up, and the samples are the good files in order."""
    base = tmp_path_factory.mktemp("any")
    (base / "in").mkdir()
    for number, data in enumerate(files):
        path = base / "in" / f"{number:03d}.png"
        if data == b"good":
            Image.new("RGB", (3, 3), (number, 0, 0)).save(path)
        else:
            path.write_bytes(data)
    good = [number for number, data in enumerate(files) if data == b"good"]
    summary = run(folder_config(base / "out", base / "in", max_bad=len(files), samples_per_shard=per_shard))
    assert (summary.samples, summary.bad) == (len(good), len(files) - len(good))
    if good:
        dataset = ShardDataset(base / "out", max_bad=0)
        assert [int(sample.image[0, 0, 0]) for sample in dataset] == good


@pytest.mark.parametrize("looks", [0, 1, 5, 24, 30, 40])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, folder: Path, looks: int) -> None:
    """Stopped anywhere: no half shard, nothing done twice, and in the end the bytes of a run that never stopped."""
    run(folder_config(tmp_path / "whole", folder))
    config = folder_config(tmp_path / "out", folder)
    with pytest.raises(InterruptedRunError):
        run(config, stop=StopAfter(looks))
    done = len(list((tmp_path / "out").glob("*.tar")))
    assert not list((tmp_path / "out").glob(".muster-shard*"))
    summary = run(config)
    assert summary.images_made == 18 - 4 * done
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_pictures_added_while_a_run_is_interrupted_do_not_shift_the_others(tmp_path: Path, folder: Path) -> None:
    """The list of pictures is fixed when the run begins: with other numbers, half a set would hold some twice."""
    config = folder_config(tmp_path / "out", folder)
    with pytest.raises(InterruptedRunError):
        run(config, stop=StopAfter(40))
    Image.new("RGB", (4, 4)).save(folder / "aaa.png")
    run(config)
    assert [sample.caption for sample in ShardDataset(tmp_path / "out", max_bad=0)] == [
        f"picture {n:02d}" for n in range(18)
    ]


def test_a_done_shard_that_is_damaged_is_made_again(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Done is what can be verified, size and checksum, not what merely has a name."""
    config = folder_config(tmp_path / "out", folder)
    with pytest.raises(InterruptedRunError):
        run(config, stop=StopAfter(40))
    shard = tmp_path / "out" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    (tmp_path / "out" / ".muster-parts" / "shard-000001.tar.npz").write_bytes(b"PK\3\4 cut")
    run(config)
    assert "shard-000000.tar is damaged" in caplog.text
    assert "shard-000001.tar.npz is damaged" in caplog.text
    run(folder_config(tmp_path / "whole", folder))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_finished_run_does_nothing_again(tmp_path: Path, folder: Path) -> None:
    """Submitting it once more is quick and changes no file; a lost shard is made again."""
    config = folder_config(tmp_path / "out", folder)
    first = run(config)
    before = content(tmp_path / "out")
    again = run(config)
    assert (again.images_made, again.samples, again.fingerprint) == (0, first.samples, first.fingerprint)
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "shard-000002.tar").unlink()
    assert run(config).finished
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_tasks_share_the_shards_and_the_last_one_finishes(tmp_path: Path, folder: Path, order: tuple[int, ...]) -> None:
    """Three tasks in any order make the bytes that one makes; only the last says that the set is finished."""
    run(folder_config(tmp_path / "whole", folder))
    config = folder_config(tmp_path / "out", folder)
    summaries = [run(config, rank=rank, world_size=3) for rank in order]
    assert [summary.finished for summary in summaries] == [False, False, True]
    assert sum(summary.images_made for summary in summaries) == 18
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_run_may_go_on_with_another_number_of_tasks(tmp_path: Path, folder: Path) -> None:
    """What a task of three has done is done for a single one too."""
    run(folder_config(tmp_path / "whole", folder))
    config = folder_config(tmp_path / "out", folder)
    run(config, rank=1, world_size=3)
    assert run(config).images_made == 18 - 4 - 2  # shards 1 and 4 are done; 4 holds the last two pictures
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_bad_pictures_of_all_tasks_count_together(tmp_path: Path, folder: Path) -> None:
    """Each task stays below the limit, the set does not: whoever finishes says so."""
    for number in (0, 4, 8):
        (folder / f"picture_{number:02d}.png").write_bytes(b"")
    config = folder_config(tmp_path / "out", folder, max_bad=2)
    run(config, rank=0, world_size=3)
    run(config, rank=1, world_size=3)
    with pytest.raises(JobError, match="3 of 18 pictures are bad"):
        run(config, rank=2, world_size=3)
    assert not (tmp_path / "out" / "shards.json").exists()


def test_files_of_others_are_not_touched(tmp_path: Path, folder: Path) -> None:
    """A directory that holds anything we did not make is refused, and left exactly as it was."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(StateError, match=r"1 files that no preprocessing made \(thesis\.tex\)"):
        run(folder_config(out, folder))
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_run_with_other_settings_is_refused(tmp_path: Path, folder: Path) -> None:
    """The message names each setting that differs; limits and workers may differ."""
    run(folder_config(tmp_path / "out", folder))
    run(folder_config(tmp_path / "out", folder, max_bad=99, workers=2))
    with pytest.raises(
        StateError, match=r"image\.size_px: 8 there, 16 asked for\n  samples_per_shard: 4 there, 5 asked for"
    ):
        run(folder_config(tmp_path / "out", folder, image={"size_px": 16}, samples_per_shard=5))


def test_two_runs_at_once_are_refused_and_two_tasks_of_one_are_not(tmp_path: Path, folder: Path) -> None:
    """The lock is a job's, not a process's."""
    output = PreprocessOutput(folder_config(tmp_path / "out", folder))
    with output.claimed("Slurm job 7"):
        with output.claimed("Slurm job 7"):
            pass
        with (
            pytest.raises(StateError, match="Slurm job 7 is preprocessing into it right now"),
            output.claimed("Slurm job 8"),
        ):
            pass
    with output.claimed("Slurm job 8"):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lustre is often mounted without them."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run(folder_config(tmp_path / "out", folder)).finished
    assert "has no locks" in caplog.text


def test_without_locks_nobody_is_taken_for_dead(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no locks a starting task leaves the unfinished files alone: another may be writing them now."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    output = PreprocessOutput(folder_config(tmp_path / "out", folder))
    with output.claimed("Slurm job 7"):
        under_way = tmp_path / "out" / f"{TEMPORARY_PREFIX}0123456789abcdef"
        under_way.write_bytes(b"half a shard")
        with output.claimed("Slurm job 7"):
            assert under_way.exists()
    with output.claimed("Slurm job 8"):  # a name that an earlier run left behind refuses nobody
        pass


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says that the disk is full; finished shards stay, and after freeing space the run goes on."""
    config = folder_config(tmp_path / "out", folder)
    fsync, left = os.fsync, iter(range(8))

    def full(descriptor: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutsideError, match="disk or the quota is full"):
        run(config)
    assert list((tmp_path / "out").glob("*.tar"))
    assert not list((tmp_path / "out").glob(".muster-shard*"))
    monkeypatch.undo()
    assert 0 < run(config).images_made < 18


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB, where this may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk_leaves_no_half_shard(small_disk: Path, folder: Path) -> None:
    """As above, with a kernel that really has no space: the error may come from any write."""
    for path in folder.iterdir():
        Image.frombytes("RGB", (64, 64), os.urandom(3 * 64 * 64)).save(path)
    with pytest.raises(OutsideError, match="disk or the quota is full"):
        run(folder_config(small_disk / "out", folder, image={"size_px": 64}))
    assert not list((small_disk / "out").glob(".muster-[!lip]*"))


def test_no_pictures_is_an_error(tmp_path: Path) -> None:
    """An empty folder, or a filter that nothing passes, is not an empty data set."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobError, match="nothing there fits"):
        run(folder_config(tmp_path / "out", tmp_path / "empty"))
    with pytest.raises(JobError, match="nothing there fits"):
        run(config_for(tmp_path / "out2", {"kind": "openmoji", "names": ["no such emoji"]}))


def test_any_number_of_workers_makes_the_same_bytes(tmp_path: Path, folder: Path) -> None:
    """Pictures come back from the workers in order."""
    run(folder_config(tmp_path / "one", folder))
    run(folder_config(tmp_path / "three", folder, workers=3))
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_progress_and_the_end_are_told_in_the_log(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A log has lines with counts, rate and time left, and no bar."""
    with caplog.at_level(logging.INFO):
        summary = run(folder_config(tmp_path / "out", folder, progress_interval_s=1e-9))
    assert "9 of 18 images (50 %), 0 bad" in caplog.text
    assert "18 samples in 5 shards, 0 bad; 18 pictures" in str(summary)


def test_the_entry_point_takes_the_mapping_of_a_job(tmp_path: Path, folder: Path) -> None:
    """`muster submit` hands over `config` as it stands in the job's description."""
    source = {"kind": "folder", "path": str(folder)}
    assert main({"output": str(tmp_path / "out"), "source": source, "workers": 1}) == 0
    with pytest.raises(JobError, match=r"sauce: no such key here; did you mean source\?"):
        main({"output": str(tmp_path / "out"), "sauce": source})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"size_px": 3}}, "size_px"),
        ({"image": {"background": "white"}}, "background"),
        ({"source": {"kind": "net"}}, "source"),
        ({"source": {"kind": "openmoji", "ranges": ["x"]}}, "1F600-1F64F"),
        ({"source": {"kind": "folder"}}, "path"),
        ({"source": {"path": "x"}}, "add kind: folder"),
        ({"max_bad": -1}, "max_bad"),
        ({"max_bad": 1.5}, "max_bad"),
        ({"samples_per_shard": 0}, "samples_per_shard"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Each mistake is reported with the key that it is in."""
    path = tmp_path / "preprocess.yaml"
    path.write_text(json.dumps({"output": "out", **change}))
    with pytest.raises(JobError, match=message):
        load_preprocess_config(path)


def test_settings_come_from_a_file_a_job_or_the_command_line(tmp_path: Path) -> None:
    """A file of its own, the `config` of a job description, and overrides on top of either."""
    (tmp_path / "a.yaml").write_text("output: out\nimage: {size_px: 32}\n")
    (tmp_path / "b.yaml").write_text(
        "name: pre\nentry: jobs.preprocess\nconfig:\n  output: out\n  image: {size_px: 32}\n"
    )
    assert load_preprocess_config(tmp_path / "a.yaml") == load_preprocess_config(tmp_path / "b.yaml")
    changed = load_preprocess_config(tmp_path / "b.yaml", ["image.size_px=24", "source.groups=[smileys]"])
    assert changed.image.size_px == 24
    assert changed.source == OpenMojiSource(groups=("smileys",))
    assert changed.digest() != load_preprocess_config(tmp_path / "a.yaml").digest()


@pytest.mark.parametrize(
    ("max_bad", "items", "allowed"), [(0, 100, 0), (5, 100, 5), (0.05, 100, 5), (0.01, 50, 0), (1, 9, 1), (3.0, 9, 3)]
)
def test_the_limit_is_a_number_or_a_share(max_bad: float, items: int, allowed: int) -> None:
    """Below 1 it is a share, rounded down; 1 is one picture."""
    assert PreprocessConfig(output=Path("x"), max_bad=max_bad).bad_allowed(items) == allowed


def test_slurm_and_other_tasks_limit_the_workers() -> None:
    """What Slurm granted, and a fair part of the node where tasks are not bound to CPUs."""
    everything = available_cpus({}, tasks=1)
    assert everything == len(os.sched_getaffinity(0))
    assert available_cpus({"SLURM_CPUS_PER_TASK": "1"}, tasks=1) == 1
    assert available_cpus({}, tasks=10_000) == (1 if everything == os.cpu_count() else everything)


@given(items=st.lists(st.text(), max_size=50))
def test_the_list_of_items_gives_back_any_strings(tmp_path_factory: pytest.TempPathFactory, items: list[str]) -> None:
    """File names may hold newlines and quotes."""
    path = tmp_path_factory.mktemp("items") / "items"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    found = ItemList(path)
    assert list(found) == items
    assert found[1:3] == items[1:3]


def command(output: Path, *, workers: int = 2, extra: tuple[str, ...] = ()) -> list[str]:
    """Return the command of a run that takes several seconds."""
    config = output.parent / f"{output.name}.yaml"
    source = {"kind": "openmoji", "groups": ["smileys", "food"], "limit": 100}
    options = {"image": {"size_px": 192}, "samples_per_shard": 5, "workers": workers}
    config.write_text(json.dumps({"output": str(output), "source": source, **options}))
    return [sys.executable, "-m", "jobs.preprocess", "--config", str(config), *extra]


class Started:
    """Starts runs as processes of their own, and ends at the end what still runs."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []

    def __call__(
        self, output: Path, *, workers: int = 2, extra: tuple[str, ...] = (), **environ: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(output, workers=workers, extra=extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """Kill what is left of them, workers included."""
        for process in self._processes:
            for pid in processes_of_session(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=30)


@pytest.fixture
def start() -> Iterator[Started]:
    """Starts runs; none outlives the test."""
    started = Started()
    yield started
    started.close()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.01)


def has_done(process: subprocess.Popen[str], output: Path, shards: int) -> bool:
    return shards_done(output) >= shards or process.poll() is not None


def has_left(session: int) -> bool:
    return not processes_of_session(session)


def shards_done(output: Path) -> int:
    return len(list((output / ".muster-parts").glob("shard-*"))) if (output / ".muster-parts").exists() else 0


def processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What `start` makes when nobody disturbs it."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    done = subprocess.run(command(output, extra=("--json",)), capture_output=True, text=True, timeout=120, check=True)
    summary = json.loads(done.stdout)
    assert (summary["samples"], summary["shards"], summary["finished"]) == (100, 20, True)
    assert summary["images_per_s"] > 0
    return content(output)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    start: Started, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """SIGKILL to the parent alone, again and again: no worker stays behind, and the set is the same to the byte."""
    output = tmp_path / "out"
    for done_before in (1, 7):
        process = start(output)
        wait_until(partial(has_done, process, output, done_before))
        process.kill()
        process.communicate(timeout=30)
        wait_until(partial(has_left, process.pid), timeout_s=20)
    process = start(output)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "shards are done already" in err
    assert content(output) == uninterrupted
    assert sorted(path.name for path in output.glob(".muster-*")) == [".muster-finish-lock", ".muster-lock"]


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGUSR2, 1)])
def test_asked_to_stop_it_leaves_with_75_and_goes_on_later(
    start: Started, tmp_path: Path, uninterrupted: dict[str, bytes], number: signal.Signals, workers: int
) -> None:
    """Slurm signals all processes of the task; none stays behind, whole shards stay, and the next attempt finishes."""
    output = tmp_path / "out"
    process = start(output, workers=workers)
    wait_until(lambda: shards_done(output) >= 2)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert f"{number.name} received in shard" in err  # and not: ... and a worker died of it
    wait_until(lambda: not processes_of_session(process.pid))  # the last one may outlive its parent by a moment
    assert not list(output.glob(".muster-shard*"))
    process = start(output, workers=workers)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert content(output) == uninterrupted


def test_asked_to_stop_while_workers_start_it_leaves_with_75(start: Started, tmp_path: Path) -> None:
    """A worker that is hit while it starts, or dies of it, makes a stop and not a failure."""
    output = tmp_path / "out"
    process = start(output)
    wait_until(lambda: len(processes_of_session(process.pid)) > 1)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


def test_tasks_at_once_make_one_set(start: Started, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """Three tasks of a launcher, truly at the same time, in one directory that none of them has made before."""
    output = tmp_path / "out"
    shared = {
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    tasks = [start(output, workers=1, extra=("--json",), RANK=str(rank), **shared) for rank in range(3)]
    answers = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], answers
    assert any(json.loads(out)["finished"] for out, _ in answers)
    assert content(output) == uninterrupted


def test_another_run_into_the_same_directory_is_refused_while_one_is_at_work(start: Started, tmp_path: Path) -> None:
    """The second gets a message with the first one's process, and the first is not disturbed."""
    output = tmp_path / "out"
    first = start(output)
    wait_until(lambda: shards_done(output) >= 1)
    second = start(output)
    _, err = second.communicate(timeout=60)
    assert second.returncode == StateError.exit_code
    assert f"process {first.pid} on" in err
    assert first.poll() in (None, 0)


def test_a_worker_that_is_killed_ends_the_run_with_a_hint(start: Started, tmp_path: Path) -> None:
    """The kernel kills the largest process when memory runs out; the run must not wait for it for ever."""
    output = tmp_path / "out"
    process = start(output)
    wait_until(lambda: shards_done(output) >= 1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == OutsideError.exit_code, err
    assert "memory" in err
    again = start(output)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err


def test_a_terminal_gets_a_bar(start: Started, tmp_path: Path) -> None:
    """Rich's bar with the count, instead of lines."""
    process = start(tmp_path / "out", workers=1, extra=("--set", "source.limit=9"), FORCE_COLOR="1", COLUMNS="120")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "preprocessing" in err
    assert "9/9" in err


def test_it_loads_no_torch() -> None:
    """Workers are started in numbers, and torch costs each of them seconds and a quarter of a gigabyte."""
    code = "import sys, jobs.preprocess; print(sorted({'torch', 'diffusers', 'submitit', 'webdataset'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
