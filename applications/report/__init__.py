"""What did this run do? One HTML page without scripts or network."""
