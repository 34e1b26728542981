"""LightMem as a secondary tier of vLLM's KV offloading: chunks that outlive the engine.

tier.py           LightMemTier: the class that vLLM makes, and all that touches vLLM's types
transfers.py      TierTransfers: jobs on their way to and from the store, without blocking anyone
background.py     the threads that do them; jobs.py: what passes between them and the scheduler
opening.py        a service over the rows of the primary tier
options.py        the options of the tier in vLLM's configuration
engine_config.py  vLLM's configuration as plain data
plugin.py         the short name `light_mem` for vLLM's configuration

Only tier.py and plugin.py import vLLM.
"""
