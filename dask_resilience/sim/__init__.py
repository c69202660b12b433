"""The failover protocol in virtual time: real journal, lease, takeover, plan and barrier; simulated everything else.

A seed decides every delay and every fault, and the same seed gives the same run to the last message. What is real:
`journal`, `storage` (takeover, leadership, writer, reader, with their threads), `failover`. What is simulated: the
store, the network, the clock, and members reduced to what the protocol says about them.

`python -m dask_resilience.sim --seeds 1000` runs many.
"""
