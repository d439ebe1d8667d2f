"""Source code as tokens, in batches that depend on the step alone."""
