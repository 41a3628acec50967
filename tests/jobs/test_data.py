"""Tests of random access to shards, and of their index."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import JobError, MusterError, NotFoundError, OutsideError, StateError
from jobs.data import ShardDataset, decode_caption
from jobs.images import BadImageError
from jobs.shard_index import ensure_index, load_index, read_manifest, replacing
from jobs.shards import new_shard, shard_key, shard_name

SAMPLES = 30
PER_SHARD = 10


def picture(number: int, *, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(directory: Path, *, samples: int = SAMPLES, per_shard: int = PER_SHARD) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for start in range(0, samples, per_shard):
        with new_shard(directory / shard_name(start // per_shard)) as writer:
            for number in range(start, min(start + per_shard, samples)):
                writer.add(shard_key(number, "x"), image=png(number), extension="png", caption=f"caption {number}")
    return directory


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of ten samples each, not yet indexed."""
    return write_shards(tmp_path / "shards")


def spoil_sample(directory: Path, number: int) -> None:
    """Change one byte in the middle of the image of a sample, after it has been indexed."""
    row = load_index(directory).rows[number]
    with (directory / shard_name(int(row["shard"]))).open("r+b") as file:
        file.seek(int(row["image_offset"]) + int(row["image_size"]) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_every_sample_is_found_by_its_number(shards: Path) -> None:
    """Pixels, caption and key of number i are those that were written i-th, in whatever order they are asked for."""
    dataset = ShardDataset(shards, max_bad=0)
    assert len(dataset) == SAMPLES
    for number in np.random.default_rng(0).permutation(SAMPLES):
        sample = dataset[number]
        assert sample.key == f"{number:08d}-x"
        assert sample.caption == f"caption {number}"
        assert sample.image.dtype == np.uint8
        assert (sample.image == np.asarray(picture(int(number)))).all()
    assert dataset.bad == []


def test_webdataset_reads_our_shards(shards: Path) -> None:
    """The package that the format comes from sees the same samples in the same order."""
    import warnings

    import webdataset

    dataset = ShardDataset(shards, max_bad=0)
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "txt"))
    assert len(theirs) == SAMPLES
    for number, (key, image, caption) in enumerate(theirs):
        ours = dataset[number]
        assert (key, caption) == (ours.key, ours.caption)
        assert (image == ours.image).all()


def test_shards_that_webdataset_wrote_work_the_same_way(tmp_path: Path) -> None:
    """Shards of others, with JPEG and JSON captions, are indexed and read."""
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"s{number}", "png": np.asarray(picture(number)), "json": {"caption": f"a {number}"}}
            )
    dataset = ShardDataset(tmp_path, max_bad=0)
    assert [dataset[number].caption for number in range(5)] == [f"a {number}" for number in range(5)]
    assert (dataset[4].image == np.asarray(picture(4))).all()


@pytest.mark.parametrize("number", [-1, SAMPLES, 10**12])
def test_numbers_outside_are_refused(shards: Path, number: int) -> None:
    """A negative number is a mistake in the order of samples, not the last sample."""
    with pytest.raises(IndexError):
        ShardDataset(shards, max_bad=0)[number]


def test_the_fingerprint_knows_samples_and_order_and_nothing_else(tmp_path: Path) -> None:
    """Other shard sizes or another folder leave it alone; one caption, one pixel, one sample or the order change it."""
    base = ShardDataset(write_shards(tmp_path / "base"), max_bad=0).fingerprint
    assert ShardDataset(write_shards(tmp_path / "split", per_shard=7), max_bad=0).fingerprint == base
    assert ShardDataset(shutil.copytree(tmp_path / "base", tmp_path / "copy"), max_bad=0).fingerprint == base
    assert ShardDataset(write_shards(tmp_path / "fewer", samples=SAMPLES - 1), max_bad=0).fingerprint != base
    swapped = write_shards(tmp_path / "swapped")
    (swapped / shard_name(0)).rename(swapped / "x")
    (swapped / shard_name(1)).rename(swapped / shard_name(0))
    (swapped / "x").rename(swapped / shard_name(1))
    assert ShardDataset(swapped, max_bad=0).fingerprint != base
    caption = write_shards(tmp_path / "caption")
    data = (caption / shard_name(2)).read_bytes()
    (caption / shard_name(2)).write_bytes(data.replace(b"caption 25", b"caption 26"))
    assert ShardDataset(caption, max_bad=0).fingerprint != base


