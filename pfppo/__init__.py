"""PF-PPO, a reference implementation. Read `train_ppo.py` first, then the modules it names.

This file is imported before torch, because the thread pool reads its settings when it is loaded:
idle threads spin for a moment only, then sleep. On a machine that is busy with other things, tests
of candidates for instance, spinning threads made a step up to seven times slower.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
