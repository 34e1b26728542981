"""Long runs with a seed and a duration: `python -m tests.stress.kills --seed 0 --seconds 600`.

player.py    a server at random work that looks at every byte it reads
nursery.py   forks players, kills them, and knows when one hangs
kills.py     kill -9 of workers, servers and all at once, round after round
eviction.py  readers against eviction at full speed
servers.py   servers that join, leave, die and are stopped on one store

The suite plays a short round of each (tests/test_stress.py).
"""
