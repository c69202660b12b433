"""Wiring: what hangs the parts onto a live scheduler, worker or nanny."""
