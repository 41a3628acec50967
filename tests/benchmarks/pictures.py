"""A small set of real pictures, as shards for Muster's trainer and as a folder of files for the plain loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SmallSet:
    """The same pictures twice."""

    shards: Path
    """Tar shards with their index."""
    folder: Path
    """One PNG file a picture, named by its key."""
    keys: tuple[str, ...]
    """Names of all pictures."""


def make_pictures(directory: Path, *, count: int, size_px: int = 32) -> SmallSet:
    """Render `count` emoji into shards and into a folder, under `directory`."""
    from jobs.data import ShardDataset
    from jobs.preprocess import main as preprocess

    shards, folder = directory / "shards", directory / "pictures"
    preprocess(
        {
            "output": str(shards),
            "source": {"kind": "openmoji", "limit": count},
            "image": {"size_px": size_px},
            "samples_per_shard": 64,
            "workers": 1,
        }
    )
    dataset = ShardDataset(shards, max_bad=0)
    folder.mkdir()
    keys = tuple(dataset.key(number) for number in range(len(dataset)))
    for number, key in enumerate(keys):
        image, _ = dataset.read_raw(number)
        (folder / f"{key}.png").write_bytes(image)
    return SmallSet(shards, folder, keys)
