"""Answers and their marks: sample responses to problems from a model, and execute their tests.

`examine` is what evaluation, pair building and the RM's normaliser have in common; PPO's own
rollouts are in train_ppo.py, and share `execute`.
"""

from dataclasses import dataclass

from pfppo import metrics
from pfppo.batch import collate, owned
from pfppo.benchmarks import assemble
from pfppo.data import decode
from pfppo.fsdp import gather_lists
from pfppo.rundir import write_json
from pfppo.sampler import draw_uniforms, sample
from pfppo.sandbox import Verdict

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Answer:
    """One response. `verdict` is None where its problem has no tests."""

    ids: list[int]  # EOS included where there is one
    text: str
    finished: bool
    verdict: Verdict | None

    @property
    def passed(self):
        return self.verdict is not None and self.verdict.passed


@dataclass
class Examiner:
    """What stays the same from one examination to the next."""

    tokenizer: object
    stop: list[int]  # end-of-sequence ids
    sandbox: object
    ranks: object
    seed: int
    max_new_tokens: int
    batch: int = 256  # rows that decode together

    def draw(self, model, prompts, tag, temperature, samples=1, first=0, **how):
        """Sample from `model`, for this rank's share of the prompts (token ids), no collective.

        tag, and the prompt's number counted from `first`, say which draw this is: they are hashed
        with the seed. how: top_k, top_p, progress. Returns sampler.Samples and (prompt, sample)
        of its rows.
        """
        mine = owned(len(prompts), self.ranks.rank, self.ranks.world)
        rows = [(i, j) for i in mine for j in range(samples)]
        drawn = sample(
            model,
            [prompts[i] for i in mine],
            draw_uniforms(self.seed, tag, [(first + i, j) for i, j in rows], self.max_new_tokens),
            stop=self.stop,
            samples_per_prompt=samples,
            temperature=temperature,
            batch=self.batch,
            **how,
        )
        return drawn, rows

    def __call__(self, model, problems, prompts, tag, temperature, samples=1, bars=False):
        """`samples` answers to each problem, on all ranks: [[Answer] * samples] * problems.

        bars: show progress on rank 0; the rest as in `draw`.
        """
        total = len(owned(len(problems), self.ranks.rank, self.ranks.world)) * samples
        quiet = {"total": total, "mininterval": 1, "disable": not (bars and self.ranks.is_main)}
        with tqdm(desc="samples", **quiet) as bar:
            how = {"samples": samples, "progress": bar.update}
            drawn, rows = self.draw(model, prompts, tag, temperature, **how)
        texts = [decode(ids, self.tokenizer) for ids in drawn.ids]
        with tqdm(desc="tests", **quiet) as bar:
            asked = [problems[i] for i, _ in rows]
            verdicts = execute(asked, texts, self.sandbox, bar.update)
        answers = list(map(Answer, drawn.ids, texts, drawn.finished, verdicts))
        groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
        return gather_lists(groups, self.ranks)

    def rows(self, model, problems, prompts, temperature, pad_id):
        """One answer to each problem, as a Rollout on every rank."""
        groups = self(model, problems, prompts, "rows", temperature)
        return collate(prompts, [a.ids for (a,) in groups], pad_id, self.ranks.device)

    def passed(self, model, problem_set, temperature):
        """[problems] 1.0 or 0.0 for one answer to each; problem_set: (problems, prompts)."""
        answers = self(model, *problem_set, f"evaluation {temperature}", temperature)
        return torch.tensor([float(answer.passed) for (answer,) in answers])

    def compare(self, policies, problem_set, temperature, path):
        """Print a table of pass rates, greedy and sampled, and write it to a JSON file.

        policies: {name: context that gives a model}.
        """
        rates, count = {}, len(problem_set[0])
        self.ranks.say(f"test: before, best and last on {count} problems")
        for name, opened in policies.items():
            with opened as model:
                rates[name] = {
                    kind: metrics.pass_rate(self.passed(model, problem_set, heat))
                    for kind, heat in (("greedy", 0.0), ("sampled", temperature))
                }
        self.ranks.say(metrics.table(rates, count))
        if self.ranks.is_main:
            write_json(path, {"problems": count, "rates": rates})


def execute(problems, texts, sandbox, progress=None):
    """Verdicts of the responses `texts` to `problems`; None where a problem has no tests."""
    tested = [i for i, problem in enumerate(problems) if problem.test]
    checks = [assemble(problems[i], texts[i]) for i in tested]
    verdicts = dict(zip(tested, sandbox.run(checks, progress) if checks else [], strict=True))
    return [verdicts.get(i) for i in range(len(texts))]


def scores_of(verdicts):
    """Actual scores [B]: 1 passed, 0 failed, NaN without tests."""
    scores = [float("nan") if v is None else float(v.passed) for v in verdicts]
    return torch.tensor(scores, dtype=torch.float32)
