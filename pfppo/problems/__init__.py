"""Problems out of the files that people have, and programs out of responses.

    problems = load_problems("HumanEval.jsonl.gz")  # or MBPP, LeetCode, files of one's own
    sandbox.run([assemble(problem, response)])  # what a model said
    sandbox.run([check_of(problem, program)])  # a whole program from a samples file, as it stands
    load_verifier("last_number")(problems, responses)  # where an answer is no code

What stands here is all that the rest of pfppo uses of this folder.
"""

from pfppo.problems.benchmarks import FORMS, Problem, load_problems, load_prompts
from pfppo.problems.contamination import report_overlap
from pfppo.problems.extract import marks_thought
from pfppo.problems.messages import (
    few_shot_prompts,
    load_pairs,
    only_text,
    own_template,
    prompt_text,
)
from pfppo.problems.programs import (
    assemble,
    check_of,
    load_samples,
    pass_at_k,
    pass_at_k_interval,
    read_samples,
    sample_row,
    summary,
)
from pfppo.problems.stops import Stops, load_stops
from pfppo.problems.verifiers import load_verifier
