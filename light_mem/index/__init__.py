"""Finds blocks: everything about where a hash lives, nothing about moving its bytes.

format.py       the bytes on disk by name; the only place that knows an offset
keys.py         hash values as 128-bit keys; the shard and bucket a key belongs to
description.py  the description of a store (`store.json`): geometry, identity
room.py         room for files, allocated before they are mapped; store_files.py: opened, made
locks.py        file locks: one per shard, byte ranges for owners; kept_lock.py: on an open file;
                lock_holder.py: who has one
owners.py       who has the store open, and which slots each was filling; members.py: their locks;
                proc_stat.py: what /proc says of a process
leases.py       blocks that processes look at in place
file.py         the mapped index file: arrays over its sections
control.py      the numbers of a shard's control page
lookup.py       look-ups without a lock
runs.py         runs of slots: what of a block lies in which
space.py        free runs of slots of one shard
replica.py      one process's copy of them, kept true by the shard's journal
order.py        order of use: which block goes first; ages.py: how long ago
retention.py    times to live and pins
chains.py       the chains of a shard: put in, cut out
shard.py        changes under the shard's lock (change.py): find, mark, publish
allocation.py   its room: free, or that of blocks which go
putting.py      how blocks get into it; written.py: what is to be said of one
taking.py       how blocks leave it, and how it is put in order after a death
recovery.py     a shard's index made anew from slot records
"""
