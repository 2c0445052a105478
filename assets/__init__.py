"""Dagster's view of an experiment: one module an artifact, checks, jobs, sensors, schedules. Work is done by the library."""
