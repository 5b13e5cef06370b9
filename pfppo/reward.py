"""The reward: Bradley-Terry loss, pairs from executed samples, the normaliser, and the reward slot.

A reward model (RM) learns from pairs (chosen, rejected) of responses to one prompt:

    loss = -log sigmoid(r(chosen) - r(rejected))                      (Bradley-Terry)

The paper takes, of five samples of the SFT policy, the two of maximum edit distance. How it decides
which one is chosen is not stated; here the tests decide: the pair is the passing and the failing
sample of maximum edit distance, counted in tokens.

Beside an RM stands `reward_model.json`: mean and standard deviation of its raw score over samples
of the SFT policy (rewards are used normalised), and the hashes of prompt template and vocabulary
that it was trained with.

The reward slot is `REWARDS`, or a user's own `score(prompts, responses, problems) -> [B]` by
`module:function` or `file.py:function`. Its `noisy:*` rows are laboratories of a reward model that
is wrong in known places. A response has a latent reward z that ranks perfectly: its sign is the
actual score's, its size |n| says how clear the case is, n standard normal. What PPO sees is z, or
-z where the reward model errs, which it does with probability

    uniform    e
    middle     e a exp(-z^2)            often where z is near 0
    tails      e b (1 - exp(-z^2))      often where |z| is large

a = sqrt 3 and b = 1 / (1 - 1 / sqrt 3), so that all three err on a share e = 0.2 of the responses.
Equal responses to a prompt have equal rewards, and another seed is another reward model. (Noise
that is *added* to z would carry lukewarm cases into the extremes of what is seen.)
"""

import inspect
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from pfppo.config import UserError, load_function, reason, require
from pfppo.files import write_json
from pfppo.fsdp import gather_lists
from pfppo.rollout import collate, seeded

import torch
from torch.nn.functional import logsigmoid

CARD = "reward_model.json"
ERRORS = 0.2  # share of the responses whose noisy reward has the wrong sign
PLACES = {  # error rates at latent rewards z, relative to their mean
    "uniform": torch.ones_like,
    "middle": lambda z: 3**0.5 * torch.exp(-(z**2)),  # E exp(-z^2) = 1 / sqrt 3
    "tails": lambda z: (1 - torch.exp(-(z**2))) / (1 - 3**-0.5),
}


@dataclass(frozen=True)
class RewardCard:
    """What must be known of an RM to use it."""

    mean: float  # raw score over samples of the SFT policy
    std: float
    template: str  # data.template_hash
    vocabulary: str  # data.vocabulary_hash

    def save(self, folder):
        write_json(Path(folder) / CARD, asdict(self))


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
    hashes = [(vocabulary, card.vocabulary), (template, card.template)]
    for what, (ours, theirs) in zip(("vocabulary", "prompt template"), hashes, strict=True):
        differs = f"its {what} differs from that of --policy {policy}"
        numbers = f"(hash {theirs} there, {ours} here)"
        require(ours == theirs, f"--reward_model {reward_model}: {differs} {numbers}")


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


def rows_of(pairs):
    """Pairs (prompt, chosen, rejected) -> [(prompt, response)], chosen ones at even places."""
    return [(prompt, ids) for prompt, *responses in pairs for ids in responses]


def split_by_prompt(pairs, share, seed):
    """(training, held out): a prompt's pairs are all held out, or all trained on."""
    of_prompt = {}
    for pair in pairs:
        of_prompt.setdefault(tuple(pair[0]), []).append(pair)
    groups = list(of_prompt.values())
    order = torch.randperm(len(groups), generator=seeded("held out", seed)).tolist()
    cut = round(len(groups) * share)
    return tuple(sum((groups[i] for i in part), []) for part in (order[cut:], order[:cut]))


@torch.no_grad()
def raw_scores(model, rows, pad_id, microbatch, ranks):
    """Raw scores [rows], fp64, of (prompt ids, response ids), spread over ranks. A collective."""
    mine, scores = rows[ranks.rank :: ranks.world], []
    for start in range(0, math.ceil(len(rows) / ranks.world), 2 * microbatch):  # equal on all ranks
        some = mine[start : start + 2 * microbatch] or rows[:1]
        batch = collate(*zip(*some, strict=True), pad_id, ranks.device)
        scores += model(batch.ids, batch.ends).flatten().tolist()
    return torch.tensor(gather_lists(scores[: len(mine)], ranks), dtype=torch.float64)


@dataclass
class Answers:
    """What a reward may look at: B samples, one rank's. `rewards` is what it said of them."""

    problems: list  # problems.Problem
    texts: list[str]
    scores: torch.Tensor  # [B] actual scores: 1 passed, 0 failed, NaN where there are no tests
    finished: torch.Tensor | None = None  # [B] ends with EOS
    rows: object = None  # rollout.Rollout
    rewards: torch.Tensor | None = None  # [B]
    seed: int = 0  # of noisy rewards
    reward_model: object = None  # model.ScalarModel, for `by_model`
    microbatch: int = 0

    def __add__(self, other):
        """Both, prompt after prompt: of another round of the step."""
        both = {n: getattr(self, n) + getattr(other, n) for n in ("problems", "texts", "rows")}
        for name in ("scores", "finished", "rewards"):
            both[name] = torch.cat([getattr(self, name), getattr(other, name)])
        return replace(self, **both)

    @cached_property
    def by_model(self):
        """[B] the RM's normalised rewards, when first asked for. A collective."""
        return model_rewards(self.reward_model, self.rows, self.microbatch)


