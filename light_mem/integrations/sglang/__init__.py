"""LightMem as a storage backend of SGLang's HiCache: pages that outlive the server.

backend.py       LightMemStorage: the class that SGLang loads, and all that touches SGLang's types
engine.py        settings, environment and weights of the engine in this process
options.py       the backend's options in SGLang's configuration
pool.py          HostPool: where the pages of a host pool lie in memory
store.py         PageStore: the pages of one host pool, in and out of the store
opening.py       the services of all pools, and each one's share of the room
hits.py          which prefix of a request can be loaded from several pools
description.py   what a key means besides the tokens it stands for
device.py        how KV lies in the device's memory: what decides it

Only backend.py and engine.py import SGLang.
"""
