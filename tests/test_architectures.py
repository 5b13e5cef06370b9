"""Other families than the lab's: checkpoints that transformers wrote, through the whole of PF-PPO.

Every family is loaded, sampled, scored, trained, saved, exported, loaded by transformers again and
resumed, by the code that trains the lab's Llama. Nothing in it names a family, so what is asked of
one is asked of all.
"""

import json
import shutil
from types import SimpleNamespace

import train_ppo
from pfppo.config import UserError
from pfppo.data import Tokens
from pfppo.loading import load_models
from pfppo.model import Policy
from pfppo.rollout import collate
from pfppo.run import export
from pfppo.run.proofs import prove_policy
from pfppo.sampler import sample

import families
import pytest
import torch
from conftest import EOS, quick, ragged, tiny_classifier, tiny_lm, tiny_tokenizer
from running import numbers
from safetensors import safe_open
from transformers import CONFIG_MAPPING
from transformers import AutoModelForCausalLM as LM
from transformers import AutoModelForSequenceClassification as RM

TOKENS = SimpleNamespace(policy="here", rows=families.VOCABULARY, stop=[1], never=[0], pad=0)
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
PLAIN = ("llama", "qwen2", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox")
FAMILIES = dict.fromkeys(PLAIN, {}) | {  # changes of conftest's configuration
    "qwen3": HEAD | {"tie_word_embeddings": True},
    "starcoder2": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": HEAD | EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
SCALARS = {"olmoe": "llama"}  # transformers has no sequence classifier of the family
# How the files lie: everything in one, cut into shards with an index, in bfloat16, or both.
SHARDED, HALF = {"max_shard_size": "20KB"}, {"dtype": torch.bfloat16}
FILES = {"qwen2": SHARDED, "gpt2": SHARDED, "mistral": HALF, "gpt_neox": HALF | SHARDED}
FILES |= {"gemma2": HALF, "mixtral": SHARDED, "qwen3_moe": HALF | SHARDED}


def write(folder, model, dtype=torch.float32, **how):
    """A checkpoint, by transformers' own `save_pretrained`."""
    model.to(dtype).save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)


def theirs(kind, folder):
    """The model as transformers reads it, in fp32."""
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=quick(["gpt_neox", "mixtral"], FAMILIES))
def files(request, tmp_path_factory):
    """A folder with a policy, a reward model of its family where there is one, and prompts."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    changes, how = FAMILIES[name], FILES.get(name, {})
    write(folder / "policy", tiny_lm(name, **changes), **how)
    rm = tiny_classifier(SCALARS.get(name, name), seed=1, **changes)
    write(folder / "reward_model", rm, **how)
    texts = tiny_tokenizer().batch_decode(ragged([3, 7, 1, 5]))
    (folder / "prompts").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return folder


def args_of(folder, **changed):
    chosen = {n: str(folder / n) for n in ("policy", "reward_model", "prompts", "run_dir")}
    sizes = {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 3, "minibatch": 4}
    sizes |= {"microbatch": 2, "max_new_tokens": 9, "save_every": 1, "eval_every": 1, "workers": 1}
    return train_ppo.Args(**(chosen | sizes | changed), validation="", test="", device="cpu")


@pytest.fixture(scope="module")
def models(files, ranks):
    args = args_of(files)
    return load_models(args, Tokens.of(args), ranks)


@pytest.fixture(scope="module")
def run(files, ranks):
    """The run directory after two steps."""
    train_ppo.main(args_of(files), ranks)
    return files / "run_dir"


def test_it_is_loaded_and_sampled_as_by_transformers(files, models):
    other, (prompt,) = theirs(LM, files / "policy"), ragged([4], seed=2)
    with models.gathered(models.policy) as lm:
        (ids,) = sample(lm, [prompt], torch.zeros(1, 12), stop=[EOS], temperature=0).ids
    with torch.no_grad():
        how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": EOS}
        expected = other.generate(torch.tensor([prompt]), **how)
        row = collate([prompt], [ids], 0)
        logp, _ = models.policy(row.ids, row.states, row.responses, row.mask)
        logits = other(row.ids).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
    assert ids == expected[0, len(prompt) :].tolist()
    torch.testing.assert_close(logp, logits.gather(-1, row.responses[..., None])[..., 0])


def test_its_reward_model_scores_as_in_transformers(files, models):
    other = theirs(RM, files / "reward_model")
    row = collate(ragged([4], seed=2), ragged([8], seed=3), 0)
    with torch.no_grad():
        for model in (models.reward_model, models.critic):
            torch.testing.assert_close(model(row.ids, row.ends)[:, 0], other(row.ids).logits)
    assert not models.normalised


def test_it_is_trained_on_what_it_sampled(run):
    rows = numbers(run)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["ratio_first_minibatch"] == 1
        assert row["grad_norm_actor"] > 0 and row["grad_norm_critic"] > 0
        assert row["skipped_updates"] == row["empty_steps"] == 0
    assert rows[0]["kl_k1"] == 0 and rows[1]["kl_k1"] != 0  # the policy moves, not the reference


def shapes_of(folder):
    """{name: shape} of all weights in a folder's files."""
    files = [safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    return {name: file.get_slice(name).get_shape() for file in files for name in file.keys()}


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(ragged([20], seed=4))).logits


