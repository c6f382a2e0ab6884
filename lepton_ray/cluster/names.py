"""Names by which processes find each other, and the time limits of calls among them."""

NAMESPACE = "lepton_ray"
SCHEDULER = "scheduler"
CALL_TIMEOUT_S = 30.0
"""Longest wait for an answer to a small question. A busy two-core machine has needed 10 s to start a process."""


JOB_PREFIX = "job:"


def controller_name(job: str) -> str:
    """Name the controller actor of a job."""
    return JOB_PREFIX + job
