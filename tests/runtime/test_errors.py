"""Errors in words: out of memory, refused files, and the nearest of known names."""

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smallfry_runtime.errors import is_out_of_memory, nearest, refusal


class OutOfMemoryError(RuntimeError):
    """As PyTorch names it."""


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA out of memory"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("not enough memory"), False),
        (ImportError("/a/b.so: failed to map segment from shared object"), True),
        (OSError("/a/b.so: failed to map segment from shared object"), True),
        (ImportError("b.so: cannot open shared object file: Cannot allocate memory"), True),
        (
            ImportError("b.so: failed to map segment from shared object: Operation not permitted"),
            False,
        ),
        (ImportError("b.so: cannot allocate memory in static TLS block"), False),
        (ImportError("cannot import name 'a' from 'b'"), False),
    ],
)
def test_errors_that_mean_too_little_memory(error, memory):
    assert is_out_of_memory(error) is memory


def test_an_error_because_of_too_little_memory_means_too_little_memory():
    error = ImportError("b can't be imported")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)
    error = KeyError("b")
    error.__context__ = ImportError("b.so: cannot map zero-fill pages")
    assert is_out_of_memory(error)
    error.__suppress_context__ = True
    assert not is_out_of_memory(error)
    error.__cause__ = error  # a circle ends
    assert not is_out_of_memory(error)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_library_that_finds_no_memory_means_too_little_memory():
    script = """
import ctypes, glob, resource, sys
from smallfry_runtime.errors import is_out_of_memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**18, used + 2**18))
try:
    ctypes.CDLL(sys.argv[1])
except OSError as error:
    sys.exit(0 if is_out_of_memory(error) else f"{error.errno} {error}")
sys.exit("loaded")
"""
    torch = importlib.util.find_spec("torch")
    library = Path(torch.origin).parent / "lib" / "libtorch_cpu.so"
    done = subprocess.run(
        [sys.executable, "-c", script, str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("number", "told"),
    [
        *((n, True) for n in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)),
        *((n, True) for n in (errno.EACCES, errno.EPERM, errno.EROFS)),
        *((n, False) for n in (errno.ENOSPC, errno.EIO, errno.EMFILE)),
    ],
)
def test_a_refused_file_is_named(number, told):
    error = OSError(number, os.strerror(number), "some/file")
    assert refusal(error) == (f"'some/file': {os.strerror(number)}" if told else None)
    assert refusal(OSError(number, os.strerror(number))) is None  # of no file


def test_a_name_of_the_systems_own_error_is_in_the_words(tmp_path):
    with pytest.raises(OSError, match="too long") as error:
        (tmp_path / ("a" * 300)).read_bytes()
    assert refusal(error.value).endswith("File name too long")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("digit", "; did you mean 'digits'?"),
        ("digitz", "; did you mean 'digits'?"),
        ("cif", "; did you mean 'cifar10'?"),
        ("zzz", "; there are cifar10, cifar100, digits"),
        ("", "; there are cifar10, cifar100, digits"),
    ],
)
def test_the_nearest_name_is_suggested(name, suggestion):
    assert nearest(name, ["digits", "cifar100", "cifar10"]) == suggestion


def test_a_long_list_is_not_printed():
    many = [f"model_{i:03}" for i in range(21)]
    assert nearest("zzz", many) == ""
    assert nearest("zzz", many[:20]).startswith("; there are model_000, model_001")
    assert nearest("zzz", []) == "; there are "


@given(st.lists(st.text(), max_size=12), st.text())
def test_what_is_suggested_is_known(names, name):
    found = nearest(name, names)
    if found.startswith("; did you mean '"):
        assert found.removeprefix("; did you mean '").removesuffix("'?") in names
