"""Parts a stage runs on, as Dagster resources: where artifacts lie, which devices, which hub. No algorithms."""
