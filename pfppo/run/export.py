"""Models in Hugging Face form, written whole or not at all: the best policy, the reward model, and
any checkpoint afterwards.

Weights are fp32 and tied ones stand there once; files are 5 GB at most. `from_run` needs neither a
GPU nor the ranks that wrote the checkpoint, but host memory for the whole policy.

Not covered: adapters, quantised weights.
"""

import copy
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

from pfppo.config import UserError, parts, reason, require
from pfppo.data import Tokens, load_tokenizer
from pfppo.files import write_json
from pfppo.fsdp import full_state, on_main
from pfppo.loading import read_classifier
from pfppo.model import causal_lm_config, empty_causal_lm, read_generation_config
from pfppo.reward import RewardCard, load_card
from pfppo.run import checkpoint

import torch
import torch.distributed.checkpoint as dcp

LARGEST = "5GB"  # of a file


def write_best(models, folder, tokens, ranks, best):
    """`write` the policy, with a note of which step that was and how good. A collective."""
    speaks_like(models.unsharded, tokens)
    notes = [lambda temporary: write_json(temporary / checkpoint.BEST, best)]
    write(models.policy.lm, folder, models.unsharded, tokens.tokenizer, ranks, notes)


def speaks_like(lm, tokens):
    """Let `generate` end an answer where sampling here does: the end of a turn in the chat template
    need not be in the folder that the policy came from."""
    lm.generation_config.eos_token_id = tokens.stop if len(tokens.stop) > 1 else tokens.stop[0]


def write(sharded, folder, unsharded, tokenizer, ranks, extra=()):
    """Write a sharded model in Hugging Face form, whole or not at all. A collective.

    unsharded: its structure and config; extra: functions called with the temporary folder on rank
    0, to write more files into it. Raises UserError where it cannot be written.
    """
    weights = full_state(sharded)
    on_main(ranks, _write, Path(folder), unsharded, weights, tokenizer, extra)


def _write(folder, unsharded, weights, tokenizer, extra):
    temporary, previous = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        _save(unsharded, temporary, weights, tokenizer)
        for more in extra:
            more(temporary)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except Exception as error:  # safetensors has errors of its own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written: {reason(error)}") from error


def _save(unsharded, folder, weights, tokenizer):
    unsharded = copy.deepcopy(unsharded).float()  # the config names the weights' type
    unsharded.save_pretrained(folder, state_dict=weights, max_shard_size=LARGEST)
    tokenizer.save_pretrained(folder)


def from_run(run, folder):
    """Write the policy of a run's newest checkpoint to `folder`, and its reward model (the first,
    with the normaliser that the run used) to `folder`/reward_model. Raises UserError.

    run: a run directory, or one of its checkpoints/step_N. No process group is needed.
    """
    run, folder = Path(run), Path(folder)
    step = run if run.name.startswith("step_") else next(iter(checkpoint.complete(run)), run)
    require(checkpoint.is_whole(step), f"--run_dir {run}: no complete checkpoint")
    require(not folder.exists(), f"--export {folder}: is there already, choose another name")
    args = json.loads((step.parents[1] / "args.json").read_text())
    state = json.loads((step / "state.json").read_text())
    path, rm, extra = args["policy"], next(iter(parts(args["reward_model"])), ""), []
    lm = empty_causal_lm(causal_lm_config(path))
    lm.generation_config = read_generation_config(path) or lm.generation_config
    tokens = Tokens.of(SimpleNamespace(**args), lambda line: None)
    speaks_like(lm, tokens)
    if rm:
        model, tokenizer = read_classifier(rm), load_tokenizer(rm, "reward_model")
        known = load_card(rm)
        card = known or RewardCard(*state["normaliser"][:2], *tokens.hashes())

        def save_reward_model(temporary):
            _save(model, temporary / "reward_model", model.state_dict(), tokenizer)
            card.save(temporary / "reward_model")

        extra = [save_reward_model]
    _write(folder, lm, policy_of(step), tokens.tokenizer, extra)
    also = f", its reward model in {folder / 'reward_model'}" if rm else ""
    print(f"{folder}: the policy after step {state['step']}{also}")


def policy_of(step):
    """{name of transformers: whole tensor} of a checkpoint's actor. Raises UserError."""
    prefix, source = "actor.model.lm.", step / checkpoint.SHARDED
    try:
        stored = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
        weights = {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
            for name, tensor in stored.items()
            if name.startswith(prefix)
        }
        with warnings.catch_warnings(action="ignore"):  # "uninitialized": that is what is meant
            dcp.load(weights, checkpoint_id=source, no_dist=True)
    except Exception as error:  # a damaged file fails in a dozen ways
        raise UserError(f"{step}: damaged: {reason(error)}") from error
    return {name.removeprefix(prefix): value for name, value in weights.items()}
