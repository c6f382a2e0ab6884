"""The command line: look after warm workers and running jobs of a cluster.

    lepton_ray warm --workers 2      keep processes ready that have imported torch
    lepton_ray status [NAME]         what the cluster runs, or how a job is doing
    lepton_ray stop NAME             stop a job at the next step boundary, with a checkpoint
    lepton_ray resize NAME WORKERS   let a job go on with another number of workers
    lepton_ray drill                 let workers of a small job die, freeze, come and go, and show what became of it
    lepton_ray verify FOLDER         check the journal and the model of a run: was every sample used once?

The cluster is the one that RAY_ADDRESS names ("auto": the one on this machine).
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from lepton_ray.errors import ConfigError, LeptonError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    if options.run is not _verify:  # which needs no cluster
        os.environ.setdefault("RAY_ADDRESS", "auto")
        if os.path.exists(os.path.expanduser("~/.ray/auth_token")):
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when imported, and does not look by itself
    try:
        return int(options.run(options) or 0)
    except LeptonError as error:
        print(f"lepton_ray: {error}", file=sys.stderr)
        return 2


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
    resize = verbs.add_parser("resize", help="let a job go on with another number of workers")
    resize.add_argument("name", help="of the job")
    resize.add_argument("workers", type=int, help="how many")
    resize.set_defaults(run=_resize)
    drill = verbs.add_parser("drill", help="let things go wrong with a small job, and show what became of it")
    drill.add_argument("--workers", type=int, default=2, help="of the job (default: %(default)s)")
    drill.add_argument("--local", action="store_true", help="on a Ray of its own on this machine, not on the cluster")
    drill.add_argument("--storage", default=None, help="folder for the runs (default: ~/lepton_ray/drill)")
    drill.add_argument("--fault", action="append", default=None, help="only this one; may be given several times")
    drill.set_defaults(run=_drill)
    verify = verbs.add_parser("verify", help="check the journal and the model of a run; needs no cluster")
    verify.add_argument("folder", help="of the run: a path, or a URL")
    verify.set_defaults(run=_verify)
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


def _resize(options: argparse.Namespace) -> None:
    from lepton_ray.job import attach

    attach(options.name).resize(options.workers)
    print(f"{options.name} goes on with {options.workers} workers as soon as they are there")


def _drill(options: argparse.Namespace) -> int:
    from rich.console import Console

    from lepton_ray.cluster.connect import connect
    from lepton_ray.drill import FAULTS, drill, table

    if options.local:
        del os.environ["RAY_ADDRESS"]
    unknown = sorted(set(options.fault or ()) - FAULTS.keys())
    if unknown or options.workers < 2:
        asked = f"--fault {unknown[0]!r}" if unknown else f"--workers {options.workers}"
        raise ConfigError(f"{asked}: expected at least 2 workers, and faults among: {', '.join(FAULTS)}.")
    connect(options.workers + 1)
    storage = os.path.abspath(os.path.expanduser(options.storage or "~/lepton_ray/drill"))
    outcomes = drill(options.workers, storage, options.fault or FAULTS, say=lambda line: print(line, file=sys.stderr))
    Console(width=None if sys.stdout.isatty() else 130).print(table(outcomes))
    return 0 if all(each.is_well for each in outcomes) else 1


def _verify(options: argparse.Namespace) -> int:
    from lepton_ray.verify import SHOWN, verify

    folder = options.folder if "://" in options.folder else os.path.abspath(options.folder)
    problems, told = verify(folder)
    for line in (*told, *problems[:SHOWN]):
        print(line)
    if len(problems) > SHOWN:
        print(f"and {len(problems) - SHOWN} more")
    print(f"{len(problems)} problems" if problems else "every sample was used exactly once")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
