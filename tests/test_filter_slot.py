"""The slot: what a filter may ask for, users' own filters, and what they get wrong."""

import re

from pfppo.filters import GIVEN, kept_per_prompt, known_to, load_filter

import pytest
import torch
from ranks import refused


def load_own(folder, result):
    """A user's filter with that result, loaded for 3 samples."""
    path = folder / "mine.py"
    path.write_text(f"import torch\n\n\ndef own(rewards, generator):\n    return {result}\n")
    return load_filter(f"{path}:own", 3)


def test_a_filter_gets_what_it_asks_for_by_name_and_nothing_else(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def own(r, g, logp, *, members, scale=2.0, **rest):\n"
        "    assert not rest\n    return scale * members[..., 1].abs() + 0 * logp.add_(1)\n"
        "def odd(rewards, generator, reward_all):\n    return rewards * 0\n"
    )
    chosen, rewards = load_filter(f"{tmp_path}/mine.py:own", 2), torch.ones(1, 2)
    given = {"logp": torch.zeros(1, 2), "members": torch.tensor([[[0.0, 1], [0, 3]]])}
    assert chosen.asks == ["logp", "members"]
    assert chosen(rewards, torch.Generator(), given).tolist() == [[2.0, 6.0]]
    assert given["logp"].tolist() == [[0, 0]]  # it works on its own copy
    names = "scores, lengths, finished, logp, members"
    said = f"asks for 'reward_all', expected some of {names}"
    assert refused(load_filter, f"{tmp_path}/mine.py:odd", 2).endswith(said)
    assert load_filter("none", 2).asks == [] and [*GIVEN] == names.split(", ")
    (tmp_path / "mine.py").write_text("def own(rewards, scores):\n    return scores\n")
    said = refused(load_filter, f"{tmp_path}/mine.py:own", 2)
    assert said.endswith("expected rewards and generator first, found scores")
    (tmp_path / "mine.py").write_text("def own(rewards, g, score=None):\n    return rewards * 0\n")
    said = refused(load_filter, f"{tmp_path}/mine.py:own", 2)
    assert said.endswith(f"mine.py:own: asks for 'score', expected some of {names}")
    (tmp_path / "mine.py").write_text("def own(rewards, g, scores=1, /):\n    return rewards * 0\n")
    said = refused(load_filter, f"{tmp_path}/mine.py:own", 2)
    assert "positional-only arguments passed as keyword arguments: 'scores'" in said


def test_a_filter_is_tried_with_as_many_reward_models_as_there_are_and_may_do_without(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def third(rewards, generator, members):\n    return members[..., 2].exp()\n"
        "def soft(r, g, members=None, scores=None):\n"
        "    return r.exp() if members is None else (scores + members.abs().sum(2))\n"
        "def late(rewards, *both, finished):\n    return finished.expand_as(rewards)\n"
    )
    third, rewards = f"{tmp_path}/mine.py:third", torch.ones(2, 2)
    chosen = load_filter(third, 2, known=known_to("a,b,c"))
    assert kept_per_prompt(chosen, 2) == 2
    assert "index 2 is out of bounds" in refused(load_filter, third, 2, known=known_to("a,b"))
    assert load_filter(f"{tmp_path}/mine.py:soft", 2, known=known_to("a")).asks == ["scores"]
    assert load_filter(f"{tmp_path}/mine.py:soft", 2, known=known_to("a,b")).label.endswith(
        "(oracle)"
    )
    wide = torch.ones(2, 1, dtype=torch.bool)
    weights = load_filter(f"{tmp_path}/mine.py:late", 2)(rewards, None, {"finished": wide})
    weights[0] = 0  # it is nobody else's, and whole
    assert weights.tolist() == [[0, 0], [1, 1]] and wide.all()


@pytest.mark.parametrize(
    "rule, kept",
    [
        ("torch.randint(2, (1,), generator=generator).expand_as(rewards)", None),  # all or none
        ("rewards > 5", None),
        ("rewards < -1000", 0),
        ("(rewards / 0.1).softmax(1)", 3),
    ],
)
def test_a_filter_that_keeps_seldom_is_not_taken_for_one_that_keeps_none(tmp_path, rule, kept):
    assert kept_per_prompt(load_own(tmp_path, rule), 3) == kept


