"""Sources -> rows -> the run's data directory -> batches."""
