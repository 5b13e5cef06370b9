"""Options that change no number of a run, as base classes of the scripts' `Args`.

They may differ when a run is resumed: `free_options` is made of these classes, and of what a script
names in `FREE` besides.

Not here: the algorithm's own options, which stand in the scripts under its step numbers.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pfppo.config import Count, Natural, NonNegative, Positive, Range
from pfppo.problems import own_template


def styles(*names):
    """The type of a --prompt_style: one of some names, or the file of a chat template, which is
    looked at when the command line is."""
    expected = f"{', '.join(names)}, or a chat template of your own, FILE.jinja"
    return Annotated[str, Range(expected, lambda text: text in names or own_template(text) != "")]


@dataclass
class Machine:
    """The machine (changes no number)"""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    sampling_batch: Natural = 0  # rows that decode together; 0: as many as fit (CPU: into half)
    device_memory: NonNegative = 0.0  # GB per device that a run must fit into; 0: what it has
    compile: bool = False  # decode steps and transformer blocks: slow at first, meant for a GPU
    workers: Count = 2  # sandbox processes per rank
    allow_weak_isolation: bool = False  # run tests without namespaces or landlock, too
    collective_timeout: Positive = 10.0  # minutes that ranks wait for one that hangs or is gone


@dataclass
class Saved(Machine):
    """The run (changes no number)"""

    resume: bool = False  # go on from the last complete checkpoint in --run_dir, if there is one
    save_every: Count = 10  # steps between checkpoints
    keep: Count = 2  # checkpoints that stay
    shard_group_size: Natural = 0  # shard over so many ranks, a node's, and replicate; 0: over all
    grace_seconds: Positive = 25.0  # from SIGTERM (or Ctrl-C) to SIGKILL: a run saves in between


@dataclass
class LongRun(Saved):
    """The run (changes no number)"""

    run_dir: str = ""  # metrics, samples, checkpoints, policies; empty: runs/FILTER, -2, ...
    export: str = ""  # write --run_dir's newest checkpoint (or step_N) here for transformers; stop
    selfcheck: bool = False  # check invariants on these models with a tiny batch, and stop
    plan: bool = False  # print the memory that a run would need, and stop: no ranks, no weights
    world_size: Natural = 0  # ranks of --plan; 0: those there are
    gradient_checkpointing: bool = False  # blocks run again in backward: less memory, more time
    offload_ref: bool = False  # the reference waits in host memory
    offload_reward: bool = False  # so does the reward model
    offload_optimizer: bool = False  # so do weights, gradients, Adam states of actor and critic


def free_options(args):
    """Names of the arguments that may differ between a run and its continuation."""
    free = [field.name for kind in (Machine, LongRun) for field in fields(kind)]
    return {*free, *getattr(args, "FREE", ())}
