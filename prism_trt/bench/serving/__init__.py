"""A served engine under load and under faults."""
