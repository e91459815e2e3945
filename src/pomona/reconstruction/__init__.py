"""What reconstruction is made of, in order: calibrate, score, affinity, cluster, plan, assemble."""
