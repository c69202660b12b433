"""Every internal of Dask that the seam relies on, with the signature that it relies on.

The contract test and the check at start-up read this table. A line says where the name is and what its parameters
are, in order; attributes that are not callable have none. When a release of distributed changes one of them, the fix
and the new line belong into the same change.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, Final

import distributed

from dask_resilience.errors import UnsupportedDask

#: ``module:qualified name`` to its parameters, or None where only its existence counts.
PINNED: Final[dict[str, str | None]] = {
    "dask._expr:LLGExpr": None,
    "dask.order:order": "dsk, dependencies, *, return_stats",
    "distributed.batched:BatchedSend.__init__": "self, interval, loop, serializers",
    "distributed.batched:BatchedSend.abort": "self",
    "distributed.batched:BatchedSend.send": "self, *msgs",
    "distributed.batched:BatchedSend.start": "self, comm",
    "distributed.broker:Broker.publish": "self, topics, msg",
    "distributed.broker:Topic.publish": "self, event",
    "distributed.client:Client._close": "self, fast",
    "distributed.client:Client._ensure_connected": "self, timeout",
    "distributed.client:Client._handle_event": "self, topic, event",
    "distributed.client:Client._reconnect": "self",
    "distributed.client:Client._retry": "self, futures",
    "distributed.client:Client._send_to_scheduler": "self, msg",
    "distributed.client:Client._send_to_scheduler_safe": "self, msg",
    "distributed.client:Client._start": "self, timeout, **kwargs",
    "distributed.client:Client._update_scheduler_info": "self, n_workers",
    "distributed.client:FutureState.cancel": "self, reason, msg",
    "distributed.client:FutureState.reset": "self",
    "distributed.client:FutureState.retry": "self",
    "distributed.comm:connect": "addr, timeout, deserialize, handshake_overrides, **connection_args",
    "distributed.core:ConnectionPool.connect": "self, addr, timeout",
    "distributed.core:ConnectionPool.remove": "self, addr, *, reason",
    "distributed.core:ConnectionPool.reuse": "self, addr, comm",
    "distributed.core:PooledRPCCall.__init__": "self, addr, pool, serializers, deserializers",
    "distributed.core:send_recv": "comm, *, reply, serializers, deserializers, **kwargs",
    "distributed.event:EventExtension._normalize_name": "self, name",
    "distributed.event:EventExtension.event_clear": "self, name",
    "distributed.event:EventExtension.event_set": "self, name",
    "distributed.multi_lock:MultiLockExtension._request_locks": "self, locks, id, num_locks",
    "distributed.multi_lock:MultiLockExtension._retain_locks": "self, locks, id",
    "distributed.multi_lock:MultiLockExtension.acquire": "self, locks, id, timeout, num_locks",
    "distributed.multi_lock:MultiLockExtension.release": "self, id",
    "distributed.nanny:Nanny._unregister": "self, timeout",
    "distributed.nanny:Nanny.start_unsafe": "self",
    "distributed.objects:SchedulerInfo": None,
    "distributed.queues:QueueExtension.create": "self, name, client, maxsize",
    "distributed.queues:QueueExtension.future_release": "self, name, key, client",
    "distributed.queues:QueueExtension.get": "self, name, client, timeout, batch",
    "distributed.queues:QueueExtension.put": "self, name, key, data, client, timeout",
    "distributed.queues:QueueExtension.release": "self, name, client",
    "distributed.diagnostics.plugin:SchedulerUploadFile": None,
    "distributed.scheduler:Computation": None,
    "distributed.scheduler:Scheduler._add_to_memory": "self, ts, ws, recommendations, client_msgs, type, typename",
    "distributed.scheduler:Scheduler._apply_annotations": "self, tasks, annotations_by_type, global_annotations",
    "distributed.scheduler:Scheduler._client_releases_keys": "self, keys, cs, recommendations",
    "distributed.scheduler:Scheduler._create_taskstate_from_graph": (
        "self, *, start, dsk, keys, ordered, client, annotations_by_type, global_annotations, stimulus_id, "
        "submitting_task, span_metadata, user_priority, actors, fifo_timeout, code"
    ),
    "distributed.scheduler:Scheduler._find_lost_dependencies": "self, dsk, keys",
    "distributed.scheduler:Scheduler._transitions": "self, recommendations, client_msgs, worker_msgs, stimulus_id",
    "distributed.scheduler:Scheduler._TRANSITIONS_TABLE": None,
    "distributed.scheduler:Scheduler.acquire_resources": "self, ts, ws",
    "distributed.scheduler:Scheduler.add_client": "self, comm, client, versions",
    "distributed.scheduler:Scheduler.add_replica": "self, ts, ws",
    "distributed.scheduler:Scheduler.add_worker": (
        "self, comm, *, address, status, server_id, nthreads, name, resolve_address, now, resources, host_info, "
        "memory_limit, metrics, pid, services, local_directory, versions, nanny, extra, stimulus_id"
    ),
    "distributed.scheduler:Scheduler.check_idle_saturated": "self, ws, occ",
    "distributed.scheduler:Scheduler.client_desires_keys": "self, keys, client",
    "distributed.scheduler:Scheduler.client_releases_keys": "self, keys, client, stimulus_id",
    "distributed.scheduler:Scheduler.client_send": "self, client, msg",
    "distributed.scheduler:Scheduler.handle_task_erred": "self, key, stimulus_id, **msg",
    "distributed.scheduler:Scheduler.handle_worker": "self, comm, worker",
    "distributed.scheduler:Scheduler.log_event": "self, topic, msg",
    "distributed.scheduler:Scheduler.log_worker_event": "self, worker, topic, msg",
    "distributed.scheduler:Scheduler.handle_worker_status_change": "self, status, worker, stimulus_id",
    "distributed.scheduler:Scheduler.new_task": "self, key, spec, state, computation",
    "distributed.scheduler:Scheduler.register_nanny_plugin": "self, comm, plugin, name, idempotent",
    "distributed.scheduler:Scheduler.register_scheduler_plugin": "self, plugin, name, *, idempotent",
    "distributed.scheduler:Scheduler.register_worker_plugin": "self, comm, plugin, name, *, idempotent",
    "distributed.scheduler:Scheduler.remove_client": "self, client, stimulus_id",
    "distributed.scheduler:Scheduler.remove_worker": "self, address, *, stimulus_id, expected, close",
    "distributed.scheduler:Scheduler.send_all": "self, client_msgs, worker_msgs",
    "distributed.scheduler:Scheduler.set_metadata": "self, keys, value",
    "distributed.scheduler:Scheduler.set_restrictions": "self, worker",
    "distributed.scheduler:Scheduler.stimulus_cancel": "self, keys, client, force, reason, msg",
    "distributed.scheduler:Scheduler.stimulus_queue_slots_maybe_opened": "self, *, stimulus_id",
    "distributed.scheduler:Scheduler.stimulus_task_erred": "self, worker, stimulus_id, key, run_id, **kwargs",
    "distributed.scheduler:Scheduler.subscribe_topic": "self, topic, client",
    "distributed.scheduler:Scheduler.transitions": "self, recommendations, stimulus_id",
    "distributed.scheduler:Scheduler.update_data": "self, *, who_has, nbytes, client",
    "distributed.scheduler:Scheduler.update_graph": (
        "self, client, expr_ser, keys, span_metadata, internal_priority, submitting_task, user_priority, actors, "
        "fifo_timeout, code, annotations, stimulus_id"
    ),
    "distributed.scheduler:TaskState._run_id_iterator": None,
    "distributed.scheduler:TaskState.add_dependency": "self, other",
    "distributed.scheduler:TaskState.set_nbytes": "self, nbytes",
    "distributed.scheduler:WorkerState.add_to_long_running": "self, ts",
    "distributed.scheduler:WorkerState.add_to_processing": "self, ts",
    "distributed.scheduler:_cull": "dsk, keys",
    "distributed.scheduler:_materialize_graph": "expr, validate",
    "distributed.semaphore:SemaphoreExtension._get_lease": "self, name, lease_id",
    "distributed.semaphore:SemaphoreExtension.create": "self, name, max_leases, lease_timeout",
    "distributed.shuffle._core:ShuffleRunSpec": None,
    "distributed.shuffle._core:id_from_key": "key",
    "distributed.shuffle._worker_plugin:ShuffleWorkerPlugin.shuffle_fail": "self, shuffle_id, run_id, message",
    "distributed.spans:Span._code": None,
    "distributed.spans:Span._metadata": None,
    "distributed.spans:Span.annotation": None,
    "distributed.spans:SpansSchedulerExtension._ensure_span": "self, name, ids",
    "distributed.spans:SpansSchedulerExtension.heartbeat": "self, ws, data",
    "distributed.spans:SpansWorkerExtension.heartbeat": "self",
    "distributed.utils:import_file": "path",
    "distributed.variable:VariableExtension.future_received_confirm": "self, name, key, token, client",
    "distributed.worker:Worker._get_client": "self, timeout",
    "distributed.worker:Worker._initialized_clients": None,
    "distributed.worker:Worker._register_with_scheduler": "self",
    "distributed.worker:Worker.batched_send": "self, msg",
    "distributed.worker:Worker.close": "self, timeout, executor_wait, nanny, reason",
    "distributed.worker:Worker.get_metrics": "self",
    "distributed.worker:Worker.get_startup_information": "self",
    "distributed.worker:Worker.handle_scheduler": "self, comm",
    "distributed.worker:Worker.plugin_add": "self, plugin, name, catch_errors",
    "distributed.worker_state_machine:FreeKeysEvent": "stimulus_id, keys",
    "distributed.worker_state_machine:TaskState.get_nbytes": "self",
}


def differences(pinned: dict[str, str | None] = PINNED) -> list[str]:
    """One line for each internal of the installed Dask that is not as pinned.

    Parameters
    ----------
    pinned
        The table.
    """
    return [line for name, parameters in pinned.items() if (line := _difference(name, parameters))]


def _difference(name: str, parameters: str | None) -> str | None:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return f"{name} is gone"
    if parameters is None:
        return None
    actual = signature(found)
    return None if actual == parameters else f"{name} has parameters ({actual}), expected ({parameters})"


def signature(found: Any) -> str:
    """Parameters of a callable by name and kind, without defaults and annotations."""
    parts: list[str] = []
    starred = False
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
            parts.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            parts.append(f"**{parameter.name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not starred:
                starred = True
                parts.append("*")
            parts.append(parameter.name)
    return ", ".join(parts)


def check_supported() -> None:
    """Refuse a Dask whose internals are not as pinned.

    Raises
    ------
    UnsupportedDask
        Naming each difference.
    """
    found = differences()
    if found:
        raise UnsupportedDask(distributed.__version__, found)
