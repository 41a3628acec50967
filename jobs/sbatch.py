"""Which flags `muster sbatch` adds to what a user typed: pure, and by the rules that sbatch itself reads by.

sbatch takes an option from four places; the first of these that has it wins: the command line, the environment (`SBATCH_*`),
the `#SBATCH` lines of the script, Slurm's defaults. Muster only ever stands in for the defaults. The option table and the
rules for `#SBATCH` lines were taken from sbatch 22.05.8 (its man page, `-vvvv`, getopt's own lists of possibilities); a test
compares both with the sbatch that is installed. Options of later releases and of pyxis were added from their documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Arity = Literal["none", "required", "optional"]

_FLAGS = (
    "contiguous help hold ignore-pbs overcommit parsable quiet reboot requeue no-requeue spread-job test-only usage "
    "use-min-nodes verbose version wait "
    "stepmgr consolidate-segments spread-segments "  # 24.05 and later
    "container-mount-home no-container-mount-home container-remap-root no-container-remap-root container-entrypoint "
    "no-container-entrypoint container-writable container-readonly"  # pyxis
)
_WITH_OPTIONAL_VALUE = (
    "exclusive get-user-env nice no-kill oversubscribe propagate "
    "resv-ports oom-kill-step"  # 22.05's srun, sbatch in 24.05
)
_WITH_VALUE = (
    "account acctg-freq array batch bb bbf begin chdir cluster cluster-constraint clusters comment constraint container "
    "context core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution "
    "error exclude export export-file extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket "
    "gpus-per-task gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem "
    "mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu "
    "ntasks-per-node ntasks-per-socket ntasks-per-tres open-mode output partition power prefer priority profile qos "
    "reservation signal sockets-per-node switches tasks-per-node thread-spec threads-per-core time time-min tmp uid "
    "wait-all-nodes wckey wrap "
    "container-id extra segment tres-bind tres-per-task "  # 23.02 and later
    "container-image container-mounts container-workdir container-name container-save container-env"  # pyxis
)
OPTIONS: dict[str, Arity] = {
    **dict.fromkeys(_FLAGS.split(), "none"),
    **dict.fromkeys(_WITH_OPTIONAL_VALUE.split(), "optional"),
    **dict.fromkeys(_WITH_VALUE.split(), "required"),
}
"""Every long option, and whether it takes a value. An optional value only counts after `=`."""

SHORT_OPTIONS = {
    "A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint", "c": "cpus-per-task", "D": "chdir",
    "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "h": "help", "i": "input", "J": "job-name",
    "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution", "N": "nodes", "n": "ntasks", "O": "overcommit",
    "o": "output", "p": "partition", "Q": "quiet", "q": "qos", "S": "core-spec", "s": "oversubscribe", "t": "time",
    "V": "version", "v": "verbose", "W": "wait", "w": "nodelist", "x": "exclude",
}  # fmt: skip

_ENVIRONMENT = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_REQUEUE": "requeue",
    "SBATCH_NO_REQUEUE": "no-requeue",
    "SBATCH_OPEN_MODE": "open-mode",
}
_DIRECTIVES = ("#SBATCH", "#SLURM")  # sbatch still obeys #SLURM, with a complaint
_FOREIGN_DIRECTIVES = {"#PBS": {"q": "partition", "A": "account", "r": "requeue"}, "#BSUB": {"q": "partition"}}


@dataclass(frozen=True, kw_only=True)
class GivenOption:
    """An option that somebody gave, under its full name."""

    name: str
    value: str | None
    source: str
    """Where, in words: `on the command line`, `in line 3 of the script`, `in SBATCH_PARTITION`."""
    token: int | None = None
    """Index of the argument that ends in its value; None where it was not given on the command line."""
    prefix: str = ""
    """What stands before the value in that argument: `--exclude=`, `-Hx`; nothing where the value is one of its own."""


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What stands on an sbatch command line."""

    options: tuple[GivenOption, ...]
    script: str | None = None
    """The script's name as written; None where it comes from --wrap or from standard input."""
    is_heterogeneous: bool = False
    """Whether a lone `:` separates the components of a heterogeneous job."""
    unknown: tuple[str, ...] = ()
    """Options that this table does not have, without `=`: the next word may be their value, or the script."""

    @property
    def reads_standard_input(self) -> bool:
        """Whether sbatch will read the script from its standard input."""
        return self.script is None and all(option.name not in _NEEDS_NO_SCRIPT for option in self.options)


