"""The sub-commands of `light-mem`: arguments and text; what they do lies in the library.

arguments.py  sizes, ages and hashes as people write them; the arguments that commands share
output.py     tables, JSON, progress bars, errors and exit codes
demo.py       demo
look.py       inspect, dump
stats.py      stats
top.py        top
metrics.py    metrics
doctor.py     doctor
verify.py     verify
rebuild.py    rebuild
transfer.py   export, import
change.py     resize, clear, evict
"""
