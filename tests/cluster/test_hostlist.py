"""Hostlists mean what Slurm means by them, in both directions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.hostlist import MAX_NAMES, expand, fold
from cluster.shell import LocalShell

# Every right-hand side is what `scontrol show hostnames` of 22.05.8 prints; test_expand_agrees_with_slurm runs it.
SLURM_EXPANDS = {
    "gpu-[001-003,7],login1": "gpu-001 gpu-002 gpu-003 gpu-7 login1",
    "r[1-2]n[01-04]": "r1n01 r1n02 r1n03 r1n04 r2n01 r2n02 r2n03 r2n04",
    "n[1-2][3-4]": "n13 n14 n23 n24",
    "n[9-11]": "n9 n10 n11",
    "n[09-11]": "n09 n10 n11",
    "n[98-101]": "n98 n99 n100 n101",
    "n[1-010]": "n1 n2 n3 n4 n5 n6 n7 n8 n9 n10",
    "n[007,07,7]": "n007 n07 n7",
    "n[00-02]": "n00 n01 n02",
    "n[0]": "n0",
    "n[9-9]": "n9",
    "n[1,1]": "n1 n1",
    "a-[1-2],a-[2-3]": "a-1 a-2 a-2 a-3",
    "[1-3]": "1 2 3",
    "a b": "a b",
    "a\nb": "a b",
    ",a,,b,": "a b",
    "low-st-p4d-1": "low-st-p4d-1",
    "n[1- 3]": "n1 n2 n3",
}
NOT_HOSTLISTS = ["n[]", "n[3-1]", "n[a-b]", "n[-3]", "n[1-2]n[1-3,a]", "n[1-999999999]", "n[1-70000]"]
ONLY_OURS_REFUSES = ["n[1-3", "n1]", "n[[1-2]]", "n]1[", "n[1-400]m[1-400]", "n[1-9999999999999999999999]"]

NAMES = st.from_regex(r"[a-z0-9]{0,3}(?:-[a-z]{1,2})?[a-z0-9]{0,3}\d{0,4}", fullmatch=True).filter(bool)


@pytest.mark.parametrize(("text", "names"), SLURM_EXPANDS.items())
def test_expand_gives_the_names_in_slurms_order(text: str, names: str) -> None:
    """Padding, several groups, duplicates and separators expand exactly as Slurm does it."""
    assert expand(text) == names.split()


@pytest.mark.parametrize("text", ["", "  \n", "(null)", "None assigned", "n/a", "N/A"])
def test_slurms_words_for_no_nodes_are_no_nodes(text: str) -> None:
    """`(null)` and `None assigned` are not nodes of that name."""
    assert expand(text) == []


def test_text_behind_a_bracket_is_read() -> None:
    """`n[1-2]-ib`, which newer versions print, keeps its end on every name."""
    assert expand("n[1-2]-ib,x[3-4]y[5-6]z") == ["n1-ib", "n2-ib", "x3y5z", "x3y6z", "x4y5z", "x4y6z"]


@pytest.mark.parametrize("text", NOT_HOSTLISTS + ONLY_OURS_REFUSES)
def test_what_is_no_hostlist_is_refused_with_the_text_and_the_rule(text: str) -> None:
    """A typing mistake is an InputError that shows it, and a huge range costs neither time nor memory."""
    with pytest.raises(InputError) as caught:
        expand(text)
    assert repr(text) in str(caught.value)


def test_the_bound_counts_all_items_together() -> None:
    """MAX_NAMES names are fine; one more, in another item, is not."""
    assert len(expand(f"n[1-{MAX_NAMES}]")) == MAX_NAMES
    with pytest.raises(InputError, match="more than 65536"):
        expand(f"n[1-{MAX_NAMES}],m1")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("gpu-1 gpu-2 gpu-3 gpu-7 login", "gpu-[1-3,7],login"),
        ("n9 n10 n11", "n[9-11]"),
        ("n09 n10 n11", "n[09-11]"),
        ("n7 n07 n007", "n7,n07,n007"),
        ("n99 n100 n098", "n99,n[098,100]"),
        ("n3 n1 n2 n1", "n[1-3]"),
        ("r1n1 r1n2 r2n1", "r1n[1-2],r2n1"),
        ("a1b a2b", "a1b,a2b"),
        ("5 6", "5,6"),
        ("", ""),
    ],
)
def test_fold_gathers_names_by_the_number_at_their_end(names: str, text: str) -> None:
    """Padded and unpadded numbers are kept apart, and no text stands behind a bracket, which 22.05 would refuse."""
    assert fold(names.split()) == text


@pytest.mark.parametrize("name", ["", "a,b", "a b", "n[1-2]", "a\n", "(null)", "a/b"])
def test_fold_refuses_what_no_hostlist_can_carry(name: str) -> None:
    """A name with a separator in it would come back as other names."""
    with pytest.raises(InputError):
        fold(["n1", name])


@given(st.lists(NAMES, max_size=30))
def test_folding_and_expanding_gives_the_same_set_of_names(names: list[str]) -> None:
    """Nothing is lost, nothing is added, nothing comes twice, and folding the result again changes nothing."""
    text = fold(names)
    assert sorted(expand(text)) == sorted(set(names))
    assert fold(expand(text)) == text


@given(st.text(alphabet="nab019-,[] \n()/٣", max_size=40) | st.text(max_size=40))
def test_any_text_expands_or_is_refused(text: str) -> None:
    """No text raises anything but InputError, and what expands can be folded again unless it holds ( ) or /."""
    try:
        names = expand(text)
    except InputError:
        return
    assert all(names)


@pytest.fixture
def hostlist_slurm(tmp_path: Path) -> dict[str, str]:
    """A slurm.conf that is enough for scontrol to work on hostlists; no daemon is asked."""
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    return {"SLURM_CONF": os.fspath(conf)}


@pytest.mark.daemons
def test_expand_agrees_with_slurm(hostlist_slurm: dict[str, str]) -> None:
    """`scontrol show hostnames` gives what the table above says, and refuses what we refuse."""
    shell = LocalShell()
    for text, names in SLURM_EXPANDS.items():
        result = shell.run(["scontrol", "show", "hostnames", text], timeout_s=30, env=hostlist_slurm)
        assert result.stdout.split() == names.split(), text
    for text in NOT_HOSTLISTS:
        result = shell.run(["scontrol", "show", "hostnames", text], timeout_s=30, env=hostlist_slurm, check=False)
        assert "Invalid hostlist" in result.stdout + result.stderr, text


@pytest.mark.daemons
def test_slurm_reads_what_fold_writes(hostlist_slurm: dict[str, str]) -> None:
    """Slurm expands our folded text to the same names in the same order as we do."""
    nasty = expand("n[9-10,09,010,100,7,07,007],a1b,a2b,r1n[1-2],r2n1,5,6,login,low-st-p4d-[1-2],x-1-ib,n0,n00")
    text = fold(nasty)
    result = LocalShell().run(["scontrol", "show", "hostnames", text], timeout_s=30, env=hostlist_slurm)
    assert result.stdout.split() == expand(text)
    assert set(expand(text)) == set(nasty)
