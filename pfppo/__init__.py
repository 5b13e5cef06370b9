"""PF-PPO, a reference implementation. Read `train_ppo.py` first, then the modules it names.

This file runs before torch is imported (our imports stand first), because these settings are read
when it is loaded. Idle threads spin for a moment only, then sleep: on a machine that is busy with
other things, such as the tests of candidates, spinning made a step several times slower. On a GPU
blocks of memory grow where they are: a policy is gathered, samples and is given back at every step,
with other sizes each time, and fixed blocks would be left in pieces.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
