"""Moves bytes: shard files, copies, worker processes. Asks `light_mem.index` where they go.

base.py         StorageEngine: what a storage behind the service must do
local.py        LocalStorageEngine: shards on a local disk
writing.py      its batches of writes: find room, copy, publish
keeping.py      its pins, and leases of blocks that are viewed
fence.py        keeps its changes and its leaving apart
memory.py       MemoryStorageEngine: the same promises in one process's memory, for tests
opening.py      makes, opens, resizes and rebuilds a store's files
reindex.py      a store's index made anew from its slots files, order of use included
shard_file.py   one shard's data and slot records, mapped
places.py       where in the KV memory a block lies: rows, or regions
copy.py         copies between the KV memory and slots, with the checksum
kvmemory.py     how another process reaches the KV tensor's memory
maps.py         what lies behind an address, from /proc/self/maps
process.py      who a process is, whether it lives, whether it was forked
futex.py        waiting on a word of shared memory
task_table.py   the shared task table: layout and mapping
histogram.py    latencies in shared memory; table_stats.py: all numbers of a table
queue.py        TaskQueue: blocks waiting for a worker
program.py      processes of our own: started, and ending with their parent
worker.py       the worker process
pool.py         starts, watches and replaces workers
"""
