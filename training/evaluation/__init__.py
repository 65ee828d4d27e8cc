"""Is the RLHF model better than the SFT model, and at what price?"""
