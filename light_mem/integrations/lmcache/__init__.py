"""LightMem as an L2 adapter of LMCache's multi-process mode: objects that outlive the server.

adapter.py      LightMemL2Adapter: the class that LMCache makes, and all that touches its types
transfers.py    Transfers: stores and loads on their way, without blocking anyone
jobs.py         what passes between LMCache's threads and ours; under_way.py: what is under way
discards.py     blocks that are not to stay
keys.py         KeySpace: hashes of LMCache's keys
ledger.py       which keys LMCache believes to be stored, and how long they are
opening.py      a service over the L1 pool
options.py      what may stand in `adapter_params`

Only adapter.py imports LMCache.
"""
