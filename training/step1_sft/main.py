"""Step 1, supervised fine-tuning: the model learns to answer as the demonstrations do.

Reads data/sft_*.jsonl of the run directory, writes step1_sft/model. The loss is on response tokens only, their
end-of-turn token included, as a mean over the tokens of the whole batch.

    python training/step1_sft/main.py runs/demo
    torchrun --nproc-per-node 8 training/step1_sft/main.py runs/big --config applications/presets/opt-1.3b.yaml

Left out: packing of several rows into one sequence (token-budget micro-batches keep padding small).
"""

import sys

import rlhf_chat
from training.launchers import begin_script
from training.termination import TERMINATION

if __name__ == "__main__":
    rlhf_chat.refuse_other_copy(__file__)
    begin_script()  # before the heavy imports: a killed command must not leave a loading process behind
    TERMINATION.answer()
    from training.stage_script import run_stage
    from training.step1_sft.sft import train
    from training.steps import SFT

    sys.exit(run_stage(SFT, train))
