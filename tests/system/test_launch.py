"""Launch scripts: the commands that they run, two nodes, nodes that leave, agents that are killed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from processes import check_plan, end, set_, start
from runs import TINY

from experiments.elastic import PATH, Nodes, alone, coming_and_going, losses
from moe_dist.checkpoint import manifest
from moe_dist.distributed import rendezvous_port
from moe_dist.training.run_spec import parse_run

LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "multinode.sh", "deepspeed.sh", "slurm.sbatch")
VARIABLES = {
    "NODES": "2",
    "NPROC_PER_NODE": "3",
    "RDZV_ENDPOINT": "node0:29400",
    "RDZV_ID": "mine",
    "CONFIG": "moe_4",
}
PLAIN = {"PATH": "/usr/bin:/bin"}  # of a machine with none of the launchers
WAIT = "for i in {1..200}; do sleep 0.1; done"
SHOW = r'[[ $1 == train.py ]] && printf "%s\n" "$@"'
# DeepSpeed (test_ds_configs holds it to that), pdsh and the shell of another node, for the words
# behind --no_python
REMOTE = r"""
while [[ $1 != --no_python ]]; do shift; done; shift
command="cd /;"
for word; do
  if [[ $word == *" "* ]]; then word="\"${word//\"/\\\"}\""; fi
  command+=" "
  for ((i = 0; i < ${#word}; i++)); do
    case ${word:i:2} in
      %h) command+=node1; i=$((i + 1)) ;;
      %n) command+=1; i=$((i + 1)) ;;
      %u) command+=me; i=$((i + 1)) ;;
      %%) command+=%; i=$((i + 1)) ;;
      *) command+=${word:i:1} ;;
    esac
  done
done
exec sh -c "$command"
"""
AS_TOLD = {"optim.lr=1e-4", "optim.warmup_steps=1"}


def ran(script: str, *args: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a launch script with VARIABLES, the given ones in their place, and no launcher on
    its path."""
    environment = PLAIN | VARIABLES | ({"NODES": "1"} if script == "local.sh" else {}) | variables
    command = ["bash", LAUNCH / script, *args]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )


def printed(script: str, *args: str, **variables: str) -> str:
    """Returns the line of a dry run."""
    done = ran(script, "--dry-run", *args, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    return line


def host_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def stub(folder: Path, **programs: str) -> str:
    """Writes short bash programs to `folder`; returns a path on which they come first."""
    folder.mkdir(exist_ok=True)
    for name, does in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{PLAIN['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_the_command_and_runs_nothing(script: str) -> None:
    """There is no torchrun, srun or deepspeed on its path."""
    line = printed(script, "--set", "data.text=two words")
    assert line.startswith("+ ") and line.endswith(r"--set data.text=two\ words"), line
    launcher, *told = {
        "local.sh": ("torchrun", "--nproc-per-node 3", "--folder runs/mine", "moe_4"),
        "multinode.sh": (
            "torchrun",
            "--nnodes 2 --nproc-per-node 3",
            "-endpoint node0:29400 --rdzv-id mine",
            "moe_4",
        ),
        "deepspeed.sh": (
            "deepspeed",
            "--num_nodes 2 --num_gpus 3 --master_addr node0 --master_port 29400",
            "moe_4",
        ),
        "slurm.sbatch": (
            "srun",
            "NODES=2 NPROC_PER_NODE=3 RDZV_ENDPOINT=node0:29400 RDZV_ID=mine CONFIG=moe_4",
            "launch/multinode.sh",
        ),
    }[script]
    assert f" {launcher} " in line and all(each in line for each in told), line


@pytest.mark.parametrize("script", SCRIPTS)
def test_printed_command_has_no_password_and_no_key(script: str, tmp_path: Path) -> None:
    """The executed command has them."""
    keys = [
        "https://me:pa$s@host/a@b",
        "https://me:pa/ss@host",
        "https://host/x?access_token=pa&X-Amz-Signature=ss",
    ]
    keys += [
        "hf_" + "a" * 30,
        "sk-" + "b-" * 9,
        "wandb_v1_" + "c" * 20,
        "ghp_" + "d" * 20,
        "password=pass of five words",
    ]
    args = [f"data.text={key}" for key in keys]
    line = printed(script, *args)
    told = [
        "https://***@host/a@b",
        "https://***@host",
        r"https://host/x\?access_token=***\&X-Amz-Signature=***",
    ]
    told += ["***"] * 4 + ["password=***"]
    assert line.endswith("".join(f" data.text={each}" for each in told)), line
    path = stub(
        tmp_path,
        **dict.fromkeys(("torchrun", "srun"), r'printf "%s\n" "$@"'),
        deepspeed=REMOTE,
        python=SHOW,
    )
    assert ran(script, *args, PATH=path).stdout.splitlines()[-len(args) :] == args
    assert printed(script, "ask-" + "e" * 20, "shelf_" + "f" * 20).endswith(
        f" ask-{'e' * 20} shelf_{'f' * 20}"
    )


WORDS = [
    "x $(touch made)",
    "$(touch made)",
    "`touch made`",
    "a`touch made` b",
    "a;touch made",
    "a|touch made",
    "a&touch made",
    "corpus/*.txt",
    "a=b&c",
    "two  words",
    "~",
    "~/x y",
    "$HOME",
    "${HOME} x",
    "it's",
    "it's two",
    'a"b',
    'a "b" c',
    "a\\b",
    "a\\ b",
    'a\\"b c',
    "\\",
    "end \\",
    "<in",
    ">made",
    "a > made",
    "#none",
    "(x)",
    "{a,b}",
    "[ab]?",
    "!!",
    "a\nb",
    "a\nb c",
    "a\tb",
    "",
    "é ü",
    "100% sure",
    "100%25",
    "50%",
    "%%",
    "%h",
    "%n u",
    "'",
    '"',
    "' '",
    "$",
    "$ x",
    "*",
]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_arguments_survive_the_shell_of_another_node(shell: str, tmp_path: Path) -> None:
    path = stub(
        tmp_path,
        deepspeed=REMOTE.replace("sh -c", f"{shell} -c"),
        python=SHOW.replace(r"\n", r"\0"),
    )
    for name, run in (("x $(touch made)", "a&b"), ("*.c", "`touch made` 'x")):
        done = ran("deepspeed.sh", *WORDS, PATH=path, CONFIG=name, RDZV_ID=run)
        told = done.stdout[done.stdout.index("train.py\0") :].split("\0")[:-1]
        assert told == ["train.py", name, "--folder", f"runs/{run}", "--resume", "auto", *WORDS]
    assert not Path("/made").exists()


def test_one_node_passes_arguments_without_a_shell(tmp_path: Path) -> None:
    path = stub(tmp_path, deepspeed=r'printf "%s\n" "$@"')
    for variables in ({"NODES": "1"}, {"NODE_RANK": "1"}):
        assert (
            ran("deepspeed.sh", "a *$(x) 'b", PATH=path, **variables).stdout.splitlines()[-1]
            == "a *$(x) 'b"
        )


def test_deepspeed_gets_a_hostfile_line_for_each_node(tmp_path: Path) -> None:
    """With one line it trains on that node alone, and passes the quotes on."""
    (tmp_path / "hosts").write_text("node0 slots=2\n# node1 slots=2\n\n")
    for hosts in (tmp_path / "hosts", tmp_path / "none"):
        done = ran("deepspeed.sh", "--dry-run", HOSTFILE=str(hosts))
        assert (done.returncode, done.stderr) == (
            2,
            f"error: HOSTFILE={hosts}: a line for each of NODES=2 nodes\n",
        )


def test_without_python_no_possible_key_is_printed(tmp_path: Path) -> None:
    path = stub(tmp_path, python3="exit 1")
    line = printed("slurm.sbatch", "password=mine", PATH=path)
    assert "mine" not in line and "python3" in line


@pytest.mark.parametrize("script", ["multinode.sh", "deepspeed.sh"])
@pytest.mark.parametrize("missing", ["RDZV_ENDPOINT", "RDZV_ID"])
def test_missing_variable_is_named(script: str, missing: str) -> None:
    done = ran(script, **{missing: ""})
    assert done.returncode == 1 and f"{missing}: " in done.stderr


@pytest.mark.parametrize(
    ("script", "variable", "value", "says"),
    [
        *(("multinode.sh", "RESTARTS", each, "a number, 0 or more") for each in ("-1", "often")),
        *(
            (script, "NPROC_PER_NODE", each, "ranks per node, a number")
            for script in SCRIPTS
            for each in ("two", "0", "-1")
        ),
        *(
            ("multinode.sh", "NODES", each, "a number, or a range such as 1:2")
            for each in ("two", "0", "1:", "2:1")
        ),
        *(
            (script, "RDZV_ENDPOINT", each, "host:port, as node0:29400 or [fd00::1]:29400")
            for script in ("multinode.sh", "deepspeed.sh")
            for each in (
                "node0",
                "node0:",
                ":29400",
                "node0:http",
                "$(touch made):29400",
                "node0;touch made:29400",
                "-x:29400",
                "node0:0",
                "node0:65536",
                "::1",
                "fd00::1:29400",
                "[::1]",
            )
        ),
        *(
            ("deepspeed.sh", "NODES", each, "a number")
            for each in ("two", "0", "1:2", "1 $(touch made)")
        ),
        ("deepspeed.sh", "NODE_RANK", "first", "the number of a node, from 0"),
        *(
            ("local.sh", "NODES", each, "this script is for one; launch/multinode.sh is for more")
            for each in ("2", "1:2")
        ),
    ],
)
def test_invalid_variable_prints_one_line(
    script: str, variable: str, value: str, says: str
) -> None:
    done = ran(script, **{variable: value})
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"error: {variable}={value}: {says}\n",
    )


def test_restarts_must_be_a_number() -> None:
    assert " --max-restarts 0 " in printed("multinode.sh", RESTARTS="")


def test_ipv6_address_has_brackets_only_before_a_port() -> None:
    assert " --rdzv-endpoint \\[::1\\]:29400 " in printed(
        "multinode.sh", RDZV_ENDPOINT="[::1]:29400"
    )
    assert " --local-addr ::1 " in printed("multinode.sh", ADDRESS="[::1]")
    assert " --master_addr ::1 --master_port 29500 " in printed(
        "deepspeed.sh", RDZV_ENDPOINT="[::1]:29500"
    )


@pytest.mark.parametrize(
    ("master", "address", "conf", "told"),
    [
        ("node0:29400", "node0", "", "is_host=1"),
        ("[::1]:29400", "::1", "", "is_host=1"),
        ("[::1]:29400", "[::1]", "a=1", "a=1,is_host=1"),
        (
            "node0:29400",
            "10.0.0.1",
            "",
            None,
        ),  # of the same machine, perhaps: torchrun compares addresses
        ("node0:29400", "10.0.0.1", "a=1", "a=1"),
        ("node0:29400", "node0", "is_host=0", "is_host=0"),
        ("node0:29400", "10.0.0.1", "a=1,is_host=1", "a=1,is_host=1"),
        ("node0:29400", "", "", None),
    ],
)
def test_rendezvous_host_is_found_by_address(
    master: str, address: str, conf: str, told: str | None, tmp_path: Path
) -> None:
    path = stub(tmp_path, getent="exit 0")
    line = printed("multinode.sh", RDZV_ENDPOINT=master, ADDRESS=address, RDZV_CONF=conf, PATH=path)
    assert re.findall(r"--rdzv-conf (\S+)", line.replace("\\,", ",")) == ([told] if told else []), (
        line
    )


def test_node_without_an_address_for_its_name_can_launch(tmp_path: Path) -> None:
    """Without the script's own address torchrun ends there."""
    path = stub(tmp_path, getent="exit 2")
    assert " --rdzv-conf is_host=0 " in printed("multinode.sh", ADDRESS="10.0.0.1", PATH=path)
    assert " --rdzv-conf is_host=1 " in printed("multinode.sh", ADDRESS="node0", PATH=path)


def test_unresolvable_master_is_reported(tmp_path: Path) -> None:
    """It is not an error, because the names of pods appear together with the pods."""
    path = stub(tmp_path, getent='[[ $2 != "$UNKNOWN" ]]', torchrun="exit 0")
    for unknown, said in (
        ("node0", ["launch: no address of node0 is known here yet; torchrun tries for a minute"]),
        ("", []),
    ):
        done = ran("multinode.sh", PATH=path, UNKNOWN=unknown)
        assert (done.returncode, done.stderr.splitlines()) == (0, said)


def test_sigterm_between_two_agents_stops_the_run(tmp_path: Path) -> None:
    """The script gets the signal when it reports the next start."""
    again = tmp_path / "again.sh"  # of every bash
    again.write_text(
        'echo() { builtin echo "$@"; if [[ $* == *"starting it again"* ]]; then kill -TERM $$; fi; }'
    )
    kill, run = (
        'if mkdir "$FIRST"; then kill -9 $$; fi',
        "for i in {1..50}; do sleep 0.1; done; echo to its end",
    )
    path = stub(tmp_path, torchrun=f"{kill}; trap 'exit 3' TERM; {run}")
    done = ran(
        "multinode.sh", PATH=path, RESTARTS="1", FIRST=str(tmp_path / "first"), BASH_ENV=str(again)
    )
    assert "starting it again" in done.stderr
    assert done.returncode in (3, 143) and "to its end" not in done.stdout, (
        done.stdout
    )  # 143: before it has its trap


@pytest.mark.skipif(not host_address(), reason="this machine's name has no address")
def test_master_given_by_name_hosts_the_store(small_text: Path, tmp_path: Path) -> None:
    """ADDRESS is the address, RDZV_ENDPOINT the name of the same machine: the store is there."""
    done = subprocess.run(
        [
            LAUNCH / "multinode.sh",
            "--folder",
            tmp_path / "run",
            "--dry-run",
            *set_(*small(small_text)),
        ],
        env=os.environ
        | VARIABLES
        | {
            "NODES": "1",
            "NPROC_PER_NODE": "1",
            "CONFIG": "lstm_moe_demo",
            "RDZV_ENDPOINT": f"{socket.gethostname()}:{rendezvous_port.find_free_port()}",
            "ADDRESS": host_address(),
            "PATH": PATH,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "1 on 1 node" in done.stdout, done.stdout


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh"])
def test_ranks_get_less_time_to_save_than_the_cluster_grants(script: str, tmp_path: Path) -> None:
    """torchrun kills them after that time, by itself 30 s."""
    path = stub(tmp_path, torchrun='echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"')
    assert ran(script, PATH=path, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="7").stdout.splitlines()[1:] == [
        "7"
    ]
    seconds = int(ran(script, PATH=path).stdout.splitlines()[1])
    slurm = re.search(r"--signal=B:USR1@(\d+)", (LAUNCH / "slurm.sbatch").read_text())
    *_, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    graces = [
        int(slurm.group(1)) if slurm else 0,
        job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"],
        *(
            int(node["stop_grace_period"].removesuffix("s"))
            for node in compose["services"].values()
        ),
    ]
    assert 30 < seconds < min(graces), graces


@pytest.mark.parametrize("script", ["local.sh", "multinode.sh", "deepspeed.sh"])
def test_launch_scripts_default_to_the_environment_of_make(script: str, tmp_path: Path) -> None:
    shutil.copytree(LAUNCH, tmp_path / "launch")
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    for name in ("torchrun", "deepspeed"):
        (bin / name).write_text('#!/bin/bash\necho started with "$(command -v python)"\n')
        (bin / name).chmod(0o755)
    (bin / "python").symlink_to(sys.executable)
    environment = PLAIN | VARIABLES | {"NODES": "1"}
    done = subprocess.run(
        [tmp_path / "launch" / script], env=environment, capture_output=True, text=True, timeout=20
    )
    assert done.stdout.splitlines()[1:] == [f"started with {bin}/python"], done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here")
def test_shellcheck_finds_nothing() -> None:
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", *(ROOT / "docker").glob("*.sh")]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_docker_image_pins_its_base_and_keeps_no_password() -> None:
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-\S+@sha256:[0-9a-f]{64}$", text, re.M)
    assert all(
        line.split()[1] in ("python:${PYTHON}", "packages", "runtime")
        for line in re.findall(r"^FROM .*", text, re.M)
    )
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert len(installs) == 2 and all(
        "--mount=type=secret,id=pip,target=/etc/pip.conf" in line for line in installs
    )
    (check,) = [line for line in text.splitlines() if line.startswith("RUN case")]
    for index, status in (("https://me:pass@host/simple", 2), ("https://host/simple", 0), ("", 0)):
        done = subprocess.run(
            ["sh", "-c", check.removeprefix("RUN ")], env=PLAIN | {"TORCH_INDEX": index}
        )
        assert done.returncode == status


def test_kubernetes_pods_find_each_other() -> None:
    claim, service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    runs = next(each["persistentVolumeClaim"] for each in pod["volumes"] if each["name"] == "runs")
    assert (claim["kind"], claim["metadata"]["name"]) == (
        "PersistentVolumeClaim",
        runs["claimName"],
    )
    assert (
        claim["spec"]["accessModes"] == ["ReadWriteMany"]
        and claim["spec"]["resources"]["requests"]["storage"]
    )
    (container,) = pod["containers"]
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["NPROC_PER_NODE"])
    assert job["spec"]["completionMode"] == "Indexed" and service["spec"]["clusterIP"] == "None"
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    assert subdomain == service["metadata"]["name"] and service["spec"]["selector"] == {
        "job-name": name
    }
    assert (
        variables["RDZV_ENDPOINT"] == f"{name}-0.{subdomain}:29400"
    )  # an indexed pod's host name is JOB-INDEX
    assert variables["ADDRESS"] == f"{name}-$(JOB_COMPLETION_INDEX).{subdomain}"
    # $(...) stands for what is set before it, and Kubernetes' own index is set last
    assert list(variables).index("JOB_COMPLETION_INDEX") < list(variables).index("ADDRESS")
    assert (
        pod["securityContext"]["runAsNonRoot"]
        and not container["securityContext"]["allowPrivilegeEscalation"]
    )
    assert variables["WANDB_API_KEY"] is None  # from a secret alone
    subprocess.run([ROOT / container["command"][0], "--dry-run"], env=VARIABLES | PLAIN, check=True)


def test_docker_cluster_has_two_nodes_without_privileges_or_keys() -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    for name, node in compose["services"].items():
        variables = node["environment"]
        assert node["hostname"] == variables["ADDRESS"] == name
        assert (
            variables["RDZV_ENDPOINT"] == "node0:29400"
            and variables["RDZV_ID"]
            and variables["WANDB_API_KEY"] is None
        )
        assert variables["GLOO_SOCKET_IFNAME"] == variables["NCCL_SOCKET_IFNAME"] == "eth0"
        assert int(variables["NODES"]) == len(compose["services"]) == 2
        assert (
            node["cap_drop"] == ["ALL"]
            and node["volumes"] == ["runs:/app/runs"]
            and "runs" in compose["volumes"]
        )
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    assert {"USER 10001", "FROM runtime AS cpu", "FROM runtime AS cuda"} <= set(
        dockerfile.splitlines()
    )
    kept = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert kept[0] == "*" and all(
        (ROOT / line[1:].replace("*", "")).exists() or "*" in line for line in kept[1:]
    )


def small(text: Path, *more: str) -> tuple[str, ...]:
    return (*TINY, *AS_TOLD, f"data.text={text}", "eval_every=1000", *more)


def no_namespaces() -> str:
    """Returns why network namespaces cannot be made; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need iproute2"
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return made.stderr.strip()


@pytest.mark.timeout(250)
def test_two_nodes_train_like_one_process(small_text: Path, tmp_path: Path) -> None:
    """Two ranks per node: 20 losses at a learning rate of 1e-4. The nodes are network
    namespaces with addresses of their own, or two agents on one address if namespaces cannot
    be made."""
    sets = small(small_text, "steps=20", "save_every=20")
    whole = alone(tmp_path / "one", "lstm_moe_demo", *sets)
    assert len(whole) == 20
    if no_namespaces():
        with Nodes(tmp_path / "two", "lstm_moe_demo", 2, *sets) as nodes:
            nodes.start()
            nodes.start()
            assert nodes.end() == [0, 0], nodes.log.read_text()
        assert nodes.starts() == [(4, 0)]
        assert losses(nodes.folder) == pytest.approx(whole, abs=1e-5)
        return
    variables = {
        "NODES": "2",
        "NPROC_PER_NODE": "2",
        "RDZV_ID": "namespaces",
        "CONFIG": "lstm_moe_demo",
        "PATH": PATH,
    }
    process = subprocess.Popen(
        [
            LAUNCH / "namespaces.sh",
            LAUNCH / "multinode.sh",
            "--folder",
            tmp_path / "two",
            *set_(*sets),
        ],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        told = process.communicate(timeout=150)[0]
    finally:
        process.terminate()  # it removes the namespaces, which SIGKILL would leave behind
        process.wait(60)
    assert process.returncode == 0, told
    assert "4 on 2 nodes = 2 expert-data (edp) x 2 expert parallel (ep)" in told
    assert losses(tmp_path / "two") == pytest.approx(whole, abs=1e-5)


# fast: test_two_nodes_train_like_one_process, test_resume_on_any_other_layout_and_back
@pytest.mark.slow
@pytest.mark.timeout(200)
def test_node_leaves_and_comes_back(small_text: Path, tmp_path: Path) -> None:
    """Two nodes, one, two: the same losses at equal samples."""
    sets = small(small_text, "steps=30", "save_every=10")
    whole = alone(tmp_path / "whole", "lstm_moe_demo", *sets)
    nodes = coming_and_going(tmp_path / "broken", "lstm_moe_demo", 1, (10, 20), *sets)
    worlds, after = zip(*nodes.starts(), strict=True)
    assert worlds == (2, 1, 2) and after[0] == 0 and 10 <= after[1] < 20 <= after[2], (
        nodes.log.read_text()
    )
    assert (
        "starting it again" not in nodes.log.read_text()
    )  # torchrun's agents did it, no script's loop
    assert losses(nodes.folder) == pytest.approx(whole, abs=1e-5) and len(whole) == 30


def agent_that(does: str, folder: Path, **variables: str) -> tuple[int, int, str]:
    """Runs launch/multinode.sh with a short stub of `torchrun`; returns (status, number of
    starts, stderr)."""
    path = stub(folder, torchrun=f'echo >>"{folder}/starts"\n{does}', getent="exit 0")
    done = ran("multinode.sh", **{"PATH": path, "RESTARTS": "2"} | variables)
    return done.returncode, len((folder / "starts").read_text().splitlines()), done.stderr


def test_only_a_dead_agent_is_restarted(tmp_path: Path) -> None:
    """It starts 1 + RESTARTS times. Ranks that failed too often, which torchrun does not write
    to its error file, end the run."""
    assert agent_that("kill -9 $$", tmp_path / "killed")[:2] == (137, 3)
    assert agent_that('echo lost >"$TORCHELASTIC_ERROR_FILE"; exit 1', tmp_path / "lost")[:2] == (
        1,
        3,
    )
    assert agent_that("exit 1", tmp_path / "ranks") == (1, 1, "")
    assert agent_that("exit 0", tmp_path / "done") == (0, 1, "")
    assert agent_that("kill -9 $$", tmp_path / "none", RESTARTS="0")[:2] == (137, 1)
    # SIGTERM goes on to the agent, which is not started again
    assert agent_that('trap "exit 1" TERM; kill -TERM $PPID; ' + WAIT, tmp_path / "stopped") == (
        1,
        1,
        "",
    )


@pytest.mark.parametrize(
    ("status", "then"), [(143, ["scontrol requeue 77"]), (1, ["scontrol requeue 77"]), (0, [])]
)
def test_slurm_job_near_its_time_limit_saves_and_is_requeued(
    status: int, then: list[str], tmp_path: Path
) -> None:
    """A job that has just ended is not requeued. Like the real srun, the stub kills its step
    if it gets SIGTERM itself; scancel signals the step."""
    step = f'trap "echo saved; exit {status}" TERM; echo $$ >{tmp_path}/pid; {WAIT}'
    path = stub(
        tmp_path,
        srun=f"""echo "srun $*"; bash -c '{step}' & step=$!
            trap "kill -9 $step; exit 137" TERM
            until [ -s {tmp_path}/pid ]; do sleep 0.05; done
            kill -USR1 $PPID; wait $step""",
        scancel=f'echo "scancel $*"; kill -TERM $(cat {tmp_path}/pid)',
        scontrol='if [ "$1" = show ]; then printf "a1\\na2\\n"; else echo "scontrol $*"; fi',
    )
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "a[1-2]",
    }
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "--set", "seed=1"],
        cwd=ROOT,
        env=job | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=30,
    )
    command, *rest = done.stdout.splitlines()
    assert "NODES=2 NPROC_PER_NODE=4 RDZV_ENDPOINT=a1:29400 RDZV_ID=slurm-77" in command, (
        done.stderr
    )
    assert rest == [
        "srun --nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=1 launch/multinode.sh --set seed=1",
        "scancel --signal=TERM 77",
        "saved",
        *then,
    ]
    assert done.returncode == (0 if then else status)


def test_node_range_uses_slurm_syntax() -> None:
    line = printed("slurm.sbatch", NODES="1:2")
    assert " NODES=1:2 " in line and " srun --nodes 1-2 " in line, line


def test_container_is_healthy_while_all_ranks_run(tmp_path: Path) -> None:
    """A fake /proc lists the shell, torchrun and two ranks, as python and as torchrun start
    them."""
    commands = [
        "bash launch/local.sh",
        "python bin/torchrun train.py moe_4",
        "python train.py moe_4",
        "python -u train.py",
    ]
    for number, command in enumerate(commands):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_text("\0".join(command.split()) + "\0")
        (tmp_path / str(number) / "stat").write_text(f"{number} (python) S 1 1")

    def healthy(ranks: int) -> int:
        command = [ROOT / "docker" / "healthy.sh", tmp_path]
        return subprocess.run(
            command, env=os.environ | {"NPROC_PER_NODE": str(ranks)}, timeout=30, check=False
        ).returncode

    assert (healthy(2), healthy(3)) == (0, 1)
    (tmp_path / "3" / "stat").write_text("3 (python) T 1 1")
    assert healthy(2) == 1


@pytest.mark.timeout(150)
def test_deepspeed_script_launches_two_nodes(small_text: Path, tmp_path: Path) -> None:
    """Runs one script per node, without ssh."""
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    variables = VARIABLES | {
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{rendezvous_port.find_free_port()}",
        "CONFIG": "lstm_moe_demo",
        "HOSTFILE": str(tmp_path / "hostfile"),
        "PATH": PATH,
    }
    sets = small(small_text, "steps=2", "save_every=2")
    command = [LAUNCH / "deepspeed.sh", "--folder", tmp_path / "run", *set_(*sets)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | variables | {"NODE_RANK": rank},
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in started] == [0, 0], told
    assert "2 on 2 nodes = 2 expert-data (edp) x 1 expert parallel (ep)" in told[0]
    assert len(losses(tmp_path / "run")) == 2


# fast: test_sigterm_to_one_rank_saves_and_ends_all_ranks, test_resume_auto_requires_the_same_config
@pytest.mark.slow
def test_resume_auto_starts_resumes_and_finishes(small_text: Path, tmp_path: Path) -> None:
    """Runs the same command three times: stopped in the middle, resumed, and with fewer steps."""
    folder = tmp_path / "run"
    command = [
        "lstm_moe_demo",
        "--folder",
        str(folder),
        "--resume",
        "auto",
        *set_(*small(small_text, "steps=300")),
    ]
    process = start(*command)
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert end(process)[0] == 143
    (saved,) = manifest.list_checkpoints(folder)
    told = [
        subprocess.run(
            [sys.executable, ROOT / "train.py", *command, *more], capture_output=True, text=True
        )
        for more in ([], set_("steps=200"))
    ]
    assert [each.returncode for each in told] == [0, 0], told
    assert f"goes on from {saved}" in told[0].stdout
    assert f"note: {folder}: has done 300 steps, and steps=200 is fewer" in told[1].stdout
    assert (
        "test perplexity" in told[1].stdout
        and json.loads((folder / "config.json").read_text())["steps"] == 300
    )
    assert losses(folder).keys() == set(range(1, 301))


def test_resume_auto_requires_the_same_config(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` has two steps of the small demo."""
    config = json.loads((run / "config.json").read_text())
    same = [*TINY, "steps=9", f"data.text={config['data']['text']}"]
    auto = ["--folder", str(run), "--resume", "auto"]
    check_plan(
        ["lstm_moe_demo", *auto, *set_(*same, "seed=5")],
        "trained with seed=0, not 5; give another",
        capsys,
    )
    check_plan(["widenet_demo", *auto], "trained with name=lstm_moe_demo, not widenet_demo", capsys)
    check_plan(["--resume", "auto"], "give NAME and --folder", capsys)
    again = parse_run(["lstm_moe_demo", *auto, *set_(*same, "optim.lr=5e-4")], None)
    assert again.auto_resume and again.source_run == run and again.config.steps == 9
    new = ["--folder", str(run.with_name("new")), "--resume", "auto"]
    begun = parse_run(["lstm_moe_demo", *new, *set_(*same)], None)
    assert begun.auto_resume and begun.folder == run.with_name("new")


def launched(monkeypatch: pytest.MonkeyPatch, ranks: int, nodes: int, here: int) -> None:
    told = {
        "WORLD_SIZE": ranks,
        "GROUP_WORLD_SIZE": nodes,
        "LOCAL_WORLD_SIZE": here,
        "RANK": 0,
        "MASTER_PORT": 29500,
    }
    for key, value in told.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


HIERARCHICAL = ("model.moe.num_experts=32", "model.moe.num_groups=8", "model.moe.k=2")


@pytest.mark.parametrize(
    ("ranks", "nodes", "sets", "ep", "by_node", "exchange"),
    [
        (
            8,
            2,
            (),
            4,
            "all on each",
            "all_to_all",
        ),  # 64 experts, 4 ranks a node; 4 a word are on 2.8 of 4 ranks
        (8, 2, ("mesh.ep=2",), 2, "all on each", "dedup_rank"),  # and on 1.9 of 2
        (8, 2, ("mesh.ep=8",), 8, "0-31 | 32-63", "dedup_node"),
        (8, 2, ("mesh.ep=1",), 1, "all on each", None),
        (6, 2, (), 1, "all on each", None),  # gcd(64, 3): 3 ranks a node do not divide 64 experts
        (
            6,
            2,
            ("mesh.ep=2",),
            2,
            "some ep groups lie on two nodes (3 ranks a node, ep 2)",
            "dedup_rank",
        ),
        (8, 4, ("mesh.ep=4",), 4, "0-31 | 32-63", "dedup_node"),  # two ep groups, of two nodes each
        # groups 0-3 of 4 experts on node 0, 4-7 on node 1
        (8, 2, (*HIERARCHICAL, "mesh.ep=8"), 8, "0-15 | 16-31", "dedup_node"),
        (16, 2, HIERARCHICAL, 8, "all on each", "all_to_all"),  # 8 groups
    ],
)
def test_experts_stay_in_a_node_by_default(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ranks: int,
    nodes: int,
    sets: tuple[str, ...],
    ep: int,
    by_node: str,
    exchange: str | None,
) -> None:
    launched(monkeypatch, ranks, nodes, ranks // nodes)
    samples = ("batch.global_batch_size=96", "batch.balance_loss_group_size=48")
    with pytest.raises(SystemExit) as exit_:
        parse_run(["lstm_moe_demo", "--dry-run", *set_(*samples, *sets)], None)
    assert exit_.value.code == 0
    told = capsys.readouterr().out.splitlines()
    rows = dict(line.split("  ", 1) for line in told if not line.startswith("note: "))
    assert rows["ranks"].split(" = ")[1].endswith(f" x {ep} expert parallel (ep)")
    assert rows["experts by node"].strip() == by_node
    assert (
        rows["dispatcher"].strip().partition(":")[0] if "dispatcher" in rows else None
    ) == exchange


def test_nodes_of_different_size_are_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(monkeypatch, 3, 2, 2)
    check_plan(
        ["lstm_moe_demo", "--dry-run"],
        "3 ranks on 2 nodes, 2 of them here: start as many on each",
        capsys,
    )


def test_resume_auto_without_folder_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    check_plan(["lstm_moe_demo", "--resume", "auto"], "--folder PATH", capsys)