def noisy(answers, place):
    """The actual score with errors where `place` says."""
    asked = zip(answers.problems, answers.texts, strict=True)
    drawn = [_draw(answers.seed, problem.question, text) for problem, text in asked]
    size, luck = (torch.tensor(column) for column in zip(*drawn, strict=True))
    latent = torch.where(answers.scores > 0.5, size, -size)
    return torch.where(luck < ERRORS * PLACES[place](latent), -latent, latent)


def _draw(seed, prompt, response):
    """(|n|, a number in [0, 1)) that belong to this prompt and response."""
    generator = seeded("noise", seed, prompt, response)
    return tuple(draw((), generator=generator).abs().item() for draw in (torch.randn, torch.rand))


REWARDS = {
    "model": lambda answers: answers.by_model,
    "tests": lambda answers: 2 * answers.scores - 1,  # the oracle: +1 passed, -1 failed
    "combined": lambda answers: answers.by_model + 2 * answers.scores - 1,  # about equal spreads
    "noisy:middle": partial(noisy, place="middle"),
    "noisy:tails": partial(noisy, place="tails"),
    "noisy:uniform": partial(noisy, place="uniform"),
}
BY_MODEL = ("model", "combined")  # those that need a reward model
BY_TESTS = tuple(REWARDS)[1:]  # those that need problems with tests


class Slot:
    """The reward slot: Answers -> rewards [B], fp32, on the CPU, (raw - mean) / std clipped to
    +-clip. mean and std are those over samples of the SFT policy, once somebody has measured them.

    Raises UserError where a reward fails or is not finite.
    """

    def __init__(self, spec, score, clip=math.inf):
        self.spec, self.score, self.clip = spec, score, clip
        self.mean, self.std = 0.0, 1.0

    def raw(self, answers):
        """Rewards [B] in the units of the function itself, fp32, on the CPU. Raises UserError."""
        try:
            rewards = torch.as_tensor(self.score(answers), dtype=torch.float32).detach().cpu()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"--reward {self.spec}: {reason(error)}") from error
        count, shape = len(answers.texts), tuple(rewards.shape)
        found = f"shape {shape}" if shape != (count,) else rewards[~rewards.isfinite()].tolist()
        expected = f"expected {count} finite numbers, found {found}"
        require(not found, f"--reward {self.spec}: {expected}")
        return rewards

    def measure(self, answers):
        """Take mean and sd from samples of the SFT policy; what has no spread stays as it is."""
        raw = self.raw(answers)
        if raw.std() > 0:
            self.mean, self.std = spread_of(raw, f"--reward {self.spec}")

    def __call__(self, answers):
        return ((self.raw(answers) - self.mean) / self.std).clamp(-self.clip, self.clip)


def load_reward(spec, reward_model="somewhere", clip=math.inf):
    """The Slot of a name in REWARDS, or of a user's own function. Raises UserError where it is
    unknown, or needs a reward model and there is none ("")."""
    needs = spec in BY_MODEL and not reward_model
    require(not needs, f"--reward {spec}: needs a --reward_model, found none")
    score = load_function(spec, "reward", REWARDS)
    return Slot(spec, score if spec in REWARDS else partial(_own, score), clip)


def _own(score, answers):
    """A user's reward: of one parameter, which gets the Answers, or of three lists of its own."""
    parameters = inspect.signature(score).parameters.values()
    if sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters) == 1:
        return score(answers)
    prompts = [problem.question for problem in answers.problems]
    return score(prompts, list(answers.texts), list(answers.problems))


def try_reward(spec, reward, problems):
    """Call a user's reward once, with reference solutions: better it fails at the start."""
    if spec not in REWARDS:
        texts = [problem.canonical_solution for problem in problems]
        answers = Answers(problems, texts, torch.ones(len(texts)), torch.ones(len(texts)) > 0)
        answers.by_model = torch.zeros(len(texts))
        reward.raw(answers)


@torch.no_grad()
def model_rewards(reward_model, rows, microbatch):
    """The RM's normalised score at the last response token of each row.

    [B], fp32, on the CPU. A collective: all ranks need equally many microbatches. Equal rows get
    equal rewards: the last bits of a matrix product depend on a row's place in the batch, and a
    tie is for the filter's generator to break.
    """
    parts = [reward_model(mb.ids, mb.ends)[:, 0, 0] for mb in rows.microbatches(microbatch)]
    rewards = torch.cat(parts).float().cpu()
    ends, first = (rows.prompt_lengths + rows.lengths).tolist(), {}
    for i, (row, end) in enumerate(zip(rows.ids.tolist(), ends, strict=True)):
        rewards[i] = rewards[first.setdefault(tuple(row[:end]), i)]
    return rewards


def spread_of(raw, what):
    """[mean, standard deviation] of raw rewards. Raises UserError where there is none."""
    none = f"{what}: rewards of {len(raw)} samples have no spread"
    require(len(raw) > 1 and 0 < raw.std() < math.inf, none)
    return [raw.mean().item(), raw.std().item()]
