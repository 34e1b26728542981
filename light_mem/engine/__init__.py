"""Moves bytes: shard files, copies, worker processes. Asks `light_mem.index` where they go.

the engine
  base.py          StorageEngine: what a storage behind the service must do
  local.py         LocalStorageEngine: shards on a local disk; settings.py: how it is to be
  open_store.py    what a process has open of them: look-ups, changes; member.py: leases, leaving
  reading.py       batches of reads: find, copy, look again; read_job.py: one batch
  writing.py       batches of writes: find room; filling.py: copy; write_job.py: one batch;
                   no_room.py: why there is none
  publishing.py    copied blocks become visible
  write_now.py     one block at once; intents.py: the slots that are being filled
  dealing.py       in which order a task's writes are queued; claiming.py: who takes which
  keeping.py       pins, and leases of blocks that are viewed
  removing.py      taking blocks out, and back what the dead left
  open_shards.py   the shards that a process has open; fence.py: changes, and leaving;
                   store_identity.py: whether they are still of the same store
  opening.py       makes, opens and resizes a store; shard_making.py: its shards' files;
                   store_room.py: whether there is room;
                   foreign.py: files of others in its place; lost_shards.py: some that are gone
  index_making.py  the index at an opening; reindex.py: what it lists when it is made anew, from the
                   slots files, order of use included
bytes
  shard_header.py  where a shard's files lie, and whose they are
  shard_file.py    one shard's data, mapped; slot_records.py: whose it is
  places.py        where in the KV memory a block lies: rows, or regions
  copy.py          what copies between the KV memory and slots have in common, with the checksum:
                   gather.py, scatter.py, both planned; copy_loops.py: made; groups.py: together
  sinks.py         where a gather puts bytes; pieces.py: how a block is cut
  page_views.py    the KV memory as it is copied; scratch.py: private memory on the way
  device_reads.py  reads for which a device is waited: direct_reads.py, past the page cache;
                   bring_in.py: into it, later
  first_touch.py   pages of the KV memory that a worker copies for the first time
  mapped_writes.py slots written by calls or through the mapping; dirty_pages.py: what is dirty
  slot_calls.py    slots read by calls: what is lost is an error, and no SIGBUS
  small_reads.py   short reads in the thread that asks; small_writes.py; in_server.py: both;
                   scans_ahead.py: what such writes must not wait for
  read_ahead.py    a list of spans, by threads (device_threads.py), past the page cache
  direct_writes.py writes past the page cache; dropping.py: what cannot go so; page_cache.py
the KV memory
  kvallocation.py  a KV tensor that others can map
  kvmemory.py      how another process reaches it; maps.py: what lies behind an address
workers
  task_table.py    the shared task table; table_memory.py: mapped; table_layout.py: what it holds
  histogram.py     latencies in shared memory; table_stats.py: all numbers of a table
  queue.py         TaskQueue: blocks waiting for a worker; queue_lock.py: who has it in hand
  worker.py        the worker process; batch_report.py: what it tells of a batch
  pool.py          watches and replaces workers; restarts.py: when; one_thread.py: its thread
  worker_processes.py  starts them, and hears of them; worker_log.py: what they say
  map_ahead.py     a worker without work maps the KV memory
  child_start.py   processes of our own: what they run and are told; child_end.py: how one ended;
                   program.py: their environment, and their end with their parent
  affinity.py      which CPUs they run on
  process.py       who a process is, whether it lives, whether it was forked
  futex.py         waiting on a word of shared memory
"""
