"""Whether the LMCache of the unit tests is like the real one; for `lmcache_restart.py`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed import api, internal_api
from lmcache.v1.distributed.l2_adapters import base
from lmcache.v1.memory_management import TensorMemoryObj
from lmcache.v1.platform import create_event_notifier

from tests import lmcache_fakes as fakes


def check_types(check: Callable[[bool, str], None]) -> None:
    """What the unit tests take for LMCache is like it, in all that the adapter uses."""
    real, fake = base.L2AdapterInterface, fakes.L2AdapterInterface
    check(
        real.__abstractmethods__ == fake.__abstractmethods__,
        f"the fake has the {len(real.__abstractmethods__)} abstract methods of the real interface",
    )
    differ = [
        name
        for name, member in vars(fake).items()
        if inspect.isfunction(member)
        and not (name.startswith("_account"))
        and [*inspect.signature(member).parameters]
        != [*inspect.signature(getattr(real, name)).parameters]
    ]
    check(not differ, f"methods have the same parameters (different: {differ})")
    for mine, theirs in (
        (fakes.ObjectKey, api.ObjectKey),
        (fakes.MemoryLayoutDesc, api.MemoryLayoutDesc),
        (fakes.L1MemoryDesc, internal_api.L1MemoryDesc),
        (fakes.AdapterUsage, base.AdapterUsage),
    ):
        fields = [[f.name for f in dataclasses.fields(c)] for c in (mine, theirs)]
        check(fields[0] == fields[1], f"{theirs.__name__} has the fields {fields[1]}")
    results = [[c(True, 5), c(False, 0)] for c in (fakes.L2StoreResult, internal_api.L2StoreResult)]
    told = [[(r.is_successful(), r.bytes_transferred()) for r in pair] for pair in results]
    check(told[0] == told[1], f"results of stores say the same: {told[1]}")
    bits = []
    for kind in (fakes.Bitmap, Bitmap):
        bitmap = kind(9)
        bitmap.batched_set([0, 8])
        bits.append([bitmap.size(), *map(bitmap.test, range(9))])
    check(bits[0] == bits[1], "bitmaps say the same")
    notifier = create_event_notifier()
    lacks = [n for n in ("fileno", "notify", "consume", "close") if not hasattr(notifier, n)]
    notifier.close()
    lacks += [
        n
        for n in ("data_ptr", "get_size", "get_shapes", "get_dtypes", "is_valid")
        if not hasattr(TensorMemoryObj, n) or not hasattr(fakes.MemoryObject(0, 2), n)
    ]
    check(not lacks, f"notifiers and objects have what is used (lacking: {lacks})")
