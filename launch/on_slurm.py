"""SLURM: one batch script per stage, in which srun starts a torchrun agent on every node. Written to the run folder, submitted on request.

`signal_s` before the time limit the script asks the workers to save and leave, and puts itself back into the queue: its next start
resumes. A stage of a longer curriculum waits for the one before it (`afterok`).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess

from launch.progress import ProgressView
from launch.spec import JOB_ID, USER_ERROR, LaunchSpec, fill

SCRIPT = """\
#!/bin/bash
{directives}
set -u
{setup}
{environment}

# An address rather than a name, as names of nodes need not resolve everywhere; a port of its own for every job.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
port=$((20000 + SLURM_JOB_ID % 20000))

srun --kill-on-bad-exit=1 {container}{agent} \\
  --nnodes={nodes} --nproc-per-node={each} --max-restarts={restarts} --rdzv-backend=c10d \\
  --rdzv-endpoint="$address:$port" --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" \\
  --no-python {worker} &
step=$!
leaving=no
leave() {{
  leaving=yes
  echo "the time limit is near: asking the workers to save"
  scancel --signal=TERM "$SLURM_JOB_ID.0" # to the step; a SIGTERM to srun itself would kill it at once
}}
trap leave USR1

wait "$step"
code=$?
while [ "$leaving" = yes ] && kill -0 "$step" 2>/dev/null; do # a trap interrupts wait
  wait "$step"
  code=$?
done
if [ "$leaving" = yes ] && [ {requeue} = yes ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def run(spec: LaunchSpec, view: ProgressView) -> int:
    """Write the script of this stage; submit it if asked to. Returns 0, or 2 when sbatch is missing or refuses."""
    assert spec.batch is not None
    spec.logs.mkdir(parents=True, exist_ok=True)
    script = spec.logs.parent / "slurm.sh"
    script.write_text(render(spec), encoding="utf-8")
    if not spec.batch.submit:
        after = " --dependency=afterok:<job of the stage before>" if spec.batch.after else ""
        view.text(f"written; submit it with: sbatch{after} {script}   (launcher.slurm.submit=true does that)")
        return 0
    if shutil.which("sbatch") is None:
        view.text("submitting: got no sbatch on this machine, expected SLURM's client. Fix: run this on a login node")
        return USER_ERROR
    command = ["sbatch", "--parsable"]
    if spec.batch.after:
        command.append(f"--dependency=afterok:{spec.batch.after.read_text(encoding='utf-8').strip()}")
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        view.text(f"submitting {script}: got {done.stderr.strip()}, expected a job. Fix: the launcher.slurm keys")
        return USER_ERROR
    job = done.stdout.strip().split(";")[0]
    (spec.logs.parent / JOB_ID).write_text(job + "\n", encoding="utf-8")
    view.text(f"job {job}: {script}, log in {spec.logs / f'slurm_{job}.log'}")
    return 0


def render(spec: LaunchSpec) -> str:
    """The batch script."""
    job = spec.batch
    assert job is not None
    each = spec.workers // spec.nodes
    asked = {
        "job-name": job.name,
        "nodes": spec.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": each * spec.cpus_per_worker,
        "gres": job.devices,
        "account": job.account,
        "partition": job.partition,
        "time": job.time,
        "chdir": spec.directory,
        "output": spec.logs / "slurm_%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{job.signal_s}" if job.signal_s else None,
    }
    directives = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None]
    directives += ["#SBATCH --requeue"] * job.requeue + [f"#SBATCH {option}" for option in job.options]
    return SCRIPT.format(
        directives="\n".join(directives),
        setup="\n".join(job.setup),
        environment="\n".join(f"export {name}={shlex.quote(value)}" for name, value in spec.environment.items()),
        container="".join(shlex.quote(word) + " " for word in job.container),
        agent=shlex.join(fill(("{python}", "-m", "torch.distributed.run"), "")),
        worker=shlex.join(fill(spec.command, str(spec.config_path))),
        nodes=spec.nodes,
        each=each,
        restarts=spec.max_restarts,
        requeue="yes" if job.requeue else "no",
    )
