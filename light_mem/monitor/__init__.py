"""Watching servers from outside: from the store's files and the task tables in shared memory.

Nobody is asked, stopped or joined: whoever looks is no process of the store.

servers.py   the task tables of the servers that have a store open
looking.py   one look at a store and its servers
rates.py     what two looks say together; one look as plain values
"""

from light_mem.monitor.looking import Look, ServerLook, StoreLook, look
from light_mem.monitor.rates import Rates, rates

__all__ = ["Look", "Rates", "ServerLook", "StoreLook", "look", "rates"]
