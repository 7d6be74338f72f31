"""Create and copy the secret token of a Ray cluster, in a file that only its owner can read.

    python -m launch.token                 create it here if missing; print what to export
    python -m launch.token node2 node3     the same, and copy it to those machines over ssh

The servers and clients of a cluster all need the same token. It is never printed, never part of a
command line and never in an environment variable: those hold the file's path.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from launch.screen import print_result

MODE, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"  # read by Ray's servers and clients
# what runs on the other machine
TAKE = (
    'umask 077 && mkdir -p "$(dirname "{path}")" && cat > "{path}.new" && mv "{path}.new" "{path}"'
)
SSH_S = 60
log = logging.getLogger(__name__)


class TokenError(ValueError):
    """Report that the token's file is unsafe, or could not be created or sent."""


def default_path() -> Path:
    """Return the path that Ray itself uses: `RAY_AUTH_TOKEN_PATH`, else ~/.ray/auth_token."""
    return Path(os.environ.get(PATH) or Path.home() / ".ray" / "auth_token")


def ensure_token(path: Path) -> Path:
    """Create the token if there is none; return its path.

    Raises TokenError for a file that is empty or that others could read.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Written beside and linked into place: readers see a complete file, and of two writers the
        # first one wins.
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with open(
            os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii"
        ) as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        if path.stat().st_mode & 0o077:  # Ray itself creates it with this mode
            path.chmod(0o600)
            log.warning(
                "%s could be read by others and is now for its owner only; if they matter, remove"
                " it and start again",
                path,
            )
    except OSError as error:
        raise TokenError(
            f"Ray's token: got {error}, expected a file of our own for our eyes only. Fix:"
            f" {PATH}=<file>"
        ) from error
    if not path.is_file():  # of a pipe no reader would come to an end
        raise TokenError(f"Ray's token: got {path}, expected a file. Fix: {PATH}=<file>")
    if not path.read_text(encoding="ascii", errors="replace").strip():
        raise TokenError(
            f"Ray's token: got {path}, which is empty, expected a token. Fix: rm {path}"
        )
    return path


def environment(path: Path) -> dict[str, str]:
    """Return the environment variables that Ray's servers and clients need."""
    return {MODE: "token", PATH: str(path)}


def protect_local_ray(variables: MutableMapping[str, str] = os.environ) -> None:
    """Turn on token authentication for a local Ray, unless the user has decided otherwise.

    Call it before Ray is imported and started. Raises TokenError.
    """
    if variables.get(MODE, "token").lower() == "token" and not variables.get("RAY_AUTH_TOKEN"):
        variables.update(environment(ensure_token(Path(variables.get(PATH) or default_path()))))


def send(path: Path, nodes: Sequence[str]) -> None:
    """Copy the token to the same path on `nodes`, through ssh's standard input.

    Raises TokenError with the names of nodes that failed.
    """
    failed = []
    for node in nodes:
        command = ["ssh", "-o", "BatchMode=yes", "--", node, TAKE.format(path=path)]
        try:
            done = subprocess.run(
                command, input=path.read_bytes(), capture_output=True, check=False, timeout=SSH_S
            )
            reason = done.stderr.decode(errors="replace").strip() if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = type(error).__name__
        if reason:
            failed.append(f"{node} ({reason.splitlines()[-1]})")
    if failed:
        rule = "ssh that asks for no password"
        raise TokenError(
            f"sending Ray's token: got no copy on {', '.join(failed)}, expected {rule}. Fix: copy"
            f" {path} by hand"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Create the token, send it, and print what to export; exit code 2 when that fails."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m launch.token", description=__doc__, formatter_class=plain
    )
    parser.add_argument(
        "nodes", nargs="*", help="machines that get a copy at the same path, as ssh knows them"
    )
    nodes = parser.parse_args(arguments).nodes
    try:
        path = ensure_token(default_path())
        send(path, nodes)
    except TokenError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(f"export {name}={value}" for name, value in environment(path).items()))
    return 0


if __name__ == "__main__":
    sys.exit(print_result(main))
