"""Text and token ids: one reading of a tokenizer for RM, PPO and evaluation.

A prompt may be a dialogue, a list of messages: it is rendered as it stands, and its answer is
executed as a whole program, not as what continues the prompt. A response's ids are those that the
policy would have written, with EOS.

Not covered: streaming, prompts that change while a run goes on.
"""

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from pfppo.config import UserError, model_folders, reason, require, require_folder, told_in
from pfppo.files import is_pointer, name_eos, no_tokenizer, short_hash
from pfppo.model import check_cache, read_config, room_of, stop_ids
from pfppo.problems import (
    load_prompts,
    load_verifier,
    marks_thought,
    only_text,
    own_template,
    prompt_text,
)
from pfppo.reward import by_tests
from pfppo.rollout import require_enough

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

BORDERS = '\n):a1"#'  # something in front of a response that no token of its joins
PLAIN = {"clean_up_tokenization_spaces": False}
NAMES_OF_SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")  # files that say EOS


def load_tokenizer(path, option="policy"):
    """The tokenizer in a directory. Raises UserError where there is none, or it has no EOS.

    Where there is a tokenizer.json it counts. The class that transformers chooses by the model's
    family or by a name in tokenizer_config.json may cut text otherwise, or even lose its blanks.
    What it puts around a text (BOS) stays, if its ids are the file's. Where it stands alone, EOS is
    what the model's configuration names, if that is a special token.
    """
    require_folder(path, option)
    here, folder = f"--{option} {path}: cannot read the tokenizer: ", Path(path)
    absent = no_tokenizer(folder)
    require(not absent, here + absent)
    alone = not any((folder / name).is_file() for name in NAMES_OF_SPECIAL)
    try:
        kind = PreTrainedTokenizerFast if alone else AutoTokenizer
        tokenizer = kind.from_pretrained(path, trust_remote_code=False)
        file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        if file and isinstance(tokenizer, PreTrainedTokenizerFast):
            chosen, said = tokenizer.backend_tokenizer, Tokenizer.from_file(file)
            if _rules(chosen) != _rules(said):
                tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
                if said.get_vocab().items() <= chosen.get_vocab().items():
                    tokenizer.backend_tokenizer.post_processor = chosen.post_processor
    except Exception as error:  # a damaged file fails in a dozen ways
        pointer = is_pointer(folder / "tokenizer.json")
        raise UserError(here + (pointer or reason(error))) from error
    if tokenizer.eos_token_id is None:
        name_eos(tokenizer, path, option)
    return tokenizer


def _rules(tokenizer):
    """How a tokenizer of `tokenizers` cuts text and puts it together again."""
    whole = json.loads(tokenizer.to_str())
    return [whole[name] for name in ("normalizer", "pre_tokenizer", "model", "decoder")]


