"""How do two models compare on a run's held-out prompts? By default SFT and RLHF, into the run's evaluation.json.

python training/evaluation/main.py runs/demo
python training/evaluation/main.py runs/demo --model my/model --against sft --judge learned
"""

import argparse
import sys
from pathlib import Path

import rlhf_chat
from training.launchers import begin_script
from training.termination import TERMINATION


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path, help="whose held-out prompts, settings and reward model are used")
    parser.add_argument("--model", default="", help="base, a step (sft, rlhf ...), a run or model directory, a hub id")
    parser.add_argument("--against", default="", help="the same")
    parser.add_argument("--judge", default="", help="true, learned, reward, or a reward model")
    parser.add_argument("--trust", action="store_true", help="yes to what a run from elsewhere would run and send to")
    parser.add_argument("--prompts", type=int, default=0, help="how many; 0: evaluation.prompts")
    parser.add_argument("--seed", type=int, help="of the answers; default: the run's")
    parser.add_argument("--eval-data", action="append", default=[], help="rows instead of the run's; several times")
    parser.add_argument("--to", type=Path, help="the JSON file for the result; the answers go beside it as .jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    rlhf_chat.refuse_other_copy(__file__)
    begin_script()
    TERMINATION.answer()
    from training.evaluation.candidates import Request
    from training.evaluation.comparison import Comparison
    from training.run_directory import RunDirectory
    from training.stage_script import run_evaluation
    from training.steps import COMPARED

    arguments = parse_arguments()
    run = RunDirectory(arguments.run_directory)
    asked = arguments.model, arguments.against, arguments.judge, arguments.prompts, arguments.seed
    request = Request(*asked, tuple(arguments.eval_data))
    compared = [step for step in COMPARED if step.command == arguments.model] or COMPARED
    own_files = run.comparison_of(compared[0])
    files = (arguments.to, arguments.to.with_suffix(".jsonl")) if arguments.to else own_files
    sys.exit(run_evaluation(run, lambda stage: Comparison(stage, request).run(*files), request.judge, arguments.trust))
