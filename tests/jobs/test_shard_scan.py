"""Tests of reading the structure of tar shards, whole and damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import OutsideError
from jobs.shard_scan import SAMPLE_DTYPE, ShardPart, scan_shard, split_member_name
from jobs.shards import new_shard, shard_key

EVERY_EXAMPLE_OWN_FILE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)


def write(path: Path, members: list[tuple[str, bytes]], *, tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def ten_samples(path: Path) -> Path:
    with new_shard(path) as writer:
        for number in range(10):
            writer.add(
                shard_key(number, f"n{number}"),
                image=bytes([number]) * 700,
                extension="png",
                caption=f"caption {number}",
            )
    return path


def keys_of(part: ShardPart) -> list[str]:
    return [part.keys[row["key_offset"] : row["key_offset"] + row["key_size"]].decode() for row in part.rows]


def images_of(part: ShardPart, path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[row["image_offset"] : row["image_offset"] + row["image_size"]] for row in part.rows]


def test_a_row_of_the_index_takes_47_bytes() -> None:
    """Ten million samples are indexed in half a gigabyte on disk; a wider row would be another file format."""
    assert SAMPLE_DTYPE.itemsize == 47


def test_offsets_lead_to_the_bytes_that_went_in(tmp_path: Path) -> None:
    """The rows of a sound shard point at exactly the images and captions that were written, in order."""
    path = ten_samples(tmp_path / "a.tar")
    part = scan_shard(path)
    assert part.bad == ()
    assert part.record.samples == 10
    assert images_of(part, path) == [bytes([number]) * 700 for number in range(10)]
    data = path.read_bytes()
    captions = [data[row["caption_offset"] : row["caption_offset"] + row["caption_size"]] for row in part.rows]
    assert captions == [f"caption {number}".encode() for number in range(10)]
    assert keys_of(part)[3] == "00000003-n3"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["k", "folder/" * 12 + "k", "x" * 95, "päth/ключ"])
def test_every_way_tar_writes_names_is_read(tmp_path: Path, tar_format: int, name: str) -> None:
    """Names in the prefix field, in GNU long-name members and in pax records are found whole."""
    path = write(tmp_path / "a.tar", [(f"{name}.jpg", b"image"), (f"{name}.txt", b"caption")], tar_format=tar_format)
    part = scan_shard(path)
    assert part.bad == ()
    assert keys_of(part) == [name]


@pytest.mark.parametrize("name", ["f" * 300, "d/" * 200 + "k"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_beyond_ustar_are_read(tmp_path: Path, tar_format: int, name: str) -> None:
    """Names longer than a header can hold come from the member before it, and only for that one member."""
    members = [(f"{name}.png", b"1"), (f"{name}.txt", b"one"), ("short.png", b"2"), ("short.txt", b"two")]
    assert keys_of(scan_shard(write(tmp_path / "a.tar", members, tar_format=tar_format))) == [name, "short"]


def test_directories_and_other_members_are_no_samples(tmp_path: Path) -> None:
    """Folders, links and files without an extension are passed over without a complaint."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("README", tarfile.REGTYPE)):
            header = tarfile.TarInfo(name)
            header.type = kind
            tar.addfile(header)
        header = tarfile.TarInfo("folder/a.png")
        header.size = 3
        tar.addfile(header, io.BytesIO(b"abc"))
    part = scan_shard(path)
    assert (keys_of(part), part.bad) == (["folder/a"], ())


def test_a_sample_without_an_image_is_named(tmp_path: Path) -> None:
    """A lone caption is counted as bad, by its key, and its neighbours are unharmed."""
    path = write(tmp_path / "a.tar", [("a.png", b"1"), ("b.txt", b"no picture"), ("c.png", b"3")])
    part = scan_shard(path)
    assert keys_of(part) == ["a", "c"]
    assert [(bad.name, bad.reason) for bad in part.bad] == [("a.tar: b", "has no image (members: txt)")]
    assert part.record.bad == 1


def test_two_members_of_one_name_spoil_the_sample(tmp_path: Path) -> None:
    """webdataset refuses such a sample; taking either of the two silently would be a guess."""
    part = scan_shard(write(tmp_path / "a.tar", [("a.png", b"1"), ("a.png", b"2"), ("b.png", b"3")]))
    assert keys_of(part) == ["b"]
    assert "two members are named a.png" in part.bad[0].reason


