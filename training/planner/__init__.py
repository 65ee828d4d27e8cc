"""Plans of a PPO iteration: what they cost, and the search for the best."""
