"""YAML that people write: booleans are not invented, every mistake is reported with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError, SpecError
from cluster.settings import ClusterSpec, load_spec
from cluster.yamlfile import dump_yaml, parse_yaml, read_yaml, try_validate, validate

MINIMAL = "name: one\npools:\n  - name: gpu\n    nodes: 2\nqueues:\n  - name: low\n    pools: [gpu]\n"


@pytest.mark.parametrize("word", ["OFF", "off", "NO", "no", "On", "yes", "y", "48:00:00", "1_000", "0x1F", "0o17"])
def test_words_of_yaml_1_1_stay_words(word: str) -> None:
    """What PyYAML would turn into a boolean or a number by YAML 1.1 stays the text that was written."""
    assert parse_yaml(f"key: {word}", source="f").data == {"key": word}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("10", 10),
        ("010", 10),
        ("-3", -3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("~", None),
        ("null", None),
        ("", None),
        ("a: b", {"a": "b"}),
    ],
)
def test_core_schema_values(text: str, value: object) -> None:
    """The values that YAML 1.2 does define are read as such."""
    indented = "\n  " + text if ":" in text else text
    assert parse_yaml(f"key: {indented}", source="f").data == {"key": value}


@pytest.mark.parametrize(
    "value", ["OFF", "no", "48:00:00", "010", "1e3", "null", "~", "true", "0o17", "- a", "# no", "a: b", " x"]
)
def test_written_strings_are_strings_to_both_versions(value: str) -> None:
    """What dump_yaml writes is the same string to a YAML 1.1 reader (PyYAML, ParallelCluster) and to ours."""
    text = dump_yaml({"PreemptMode": value})
    assert yaml.safe_load(text) == {"PreemptMode": value}
    assert parse_yaml(text, source="f").data == {"PreemptMode": value}


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=10), max_size=4))
def test_dump_round_trips(value: dict[str, str]) -> None:
    """Any mapping of text is read back equal by YAML 1.1 readers."""
    assert yaml.safe_load(dump_yaml(value)) == value


def test_an_unknown_key_has_its_line_and_the_nearest_name() -> None:
    """A typo is refused with the line it stands in and the name that was probably meant."""
    _, findings = try_validate(ClusterSpec, parse_yaml(MINIMAL + "    teir: 3\n", source="c.yaml"))
    assert [(f.id, f.field, f.line, f.remedy) for f in findings] == [
        ("unknown-key", "queues[0].teir", 8, "did you mean tier?")
    ]


def test_a_key_like_nothing_lists_what_there_is() -> None:
    """A key without a near name is answered with all names of that place."""
    _, findings = try_validate(ClusterSpec, parse_yaml(MINIMAL + "storage:\n  zzz: 1\n", source="c.yaml"))
    assert "home" in findings[0].remedy
    assert "scratch" in findings[0].remedy


def test_every_mistake_is_reported_at_once() -> None:
    """Three mistakes in three places give three findings, and no echo of them."""
    text = "name: One!\npools:\n  - name: gpu\n    nodes: 0\nqueues:\n  - name: low\n    pools: [gpu]\n    grace: 30\n"
    with pytest.raises(SpecError) as caught:
        validate(ClusterSpec, parse_yaml(text, source="c.yaml"))
    message = str(caught.value)
    assert "3 mistakes" in message
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == ["line 1", "line 4", "line 8"]


def test_a_key_that_stands_twice_is_an_error() -> None:
    """YAML would silently keep the last of two equal keys; here both lines are named."""
    with pytest.raises(InputError, match=r"line 3: name stands twice, first in line 1"):
        parse_yaml("name: a\ntarget: local\nname: b\n", source="f")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: 'b", "\tb: 1", "a: b: c", "a: &x *y", "!!python/object:os.system x"])
def test_what_is_not_yaml_is_said_with_its_line(text: str) -> None:
    """Broken or unsafe YAML is one InputError that names the file and the line."""
    with pytest.raises(InputError, match=r"f: line 1: not valid YAML"):
        parse_yaml(text, source="f")


@pytest.mark.parametrize("text", ["", "- a\n", "just text"])
def test_a_file_that_is_no_mapping_is_a_finding(text: str) -> None:
    """An empty file, a list and a plain text are refused with one finding."""
    result, findings = try_validate(ClusterSpec, parse_yaml(text, source="f"))
    assert result is None
    assert [f.id for f in findings] == ["not-a-mapping"]


def test_unreadable_files(tmp_path: Path) -> None:
    """A missing file, a directory and a file that is not UTF-8 are InputErrors with the path."""
    (tmp_path / "latin").write_bytes(b"name: \xe9")
    for name, words in (("absent", "No such file"), (".", "directory"), ("latin", "not UTF-8")):
        with pytest.raises(InputError, match=words):
            read_yaml(tmp_path / name)


@given(st.text(max_size=60))
def test_any_text_is_a_document_or_an_input_error(text: str) -> None:
    """No text crashes the reader."""
    try:
        parse_yaml(text, source="f")
    except InputError:
        pass


def test_the_shipped_template_loads() -> None:
    """The local-demo template is a valid description with high above low over one pool."""
    spec = load_spec(Path(__file__).parents[2] / "templates" / "cluster" / "local-demo.yaml")
    assert spec.queue("high").tier > spec.queue("low").tier
    assert spec.queue("high").pools == spec.queue("low").pools
    assert spec.default_queue().name == "low"
