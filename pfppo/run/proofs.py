"""What is taken for granted of a model, tried on two tiny rows before anything is made.

Families differ in ways that no list holds: layers between backbone and head, positions that count
from the left edge, attention that looks ahead, arguments of `forward` that are missing. A model
that fails is refused in one line. (`selfcheck` looks at real rows, and at what training does.)

Not covered: what shows beyond seven tokens, such as frequencies that change with the length.
"""

import contextlib

from pfppo.config import UserError, parts, reason, require
from pfppo.loading import load_scalars
from pfppo.model import LEAST
from pfppo.rollout import collate, seeded
from pfppo.sampler import decode_one, prefill
from pfppo.slots import Slots

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def apart(logp, expected, dtype):
    """(how far log-probs [tokens] are apart, the limit of what rounding explains), in nats.

    In fp32 the largest difference counts; in bf16 the mean, as single tokens may be far off. An
    error e of the logits moves a log-prob by about e (1 - p), so the mean's limit is in 1 - p.
    """
    differences = (logp - expected).abs().double()
    if dtype == torch.float32:
        return differences.max().item(), 1e-3
    return differences.mean().item(), 0.03 * max((1 - expected.exp()).mean().item(), 1e-3)


def prove_models(models, tokens, args, device):
    """`prove_policy` and `prove_scalar` of loading.Models. A collective."""
    with models.gathered(models.policy) as lm:
        prove_policy(lm, tokens, models.policy)
    named = [("reward_model", path) for path in parts(args.reward_model)]
    named.append(("policy", args.policy))
    for scalar, (option, path) in zip((*models.reward_models, models.critic), named, strict=True):
        if scalar is not None:
            prove_scalar(scalar, tokens, option, path, device)


def proven_judges(args, tokens, ranks):
    """The ScalarModel of every --reward_model, loaded and proved. A collective."""
    judges = []
    for path in parts(args.reward_model):
        judges += load_scalars(args, tokens, ranks, [False], path)
        prove_scalar(judges[-1], tokens, "reward_model", path, ranks.device)
    return judges


@contextlib.contextmanager
def proving(option, path):
    """Whatever fails inside is a UserError that says what the model cannot be used as."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else reason(error)
        what = f"--{option} {path}: cannot be used here, where a causal decoder is needed"
        raise UserError(f"{what}: {why}") from error


def two_rows(tokens, *others):
    """Two rows of ids that may be sampled and are none of `others`, of 7 and 4 tokens."""
    taken = {*tokens.stop, *tokens.never, *others}
    usable = [i for i in range(tokens.rows) if i not in taken]
    drawn = torch.randint(len(usable), (11,), generator=seeded("proof"))
    ids = [usable[i] for i in drawn]
    return ids[:7], ids[7:]


def prove_policy(lm, tokens, policy=None):
    """Raise UserError unless a causal LM looks back only, gives the same logits padded on the left
    and with its cache, and, if it is given as a sharded Policy too, the same log-probs there."""
    device, dtype = next(lm.parameters()).device, next(lm.parameters()).dtype

    def compare(what, logp, expected):
        difference, limit = apart(logp, expected, dtype)
        far = f"{what} differ by {difference:.2g} nats, expected at most {limit:.2g}"
        require(difference <= limit, far)

    def logp_of(logits):
        logits[:, tokens.never] = LEAST
        return logits.float().log_softmax(-1)

    with proving("policy", tokens.policy):
        rows = two_rows(tokens)

        def forward(row):
            return logp_of(lm(input_ids=torch.tensor([row], device=device)).logits[0])

        alone, other = [forward(row) for row in rows], rows[1][-1]
        changed = forward([*rows[0][:-1], other])[:-1]
        compare("log-probs before another last token", changed, alone[0][:-1])
        prompts = prefill(lm, [row[:-1] for row in rows])
        expected = torch.stack([x[-2] for x in alone])
        compare("log-probs with padding on the left", logp_of(prompts.logits), expected)
        slots = Slots(2, 2, max(map(len, rows)), 2, tokens.stop, device)
        slots.refill(prompts, [(0, 0), (1, 1)])
        slots.token = torch.tensor([row[-1] for row in rows], device=device)
        expected = torch.stack([x[-1] for x in alone])
        compare("log-probs from the cache", logp_of(decode_one(lm, slots)), expected)
        if policy is not None:
            prompts, responses = zip(*((row[:2], row[2:]) for row in rows), strict=True)
            batch = collate(prompts, responses, tokens.pad, device)
            logp, _ = policy(batch.ids, batch.states, batch.responses, batch.mask)
            pairs = zip(alone, responses, strict=True)
            expected = torch.cat([x[range(1, 1 + len(y)), y] for x, y in pairs])
            compare("log-probs as training has them", logp[batch.mask > 0], expected)


def prove_scalar(scalar, tokens, option, path, device):
    """Raise UserError unless the scalars of a row are those of the row alone, and of its start, and
    the last one is the score that the classifier itself gives. A collective."""
    rows = two_rows(tokens, scalar.classifier.config.get_text_config().pad_token_id)
    with proving(option, path):
        batch = collate([row[:1] for row in rows], [row[1:] for row in rows], tokens.pad, device)
        places = torch.arange(batch.ids.shape[1], device=device)[None]
        beside = scalar(batch.ids, places.expand(2, -1))[..., 0]
        spread = torch.cat([x[: len(row)] for row, x in zip(rows, beside, strict=True)]).std()

        def compare(what, scalars, expected):
            share = ((scalars - expected).abs().max() / spread).item()
            require(share <= 0.1, f"{what} differ by {share:.2g} of the scalars' spread")

        for row, scalars in zip(rows, beside, strict=True):
            for length in (len(row), len(row) - 1):
                ids = torch.tensor([row[:length]], device=device)
                alone = scalar(ids, places[:, :length])[0, :, 0]
                compare("scalars of a row alone and beside a longer one", scalars[:length], alone)
                compare("scores here and of the classifier itself", alone[-1:], scalar(ids)[0, 0])


def plain(cls, path, dtype, rows):
    """A model as transformers reads its folder, for which no id is padding; rows one by one."""
    model = cls.from_pretrained(path, dtype=dtype).to(rows.ids.device).eval()
    model.config.get_text_config().pad_token_id = -1
    ends = (rows.prompt_lengths + rows.lengths).tolist()
    return model, [ids[None, :end] for ids, end in zip(rows.ids, ends, strict=True)]


@torch.no_grad()
def plain_logp(path, rows, dtype, never, temperature):
    """Log-probs of all response tokens, [tokens], by transformers' own reading of a folder."""
    lm, alone = plain(AutoModelForCausalLM, path, dtype, rows)
    parts = []
    for ids, start in zip(alone, rows.prompt_lengths.tolist(), strict=True):
        logits = lm(input_ids=ids).logits[0, start - 1 : -1].float()
        logits[:, never] = LEAST
        parts.append((logits / temperature).log_softmax(-1).gather(1, ids[0, start:, None])[:, 0])
    return torch.cat(parts)


@torch.no_grad()
def plain_scores(path, rows, dtype):
    """Scores of a reward model's folder, [B], by transformers' own reading of it."""
    scalar, alone = plain(AutoModelForSequenceClassification, path, dtype, rows)
    return torch.stack([scalar(input_ids=ids).logits[0, 0].float() for ids in alone])
