"""Errors in words: out of memory, refused files, and the nearest of known names."""

import errno
import os

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
    ],
)
def test_errors_that_mean_too_little_memory(error, memory):
    assert is_out_of_memory(error) is memory


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
        ("", "; did you mean 'cifar10'?"),
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
