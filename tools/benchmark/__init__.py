"""The parts of `tools/bench.py`, which measures LightMem beside what people use instead.

plan         what is moved: block shape, page order, hashes of each generation
machine      what it ran on; CPU use of other processes; the page cache of files
host         the process that holds a contestant, and its program
contestant   the parent's handle on the processes of one contestant
samples      timed runs, and which of them count
rivals       a small class each: LightMem, the baseline, and what is used instead
ratios       of two contestants, of the samples of each round
copies       first fill, writes, cached read, mixed, cold read, by block shape
latency      one block at a time, call to data
beside       reads while writes are queued
tasks        throughput by blocks a task and tasks under way
queries      look-ups, `create`, `ready`, opening, by entries
growth       throughput by entries, shards, workers and servers
flatness     what growth costs: shares of the smallest number; figures as CSV
resident     how much of a file is in the page cache
memory_limit a control group with a memory limit (tools/bench_beyond_memory.py)
beyond_memory who moves the bytes there
sharing      locks, system calls and cache lines of a batch (tools/count_sharing.py)
process      start, idle use, memory
report       tables, ratios first; report_copies those of `copies`
plots        PNG
"""

import sys
from pathlib import Path

# The LightMem of this checkout is measured, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
