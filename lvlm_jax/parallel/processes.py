"""Several processes as one: each runs the same program on its own devices, and JAX joins them.

Where the processes were started by SLURM, Open MPI, GKE or as a TPU slice, JAX reads from the environment who and how
many they are. Anywhere else three variables tell it: JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import os

import jax

from lvlm_jax.errors import LVLMError


def start(wanted: bool | None = None) -> bool:
    """Joins the processes. To be called once, before anything touches a device.

    Args:
        wanted: None: when the environment shows several processes, see `several`.

    Returns:
        Whether this process is now one of several.

    Raises:
        LVLMError: JAX finds nobody to join, or cannot reach process 0.
    """
    if not (several() if wanted is None else wanted):
        return False
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"), process_id=_number("JAX_PROCESS_ID")
        )
    except (ValueError, RuntimeError) as error:
        raise LVLMError(
            f"the processes of this run cannot be joined ({' '.join(str(error).split())[:200]}); start them with "
            "SLURM, Open MPI or on GKE, or give each JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    return jax.process_count() > 1


def several() -> bool:
    """Whether the environment says that this process is one of several, without asking anybody."""
    environment = os.environ
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        # A step of srun; a batch script alone has no step, and its own process no siblings.
        or ("SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1)
        or int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdigit():
        raise LVLMError(f"the environment variable {name} is {value!r}; expected a number")
    return None if value is None else int(value)