@dataclass(frozen=True)
class Tokens:
    """What token ids mean to the policy of a command line: one reading for sampling, training, RM
    and evaluation."""

    policy: str  # the folder
    tokenizer: object  # of transformers
    stop: list[int]  # ids that end a response: of the policy's folder, as `generate`, and `end`
    end: int  # the one of them that ends a turn in this style
    pad: int  # fills rows up: masks come from lengths, so any id will do
    rows: int  # ids below are known to policy and reward model
    never: list[int]  # ids that are not sampled: no token has them, or a model lacks them
    style: str  # --prompt_style; "chat" too where that is a file: the tokenizer has its template
    named: str  # --prompt_style as it was given
    limit: int  # tokens that a prompt may have
    limited_by: str = "--max_prompt_tokens"

    @classmethod
    def of(cls, args, say=print):
        """Those of --policy (and --reward_model). Raises UserError where it cannot sample, or lacks
        a template."""
        path, style, tokenizer = args.policy, args.prompt_style, load_tokenizer(args.policy)
        if own := own_template(style):
            style, tokenizer.chat_template = "chat", own
        bare = f"--prompt_style chat: the tokenizer of --policy {path} has no chat template"
        require(style != "chat" or tokenizer.chat_template, bare)
        if style == "plain" and tokenizer.chat_template:
            say(f"hint: --policy {path} has a chat template, but --prompt_style is plain")
        check_cache(path)
        configs = [read_config(folder, name) for name, folder in model_folders(args)]
        sizes = [config.get_text_config().vocab_size for config in configs]  # of the embeddings
        ends, rows = stop_ids(path, tokenizer), min(sizes)
        ends = [i for i in ends if i < rows]
        none = f"--policy {path}: no end-of-sequence id is below the {rows} rows of its table"
        require(ends, none)
        end = end_of_turn(tokenizer, ends, style)
        end = end if end < rows else end_of_turn(tokenizer, ends, "plain")
        stop = sorted({*ends, end})
        if stop != ends:  # EOS of the model that was trained on the template, as a rule
            token = tokenizer.convert_ids_to_tokens(end)
            say(f"--policy {path}: {token!r}, the end of a turn in its chat template, is EOS too")
        named = {*tokenizer.get_vocab().values(), *ends}
        never = [i for i in range(sizes[0]) if i not in named or i >= rows]
        if never:
            why = "no token has them, or the reward model has no row for them"
            say(f"--policy {path}: {len(never)} of {sizes[0]} ids are never sampled: {why}")
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, *stop)
        pad = next(i for i in fillers if i is not None and i < rows)
        room = room_of(args)
        named = args.prompt_style
        return cls(path, tokenizer, stop, end, pad, rows, never, style, named, *room)

    @property
    def classifier_pad(self):
        """The pad id for an exported reward model. transformers' classifiers read the score before
        the padding that they find at the end, so it must not be one of the `stop` ids: the last
        token that is no padding is the response's EOS. None: there is no such id; they then take
        single rows."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.bos_token_id)
        known = (i for i in known if i is not None and i < self.rows and i not in self.stop)
        return next(known, None)

    def rendered(self, prompts, say=None, advice=""):
        """`render` of each of [(where, prompt)]; those that are too long are left out, None here,
        and say(line) is told. Without `say`, or where none is left, they are a UserError."""
        rows = []
        for where, prompt in prompts:
            with told_in(where):
                ids = render(prompt, self.tokenizer, self.style)
            require(ids, f"{where}: prompt of 0 tokens, expected 1 at least")
            rows.append(self._known(ids, where))
        sizes = [len(ids) for ids in rows]
        if long := [i for i, size in enumerate(sizes) if size > self.limit]:
            where, most = prompts[long[0]][0], f"at most {self.limit} ({self.limited_by})"
            first = f"{where}: prompt of {sizes[long[0]]} tokens, expected {most}"
            others = f"{len(long)} of {len(rows)} are longer, up to {max(sizes)} tokens"
            require(say and len(long) < len(rows), f"{first}; {others}{advice}")
            say(f"left out: {first}; {others}")
        return [ids if len(ids) <= self.limit else None for ids in rows]

    def _known(self, ids, where):
        """The ids, if the models' tables have rows for all of them."""
        for i in ids:
            if i >= self.rows:
                token = self.tokenizer.convert_ids_to_tokens(i)
                rows = f"the {self.rows} rows of the models' tables"
                raise UserError(f"{where}: token {token!r} has id {i}, beyond {rows}")
        return ids

    def response(self, prompt, text, where):
        """A response's ids as the policy would have written them behind the prompt's ids: with the
        blank that some tokenizers put first, or not; in "chat" with what the template puts around a
        turn, up to its end; with an end, unless it brings its own."""
        borders = [self.tokenizer.decode(prompt, **PLAIN), *BORDERS, ""]
        if self.style == "chat":
            start, whole = _dialogue(self.tokenizer), _dialogue(self.tokenizer, text)
            turn = whole[len(start) :]
            # One that strips an indent, or a thought, would change what was said.
            if start and whole.startswith(start) and text.rstrip() in turn:
                borders, text = [start, *borders], turn
        for before in borders:
            start = encode(self.tokenizer, before) if before else []
            whole = encode(self.tokenizer, before + text)
            if whole[: len(start)] == start:  # else a token crosses the border
                break
        ids = whole[len(start) :]
        length = self._length(ids)
        return self._known([*ids[:length], *(ids[length : length + 1] or [self.end])], where)

    def _length(self, ids):
        """Tokens before the first stop id."""
        return next((i for i, token in enumerate(ids) if token in self.stop), len(ids))

    @functools.cached_property
    def silent(self):
        """Ids of special tokens that have no text."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {i for i, token in added if token.special and not marks_thought(token.content)}

    def decode(self, prompts, responses):
        """Texts of responses behind their prompts (lists of ids), up to their stop id.

        Some tokenizers drop the first blank of a text (SentencePiece: Llama 2, Mistral, ...), which
        in code is an indent: so prompt and response are decoded together, and the prompt cut off.
        Special tokens have no text, but for marks of thought.
        """
        texts = []

        def said(ids):
            return self.tokenizer.decode([i for i in ids if i not in self.silent], **PLAIN)

        for prompt, ids in zip(prompts, responses, strict=True):
            ids = ids[: self._length(ids)]
            before, whole = said(prompt), said([*prompt, *ids])
            texts.append(whole[len(before) :] if whole.startswith(before) else said(ids))
        return texts

    def hashes(self, tokenizer=None):
        """(template, vocabulary): 12 hex digits each that change when prompts are rendered
        differently, or any token has another id; of another tokenizer where given."""
        tokenizer = tokenizer or self.tokenizer
        template = [self.style, tokenizer.chat_template if self.style == "chat" else None]
        return short_hash(template), short_hash(sorted(tokenizer.get_vocab().items()))


def end_of_turn(tokenizer, stop, style):
    """The id with which a response ends: in "chat" the first stop id or added token that the
    template puts behind an assistant's turn, else the tokenizer's EOS, or the first there is."""
    if style == "chat":
        mark, added = "a response", tokenizer.added_tokens_decoder
        text = _dialogue(tokenizer, mark).partition(mark)[2]
        ends = {*stop, *(i for i, token in added.items() if token.content.strip())}
        if behind := [i for i in encode(tokenizer, text) if i in ends]:
            return behind[0]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in stop else stop[0]


def _dialogue(tokenizer, *answer):
    """A short dialogue in the chat template: up to where an answer begins, or with one."""
    turns = [{"role": "user", "content": "a prompt"}]
    turns += [{"role": "assistant", "content": text} for text in answer]
    with contextlib.suppress(Exception):  # a template may refuse such turns
        begins = not answer
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begins)
    return ""


def render(prompt, tokenizer, style):
    """A prompt's token ids: as it stands ("plain", "few_shot"), through the tokenizer's chat
    template ("chat"), or in DeepSeek-Coder's ("deepseek").

    prompt: text, or a dialogue as in problems/messages.py. Text is a user's turn in "chat"; a
    dialogue of more than one user's turn can only be rendered there. Raises UserError.
    """
    if style == "chat":
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and may refuse a system turn
            roles = ", ".join(turn["role"] for turn in turns)
            why = f"--prompt_style chat: the chat template refuses the messages ({roles}):"
            raise UserError(f"{why} {reason(error)}") from error
        return encode(tokenizer, text)
    text = only_text(prompt, style)
    # What the tokenizer puts first; what some put behind a text, EOS, would end a prompt.
    whole, bare = tokenizer("a")["input_ids"], encode(tokenizer, "a")
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    begin, ids = whole[: next(starts, 0)], encode(tokenizer, text)
    rendered = encode(tokenizer, text.lstrip())[: len(begin)] == begin  # one BOS is enough
    return ids if rendered else begin + ids


def encode(tokenizer, text):
    """The ids of a text alone."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class ProblemSet:
    """Problems and their prompts as token ids."""

    problems: list  # problems.Problem
    prompts: list[list[int]]

    @classmethod
    def of(cls, problems, source, tokens, texts=None, **how):
        """Those whose prompts are short enough; `texts` in place of prompts where given; how: as
        in `Tokens.rendered`."""
        texts = texts or [prompt_text(problem, tokens.style) for problem in problems]
        where = (f"{source}, task {problem.task_id}" for problem in problems)
        prompts = tokens.rendered(list(zip(where, texts, strict=True)), **how)
        pairs = zip(problems, prompts, strict=True)
        fit = [(problem, ids) for problem, ids in pairs if ids]
        return cls([problem for problem, _ in fit], [ids for _, ids in fit])

    def __len__(self):
        return len(self.problems)

    @property
    def longest(self):
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts), default=0)


