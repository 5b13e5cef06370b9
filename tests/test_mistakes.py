"""What a user can get wrong in the three scripts: one line, before anything is made."""

import json
import shutil

import eval_code
import train_ppo
import train_rm
from pfppo import loading
from pfppo.config import UserError
from pfppo.lab import default as lab

import pytest
from conftest import words_of
from ranks import refused
from running import options, run
from test_eval_code import asked
from test_train_rm import rm_words

OWN = "def broken(prompts, responses, problems):\n    return [1 / 0] * len(prompts)\n"
BROKEN = '{"prompt": "a"}\n{"prompt'
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
USERS = {  # files that a user brings
    "broken.jsonl": BROKEN,
    "bare.jsonl": '{"prompt": "a"}\n',
    "pairs.jsonl": json.dumps(PAIR) + "\n",
    "turns.jsonl": 16 * (json.dumps(PAIR | {"system": "s"}) + "\n"),
    "told.jsonl": '{"task_id": "HumanEval/0", "completion": "pass"}\n',
    "said.jsonl": '{"task_id": "lab/test/0", "text": "pass"}\n',
    "judged.jsonl": '{"task_id": "a", "reward": "x"}\n',
    "own.py": OWN,
}
RM = {"reward_model": "rm"}
TOLD = [  # script, options, the line; what they leave out is the lab's
    (train_ppo, {"prompts": "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
    (train_ppo, {"prompts": "."}, ".: is a folder, expected a JSONL file, such as bare.jsonl"),
    (train_ppo, {"prompts": "bare.jsonl"}, "--prompts_per_step 48: more than the 1 prompts"),
    (train_ppo, {"prompts": "bare.jsonl", "reward": "tests"}, "1 of 1 problems have no 'test'"),
    (train_ppo, {"validation": "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
    (train_ppo, {"test": "bare.jsonl"}, "--test bare.jsonl: 1 of 1 problems have no 'test'"),
    (train_ppo, {"policy": "nowhere"}, "--policy nowhere: there is no such folder"),
    (train_ppo, {"policy": "cut"} | RM, "--policy cut/model.safetensors: damaged or cut short"),
    (train_ppo, {"policy": "mute"} | RM, "--policy mute: cannot read the tokenizer: there is none"),
    (train_ppo, {"policy": "large"}, "--reward_model is the lab's, whose tokens are not those of"),
    (train_ppo, {"policy": "other"}, "--reward_model is the lab's, whose tokens are not those of"),
    (train_ppo, {"reward_model": "rm"}, "--policy is the lab's, whose tokens are not those of"),
    (train_ppo, {"policy": "a/b"}, "--reward_model is the lab's, whose tokens are not those of"),
    (train_ppo, {"policy": "a/b", "prompts": "broken.jsonl"} | RM, "line 2: not JSON"),
    (train_ppo, {"reward_model": "cut"}, "--reward_model cut: not a reward model but a causal LM"),
    (train_ppo, {"reward_model": "bare.jsonl"}, "bare.jsonl: is a file, expected a model's folder"),
    (train_ppo, {"reward": "own.py:broken"}, "--reward own.py:broken: ZeroDivisionError"),
    (train_ppo, {"filter": "own.py:other"}, "--filter own.py:other: own.py has no function"),
    (train_ppo, {"prompt_style": "chat"}, "the tokenizer of the lab's policy has no chat template"),
    (train_ppo, {"max_new_tokens": "512"}, "--max_new_tokens 512: expected less than 512"),
    (train_rm, {"pairs": "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
    (train_rm, {"pairs": "bare.jsonl"}, "bare.jsonl, line 1: field 'chosen' (or 'pos')"),
    (train_rm, {"pairs": "turns.jsonl"}, "turns.jsonl, line 1: a prompt of 2 messages (system, "),
    (train_rm, {"prompts": "bare.jsonl"}, "--prompts bare.jsonl: 1 of 1 problems have no 'test'"),
    (train_rm, {"policy": "cut"}, "--policy cut/model.safetensors: damaged or cut short"),
    (eval_code, {"samples": "said.jsonl"}, "line 1: expected a string in 'completion', 'solu"),
    (eval_code, {"samples": "told.jsonl"}, "none of the lab's problems: name their file, --prob"),
    (eval_code, {"contamination": "broken.jsonl"}, "broken.jsonl, line 2: not JSON"),
    (eval_code, {"from_samples": "judged.jsonl"}, "expected a number in 'reward', found 'x'"),
    (eval_code, {"problems": "bare.jsonl"}, "bare.jsonl: 1 of 1 problems have no 'test'"),
    (eval_code, {"reward_model": "cut"}, "--reward_model cut: not a reward model but a causal LM"),
    (eval_code, {"policy": "cut"}, "--policy cut/model.safetensors: damaged or cut short"),
    (eval_code, {"reward": "own.py:broken"}, "--reward own.py:broken: ZeroDivisionError"),
]


@pytest.fixture(scope="module")
def users(tiny, tmp_path_factory):
    """A user's folder: files, and folders of models that are not as they should be."""
    here = tmp_path_factory.mktemp("users")
    for name, text in USERS.items():
        (here / name).write_text(text)
    shutil.copytree(tiny / "rm", here / "rm")
    for name in ("cut", "mute", "large", "other"):
        shutil.copytree(tiny / "policy", here / name)
    with open(here / "cut/model.safetensors", "r+b") as file:
        file.truncate(1000)
    for path in (here / "mute").glob("tokenizer*"):
        path.unlink()
    config = json.loads((here / "large/config.json").read_text())
    (here / "large/config.json").write_text(json.dumps(config | {"vocab_size": 600}))
    return here


def made(folder):
    """All that is in a folder, less what Python keeps of a user's own file."""
    return [path for path in sorted(folder.rglob("*")) if "__pycache__" not in str(path)]


@pytest.mark.parametrize("script, options, line", TOLD)
def test_a_mistake_is_told_before_anything_is_made(users, monkeypatch, script, options, line):
    for name in ("make_problems", "make_policy"):  # minutes
        monkeypatch.setattr(lab, name, lambda *_: pytest.fail("the lab is made"))
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.chdir(users)
    before = made(users)
    assert line in refused(run, script, *words_of(**options))
    assert made(users) == before


BAD = {
    "unknown filter": ({"filter": "bset"}, "--filter bset: unknown, expected one of single, none"),
    "minibatch": ({"minibatch": 6}, "--minibatch 6: does not divide the 8 samples"),
    "prompts": ({"prompts_per_step": 32, "minibatch": 64}, "more than the 24 prompts"),
    "negative KL": ({"kl_coef": -0.1}, "--kl_coef -0.1: expected at least 0"),
    "long response": ({"max_new_tokens": 250}, "250 leaves 6 of 256, the max_position_embeddings"),
    "no policy": ({"policy": "./nowhere"}, "--policy ./nowhere: there is no such folder"),
    "no reward model": ({"reward_model": ""}, "--reward model: needs a --reward_model, found none"),
    "memory": ({"device_memory": 1e-4}, "--device_memory 0.0001: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_one_line_before_anything_is_loaded(tiny, tmp_path, monkeypatch, case):
    monkeypatch.setattr(train_ppo.loading, "load_models", None)
    changed, expected = BAD[case]
    assert expected in refused(run, train_ppo, *options(tiny, tmp_path / "run", **changed))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"reward": "nice"}, "--reward nice: unknown"),
        ({"run_dir": "file/run"}, "--run_dir file/run: .*file is a file, expected a folder"),
        ({"run_dir": "/proc/run"}, "--run_dir /proc/run: (cannot|no permission to) write into /pr"),
        ({"filter": "my_filters:own"}, "--filter my_filters:own: cannot import my_filters"),
    ],
)
def test_a_mistake_is_told_before_the_lab_is_made(tmp_path, monkeypatch, changed, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=expected):
        run(train_ppo, *words_of(**changed))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_directory_of_another_run_is_refused(tiny, finished, tmp_path):
    argv = options(tiny, finished, steps=4, save_every=2)
    with pytest.raises(UserError, match="holds a run with these arguments: give --resume"):
        run(train_ppo, *argv)
    with pytest.raises(UserError, match="other arguments .*seed 1 there, 2 here"):
        run(train_ppo, *argv, "--resume", "--seed", 2)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"held_out": 1.5}, "--held_out 1.5: expected 0 to 1"),
        ({"held_out": 1}, "--held_out 1: leaves no pairs for training"),
        ({"pairs": "", "samples_per_prompt": 1}, "a pair needs at least 2"),
        ({"pairs": "", "max_new_tokens": 250}, "250 leaves 6 of 256"),
        ({"run_dir": "."}, "--run_dir .: is not empty and holds no run"),
        ({"device_memory": 1e-4}, "--device_memory 0.0001: training needs"),
        ({"pairs": "", "device_memory": 1e-4}, "--device_memory 0.0001: sampling needs"),
    ],
)
def test_train_rm_says_what_is_wrong_in_one_line(tiny, tmp_path, changed, expected, monkeypatch):
    for name in ("new_scalar", "read_causal_lm"):
        monkeypatch.setattr(train_rm.loading, name, None)
    words = {"prompts": tiny / "train.jsonl"} | changed
    argv = rm_words(tmp_path / "rm", tiny / "policy", tiny / "pairs.jsonl", **words)
    assert expected in refused(run, train_rm, *argv)
    assert not (tmp_path / "rm").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--top_p", 0), "--top_p 0.0: expected more than 0, at most 1"),
        (("--top_k", -1), "--top_k -1: expected at least 0"),
        (("--k", "1,0"), "--k 1,0: expected numbers from 1 on"),
        (("--k", "one"), "--k one: expected numbers from 1 on"),
        (("--k", "2"), "--k 2: expected at most --samples_per_problem 1"),
        (("--temperature", 0, "--samples_per_problem", 2), "--temperature 0: gives one answer 2 t"),
        (("--filters", "best_of_n"), "--filters best_of_n: what they keep is judged by a --reward"),
        (("--reward_model", "lab", "--filters", "foo"), "--filters foo: unknown, expected one of"),
        (
            ("--reward_model", "lab,lab", "--reward", "tests", "--filters", "agreeing"),
            "--filters agreeing: asks for members",  # nobody asks the reward models
        ),
        (("--temperature", -0.5), "--temperature -0.5: expected at least 0, or -1"),
        (("--max_new_tokens", 250), "250 leaves 6 of 256, the max_position_embeddings"),
        (("--prompt_style", "few_shot"), "--prompt_style few_shot: the examples are MBPP's"),
        (("--samples", "x", "--reward_model", "lab"), "--samples: without a model's answers, so"),
        (("--samples", "x", "--stop", "y"), "--stop: with --samples nothing is sampled"),
        (("--stop", "", "y"), '--stop: expected strings, or "" alone for none, found both'),
        (
            ("--device_memory", 3.1e-4),
            "even with a single row: lower --max_new_tokens, or take a device",
        ),
        (("--device_memory", 1e-4), "with a single row of few tokens: take a device with more"),
        (("--device_memory", 1e-4, "--sampling_batch", 6), "with 6 rows that decode together: l"),
    ],
)
def test_eval_code_says_what_is_wrong_in_one_line(tiny, tmp_path, words, expected, monkeypatch):
    monkeypatch.setattr(eval_code.loading, "read_causal_lm", None)
    assert expected in refused(run, eval_code, *asked(tiny, tmp_path / "o", *words))
    assert not (tmp_path / "o").exists()
