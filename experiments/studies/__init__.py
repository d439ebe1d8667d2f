"""What the studies of experiments.study train, measure and show, one a file."""
