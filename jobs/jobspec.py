"""JobSpec: what `muster submit` submits, read from a file or made in Python, with every mistake reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cluster.durations import Duration, format_duration
from cluster.errors import InputError, JobError
from cluster.yamlfile import KeyPath, YamlDocument, field_name, parse_yaml, read_yaml, try_validate
from jobs.sbatch import OPTIONS

TRAINING = "jobs.train"
"""The entry point that trains; its `config` is a `jobs.settings.TrainConfig`."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*)?")
_DEPENDENCY = re.compile(
    r"singleton|(?:after|afterany|afterburstbuffer|aftercorr|afternotok|afterok)(?::\d+(?:_(?:\d+|\*))?(?:\+\d+)?)+"
)
_LOOKS_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL", re.IGNORECASE)

_SET_BY_US = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONSAFEPATH", "RANK", "WORLD_SIZE")
_SET_BY_SLURM = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_RESERVED_PREFIXES = {
    "SLURM_": "Slurm",
    "SBATCH_": "sbatch",
    "SUBMITIT_": "submitit",
    "MUSTER_": "Muster",
    "TORCHELASTIC_": "torchrun",
}
_SLURM_OPTIONS_WITH_A_FIELD = {
    "account": "project",
    "array": "array",
    "cpus-per-task": "cpus_per_task",
    "dependency": "dependency",
    "exclude": "exclude",
    "gpus": "nodes and gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node and tasks_per_node",
    "gres": "gpus_per_node",
    "job-name": "name",
    "mem": "memory_gb",
    "nodes": "nodes",
    "ntasks": "nodes and tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "partition": "queue",
    "signal": "warning",
    "time": "time",
}
_SLURM_OPTIONS_OF_OURS = ("chdir", "error", "export", "open-mode", "output", "requeue", "no-requeue", "wrap")


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("names are 1 to 100 letters, digits and . _ + -, starting with a letter or digit; rename it")
    return value


def _check_entry_point(value: str) -> str:
    if not _ENTRY_POINT.fullmatch(value):
        raise ValueError(
            "an entry point is module or module:function; write it like jobs.train or mypackage.mymodule:run"
        )
    return value


def _check_dependency(value: str) -> str:
    separator = "?" if "?" in value else ","
    wrong = [part for part in value.split(separator) if not _DEPENDENCY.fullmatch(part)]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is no dependency of Slurm's; write it like afterok:1234 or afterany:12:13,singleton"
        )
    return value


def _as_list_of_hosts(value: object) -> object:
    if isinstance(value, str):
        return [value] if value else []
    return value


