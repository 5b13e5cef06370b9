"""Untrusted code in, verdicts out.

    with Sandbox(workers=2, timeout=3.0) as sandbox:
        verdicts = sandbox.run([Check(program, test, entry_point, reference), ...])

What stands here is all that the rest of pfppo uses of this folder.
"""

from pfppo.sandbox.pool import Check, Sandbox, Verdict
