"""Before the steps: fetch and convert the models, turn the data source into rows. One process, no training.

python training/prepare.py runs/demo
"""

import sys

from training.watchdog import end_with_parent


def prepare() -> int:
    """Returns the exit code. Everything made lands in the model cache and in the run's data/."""
    from inference.chat_format import ChatFormat
    from inference.errors import UserError
    from inference.model_store import resolve_model
    from training.data.prepare import prepare_data
    from training.metrics import Display
    from training.run_directory import RunDirectory, write_json
    from training.stage import EXIT_USER_ERROR, parse_arguments

    run = RunDirectory(parse_arguments().run_directory)
    display = Display()
    try:
        config = run.read_config()
        actor = resolve_model(config.sft_model or config.model, display.say)
        resolve_model(config.trained_reward_model or config.reward_model_source, display.say)
        prepare_data(config.data, config.seed, run.data, ChatFormat.load(actor), display.say)
    except UserError as error:
        write_json(run.error_file, {"sentence": str(error), "code": EXIT_USER_ERROR})
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(prepare())
