"""A process that ends before its n-th change of a file, as by SIGKILL or a power cut."""

import os
import sys

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DIED, RAISED = 77, 78


def ends_before(change, act):
    """Call ``act`` in a fork that ends before the change of that number; whether it did."""
    child = os.fork()
    if child == 0:
        left = change

        def hook(event, arguments):
            nonlocal left
            changes = event in CHANGES or (event == "open" and arguments[2] & WRITING)
            if changes and left == 0:
                os._exit(DIED)
            left -= bool(changes)

        code = RAISED
        try:
            sys.addaudithook(hook)
            act()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, DIED)
    return code == DIED


def moments(act, prepare):
    """Call ``act`` in forks that end before each of its changes; the last one does not."""
    change = 0
    died = True
    while died:
        prepare()
        died = ends_before(change, act)
        yield change
        change += 1
