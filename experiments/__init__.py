"""Command-line programs: flags and little else."""
