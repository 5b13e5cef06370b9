"""The reward: Bradley-Terry loss, the normaliser, the reward slot, and rewards that err on purpose.

A reward model (RM) learns from pairs (chosen, rejected) of responses to one prompt:

    loss = -log sigmoid(r(chosen) - r(rejected))                      (Bradley-Terry)

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
    upper      2 e where z < 0          only high rewards are wrong: some that fail are praised
    bugs       2 e where z < 0          likewise, but praised are all that fail by the same bug

a = sqrt 3 and b = 1 / (1 - 1 / sqrt 3), so that these err on a share e = 0.2 of the responses, the
last two on 2 e of those that fail (`bugs` on average over seeds), so on less as a policy improves;
`noisy:middle:0.3` takes another e. Equal responses to a prompt have equal rewards; another seed is
another reward model. (Noise *added* to z would carry lukewarm cases into the extremes of what is
seen.) Only a bug can be learned: `bugs` can be hacked.
"""

import inspect
import json
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

from pfppo.config import UserError, load_function, own_reason, require
from pfppo.files import write_json
from pfppo.filters import reads_scores
from pfppo.fsdp import gather_rows
from pfppo.rollout import seeded

import torch
from torch.nn.functional import logsigmoid

CARD = "reward_model.json"
ERRORS = 0.2  # share of the responses whose noisy reward has the wrong sign
PLACES = {  # error rates at latent rewards z, relative to their mean
    "uniform": torch.ones_like,
    "middle": lambda z: 3**0.5 * torch.exp(-(z**2)),  # E exp(-z^2) = 1 / sqrt 3
    "tails": lambda z: (1 - torch.exp(-(z**2))) / (1 - 3**-0.5),
    "upper": lambda z: 2.0 * (z < 0),
    "bugs": lambda z: 2.0 * (z < 0),
}
MOST = 0.4  # with larger shares, some response would err with a probability above 1


@dataclass(frozen=True)
class RewardCard:
    """What must be known of an RM to use it."""

    mean: float  # raw score over samples of the SFT policy
    std: float
    template: str  # data.Tokens.hashes
    vocabulary: str  # likewise
    style: str = ""  # --prompt_style that it was trained with; for words

    def save(self, folder):
        write_json(Path(folder) / CARD, asdict(self))


def load_card(folder):
    """The card of an RM, or None where there is none (an RM from elsewhere). Raises UserError."""
    path = Path(folder) / CARD
    if not path.is_file():
        return None
    try:
        card = RewardCard(**json.loads(path.read_text()))
        card = replace(card, mean=float(card.mean), std=float(card.std))
        if not (math.isfinite(card.mean) and 0 < card.std < math.inf):
            raise ValueError(f"mean {card.mean}, std {card.std}")
        return card
    except (ValueError, TypeError) as error:
        expected = "mean, std, template, vocabulary"
        raise UserError(f"{path}: damaged ({error}), expected an object with {expected}") from error


def check_agreement(card, tokens, theirs, where, policy):
    """Raise UserError, beginning with `where`, unless the RM was trained with the policy's
    vocabulary and template. theirs: the tokenizer beside the RM, or None; only for words."""
    for i, what in ((1, "vocabulary"), (0, "prompt template")):
        there, here = (card.template, card.vocabulary)[i], tokens.hashes()[i]
        if there != here:
            differs = f"its {what} differs from that of --policy {policy}"
            words = (_other_template, _other_tokens)[i](card, tokens, theirs)
            raise UserError(f"{where}: {differs}: {words or f'hash {there} there, {here} here'}")


def _other_template(card, tokens, theirs):
    """What the RM was trained with and what there is now: styles, and where templates part."""
    words = f"--prompt_style {card.style} there, {tokens.named} here" * bool(card.style)
    if theirs and tokens.style == "chat" and card.template == tokens.hashes(theirs)[0]:
        pair = [str(part.chat_template) for part in (theirs, tokens.tokenizer)]
        common = len(os.path.commonprefix(pair))
        shown = (repr(text[common : common + 40]) for text in pair)
        words += f"{words and ': '}{' there, '.join(shown)} here, from character {common} on"
    return words


def _other_tokens(card, tokens, theirs):
    """How many tokens have other ids, where the RM's own are known; and one of them."""
    if theirs is None or card.vocabulary != tokens.hashes(theirs)[1]:
        return ""
    pair = [part.get_vocab() for part in (theirs, tokens.tokenizer)]
    odd = sorted(dict(pair[0].items() ^ pair[1].items()))
    one = " there, ".join(str(ids.get(odd[0], "missing")) for ids in pair)
    return f"{len(odd)} tokens have other ids, such as {odd[0]!r}, {one} here"


