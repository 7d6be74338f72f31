"""Run torchrun's agent: `python -m launch.torchrun_agent [--alone] <torchrun's options>`.

It ends without tracebacks, of which torchrun prints one for every signal and every rank that fails,
and leaves no folders below TMPDIR. Which ranks failed it tells the launcher in a signed line.
`--alone` is for one machine: torchrun's own `--standalone` meets at the machine's name, which need
not be known to any resolver, and listens on all networks without a secret. Here the store is made
first, on the loopback interface; torch takes a server that its process has at a port already
(`multi_tenant`).
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.signed import FAILURES, VARIABLE, sign
from launch.spec import HERE, INTERRUPTED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

ALONE = "--alone"


def main(arguments: Sequence[str]) -> int:
    """Run the agent to its end; return its exit code, 128 + n after signal n."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options, server = list(arguments), None
    if ALONE in options:
        options.remove(ALONE)
        server = serve()
        options = [
            *("--rdzv-backend=static", f"--master-addr={HERE}", f"--master-port={server.port}"),
            *(f"--local-addr={HERE}", *options),
        ]
    with tempfile.TemporaryDirectory(prefix="torchrun_") as folder:
        try:
            run.main([f"--log-dir={folder}", *options])
        except SignalException as stopped:
            return INTERRUPTED + int(stopped.sigval)
        except ChildFailedError as error:
            print(error, file=sys.stderr, flush=True)
            tell(error)
            return 1
    return 0


def tell(error: ChildFailedError) -> None:
    """Tell the launcher, if there is one, which ranks failed, the first to do so first."""
    if token := os.environ.get(VARIABLE):
        first, _ = error.get_first_failure()
        ranks = sorted(error.failures, key=lambda rank: (rank != first, rank))
        failures = [
            {"rank": rank, "code": one.exitcode, "time": one.timestamp}
            for rank, one in ((rank, error.failures[rank]) for rank in ranks)
        ]
        sys.stdout.write(sign(FAILURES, token, failures) + "\n")
        sys.stdout.flush()


def serve() -> Any:
    """Return a store that is served on the loopback interface, as long as it is kept."""
    from torch.distributed import TCPStore

    listener = socket.create_server((HERE, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        HERE,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
