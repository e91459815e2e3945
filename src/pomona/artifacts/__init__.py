"""What is written down: the run directory, results and reports."""
