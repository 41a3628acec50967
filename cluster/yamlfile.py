"""YAML files that people write: read with the line of every value, checked against a pydantic model, every mistake reported.

Files are read by YAML 1.2, where only `true` and `false` are booleans. PyYAML's own rules (YAML 1.1) turn an
unquoted `OFF`, `NO` or `ON` into a boolean, which is how `PreemptMode: OFF` becomes `PreemptMode=False` in a slurm.conf, and
`48:00:00` into the number 172800. `dump_yaml` writes for readers of either version: what one of them could mistake is quoted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.errors import InputError, SpecError
from cluster.findings import Finding, Level

KeyPath = tuple[str | int, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)


@dataclass(frozen=True)
class YamlDocument:
    """A parsed file and the line of each of its values."""

    data: Any
    lines: Mapping[KeyPath, int]
    source: str

    def line_of(self, path: KeyPath) -> int | None:
        """Return the line of the value at `path`, or of the nearest thing around it that is in the file."""
        while path not in self.lines:
            if not path:
                return None
            path = path[:-1]
        return self.lines[path]


class _Loader(yaml.SafeLoader):
    """SafeLoader by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as in the base class


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node), 10)  # 010 is ten in YAML 1.2, not eight


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan")
    return float(text)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the strings which YAML 1.2 would read as something else."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    string = "tag:yaml.org,2002:str"
    resolvers = _Loader.yaml_implicit_resolvers.get(text[:1], [])
    style = "'" if any(pattern.match(text) for _, pattern in resolvers) else None
    if set(text) & set("\x85\u2028\u2029"):  # line breaks to YAML: PyYAML escapes them only between double quotes
        style = '"'
    return dumper.represent_scalar(string, text, style=style)


_Dumper.add_representer(str, _represent_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_yaml(path: Path) -> YamlDocument:
    """Read the YAML file at `path`.

    Raises:
        InputError: It cannot be read, is not UTF-8, or is not YAML; the message has the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> YamlDocument:
    """Parse one YAML document. A key that stands twice in a mapping is an error: YAML would silently take the last.

    Raises:
        InputError: It is not YAML, or a key stands twice.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if root is not None:
            _index(root, (), lines, source)
        data = None if root is None else loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        raise InputError(f"{source}: {line}not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return YamlDocument(data, lines, source)


def validate(model: type[ModelT], document: YamlDocument, *, error_type: type[InputError] = SpecError) -> ModelT:
    """Make a `model` of the document.

    Raises:
        InputError: `error_type`, listing every finding with its line.
    """
    result, findings = try_validate(model, document)
    if result is None:
        raise error_type(
            "\n".join(
                [
                    f"{document.source}: {len(findings)} mistake{'s' * (len(findings) > 1)}",
                    *(f"  {f}" for f in findings),
                ]
            )
        )
    return result


def try_validate(model: type[ModelT], document: YamlDocument) -> tuple[ModelT | None, list[Finding]]:
    """Make a `model` of the document, or say everything that is wrong with it."""
    if not isinstance(document.data, Mapping):
        got = "nothing" if document.data is None else type(document.data).__name__
        finding = Finding(
            id="not-a-mapping", level=Level.ERROR, field="(file)", value=got, line=1, source=document.source,
            rule="the file must be a mapping of keys to values", remedy="start with `name: ...`",
        )  # fmt: skip
        return None, [finding]
    try:
        return model.model_validate(document.data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, [_finding(model, document, detail) for detail in details if not _is_echo(detail, details)]


def dump_yaml(value: object) -> str:
    """Write `value` as YAML. Strings that YAML 1.1 or 1.2 would read as something else are quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def field_name(path: KeyPath) -> str:
    """Write a path as people do: `queues[1].grace`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text or "(file)"


def _index(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in seen:
                raise InputError(
                    f"{source}: line {line}: {field_name((*path, key))} stands twice, first in line {seen[key]}; remove one"
                )
            seen[key] = line
            lines[(*path, key)] = line
            _index(value_node, (*path, key), lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _index(item, (*path, number), lines, source)


def _is_echo(detail: Any, details: Sequence[Any]) -> bool:
    """Whether pydantic calls a list too short only because the items in it were wrong."""
    path = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(path) and other["loc"][: len(path)] == path for other in details
    )


def _finding(model: type[BaseModel], document: YamlDocument, detail: Any) -> Finding:
    path: KeyPath = tuple(detail["loc"])
    kind: str = detail["type"]
    rule = str(detail["msg"]).removeprefix("Value error, ")
    remedy = "correct the value"
    given = detail.get("input")
    value = "" if isinstance(given, Mapping | BaseModel) else _shown(given)  # a whole section tells nobody anything
    if kind == "extra_forbidden":
        names = _fields_at(model, path[:-1])
        close = difflib.get_close_matches(str(path[-1]), names, n=3, cutoff=0.6)
        rule = "no such key here"
        remedy = f"did you mean {' or '.join(close)}?" if close else f"the keys here are: {', '.join(names)}"
        value = ""
    elif kind == "missing":
        rule, remedy, value = "is required", "add it", ""
    elif "; " in rule:
        rule, _, remedy = rule.rpartition("; ")
    return Finding(
        id={"extra_forbidden": "unknown-key", "missing": "missing-key"}.get(kind, "bad-value"),
        level=Level.ERROR,
        field=field_name(path),
        value=value,
        rule=rule,
        remedy=remedy,
        line=document.line_of(path),
        source=document.source,
    )


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return the field names of the model that stands at `path` inside `model`."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is None or isinstance(part, int):
            continue
        info = current.model_fields.get(part)
        current = None if info is None else _model_in(info.annotation)
    return [] if current is None else list(current.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return cast("type[BaseModel] | None", None)