@pytest.mark.parametrize("kept_bytes", [100, 512, 700, 1536, 9_999, 20_000])
def test_a_cut_shard_keeps_what_is_whole_and_says_that_it_is_cut(tmp_path: Path, kept_bytes: int) -> None:
    """Whatever the place of the cut, whole samples before it are used and at least one entry names the loss."""
    path = ten_samples(tmp_path / "a.tar")
    whole = images_of(scan_shard(path), path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    part = scan_shard(path)
    found = images_of(part, path)
    assert found == whole[: len(found)]
    assert len(found) >= kept_bytes // 2560 - 1  # a sample takes 5 blocks
    assert part.bad


def test_a_shard_cut_between_two_members_is_noticed(tmp_path: Path) -> None:
    """A cut that leaves every member whole still misses the end mark, so it cannot pass for a shorter shard."""
    path = ten_samples(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes()[: 4 * 2560])
    part = scan_shard(path)
    assert part.record.samples == 4
    assert ["end mark" in bad.reason for bad in part.bad] == [True]


def test_a_damaged_header_costs_its_sample_only(tmp_path: Path) -> None:
    """tarfile ends silently at a damaged header; here the samples behind it are found again."""
    path = ten_samples(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    data[3 * 2560 : 3 * 2560 + 20] = b"\xff" * 20
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 6  # the trap: no error, and 14 members missing
    part = scan_shard(path)
    assert [key[:8] for key in keys_of(part)] == [f"{number:08d}" for number in range(10) if number != 3]
    assert [bad.name for bad in part.bad] == ["a.tar @ 7680", "a.tar: 00000003-n3"]


def test_a_zeroed_stretch_is_not_the_end(tmp_path: Path) -> None:
    """Blocks that a crash left zeroed look like tar's end mark; what stands behind them is still found, and the hole named."""
    path = ten_samples(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    data[2 * 2560 : 4 * 2560] = bytes(2 * 2560)
    path.write_bytes(data)
    part = scan_shard(path)
    assert part.record.samples == 8
    assert "zeros" in part.bad[0].reason


def test_a_compressed_shard_is_refused_by_name(tmp_path: Path) -> None:
    """A gzip file called .tar has no samples and one entry that says what to do."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    part = scan_shard(path)
    assert part.record.samples == 0
    assert "decompress" in part.bad[0].reason


def test_an_unreadable_shard_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    """What cannot be opened is not called damaged: it may be readable on the next attempt."""
    with pytest.raises(OutsideError, match=r"gone\.tar"):
        scan_shard(tmp_path / "gone.tar")


@EVERY_EXAMPLE_OWN_FILE
@given(data=st.binary(max_size=4096))
def test_any_bytes_can_be_scanned(tmp_path: Path, data: bytes) -> None:
    """No content makes the scan fail, and what is not a tar file never passes without a word."""
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    part = scan_shard(path)
    assert part.record.samples == len(part.rows)
    assert part.bad or not data.strip(b"\0")


@EVERY_EXAMPLE_OWN_FILE
@given(
    place=st.integers(0, 26_000),
    noise=st.binary(min_size=1, max_size=1500),
    cut=st.none() | st.integers(0, 30_000),
)
def test_what_survives_damage_is_genuine(tmp_path: Path, place: int, noise: bytes, cut: int | None) -> None:
    """Whatever is overwritten or cut: a sample reported as usable has a checksum of the bytes it points at, and what is lost is
    counted, unless the damage hit only the inside of an image or a caption (which the picture's decoder has to notice)."""
    path = ten_samples(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    data[place : place + len(noise)] = noise
    path.write_bytes(data[:cut])
    part = scan_shard(path)
    size = path.stat().st_size
    assert all(row["image_offset"] + row["image_size"] <= size for row in part.rows)
    assert part.record.samples <= 10
    if part.record.samples < 10:
        assert part.bad


@given(
    key=st.from_regex(r"[A-Za-z0-9_/-]*[A-Za-z0-9_-]", fullmatch=True),
    extension=st.from_regex(r"[a-z]+(\.[a-z]+)?", fullmatch=True),
)
def test_member_names_split_at_the_first_dot_of_the_file_name(key: str, extension: str) -> None:
    """As webdataset does it: the key keeps its folders, the extension keeps its inner dots."""
    assert split_member_name(f"{key}.{extension}") == (key, extension)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.b/c.png", ("a.b/c", "png")), (".hidden", None), ("d/.x.png", None), ("x", None), ("A.PNG", ("A", "png"))],
)
def test_member_names_at_the_edges(name: str, expected: tuple[str, str] | None) -> None:
    """Dots in folders belong to the key; hidden files and files without an extension are no samples."""
    assert split_member_name(name) == expected
