"""Tests of the places that pictures come from."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.errors import NotFoundError, OutsideError
from jobs.images import BadImageError, render_svg
from jobs.preprocess_settings import FolderSource, OpenMojiSource, ShardsSource, code_point_range
from jobs.shard_index import ensure_index
from jobs.shards import new_shard, shard_key, shard_name
from jobs.sources import ExistingShards, ImageFolder, OpenMoji, caption_from_path, code_points, emoji_caption, spread

MB = 1_000_000


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path, "PNG")


def folder_items(folder: Path, **options: object) -> list[str]:
    return list(ImageFolder(FolderSource(kind="folder", path=folder, **options)).list_items())


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("1F600", "grinning face"),
        ("1F469-200D-1F680", "woman astronaut"),
        ("2639", "frowning face"),
        ("0023-FE0F-20E3", "keycap #"),
        ("1F469-1F3FD-200D-1F680", "woman astronaut medium skin tone"),
        ("1F3F3-FE0F-200D-1F7E5", "white flag red square"),
        ("1F3F4-E0075-E0073-E0063-E0061-E007F", "black flag usca"),
        ("E346", "openmoji icon"),
        ("1F1E6", "regional indicator symbol letter a"),
    ],
)
def test_captions_of_emoji(stem: str, caption: str) -> None:
    """CLDR's name of a sequence, or the names of its parts, or a plain word for what has none."""
    assert emoji_caption(code_points(stem)) == caption


def test_every_drawing_has_a_caption() -> None:
    """None of the 4,495 file names is too odd, and no caption is empty or keeps an emoji in it."""
    source = OpenMoji(OpenMojiSource(skin_tones=True, extras=True))
    items = list(source.list_items())
    assert len(items) > 4000
    captions = [emoji_caption(code_points(item)) for item in items]
    assert all(captions)
    assert not [caption for caption in captions if any(ord(character) > 0x2FFF for character in caption)]


def test_the_smileys_are_round_faces() -> None:
    """The group for small models: about a hundred drawings, faces all, no people, cats or lips."""
    captions = [emoji_caption(code_points(item)) for item in OpenMoji(OpenMojiSource(groups=("smileys",))).list_items()]
    assert 100 <= len(captions) <= 130
    assert "grinning face" in captions
    assert not [
        caption
        for caption in captions
        if any(word in caption.split() for word in ("cat", "man", "woman", "lip", "person"))
    ]


def test_skin_tones_and_extras_are_left_out_unless_wanted() -> None:
    """They are nearly half of all drawings, and alike or nameless."""
    few = set(OpenMoji(OpenMojiSource()).list_items())
    tones = set(OpenMoji(OpenMojiSource(skin_tones=True)).list_items())
    extras = set(OpenMoji(OpenMojiSource(extras=True)).list_items())
    assert few < tones
    assert all("1F3F" in item for item in tones - few)
    assert few < extras
    assert all(emoji_caption(code_points(item)) == "openmoji icon" for item in extras - few)


def test_groups_ranges_and_names_work_together() -> None:
    """Groups and ranges add up; names narrow down."""
    hearts = list(OpenMoji(OpenMojiSource(ranges=("1F493-1F49F", "2764"), names=("heart",))).list_items())
    assert "1F496" in hearts
    assert "2764" in hearts
    assert all("heart" in emoji_caption(code_points(item)) for item in hearts)
    animals = set(OpenMoji(OpenMojiSource(groups=("animals",))).list_items())
    assert set(OpenMoji(OpenMojiSource(groups=("animals",), ranges=("1F600",))).list_items()) == animals | {"1F600"}


def test_openmoji_says_on_what_terms() -> None:
    """CC BY-SA asks for attribution, so the source carries it."""
    description = OpenMoji(OpenMojiSource()).description
    assert "CC BY-SA 4.0" in description.licence
    assert "OpenMoji" in description.attribution


def test_a_drawing_can_be_loaded_and_drawn() -> None:
    """An item gives an SVG with its caption."""
    raw = OpenMoji(OpenMojiSource(zoom=1.4)).load("1F600", max_bytes=MB)
    assert (raw.caption, raw.is_svg, raw.zoom) == ("grinning face", True, 1.4)
    assert render_svg(raw.data, 16).size == (16, 16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1F600-1F64F", range(0x1F600, 0x1F650)), ("2639", range(0x2639, 0x263A)), ("u+41-U+43", range(0x41, 0x44))],
)
def test_ranges_of_code_points(text: str, expected: range) -> None:
    """Both ends belong to a range, and a single code point is one."""
    assert code_point_range(text) == expected


