"""What teams copy: clean shell, and dry runs with stand-ins for the schedulers' commands."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.fast

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def test_shellcheck_finds_nothing():
    checked = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", *SCRIPTS], capture_output=True, text=True
    )
    assert len(SCRIPTS) >= 3 and checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, *LAUNCH.glob("*.yaml")], ids=lambda p: p.name)
def test_every_file_begins_with_its_manual(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#!")]
    manual = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert len(manual) > 6 and f"launch/{path.name}" in "\n".join(manual)
    assert path.suffix == ".yaml" or os.access(path, os.X_OK)


def test_local_tells_every_process_its_place():
    command = [sys.executable, LAUNCH / "local.py", "--processes", "2", "--gpus", "4", "--dry-run"]
    told = subprocess.check_output([*command, "--", "composer", "train", "a b"], text=True)
    first, second = told.splitlines()
    assert "COMPOSER_PROCESS=0 COMPOSER_PROCESSES=2" in first and "DEVICES=0,1" in first
    assert "COMPOSER_PROCESS=1" in second and second.endswith("DEVICES=2,3 composer train 'a b'")
    addresses = {re.search(r"127\.0\.0\.1:\d+", line)[0] for line in (first, second)}
    assert len(addresses) == 1


def test_local_ends_all_with_the_code_of_the_first_that_fails():
    code = "import os, sys, time; time.sleep(0 if os.environ['COMPOSER_PROCESS'] == '1' else 60)"
    command = [sys.executable, LAUNCH / "local.py", "--processes", "3", "--", sys.executable, "-c"]
    start = time.monotonic()
    ended = subprocess.run([*command, f"{code}; sys.exit(3)"], capture_output=True, text=True)
    assert ended.returncode == 3 and time.monotonic() - start < 30
    assert "process 1 ended with 3; stopping the others" in ended.stderr
    assert subprocess.run([*command, "pass"]).returncode == 0


def test_a_tpu_pod_is_given_the_command_on_every_host():
    options = ["--name", "pod", "--zone", "z", "--dry-run"]
    words = ["composer", "train", "--workdir", "/a b"]
    told = subprocess.check_output([LAUNCH / "tpu_pod.sh", *options, "--", *words], text=True)
    assert "ssh pod --zone z --worker all --command COMPOSER_PROCESSES=auto composer train" in told
    assert r"/a\ b" in told
    wrong = subprocess.run([LAUNCH / "tpu_pod.sh", "--nam", "pod"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no option --nam" in wrong.stderr


@pytest.fixture
def slurm(tmp_path):
    """An environment whose `srun` runs the command here and `scontrol` notes what it is told."""
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/told\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SLURM_JOB_ID": "17"}, tmp_path / "told"


def composer(slurm, script, **more):
    environment = {**slurm[0], "COMPOSER": f"{sys.executable} -c {script}", **more}
    return subprocess.Popen([LAUNCH / "train.sbatch", "--config", "x"], env=environment)


def test_slurm_queues_again_what_was_preempted_or_died_but_no_mistake(slurm):
    _, told = slurm
    assert composer(slurm, "pass").wait() == 0 and not told.exists()
    assert composer(slurm, "exit(2)").wait() == 2 and not told.exists()
    assert composer(slurm, "exit(9)", SLURM_RESTART_COUNT="20").wait() == 1 and not told.exists()
    assert composer(slurm, "exit(9)").wait() == 0 and told.read_text() == "requeue 17\n"
    told.unlink()
    saving = "import(time,sys,signal)".replace("(", " ").replace(")", "")
    script = f"exec('{saving};signal.signal(15,lambda*_:sys.exit(0));time.sleep(60)')"
    job = composer(slurm, script.replace(" ", "\\x20"))
    time.sleep(1.0)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0 and told.read_text() == "requeue 17\n"


def test_kubernetes_files_are_what_they_say():
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    assert jobset["kind"] == "JobSet"
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    known = {one["name"]: one["value"] for one in container["env"]}
    assert known["COMPOSER_PROCESSES"] == "auto" and container["command"] == ["composer", "train"]
    chips = eval(pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].replace("x", "*"))
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    (prepare,) = yaml.safe_load_all((LAUNCH / "prepare_job.yaml").read_text())
    (container,) = prepare["spec"]["template"]["spec"]["containers"]
    known = {one["name"]: one["value"] for one in container["env"]}
    assert int(known["COMPOSER_PROCESSES"]) == prepare["spec"]["completions"]
