"""Step 2 by another way, DPO: the SFT model learns from the pairs themselves, without a reward model and without PPO.

Reads data/pairs_*.jsonl of the run directory and step 1's model, writes step2_dpo/model, a model to chat with.
"Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (Rafailov et al. 2023, arXiv
2305.18290), equation 7, as a mean over the pairs of the whole batch.

    python training/step2_dpo/main.py runs/demo
    torchrun --nproc-per-node 8 training/step2_dpo/main.py runs/big --config applications/presets/opt-1.3b.yaml

Left out: a second copy of the model. The reference is what the model was before its first update, so it scores all
pairs then, once.
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
    from training.step2_dpo.dpo import train
    from training.steps import DPO

    sys.exit(run_stage(DPO, train))
