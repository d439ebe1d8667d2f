"""Loss, optimizer, step, checkpoints and metrics."""
