"""What the scheduler's HTTP server shows of resilience; installed as ``dask_resilience.dashboards``."""
