"""Models in Hugging Face form, written whole or not at all: the best policy, the reward model.

Not covered: adapters, quantised weights.
"""

import copy
import shutil
from pathlib import Path

from pfppo.config import reason, require
from pfppo.fsdp import from_main, full_state
from pfppo.rundir import write_json

BEST = "best.json"  # in policy/: the step that it is from, and its pass rate on validation


def write_best(sharded, run, config_source, tokenizer, ranks, state):
    """`write` to policy/, with a note of which step that was and how good. A collective."""

    def note(folder):
        write_json(folder / BEST, {name: state[name] for name in ("best", "best_step")})

    write(sharded, run / "policy", config_source, tokenizer, ranks, [note])


def write(sharded, folder, config_source, tokenizer, ranks, extra=()):
    """Write a sharded model in Hugging Face form, whole or not at all. A collective.

    config_source: the unsharded twin inside the wrapper, for `save_pretrained` and its config;
    extra: functions called with the temporary folder on rank 0, to write more files into it.
    """
    weights = full_state(sharded)
    failure = None
    if ranks.is_main:
        config_source = copy.deepcopy(config_source).float()  # the config names the weights' type
        folder = Path(folder)
        temporary = folder.with_name(folder.name + ".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            config_source.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
            tokenizer.save_pretrained(temporary)
            for more in extra:
                more(temporary)
            previous = folder.with_name(folder.name + ".old")
            shutil.rmtree(previous, ignore_errors=True)
            if folder.exists():
                folder.rename(previous)
            temporary.rename(folder)
            shutil.rmtree(previous, ignore_errors=True)
        except Exception as error:  # safetensors has errors of its own for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            failure = f"{folder}: cannot be written: {reason(error)}"
    failure = from_main(failure, ranks)
    require(failure is None, failure)
