"""Adding flags to sbatch: only where nobody gave one, wherever sbatch would have found it."""

from __future__ import annotations

import os
import re
import shutil
import string
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.hostlist import expand
from jobs.sbatch import (
    OPTIONS,
    SHORT_OPTIONS,
    Defaults,
    SbatchPlan,
    ScriptOptions,
    plan_sbatch,
    read_command_line,
    read_script,
)

CLUSTER = Defaults(partition="low", account_of=lambda _partition: "research", avoided_nodes=())


def plan(
    arguments: Sequence[str],
    *,
    script: str = "",
    environment: Mapping[str, str] | None = None,
    avoided: Sequence[str] = (),
    defaults: Defaults | None = None,
) -> SbatchPlan:
    chosen = defaults or Defaults(partition="low", account_of=lambda _p: "research", avoided_nodes=tuple(avoided))
    return plan_sbatch(
        arguments, script=read_script(script), environment=environment or {}, defaults=chosen, expand=expand
    )


def added(result: SbatchPlan) -> list[str]:
    return [addition.flag for addition in result.additions]


def test_a_bare_script_gets_everything_before_its_name() -> None:
    """A script with no options gets requeue, append mode, queue and account; its own arguments stay behind it untouched."""
    result = plan(["train.sh", "--lr", "3", "-p", "x"])
    assert result.arguments == (
        "--requeue", "--open-mode=append", "--partition=low", "--account=research", "train.sh", "--lr", "3", "-p", "x",
    )  # fmt: skip


def test_script_arguments_are_never_taken_for_flags() -> None:
    """`--requeue` behind the script's name is the script's own, so ours is still added."""
    result = plan(["train.sh", "--requeue", "--open-mode=truncate", "--partition=high"])
    assert result.arguments[:4] == ("--requeue", "--open-mode=append", "--partition=low", "--account=research")


@pytest.mark.parametrize(
    "spelling",
    [
        ["-p", "x"], ["-px"], ["--partition=x"], ["--partition", "x"], ["--part=x"], ["--part", "x"], ["--partit", "x"],
        ["-Hpx"], ["-Hp", "x"], ["-HOpx"], ["-N2", "-px"], ["--nodes", "2", "-p", "x"], ["--exclusive", "-px"],
        ["--nice", "-px"],
        ["--nice=-5", "-px"], ["--comment", "-p", "-px"], ["-J", "--partition", "-px"], ["-k", "-px"],
    ],
)  # fmt: skip
def test_every_spelling_of_a_given_queue_is_seen(spelling: list[str]) -> None:
    """However getopt lets one write it, a queue given on the command line is left alone."""
    result = plan([*spelling, "train.sh"])
    assert "--partition=low" not in result.arguments
    assert result.arguments[-len(spelling) - 1 :] == (*spelling, "train.sh")


@pytest.mark.parametrize(
    "words",
    [
        ["-J", "-p", "s.sh"],
        ["--job-name", "-p", "s.sh"],
        ["--wrap", "srun -p high x"],
        ["-o-px", "s.sh"],
        ["-Jpx", "s.sh"],
    ],
)
def test_a_value_that_looks_like_a_flag_is_not_one(words: list[str]) -> None:
    """`-J -p` names the job `-p`: the queue is still ours to add."""
    assert "--partition=low" in plan(words).arguments


def test_no_requeue_is_respected() -> None:
    """Who says --no-requeue, in any place, gets no --requeue."""
    assert "--requeue" not in plan(["--no-requeue", "s.sh"]).arguments
    assert "--requeue" not in plan(["--no-req", "s.sh"]).arguments
    assert "--requeue" not in plan(["s.sh"], script="#SBATCH --no-requeue\n").arguments
    assert "--requeue" not in plan(["s.sh"], environment={"SBATCH_NO_REQUEUE": ""}).arguments


@pytest.mark.parametrize(
    ("line", "partition"),
    [
        ("#SBATCH --partition=x", "x"),
        ("#SBATCH -p x", "x"),
        ("#SBATCH -px", "x"),
        ("#SBATCH\t-N 2\t-p\tx", "x"),
        ("#SBATCH --job-name='a b' --partition=\"x\"", "x"),
        ("#SBATCH -J a\\ b -px", "x"),
        ("#SBATCH--partition=x", "x"),
        ("#SBATCH -px#y", "x"),
        ("#SLURM -px", "x"),
        ("#PBS -q x", "x"),
        ("#BSUB -q x", "x"),
        ("#SBATCH -J a # -p x", None),
        ("#SBATCH -J 'a -p x'", None),
        (" #SBATCH -p x", None),
        ("##SBATCH -p x", None),
        ("# SBATCH -p x", None),
        ("#sbatch -p x", None),
        ("echo hi\n#SBATCH -p x", None),
        ("\n   \n# comment\n#SBATCH -p x", "x"),
        ("#SBATCH -p x\n#SBATCH -p y", "y"),
    ],
)
def test_directives_are_read_as_sbatch_reads_them(line: str, partition: str | None) -> None:
    """Quotes, escapes, comments, tabs, several options a line; nothing behind the first command counts."""
    found = [option.value for option in read_script(f"#!/bin/bash\n{line}\n").options if option.name == "partition"]
    assert (found[-1] if found else None) == partition


