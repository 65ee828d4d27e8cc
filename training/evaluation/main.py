"""After step 3: how do the SFT and the RLHF model compare on held-out prompts? Writes evaluation.json.

python training/evaluation/main.py runs/demo
"""

import sys

from training.watchdog import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    from training.evaluation.comparison import Comparison
    from training.stage import run_evaluation

    sys.exit(run_evaluation(lambda stage: Comparison(stage).run()))