_NEEDS_NO_SCRIPT = {"wrap", "help", "usage", "version"}


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Read sbatch's arguments as its getopt does: options up to the first word that is none; the rest is the script's."""
    options: list[GivenOption] = []
    unknown: list[str] = []
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if word == "--":
            index += 1
            break
        if not word.startswith("-") or word == "-":
            break
        reader = _read_long if word.startswith("--") else _read_short
        index = reader(arguments, index, options, unknown)
    script = arguments[index] if index < len(arguments) else None
    if script == ":":
        return CommandLine(options=tuple(options), is_heterogeneous=True, unknown=tuple(unknown))
    return CommandLine(options=tuple(options), script=script, unknown=tuple(unknown))


def _read_long(arguments: Sequence[str], index: int, options: list[GivenOption], unknown: list[str]) -> int:
    """Take the long option at `index`; return the index behind it and its value."""
    written, equals, value = arguments[index][2:].partition("=")
    name = _full_name(written)
    if name is None:
        if not equals:
            unknown.append(f"--{written}")
        return index + 1
    source = "on the command line"
    if equals:
        options.append(GivenOption(name=name, value=value, source=source, token=index, prefix=f"--{written}="))
        return index + 1
    if OPTIONS[name] != "required":
        options.append(GivenOption(name=name, value=None, source=source))
        return index + 1
    if index + 1 < len(arguments):
        options.append(GivenOption(name=name, value=arguments[index + 1], source=source, token=index + 1))
    return index + 2


def _read_short(arguments: Sequence[str], index: int, options: list[GivenOption], unknown: list[str]) -> int:
    """Take the bundle of short options at `index`: `-Hp low`, `-plow`; return the index behind it and its value."""
    bundle = arguments[index]
    source = "on the command line"
    for position in range(1, len(bundle)):
        name = SHORT_OPTIONS.get(bundle[position])
        if name is None:
            unknown.append(f"-{bundle[position]}")
            continue
        rest = bundle[position + 1 :]
        if OPTIONS[name] == "none" or (OPTIONS[name] == "optional" and not rest):
            options.append(GivenOption(name=name, value=None, source=source))
            continue
        if rest:
            prefix = bundle[: position + 1]
            options.append(GivenOption(name=name, value=rest, source=source, token=index, prefix=prefix))
            return index + 1
        if index + 1 < len(arguments):
            options.append(GivenOption(name=name, value=arguments[index + 1], source=source, token=index + 1))
        return index + 2
    return index + 1


def _full_name(written: str) -> str | None:
    """Complete an abbreviated long option as getopt_long does: an exact name wins, else it must fit exactly one."""
    if written in OPTIONS:
        return written
    fitting = [name for name in OPTIONS if name.startswith(written)]
    return fitting[0] if len(fitting) == 1 else None


@dataclass(frozen=True, kw_only=True)
class ScriptOptions:
    """What the `#SBATCH` lines of a script ask for."""

    options: tuple[GivenOption, ...] = ()
    is_heterogeneous: bool = False


def read_script(text: str) -> ScriptOptions:
    """Read the directives of a batch script up to its first command, with sbatch's quotes, escapes and comments."""
    options: list[GivenOption] = []
    heterogeneous = False
    ignore_foreign = False
    for number, line in enumerate(text.splitlines(), start=1):
        directive = next((word for word in _DIRECTIVES if line.startswith(word)), None)
        if directive is not None:
            words = _split_directive(line[len(directive) :])
            heterogeneous = heterogeneous or "hetjob" in words or "packjob" in words
            found = read_command_line(words).options
            ignore_foreign = ignore_foreign or any(option.name == "ignore-pbs" for option in found)
            options += [_at_line(option, number) for option in found]
        elif line.startswith(tuple(_FOREIGN_DIRECTIVES)):
            options += [] if ignore_foreign else _read_foreign(line, number)
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return ScriptOptions(options=tuple(options), is_heterogeneous=heterogeneous)


def _at_line(option: GivenOption, number: int) -> GivenOption:
    return replace(option, source=f"in line {number} of the script", token=None, prefix="")


def _split_directive(text: str) -> list[str]:
    """Split the rest of a directive: either quote, backslash escapes everywhere, an unquoted # begins a comment."""
    words: list[str] = []
    word: list[str] = []
    quote = ""
    started = escaped = False
    for character in text:
        if escaped:
            word.append(character)
            escaped = False
        elif character == "\\":
            started = escaped = True
        elif quote:
            if character == quote:
                quote = ""
            else:
                word.append(character)
        elif character in "\"'":
            quote, started = character, True
        elif character == "#":
            break
        elif character.isspace():
            if started:
                words.append("".join(word))
            word, started = [], False
        else:
            word.append(character)
            started = True
    if started:
        words.append("".join(word))
    return words


