"""Deciding code of failover: the lease and the recovery plan. Nothing here does I/O or reads a clock."""
