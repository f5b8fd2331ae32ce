"""A driver that holds a lease and writes one file per step: `lease_driver.py FOLDER OLD_AFTER_S NUM_STEPS [STOP_AT]`.

At step STOP_AT it stops itself with SIGSTOP between the check and the write.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

from orchestration.jobs import lease as module
from orchestration.recipe import parse_recipe
from orchestration.services import storage
from tinyemo.errors import TinyEmoError


@dataclass(frozen=True)
class StoppingLease(module.Lease):
    """A lease whose holder stops itself right after a successful check."""

    def check(self) -> None:
        super().check()
        if os.environ.pop("STOP_NEXT", ""):
            os.kill(os.getpid(), signal.SIGSTOP)


def drive(folder: str, num_steps: int, stop_at: int) -> None:
    """Go on from the newest step until num_steps are done."""
    recipe = parse_recipe({"name": "held"}, source="test")
    with module.hold_lease(folder, recipe, {"train": "a" * 64}, progress=lambda line: print(line, flush=True)) as lease:
        if storage.exists(f"{folder}/result.json"):
            print("finished already", flush=True)
            return
        if lease.run_id is None:
            lease.write_claim("run-1", "cpu")
        files = storage.list_prefix(f"{folder}/steps")
        step = 1 + max((int(uri.rpartition("/")[2]) for uri in files), default=-1)
        print(f"token {lease.token} from step {step}", flush=True)
        for number in range(step, num_steps):
            if number == stop_at:
                os.environ["STOP_NEXT"] = "yes"
            lease.write(f"{folder}/steps/{number}", f"{lease.token}".encode())
            lease.write_json(f"{folder}/latest.json", {"step": number, "token": lease.token})
            time.sleep(0.05)
        lease.write_json(f"{folder}/result.json", {"token": lease.token})
    print("done", flush=True)


if __name__ == "__main__":
    module.HEARTBEAT_S, module.OLD_AFTER_S = 0.3, float(sys.argv[2])
    module.Lease = StoppingLease  # type: ignore[misc]
    try:
        drive(sys.argv[1], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else -1)
    except TinyEmoError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