def _read_foreign(line: str, number: int) -> list[GivenOption]:
    """Read the few options of `#PBS` and `#BSUB` lines that bear on what Muster adds."""
    directive = next(word for word in _FOREIGN_DIRECTIVES if line.startswith(word))
    words = _split_directive(line[len(directive) :])
    names = _FOREIGN_DIRECTIVES[directive]
    found = []
    for position, word in enumerate(words):
        if word.startswith("-") and word[1:2] in names:
            value = word[2:] or (words[position + 1] if position + 1 < len(words) else "")
            found.append(GivenOption(name=names[word[1]], value=value, source=f"in line {number} of the script"))
    return found


def read_environment(environment: Mapping[str, str]) -> tuple[GivenOption, ...]:
    """Return the options that `SBATCH_*` variables give."""
    return tuple(
        GivenOption(name=name, value=environment[variable], source=f"in {variable}")
        for variable, name in _ENVIRONMENT.items()
        if variable in environment
    )


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What Muster would fill in; None and () for what it has no opinion on."""

    partition: str | None = None
    account_of: Callable[[str | None], str | None] = lambda _partition: None
    """The account for a partition's name."""
    avoided_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One flag that Muster adds, and why."""

    flag: str
    why: str
    in_place: bool = False
    """Whether it is an option of the user's own that has become longer."""


@dataclass(frozen=True, kw_only=True)
class SbatchPlan:
    """The command line to run, and what is new in it."""

    arguments: tuple[str, ...]
    additions: tuple[Addition, ...] = ()
    notes: tuple[str, ...] = ()
    """What was left alone, and why."""


def plan_sbatch(
    arguments: Sequence[str],
    *,
    script: ScriptOptions,
    environment: Mapping[str, str],
    defaults: Defaults,
    expand: Callable[[str], Sequence[str]],
) -> SbatchPlan:
    """Decide what to add to an sbatch command line. The user's own arguments stay as they are, apart from a longer `--exclude`.

    Args:
        arguments: What the user typed behind `sbatch`.
        script: What the script's own directives ask for; empty for --wrap.
        environment: The environment that sbatch will see.
        defaults: What the cluster would have.
        expand: Turns a host list into names.
    """
    line = read_command_line(arguments)
    if line.is_heterogeneous or script.is_heterogeneous:
        note = "a heterogeneous job: nothing added, as each component has options of its own"
        return SbatchPlan(arguments=tuple(arguments), notes=(note,))
    if line.unknown:
        note = f"{', '.join(line.unknown)}: not known to this Muster, so where the script begins is not clear: nothing added"
        return SbatchPlan(arguments=tuple(arguments), notes=(note,))
    # The last of a kind wins within a place, the command line over the environment over the script.
    given = {option.name: option for option in (*script.options, *read_environment(environment), *line.options)}
    additions: list[Addition] = []
    notes: list[str] = []

    def add(name: str, flag: str, why: str, *, also: str | None = None) -> None:
        there = given.get(name) or (given.get(also) if also else None)
        if there is None:
            additions.append(Addition(flag=flag, why=why))
        else:
            value = f"={there.value}" if there.value is not None else ""
            notes.append(f"--{there.name}{value} stands {there.source}")

    add("requeue", "--requeue", "a preempted job, or one whose node fails, goes back to its queue", also="no-requeue")
    add("open-mode", "--open-mode=append", "a requeued job writes on below its earlier attempts")
    if defaults.partition is not None:
        add("partition", f"--partition={defaults.partition}", "the cluster's default queue")
    partition = given["partition"].value if "partition" in given else defaults.partition
    account = defaults.account_of(partition)
    if account is not None:
        add("account", f"--account={account}", "your project")
    words = _exclude(arguments, given, defaults.avoided_nodes, expand, additions)
    return SbatchPlan(
        arguments=(*(addition.flag for addition in additions if not addition.in_place), *words),
        additions=tuple(additions),
        notes=tuple(notes),
    )


def _exclude(
    arguments: Sequence[str],
    given: Mapping[str, GivenOption],
    avoided: Sequence[str],
    expand: Callable[[str], Sequence[str]],
    additions: list[Addition],
) -> list[str]:
    """Return the arguments with the avoided nodes in the user's own --exclude, or note a new one in `additions`.

    Nodes that the user asks for by name are not excluded: sbatch refuses a node that is both, and the user may have a reason.
    """
    wanted = set(expand(given["nodelist"].value or "")) if "nodelist" in given else set()
    own = given.get("exclude")
    already = set(expand(own.value or "")) if own is not None else set()
    new = [node for node in avoided if node not in wanted | already]
    words = list(arguments)
    if not new:
        return words
    value = ",".join([*([own.value] if own is not None and own.value else []), *new])
    why = f"bad or suspect nodes are avoided: {', '.join(new)}"
    if own is not None and own.token is not None:
        words[own.token] = f"{own.prefix}{value}"
        additions.append(Addition(flag=f"--exclude={value}", why=why, in_place=True))
    else:
        additions.append(Addition(flag=f"--exclude={value}", why=why))
    return words
