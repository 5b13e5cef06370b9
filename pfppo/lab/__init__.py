"""The embedded world: what scripts use where an argument says "lab"; and the study made on it.

    python -m pfppo.lab.study --filters none,best_random,best_worst --seeds 5

What stands here is all that the scripts use of this folder.
"""

from pfppo.lab.ahead import check
from pfppo.lab.default import make, resolve
