"""The cluster's token: made once, for its owner only, sent without showing it, and nowhere to be
seen."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from launch import on_slurm, token
from launch.spec import BatchJob
from launch.token import TokenError, ensure_token, protect_local_ray


def test_it_is_made_once_and_for_its_owner_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "home" / ".ray" / "auth_token"
    before = os.umask(0)
    try:
        makers = [threading.Thread(target=ensure_token, args=(path,)) for _ in range(8)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
    finally:
        os.umask(before)
    made = path.read_text()
    assert not caplog.records, "no moment at which others could read it"
    assert (len(made), path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (
        64,
        0o600,
        0o700,
    )
    assert ensure_token(path).read_text() == made
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_others_can_read_is_closed_and_an_empty_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "token"
    path.write_text("ab" * 32)
    path.chmod(0o644)
    assert ensure_token(path).stat().st_mode & 0o777 == 0o600
    assert "could be read by others" in caplog.text
    assert "abab" not in caplog.text
    path.write_text("\n")
    with pytest.raises(TokenError, match="which is empty"):
        ensure_token(path)


def test_a_local_ray_is_protected_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "token"
    for given, expected in (
        ({}, {"RAY_AUTH_MODE": "token"}),
        ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "disabled"}),
        ({"RAY_AUTH_TOKEN": "theirs"}, {"RAY_AUTH_TOKEN": "theirs"}),
    ):
        variables = {**given, "RAY_AUTH_TOKEN_PATH": str(path)}
        protect_local_ray(variables)
        assert variables == {**expected, "RAY_AUTH_TOKEN_PATH": str(path)}
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_is_sent_over_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for ssh that notes its command line and runs the command here, in a folder of
    the node's name."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        f"""#!/bin/bash
echo "$@" >> {tmp_path}/seen
if [ "$4" = dead ]; then echo "no route" >&2; exit 255; fi
exec bash -c "$(echo "$5" | sed "s,/here/,/$4/,g")"
"""
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    path = tmp_path / "here" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert token.main(["node2"]) == 0
    copy = tmp_path / "node2" / "token"
    assert copy.read_text() == path.read_text()
    assert copy.stat().st_mode & 0o777 == 0o600
    shown = capsys.readouterr()
    assert f"export RAY_AUTH_TOKEN_PATH={path}" in shown.out
    assert token.main(["dead"]) == 2
    shown2 = capsys.readouterr()
    assert "no copy on dead (no route)" in shown2.err
    assert (
        path.read_text()
        not in shown.out + shown.err + shown2.out + shown2.err + (tmp_path / "seen").read_text()
    )


def test_slurms_script_names_the_file_and_never_holds_the_token(spec, view, tmp_path: Path) -> None:
    asked = spec("", nodes=2, workers=2, batch=BatchJob("demo", runner="ray"))
    assert on_slurm.run(asked, view) == 0
    secret, script = tmp_path / "ray_token", (tmp_path / "slurm.sh").read_text()
    assert f"export RAY_AUTH_TOKEN_PATH={secret}" in script
    assert "--disable-usage-stats" in script
    assert (
        secret.read_text()
        not in script + view.out.getvalue() + (tmp_path / "slurm_job.json").read_text()
    )
    assert {
        file.name: file.stat().st_mode & 0o777 for file in (secret, tmp_path / "slurm_job.json")
    } == {"ray_token": 0o600, "slurm_job.json": 0o600}
    assert (
        subprocess.run(["bash", "-n", tmp_path / "slurm.sh"], capture_output=True, text=True).stderr
        == ""
    )
