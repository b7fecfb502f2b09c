#!/usr/bin/env python3
"""Run the collection on a real Slurm cluster on this machine, kill a node, and see what is lost.

    sudo .venv/bin/python workflow/slurm_proof.py

Installs Slurm and munge from Debian's packages where they are missing, starts slurmctld and three
slurmd as nodes of one core each on the loopback interface, and runs all papers at the smoke preset
through the profile `slurm`. In the middle one node that runs a paper loses its power: its slurmd,
its job and everything below are killed. At the end three things must hold, or it exits with 1:
every paper has its record, no record that was there before the kill was written again, and a second
run finds nothing to do. Needs root, as a cluster does.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("/etc/slurm/slurm.conf")
MARK = "# written by wellposed's slurm_proof.py"
PACKAGES = ["slurm-wlm", "munge"]
FIRST_PORT = 17011
PATIENCE = 1800
"""Seconds after which the run is given up."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def install() -> None:
    """Slurm and munge from Debian, where they are missing."""
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")):
        return
    say("installing " + " ".join(PACKAGES))
    call("apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES)


def start(home: Path, nodes: int) -> list[str]:
    """Write the configuration and start all daemons; the names of the nodes."""
    if CONFIG.exists() and MARK not in CONFIG.read_text():
        sys.exit(f"{CONFIG} belongs to another cluster: run this on a machine without Slurm's own")
    host = socket.gethostname()
    names = [f"node{i + 1}" for i in range(nodes)]
    lines = [
        MARK,
        "ClusterName=loopback",
        f"SlurmctldHost={host}(127.0.0.1)",
        "SlurmUser=root",
        "SlurmctldPort=17001",
        f"StateSaveLocation={home}/state",
        f"SlurmdSpoolDir={home}/spool.%n",
        f"SlurmctldPidFile={home}/slurmctld.pid",
        f"SlurmdPidFile={home}/slurmd.%n.pid",
        f"SlurmctldLogFile={home}/slurmctld.log",
        f"SlurmdLogFile={home}/slurmd.%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "SlurmdParameters=config_overrides",  # the nodes claim what the machine may not have
        "SlurmdTimeout=10",  # a dead node is noticed within seconds, not minutes
        "MinJobAge=600",
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={home}/completed.txt",
        *(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={FIRST_PORT + i} "
            "CPUs=1 RealMemory=8000"
            for i, name in enumerate(names)
        ),
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    for name in ("state", *(f"spool.{name}" for name in names)):
        (home / name).mkdir(parents=True)
    CONFIG.parent.mkdir(parents=True, exist_ok=True)
    CONFIG.write_text("\n".join(lines) + "\n")
    if subprocess.run(["munge", "--no-input"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        call("runuser", "-u", "munge", "--", "/usr/sbin/munged", "--force")
    call("slurmctld")
    for name in names:
        call("slurmd", "-N", name)
    deadline = time.monotonic() + 60
    while call("sinfo", "--noheader", "--format=%T %D").split() != ["idle", str(nodes)]:
        if time.monotonic() > deadline:
            sys.exit(f"the nodes did not come up:\n{call('sinfo')}")
        time.sleep(1)
    return names


def stop(home: Path) -> None:
    """End all daemons and take the configuration away."""
    for path in home.glob("*.pid"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except (OSError, ValueError):
            continue
    CONFIG.unlink(missing_ok=True)


def running() -> dict[str, tuple[str, str]]:
    """The node, and the rule, of each running job."""
    jobs = {}
    for line in call("squeue", "--noheader", "--states=R", "--format=%i|%N|%k").splitlines():
        job, node, comment = line.split("|", 2)
        jobs[job] = (node, comment)
    return jobs


def power_off(home: Path, node: str) -> int:
    """Kill a node with all that runs on it; how many processes that were."""
    daemon = int((home / f"slurmd.{node}.pid").read_text())
    victims = {daemon}
    wanted = f"SLURMD_NODENAME={node}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == daemon or wanted in (entry / "environ").read_bytes().split(b"\0"):
                victims.add(int(entry.name))
                if b"slurmstepd" in (Path("/proc") / str(parent) / "cmdline").read_bytes():
                    victims.add(parent)
        except (OSError, ValueError):
            continue
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(victims)


def records(out: Path) -> dict[str, tuple[int, str]]:
    """Time of writing and content of every finished run."""
    found = {}
    for path in out.glob("smoke/*/*/record.json"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.parts[-3]] = (path.stat().st_mtime_ns, digest)
    return found


def submit(out: Path, jobs: int, log: Path) -> subprocess.Popen[bytes]:
    command = [Path(sys.executable).with_name("wellposed"), "run", "all", "--preset", "smoke"]
    options = ["--profile", "slurm", "--jobs", str(jobs), "--out", str(out)]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )


def prove(home: Path, nodes: int) -> bool:
    out, log = home / "runs", home / "run.log"
    papers = sorted(path.stem for path in ROOT.glob("notebooks/*/*.yaml"))
    say(f"{len(papers)} papers at the smoke preset on {nodes} nodes")
    began = time.monotonic()
    process = submit(out, nodes, log)
    killed, before = None, {}
    while process.poll() is None:
        if time.monotonic() - began > PATIENCE:
            process.kill()
            say(f"given up after {PATIENCE} s")
            break
        done = records(out)
        if killed is None and len(done) >= len(papers) // 3:
            # A paper in its middle: some of its cells are done, not all.
            for node, comment in running().values():
                slug = next((p for p in papers if p in comment and p not in done), None)
                cells = [p.read_text().split() for p in out.glob(f"smoke/{slug}/*/progress")]
                if slug and any(len(c) == 2 and 0 < int(c[0]) < int(c[1]) for c in cells):
                    before = records(out)
                    count = power_off(home, node)
                    killed = (slug, node)
                    say(f"{len(before)} papers done; killed {node} under {slug}: {count} processes")
                    break
        time.sleep(0.5)
    seconds = time.monotonic() - began
    after = records(out)
    again = submit(out, nodes, log.with_name("again.log"))
    again.wait()
    checks = {
        "a node was killed in the middle of a paper": killed is not None,
        "the run ended well": process.returncode == 0,
        "every paper has its record": sorted(after) == papers,
        "what was killed was run again": killed is None or killed[0] in after,
        "nothing that had finished was written again": all(
            after.get(slug) == state for slug, state in before.items()
        ),
        "a second run has nothing to do": again.returncode == 0 and records(out) == after,
    }
    for text, good in checks.items():
        say(f"{'yes' if good else 'NO '}  {text}")
    say(f"{seconds:.0f} s in all; {sum(1 for _ in (home / 'completed.txt').open())} jobs on Slurm")
    good = all(checks.values())
    if not good:
        print(log.read_text()[-3000:], (out / ".snakemake.log").read_text()[-3000:], sep="\n")
    print(
        json.dumps({"papers": len(papers), "killed": killed, "seconds": round(seconds), **checks})
    )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3, help="virtual nodes of one core [3]")
    nodes = parser.parse_args().nodes
    if nodes < 2:
        sys.exit("--nodes must be at least 2: one of them is going to be killed")
    if os.geteuid():
        sys.exit("a cluster needs root: run this with sudo, on a machine you may break")
    install()
    home = Path(tempfile.mkdtemp(prefix="wellposed-slurm-"))
    try:
        start(home, nodes)
        good = prove(home, nodes)
    finally:
        stop(home)
    shutil.rmtree(home, ignore_errors=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
