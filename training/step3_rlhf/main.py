"""Step 3, PPO: the SFT model learns to give answers that the reward model likes, without leaving what it knows.

Reads step1_sft/model, step2_reward/model and data/prompts_*.jsonl of the run directory, writes step3_rlhf/model.
One iteration: prompts -> generate -> score -> advantages -> update -> log (ppo.py).

    python training/step3_rlhf/main.py runs/demo
    torchrun --nproc-per-node 8 training/step3_rlhf/main.py runs/big

Left out: entropy bonus and shared actor-critic weights (the KL penalty does the former's work, and reward models of
another size rule out the latter).
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
    from training.step3_rlhf.ppo import train
    from training.steps import PPO

    sys.exit(run_stage(PPO, train))