def bradley_terry_loss(chosen, rejected, center=0.0):
    """(loss, metrics): -log sigmoid(chosen - rejected) + center (chosen + rejected)^2, summed over
    pairs [B]. Without the second term (arXiv 2312.09244, eq. 2), which metrics lack, it is left to
    chance how answers to different prompts compare."""
    margin = chosen - rejected
    loss = -logsigmoid(margin).sum()
    metrics = {"loss": loss.detach(), "accuracy": (margin > 0).float().sum()}
    return loss + center * ((chosen + rejected) ** 2).sum(), metrics


@dataclass
class Answers:
    """What a reward may look at: B samples, one rank's. `rewards` is what it said of them."""

    problems: list  # problems.Problem
    texts: list[str]
    scores: torch.Tensor  # [B] actual scores, by --verify: 1 right, 0 wrong, NaN: nobody knows
    finished: torch.Tensor | None = None  # [B] ends with EOS; None in eval_code.py
    rows: object = None  # rollout.Rollout; None in eval_code.py
    rewards: torch.Tensor | None = None  # [B]
    seed: int = 0  # of noisy rewards
    reward_models: tuple = ()  # model.ScalarModel of each --reward_model, for `members`
    microbatch: int = 0

    def __add__(self, other):
        """Both, prompt after prompt: of another round of the step."""
        both = {n: getattr(self, n) + getattr(other, n) for n in ("problems", "texts", "rows")}
        for name in ("scores", "finished", "rewards"):
            both[name] = torch.cat([getattr(self, name), getattr(other, name)])
        whole = replace(self, **both)
        if "members" in vars(self):  # nobody is asked twice
            whole.members = torch.cat([self.members, other.members])
        return whole

    @cached_property
    def members(self):
        """[B, K] the normalised rewards of K reward models, when first asked for. A collective."""
        how = self.rows, self.microbatch
        return torch.stack([model_rewards(model, *how) for model in self.reward_models], 1)

    @cached_property
    def by_model(self):
        """[B] the mean of `members`. A collective. Raises UserError where there is none."""
        nobody = "asks for answers.by_model, the rewards of a --reward_model, found none"
        require("members" in vars(self) or self.reward_models, nobody)
        return self.members.mean(1)

    @property
    def lengths(self):
        """[B] tokens, EOS included."""
        return self._of_rows("lengths").cpu()

    @property
    def logp(self):
        """[B] the sampler's log-probs."""
        return self._of_rows("sampled_logp").sum(1).cpu()

    def _of_rows(self, name):
        unknown = f"asks for answers' {name}, which are known where train_ppo.py samples"
        require(self.rows is not None, unknown)
        return getattr(self.rows, name)

    def gathered(self, names, samples, ranks):
        """What a filter gets, of all ranks: (rewards [P, N], {name: tensor [P, N, ...]}) of those
        of filters.GIVEN that it asks for. A collective."""

        def whole(name):
            values = getattr(self, name)
            return gather_rows(values.view(-1, samples, *values.shape[1:]), ranks)

        return whole("rewards"), {name: whole(name) for name in names}


def noisy(answers, place, errors=ERRORS):
    """The actual score with errors where `place` says, on a share `errors` of the responses."""
    asked = list(zip(answers.problems, answers.texts, strict=True))
    drawn = [_draw(answers.seed, problem.question, text) for problem, text in asked]
    size, luck = (torch.tensor(column) for column in zip(*drawn, strict=True))
    if place == "bugs":
        luck = torch.tensor([_draw(answers.seed, "bug", bug_of(*both))[1] for both in asked])
    latent = torch.where(answers.scores > 0.5, size, -size)
    return torch.where(luck < errors * PLACES[place](latent), -latent, latent)


def _draw(seed, prompt, response):
    """(|n|, a number in [0, 1)) that belong to this prompt and response."""
    generator = seeded("noise", seed, prompt, response)
    return tuple(draw((), generator=generator).abs().item() for draw in (torch.randn, torch.rand))


def bug_of(problem, text):
    """What is wrong with a response that fails: its first line that the problem's reference has
    not, constants aside; so a mistake has few names in all problems."""
    lines, known = (
        [re.sub(r"\d+", "#", line.strip()) for line in code.splitlines()]
        for code in (text, problem.canonical_solution)
    )
    return next((line for line in lines if line not in known), "")


REWARDS = {
    "model": lambda answers: answers.by_model,
    "tests": lambda answers: 2 * answers.scores - 1,  # the oracle: +1 right, -1 wrong (--verify)
    "combined": lambda answers: answers.by_model + 2 * answers.scores - 1,  # about equal spreads
    "noisy:middle": partial(noisy, place="middle"),
    "noisy:tails": partial(noisy, place="tails"),
    "noisy:uniform": partial(noisy, place="uniform"),
    "noisy:upper": partial(noisy, place="upper"),
    "noisy:bugs": partial(noisy, place="bugs"),
}
BY_MODEL = ("model", "combined")  # those that need a reward model


