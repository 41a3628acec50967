"""The benchmarks' machinery on tiny sizes, so that it cannot rot. Nothing here looks at a time."""

from __future__ import annotations

import importlib
import inspect
import json
import os
from pathlib import Path

import pytest

from cluster.errors import OutsideError
from jobs.records import count_samples, read_json_lines
from jobs.settings import Model
from tests.benchmarks.__main__ import ENTRIES, main
from tests.benchmarks.results import Result, compare, figure, row

REPOSITORY = Path(__file__).parent.parent
TINY = Model(channels=(16, 16), layers_per_block=1, attention=(False, False), attention_head_channels=16)


def test_every_entry_has_a_module_that_measures_without_being_told_anything() -> None:
    for entry in ENTRIES:
        measure = importlib.import_module(f"tests.benchmarks.{entry.name}").measure
        required = [
            parameter.name
            for parameter in inspect.signature(measure).parameters.values()
            if parameter.default is inspect.Parameter.empty
        ]
        assert not required, entry.name


def test_the_page_about_performance_names_every_entry_with_its_command() -> None:
    page = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8")
    for entry in ENTRIES:
        assert f"python -m tests.benchmarks {entry.name}" in page


def test_figures_are_those_of_the_round_with_the_median_ratio() -> None:
    """A neighbour that slows down one round slows both sides of it: medians of each side alone would mix rounds."""
    result = compare("x", [1.0, 10.0, 1.8], [2.0, 18.0, 3.0], other_is="other", unit="s")
    assert (result.ours, result.other) == (10.0, 18.0)
    assert result.ratio == pytest.approx(10 / 18)
    assert result.note == "3 rounds, ratios 0.50-0.60"
    assert result.rounds == ((1.0, 2.0), (10.0, 18.0), (1.8, 3.0))


def test_of_two_middle_rounds_the_worse_for_us_counts() -> None:
    assert compare("x", [1.0, 2.0], [2.0, 2.0], other_is="other", unit="s", note="n").ratio == 1.0


def test_row_leaves_out_what_was_not_measured() -> None:
    result = Result(name="x", ours=0.51234, other=None, other_is="", unit="s", ratio=None)
    assert row(result) == ("x", "0.512 s", "", "", "", "")
    assert [figure(value) for value in (0, 58, 0.0123, 1.875, 147.4)] == ["0", "58", "0.0123", "1.88", "147"]


def test_list_names_every_entry_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    for entry in ENTRIES:
        assert entry.name in printed
        assert f"{entry.about_s} s" in printed


def test_all_of_them_together_are_done_in_a_quarter_of_an_hour() -> None:
    """By what each says it takes."""
    assert sum(entry.about_s for entry in ENTRIES) <= 15 * 60


def test_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["hihg_wait"])
    assert "high_wait" in capsys.readouterr().err


def test_a_failed_entry_is_named_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code says so, and the JSON has both the failure and the results."""
    good = Result(name="good", ours=1, other=2, other_is="other", unit="s", ratio=0.5)

    def fail() -> list[Result]:
        raise OutsideError("no Slurm here")

    import tests.benchmarks.cluster_up
    import tests.benchmarks.step_cpu

    monkeypatch.setattr(tests.benchmarks.cluster_up, "measure", fail)
    monkeypatch.setattr(tests.benchmarks.step_cpu, "measure", lambda: [good])
    file = tmp_path / "report.json"
    table = tmp_path / "table.md"
    assert main(["cluster_up", "step_cpu", "--json", str(file), "--markdown", str(table)]) == 1
    report = json.loads(file.read_text())
    assert report["failed"] == ["cluster_up"]
    assert [result["name"] for result in report["results"]] == ["good"]
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert "| good | 1 s | 2 s | 0.50 | other |  |" in table.read_text()
    captured = capsys.readouterr()
    assert "no Slurm here" in captured.err
    assert "0.50" in captured.out


@pytest.mark.training
def test_step_cpu_measures_all_sides_in_a_process_of_its_own() -> None:
    """Muster's own loop and the plain one run next to each other, each for the steps it was asked for."""
    from tests.benchmarks.step_cpu import Size, measure

    size = Size("tiny", TINY, batch_size=2, rounds=2, steps=1)
    results = measure((size,), pictures=4, size_px=8)
    assert [result.name for result in results] == ["step_cpu: tiny", "step_cpu: tiny, channels-last"]
    assert all(result.ours > 0 and result.other and result.ratio for result in results)


@pytest.mark.training
def test_plain_loop_that_is_not_stopped_reads_every_epoch_exactly_once(tmp_path: Path) -> None:
    """What resume_exactness counts comes from the resume, not from how the plain loop was written."""
    from tests.benchmarks.comparison import Case, plain_command, running, wait_for_end
    from tests.benchmarks.pictures import make_pictures

    pictures = make_pictures(tmp_path, count=16, size_px=8)
    case = Case(pictures=pictures, model=TINY, batch_size=2, steps=16, checkpoint_every=4)
    log = tmp_path / "log"
    with running(plain_command(case.plain(tmp_path / "plain", record=True)), log=log) as process:
        wait_for_end(process, log=log, timeout_s=200)
    samples = tmp_path / "plain" / "samples-rank0.jsonl"
    whole = count_samples(read_json_lines(samples), keys=pictures.keys, batch_size=2)
    assert (whole.steps, whole.seen, whole.repeated, whole.missed) == (16, 32, 0, 0)
