"""The front door: quick, honest about errors, plain in pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster.errors import MusterError, NotFoundError, SlurmError

HEAVY = ("torch", "boto3", "botocore", "diffusers", "accelerate", "submitit", "numpy", "matplotlib", "pynvml")


def muster(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, as a person would."""
    return subprocess.run(
        [sys.executable, "-c", "from cluster.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in cli.VERBS if verb != "sbatch")])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """`muster --help`, and every verb's own help, loads no torch, boto3, numpy or the like."""
    code = (
        "import sys; from cluster.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules], status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.splitlines()[-1] == "LOADED [] 0", result.stdout + result.stderr


def test_version_is_printed() -> None:
    """`muster --version` needs no verb."""
    result = muster("--version")
    assert (result.returncode, result.stdout.split()[0]) == (0, "muster")


def test_a_users_own_jobs_package_on_pythonpath_does_not_shadow_ours(tmp_path: Path) -> None:
    """With PYTHONPATH leading to a folder that has a `jobs` package, `muster jobs` is still Muster's."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise SystemExit('the wrong jobs')")
    ours = str(Path(__file__).parents[2])
    result = muster("jobs", "--help", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ours}"})
    assert result.returncode == 0, result.stderr


def test_a_full_disk_is_not_called_a_fault_in_muster() -> None:
    """Output that does not fit anywhere ends with the system's own words and the exit code for what is outside."""
    with Path("/dev/full").open("w") as full:
        code = "from cluster.cli import main; main(['cluster', 'check', '--json', '/dev/null'])"
        result = subprocess.run(
            [sys.executable, "-u", "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert result.returncode == 5
    assert "No space left on device" in result.stderr
    assert "fault in Muster" not in result.stderr


def test_v_holds_from_the_first_import(tmp_path: Path) -> None:
    """A fault while a verb is imported has its traceback with -v."""
    code = (
        "import sys; from cluster import cli\n"
        "cli.VERBS['jobs'] = cli.Verb('cluster.no_such_module', 'x', 'x')\n"
        "cli.main(sys.argv[1:])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "-v", "jobs", "list"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "Traceback" in result.stderr


def test_help_lists_every_verb() -> None:
    """Every registered verb stands in `muster --help`."""
    text = muster("--help").stdout
    assert all(f" {verb} " in text for verb in cli.VERBS)


def test_every_verb_can_be_loaded() -> None:
    """Each verb's module exists and has the attribute that the front door registers."""
    for name in cli.VERBS:
        assert cli.build_app(name) is not None


def test_an_unknown_verb_is_a_usage_error() -> None:
    """A typo ends with exit code 2 and one message."""
    result = muster("sumbit")
    assert result.returncode == 2
    assert "sumbit" in result.stderr


def test_errors_of_our_tree_are_one_message_and_their_exit_code(tmp_path: Path) -> None:
    """A missing file ends with 3 and its path; no traceback."""
    result = muster("cluster", "check", "absent.yaml", cwd=tmp_path)
    assert result.returncode == 3
    assert result.stderr.startswith("error: absent.yaml: cannot be read")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("x"), 7),
        (SlurmError("x", argv=["a"], returncode=1), 5),
        (MusterError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    """Each kind of error ends the process with the code of the table."""

    def fail(_: object) -> object:
        raise error

    monkeypatch.setattr(cli, "build_app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["x"])
    assert caught.value.code == code


def test_an_unexpected_error_has_a_traceback_only_with_v(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault in Muster is one message, and the traceback when asked for."""

    def fail(_: object) -> object:
        raise ZeroDivisionError("seven by zero")

    monkeypatch.setattr(cli, "build_app", fail)
    with pytest.raises(SystemExit):
        cli.main(["x"])
    quiet = capsys.readouterr().err
    assert "seven by zero" in quiet
    assert "Traceback" not in quiet
    monkeypatch.setattr(cli, "set_up_logging", lambda _: cli.logging.getLogger().setLevel("INFO"))
    with pytest.raises(SystemExit):
        cli.main(["x"])
    assert "Traceback" in capsys.readouterr().err


def test_output_in_a_pipe_has_no_escapes(tmp_path: Path) -> None:
    """Piped output is plain text, also where the environment asks for a colourful terminal."""
    (tmp_path / "c.yaml").write_text("name: Bad!\n")
    result = muster("cluster", "check", "c.yaml", env={"TERM": "xterm-256color"}, cwd=tmp_path)
    assert result.returncode == 4
    assert "\x1b" not in result.stdout + result.stderr


def test_a_reader_that_leaves_early_is_not_an_error() -> None:
    """`muster cluster init | head -1` prints no traceback."""
    code = "from cluster.cli import main; main(['cluster', 'init'])"
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert first.stdout is not None
    first.stdout.close()
    _, errors = first.communicate(timeout=60)
    assert "Traceback" not in errors


def test_completion_knows_the_verbs() -> None:
    """Shell completion offers the verbs, and the sub-verbs of the one on the line."""
    top = muster(env={"_MUSTER_COMPLETE": "complete_bash", "COMP_WORDS": "muster ", "COMP_CWORD": "1"})
    assert "submit" in top.stdout.split()
    sub = muster(env={"_MUSTER_COMPLETE": "complete_bash", "COMP_WORDS": "muster cluster ", "COMP_CWORD": "2"})
    assert "check" in sub.stdout.split()
