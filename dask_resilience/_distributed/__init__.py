"""The seam: the only package that touches Dask's internals.

Everything here hangs on bound attributes of live objects or on subclasses; no class of Dask is patched. What
is relied on stands in :mod:`dask_resilience._distributed.pinned`.
"""