def _refuse_bare_string(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(
            "must be a list, as no shell reads it; write [python, script.py] or [bash, -c, 'a line of shell']"
        )
    if isinstance(value, list | tuple):
        return [item if isinstance(item, str) else _word(item) for item in value]
    return value


def _word(value: object) -> object:
    """Write a YAML scalar as a program's argument: 3 -> "3", true -> "true". Anything else is left for pydantic to refuse."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


def _words(value: object) -> object:
    return {key: _word(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _as_array(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"tasks": value}
    if isinstance(value, list | tuple):
        return {"each": value}
    return value


def _check_environment(values: dict[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable; letters, digits and _ only")
        owner = _owner_of_variable(name)
        if owner:
            raise ValueError(f"{name} is set by {owner} for each task; leave it out")
        if _LOOKS_SECRET.search(name):
            raise ValueError(
                f"{name} looks like a secret, and this file and the batch script are kept and readable; "
                f"export {name} in the shell that submits: jobs inherit its environment"
            )
        if "\0" in value or "\n" in value:
            raise ValueError(f"the value of {name} holds a line break; put it into a file and name that")
    return values


def _check_slurm_options(values: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
    for name in values:
        option = name.replace("_", "-")
        if option in _SLURM_OPTIONS_WITH_A_FIELD:
            raise ValueError(
                f"{name} has a field of its own here; write {_SLURM_OPTIONS_WITH_A_FIELD[option]} beside name"
            )
        if option in _SLURM_OPTIONS_OF_OURS:
            raise ValueError(f"{name} is what makes a job survive preemption, so Muster sets it; leave it out")
        if option not in OPTIONS:
            close = difflib.get_close_matches(option, OPTIONS, n=3, cutoff=0.6)
            raise ValueError(
                f"{name} is no long option of sbatch; {f'did you mean {close[0]}?' if close else 'see man sbatch'}"
            )
    return values


Arguments = Annotated[tuple[str, ...], BeforeValidator(_refuse_bare_string)]


class Section(BaseModel):
    """Base of every part of a job description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class Array(Section):
    """Many tasks of one kind. In a file, a number stands for `tasks`, a list for `each`."""

    tasks: int | None = Field(default=None, ge=1, le=100_000)
    """How many. `{index}` in `command` and `arguments` becomes 0, 1, ...; so does the variable MUSTER_ARRAY_INDEX."""
    each: tuple[dict[str, Any], ...] = ()
    """What differs from one to the next, as `--set` writes it: `[{config.seed: 1}, {config.seed: 2}]`."""
    at_once: int | None = Field(default=None, ge=1)
    """Most tasks that run at one time; as many as fit by default."""

    @model_validator(mode="after")
    def _says_how_many(self) -> Array:
        if (self.tasks is None) == (not self.each):
            raise ValueError(
                "needs either tasks or each; write array: 8 for eight alike, or array: [{config.seed: 1}, ...]"
            )
        return self

    @property
    def count(self) -> int:
        """How many tasks."""
        return self.tasks if self.tasks is not None else len(self.each)


class Container(Section):
    """The image that tasks run in, through the pyxis plugin. Muster must be installed in it."""

    image: str = Field(min_length=1)
    """A squashfs file, or an image as enroot writes it: `registry#organisation/name:tag`."""
    mounts: tuple[str, ...] = ()
    """`outside:inside[:flags]`, or one path for both. The run directory is always mounted."""
    python: str = "python3"
    """The interpreter inside the image that has Muster."""


class JobSpec(Section):
    """A job: how much of the cluster it needs, and what it runs there."""

    name: Annotated[str, AfterValidator(_check_name)]
    """Shown by squeue; also the name of the run directory."""
    queue: str | None = None
    """The cluster's default queue, unless you say."""
    project: str | None = None
    """Slurm account; your only project on this cluster, or else Slurm's default for you."""
    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int | None = Field(default=None, ge=0)
    """1 for an entry point, 0 for a command, unless you say."""
    tasks_per_node: int | None = Field(default=None, ge=1)
    """One for each GPU, and one where there are none, unless you say."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """The node's CPUs in proportion to the job's share of its GPUs, unless you say."""
    memory_gb: float | None = Field(default=None, gt=0)
    """GiB on each node; in proportion like the CPUs, unless you say."""
    time: Duration | None = None
    """Longest run of one attempt; the queue's default, unless you say. A trainer saves and is requeued when it nears it."""
    warning: Duration | None = None
    """How long before the end of `time` the trainer is told (USR2). 2 minutes, or a fifth of a shorter `time`; commands are
    not told unless you say, as USR2 ends a program that does not expect it."""
    entry: Annotated[str, AfterValidator(_check_entry_point)] | None = None
    """A function of Python, `module:function`, called with `config`; `jobs.train` trains. Either this or `command`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """What the entry point is called with. In a file it may be the name of another YAML file, seen from this one."""
    command: Arguments = ()
    """A program and its arguments, run once for each task. No shell reads it."""
    arguments: Arguments = ()
    """Put behind `command`: handy with --set."""
    environment: Annotated[dict[str, str], BeforeValidator(_words), AfterValidator(_check_environment)] = Field(
        default_factory=dict
    )
    """Variables to set for the job, beside those of the shell that submits it."""
    array: Annotated[Array | None, BeforeValidator(_as_array)] = None
    dependency: Annotated[str, AfterValidator(_check_dependency)] | None = None
    """As sbatch takes it: `afterok:1234`."""
    container: Container | None = None
    exclude: Annotated[tuple[str, ...], BeforeValidator(_as_list_of_hosts)] = ()
    """Nodes to stay away from, as names or host lists: `[gpu-3, "gpu-[7-9]"]`."""
    retries: int | None = Field(default=None, ge=0, le=1000)
    """How often a failed attempt is followed by another one without progress in between: 3 for training, 0 for anything else,
    unless you say. Preemption does not count."""
    run_directory: Path | None = None
    """Where everything of this run is kept; `runs/NAME` on the shared file system, unless you say."""
    slurm: Annotated[dict[str, str | int | bool], AfterValidator(_check_slurm_options)] = Field(default_factory=dict)
    """Other options of sbatch by their long names: `{constraint: ib, reservation: maintenance}`."""

    @model_validator(mode="after")
    def _runs_one_thing(self) -> JobSpec:
        if self.entry is not None and self.command:
            raise ValueError("has both entry and command, and a job runs one thing; leave one of them out")
        if self.entry is None and not self.command:
            raise ValueError("needs either entry or command; write entry: jobs.train, or command: [python, script.py]")
        if self.arguments and not self.command:
            raise ValueError("arguments go behind command, and there is none; put an entry point's values into config")
        if self.config and self.entry is None:
            raise ValueError("config goes to an entry point, and there is none; pass a command its values in arguments")
        return self

    @model_validator(mode="after")
    def _times_fit(self) -> JobSpec:
        if self.time is not None and self.time < timedelta(minutes=1):
            raise ValueError(f"time is {format_duration(self.time)}, but Slurm counts in minutes; write 1m or more")
        if self.time is not None and self.warning is not None and self.warning >= self.time:
            raise ValueError(
                f"warning ({format_duration(self.warning)}) must be shorter than time ({format_duration(self.time)}); "
                "shorten it"
            )
        return self

    @property
    def kind(self) -> Literal["training", "entry", "command"]:
        """What it runs."""
        if self.entry is None:
            return "command"
        return "training" if self.entry.partition(":")[0] == TRAINING else "entry"

    @property
    def gpus(self) -> int:
        """GPUs on each node, with the default filled in."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        return 0 if self.entry is None else 1

    @property
    def tasks(self) -> int:
        """Tasks on each node, with the default filled in."""
        return self.tasks_per_node if self.tasks_per_node is not None else max(1, self.gpus)

    @property
    def allowed_retries(self) -> int:
        """How often a failure is followed by another attempt, with the default filled in."""
        if self.retries is not None:
            return self.retries
        return int(self.config.get("retries", 3)) if self.kind == "training" else 0

    def task(self, index: int) -> JobSpec:
        """Return the job that element `index` of the array is."""
        assert self.array is not None
        raw = self.model_dump(mode="python", exclude={"array"}, exclude_unset=True)
        for key, value in (self.array.each[index] if self.array.each else {}).items():
            set_value(raw, key, value)
        for field in ("command", "arguments"):
            if raw.get(field):
                raw[field] = [word.replace("{index}", str(index)) for word in raw[field]]
        return _validated(YamlDocument(raw, {}, f"array.each[{index}] of {self.name}"))


def read_job(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job description and change it by `overrides`.

    Args:
        path: The YAML file.
        overrides: `key=value` each, as `--set` takes them: the key dotted, the value YAML.

    Raises:
        JobError: It is wrong; the message lists every mistake with its line.
        InputError: It cannot be read or is not YAML.
    """
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        return _validated(document)
    data: dict[str, Any] = document.data
    lines = dict(document.lines)
    if isinstance(data.get("config"), str):
        included = path.parent / Path(data["config"]).expanduser()
        inner = read_yaml(included)
        if not isinstance(inner.data, dict):
            raise JobError(f"{path}: config: {included} holds no mapping; write `key: value` lines into it")
        data["config"] = inner.data
        lines = {key: line for key, line in lines.items() if key[:1] != ("config",) or len(key) == 1}
    changed = [_apply(data, override) for override in overrides]
    return _validated(YamlDocument(data, lines, str(path)), changed)


def make_job(values: Mapping[str, Any], *, source: str = "the job") -> JobSpec:
    """Make a JobSpec of plain values, with the messages that `read_job` gives.

    Raises:
        JobError: A value is wrong; the message lists every mistake.
    """
    return _validated(YamlDocument(dict(values), {}, source))


def _validated(document: YamlDocument, overridden: Sequence[KeyPath] = ()) -> JobSpec:
    """Make the JobSpec, or raise with every mistake.

    Rules over several fields show no value, and the environment never does. A value from --set has no line in the file.
    """
    spec, findings = try_validate(JobSpec, document)
    if spec is not None:
        return spec
    lines = [f"{document.source}: {len(findings)} mistake{'s' * (len(findings) > 1)}"]
    for finding in findings:
        shown = finding
        if finding.field == "(file)" and finding.id != "not-a-mapping":
            shown = replace(finding, field="the job", value="")
        elif finding.field.startswith(("environment", "slurm")):
            shown = replace(finding, value="")
        if any(_is_within(finding.field, field_name(path)) for path in overridden):
            shown = replace(shown, line=None, field=f"--set {shown.field}")
        lines.append(f"  {shown}")
    raise JobError("\n".join(lines))


def _is_within(field: str, outer: str) -> bool:
    return field == outer or field.startswith((f"{outer}.", f"{outer}["))


def _apply(data: dict[str, Any], override: str) -> KeyPath:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {override}: is not key=value; write it like --set config.steps=500")
    try:
        value = parse_yaml(text, source=f"--set {override}").data
    except InputError as error:
        raise JobError(f"--set {override}: the value is not YAML; quote it like --set '{key}=\"...\"'") from error
    return set_value(data, key.strip(), value)


def set_value(data: dict[str, Any], key: str, value: object) -> KeyPath:
    """Set the value at a dotted key, making mappings on the way; a number counts in a list, from 0.

    Returns:
        The path that was set.

    Raises:
        JobError: The key leads through something that is neither a mapping nor a list, or past the end of a list.
    """
    parts = key.split(".")
    current: Any = data
    path: list[str | int] = []
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(current, list):
            if not part.isdecimal() or int(part) >= len(current):
                raise JobError(
                    f"--set {key}: {'.'.join(parts[:position])} is a list of {len(current)}; "
                    f"write a number from 0 to {len(current) - 1} for {part!r}, or set the whole list with [a, b]"
                )
            path.append(int(part))
            if last:
                current[int(part)] = value
            current = current[int(part)]
            continue
        if not isinstance(current, dict):
            raise JobError(
                f"--set {key}: {'.'.join(parts[:position])} is {current!r}, which has no {part!r} in it; set it as a whole"
            )
        path.append(part)
        if last:
            current[part] = value
        elif current.get(part) is None:
            current[part] = {}
        current = current[part]
    return tuple(path)


def _owner_of_variable(name: str) -> str | None:
    """Return who sets the variable for each task, or None where a job may."""
    if name in _SET_BY_US:
        return "Muster"
    if name in _SET_BY_SLURM:
        return "Slurm"
    return next((owner for prefix, owner in _RESERVED_PREFIXES.items() if name.startswith(prefix)), None)