def problems_of(args, option, tested=True, say=lambda line: None):
    """The problems of the file that an option names, of MBPP the split that belongs to it; none
    where it names none. tested: raise UserError where one lacks what --verify needs; that of
    another verifier than `tests` was asked for, and is always needed."""
    path, split = getattr(args, option), "train" if option == "prompts" else option
    problems = load_prompts(path, split, say) if path else []
    if problems and (tested or args.verify != "tests"):
        load_verifier(args.verify).check(problems, f"--{option} {path}")
    return problems


def read_problems(args, option, tokens, tested=True, say=lambda line: None):
    """ProblemSet of `problems_of`, without those whose prompts are too long, which is said."""
    problems = problems_of(args, option, tested, say)
    return ProblemSet.of(problems, getattr(args, option), tokens, say=say)


@dataclass(frozen=True)
class Inputs:
    """What a PPO run reads besides weights."""

    tokens: Tokens
    train: ProblemSet
    validation: ProblemSet
    test: ProblemSet

    @property
    def longest(self):
        """Tokens of the longest prompt."""
        return max(part.longest for part in (self.train, self.validation, self.test))


def read_inputs(args, say=print):
    """Inputs of train_ppo.py, checked before anything long begins. Raises UserError."""
    tokens = Tokens.of(args, say)
    train = read_problems(args, "prompts", tokens, by_tests(args), say)
    others = [read_problems(args, n, tokens, say=say) for n in ("validation", "test")]
    inputs = Inputs(tokens, train, *others)
    require_enough(args, len(train))
    learn, tested = f"{len(train)} to learn from", sum(bool(p.test) for p in train.problems)
    extra = "" if tested else ", ".join(train.problems[0].extra)
    learn += f" ({tested} with tests{extra and '; not read: ' + extra})" * (args.verify == "tests")
    say("problems: {}, {} for validation, {} for the test".format(learn, *map(len, others)))
    return inputs
