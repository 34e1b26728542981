"""The drop-in interface of the C++ LightMem: `PyLocalCacheService`, `PyTask`, `PyState`.

Two generations of it are in use. The older takes `tokens=`, one token a page: a block's hash is
the xxh3-128 of its chunk of `_n` tokens as uint64, and chunks do not depend on each other. The
newer takes `hash_128s=`, one cumulative 128-bit int a page: a block's key is the last one in it.
"""
