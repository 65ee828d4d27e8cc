"""Before the steps: fetch and convert the models, turn the data source into rows. One process, no training.

python training/preparation/main.py runs/demo
"""

import sys

import rlhf_chat
from training.launchers import begin_script
from training.termination import TERMINATION

if __name__ == "__main__":
    rlhf_chat.refuse_other_copy(__file__)
    begin_script()
    TERMINATION.answer()
    from training.stage_script import run_preparation

    sys.exit(run_preparation())