def test_a_sample_that_changed_on_disk_is_replaced_counted_and_named_once(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit rot is found by the checksum of the index, even where the decoder would accept it."""
    ensure_index(shards)
    spoil_sample(shards, 12)
    dataset = ShardDataset(shards, max_bad=1)
    with caplog.at_level(logging.WARNING):
        first = dataset[12]
        again = dataset[12]
    assert first.key == again.key != "00000012-x"
    assert first.replaces == "shard-000001.tar: 00000012-x"
    assert [bad.name for bad in dataset.bad] == ["shard-000001.tar: 00000012-x"]
    assert sum("00000012-x" in record.getMessage() for record in caplog.records) == 1
    assert dataset[11].replaces == ""


def test_everybody_gets_the_same_replacement(shards: Path) -> None:
    """What stands in depends on the number alone: not on what was read before, nor on who reads."""
    ensure_index(shards)
    for number in (3, 4, 5, 17, 29):
        spoil_sample(shards, number)
    forwards, backwards = ShardDataset(shards, max_bad=5), ShardDataset(shards, max_bad=5)
    one = [forwards[number].key for number in range(SAMPLES)]
    two = [backwards[number].key for number in reversed(range(SAMPLES))]
    assert one == two[::-1]
    assert len({one[number] for number in (3, 4, 5, 17, 29)}) > 1  # not all the same neighbour


def test_one_bad_sample_too_many_is_an_error_that_names_them(shards: Path) -> None:
    """The limit is exact, and the message has the names and the way out."""
    ensure_index(shards)
    for number in (1, 2, 3):
        spoil_sample(shards, number)
    dataset = ShardDataset(shards, max_bad=2)
    with pytest.raises(JobError, match=r"3 bad samples, more than the 2 .*max_bad(.|\n)*00000001-x") as caught:
        _captions(dataset, list(range(SAMPLES)))
    assert "checksum" in str(caught.value)


def test_if_nothing_can_be_read_that_is_said(tmp_path: Path) -> None:
    """A search for a replacement ends even when there is none."""
    directory = write_shards(tmp_path / "one", samples=2)
    ensure_index(directory)
    spoil_sample(directory, 0)
    spoil_sample(directory, 1)
    with pytest.raises(JobError, match="not one of the 2 samples"):
        _ = ShardDataset(directory, max_bad=10)[0]


def test_a_missing_shard_is_named_when_the_set_is_opened(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Within the limit its samples are replaced; beyond it, opening fails at once and not in the middle of the night."""
    ensure_index(shards)
    (shards / shard_name(1)).unlink()
    with pytest.raises(JobError, match=r"10 samples are missing.*shard-000001\.tar is missing"):
        ShardDataset(shards, max_bad=9)
    with caplog.at_level(logging.WARNING):
        dataset = ShardDataset(shards, max_bad=10)
    assert "shard-000001.tar is missing" in caplog.text
    assert all(dataset[number].replaces for number in range(10, 20))
    assert len(dataset.bad) == 10


def test_a_shard_cut_short_after_indexing_costs_only_what_was_cut(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Samples before the cut are read as ever."""
    ensure_index(shards)
    with (shards / shard_name(2)).open("r+b") as file:
        file.truncate(6 * 1024)
    with caplog.at_level(logging.WARNING):
        dataset = ShardDataset(shards, max_bad=10)
    assert "shard-000002.tar has 6144 bytes" in caplog.text
    replaced = [number for number in range(SAMPLES) if dataset[number].replaces]
    assert replaced
    assert min(replaced) > 20


def test_damage_met_while_indexing_is_counted_against_the_limit(shards: Path) -> None:
    """Shards of others that are cut when first seen: what is whole is used, what is not is named in bad.jsonl."""
    with (shards / shard_name(0)).open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(JobError, match=r"damaged or incomplete.*bad\.jsonl"):
        ShardDataset(shards, max_bad=0)
    named = [json.loads(line) for line in (shards / "bad.jsonl").read_text().splitlines()]
    dataset = ShardDataset(shards, max_bad=len(named))
    assert 20 <= len(dataset) < SAMPLES
    assert all(entry["name"].startswith("shard-000000.tar") for entry in named)


def test_a_failing_file_system_is_not_a_bad_sample(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing what another attempt could read would make two attempts differ."""
    dataset = ShardDataset(shards, max_bad=100)

    def fail(*_: object) -> bytes:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OutsideError, match="Stale file handle"):
        _ = dataset[0]
    assert dataset.bad == []


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    """A set of very many shards is read at random with a bounded number of open files."""
    dataset = ShardDataset(write_shards(tmp_path / "many", samples=100, per_shard=1), max_bad=0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in np.random.default_rng(0).permutation(100):
        assert dataset[number].caption == f"caption {number}"
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 40


def _captions(dataset: ShardDataset, numbers: list[int]) -> list[str]:
    return [dataset[number].caption for number in numbers]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_it_travels_to_worker_processes(shards: Path, method: str) -> None:
    """Pickled into another process it opens its own files; the parent's stay as they were."""
    dataset = ShardDataset(shards, max_bad=0)
    _ = dataset[0]
    with multiprocessing.get_context(method).Pool(2) as pool:
        got = pool.starmap(_captions, [(dataset, [5, 25, 0]), (dataset, [29])])
    assert got == [["caption 5", "caption 25", "caption 0"], ["caption 29"]]
    assert dataset[1].caption == "caption 1"


def test_a_pickle_of_it_is_small(shards: Path) -> None:
    """The index is mapped anew by whoever unpickles it: half a gigabyte is not sent to every worker."""
    big = write_shards(shards.parent / "big", samples=300)
    sizes = [len(pickle.dumps(ShardDataset(directory, max_bad=0))) for directory in (shards, big)]
    assert abs(sizes[0] - sizes[1]) < 100


def test_a_data_loader_with_forked_workers_reads_right(shards: Path) -> None:
    """Workers share the parent's open files after a fork; reads by pread do not disturb each other."""
    from torch.utils.data import DataLoader

    dataset = ShardDataset(shards, max_bad=0)
    _ = [dataset[number] for number in range(0, SAMPLES, PER_SHARD)]
    loader: Any = DataLoader(
        dataset, batch_size=4, num_workers=2, collate_fn=_only_captions, multiprocessing_context="fork"
    )  # type: ignore[arg-type]
    assert [caption for batch in loader for caption in batch] == [f"caption {number}" for number in range(SAMPLES)]


def _only_captions(samples: list[Any]) -> list[str]:
    return [sample.caption for sample in samples]


def test_pictures_of_others_can_be_brought_to_one_size(tmp_path: Path) -> None:
    """With `size_px`, pictures of any shape come out as squares; without, as they are."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, size in enumerate([(40, 20), (9, 30)]):
            buffer = io.BytesIO()
            picture(number, size=size).save(buffer, "PNG")
            header = tarfile.TarInfo(f"{number}.png")
            header.size = len(buffer.getvalue())
            tar.addfile(header, io.BytesIO(buffer.getvalue()))
    assert [sample.image.shape for sample in ShardDataset(tmp_path, max_bad=0, size_px=16)] == [(16, 16, 3)] * 2
    assert [sample.image.shape for sample in ShardDataset(tmp_path, max_bad=0)] == [(20, 40, 3), (30, 9, 3)]


def test_the_index_is_made_once(shards: Path) -> None:
    """The second to open the set reads what the first has written."""
    ShardDataset(shards, max_bad=0)
    written = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    ShardDataset(shards, max_bad=0)
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == written


def test_many_shards_are_indexed_in_their_order(tmp_path: Path) -> None:
    """Several are scanned at a time; the order of samples is that of the names all the same."""
    dataset = ShardDataset(write_shards(tmp_path / "many", samples=120, per_shard=2), max_bad=0)
    assert [dataset.key(number) for number in range(120)] == [f"{number:08d}-x" for number in range(120)]


def test_where_one_may_not_write_the_index_goes_to_the_cache(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only data set can be used, and is indexed only once all the same."""
    import jobs.shard_index

    monkeypatch.setattr(
        jobs.shard_index, "_can_write", lambda directory: False
    )  # tests run as root, who may write anywhere
    dataset = ShardDataset(shards, max_bad=0, index_directory=tmp_path / "cache")
    assert dataset[7].caption == "caption 7"
    assert not (shards / "shards.json").exists()
    monkeypatch.setattr(jobs.shard_index, "scan_shard", None)  # a second scan would fail
    assert ShardDataset(shards, max_bad=0, index_directory=tmp_path / "cache").fingerprint == dataset.fingerprint


def test_shards_added_later_are_not_ignored(shards: Path) -> None:
    """An index that does not know a shard is out of date, and the message says how to renew it."""
    ensure_index(shards)
    shutil.copy(shards / shard_name(0), shards / "more.tar")
    with pytest.raises(StateError, match=r"more\.tar .*came after the index.*remove .*shards\.json"):
        ShardDataset(shards, max_bad=0)
    (shards / "shards.json").unlink()
    assert len(ShardDataset(shards, max_bad=0)) == SAMPLES + 10


@pytest.mark.parametrize("name", ["shards.json", "index.npy", "index.keys"])
@pytest.mark.parametrize("how", ["cut", "noise", "gone"])
def test_a_damaged_index_is_an_error_with_a_way_out(shards: Path, name: str, how: str) -> None:
    """Never a crash in a mapped file, never samples that are not there."""
    ensure_index(shards)
    path = shards / name
    if how == "gone" and name == "shards.json":
        pytest.skip("a set without its manifest is simply not indexed yet")
    if how == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if how == "cut" else b"\x93NUMPY" + os.urandom(len(data)))
    with pytest.raises(StateError, match=r"remove .*shards\.json"):
        ShardDataset(shards, max_bad=0)


def test_what_is_not_a_set_of_shards_is_refused(tmp_path: Path) -> None:
    """No directory, an empty one, and compressed shards have a message each."""
    with pytest.raises(NotFoundError, match="cannot be listed"):
        ShardDataset(tmp_path / "absent", max_bad=0)
    with pytest.raises(NotFoundError, match=r"no \.tar files"):
        ShardDataset(tmp_path, max_bad=0)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(JobError, match="decompress"):
        ShardDataset(tmp_path, max_bad=0)


def test_a_set_without_a_usable_sample_is_refused(tmp_path: Path) -> None:
    """An order over no samples would divide by zero far from here."""
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    with pytest.raises(JobError, match="no usable sample"):
        ShardDataset(tmp_path, max_bad=5)


def test_shards_do_not_tell_when_or_by_whom_they_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples give the same bytes an hour later and as another user."""
    import time

    first = write_shards(tmp_path / "one")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    second = write_shards(tmp_path / "two")
    for number in range(3):
        digests = {hashlib.sha256((where / shard_name(number)).read_bytes()).hexdigest() for where in (first, second)}
        assert len(digests) == 1


def test_indexes_made_at_once_are_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    """Ranks that open a new set together may each write the index: whoever comes last changes nothing."""
    other = shutil.copytree(shards, tmp_path / "other")
    ensure_index(shards)
    ensure_index(other)
    for name in ("index.npy", "index.keys", "bad.jsonl"):
        assert (shards / name).read_bytes() == (other / name).read_bytes()
    one, two = read_manifest(shards), read_manifest(other)
    assert one is not None
    assert two is not None
    assert one.shards == two.shards


def test_replacing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """An error while writing keeps what was there and leaves nothing beside it."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OverflowError), replacing(path) as file:
        file.write((-1).to_bytes(4, "big"))
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"old"}
    with replacing(path) as file:
        file.write(b"new")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"new"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_keys_need_no_escaping_and_stay_apart() -> None:
    """Names that differ only in what a key may not hold are told apart by their number."""
    assert shard_key(7, "ünder/the séa.v2") == "00000007-nder-the-s-a-v2"
    assert shard_key(8, "喵") == "00000008"
    assert len(shard_key(10**8, "x" * 500)) <= 90


