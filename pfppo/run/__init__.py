r"""Before, during and after a run: options, folder, checkpoints, end; memory; export; selfcheck.

What stands here is all that the rest of pfppo uses of this folder.

Operating a run
---------------
SIGTERM     The step is given up, or ended if it is in its update; the run saves and exits with 0
            within `--grace_seconds`. torchrun passes SIGTERM on, sends SIGKILL after 30 s (torch
            2.13: `--shutdown-timeout`) and ends with status 1 itself, whatever its workers did.
            Where it is looked for, and what is not interrupted: stopping.py.
Ctrl-C      Likewise; a second one ends at once. `--run_dir FOLDER --resume` goes on.
kill        At any instant: `--resume` goes on from the last whole checkpoint to the same numbers.
restarts    `torchrun --max-restarts 3` starts the workers of a node again when one has failed, and
            they go on from the last checkpoint; give `--run_dir`. Use it with `--node_rank` and
            `--master_addr`: with `--rdzv_backend c10d` torch 2.13 itself may fail to connect them.
nodes       need one file system at one path for `--run_dir`, and for the working folder where the
            lab is used; where a node sees another one, the run ends in one line before any work.
            Where a node dies, its workers die with their torchrun; the other nodes end with an
            error when a collective has waited for `--collective_timeout` minutes.
Slurm       One torchrun per node (not tried on a cluster):

    #!/bin/bash
    #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive --time=24:00:00
    #SBATCH --requeue --open-mode=append --signal=TERM@180
    export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150  # seconds from SIGTERM to SIGKILL; torch 2.11: 30
    srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes $SLURM_NNODES \
        --node_rank $SLURM_NODEID --master_addr $MASTER_ADDR --master_port 29500 \
        --nproc_per_node 8 train_ppo.py --policy DIR --reward_model DIR --prompts FILE \
        --run_dir /shared/run --resume --grace_seconds 140' ||
        [ "${SLURM_RESTART_COUNT:-0}" -ge 5 ] || scontrol requeue "$SLURM_JOB_ID"
"""

import os
import sys

from pfppo import config
from pfppo.run.comparison import (
    compare_again,
    compare_filters,
    judge,
    judged_rows,
    load_filters,
    plotting,
)
from pfppo.run.export import from_run, write
from pfppo.run.fitting import rows_at_once, show
from pfppo.run.folder import check_shared, claim, differences, open_folder
from pfppo.run.memory import AnswerPlan
from pfppo.run.options import LongRun, Machine, Saved, styles
from pfppo.run.pairs import (
    by_length,
    pair_metrics,
    pairs_by_tests,
    raw_scores,
    read_pairs,
    rows_of,
    shares,
    split_by_prompt,
)
from pfppo.run.proofs import prove_models, prove_policy, prove_scalar, proven_judges
from pfppo.run.reward_session import RewardSession, is_trained
from pfppo.run.selfcheck import selfcheck
from pfppo.run.session import Session

import torch.distributed as dist


def answer(args):
    """What --export and --plan ask: a checkpoint for transformers, or the memory of a run."""
    if int(os.environ.get("RANK", 0)):  # one answer is enough, and needs no process group
        return None
    if args.export:
        return from_run(args.run_dir, args.export)
    return show(args)


def launch(main, cls):
    """`config.launch`, for a script with ranks; what `main` returns is the exit status."""

    def whole(args):
        try:
            status = main(args)
        except SystemExit as end:
            status = end.code
        # A regular end ends the process group: its threads can abort an interpreter that leaves
        # before them.
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(status)

    config.launch(whole, cls)
