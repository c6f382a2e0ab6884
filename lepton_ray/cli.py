"""The command line: look after warm workers and running jobs of a cluster.

    lepton_ray warm --workers 2      keep processes ready that have imported torch
    lepton_ray status [NAME]         what the cluster runs, or how a job is doing
    lepton_ray stop NAME             stop a job at the next step boundary, with a checkpoint

The cluster is the one that RAY_ADDRESS names ("auto": the one on this machine).
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from lepton_ray.errors import LeptonError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("RAY_ADDRESS", "auto")
    if os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported, and does not look by itself
    try:
        options.run(options)
    except LeptonError as error:
        print(f"lepton_ray: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lepton_ray", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    warm = verbs.add_parser("warm", help="keep worker processes ready for the next jobs")
    warm.add_argument("--workers", type=int, required=True, help="how many")
    warm.add_argument("--cpus", type=float, default=1, help="CPUs of each (default: %(default)s)")
    warm.add_argument("--gpus", type=float, default=None, help="GPUs of each (default: one where there are enough)")
    warm.add_argument("--minutes", type=float, default=60, help="how long (default: %(default)s)")
    warm.set_defaults(run=_warm)
    status = verbs.add_parser("status", help="show the jobs of the cluster, or one")
    status.add_argument("name", nargs="?", help="of a job")
    status.set_defaults(run=_status)
    stop = verbs.add_parser("stop", help="stop a job at the next step boundary, with a checkpoint")
    stop.add_argument("name", help="of the job")
    stop.set_defaults(run=_stop)
    return parser


def _warm(options: argparse.Namespace) -> None:
    from lepton_ray.cluster.connect import connect
    from lepton_ray.cluster.warm import warm
    from lepton_ray.config import Resources

    connect(options.workers)
    resources = Resources(cpus=options.cpus, gpus=options.gpus)
    print(warm(options.workers, resources, keep_s=60 * options.minutes))


def _status(options: argparse.Namespace) -> None:
    from lepton_ray.cluster.connect import connect
    from lepton_ray.cluster.names import answer
    from lepton_ray.cluster.scheduler import scheduler
    from lepton_ray.job import attach

    if options.name:
        print(json.dumps(attach(options.name).status(), indent=2))
        return
    connect(1)
    print(json.dumps(answer(scheduler().overview.remote(), "the scheduler"), indent=2))


def _stop(options: argparse.Namespace) -> None:
    from lepton_ray.job import attach

    attach(options.name).cancel("stopped from the command line")
    print(f"{options.name} stops at its next step boundary")


if __name__ == "__main__":
    sys.exit(main())
