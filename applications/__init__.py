"""What a person starts: the command line, the pipeline and the presets."""
