"""`python -m rlhf_chat` is the command `rlhf-chat`."""

from rlhf_chat import main

if __name__ == "__main__":  # not in the processes that multiprocessing starts for it
    main()