def test_oracles_are_marked_and_members_need_several_reward_models():
    assert load_filter("reject", 5).label == "reject (oracle)"
    assert load_filter("agreeing", 5).label == "agreeing"
    said = refused(load_filter, "agreeing", 5, "filter", known_to("rm"))
    assert said.startswith("--filter agreeing: asks for members ([P, N, K] rewards by each of")
    assert [*known_to("a, b")] == list(GIVEN) == [*known_to("a"), "members"]
    alone = {"members": torch.ones(2, 5, 1)}
    said = refused(load_filter("agreeing", 5), torch.ones(2, 5), torch.Generator(), alone)
    assert said.endswith("needs at least 2 reward models, found 1")
    said = refused(load_filter("agreeing", 5), torch.ones(2, 5), torch.Generator(), {})
    assert said.endswith("asks for members, which these samples have not")
    assert kept_per_prompt(load_filter("agreeing", 2), 2) is None


@pytest.mark.parametrize(
    "result, expected",
    [
        ("(rewards > 0) * 0.5", [0.5, 0, 0.5]),
        ("rewards > 0", [1, 0, 1]),
        ("(rewards > 0).long()", [1, 0, 1]),
        ("(rewards > 0).double()", [1, 0, 1]),
        ("rewards.relu_()", [1, 0, 2]),  # works in place
        ("rewards ** 2 * torch.ones(1, requires_grad=True)", [1, 1, 4]),
    ],
)
def test_a_filter_of_ones_own_gives_plain_weights_and_cannot_change_the_rewards(
    tmp_path, result, expected
):
    rewards = torch.tensor([[1.0, -1.0, 2.0]])
    weights = load_own(tmp_path, result)(rewards, torch.Generator())
    assert weights.tolist() == [expected] and rewards.tolist() == [[1, -1, 2]]
    assert weights.dtype == torch.float32 and not weights.requires_grad


@pytest.mark.parametrize(
    "result, expected",
    [
        ("rewards[:, :2]", r"shape \(., 3\), found a tensor of shape \(., 2\)"),
        ("rewards.sum(1)", r"shape \(., 3\), found a tensor of shape \(.,\)"),
        ("torch.ones(2, 3)", r"shape \(3, 3\), found a tensor of shape \(2, 3\)"),
        ("rewards.numpy() * 0 + 1", r"shape \(., 3\), found ndarray"),
        ("[[1.0, 1.0, 1.0]] * 2", r"shape \(., 3\), found .*list"),
        ("None", r"shape \(., 3\), found .*NoneType"),
        ("torch.full_like(rewards, -1.0)", "finite and >= 0"),
        ("torch.full_like(rewards, float('nan'))", "finite and >= 0"),
        ("torch.full_like(rewards, float('inf'))", "finite and >= 0"),
        ("torch.full_like(rewards, 1e38)", "finite and >= 0, at most 1e\\+30"),  # sums are not
        ("torch.ones_like(rewards).to_sparse()", "RuntimeError: copy_"),
        ("torch.ones_like(rewards, device='meta')", "NotImplementedError: Cannot copy"),
        ("torch.ones_like(rewards) * 1j", r"shape \(., 3\), torch.complex64"),
        ("(rewards - rewards.mean()) / rewards.std() * 0 + 1", "finite and >= 0"),  # if all equal
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("exit(0)", "SystemExit: 0"),
    ],
)
def test_nonsense_is_one_line_that_names_the_filter_before_and_during_a_run(
    tmp_path, result, expected
):
    named = f"--filter {tmp_path}/mine.py:own --samples_per_prompt 3: .*"
    assert re.match(named + expected, refused(load_own, tmp_path, result))
    chosen = load_own(tmp_path, f"rewards * 0 + 1 if rewards.max() < 90 else {result}")
    during = refused(chosen, torch.full((3, 3), 99.0), torch.Generator())
    assert re.match(named + expected, during)
