"""Token ids in, samples out, each as soon as it ends. Knows nothing of text."""
