"""Step 2, the reward model: a number for an answer, learned from which of two answers people preferred.

Reads data/pairs_*.jsonl of the run directory, writes step2_reward/model, a sequence-classification model with one
label whose score is read at the end-of-turn token. The loss is that of Bradley and Terry:
-log sigmoid(score of chosen - score of rejected), a mean over the pairs of the whole batch.

    python training/step2_reward/main.py runs/demo
    torchrun --nproc-per-node 8 training/step2_reward/main.py runs/big --config applications/presets/opt-1.3b.yaml
"""

import sys

import rlhf_chat
from training.launchers import begin_script
from training.termination import TERMINATION

if __name__ == "__main__":
    rlhf_chat.refuse_other_copy(__file__)
    begin_script()
    TERMINATION.answer()
    from training.stage_script import run_stage
    from training.step2_reward.reward import train
    from training.steps import REWARD

    sys.exit(run_stage(REWARD, train))
