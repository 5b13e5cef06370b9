"""What a run reads besides weights: together, and refused before anything long begins."""

import json
from dataclasses import dataclass

from pfppo.config import UserError

import pytest
from conftest import EOS, PAD, tiny_lm, tiny_tokenizer, write_model
from pfppo.inputs import read_inputs


@dataclass
class Args:
    policy: str
    prompts: str
    reward_model: str = ""
    validation: str = ""
    test: str = ""
    prompt_style: str = "plain"
    reward: str = "model"
    prompts_per_step: int = 2
    max_prompt_tokens: int = 20
    max_new_tokens: int = 10


@pytest.fixture
def args(tmp_path):
    write_model(tmp_path / "policy", tiny_lm("llama"))
    rows = [{"prompt": "w1 w2 w3"}, {"prompt": "w4", "test": "pass", "entry_point": "f"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Args(str(tmp_path / "policy"), str(tmp_path / "prompts.jsonl"))


def test_prompts_come_as_tokens_with_what_tokens_mean(args):
    given = read_inputs(args)
    tokenizer = tiny_tokenizer()
    assert given.prompts == [tokenizer(text)["input_ids"] for text in ("w1 w2 w3", "w4")]
    assert (given.stop, given.pad_id) == ([EOS], PAD)
    assert given.validation == given.test == ([], [])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"prompts_per_step": 3}, "--prompts_per_step 3: more than the 2 prompts"),
        ({"reward": "tests"}, "--prompts .*'line 1'.* has no 'test'"),
        ({"max_prompt_tokens": 2}, "prompt of 3 tokens"),
        ({"max_new_tokens": 200}, "--policy .*203 tokens long, expected at most 128"),
        ({"prompt_style": "chat"}, "--prompt_style chat"),
        ({"validation": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_does_not_fit_is_one_line(args, changed, message):
    for name, value in changed.items():
        setattr(args, name, value)
    with pytest.raises(UserError, match=message) as error:
        read_inputs(args)
    assert "\n" not in str(error.value)
