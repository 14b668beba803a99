"""
Run an example several times, killed or not: a program for the tests of the guests.

    python forking.py EXAMPLE < JOBS

JOBS is a JSON list of ``{"arguments": […], "kill_at": N or null, "ranks": R}``. The example is imported once, which is
what takes long; each rank of a job is a fork of its own that calls its ``main``, in the environment that torchrun would
give it. In a job with ``kill_at`` rank 0 dies by SIGKILL as it is about to make its N-th fsync: before, in and after a
commit, whatever N meets; the others follow, as torchrun sees to it. Prints the exit codes as JSON, last.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback


def die_at(count: int) -> None:
    """Make the *count*-th fsync of this process its last act."""
    made = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal made
        made += 1
        if made == count:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    return {
        **{name: str(number) for name, number in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(main: object, job: dict) -> int:
    """Run all ranks of *job*; the exit code of the first one that did not end well, else 0."""
    ranks = job.get("ranks", 1)
    port = free_port()
    children = {start(main, job, environment(r, ranks, port) if ranks > 1 else {}, rank=r) for r in range(ranks)}
    worst = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not worst:
            worst = code
            for other in children:
                os.kill(other, signal.SIGKILL)
    return worst


def start(main: object, job: dict, variables: dict[str, str], *, rank: int) -> int:
    """Begin one rank; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(variables)
        if job["kill_at"] is not None and rank == 0:
            die_at(job["kill_at"])
        sys.argv = ["example", *job["arguments"]]
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001 - a forked child must end here, whatever happened
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def every_job() -> None:
    """Read the jobs, run them one after the other."""
    main = runpy.run_path(sys.argv[1], run_name="example")["main"]
    statuses = [run(main, job) for job in json.load(sys.stdin)]
    print(json.dumps(statuses))


if __name__ == "__main__":
    every_job()
