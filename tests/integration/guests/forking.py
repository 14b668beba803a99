"""
Run an example several times, killed or not: a program for the tests of the guests.

    python forking.py EXAMPLE < JOBS

JOBS is a JSON list of ``{"arguments": […], "kill_at": N or null}``. The example is imported once, which is what takes
long; each job is a fork of its own that calls its ``main``. A job with ``kill_at`` dies by SIGKILL as it is about to
make its N-th fsync: before, in and after a commit, whatever N meets. Prints the wait statuses as JSON, last.
"""

import json
import os
import runpy
import signal
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


def run(main: object, job: dict) -> int:
    """Call *main* in a child; its wait status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        if job["kill_at"] is not None:
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
