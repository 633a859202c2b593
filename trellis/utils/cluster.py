"""What started this process: a shell, torchrun, a pod with RANK and WORLD_SIZE, Slurm's srun, or mpirun.

Sources: torchrun's documentation (Environment Variables); Kubeflow's PyTorchJob; `man srun`, OUTPUT ENVIRONMENT
VARIABLES; Open MPI's OMPI_COMM_WORLD_*; the PMI variables of MPICH and Intel MPI.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

DEFAULT_PORT = 12345
BY_HAND, BY_VARIABLES = "the command line", "RANK and WORLD_SIZE"  # starters
# Slurm numbers the steps of `srun` from 0; a batch script's own step and an interactive shell's have the highest ids.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Names of (rank, world size, rank on this node, world size on this node) under mpirun.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Flags:
    """Flags of the command line on processes; None for those that were not given."""

    num_nodes: int | None = None
    node_rank: int | None = None
    num_gpus: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


@dataclass(frozen=True)
class Joined:
    """This process is one rank. Something else has started it and the others."""

    starter: str  # in words
    rank: int
    world: int
    local_rank: int
    local_world: int  # ranks on this node
    address: str
    port: int
    hosted: bool  # another process than rank 0 hosts the store at that address
    attempt: int = 0  # torchrun's restarts


@dataclass(frozen=True)
class Nodes:
    """This program starts the ranks of its node."""

    starter: str  # in words
    num_nodes: int
    node_rank: int
    address: str
    port: int  # 0: a free one
    hosts: tuple[str, ...] = ()  # names of the nodes, if known


def where_started(env: Mapping[str, str], flags: Flags) -> Joined | Nodes:
    """Return what started this process, from its environment. Raise ConfigError for what does not fit together."""
    if "TORCHELASTIC_RUN_ID" in env:
        return _torchrun(env, flags)
    if "RANK" in env and "WORLD_SIZE" in env:
        return _rank_and_world_size(env, flags)
    if _in_slurm_step(env):
        return _slurm(env, flags)
    for names in MPI:
        if _number(env, names[1], low=1, default=1) > 1:
            return _mpi(env, flags, names)
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in env and not (name == "WORLD_SIZE" and env[name] == "1"):
            raise ConfigError(
                f"{name} is {env[name]!r}, but {other} is not set; set both for each process, start them with torchrun "
                f"--nproc_per_node N train.py …, or unset {name}"
            )
    return _nodes(BY_HAND, env, flags, 1, 0)


# --- torchrun, accelerate, pods ----------------------------------------------------------------------------


def _torchrun(env: Mapping[str, str], flags: Flags) -> Joined:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in env]
    if missing:
        raise ConfigError(
            f"TORCHELASTIC_RUN_ID is set, as under torchrun, without {', '.join(missing)}; unset TORCHELASTIC_RUN_ID, "
            "or start with torchrun --nproc_per_node N train.py …"
        )
    return _joined("torchrun", env, flags, names[0], names[1], "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _rank_and_world_size(env: Mapping[str, str], flags: Flags) -> Joined | Nodes:
    world = _number(env, "WORLD_SIZE", low=1)
    rank = _number(env, "RANK", below=("WORLD_SIZE", world))
    tasks = _slurm_tasks(env) if _in_slurm_step(env) else 1
    if world < tasks:
        raise ConfigError(
            f"WORLD_SIZE is {world}, but srun has started {tasks} tasks; unset RANK and WORLD_SIZE: Slurm's own "
            "variables suffice"
        )
    # LOCAL_RANK may differ from SLURM_LOCALID: it is 0 where each task is shown its own GPU alone.
    if world == tasks > 1 and rank != _number(env, "SLURM_PROCID"):
        raise ConfigError(
            f"RANK is {rank}, but SLURM_PROCID of this task is {env['SLURM_PROCID']}; unset RANK, WORLD_SIZE and "
            "LOCAL_RANK: Slurm's own variables suffice"
        )
    if "LOCAL_RANK" in env:
        return _joined(BY_VARIABLES, env, flags, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if world == tasks > 1:
        return _slurm(env, flags)
    # A PyTorchJob numbers its pods so; a pod may have several GPUs.
    for name, expected in (("PET_NNODES", world), ("PET_NODE_RANK", rank)):
        if env.get(name, str(expected)) != str(expected):
            raise ConfigError(
                f"{name} is {env[name]}, but {'WORLD_SIZE' if name == 'PET_NNODES' else 'RANK'} is {expected}: this "
                "job counts several processes per pod; start torchrun train.py … in each pod, which reads PET_*"
            )
    return _nodes(BY_VARIABLES, env, flags, world, rank)


def _joined(
    starter: str, env: Mapping[str, str], flags: Flags, rank: str, world: str, local_rank: str, local_world: str
) -> Joined:
    """Return a rank by the variables of these names."""
    ranks = _number(env, world, low=1)
    number = _number(env, rank, below=(world, ranks))
    local = _number(env, local_rank, below=(world, ranks))
    local_ranks = _number(env, local_world, low=1, default=ranks)
    if local_world in env and local >= local_ranks:
        raise ConfigError(f"{local_rank} is {local}, but {local_world} is {local_ranks}; it must be below that")
    _refuse_flags(starter, ranks, flags)
    address, port = _meeting(starter, env, flags, joined=True, several=local_ranks < ranks)
    return Joined(
        starter,
        number,
        ranks,
        local,
        local_ranks,
        address,
        port,
        hosted=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and starter == "torchrun",
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", default=0) if starter == "torchrun" else 0,
    )


def _mpi(env: Mapping[str, str], flags: Flags, names: tuple[str, str, str, str]) -> Joined:
    for name in names:
        if name not in env:
            raise ConfigError(
                f"{names[1]} is {env[names[1]]}, but {name} is not set; start with torchrun --nproc_per_node N "
                "train.py …"
            )
    return _joined("mpirun", env, flags, *names)


# --- Slurm -------------------------------------------------------------------------------------------------


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """Return whether `srun` has started this process. A batch script has most of a task's variables, and is none."""
    if "SLURM_PROCID" not in env:
        return False
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    if step is not None:
        return _number({"SLURM_STEP_ID": step}, "SLURM_STEP_ID") < FIRST_SPECIAL_STEP
    batch = env.get("ENVIRONMENT") == "BATCH" or "SLURM_SUBMIT_DIR" in env or "SLURM_TASK_PID" in env
    return _number(env, "SLURM_PROCID") > 0 or not batch


