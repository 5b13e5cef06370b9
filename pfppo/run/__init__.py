"""Before, during and after a run: its options, folder, checkpoints, end; memory; export; selfcheck.

What stands here is all that the rest of pfppo uses of this folder.
"""

import sys

from pfppo import config
from pfppo.run.comparison import (
    HINT,
    compare_filters,
    judged_rows,
    load_filters,
    pyplot,
    read_judged,
)
from pfppo.run.export import from_run, write
from pfppo.run.folder import check_shared, claim, open_folder
from pfppo.run.memory import show
from pfppo.run.options import LongRun, Machine
from pfppo.run.selfcheck import selfcheck
from pfppo.run.session import Session

import torch.distributed as dist


def answer(args):
    """What --export and --plan ask: a checkpoint for transformers, or the memory of a run."""
    if args.export:
        return from_run(args.run_dir, args.export)
    return show(args)


def launch(main, cls):
    """`config.launch`, for a script with ranks; what `main` returns is the exit status."""

    def whole(args):
        status = main(args)
        # A regular end ends the process group: its threads can abort an interpreter that leaves
        # before them.
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(status)

    config.launch(whole, cls)
