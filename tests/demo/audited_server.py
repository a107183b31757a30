"""`smallfry demo` with a record of every file that it opens, looks at, changes or removes.

Run as a program, with the file of the record and then the demo's arguments. What Python reports to
audit hooks is written there, and what it does not report: stat, access and readlink.
"""

import functools
import json
import os
import sys

import smallfry.demo.serve  # noqa: F401  the record is of what comes after most imports
from smallfry.cli import main

RECORD = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
FILES = ("open", "os.", "shutil.", "glob.", "pathlib.", "tempfile.", "subprocess.", "socket.")
HARMLESS = ("os.putenv", "os.unsetenv", "socket.__new__", "socket.bind")


def record(event, *arguments):
    shown = [os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in arguments]
    os.write(RECORD, (json.dumps([event, shown]) + "\n").encode())


def on_event(event, arguments):
    if event.startswith(FILES) and event not in HARMLESS:
        record(event, *arguments)


def recorded(name, function):
    @functools.wraps(function)
    def recording(path, *arguments, **options):
        record(f"os.{name}", path)
        return function(path, *arguments, **options)

    return recording


for name in ("stat", "lstat", "access", "readlink"):
    setattr(os, name, recorded(name, getattr(os, name)))
sys.addaudithook(on_event)

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[2:]]))