def test_the_exported_policy_is_that_of_the_checkpoint(files, run, tmp_path):
    """Exported weights as transformers reads them, and saved ones as torch reads them."""
    saved = export.policy_of(run / "checkpoints/step_2")
    model = theirs(LM, files / "policy")
    before = logits_of(model)
    assert not model.load_state_dict(saved, strict=False).unexpected_keys
    exported = logits_of(theirs(LM, run / "policy"))
    assert torch.equal(exported, logits_of(model))
    assert (exported - before).abs().max() > 1e-3
    export.from_run(run, tmp_path / "again")
    assert torch.equal(logits_of(theirs(LM, tmp_path / "again")), exported)
    judges = (
        theirs(RM, path) for path in (files / "reward_model", tmp_path / "again/reward_model")
    )
    assert torch.equal(*map(logits_of, judges))


def test_the_exported_files_have_the_names_and_shapes_of_those_it_began_with(files, run):
    """Names in files are not those of modules in every family; experts lie there one by one."""
    ours, before = shapes_of(run / "policy"), shapes_of(files / "policy")
    assert ours == before and len(ours) > 10


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(files, run, ranks, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "checkpoints/step_2")
    train_ppo.main(args_of(files, run_dir=str(again), resume=True), ranks)
    assert numbers(again) == numbers(run)
    policies = (logits_of(theirs(LM, path / "policy")) for path in (run, again))
    assert torch.equal(*policies)


# ------------------------------------------------------------------------ all families there are

EQUAL = """afmoe apertus arcee aria_text beam bert-generation biogpt bitnet bloom codegen cohere
cohere2 cohere2_moe ctrl cwm diffllama doge dots1 emu3 ernie4_5 ernie4_5_moe exaone4 exaone_moe
falcon
flex_olmo flint fuyu gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4
glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa
granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3
hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna lfm2 llama mellum mimo_v2_flash
minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi mpt nanochat nemotron olmo
olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
solar_open stablelm starcoder2 vaultgemma whisper xglm""".split()
LATENT = "deepseek_v2 deepseek_v3 minicpm3".split()
QUICK = "llama qwen2 qwen3_moe mistral gemma2 gpt2 gpt_neox phi3 olmo2 deepseek_v3".split()
LOOKS_AHEAD_OR_ASIDE = "bert roformer roberta xlm bart mbart plbart modernbert-decoder".split()


@pytest.mark.parametrize("name", quick(QUICK, EQUAL + LATENT))
def test_a_family_samples_the_tokens_of_a_naive_loop(name):
    if name not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    model = families.tiny_family(name, families.SIZES | (families.LATENT if name in LATENT else {}))
    prove_policy(model, TOKENS, Policy(model, TOKENS.never))
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]]
    uniforms = torch.zeros(3, 8, dtype=torch.float64)
    how = {"stop": TOKENS.stop, "never": TOKENS.never, "temperature": 0, "batch": 2}
    ids = sample(model, prompts, uniforms, **how).ids
    assert ids == [families.greedy(model, p, 8, *TOKENS.stop, TOKENS.never) for p in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKS_AHEAD_OR_ASIDE)
def test_a_family_whose_training_would_be_wrong_is_refused(name):
    model = families.tiny_family(name)
    with pytest.raises(UserError, match="cannot be used here, where a causal decoder is needed"):
        prove_policy(model, TOKENS, Policy(model, TOKENS.never))
