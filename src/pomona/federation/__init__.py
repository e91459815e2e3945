"""What a federation is made of: partition, sampling, graft, cohort, update, local, strategies."""
