"""What can be told of a command line before anything is made or downloaded, which takes minutes: a
mistake in a file, a folder or a function of the user's own, and what does not go with the lab.

What needs a tokenizer or the problems of a lab that is not there yet is told later, and what needs
neither is read twice, but only where something is to come.
"""

import os

from pfppo import data, fsdp
from pfppo.config import is_hub_id, model_folders, require, told_in
from pfppo.files import read_jsonl, short_hash
from pfppo.lab import default, world
from pfppo.model import check_folder, read_config
from pfppo.problems import (
    FORMS,
    few_shot_prompts,
    load_pairs,
    load_problems,
    load_prompts,
    load_samples,
    load_verifier,
    only_text,
    own_template,
)
from pfppo.reward import by_tests, load_card, try_reward
from pfppo.rollout import require_enough

MODELS = ("policy", "reward_model")


def check(args, ranks, reward_of=None):
    """Raise UserError where something that `args` name is wrong, or does not go with the lab: files
    and folders are read before anything is made or downloaded, if anything is; so is a reward of
    the user's own tried. A collective."""
    named = default.named(args)
    with fsdp.agreed(ranks):
        verifier = load_verifier(args.verify)
        check_fits(args)
        later = {name for name, path in named if is_to_come(name, path)}
        if not later:
            return
        problems = check_files(args, verifier, later)
        if not later <= {*MODELS}:
            verifier.check(list(world.draw_problems("tried", "train", 2)), "the lab's problems")
        for name, path in model_folders(args):
            if is_to_come(name, path):
                continue
            check_folder(path, name)
            if name == "policy" or not load_card(path):
                data.load_tokenizer(path, name)
        if reward_of:
            problems = problems or list(world.draw_problems("tried", "train", 2))
            try_reward(args.reward, reward_of, problems[:2], hasattr(args, "prompts_per_step"))


def is_to_come(option, path):
    """Whether it is made, or downloaded, before it is used."""
    made = default.is_ours(path) or option in MODELS and is_hub_id(path)
    return made and not os.path.exists(path)


def check_fits(args):
    """Raise UserError where options ask more of the lab's policy than it has."""
    models = model_folders(args)
    ours = {name: path for name, path in models if default.is_ours(path)}
    for one, other in (MODELS, MODELS[::-1]):
        theirs = [p for name, p in models if name == other and not default.is_ours(p)]
        for path in theirs if one in ours else []:
            hub = is_hub_id(path)
            rows = None if hub else read_config(path, other).get_text_config().vocab_size
            what = f"--{one} is the lab's, whose tokens are not those of --{other} {path}"
            advice = "name the policy that it was trained from"
            if other == "policy":
                advice = "train one from it (train_rm.py --policy), or give --reward tests and "
                advice += "--reward_model ''"
            fits = rows == default.VOCABULARY
            fits = fits and (os.path.exists(ours[one]) or _has_its_tokens(path, other))
            require(fits, f"{what}: {advice}")
    if "policy" in ours:
        bare = "--prompt_style chat: the tokenizer of the lab's policy has no chat template"
        require(args.prompt_style != "chat", bare)
        new, most = args.max_new_tokens, default.POSITIONS
        beyond = f"--max_new_tokens {new}: expected less than {most}, the lab's policy's positions"
        require(new < most, beyond)


def _has_its_tokens(path, option):
    """Whether a folder has the tokens that the lab will have."""
    check_folder(path, option)  # what is wrong with the folder itself is told first
    ours, card = default.make_tokenizer().get_vocab(), option == "reward_model" and load_card(path)
    if card:  # it need not have a tokenizer beside it
        return card.vocabulary == short_hash(sorted(ours.items()))
    return data.load_tokenizer(path, option).get_vocab() == ours


def check_files(args, verifier, later=()):
    """Read the files that a command line names, but those of options `later`, as far as that needs
    no model: a mistake is better told before one is made or downloaded. Returns the problems to
    learn from, or to be asked. Raises UserError."""

    def named(option):
        return getattr(args, option, "") if option not in later else ""

    asked = []
    for option in ("test", "validation", "prompts"):
        if named(option):
            tested = option != "prompts" or by_tests(args)
            asked = data.problems_of(args, option, tested)
    if named("prompts") and hasattr(args, "prompts_per_step"):
        require_enough(args, len(asked))
    if path := named("problems"):
        form = args.benchmark if args.benchmark in FORMS else ""
        asked = load_problems(path, form, not args.samples, verifier)
        if args.prompt_style == "few_shot":
            few_shot_prompts(asked, load_prompts(path))
    if path := named("samples"):
        ids = [str(task) for _, task, _ in load_samples(path)]
        other = [task for task in ids if "problems" in later and not task.startswith("lab/test/")]
        what = f"task_id {other[:1]} is none of the lab's problems"
        require(not other, f"--samples {path}: {what}: name their file, --problems FILE")
    if path := named("contamination"):
        read_jsonl(path)
    if path := named("pairs"):
        pairs = load_pairs(path, say=lambda line: None)  # said when it is read in earnest
        chat = args.prompt_style == "chat" or own_template(args.prompt_style)
        for line, (prompt, *_) in [] if chat else pairs:
            with told_in(f"{path}, line {line}"):
                only_text(prompt)
    return asked
