"""What users write today for the same work, for benchmarks to run beside Pomona."""
