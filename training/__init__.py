"""What learns: the three steps and all they share."""