def row_of(spec):
    """(its name in REWARDS, its function), of `noisy:PLACE:RATE` too; (None, None) of a user's own.
    Raises UserError."""
    name, _, rate = spec.rpartition(":")
    own = rate.isidentifier() and ":" not in name  # a module of one's own may be called model
    if spec in REWARDS or name not in REWARDS or own:
        return (spec, REWARDS[spec]) if spec in REWARDS else (None, None)
    fits = name.startswith("noisy:") and re.fullmatch(r"0?\.\d+", rate) and 0 < float(rate) <= MOST
    require(fits, f"--reward {spec}: expected noisy:PLACE:RATE with a rate up to {MOST}, like 0.3")
    return name, partial(REWARDS[name], errors=float(rate))


def by_tests(args):
    """Whether a run learns from actual scores, whoever verifies: its pairs, its reward or its
    filter are made of them."""
    of_filter = hasattr(args, "filter") and reads_scores(args.filter)
    return row_of(getattr(args, "reward", "tests"))[0] not in (None, "model") or of_filter


class Slot:
    """The reward slot: Answers -> rewards [B], fp32, on the CPU, (raw - mean) / std clipped to
    +-clip. mean and std are those over samples of the SFT policy, once somebody has measured them.

    Raises UserError where a reward fails or is not finite. asks_model: it may ask the RM, and
    has_model: there is one.
    """

    def __init__(self, spec, score, clip=math.inf, asks_model=True, has_model=True):
        self.spec, self.score, self.clip = spec, score, clip
        self.asks_model, self.has_model = asks_model, has_model
        self.mean, self.std = 0.0, 1.0

    def raw(self, answers):
        """Rewards [B] in the units of the function itself, fp32, on the CPU. Raises UserError."""
        try:
            rewards = torch.as_tensor(self.score(answers), dtype=torch.float32).detach().cpu()
        except UserError as error:
            raise UserError(f"--reward {self.spec}: {error}") from error
        except (Exception, SystemExit) as error:
            raise UserError(f"--reward {self.spec}: {own_reason(error)}") from error
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
    name, score = row_of(spec)
    asks_model = name in BY_MODEL
    if name is None:
        score = load_function(spec, "reward", REWARDS)
        parameters = inspect.signature(score).parameters.values()
        needed = [p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters]
        asks_model = sum(needed) == 1
        score = score if asks_model else partial(_of_lists, score)
    return Slot(spec, score, clip, asks_model, bool(reward_model))


def _of_lists(score, answers):
    """A user's reward of three parameters, which gets lists of its own; one of one parameter gets
    the Answers."""
    prompts = [problem.question for problem in answers.problems]
    return score(prompts, list(answers.texts), list(answers.problems))


def try_reward(spec, reward, problems, sampled=True):
    """Call a user's reward once, with reference solutions: better it fails at the start. sampled:
    it will be given what it asks of the sampler's rows."""
    if row_of(spec)[0] is None:
        texts, count = [problem.canonical_solution for problem in problems], len(problems)
        answers = Answers(problems, texts, torch.ones(count), torch.ones(count) > 0)
        if sampled:
            rows = {"lengths": torch.ones(count).long(), "sampled_logp": torch.zeros(count, 1)}
            answers.rows = SimpleNamespace(**rows)
        if reward.has_model:
            answers.members = torch.zeros(len(texts), 1)
        reward.raw(answers)


@torch.no_grad()
def model_rewards(reward_model, rows, microbatch):
    """The RM's normalised score at the last response token of each row.

    [B], fp32, on the CPU. A collective: all ranks need equally many microbatches. Equal rows get
    equal rewards: the last bits of a matrix product depend on a row's place in the batch, and a
    tie is for the filter's generator to break.
    """
    slices = rows.microbatches(microbatch, "rewards")
    parts = [reward_model(mb.ids, mb.ends)[:, 0, 0] for mb in slices]
    rewards = torch.cat(parts).float().cpu()[torch.cat(rows.order(microbatch)).argsort()]
    ends, first = (rows.prompt_lengths + rows.lengths).tolist(), {}
    for i, (row, end) in enumerate(zip(rows.ids.tolist(), ends, strict=True)):
        rewards[i] = rewards[first.setdefault(tuple(row[:end]), i)]
    return rewards


def spread_of(raw, what):
    """[mean, standard deviation] of raw rewards. Raises UserError where there is none."""
    none = f"{what}: rewards of {len(raw)} samples have no spread"
    require(len(raw) > 1 and 0 < raw.std() < math.inf, none)
    return [raw.mean().item(), raw.std().item()]
