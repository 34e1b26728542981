"""CacheClient: the service from another process of the same server."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.process import fork_token
from light_mem.engine.store_identity import StoreIdentity
from light_mem.engine.task_table import TableAddress, TaskTable
from light_mem.index.keys import HashValue
from light_mem.layouts import Layout
from light_mem.service import CacheService
from light_mem.session import Session
from light_mem.task import CacheTask
from light_mem.waiting import check_server

_CONNECTED = ("_session", "_engine", "_connection")  # attributes of one that is connected


class CacheClient(CacheService):
    """The service from another process of the same server; picklable.

    It uses the server's workers and KV tensor: page indices mean the server's pages. It connects
    when it is first used, and takes one lane of the task table for its process. The lane is given
    back when the process ends, or when its clients are closed or dropped and so is each of their
    tasks that is not known to be ready; what is still queued then is Aborted. When the server is
    gone, calls raise ServiceClosedError.
    """

    def __init__(self, address: TableAddress, create_timeout: float) -> None:
        super().__init__(create_timeout)
        self._address = address
        self._connect_guard = threading.RLock()  # a signal's handler may be the next to connect

    def __getattr__(self, name: str) -> Any:
        # Reached only while not connected: these come into being here.
        if name not in _CONNECTED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._connect_guard:
            self._check_open()
            connection: _Connection | None = self.__dict__.get("_connection")
            if connection is None:
                connection = _connect(self._address)
                self._session, self._engine = connection.session, connection.engine
                self._connection = connection
                if self._closed:  # meanwhile: that has not found all of these
                    self._forget()
                    self._check_open()
        return {
            "_connection": connection,
            "_session": connection.session,
            "_engine": connection.engine,
        }[name]

    def _check(self) -> None:
        super()._check()
        if self._session.table.orphaned:
            check_server(self._session.table)

    def _create(self, kind: int, hashes: list[HashValue], layout: Layout) -> CacheTask:
        # `close`, in another thread or a signal's handler, gives the lane back only after this.
        connection = self._connection
        task = super()._create(kind, hashes, layout)
        task.keep(connection)
        return task

    def client(self) -> CacheClient:
        """Another client of the same service."""
        self._check_open()
        return CacheClient(self._address, self._create_timeout)

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""  # no look at the server: it may be gone
        return f"<CacheClient of pid {self._address.pid}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheClient, (self._address, self._create_timeout)

    def close(self) -> None:
        """Stop using the service; it and other clients of this process go on, and so do tasks that
        somebody has. To wait for what is queued, wait for its tasks."""
        self._closed = True
        self._forget()

    def _forget(self) -> None:
        for name in _CONNECTED:
            self.__dict__.pop(name, None)


class _Connection:
    """A process's one connection to a service, shared by its clients."""

    def __init__(self, table: TaskTable) -> None:
        self.session = Session.open(table, table.lock_path())
        try:
            self.engine = LocalStorageEngine(
                os.fsdecode(bytes(table.header["store"][0])),
                kind="client",
                expected=StoreIdentity.in_table(table.header),
            )
        except BaseException:
            self.session.close()  # else its lane would be taken for as long as this process lives
            raise
        weakref.finalize(self, _disconnect, self.session, self.engine, fork_token())


def _disconnect(session: Session, engine: LocalStorageEngine, token: int) -> None:
    if token == fork_token():
        session.close()
        engine.close()


_connections: weakref.WeakValueDictionary[str, _Connection] = weakref.WeakValueDictionary()
_connections_guard = threading.RLock()


def _after_fork_in_child() -> None:
    global _connections_guard
    _connections.clear()  # their locks are the parent's
    _connections_guard = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _connect(address: TableAddress) -> _Connection:
    with _connections_guard:
        connection = _connections.get(address.table_id)
        if connection is None:
            made = _Connection(TaskTable.attach(address))
            connection = _connections.setdefault(address.table_id, made)  # a handler's, meanwhile
        return connection
