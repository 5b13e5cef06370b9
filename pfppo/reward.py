"""The reward: Bradley-Terry loss, pairs from executed samples, the normaliser, and the reward slot.

A reward model (RM) learns from pairs (chosen, rejected) of responses to one prompt:

    loss = -log sigmoid(r(chosen) - r(rejected))                      (Bradley-Terry)

The paper takes, of five samples of the SFT policy, the two of maximum edit distance. How it decides
which one is chosen is not stated; here the tests decide: the pair is the passing and the failing
sample of maximum edit distance, counted in tokens.

Beside an RM stands `reward_model.json`: mean and standard deviation of its raw score over samples
of the SFT policy (rewards are used normalised), and the hashes of prompt template and vocabulary
that it was trained with.

The reward slot: `--reward model` (the RM), `tests` (the execution oracle: +1 passed, -1 failed),
`combined` (their sum), `noisy:middle`, `noisy:tails`, `noisy:uniform` (the actual score with errors
in known places, noise.py), or a user's own `score(prompts, responses, problems) -> [B]` by
`module:function` or `file.py:function`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pfppo.config import UserError, load_function, reason, require
from pfppo.noise import PLACES, noisy_rewards

import torch
from torch.nn.functional import logsigmoid

CARD = "reward_model.json"
REWARDS = ("model", "tests", "combined", *(f"noisy:{place}" for place in PLACES))
BY_TESTS = REWARDS[1:]  # those that need problems with tests
BY_MODEL = ("model", "combined")  # those that need a reward model


@dataclass(frozen=True)
class RewardCard:
    """What must be known of an RM to use it."""

    mean: float  # raw score over samples of the SFT policy
    std: float
    template: str  # data.template_hash
    vocabulary: str  # data.vocabulary_hash

    def save(self, folder):
        (Path(folder) / CARD).write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_card(folder):
    """The card of an RM, or None where there is none (an RM from elsewhere). Raises UserError."""
    path = Path(folder) / CARD
    if not path.is_file():
        return None
    try:
        card = RewardCard(**json.loads(path.read_text()))
        card = RewardCard(float(card.mean), float(card.std), card.template, card.vocabulary)
        if not (math.isfinite(card.mean) and 0 < card.std < math.inf):
            raise ValueError(f"mean {card.mean}, std {card.std}")
        return card
    except (ValueError, TypeError) as error:
        expected = "mean, std, template, vocabulary"
        raise UserError(f"{path}: damaged ({error}), expected an object with {expected}") from error


def check_agreement(card, template, vocabulary, reward_model, policy):
    """Raise UserError unless the RM was trained with the policy's vocabulary and template."""
    for what, ours, theirs in (
        ("vocabulary", vocabulary, card.vocabulary),
        ("prompt template", template, card.template),
    ):
        require(
            ours == theirs,
            f"--reward_model {reward_model}: its {what} differs from that of --policy {policy} "
            f"(hash {theirs} there, {ours} here)",
        )


def bradley_terry_loss(chosen, rejected):
    """-log sigmoid(chosen - rejected), summed over pairs. Both [B]. Returns (loss, metrics)."""
    margin = chosen - rejected
    loss = -logsigmoid(margin).sum()
    return loss, {"loss": loss.detach(), "accuracy": (margin > 0).float().sum()}


def edit_distance(a, b):
    """Levenshtein distance of two sequences: insertions, deletions, substitutions."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            substituted = previous[j - 1] + (x != y)
            current.append(min(substituted, previous[j] + 1, current[j - 1] + 1))
        previous = current
    return previous[-1]


def farthest_pair(responses, passed):
    """Indices (chosen, rejected) of the passing and the failing response of maximum edit distance.

    responses: token ids of one prompt's samples. None where all pass or all fail. The first wins a
    tie.
    """
    pairs = [
        (edit_distance(responses[good], responses[bad]), good, bad)
        for good in range(len(responses))
        for bad in range(len(responses))
        if passed[good] and not passed[bad]
    ]
    return max(pairs, key=lambda pair: pair[0])[1:] if pairs else None


@dataclass
class Answers:
    """What a reward may look at: B rows, one rank's."""

    prompts: list[str]
    responses: list[str]
    problems: list  # benchmarks.Problem
    scores: torch.Tensor  # [B] actual scores: 1 passed, 0 failed, NaN where there are no tests
    ask_model: Callable[[], torch.Tensor] | None = None  # the RM's normalised rewards [B]


def load_reward(spec, seed=0):
    """The reward slot: a function Answers -> rewards [B], fp32, on the CPU. seed: of the noise,
    where there is some.

    Raises UserError where it is unknown; the function does where rewards are not finite.
    """
    if spec == "model":
        return lambda answers: answers.ask_model()
    if spec == "tests":
        return lambda answers: 2 * answers.scores - 1
    if spec == "combined":  # normalised reward and oracle, of about the same spread
        return lambda answers: answers.ask_model() + 2 * answers.scores - 1
    if spec in REWARDS:
        place = spec.partition(":")[2]
        return lambda answers: noisy_rewards(
            place, answers.scores, answers.prompts, answers.responses, seed
        )
    expected = f"{', '.join(REWARDS)}, or module:function or file.py:function"
    require(":" in spec, f"--reward {spec}: unknown, expected one of {expected}")
    score = load_function(spec, "reward")

    def own(answers):
        """A user's reward, checked."""
        try:
            seen = answers.prompts, answers.responses, answers.problems
            rewards = score(*map(list, seen))  # lists of its own: it may sort or edit them
            rewards = torch.as_tensor(rewards, dtype=torch.float32).detach().cpu()
        except (Exception, SystemExit) as error:
            raise UserError(f"--reward {spec}: {reason(error)}") from error
        count, shape = len(answers.responses), tuple(rewards.shape)
        found = f"shape {shape}" if shape != (count,) else rewards[~rewards.isfinite()].tolist()
        require(not found, f"--reward {spec}: expected {count} finite numbers, found {found}")
        return rewards

    return own


def try_reward(spec, reward, problems):
    """Call a user's reward once, with reference solutions: better it fails at the start."""
    if spec in REWARDS:
        return
    texts = [[getattr(p, name) for p in problems] for name in ("question", "canonical_solution")]
    reward(Answers(*texts, problems, torch.ones(len(problems))))


@torch.no_grad()
def model_rewards(reward_model, rollout, microbatch, limit=float("inf")):
    """The RM's normalised score at the last response token of each row, clipped to +-limit.

    [B], fp32, on the CPU. A collective: all ranks need equally many microbatches. Equal rows get
    equal rewards: the last bits of a matrix product depend on a row's place in the batch, and a
    tie is for the filter's generator to break.
    """
    parts = [reward_model(mb.ids, mb.ends)[:, 0, 0] for mb in rollout.microbatches(microbatch)]
    rewards = torch.cat(parts).clamp(-limit, limit).float().cpu()
    ends, first = (rollout.prompt_lengths + rollout.lengths).tolist(), {}
    for i, (row, end) in enumerate(zip(rollout.ids.tolist(), ends, strict=True)):
        rewards[i] = rewards[first.setdefault(tuple(row[:end]), i)]
    return rewards


def raw_spread(reward_model, rollout, microbatch, path):
    """(mean, standard deviation) of an RM's rewards of rows. Raises UserError if there is none."""
    raw = model_rewards(reward_model, rollout, microbatch)
    what = f"--reward_model {path}: rewards of {len(raw)} samples have no spread"
    require(len(raw) > 1 and 0 < raw.std() < math.inf, what)
    return raw.mean().item(), raw.std().item()
