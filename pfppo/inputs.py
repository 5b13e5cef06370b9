"""What a PPO run reads besides weights, all of it checked before anything long begins.

Not covered: prompts that change while a run goes on.
"""

from dataclasses import dataclass

from pfppo import data
from pfppo.config import require
from pfppo.model import check_positions
from pfppo.reward import BY_TESTS
from pfppo.sampler import check_cache, stop_ids


@dataclass(frozen=True)
class Inputs:
    """Problems with their prompts as token ids, and what token ids mean."""

    tokenizer: object
    stop: list[int]  # end-of-sequence ids
    pad_id: int
    problems: list  # benchmarks.Problem
    prompts: list[list[int]]
    validation: tuple  # (problems, prompts)
    test: tuple


def read_inputs(args):
    """Inputs from --policy, --prompts, --validation, --test. Raises UserError."""
    tokenizer = data.load_tokenizer(args.policy)
    data.check_style(tokenizer, args.prompt_style, args.policy)
    check_cache(args.policy)
    how = tokenizer, args.prompt_style, args.max_prompt_tokens
    problems, prompts = data.load_rendered(args.prompts, *how)
    validation, test = (data.load_rendered(path, *how) for path in (args.validation, args.test))
    require(
        args.prompts_per_step <= len(problems),
        f"--prompts_per_step {args.prompts_per_step}: more than the {len(problems)} prompts of "
        f"{args.prompts}",
    )
    tested = {"validation": validation[0], "test": test[0]}
    tested |= {"prompts": problems} if args.reward in BY_TESTS else {}
    for name, asked in tested.items():
        lacking = [problem.task_id for problem in asked if not problem.test][:1]
        path = getattr(args, name)
        require(not lacking, f"--{name} {path}: {lacking} has no 'test' and 'entry_point'")
    longest = max(map(len, prompts + validation[1] + test[1])) + args.max_new_tokens
    for name in ("policy", "reward_model"):
        if getattr(args, name):
            check_positions(getattr(args, name), name, longest)
    stop, pad_id = stop_ids(args.policy, tokenizer), data.pad_id_of(tokenizer)
    return Inputs(tokenizer, stop, pad_id, problems, prompts, validation, test)