@given(name=st.text(max_size=200), number=st.integers(0, 10**12))
def test_every_name_makes_a_key_that_the_writer_takes(name: str, number: int) -> None:
    """The writer refuses odd keys, so shard_key must never make one."""
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as tar:
        from jobs.shards import ShardWriter

        ShardWriter(tar).add(shard_key(number, name), image=b"", extension="png", caption="")


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        ("txt", b" a cat \n", "a cat"),
        ("txt", "ein Kätzchen".encode(), "ein Kätzchen"),
        ("json", b'{"caption": "a", "text": "b"}', "a"),
        ("json", b'{"text": "b", "width": 3}', "b"),
        ("json", b'"plain"', "plain"),
        ("json", b'{"width": 3}', ""),
        ("cls", b"7", "class 7"),
        ("", b"", ""),
    ],
)
def test_captions_of_every_kind(kind: str, data: bytes, expected: str) -> None:
    """Text, JSON with one of the usual keys, class numbers, and none at all."""
    assert decode_caption(kind, data) == expected


@pytest.mark.parametrize(
    ("kind", "data"),
    [("txt", b"\xff"), ("json", b"{"), ("json", b"[1]"), ("json", b'{"text": 3}'), ("json", b"[" * 100_000)],
)
def test_damaged_captions_make_a_bad_sample(kind: str, data: bytes) -> None:
    """A caption that cannot be read is not an empty caption."""
    with pytest.raises(BadImageError, match="caption"):
        decode_caption(kind, data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    place=st.integers(0, 40_000),
    noise=st.binary(min_size=1, max_size=3000),
    cut=st.none() | st.integers(0, 40_000),
    before=st.booleans(),
)
def test_no_damage_gives_a_wrong_sample(
    tmp_path_factory: pytest.TempPathFactory, place: int, noise: bytes, cut: int | None, before: bool
) -> None:
    """After indexing, each number gives genuine pixels with their own caption or the set says what is wrong; before, nothing
    can tell damage inside a picture from what was meant, but nothing crashes either."""
    directory = write_shards(tmp_path_factory.mktemp("damaged"))
    if not before:
        ensure_index(directory)
    path = directory / shard_name(1)
    data = bytearray(path.read_bytes())
    data[place : place + len(noise)] = noise
    path.write_bytes(data[:cut])
    try:
        dataset = ShardDataset(directory, max_bad=SAMPLES)
        samples = [dataset[number] for number in range(len(dataset))]
    except MusterError:
        return
    for sample in samples if not before else []:
        number = int(sample.key[:8])
        assert (sample.image == np.asarray(picture(number))).all()
        assert sample.caption == f"caption {number}"