@pytest.mark.parametrize("text", ["", "x", "1F64F-1F600", "1-2-3", "-"])
def test_wrong_ranges_are_refused(text: str) -> None:
    """An empty range would silently select nothing."""
    with pytest.raises(ValueError, match="1F600-1F64F"):
        code_point_range(text)


@given(count=st.integers(0, 200), limit=st.integers(1, 250))
def test_a_limit_takes_an_even_spread(count: int, limit: int) -> None:
    """Exactly as many as asked for or all there are, in order, none twice, and not just the first ones."""
    items = [str(number) for number in range(count)]
    chosen = [int(item) for item in spread(items, limit)]
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))
    if chosen:
        gaps = [after - before for before, after in zip(chosen, [*chosen[1:], count], strict=True)]
        assert max(gaps) - min(gaps) <= 1


def test_a_folder_is_searched_to_the_bottom_in_a_fixed_order(tmp_path: Path) -> None:
    """Pictures at every depth, by name; hidden files and other files are left alone."""
    touch(tmp_path, "b.png", "a/z.jpg", "a/b/c.WEBP", "Z.jpeg", ".hidden.png", "a/._mac.png", ".git/x.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "a" / "data.json").write_text("{}")
    assert folder_items(tmp_path) == ["Z.jpeg", "a/b/c.WEBP", "a/z.jpg", "b.png"]


def test_a_folder_deeper_than_the_stack_is_searched(tmp_path: Path) -> None:
    """Nesting is bounded by the file system, not by Python's recursion."""
    deep = tmp_path
    for _ in range(300):
        deep = deep / "d"
    touch(deep, "x.png")
    assert folder_items(tmp_path) == ["d/" * 300 + "x.png"]


def test_a_link_to_a_folder_is_named_and_not_followed(tmp_path: Path) -> None:
    """Links may lead round in a circle; passing them over in silence would lose pictures."""
    touch(tmp_path, "a/x.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "picture.png").symlink_to(tmp_path / "a" / "x.png")
    source = ImageFolder(FolderSource(kind="folder", path=tmp_path))
    assert list(source.list_items()) == ["a/loop/", "a/x.png", "picture.png"]
    with pytest.raises(BadImageError, match="link to a folder"):
        source.load("a/loop/", max_bytes=MB)
    assert source.load("picture.png", max_bytes=MB).data == (tmp_path / "a" / "x.png").read_bytes()


def test_a_folder_that_cannot_be_searched_is_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes a bad picture of the run: counted, named, and within the limit no reason to stop."""
    touch(tmp_path, "open/x.png", "shut/y.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # tests run as root, whom no mode keeps out
    source = ImageFolder(FolderSource(kind="folder", path=tmp_path))
    assert list(source.list_items()) == ["open/x.png", "shut/"]
    with pytest.raises(BadImageError, match="cannot be searched"):
        source.load("shut/", max_bytes=MB)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    """A mistyped path is not an empty data set."""
    with pytest.raises(NotFoundError, match="no such directory"):
        folder_items(tmp_path / "absent")


def test_captions_from_beside_the_picture_or_from_its_path(tmp_path: Path) -> None:
    """The .txt wins, with or without a byte order mark; otherwise the path is read as words."""
    touch(tmp_path, "animals/red_cat-2.png", "b.png", "c.png")
    (tmp_path / "b.txt").write_text("a written caption\n", encoding="utf-8")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfmarked")
    source = ImageFolder(FolderSource(kind="folder", path=tmp_path))
    captions = {item: source.load(item, max_bytes=MB).caption for item in source.list_items()}
    assert captions == {"animals/red_cat-2.png": "animals red cat 2", "b.png": "a written caption", "c.png": "marked"}


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * 100_000])
def test_a_caption_that_cannot_be_used_makes_a_bad_picture(tmp_path: Path, content: bytes) -> None:
    """Falling back to the path would teach a wrong caption in silence."""
    touch(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadImageError, match=r"a\.txt"):
        ImageFolder(FolderSource(kind="folder", path=tmp_path)).load("a.png", max_bytes=MB)


def test_what_is_not_a_readable_file_gives_a_reason(tmp_path: Path) -> None:
    """Named pipes do not hang, large files are not read, and files that went away since are named."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.png").write_bytes(bytes(1000))
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    source = ImageFolder(FolderSource(kind="folder", path=tmp_path))
    assert set(source.list_items()) == {"pipe.png", "large.png", "dangling.png", "self.png"}
    reasons = {}
    for item in source.list_items():
        with pytest.raises(BadImageError) as caught:
            source.load(item, max_bytes=999)
        reasons[item] = str(caught.value)
    assert "regular file" in reasons["pipe.png"]
    assert "1000 bytes" in reasons["large.png"]
    assert "no longer there" in reasons["dangling.png"]
    assert "symbolic links" in reasons["self.png"]


def test_a_failing_file_system_is_not_a_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that went away must not make a data set without its pictures."""
    touch(tmp_path, "a.png")
    source = ImageFolder(FolderSource(kind="folder", path=tmp_path))

    def fail(*_: object) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OutsideError, match="Stale"):
        source.load("a.png", max_bytes=MB)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    names=st.sets(
        st.binary(min_size=1, max_size=30).filter(lambda name: b"/" not in name and b"\0" not in name), max_size=8
    )
)
def test_any_file_name_can_be_listed_loaded_and_named(
    tmp_path_factory: pytest.TempPathFactory, names: set[bytes]
) -> None:
    """Names with newlines, quotes or bytes that are no text: each picture is found by its item, and messages can show it."""
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        with open(os.fsencode(folder) + b"/x" + name + b".png", "wb") as file:  # noqa: PTH123 - a path of bytes
            file.write(name)
    source = ImageFolder(FolderSource(kind="folder", path=folder))
    items = list(source.list_items())
    assert len(items) == len(names)
    assert {source.load(item, max_bytes=MB).data for item in items} == names
    for item in items:
        source.name(item).encode("utf-8")
        caption_from_path(item).encode("utf-8")
        shard_key(0, source.slug(item))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five samples, of which number 3 has lost its picture."""
    directory = tmp_path / "shards"
    directory.mkdir()
    with new_shard(directory / shard_name(0)) as writer:
        for number in range(5):
            writer.add(shard_key(number, "x"), image=f"image {number}".encode(), extension="png", caption=f"c{number}")
    path = directory / shard_name(0)
    path.write_bytes(path.read_bytes().replace(b"00000003-x.png", b"00000003-x.xyz"))
    data = bytearray(path.read_bytes())
    header = data.index(b"00000003-x.xyz")
    data[header + 148 : header + 156] = b"        "
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    path.write_bytes(data)
    return directory


def test_existing_shards_give_their_samples_and_what_is_wrong(shards: Path) -> None:
    """Usable samples come by number with their bytes as stored; what the index left out comes last, as bad items."""
    source = ExistingShards(ShardsSource(kind="shards", path=shards))
    items = list(source.list_items())
    assert items == ["0", "1", "2", "3", "bad 0"]
    raw = source.load("3", max_bytes=MB)
    assert (raw.data, raw.caption) == (b"image 4", "c4")
    assert source.slug("3") == "00000004-x"
    assert source.name("bad 0") == "shard-000000.tar: 00000003-x"
    with pytest.raises(BadImageError, match="no image"):
        source.load("bad 0", max_bytes=MB)


def test_existing_shards_that_change_are_noticed(shards: Path) -> None:
    """A picture that is not what was indexed is bad, not silently another one."""
    ensure_index(shards)
    path = shards / shard_name(0)
    path.write_bytes(path.read_bytes().replace(b"image 1", b"image X"))
    source = ExistingShards(ShardsSource(kind="shards", path=shards))
    with pytest.raises(BadImageError, match="checksum"):
        source.load("1", max_bytes=MB)


def test_sources_travel_to_worker_processes(shards: Path, tmp_path: Path) -> None:
    """Each kind loads the same after being pickled, also when it has been used before."""
    touch(tmp_path / "folder", "a.png")
    for source, item in (
        (OpenMoji(OpenMojiSource()), "1F600"),
        (ImageFolder(FolderSource(kind="folder", path=tmp_path / "folder")), "a.png"),
        (ExistingShards(ShardsSource(kind="shards", path=shards)), "2"),
    ):
        before = source.load(item, max_bytes=MB)
        assert pickle.loads(pickle.dumps(source)).load(item, max_bytes=MB) == before