def test_the_command_line_wins_over_the_script_for_what_is_said() -> None:
    """The account is chosen for the queue that really counts: the command line's, then the environment's, then the script's."""
    asked: list[str | None] = []

    def account_of(partition: str | None) -> str | None:
        asked.append(partition)
        return None

    defaults = Defaults(partition="low", account_of=account_of)
    script = "#SBATCH -p from-script\n"
    plan(["-p", "from-line", "s.sh"], script=script, environment={"SBATCH_PARTITION": "from-env"}, defaults=defaults)
    plan(["s.sh"], script=script, environment={"SBATCH_PARTITION": "from-env"}, defaults=defaults)
    plan(["s.sh"], script=script, defaults=defaults)
    plan(["s.sh"], defaults=defaults)
    assert asked == ["from-line", "from-env", "from-script", "low"]


def test_without_a_cluster_only_what_holds_everywhere_is_added() -> None:
    """Requeue and append mode need no description of the cluster."""
    assert added(plan(["s.sh"], defaults=Defaults())) == ["--requeue", "--open-mode=append"]


@pytest.mark.parametrize(
    ("given_words", "expected"),
    [
        (["s.sh"], ["--exclude=gpu-3,gpu-4", "s.sh"]),
        (["-x", "gpu-1", "s.sh"], ["-x", "gpu-1,gpu-3,gpu-4", "s.sh"]),
        (["-xgpu-1", "s.sh"], ["-xgpu-1,gpu-3,gpu-4", "s.sh"]),
        (["-Hxgpu-1", "s.sh"], ["-Hxgpu-1,gpu-3,gpu-4", "s.sh"]),
        (["--exclude=gpu-[1-3]", "s.sh"], ["--exclude=gpu-[1-3],gpu-4", "s.sh"]),
        (["--exclude", "gpu-[3-4]", "s.sh"], ["--exclude", "gpu-[3-4]", "s.sh"]),
        (["-w", "gpu-3", "s.sh"], ["--exclude=gpu-4", "-w", "gpu-3", "s.sh"]),
        (["s.sh", "-x", "gpu-1"], ["--exclude=gpu-3,gpu-4", "s.sh", "-x", "gpu-1"]),
    ],
)
def test_avoided_nodes_are_folded_into_the_users_own_exclusions(given_words: list[str], expected: list[str]) -> None:
    """sbatch takes only the last --exclude, so ours is put into the user's; nodes asked for by name stay."""
    result = plan(given_words, avoided=["gpu-3", "gpu-4"])
    assert [
        word for word in result.arguments if not word.startswith(("--req", "--open", "--part", "--acc"))
    ] == expected


def test_exclusions_of_the_script_are_kept_when_ours_go_on_the_command_line() -> None:
    """The command line overrules the script, so it must repeat the script's nodes."""
    assert "--exclude=gpu-1,gpu-3" in plan(["s.sh"], script="#SBATCH -x gpu-1\n", avoided=["gpu-3"]).arguments


def test_a_heterogeneous_job_is_passed_through() -> None:
    """Its components have options of their own; adding to the first alone would be wrong."""
    words = ["-N1", ":", "-N2", "s.sh"]
    assert plan(words).arguments == tuple(words)
    assert plan(["s.sh"], script="#SBATCH -N1\n#SBATCH hetjob\n#SBATCH -N2\n").arguments == ("s.sh",)


def test_behind_an_unknown_option_nothing_is_guessed() -> None:
    """`--brand-new low s.sh`: whether `low` is a value or the script cannot be known, so nothing is added; with = it can."""
    assert plan(["--brand-new", "low", "s.sh"]).arguments == ("--brand-new", "low", "s.sh")
    assert "--requeue" in plan(["--brand-new=low", "s.sh"]).arguments


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], True), (["-N2"], True), (["-p", "x"], True), (["s.sh"], False), (["--wrap", "x"], False), (["--wrap=x"], False),
     (["--help"], False), (["--version"], False), (["-V"], False), (["--usage"], False)],
)  # fmt: skip
def test_when_sbatch_reads_its_standard_input(words: list[str], expected: bool) -> None:
    """Without a script and without --wrap the script comes from standard input."""
    assert read_command_line(words).reads_standard_input is expected


@given(st.text(max_size=300))
def test_any_script_can_be_read(text: str) -> None:
    """No script makes the reader fail, whatever bytes are in it."""
    assert isinstance(read_script(text), ScriptOptions)


