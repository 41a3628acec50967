from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as test_settings
from hypothesis import strategies as st

from cluster.errors import JobError
from jobs.schedule import learning_rate
from jobs.settings import MAY_CHANGE, TrainConfig, changed_keys, dump_config, flatten, load_config, may_change

MINIMAL = "run_directory: runs/a\ndata: {directory: shards}\n"


def make(**values: Any) -> TrainConfig:
    return TrainConfig.model_validate({"run_directory": "runs/a", "data": {"directory": "shards"}, **values})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_two_keys_are_enough(tmp_path: Path) -> None:
    """Everything but the run's place and its data has a default."""
    config = load_config(write(tmp_path, MINIMAL))
    assert config.run_directory == Path("runs/a")
    assert config.model.attention_levels() == (False, False, True)


def test_a_saved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    """What `config.yaml` of a run holds is the configuration, whole."""
    config = make(model={"channels": [32, 64], "attention": [True, False]}, objective={"min_snr_gamma": None})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_a_job_description_holds_one_under_config(tmp_path: Path) -> None:
    """The same file serves `muster submit` and `python -m jobs.train`; lines in messages are those of the file."""
    good = write(
        tmp_path, "name: a\nentry: jobs.train\nconfig:\n  run_directory: r\n  data: {directory: d}\n  steps: 7\n"
    )
    assert load_config(good).steps == 7
    bad = write(
        tmp_path, "name: a\nentry: jobs.train\nconfig:\n  run_directory: r\n  data: {directory: d}\n  step: 7\n"
    )
    with pytest.raises(JobError, match=r"line 6: step: no such key here; did you mean steps"):
        load_config(bad)


def test_every_mistake_is_listed(tmp_path: Path) -> None:
    """One reading names all of them."""
    with pytest.raises(JobError, match="3 mistakes") as raised:
        load_config(write(tmp_path, MINIMAL + "steps: 0\nprecision: fp8\noptimiser: {}\n"))
    assert all(word in str(raised.value) for word in ("steps", "precision", "did you mean optimizer"))


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    """Values are read as YAML, and sections are made where the file has none."""
    path = write(tmp_path, MINIMAL + "steps: 5\n")
    config = load_config(
        path, ["steps=9", "optimizer.learning_rate=1e-4", "model.channels=[32, 64]", "data.directory=/x y"]
    )
    assert (config.steps, config.optimizer.learning_rate, config.model.channels) == (9, 1e-4, (32, 64))
    assert config.data.directory == Path("/x y")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=3", "expected key=value"),
        ("steps.inner=3", "steps is a value, not a section"),
        ("optimizer.lr=1", "no such key here"),
    ],
)
def test_wrong_overrides_are_explained(tmp_path: Path, override: str, message: str) -> None:
    """The message has the override and what is wrong with it."""
    with pytest.raises(JobError, match=message):
        load_config(write(tmp_path, MINIMAL + "steps: 5\n"), [override])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"channels": [30, 64]}}, r"norm_groups \(16\) must divide every entry of channels, not so \[30\]"),
        ({"model": {"attention": [True]}}, "attention has 1 entries and channels has 3"),
        ({"model": {"attention_head_channels": 48}}, r"attention_head_channels \(48\) must divide"),
        ({"objective": {"prediction": "epsilon", "zero_terminal_snr": True}}, "leaves epsilon undefined"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    """Rules between fields are checked before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        make(**values)


@test_settings(deadline=None)  # a machine under load is slow, not wrong
@given(batch=st.integers(1, 512), world=st.integers(1, 64), accumulation=st.integers(1, 16))
def test_the_global_batch_is_split_exactly_or_refused_with_sizes_that_would_do(
    batch: int, world: int, accumulation: int
) -> None:
    """Either every part has the same size, or the message names a batch size that works."""
    config = make(batch_size=batch, gradient_accumulation=accumulation)
    if batch % (world * accumulation) == 0:
        assert config.micro_batch_size(world) * world * accumulation == batch
        return
    with pytest.raises(JobError) as raised:
        config.micro_batch_size(world)
    suggested = int(str(raised.value).split("use batch_size ")[1].split(" ")[0])
    assert make(batch_size=suggested, gradient_accumulation=accumulation).micro_batch_size(world) >= 1


def test_what_may_change_is_named_one_by_one() -> None:
    """Changes of steps and intervals are allowed and said."""
    before = make().as_plain()
    after = make(steps=20_000, checkpoint={"every_steps": 5}, data={"directory": "elsewhere", "workers": 3})
    assert changed_keys(before, after) == [
        "data.directory: shards -> elsewhere",
        "data.workers: 0 -> 3",
        "steps: 10000 -> 20000",
        "checkpoint.every_steps: 500 -> 5",
    ]


def test_what_may_not_change_is_an_error_with_both_values() -> None:
    """All such keys are named at once."""
    with pytest.raises(JobError) as raised:
        changed_keys(make().as_plain(), make(seed=1, model={"channels": [32, 64]}, steps=3))
    text = str(raised.value)
    assert "seed: 0 in the run, 1 now" in text
    assert "model.channels: [64, 128, 128] in the run, [32, 64] now" in text
    assert "steps: " not in text


def test_a_key_that_an_older_version_did_not_know_is_no_change() -> None:
    """A run begun before a setting existed goes on with its default."""
    before = make().as_plain()
    del before["retries"], before["objective"]["timestep_sampling"]
    assert changed_keys(before, make()) == []


def test_the_rule_names_keys_that_exist() -> None:
    """Every entry of MAY_CHANGE is a key or a section, so that renaming a field cannot silently forbid its change."""
    leaves = flatten(make().as_plain())
    for entry in MAY_CHANGE:
        assert any(key == entry or key.startswith(f"{entry}.") for key in leaves), entry


def test_the_digest_follows_what_may_not_change() -> None:
    """Two configurations of the same experiment have the same digest."""
    assert make(steps=5).digest() == make().digest() != make(seed=2).digest()
    assert may_change("checkpoint.keep")
    assert not may_change("checkpointer")


def test_warm_up_is_counted_in_optimizer_steps() -> None:
    """The rate rises from its first fraction to the highest in exactly `warmup_steps` steps."""
    config = make(steps=100, schedule={"warmup_steps": 10, "kind": "constant"}, optimizer={"learning_rate": 1.0})
    assert [learning_rate(config, step) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])


def test_the_cosine_ends_at_its_final_ratio_at_the_last_step() -> None:
    """It starts at the highest rate after the warm-up, falls all the way, and stays low beyond the end."""
    config = make(
        steps=110, schedule={"warmup_steps": 10, "kind": "cosine", "final_ratio": 0.1}, optimizer={"learning_rate": 2.0}
    )
    rates = [learning_rate(config, step) for step in range(10, 110)]
    assert rates[0] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert learning_rate(config, 500) == pytest.approx(0.2)


@test_settings(deadline=None)  # a machine under load is slow, not wrong
@given(steps=st.integers(1, 50), warmup=st.integers(0, 60), step=st.integers(0, 200))
def test_the_rate_is_always_sensible(steps: int, warmup: int, step: int) -> None:
    """No combination divides by zero or leaves (0, highest]."""
    config = make(steps=steps, schedule={"warmup_steps": warmup}, optimizer={"learning_rate": 1.0})
    rate = learning_rate(config, step)
    assert math.isfinite(rate)
    assert 0 < rate <= 1.0 + 1e-12