def _slurm_tasks(env: Mapping[str, str]) -> int:
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    name = next((name for name in names if name in env), None)
    if name is None:
        raise ConfigError(
            f"SLURM_PROCID is {env['SLURM_PROCID']}, but SLURM_NTASKS is not set; start with srun python train.py …"
        )
    return _number(env, name, low=1)


def _slurm(env: Mapping[str, str], flags: Flags) -> Joined | Nodes:
    tasks = _slurm_tasks(env)
    if tasks == 1:
        return _nodes("srun", env, flags, 1, 0)
    rank = _number(env, "SLURM_PROCID", below=("SLURM_NTASKS", tasks))
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "")
    name = next((name for name in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if name in env), None)
    nodes = _number(env, name, low=1) if name else len(hosts) or 1
    if tasks == nodes:
        return _nodes("srun", env, flags, nodes, rank, hosts)

    per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    node = _number(env, "SLURM_NODEID", default=0)
    here = per_node[node] if node < len(per_node) and sum(per_node) == tasks else max(1, tasks // nodes)
    _refuse_flags("srun", tasks, flags)
    address, port = _meeting("srun", env, flags, joined=True, several=nodes > 1, hosts=hosts)
    return Joined(
        "srun", rank, tasks, _number(env, "SLURM_LOCALID", default=rank % here), here, address, port, hosted=False
    )


def expand_hosts(text: str) -> tuple[str, ...]:
    """Return the hosts of a Slurm list such as "n[01-03,7],login": n01, n02, n03, n7, login.

    Raise ConfigError for text that is no such list.
    """
    name = r"(?:[^,\[\]\s]|\[[-0-9,]+\])+"
    if not re.fullmatch(rf"(?:{name}(?:,{name})*)?", text):
        raise ConfigError(f"SLURM_NODELIST is {text!r}, which is no list of nodes; give --master_addr HOST instead")
    hosts: list[str] = []
    for host in re.findall(name, text):
        parts = [
            [fixed] if fixed else [number for span in numbers.split(",") for number in _span(span, text)]
            for fixed, numbers in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", host)
        ]
        hosts += ["".join(part) for part in itertools.product(*parts)]
    return tuple(hosts)


def _span(span: str, text: str) -> list[str]:
    """Return the numbers of "07-11" or "7", with their leading zeros."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
    if match is None or int(match[2] or match[1]) - int(match[1]) not in range(2**16):
        raise ConfigError(f"SLURM_NODELIST is {text!r}, which is no list of nodes; give --master_addr HOST instead")
    return [str(number).zfill(len(match[1])) for number in range(int(match[1]), int(match[2] or match[1]) + 1)]


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node in Slurm's short form: "2(x3),1" is 2, 2, 2, 1. [] for any other text."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d{1,5})\))?", part)
        if match is None:
            return []
        numbers += [int(match[1])] * int(match[2] or 1)
    return numbers


# --- common ------------------------------------------------------------------------------------------------


def _nodes(
    starter: str, env: Mapping[str, str], flags: Flags, num_nodes: int, node_rank: int, hosts: tuple[str, ...] = ()
) -> Nodes:
    """Return a node by the flags, which may not contradict what its starter says."""
    if num_nodes > 1:
        for name, given, known in (
            ("num_nodes", flags.num_nodes, num_nodes),
            ("node_rank", flags.node_rank, node_rank),
        ):
            if given not in (None, known):
                raise ConfigError(
                    f"--{name} is {given}, but by {starter} it is {known}; leave --num_nodes and --node_rank out"
                )
    else:
        num_nodes = flags.num_nodes or 1
        node_rank = flags.node_rank or 0
    address, port = _meeting(starter, env, flags, joined=False, several=num_nodes > 1, hosts=hosts)
    return Nodes(starter, num_nodes, node_rank, address, port, hosts)


def _meeting(
    starter: str, env: Mapping[str, str], flags: Flags, *, joined: bool, several: bool, hosts: tuple[str, ...] = ()
) -> tuple[str, int]:
    """Return host and port where ranks meet: from the flags, MASTER_ADDR and MASTER_PORT, or Slurm.

    joined: whether something else has started the ranks. several: whether they are on several nodes.
    The port is 0, any free one, only if one program starts all ranks.
    """
    shared = joined or several  # by programs that must know the same host and port beforehand
    given = starter in ("torchrun", BY_VARIABLES) and shared
    for flag, variable in (("master_addr", "MASTER_ADDR"), ("master_port", "MASTER_PORT")):
        value = getattr(flags, flag)
        if given and value is not None and env.get(variable, str(value)) != str(value):
            raise ConfigError(f"--{flag} is {value}, but {variable} is {env[variable]}; leave --{flag} out")
    address = flags.master_addr
    if address is None and (given or several):
        address = env.get("MASTER_ADDR") or (hosts[0] if hosts else None)
    if address is None and several and starter != BY_HAND:  # by hand, TRELLIS's default holds: localhost
        raise ConfigError(
            f"by {starter} there are several nodes, but MASTER_ADDR is not set; give --master_addr HOST, the name of "
            "the first node"
        )
    address = address or "localhost"
    port = flags.master_port
    if port is None and not shared:
        port = 0
    elif port is None and "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT", low=1, below=("the number of ports", 65536))
    elif port is None:
        port = _slurm_port(env) if starter == "srun" and "SLURM_JOB_ID" in env else DEFAULT_PORT
    if port == 0 and shared:
        raise ConfigError("--master_port is 0, any free port, but several programs must know it; give a number")
    return address, port


def _slurm_port(env: Mapping[str, str]) -> int:
    """Return a port that all tasks of a step derive alike and other jobs rarely, below those that systems hand out."""
    step = _number(env, "SLURM_STEP_ID", default=0)
    return 12000 + (_number(env, "SLURM_JOB_ID") + 1009 * step) % 20000


def _refuse_flags(starter: str, world: int, flags: Flags) -> None:
    """Raise ConfigError for flags that start processes, where each process is a rank already."""
    for name in ("num_gpus", "num_nodes", "node_rank"):
        value = getattr(flags, name)
        if value is not None:
            remedy = "; or start one task per node: srun --ntasks-per-node 1" if starter == "srun" else ""
            raise ConfigError(
                f"--{name} is {value}, but {starter} has started {world} processes, each of which is one rank; leave "
                f"--{name} out{remedy}"
            )


def _number(
    env: Mapping[str, str],
    name: str,
    *,
    low: int = 0,
    below: tuple[str, int] | None = None,
    default: int | None = None,
) -> int:
    """Return the whole number in a variable. Raise ConfigError if there is none, or one out of range."""
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,18}", text.strip()) or int(text) < low:
        found = "not set" if text is None else repr(text)
        raise ConfigError(f"{name} is {found}; it must be a whole number, at least {low}. Set or unset it")
    if below is not None and int(text) >= below[1]:
        raise ConfigError(f"{name} is {text}, but {below[0]} is {below[1]}; it must be below that")
    return int(text)