@given(st.lists(st.text(max_size=12), max_size=8))
def test_the_users_own_words_stay_in_order(words: list[str]) -> None:
    """Whatever is typed, it comes out again in the same order behind what was added."""
    result = plan(words)
    assert result.arguments[len(result.arguments) - len(words) :] == tuple(words)


# --- against the sbatch that is installed ------------------------------------------------------------------------------------

needs_sbatch = pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is not installed")


@pytest.fixture(scope="module")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of a cluster that nobody runs: enough for sbatch to read its arguments."""
    path = tmp_path_factory.mktemp("conf") / "slurm.conf"
    path.write_text(
        "ClusterName=nobody\nSlurmctldHost=localhost\nSlurmctldPort=1\nNodeName=n1\nPartitionName=x Nodes=n1\n"
    )
    return path


def real_sbatch(slurm_conf: Path, arguments: Sequence[str], cwd: Path) -> str:
    """Return what sbatch -vvvv says it understood, before it fails to reach anybody."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SBATCH_", "SLURM_"))}
    process = subprocess.Popen(
        ["sbatch", "-vvvv", *arguments],
        env={**environment, "SLURM_CONF": str(slurm_conf)},
        cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "end of defined options" in line or "slurm_connect" in line:
            break
    process.kill()
    process.stderr.close()
    process.wait()
    return "".join(said)


def understood(said: str) -> dict[str, str]:
    return dict(re.findall(r"^sbatch: (partition|account|job-name|comment) +: (.*)$", said, re.MULTILINE))


@needs_sbatch
def test_the_option_table_has_every_option_of_the_installed_sbatch(slurm_conf: Path, tmp_path: Path) -> None:
    """getopt lists what an abbreviation may mean: each of those is in the table, so no value is ever taken for the script."""
    missing: set[str] = set()
    for letter in string.ascii_lowercase:
        said = real_sbatch(slurm_conf, [f"--{letter}"], tmp_path)
        possible = re.findall(r"'--([a-z0-9-]+)'", said.partition("possibilities:")[2])
        missing |= {name for name in possible if name not in OPTIONS}
    assert not missing


@needs_sbatch
def test_arities_are_those_of_the_installed_sbatch(slurm_conf: Path, tmp_path: Path) -> None:
    """An option that needs a value says so when it stands last; one that takes none refuses `=x`."""
    newer = {"stepmgr", "consolidate-segments", "spread-segments", "resv-ports", "oom-kill-step", "container-id"}
    newer |= {"extra", "segment", "tres-bind", "tres-per-task"}
    wrong = []
    for name, arity in OPTIONS.items():
        if name in newer or (name.startswith(("container-", "no-container-"))):
            continue
        needs_value = "requires an argument" in real_sbatch(slurm_conf, [f"--{name}"], tmp_path)
        if needs_value != (arity == "required"):
            wrong.append(name)
    assert not wrong


@needs_sbatch
def test_short_options_are_those_of_the_installed_sbatch(slurm_conf: Path, tmp_path: Path) -> None:
    """Every letter means here what it means to sbatch: known or not, with a value or without."""
    for letter in string.ascii_letters:
        said = real_sbatch(slurm_conf, [f"-{letter}"], tmp_path)
        assert ("invalid option" in said) == (letter not in SHORT_OPTIONS), letter
        if letter in SHORT_OPTIONS:
            assert ("requires an argument" in said) == (OPTIONS[SHORT_OPTIONS[letter]] == "required"), letter


WORD = st.text(alphabet=string.ascii_letters + "-_ '\"\\#", max_size=8)
PIECE = st.one_of(
    st.sampled_from(
        [
            "-p x",
            "-py",
            "--partition=z",
            "--partition w",
            "--part=v",
            "-A a",
            "--account=b",
            "-J n",
            "-O",
            "#",
            "' '",
            '"a b"',
            "\\",
        ]
    ),
    WORD,
)
DIRECTIVE = st.lists(PIECE, max_size=4).map(lambda pieces: "#SBATCH " + " ".join(pieces))
LINE = st.one_of(DIRECTIVE, st.sampled_from(["", "# note", "  ", "echo hi", " # x", "#SBATCH"]))


@needs_sbatch
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, max_size=5))
def test_scripts_are_understood_as_sbatch_understands_them(lines: list[str], slurm_conf: Path, tmp_path: Path) -> None:
    """For scripts that sbatch accepts, partition, account and job name are what sbatch itself reads out of them."""
    text = "#!/bin/bash\n" + "\n".join(lines) + "\ntrue\n"
    (tmp_path / "s.sh").write_text(text)
    said = real_sbatch(slurm_conf, ["s.sh"], tmp_path)
    if "end of defined options" not in said:
        return  # sbatch refuses the script: what we make of it does not matter
    ours = {option.name: option.value for option in read_script(text).options}
    theirs = understood(said)
    for name in ("partition", "account"):
        assert ours.get(name) == theirs.get(name), text
