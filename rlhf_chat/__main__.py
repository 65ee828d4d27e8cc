"""`python -m rlhf_chat` is the command `rlhf-chat`."""

from rlhf_chat import main

main()
