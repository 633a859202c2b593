"""Imitations of Slurm's `sbatch`, `srun` and `scontrol`, which run the batch scripts of scripts/slurm on one machine.

A job takes at most two tasks, and an array two elements at once, since the tests' machine is small. `sbatch` waits for
its job, as `sbatch --wait` does. A job's files lie in jobs/ of the working directory: NUMBER.srun holds the process id
of its srun while that runs; NUMBER.log what it printed, in all of its starts; NUMBER.starts a line for each start.
"""

import os
import signal
import sys
from pathlib import Path

from helpers import ROOT, wait_for

SRUN = """
import os, signal, subprocess, sys

flags, command = [], sys.argv[1:]
while command[0].startswith("-"):
    flags.append(command.pop(0))
# Without this flag a task gets one core.
assert f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}" in flags
nodes = int(os.environ["SLURM_NNODES"])
tasks = int(os.environ["SLURM_NTASKS"])
names = ",".join(["localhost"] * nodes)
processes = []
for task in range(tasks):
    node, local = divmod(task, tasks // nodes)
    step = {"STEP_ID": 0, "STEP_NUM_TASKS": tasks, "STEP_NUM_NODES": nodes, "STEP_NODELIST": names, "PROCID": task}
    step |= {"LOCALID": local, "NODEID": node, "STEP_TASKS_PER_NODE": f"{tasks // nodes}(x{nodes})"}
    variables = {f"SLURM_{name}": str(value) for name, value in step.items()}
    processes.append(subprocess.Popen(command, env={**os.environ, **variables}))

def forward(signum, frame):
    for process in processes:
        process.send_signal(signum)

signal.signal(signal.SIGUSR1, forward)
signal.signal(signal.SIGTERM, forward)
with open(f"jobs/{os.environ['SLURM_JOB_ID']}.srun", "w") as file:
    file.write(str(os.getpid()))
codes = [process.wait() for process in processes]
os.unlink(file.name)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SBATCH = """
import os, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

script, *arguments = sys.argv[1:]
options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\\S+)", open(script).read(), re.MULTILINE))
nodes = int(options["nodes"])
tasks = int(options.get("ntasks", 0)) or nodes * int(options["ntasks-per-node"])
if tasks > 2:
    nodes, tasks = 1, 2
elements = int(os.environ.get("ARRAY", 2)) if "array" in options else 0
assert not elements or options["array"].startswith("0-")
os.makedirs("jobs", exist_ok=True)

def run(element):
    number = f"{os.getpid()}{element:02}"  # each element of an array has a number of its own
    job = {"JOB_ID": number, "NNODES": nodes, "NTASKS": tasks, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    job["CPUS_PER_TASK"] = options["cpus-per-task"]
    if elements:
        job |= {"ARRAY_JOB_ID": os.getpid(), "ARRAY_TASK_ID": element, "ARRAY_TASK_COUNT": elements}
    variables = {f"SLURM_{name}": str(value) for name, value in job.items()}
    while True:
        with open(f"jobs/{number}.log", "a") as log, open(f"jobs/{number}.starts", "a") as starts:
            starts.write(f"{element}\\n")
            starts.flush()
            environment = {**os.environ, **variables, "ENVIRONMENT": "BATCH"}
            code = subprocess.call(["bash", script, *arguments], env=environment, stdout=log, stderr=log)
        if not os.path.exists(f"jobs/{number}.requeue"):
            return code
        os.unlink(f"jobs/{number}.requeue")

with ThreadPoolExecutor(max(elements, 1)) as pool:
    sys.exit(max(pool.map(run, range(max(elements, 1)))))
"""
SCONTROL = """
import os, sys

assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]]
open(f"jobs/{os.environ['SLURM_JOB_ID']}.requeue", "w").close()
"""


def install(folder: Path) -> dict[str, str]:
    """Write the imitations into a folder and return the environment of a machine that has them."""
    folder.mkdir()
    for name, text in (("srun", SRUN), ("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def script(name: str) -> str:
    return str(ROOT / "scripts/slurm" / f"{name}.sbatch")


class Job:
    """A job of one task, or an element of an array, that `sbatch` has started in a folder."""

    def __init__(self, folder: Path, sbatch_pid: int, element: int = 0):
        self.path = folder / "jobs" / f"{sbatch_pid}{element:02}"

    def file(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def signal(self, signum: int) -> None:
        """Send a signal to the job's tasks. SIGTERM is preemption, after which Slurm itself requeues the job."""
        assert wait_for(self.file(".srun").exists)
        if signum == signal.SIGTERM:
            self.file(".requeue").touch()
        os.kill(int(self.file(".srun").read_text()), signum)

    @property
    def starts(self) -> int:
        return len(self.file(".starts").read_text().splitlines())

    @property
    def log(self) -> str:
        """What the job has printed so far, in all of its starts."""
        path = self.file(".log")
        return path.read_text() if path.exists() else ""
