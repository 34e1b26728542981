"""`light-mem metrics`: the metrics of a store for Prometheus, once or served."""

from __future__ import annotations

import argparse
import sys

from light_mem.commands import output
from light_mem.commands.arguments import Commands, add_command, port

METRICS = """\
Print the metrics of a store and of all servers that have it open, in the format of Prometheus; or
serve them with --port. It reads files and shared memory at each scrape: it needs nothing from the
servers and may be started and stopped at any time. Needs prometheus-client.

examples:
  light-mem metrics ./cache_storage > /var/lib/node_exporter/lightmem.prom
  light-mem metrics ./cache_storage --port 9123
  light-mem metrics ./cache_storage --port 9123 --address 0.0.0.0

exit code: 0 printed; 130 served until Ctrl-C; 2 no store, no prometheus-client, or the port is
taken
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    summary = "print or serve metrics for Prometheus"
    parser = add_command(commands, "metrics", run_metrics, summary, METRICS, json=False)
    parser.add_argument(
        "--port", metavar="PORT", type=port, help="serve http://ADDRESS:PORT/metrics; 0: a free one"
    )
    parser.add_argument(
        "--address", metavar="ADDRESS", help="with --port: listen there (127.0.0.1)"
    )


def run_metrics(arguments: argparse.Namespace) -> int:
    """Print, or serve until interrupted."""
    from light_mem import metrics
    from light_mem.monitor import look

    if arguments.address is not None and arguments.port is None:
        output.complain("metrics", "--address needs --port")
        return output.FAILED
    metrics.require_client()
    look(arguments.store, ages=False)  # no store: an error now, not a metric
    registry = metrics.registry(arguments.store)
    from prometheus_client import exposition

    if arguments.port is None:
        sys.stdout.write(exposition.generate_latest(registry).decode())
        return output.CLEAN
    address = arguments.address or "127.0.0.1"
    try:
        server, thread = exposition.start_http_server(arguments.port, address, registry)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{address}:{arguments.port}") from None
    try:
        host, number = server.server_address[:2]
        sys.stderr.write(f"light-mem metrics: http://{host!s}:{number}/metrics\n")
        sys.stderr.flush()
        thread.join()
    finally:
        server.shutdown()
        server.server_close()
    return output.CLEAN
