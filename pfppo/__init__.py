"""PF-PPO, a reference implementation. Read `train_ppo.py` first, then the modules it names.

This file runs before torch is imported (our imports stand first), because the thread pool reads its
settings when it is loaded: idle threads spin for a moment only, then sleep. On a machine that is
busy with other things, such as the tests of candidates, spinning made a step several times slower.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
